"""Finds graphs that do not belong to the weights next to them.

A graph decides about every feature, but a model's fingerprint covers only its weights. So a graph from elsewhere is
trusted only if it has the same bytes as the graph that the weights give.
"""

from collections.abc import Mapping
from typing import Final

from model.config import ViTConfig
from model.onnx_graph.build import graph_digests
from model.onnx_graph.nodes import Weights
from model.onnx_graph.spec import GraphSpec

MAX_GRAPH_PATCHES: Final = 65_536
"""The highest number of patches in the input of a graph. A graph contains a position for each patch, so without a limit
a description could ask for any amount of memory."""


def foreign_graph(
    listed: Mapping[str, str], specs: Mapping[str, GraphSpec], weights: Weights, config: ViTConfig
) -> str | None:
    """Return the name of the first file that is not a graph of the weights, or None if all are.

    Args:
        listed: the sha256 in hex of every file of a graph, keyed by file name.
        specs: the options of every graph, keyed by file name.
        weights: the weights, which are already verified.
        config: the model's shape.

    Raises:
        ValueError: a graph cannot be built with its options.
    """
    expected: dict[str, str] = {}
    for name, spec in specs.items():
        try:
            _check_size(spec, config, len(weights))
            digests = graph_digests(weights, config, spec, name)
        except KeyError as error:
            raise ValueError(f"{name} cannot be built: the weights have no {error}") from error
        except (IndexError, ValueError) as error:
            raise ValueError(f"{name} cannot be built: {error}") from error
        expected |= {file: digest.sha256 for file, digest in digests.items()}
    return next((name for name in sorted({*listed, *expected}) if listed.get(name) != expected.get(name)), None)


def _check_size(spec: GraphSpec, config: ViTConfig, n_weights: int) -> None:
    """Check the description of a graph before the graph is built.

    Raises:
        ValueError: the graph would be too large.
    """
    if spec.size is not None and spec.size[0] * spec.size[1] > MAX_GRAPH_PATCHES * config.patch_size**2:
        raise ValueError(f"its input of {spec.size[0]}x{spec.size[1]} pixels has more than {MAX_GRAPH_PATCHES} patches")
    if config.depth > n_weights:
        raise ValueError(f"the architecture has {config.depth} blocks, but there are only {n_weights} weights")
