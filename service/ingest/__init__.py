"""Add images to a collection: from requests, folders, archives and lists. Embed image files and write their vectors to
a file."""
