"""The network and its export to an artifact.

`from model import load_model` gives the backbone. The import is lazy, because `load_model` needs torch and serving does
not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.checkpoint import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from model.checkpoint import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
