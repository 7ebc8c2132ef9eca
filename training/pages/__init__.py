"""HTML pages and image sheets that describe training runs."""
