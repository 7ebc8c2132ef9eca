"""An artifact that contains only what a head needs: a manifest and the weights of the final norm."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from model.artifact import Artifact, Manifest
from model.config import ViTConfig
from model.preprocess import PreprocessSpec

CONFIG = ViTConfig(embed_dim=16, depth=12, num_heads=2, img_size=28)


def small_artifact(
    folder: Path, *, config: ViTConfig = CONFIG, digit: str = "a", derived_dir: Path | None = None
) -> Artifact:
    """Return an artifact in a new folder. Its fingerprint is `digit`, repeated 64 times."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    norm = {f"norm.{part}": rng.standard_normal(config.embed_dim, dtype=np.float32) for part in ("weight", "bias")}
    save_file(norm, folder / "weights.safetensors")
    manifest = Manifest(
        name="small",
        fingerprint=digit * 64,
        config=config,
        preprocess=PreprocessSpec(resize=28, crop=28),
        input_size=(28, 28),
        parity=[],
        provenance={},
        licence="Apache-2.0",
        created="2026-01-01T00:00:00+00:00",
        files={},
    )
    locations = {"weights.safetensors": folder / "weights.safetensors"}
    return Artifact(path=folder, manifest=manifest, locations=locations, derived_dir=derived_dir)
