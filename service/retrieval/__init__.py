"""What a search request asks for, where it starts, what it finds, and in which order."""
