"""Decode images in a process of its own, for `service/features/decode_processes.py`: python -m
service.features.decode_child SOCKET FILE

The arguments are the numbers of two open files: a socket to the service, and a file for pixels. For each image, the
service sends the limits and the bytes. The process answers with messages in JSON:

    {"ask": "size", "value": [width, height]}    the service answers b"go" or b"stop"
    {"ask": "memory", "value": bytes}            the same
    {"shape": [height, width, 3]}                the image is decoded, and its pixels are in the file
    {"error": "Broken", "message": "..."}        it cannot be decoded

The process limits its own memory and processor time for each image. It ends when the service closes the socket, or when
it has had nothing to do for a while.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from model.decode import Broken, DecodeError, DecodeLimits, Pixels, TooLarge, Unsupported, decode

IDLE_S: Final = 20.0
CPU_S: Final = 20
"""Processor time for one image, in seconds. 64 megapixels of AVIF with 12 bits take about 4."""
SPARE_BYTES: Final = 2**26
_KINDS: Final = {kind.__name__: kind for kind in (TooLarge, Unsupported, Broken)}


class Stopped(DecodeError):
    """The error for an image that the service does not want decoded."""


def error_from(answer: dict[str, Any]) -> DecodeError:
    """Return the error that an answer of the process describes."""
    return _KINDS.get(answer["error"], Stopped)(answer["message"])


def serve(connection: "Connection[bytes, bytes]", file: int) -> None:
    """Decode images until the service closes the connection, or sends nothing for `IDLE_S` seconds."""
    while connection.poll(IDLE_S):
        limits = DecodeLimits(**json.loads(connection.recv_bytes()))
        answer = _decode_one(connection, file, connection.recv_bytes(), limits)
        connection.send_bytes(json.dumps(answer).encode())


def _decode_one(connection: "Connection[bytes, bytes]", file: int, data: bytes, limits: DecodeLimits) -> dict[str, Any]:
    """Decode an image, and return the answer to the service."""
    on_size, on_memory = _asker(connection, "size"), _asker(connection, "memory", _limit_memory)
    try:
        _limit_time()
        _limit_memory(3 * len(data))
        pixels = decode(data, limits, on_size=on_size, on_memory=on_memory)
        os.ftruncate(file, pixels.nbytes)
        write_all(file, pixels)
    except MemoryError:
        return {"error": TooLarge.__name__, "message": "the image needs more memory than expected"}
    except DecodeError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"shape": pixels.shape}


def _asker(
    connection: "Connection[bytes, bytes]", what: str, then: Callable[[int], None] | None = None
) -> Callable[..., None]:
    """Return a function that tells the service a value and raises Stopped if the service does not want to go on."""

    def ask(*values: int) -> None:
        connection.send_bytes(json.dumps({"ask": what, "value": values}).encode())
        if connection.recv_bytes() != b"go":
            raise Stopped("the service does not want this image")
        if then is not None:
            then(*values)

    return ask


def _limit_memory(n_bytes: int) -> None:
    """Limit the address space to what is in use, and `n_bytes` and something to spare."""
    if sys.platform == "linux":
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (in_use + n_bytes + n_bytes // 4 + SPARE_BYTES, hard))


def _limit_time() -> None:
    """Let the kernel end this process if it uses `CPU_S` more seconds of processor time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + CPU_S, hard))


def write_all(file: int, pixels: Pixels) -> None:
    """Write pixels to the start of a file."""
    view, written = pixels.data.cast("B"), 0
    while written < len(view):
        written += os.pwrite(file, view[written:], written)


def main() -> None:
    socket, file = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        serve(Connection(socket), file)
    except (EOFError, OSError):  # the service has closed the connection
        return


if __name__ == "__main__":
    main()
