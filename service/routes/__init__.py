"""The routes of the HTTP interface, one file for each resource. A route parses the request, calls the code that does
the work, and builds the answer."""
