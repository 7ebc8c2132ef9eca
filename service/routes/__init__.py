"""The routes of the HTTP interface, in one module for each resource. A route parses the request, calls the code that
does the work, and builds the answer."""
