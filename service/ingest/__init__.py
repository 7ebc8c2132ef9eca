"""Add images from folders, archives and lists to a collection, or embed image files and write the vectors to a file."""
