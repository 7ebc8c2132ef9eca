"""The routes, one file per resource. A route parses the request, calls the code that does the work, and builds the
answer."""
