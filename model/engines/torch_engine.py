"""The torch engine: the reference for every exported graph. It can also serve an artifact without a graph.

On a CPU, the model runs eagerly, because compilation gains little there and needs a C++ compiler
(docs/decisions/0002-engine-threads.md). On a GPU, the model is compiled with a dynamic batch size. If the images have
the artifact's input size, each batch is padded to the next batch size in `BUCKETS`. For each of these batch sizes, the
kernel launches are captured once as a CUDA graph and then replayed, because the launches limit the speed of small
batches. This module captures the graphs itself: graphs that torch.compile captures in its mode "reduce-overhead" are
tied to the thread that captured them, but one thread loads an engine and another runs it.

In bf16, the engine uses torch's autocast, but casts the weights of linear layers and of the patch embedding once in
advance instead of in each pass. The results are the same as with autocast alone. The residual stream, LayerNorm and the
position embeddings stay float32, because a bf16 residual would lose a digit of precision within a few blocks. TF32 is
off, so fp32 computes in full float32.

The GPU parts have never run in this project. docs/engines.md lists the engines that have been run.

Legend: B batch, D width, T tokens, A heads.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.artifact import WEIGHTS
from model.config import ViTConfig
from model.engines.protocol import BUCKETS, Features, FloatArray, OpenRequest, bucket_of
from model.onnx_graph.spec import INNER_TENSORS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model.vit import DinoVisionTransformer

log = logging.getLogger(__name__)


def fault(request: OpenRequest) -> None:
    """Return None, because torch can run every artifact. The caller checks that the host has a GPU."""


def open(request: OpenRequest) -> "TorchEngine":
    """Open and return the engine (see `model.engines.protocol.EngineFile.open`)."""
    artifact = request.artifact
    return TorchEngine(
        artifact.file(WEIGHTS),
        artifact.manifest.config,
        threads=request.threads,
        device=request.device,
        precision=request.precision,
        input_size=artifact.manifest.input_size,
    )


class TorchEngine:
    """An engine that runs the weights of an artifact in torch. It implements `model.engines.protocol.Engine`.

    Args:
        weights: the path of `weights.safetensors`. The tensors may have any float type.
        config: the model's configuration.
        threads: the number of CPU threads per forward pass.
        device: the torch device. If None, "cuda" is used if it is available, otherwise "cpu".
        precision: "fp32" or "bf16".
        compiled: whether to use torch.compile. If None, it is used only on a GPU.
        input_size: the (H, W) in pixels for which CUDA graphs are captured on a GPU. If None, no graphs are captured.

    Raises:
        ValueError: `precision` is not supported, the GPU does not support bf16, or torch finds no GPU.
    """

    name = "torch"

    def __init__(
        self,
        weights: Path,
        config: ViTConfig,
        *,
        threads: int,
        device: str | None = None,
        precision: str = "fp32",
        compiled: bool | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"the torch engine supports fp32 and bf16, not {precision!r}")
        import torch

        from model.vit import resize_tensor

        self.precision = precision
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._on_gpu = self.device.startswith("cuda")
        if self._on_gpu and not torch.cuda.is_available():
            raise ValueError(f"torch {torch.__version__} finds no CUDA device")
        if self._on_gpu and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"{torch.cuda.get_device_name()} does not support bf16")
        torch.set_num_threads(threads)
        self._model: Any = _load(weights, config, self.device, half=precision == "bf16")
        self._compiled: Callable[[Tensor], tuple[Tensor, ...]] | None = None  # `_forward` would be a reference cycle
        if compiled if compiled is not None else self._on_gpu:
            torch.compiler.assume_constant_result(resize_tensor)  # its body cannot be traced
            self._compiled = torch.compile(self._forward)
        self._graphs: dict[int, _Replayed] = {}
        self._input_shape = (3, *input_size) if input_size else None
        if self._on_gpu and self._input_shape:
            self._capture(self._input_shape)

    def run(self, pixels: FloatArray) -> Features:
        """Compute the features of a batch of normalised pixels [B, 3, H, W].

        Raises:
            ValueError: the batch is empty, or H or W is not a multiple of the patch size.
        """
        if not len(pixels):
            raise ValueError(f"pixels of shape {pixels.shape}: at least one image is needed")
        parts = [self._run_part(pixels[i : i + BUCKETS[-1]]) for i in range(0, len(pixels), BUCKETS[-1])]
        return parts[0] if len(parts) == 1 else Features(*(np.concatenate(field) for field in zip(*parts, strict=True)))

    def run_outputs(self, pixels: FloatArray, names: Sequence[str]) -> dict[str, FloatArray]:
        """Run a batch of normalised pixels [B, 3, H, W], and return the outputs in `names` as float32, keyed by name.

        The names are the fields of `Features`, inner outputs (see `model/engines/protocol.py`), and the other outputs
        of exported graphs: `attention` [B, A, T] and `layer.<i>` [B, T, D], for A heads, T tokens and width D. If an
        inner output is requested, the pass is not compiled. `attention` and every layer each require a separate, slower
        pass.

        Raises:
            ValueError: the model has no output of this name.
        """
        import torch

        x = torch.from_numpy(pixels).to(self.device)
        inner = [name for name in names if self._is_inner(name)]
        with torch.inference_mode(), self._autocast():
            if inner:
                results = self._run_hooked(x, inner)
            else:
                results = dict(self.run(pixels)._asdict()) if set(names) & set(Features._fields) else {}
            for name in names:
                if name == "attention":
                    results[name] = self._model.get_attention(x)[:, :, 0].float().cpu().numpy()  # [B, A, T]
                elif name.startswith("layer."):
                    results[name] = self._layer(x, int(name.removeprefix("layer."))).float().cpu().numpy()
                elif name not in results:
                    raise ValueError(f"no output {name!r}: one of {', '.join(Features._fields)}, attention, layer.N")
        return {name: results[name] for name in names}

    def can_run(self, size: tuple[int, int], outputs: Collection[str]) -> bool:
        p = self._model.patch_size
        fits = all(side >= p and side % p == 0 for side in size)
        return fits and all(name in Features._fields or self._is_inner(name) for name in outputs)

    def close(self) -> None:
        """Release the model. The engine cannot run afterwards."""
        self._graphs.clear()
        self._compiled = self._model = None

    def _is_inner(self, name: str) -> bool:
        kind, _, block = name.partition(".")
        return kind in INNER_TENSORS and block.isdecimal() and int(block) < len(self._model.blocks)

    def _run_hooked(self, x: "Tensor", inner: Sequence[str]) -> dict[str, FloatArray]:
        """Run one forward pass over the pixels [B, 3, H, W]. Return the features and the inner outputs with these
        names, keyed by name."""
        taken: dict[str, Tensor] = {}

        def keep(name: str, part: int | None) -> Callable[..., None]:
            def hook(module: object, inputs: object, output: "Tensor") -> None:
                taken[name] = output if part is None else output.chunk(3, dim=-1)[part]

            return hook

        with ExitStack() as stack:
            for name in inner:
                kind, _, index = name.partition(".")
                block = self._model.blocks[int(index)]
                part = {"queries": 0, "keys": 1}.get(kind)
                module = block if part is None else block.attn.qkv
                stack.callback(module.register_forward_hook(keep(name, part)).remove)
            taken |= dict(zip(Features._fields, self._forward(x), strict=True))
        return {name: tensor.float().cpu().numpy() for name, tensor in taken.items()}

    def _layer(self, x: "Tensor", index: int) -> "Tensor":
        """Return all T tokens [B, T, D] after block number `index` and the model's final norm."""
        depth = len(self._model.blocks)
        if not 0 <= index < depth:
            raise ValueError(f"layer.{index}: the model has {depth} blocks, 0 to {depth - 1}")
        x = self._model.prepare_tokens_with_masks(x)
        for block in self._model.blocks[: index + 1]:
            x = block(x)
        normed: Tensor = self._model.norm(x)
        return normed

    def _autocast(self) -> "torch.autocast":
        import torch

        kind = "cuda" if self._on_gpu else "cpu"
        # With a cache, the first graph would capture cast weights. All weights are already cast.
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False)

    def _forward(self, x: "Tensor") -> "tuple[Tensor, ...]":
        with self._autocast():
            features = self._model.forward_features(x)
        return tuple(features[name].float() for name in ("x_norm_clstoken", "x_norm_patchtokens", "x_norm_regtokens"))

    def _run_part(self, pixels: FloatArray) -> Features:
        import torch

        with torch.inference_mode():
            x = torch.from_numpy(pixels)
            if pixels.shape[1:] == self._input_shape and self._graphs:
                outputs = self._graphs[bucket_of(len(pixels))](x)
            else:
                outputs = (self._compiled or self._forward)(x.to(self.device))
            return Features(*(output[: len(pixels)].cpu().numpy() for output in outputs))

    def _capture(self, shape: tuple[int, ...]) -> None:
        """Capture one CUDA graph per batch size in `BUCKETS`.

        If compilation fails, the graphs of the eager forward pass are captured.
        """
        import torch

        pool = torch.cuda.graph_pool_handle()
        try:
            self._graphs = _capture_all(self._compiled or self._forward, shape, self.device, pool)
        except Exception as error:  # the compiler raises almost anything: no C compiler, no triton, bugs
            if self._compiled is None:
                raise
            log.warning("torch.compile failed, so the engine runs without it: %s", _first_line(error))
            self._compiled = None
            self._graphs = _capture_all(self._forward, shape, self.device, torch.cuda.graph_pool_handle())


