"""What the network is and how it becomes an artifact.

`from model import load_model` gives the backbone; it is resolved on first use, because it needs torch and serving does
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
