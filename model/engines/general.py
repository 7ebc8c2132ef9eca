"""Opens the engine for requests that the serving engine cannot run.

An exported graph or a TensorRT plan accepts one input size, and a TensorRT plan has no inner outputs (see
`model/engines/protocol.py`). Attention maps, heads, and requests that choose their own input size need more. For these
requests, the service opens a second engine when the first such request arrives: ONNX Runtime with a graph that accepts
any size. The graph is built from the artifact's weights and kept in the artifact's folder for derived files. The second
engine needs memory for another copy of the weights.
"""

from model.artifact import Artifact, derive_graph, graph_name
from model.engines import parity
from model.engines.onnxruntime_engine import OnnxEngine, Provider
from model.engines.protocol import Engine
from model.onnx_graph.spec import GraphSpec

SAMPLES = 2
"""The number of generated images on which the engine is compared with the serving engine."""


def open_general(artifact: Artifact, serving: Engine, *, threads: int) -> Engine:
    """Open and return an engine in float32 that accepts any input size and returns all inner outputs.

    The engine runs on the GPU if the serving engine is ONNX Runtime on a GPU, and on the CPU otherwise. Its features at
    the artifact's input size are compared with those of the serving engine.

    Raises:
        ParityError: the features differ too much.
        ArtifactError: the graph cannot be written.
        ValueError, ModuleNotFoundError: ONNX Runtime cannot load the graph.
    """
    manifest = artifact.manifest
    name = graph_name(None, "fp32")
    path = artifact.locations.get(name, artifact.derived / name)
    if not path.exists():
        derive_graph(artifact.weights, manifest.config, GraphSpec(size=None), path)
    provider: Provider = "cuda" if serving.name == "onnxruntime-cuda" else "cpu"
    engine = OnnxEngine(path, threads=threads, provider=provider, inner="always")
    pixels = parity.pixels_at(parity.sample_photos(SAMPLES), manifest.preprocess, manifest.input_size)
    record = parity.measure(parity.features(engine, pixels), serving, pixels)
    try:
        parity.check(record, "the general engine")
    except BaseException:
        engine.close()
        raise
    return engine
