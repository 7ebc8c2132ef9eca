"""The web pages: the playground at `/`, the documentation of the REST API at `/docs`, and their files."""

from collections.abc import Mapping
from typing import Final

from fastapi import APIRouter, Request, Response

from service.errors import NotFound
from service.playground.files import HEADERS, WebFile, read_files
from service.routes.direct import DirectRoute
from service.settings import Settings

router = APIRouter(route_class=DirectRoute, include_in_schema=False)
_PLAYGROUND: Final = "/"


def opened_files(settings: Settings) -> Mapping[str, WebFile]:
    """Return the files that the service sends, by their path. Without the playground, these are the page /docs and the
    files below /assets/."""
    web_files = read_files(settings.root_path, has_playground=settings.playground)
    if not settings.playground:
        del web_files[_PLAYGROUND]
    return web_files


@router.get(_PLAYGROUND)
@router.get("/docs")
async def page(request: Request) -> Response:
    """Send a page."""
    return _answer(request, request.url.path.removeprefix(request.app.state.root_path).rstrip("/") or "/")


@router.get("/assets/{name:path}")
async def asset(request: Request, name: str) -> Response:
    """Send a script or a style sheet."""
    return _answer(request, f"/assets/{name}")


def _answer(request: Request, path: str) -> Response:
    web_files: Mapping[str, WebFile] = request.app.state.web_files
    if (web_file := web_files.get(path)) is None:
        raise NotFound(f"there is no page {path[:200]!r}: see /docs for all routes")
    headers = HEADERS | {"ETag": web_file.etag}
    if request.headers.get("if-none-match") == web_file.etag:
        return Response(status_code=304, headers=headers)
    return Response(web_file.content, headers=headers, media_type=web_file.media_type)
