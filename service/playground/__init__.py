"""The web pages of the service: the playground at `/`, and the documentation of the REST API at `/docs`.

The pages are plain HTML, CSS and JavaScript modules in `pages/`. There is no build step, and nothing is loaded from
elsewhere, so the pages work offline.
"""
