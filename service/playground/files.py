"""Read the files of the web pages, and define the headers with which they are sent."""

import html
import mimetypes
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

PAGES: Final = {"/": "index.html", "/docs": "docs.html"}
"""The file of each page. All other files are below /assets/."""
HEADERS: Final = {
    "Cache-Control": "no-cache",  # the browser asks each time whether a file has changed
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob:",
            "media-src blob:",
            "connect-src 'self'",
            "worker-src 'self'",
            "form-action 'none'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types worker",  # the policy in views/map-data.js, which allows one script
        )
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PLAYGROUND_LINK: Final = b'<a href="{root}/">Playground</a>'
_TYPES: Final = {".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class WebFile:
    """The content of a file, its media type, and its entity tag with quotes."""

    content: bytes
    media_type: str
    etag: str


def read_files(root_path: str, *, has_playground: bool = True) -> dict[str, WebFile]:
    """Return all files by their URL path, such as `/assets/style.css`. Pages have `root_path` before their links, and
    /docs links to the playground if the service has it."""
    found: dict[str, WebFile] = {}
    pending: list[tuple[str, Traversable]] = [("", files("service.playground") / "pages")]
    while pending:
        prefix, folder = pending.pop()
        for entry in folder.iterdir():
            name = prefix + entry.name
            if entry.is_dir():
                pending.append((f"{name}/", entry))
            else:
                found[f"/assets/{name}"] = _read(entry, root_path, has_playground)
    return found | {path: found.pop(f"/assets/{name}") for path, name in PAGES.items()}


def _read(entry: Traversable, root_path: str, has_playground: bool) -> WebFile:
    content = entry.read_bytes()
    suffix = entry.name[entry.name.rindex(".") :]
    if suffix == ".html":
        content = content.replace(b"{playground}", PLAYGROUND_LINK if has_playground else b"")
        content = content.replace(b"{root}", html.escape(root_path).encode())
    media_type = _TYPES.get(suffix) or mimetypes.guess_type(entry.name)[0]
    assert media_type is not None, entry.name
    return WebFile(content, media_type, f'"{sha256(content).hexdigest()[:32]}"')
