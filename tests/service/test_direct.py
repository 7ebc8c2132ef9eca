"""Tests of the routes without FastAPI's own processing: reading a body, and the choice of the route."""

import pytest
from fastapi.responses import PlainTextResponse
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from service.routes.direct import DirectRequest, DirectRoute, dispatcher

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


def request_with(*messages):
    left = list(messages)

    async def receive():
        return left.pop(0)

    return DirectRequest(dict(SCOPE), receive)


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "http.request", "body": b"abc"}],
        [
            {"type": "http.request", "body": b"a", "more_body": True},
            {"type": "http.request", "more_body": True},
            {"type": "http.request", "body": b"bc", "more_body": False},
        ],
    ],
    ids=["one message", "several"],
)
async def test_a_body_can_be_read_several_times(messages):
    request = request_with(*messages)
    assert await request.body() == await request.body() == b"abc"
    assert b"".join([piece async for piece in request.stream()]) == b"abc"


async def test_a_body_whose_client_disconnects_is_an_error():
    request = request_with({"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.disconnect"})
    with pytest.raises(ClientDisconnect):
        await request.body()


async def test_a_body_that_was_read_as_a_stream_cannot_be_read_again():
    request = request_with({"type": "http.request", "body": b"abc"})
    assert b"".join([piece async for piece in request.stream()]) == b"abc"
    with pytest.raises(RuntimeError, match="already read"):
        await request.body()


async def test_a_request_goes_to_the_first_of_our_routes_and_otherwise_to_the_framework():
    called = []

    def route(name, path, method="GET"):
        async def endpoint(request, **values):
            called.append((name, values))
            return PlainTextResponse("")

        return DirectRoute(path, endpoint, methods=[method])

    async def framework(scope, receive, send):
        called.append(("framework", scope["path"]))

    async def send(message):
        pass

    of_framework = Route("/docs", PlainTextResponse(""))
    routes = [of_framework, route("a", "/a/{x}"), route("any", "/{y}/{z}"), route("post", "/a", "POST")]
    app = dispatcher(routes, otherwise=framework)
    anyone = {"principal": type("Principal", (), {"scopes": {"admin"}})}
    for method, path in (("GET", "/a/1"), ("GET", "/b/1"), ("POST", "/a"), ("GET", "/a"), ("GET", "/docs")):
        scope = {**SCOPE, "method": method, "path": path, "state": dict(anyone)}
        await app(scope, None, send)
        assert ("route" in scope) == (called[-1][0] != "framework")
    assert called == [
        ("a", {"x": "1"}),
        ("any", {"y": "b", "z": "1"}),
        ("post", {}),
        ("framework", "/a"),
        ("framework", "/docs"),
    ]
