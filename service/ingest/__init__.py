"""Index images from folders, archives and lists in a collection, or embed image files and write the vectors to a
file."""
