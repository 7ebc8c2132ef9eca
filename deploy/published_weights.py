"""Serve random weights of dinov2_vits14 in the format of Hugging Face, for deploy/smoke.py.

The script runs in a container of the service's image, which has numpy and the names of the weights. It answers as
Hugging Face does: the address of the file redirects to another one, and the header X-Linked-ETag of the redirect has
the sha256 of the file. Meta's server, on the same port, has no file. /count answers how often the file was sent.
"""

import hashlib
import http.server

import numpy as np
import safetensors.numpy

from model.config import CONFIGS
from model.convert import HUGGING_FACE, _file_names, backbone_shapes

PORT = 9000
NAME = "dinov2_vits14"


def published_file() -> bytes:
    """Return a safetensors file with random weights and Hugging Face's names."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for key, shape in backbone_shapes(CONFIGS[NAME]).items():
        names = _file_names(key, HUGGING_FACE)
        array = (0.02 * rng.standard_normal(shape)).astype(np.float32)
        tensors |= dict(zip(names, np.split(array, len(names)), strict=True))
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in tensors.items()})


class Handler(http.server.BaseHTTPRequestHandler):
    content = b""
    sent = 0

    def do_GET(self) -> None:
        if self.path == "/count":
            self.answer(200, str(Handler.sent).encode())
        elif self.path.startswith("/hf/") and self.path.endswith("/model.safetensors"):
            self.answer(302, b"", Location="/file", X_Linked_ETag=f'"{hashlib.sha256(self.content).hexdigest()}"')
        elif self.path == "/file":
            Handler.sent += 1
            self.answer(200, self.content, ETag='"random"')
        else:
            self.answer(404, b"")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    Handler.content = published_file()
    http.server.ThreadingHTTPServer(("0.0.0.0", PORT), Handler).serve_forever()
