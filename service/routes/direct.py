"""Routes that pass the request and the path parameters directly to their route functions.

FastAPI's own routes resolve dependencies, open exit stacks and validate arguments on every call. This work takes longer
than a search. The route functions of this service parse the request themselves. `openapi.py` makes the OpenAPI document
from these routes. `service/middleware.py` turns the errors that a route function raises into answers.

The other functions of this module make routes behave alike: each route accepts a trailing slash, and each GET route has
a HEAD route.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service.security import Need, needed, require
from service.state import Service

_ITEM_ID: Final = "(?P<item_id>.*)"


def service_of(request: Request) -> Service:
    """Return the `Service` object of the application that received the request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


class DirectRequest(Request):
    """A request that reads its body in fewer steps than Starlette's class, which uses an asynchronous generator. A body
    that arrives in one message is not copied."""

    async def body(self) -> bytes:
        if hasattr(self, "_body"):
            return self._body
        if self._stream_consumed:  # another message will never come
            raise RuntimeError("the body was already read as a stream")
        pieces, more = [], True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        self._body: bytes = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self._body


class DirectRoute(APIRoute):
    """A route that awaits `endpoint(request, **path_parameters)` and sends the response that the endpoint returns. The
    sender of the request must have the scope that `service/security.py` assigns to the route."""

    def __init__(self, path: str, endpoint: Any, **options: Any) -> None:
        super().__init__(path, endpoint, **options | {"response_model": None})
        need = route_need(self)

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            require(scope["state"], need)
            answer: Response = await endpoint(DirectRequest(scope, receive, send), **scope["path_params"])
            await answer(scope, receive, send)

        self.app = call
        accept_trailing_slash(self)


def route_need(route: BaseRoute) -> Need:
    """Return what a route needs. Each route of this service has one method, apart from HEAD and OPTIONS."""
    assert isinstance(route, Route)
    methods = route.methods or set()
    [method] = methods - {"HEAD", "OPTIONS"} or {"GET"}
    return needed(method, route.path)


def protect(route: BaseRoute) -> None:
    """Make a route of the framework check the sender of a request, as `DirectRoute` does."""
    assert isinstance(route, Route)
    need, inner = route_need(route), route.app

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        require(scope["state"], need)
        await inner(scope, receive, send)

    route.app = call


def accept_trailing_slash(route: BaseRoute) -> None:
    """Make a route also accept its path with a slash at the end.

    A route whose path ends in the id of an item stays as it is, because the slash is part of the id. So does a route
    that deletes: clients turn `/v1/collections/shop/items/..` into `/v1/collections/shop/`, and would delete everything
    instead of one item."""
    assert isinstance(route, Route)
    pattern = route.path_regex.pattern.removesuffix("$")
    if not pattern.endswith(_ITEM_ID) and "DELETE" not in (route.methods or ()):
        pattern = re.sub(r"\.\*\)$", ".+?)", pattern) + "/?"
    # The $ of Starlette's pattern would match before a line break at the end of the path, and lose this line break.
    route.path_regex = re.compile(pattern + r"\Z", re.DOTALL)


def tell_root_path(route: BaseRoute, root_path: str) -> None:
    """Make one of the framework's own routes, such as /docs, put the prefix `root_path` before its links."""
    assert isinstance(route, Route)
    app = route.app

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": root_path}, receive, send)

    route.app = call


def answers_get(route: BaseRoute) -> bool:
    """Return whether a route answers GET requests."""
    return isinstance(route, DirectRoute) and "GET" in (route.methods or ())


def head_route(route: BaseRoute) -> DirectRoute:
    """Return a route that answers HEAD requests with the function of a GET route. The server leaves out the body.

    FastAPI would list HEAD in the OpenAPI document if it were a second method of the GET route.
    """
    assert isinstance(route, DirectRoute)
    return DirectRoute(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)


def dispatcher(routes: Sequence[BaseRoute], otherwise: ASGIApp) -> ASGIApp:
    """Return an application that passes each request to the first `DirectRoute` that matches it. `otherwise` is the
    application for requests without such a route, which need the framework's routes or its errors 404 and 405."""
    direct = [route for route in routes if isinstance(route, DirectRoute)]

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        for route in direct:
            match, values = route.matches(scope)
            if match is Match.FULL:
                scope.update(values)
                await route.app(scope, receive, send)
                return
        await otherwise(scope, receive, send)

    return call


def find_route(routes: Sequence[BaseRoute], scope: Scope) -> None:
    """Store the route of a request in its scope, as the router does, without calling the route. Do nothing if no route
    has the path of the request."""
    found: Scope = {}
    for route in routes:
        match, values = route.matches(scope)
        if match is Match.FULL:
            found = values
            break
        found = found or values  # the path matches and the method does not, or nothing matches
    scope.update(found)


def allowed_methods(request: Request) -> list[str]:
    """Return the methods of all routes that match the path of a request, in alphabetical order."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return sorted(methods)
