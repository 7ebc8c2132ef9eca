"""Small files of dino.txt with random weights and Meta's names, and a small vocabulary in CLIP's format."""

import gzip
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from model.artifact import (
    MANIFEST,
    ONNX,
    WEIGHTS,
    StoredWeights,
    bundled_artifact,
    describe_file,
    fingerprint,
    read_manifest,
)
from model.config import ViTConfig
from model.convert import backbone_shapes
from model.dinotxt.store import Sources, write_safetensors
from model.onnx_graph.build import write_onnx
from model.onnx_graph.spec import GraphSpec
from model.preprocess import PreprocessSpec
from tests.model.torch_files import write_torch_file

Shapes = dict[str, tuple[int, ...]]

CORPUS = (
    "a photo of a cat. a photo of the dogs. a bad photo of a red apple, an image of some packages of milk. "
    "a close-up photo of one cat's tail in 1999! we'll see the drawing of it; they're here & there. naïve café 日本語"
)
MERGES = 90
VOCAB_SIZE = 512 + MERGES + 2


def block_shapes(prefix: str, names: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in names.items()}


def vision_head_shapes(width: int = 64, hidden: int = 96, depth: int = 2) -> Shapes:
    """Return the shapes of a vision head's tensors, as listed in the published file."""
    d, h = (width,), hidden
    shapes: Shapes = {}
    for i in range(depth):
        shapes |= block_shapes(
            f"block_list.{i}",
            {
                "norm1.weight": d,
                "norm1.bias": d,
                "attn.qkv.weight": (3 * width, width),
                "attn.proj.weight": (width, width),
                "attn.proj.bias": d,
                "ls1.gamma": d,
                "norm2.weight": d,
                "norm2.bias": d,
                "mlp.w1.weight": (h, width),
                "mlp.w1.bias": (h,),
                "mlp.w2.weight": (h, width),
                "mlp.w2.bias": (h,),
                "mlp.w3.weight": (width, h),
                "mlp.w3.bias": d,
                "ls2.gamma": d,
            },
        )
    return shapes | {"ln_final.weight": d, "ln_final.bias": d}


def text_encoder_shapes(
    width: int = 128, hidden: int = 256, depth: int = 3, vocab: int = VOCAB_SIZE, context: int = 20, out: int = 128
) -> Shapes:
    """Return the shapes of a text encoder's tensors, as listed in the published file."""
    d = (width,)
    shapes: Shapes = {"backbone.positional_embedding": (context, width)}
    shapes["backbone.token_embedding.weight"] = (vocab, width)
    for i in range(depth):
        shapes |= block_shapes(
            f"backbone.blocks.{i}",
            {
                "attention_norm.weight": d,
                "attention_norm.bias": d,
                "attention.qkv.weight": (3 * width, width),
                "attention.proj.weight": (width, width),
                "attention.proj.bias": d,
                "ffn_norm.weight": d,
                "ffn_norm.bias": d,
                "feed_forward.fc1.weight": (hidden, width),
                "feed_forward.fc1.bias": (hidden,),
                "feed_forward.fc2.weight": (width, hidden),
                "feed_forward.fc2.bias": d,
            },
        )
    shapes |= {"backbone.ln_final.weight": d, "backbone.ln_final.bias": d}
    return shapes | {"head.linear_projection.weight": (out, width)}


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random tensors in which every value affects the result.

    The embeddings are small, as in a new text encoder, so that the epsilon of the first norm affects the result.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(1.5 * shape[-1] ** -0.5 if len(shape) > 1 else 0.2)
        scales = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_final.weight", "gamma"))
        tensors[name] = values * np.float32(0.1 if "embedding" in name else 1) + np.float32(scales)
    return tensors


def write_vocabulary(path: Path, merges: int = MERGES) -> list[tuple[str, str]]:
    """Write the pairs that byte pair encoding learns from `CORPUS`, and return them."""
    words = Counter(CORPUS.replace(".", " .").replace(",", " ,").split())
    spelled = {word: [_symbol(byte) for byte in word.encode()] for word in words}
    for symbols in spelled.values():
        symbols[-1] += "</w>"
    pairs: list[tuple[str, str]] = []
    for _ in range(merges):
        counts: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            counts.update(dict.fromkeys(pairwise(symbols), words[word]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        pairs.append(best)
        for symbols in spelled.values():
            for at in range(len(symbols) - 1, 0, -1):
                if (symbols[at - 1], symbols[at]) == best:
                    symbols[at - 1 : at + 1] = ["".join(best)]
    lines = ["a comment, as in CLIP's file", *(" ".join(pair) for pair in pairs), ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return pairs


def _symbol(byte: int) -> str:
    """Return GPT-2's character for a byte: itself if it is printed, otherwise the next free character from U+0100."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printed else chr(256 + [b for b in range(256) if b not in printed].index(byte))


def write_artifact(folder: Path) -> Path:
    """Write an artifact with a small backbone that has registers, and random weights. Return `folder`."""
    config = ViTConfig(embed_dim=64, depth=2, num_heads=1, img_size=70, num_register_tokens=4, layerscale_init=0.5)
    spec = PreprocessSpec(resize=80, crop=70)
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_tensors(backbone_shapes(config))
    write_safetensors(folder / WEIGHTS, weights)
    write_onnx(weights, config, GraphSpec(size=(70, 70)), folder / ONNX)
    changes = {
        "name": "small",
        "fingerprint": fingerprint(StoredWeights(folder / WEIGHTS), config, spec),
        "config": config,
        "preprocess": spec,
        "input_size": (70, 70),
        "parity": [],
        "graphs": [],
        "files": {name: describe_file(folder / name) for name in (WEIGHTS, ONNX)},
    }
    manifest = read_manifest(bundled_artifact()).model_copy(update=changes)
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def write_sources(folder: Path, *, width: int = 64, suffix: str = ".pth") -> Sources:
    """Write the three files from which dino.txt is added, for a backbone of this width."""
    vision = random_tensors(vision_head_shapes(width), seed=1)
    text = random_tensors(text_encoder_shapes(out=2 * width), seed=2)
    write = write_torch_file if suffix == ".pth" else write_safetensors
    sources = Sources(folder / f"x_vision_head{suffix}", folder / f"x_text_encoder{suffix}", folder / "bpe.txt.gz")
    write(sources.vision_head, vision)
    write(sources.text_encoder, text)
    write_vocabulary(sources.vocabulary)
    return sources
