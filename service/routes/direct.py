"""Routes that pass the request and the path parameters directly to their route functions.

FastAPI's own routes resolve dependencies, open exit stacks and validate arguments on every call. This work takes longer
than a search. The route functions of this service parse the request themselves. `openapi.py` makes the OpenAPI document
from these routes. `service/middleware.py` turns the errors that a route function raises into answers.
"""

from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from service.state import Service


def service_of(request: Request) -> Service:
    """Return the `Service` object of the application that received the request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


class DirectRoute(APIRoute):
    """A route that awaits `endpoint(request, **path_parameters)` and sends the response that the endpoint returns."""

    def __init__(self, path: str, endpoint: Any, **options: Any) -> None:
        super().__init__(path, endpoint, **options | {"response_model": None})

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            answer: Response = await endpoint(Request(scope, receive, send), **scope["path_params"])
            await answer(scope, receive, send)

        self.app = call
