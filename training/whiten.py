"""Whiten the class token by changing the network's weights, without an extra layer.

After a short run, a few directions (such as brightness and the colour of the light) account for most of the class
token's variance and dominate cosine similarity. Whitening corrects this without labels. It centres the class tokens and
scales all principal directions to the same variance (Jégou and Chum, ECCV 2012, use it for retrieval). A whitening
matrix after the network would be an extra layer that DINOv2 does not have. Two facts make this layer unnecessary:

- Without gain and bias, LayerNorm commutes with each rotation Q that leaves the vector of ones unchanged: LN(Q x) =
  Q LN(x). The whole residual stream can therefore be rotated by multiplying every weight that writes to it or reads
  from it. Only the basis of the output changes.
- The last norm has a gain and a bias per coordinate. Q can be chosen so that these gains scale each principal direction
  as required. The last norm then does the whitening.

The output of a LayerNorm before gain and bias is orthogonal to the vector of ones, so it has only D - 1 principal
directions, while there are D gains. Let g be the squared gains, and P the projection orthogonal to the vector of ones.
The squared gains act on the output as the matrix P diag(g) P. g is set to the required squared scales. The eigenvalues
of the matrix lie between neighbouring values of g (Cauchy's interlacing theorem), so they differ from the required
scales by at most the spacing of g. Q rotates the principal directions exactly to the eigenvectors of the matrix.

Legend: n images, D width.
"""

import torch
from torch import Tensor, nn

from model.vit import Block, DinoVisionTransformer, LayerScale, Mlp


@torch.no_grad()
def whiten(model: DinoVisionTransformer, cls: Tensor, shrinkage: float) -> Tensor:
    """Change `model` in place so that its class tokens have mean 0 and nearly equal variance in all directions.

    Args:
        model: any backbone. Its patch and register tokens change too, because they pass through the same last norm.
        cls: the model's class tokens [n, D] for n images that resemble those on which the model will be used.
        shrinkage: the share of the mean variance that is added to the variance of each direction. With 0.01, directions
            with less than a hundredth of the mean variance, which are mostly noise, are not scaled to full variance.

    Returns:
        the rotation Q, float64 [D, D]. Where the residual stream was x, it is Q x in the changed model.

    Raises:
        ValueError: `shrinkage` is not above 0, `cls` has fewer than two rows, or a gain of the last norm is 0.
    """
    if not shrinkage > 0:
        raise ValueError(f"shrinkage must be above 0, not {shrinkage}")
    if len(cls) < 2:
        raise ValueError(f"whitening needs the class tokens of at least two images, not {len(cls)}")
    norm = model.norm
    if (norm.weight == 0).any():
        raise ValueError("a gain of the last norm is 0: its direction is lost and cannot be whitened")
    plain = (cls.double() - norm.bias.double()) / norm.weight.double()  # LayerNorm's output before gain and bias
    mean, dim = plain.mean(dim=0), plain.shape[1]
    ones = plain.new_full((dim,), dim**-0.5)
    others = torch.linalg.svd(ones[None])[2][1:].T  # [D, D - 1], orthonormal, orthogonal to the ones

    variance, directions = torch.linalg.eigh(others.T @ torch.cov(plain.T) @ others)  # ascending
    variance = variance.clamp(min=0)
    scales = 1 / (variance + shrinkage * variance.mean())  # of the squared length, descending
    squared_gains = torch.cat((scales, scales[-1:]))
    targets = torch.linalg.eigh(others.T @ squared_gains.diag() @ others)[1].flip(1)  # descending, as the scales
    rotation = others @ targets @ (others @ directions).T + torch.outer(ones, ones)

    rotate_residual_stream(model, rotation)
    norm.weight.copy_(squared_gains.sqrt())
    norm.bias.copy_(-squared_gains.sqrt() * (rotation @ mean))
    return rotation


@torch.no_grad()
def rotate_residual_stream(model: DinoVisionTransformer, rotation: Tensor) -> None:
    """Change the weights of `model` so that its residual stream, up to the last norm, is multiplied by `rotation`.

    `rotation` [D, D] must be an orthogonal matrix with rows that sum to one. In each block, each norm's gain and bias
    are moved into the layer after the norm, and each LayerScale's gain is moved into the layer before the LayerScale.
    """
    model.patch_embed.proj.weight.copy_(torch.einsum("ed,dcij->ecij", rotation, model.patch_embed.proj.weight.double()))
    bias = model.patch_embed.proj.bias
    assert bias is not None
    for written in (bias, model.cls_token, model.pos_embed, model.mask_token, model.register_tokens):
        if written is not None:
            written.copy_(written.double() @ rotation.T)
    for block in model.blocks:
        assert isinstance(block, Block)
        inner, outer = (block.mlp.fc1, block.mlp.fc2) if isinstance(block.mlp, Mlp) else (block.mlp.w12, block.mlp.w3)
        _read(block.norm1, block.attn.qkv, rotation)
        _write(block.attn.proj, block.ls1, rotation)
        _read(block.norm2, inner, rotation)
        _write(outer, block.ls2, rotation)


def _read(norm: nn.LayerNorm, layer: nn.Linear, rotation: Tensor) -> None:
    """Move the gain and the bias of `norm` into the next layer, `layer`, and adapt `layer` to its rotated input."""
    weight = layer.weight.double()
    layer.bias.copy_(layer.bias.double() + weight @ norm.bias.double())
    layer.weight.copy_((weight * norm.weight.double()) @ rotation.T)
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


def _write(layer: nn.Linear, scale: nn.Module, rotation: Tensor) -> None:
    """Rotate the output of `layer`. If the next module, `scale`, is a LayerScale, move its gain into `layer` first."""
    gain = layer.bias.new_ones(len(layer.bias), dtype=torch.float64)
    if isinstance(scale, LayerScale):
        gain = scale.gamma.double()
        nn.init.ones_(scale.gamma)
    layer.weight.copy_(rotation @ (gain[:, None] * layer.weight.double()))
    layer.bias.copy_(rotation @ (gain * layer.bias.double()))
