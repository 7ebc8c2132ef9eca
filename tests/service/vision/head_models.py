"""Models with heads for the tests: the bundled model and the fake one, and heads with random numbers for them."""

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from model.artifact import Artifact
from model.heads.record import HeadDescription, dpt_shapes, input_width
from model.heads.store import add_head
from service.vision.local import Vision
from tests.fakes import fake_artifact


def with_heads(vision: Vision, folder: Path) -> Vision:
    """Return the same model and engine with a new folder for heads."""
    artifact = dataclasses.replace(vision.artifact, derived_dir=folder)
    return Vision(artifact, vision.engine, threads=1)


def add_linear_depth(artifact: Artifact, name: str = "rooms", *, metres: tuple[float, float] = (0.5, 8.0)) -> None:
    """Add a linear depth head that reads the last block without the final norm, as Meta's heads do."""
    config = artifact.manifest.config
    rng = np.random.default_rng(0)
    width = input_width("depth", 1, config.embed_dim)
    waves = np.cos(np.pi * np.outer(np.arange(256) / 256, np.arange(4)))  # so that neighbouring bins agree
    weight = waves @ rng.standard_normal((4, width)) / np.sqrt(width)
    head = HeadDescription(
        name=name,
        kind="depth",
        layers=(config.depth - 1,),
        normed=False,
        depth_range=metres,
        metrics={"delta1": 0.5},
        source="a test",
    )
    add_head(artifact, head, {"weight": weight.astype(np.float32), "bias": np.zeros(256, np.float32)})


def fake_with_depth(folder: Path) -> Artifact:
    """Return the artifact of the fake engine, with a depth head that needs no inner outputs."""
    artifact = fake_artifact()
    width = artifact.manifest.config.embed_dim
    folder.mkdir(parents=True)
    norm = {"norm.weight": np.ones(width, np.float32), "norm.bias": np.zeros(width, np.float32)}
    save_file(norm, folder / "weights.safetensors")
    locations = {"weights.safetensors": folder / "weights.safetensors"}
    artifact = dataclasses.replace(artifact, path=folder, locations=locations)
    head = HeadDescription(name="near", kind="depth", layers=(0,), normed=True, depth_range=(0.5, 8.0), source="a test")
    weight = np.random.default_rng(0).standard_normal((4, 2 * width), dtype=np.float32)
    add_head(artifact, head, {"weight": weight, "bias": np.zeros(4, np.float32)})
    return artifact


def add_dpt(artifact: Artifact, name: str = "dpt") -> None:
    config = artifact.manifest.config
    rng = np.random.default_rng(0)
    tensors = {}
    for key, shape in dpt_shapes(config.embed_dim).items():
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 4
        tensors[key] = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
    tensors["conv_depth.head.4.bias"] += 1
    head = HeadDescription(
        name=name,
        kind="depth",
        architecture="dpt",
        layers=tuple(range(config.depth))[-4:],
        normed=False,
        depth_range=(0.001, 10.0),
        source="a test",
    )
    add_head(artifact, head, tensors)


def add_segmenter(artifact: Artifact, name: str = "parts", classes: tuple[str, ...] = ("a", "b", "c")) -> None:
    config = artifact.manifest.config
    rng = np.random.default_rng(0)
    head = HeadDescription(
        name=name, kind="segmentation", layers=(config.depth - 1,), normed=True, classes=classes, source="a test"
    )
    weight = rng.standard_normal((len(classes), config.embed_dim), dtype=np.float32)
    add_head(artifact, head, {"weight": weight, "bias": np.zeros(len(classes), np.float32)})


def add_classifier(artifact: Artifact, name: str = "colours", classes: tuple[str, ...] = ("red", "green")) -> None:
    config = artifact.manifest.config
    rng = np.random.default_rng(0)
    head = HeadDescription(
        name=name, kind="classification", layers=(config.depth - 1,), normed=True, classes=classes, source="a test"
    )
    weight = rng.standard_normal((len(classes), 2 * config.embed_dim), dtype=np.float32)
    add_head(artifact, head, {"weight": weight, "bias": np.zeros(len(classes), np.float32)})