def _capture_all(
    forward: "Callable[[Tensor], tuple[Tensor, ...]]", shape: tuple[int, ...], device: str, pool: Any
) -> "dict[int, _Replayed]":
    """Capture `forward` for every batch size in `BUCKETS`, and return the graphs, keyed by batch size.

    All graphs take their memory from `pool`. They may share it, because only one graph runs at a time, and its outputs
    are copied before the next one runs. The largest graph is first, so that the others fit into its memory.
    """
    return {batch: _Replayed(forward, batch, shape, device, pool) for batch in reversed(BUCKETS)}


class _Replayed:
    """A forward pass for one batch size, captured as a CUDA graph with fixed buffers.

    A single launch runs all kernels.
    """

    def __init__(
        self,
        forward: "Callable[[Tensor], tuple[Tensor, ...]]",
        batch: int,
        shape: tuple[int, ...],
        device: str,
        pool: Any,
    ) -> None:
        import torch

        with torch.inference_mode():
            self._pixels = torch.zeros(batch, *shape, device=device)
            if batch > 1:  # one compilation for all buckets; the compiler always treats 1 separately
                torch._dynamo.mark_dynamic(self._pixels, 0)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compilation and library initialisation, outside the capture
                for _ in range(2):
                    forward(self._pixels)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._outputs = forward(self._pixels)

    def __call__(self, pixels: "Tensor") -> "tuple[Tensor, ...]":
        """Copy `pixels` into the input buffer, run the pass, and return its outputs.

        The outputs always have as many rows as the fixed batch size. The rows after the first `len(pixels)` belong to
        images from earlier calls.
        """
        self._pixels[: len(pixels)].copy_(pixels)
        self._graph.replay()
        return self._outputs


def _load(weights: Path, config: ViTConfig, device: str, *, half: bool) -> "DinoVisionTransformer":
    """Load and return the model in float32. If `half` is True, linear layers and the patch embedding are in bf16."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    from model.vit import DinoVisionTransformer

    with torch.device("meta"):
        model = DinoVisionTransformer(config)
    halves = (
        {
            f"{name}.{part}"
            for name, module in model.named_modules()
            for part in ("weight", "bias")
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        if half
        else set()
    )
    state = {
        key: tensor.to(torch.bfloat16 if key in halves else torch.float32) for key, tensor in load_file(weights).items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    if device.startswith("cuda"):
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return model.eval().requires_grad_(False).to(device)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
