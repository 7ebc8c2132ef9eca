"""Routes that call their function with the request and the parts of the path, and nothing between.

FastAPI's own routes look for dependencies, open exit stacks and validate on every call, which costs more than a search
does; our functions take the request apart themselves. The routes stay FastAPI's, so the OpenAPI document shows them.
"""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute, APIRouter
from starlette.routing import request_response


class DirectRoute(APIRoute):
    """A route to `async def endpoint(request, **parts of the path) -> Response`."""

    def __init__(self, path: str, endpoint: Any, **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def call(request: Request) -> Response:
            answer: Response = await endpoint(request, **request.path_params)
            return answer

        self.app = request_response(call)


def add_routes(app: FastAPI, router: APIRouter) -> None:
    """Every route of a router, as the application's own: `include_router` would wrap each once more."""
    app.router.routes.extend(router.routes)
