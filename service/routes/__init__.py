"""The routes, one file per resource. A route parses the request, calls one function and answers."""
