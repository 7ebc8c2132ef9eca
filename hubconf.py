"""The entry points of torch hub, with the names and the arguments of Meta's hubconf.py.

With `hub = functools.partial(torch.hub.load, FOLDER, source="local")`, where FOLDER is this repository:

- `hub("dinov2_vits14")` loads the published weights.
- `hub("dinov2_vits14", weights="runs/mine")` loads weights of this architecture from a file or folder.
- `hub("dinov2_vits14_lc", layers=1)` adds Meta's classifier for ImageNet.
- `hub("dinov2", "runs/mine")` loads a file or folder that contains its architecture.
- `hub("dinov2_timm", "runs/mine")` returns a model with timm's interface.
"""

import sys

dependencies = ["torch", "httpx", "ml_dtypes", "numpy", "onnx", "PIL", "pydantic", "rich", "safetensors"]

if "model" in sys.modules and not hasattr(sys.modules["model"], "__path__"):
    raise ImportError(
        f"a module named model is already imported from {getattr(sys.modules['model'], '__file__', '?')}: load this "
        "project's models before it, or rename it, because this project's package has the same name"
    )

from model.hub import backbone_entry, classifier_entry  # noqa: E402
from model.hub import hub_model as dinov2  # noqa: E402
from model.hub import timm_model as dinov2_timm  # noqa: E402

__all__ = [  # noqa: RUF022 - by size
    "dinov2",
    "dinov2_timm",
    "dinov2_vits14",
    "dinov2_vitb14",
    "dinov2_vitl14",
    "dinov2_vitg14",
    "dinov2_vits14_reg",
    "dinov2_vitb14_reg",
    "dinov2_vitl14_reg",
    "dinov2_vitg14_reg",
    "dinov2_vits14_lc",
    "dinov2_vitb14_lc",
    "dinov2_vitl14_lc",
    "dinov2_vitg14_lc",
    "dinov2_vits14_reg_lc",
    "dinov2_vitb14_reg_lc",
    "dinov2_vitl14_reg_lc",
    "dinov2_vitg14_reg_lc",
]

dinov2_vits14 = backbone_entry("dinov2_vits14")
dinov2_vitb14 = backbone_entry("dinov2_vitb14")
dinov2_vitl14 = backbone_entry("dinov2_vitl14")
dinov2_vitg14 = backbone_entry("dinov2_vitg14")
dinov2_vits14_reg = backbone_entry("dinov2_vits14_reg")
dinov2_vitb14_reg = backbone_entry("dinov2_vitb14_reg")
dinov2_vitl14_reg = backbone_entry("dinov2_vitl14_reg")
dinov2_vitg14_reg = backbone_entry("dinov2_vitg14_reg")

dinov2_vits14_lc = classifier_entry("dinov2_vits14")
dinov2_vitb14_lc = classifier_entry("dinov2_vitb14")
dinov2_vitl14_lc = classifier_entry("dinov2_vitl14")
dinov2_vitg14_lc = classifier_entry("dinov2_vitg14")
dinov2_vits14_reg_lc = classifier_entry("dinov2_vits14_reg")
dinov2_vitb14_reg_lc = classifier_entry("dinov2_vitb14_reg")
dinov2_vitl14_reg_lc = classifier_entry("dinov2_vitl14_reg")
dinov2_vitg14_reg_lc = classifier_entry("dinov2_vitg14_reg")
