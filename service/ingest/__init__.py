"""Index images from folders, archives and lists into a collection, or embed them into a file of vectors."""
