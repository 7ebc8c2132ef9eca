"""Routes that call their function with the request and the parts of the path, and nothing between.

FastAPI's own routes look for dependencies, open exit stacks and validate on every call, which costs more than a search
does; our functions take the request apart themselves. The routes stay FastAPI's, so the OpenAPI document shows them. An
error is left to the application (`service/app.py`).
"""

from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from service.state import Service


def service_of(request: Request) -> Service:
    """The service that answers this request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


class DirectRoute(APIRoute):
    """A route to `async def endpoint(request, **parts of the path) -> Response`."""

    def __init__(self, path: str, endpoint: Any, **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            answer: Response = await endpoint(Request(scope, receive, send), **scope["path_params"])
            await answer(scope, receive, send)

        self.app = call
