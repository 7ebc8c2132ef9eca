"""Send files. With the header `Range`, clients can ask for a part of a file. A link is not followed."""

import os

from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from service.errors import BadRequest, NotFound, RangeNotSatisfiable


class RangedFile(FileResponse):
    """An answer with a file or a part of it. For an invalid `Range`, Starlette would answer in plain text or without a
    body. This class raises one of the service's errors instead."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer.

        Raises:
            BadRequest: the header `Range` is malformed.
            RangeNotSatisfiable: the range begins after the end of the file.
            NotFound: there is no such file, or it is a link.
        """
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound("the file no longer exists") from error

        async def checked_send(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                wanted = dict(scope["headers"]).get(b"range", b"").decode("latin-1")[:80]
                if message["status"] == 400:
                    raise BadRequest(f"Range: {wanted!r} is malformed; send bytes=FIRST-LAST")
                content_range = dict(message["headers"])[b"content-range"].decode("latin-1")
                size = content_range.rpartition("/")[2]
                raise RangeNotSatisfiable(
                    f"Range: {wanted!r} is outside the file, which has {size} bytes",
                    headers={"Content-Range": content_range},
                )
            await send(message)

        self.path = f"/dev/fd/{handle}"  # the same file, whatever happens to its name
        try:
            await super().__call__(scope, receive, checked_send)
        finally:
            os.close(handle)
