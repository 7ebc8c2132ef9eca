"""The DINOv2 network, its export to an artifact, and the engines that run an artifact.

`from model import load_model` imports the function that loads a backbone. The function is imported only when it is
accessed, because it needs torch, and a server may run without torch.
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
