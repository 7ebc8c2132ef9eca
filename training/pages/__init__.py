"""Pages and images about runs."""
