"""A substitute for the package `openvino`, for tests of the errors that the engine raises."""

from types import SimpleNamespace
from typing import Any


class FakeCompiled:
    """A compiled graph whose properties are given."""

    def __init__(self, properties: dict[str, Any]) -> None:
        self.get_property = properties.__getitem__

    def create_infer_request(self) -> object:
        return object()


def make_fake_openvino(*, type_name: str = "bf16", threads: int = 1, error: str | None = None) -> Any:
    """Return a module with the parts of `openvino` that the engine uses, for a graph of 70 x 98 pixels.

    Args:
        type_name: the precision in which the compiled graph computes.
        threads: the number of threads that the compiled graph uses.
        error: the message of the error that compiling raises, or None.

    The attribute `asked` lists the options of each compilation.
    """
    types = {name: SimpleNamespace(get_type_name=lambda name=name: name) for name in ("f32", "bf16")}
    sides = [SimpleNamespace(get_length=lambda side=side: side) for side in (0, 3, 70, 98)]
    graph = SimpleNamespace(inputs=[SimpleNamespace(partial_shape=sides)], outputs=[], get_ops=list)
    asked: list[dict[str, Any]] = []

    class Core:
        def read_model(self, path: object) -> Any:
            return graph

        def compile_model(self, graph: object, device: str, options: dict[str, Any]) -> FakeCompiled:
            asked.append(options)
            if error is not None:
                raise RuntimeError(error)
            return FakeCompiled({"INFERENCE_PRECISION_HINT": types[type_name], "INFERENCE_NUM_THREADS": threads})

    return SimpleNamespace(Core=Core, Type=SimpleNamespace(**types), asked=asked)
