"""Routes that pass the request and the path parameters directly to their function.

FastAPI's own routes resolve dependencies, open exit stacks and validate on every call, which costs more than a search.
The functions here parse the request themselves. The routes remain FastAPI routes, so the OpenAPI document lists them.
The application handles errors (`service/app.py`).
"""

from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from service.state import Service


def service_of(request: Request) -> Service:
    """Return the service that answers this request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


class DirectRoute(APIRoute):
    """A route to `async def endpoint(request, **path_parameters) -> Response`."""

    def __init__(self, path: str, endpoint: Any, **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            answer: Response = await endpoint(Request(scope, receive, send), **scope["path_params"])
            await answer(scope, receive, send)

        self.app = call
