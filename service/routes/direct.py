"""Routes that pass the request and the path parameters directly to their function.

On every call, FastAPI's own routes resolve dependencies, open exit stacks and validate arguments. This takes longer
than a search. A route function of this service parses the request itself. `DirectRoute` is still a FastAPI route, so
the OpenAPI document lists it. `service/app.py` turns the errors that a route raises into answers.
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
    """A route that calls `async def endpoint(request, **path_parameters) -> Response`."""

    def __init__(self, path: str, endpoint: Any, **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            answer: Response = await endpoint(Request(scope, receive, send), **scope["path_params"])
            await answer(scope, receive, send)

        self.app = call
