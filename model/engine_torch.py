"""The torch engine: the reference that every other engine is compared with, able to serve without an export."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from model.config import ViTConfig
from model.engine import Features, FloatArray
from model.vit import DinoVisionTransformer


class TorchEngine:
    """Runs `weights.safetensors` in float32 on `device`; None is CUDA where there is one."""

    name = "torch"
    precision = "fp32"

    def __init__(self, weights: Path, config: ViTConfig, *, threads: int, device: str | None = None) -> None:
        torch.set_num_threads(threads)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            model = DinoVisionTransformer(config)
        state = {key: tensor.float() for key, tensor in load_file(weights).items()}
        model.load_state_dict(state, strict=True, assign=True)
        self._model = model.eval().requires_grad_(False).to(self.device)

    def run(self, pixels: FloatArray) -> Features:
        """See `model.engine.Engine`."""
        with torch.inference_mode():
            features = self._model.forward_features(torch.from_numpy(pixels).to(self.device))
        names = ("x_norm_clstoken", "x_norm_patchtokens", "x_norm_regtokens")
        return Features(*(features[name].float().cpu().numpy() for name in names))  # type: ignore[literal-required]
