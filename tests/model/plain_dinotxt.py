"""A plain implementation of dino.txt's two networks in torch, as in Meta's code."""

import numpy as np
import pytest


def plain_attention(torch, tensors, key: str, x, *, causal: bool):
    """Multi-head attention as in dinov2's `Attention`, with heads of width 64."""
    t, d = x.shape[-2:]
    q, k, v = (x @ tensors[f"{key}.qkv.weight"].T).reshape(*x.shape[:-1], 3, d // 64, 64).movedim(-3, 0)
    q, k, v = (part.transpose(-3, -2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) * 64**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(-3, -2).reshape(x.shape)
    return mixed @ tensors[f"{key}.proj.weight"].T + tensors[f"{key}.proj.bias"]


def plain_norm(torch, tensors, key: str, x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], tensors[f"{key}.weight"], tensors[f"{key}.bias"], eps=1e-5)


def plain_linear(torch, tensors, key: str, x):
    return torch.nn.functional.linear(x, tensors[f"{key}.weight"], tensors[f"{key}.bias"])


def plain_vision_head(tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="the networks are compared with torch: pip install '.[train]'")
    tensors, x = {name: torch.from_numpy(array) for name, array in tensors.items()}, torch.from_numpy(tokens)
    for i in range(2):
        key = f"block_list.{i}"
        attended = plain_attention(
            torch, tensors, f"{key}.attn", plain_norm(torch, tensors, f"{key}.norm1", x), causal=False
        )
        x = x + tensors[f"{key}.ls1.gamma"] * attended
        normed = plain_norm(torch, tensors, f"{key}.norm2", x)
        gate, value = (plain_linear(torch, tensors, f"{key}.mlp.{name}", normed) for name in ("w1", "w2"))
        hidden = torch.nn.functional.silu(gate) * value
        x = x + tensors[f"{key}.ls2.gamma"] * plain_linear(torch, tensors, f"{key}.mlp.w3", hidden)
    return plain_norm(torch, tensors, "ln_final", x).numpy()


def plain_text_encoder(tensors: dict[str, np.ndarray], prompt: list[int], *, depth: int = 3) -> np.ndarray:
    """Encode a prompt as Meta's code does: with zeros up to the whole context, and the features at the largest id."""
    torch = pytest.importorskip("torch", reason="the networks are compared with torch: pip install '.[train]'")
    tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}
    positions = tensors["backbone.positional_embedding"]
    ids = torch.zeros(len(positions), dtype=torch.long)
    ids[: len(prompt)] = torch.tensor(prompt)
    x = tensors["backbone.token_embedding.weight"][ids] + positions
    for i in range(depth):
        key = f"backbone.blocks.{i}"
        normed = plain_norm(torch, tensors, f"{key}.attention_norm", x)
        x = x + plain_attention(torch, tensors, f"{key}.attention", normed, causal=True)
        hidden = plain_linear(
            torch, tensors, f"{key}.feed_forward.fc1", plain_norm(torch, tensors, f"{key}.ffn_norm", x)
        )
        x = x + plain_linear(torch, tensors, f"{key}.feed_forward.fc2", torch.nn.functional.gelu(hidden))
    x = plain_norm(torch, tensors, "backbone.ln_final", x) @ tensors["head.linear_projection.weight"].T
    return x[ids.argmax()].numpy()
