"""Images from folders, archives and lists into collections and files of vectors."""
