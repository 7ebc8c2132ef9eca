"""Collects the nodes and initializers of a graph. Weights are stored in the graph or in a separate data file.

A protobuf message is limited to 2 GiB, and a giant model's weights take 4.5 GB. A large graph's initializers are
therefore written to the data file as soon as they are added, and only their offsets stay in memory. The caller chooses
the name of every node and tensor, so the same calls produce the same bytes.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

FloatArray = npt.NDArray[np.float32]
Weights = Mapping[str, npt.NDArray[np.floating]]
Attribute = int | float | str | list[int]

EXTERNAL_ALIGNMENT = 4096  # one page, so that runtimes can map the file
INLINE_BELOW_BYTES = 1024  # shapes and scalars stay in the graph, where shape inference reads them


class Sink(Protocol):
    """An open file to which a graph or its data is written."""

    def write(self, data: bytes | memoryview, /) -> int: ...

    def tell(self) -> int: ...


class GraphBuilder:
    """Collects a graph's nodes and initializers.

    Args:
        weights: arrays of any float type, keyed by Meta's parameter names.
        data: an open file for initializers of at least 1 KiB. If None, all initializers stay in the graph.
        location: the data file's name as recorded in the graph.
    """

    def __init__(self, weights: Weights, data: Sink | None = None, location: str = "") -> None:
        self._weights, self._data, self._location = weights, data, location
        self._names: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def weight(self, key: str) -> FloatArray:
        return self._weights[key].astype(np.float32, copy=False)

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        """Add an initializer and return its name. If an initializer of this name exists already, nothing is added."""
        if name in self._names:
            return name
        self._names.add(name)
        value = np.ascontiguousarray(value)
        if self._data is None or value.nbytes < INLINE_BELOW_BYTES:
            self.initializers.append(numpy_helper.from_array(value, name))
        else:
            self.initializers.append(self._written(name, value, self._data))
        return name

    def _written(self, name: str, value: npt.NDArray[np.generic], data: Sink) -> onnx.TensorProto:
        data.write(b"\0" * (-data.tell() % EXTERNAL_ALIGNMENT))
        offset = data.tell()
        data.write(value.view(np.uint8).data)  # as bytes, because numpy exports no buffer of bfloat16
        tensor = TensorProto(name=name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        for key, entry in (("location", self._location), ("offset", str(offset)), ("length", str(value.nbytes))):
            tensor.external_data.add(key=key, value=entry)
        return tensor

    def node(self, op: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Attribute) -> str:
        """Add a node with one output and return the output's name, which is also the node's name."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain or None, **attributes))
        return output

    def several(self, op: str, inputs: list[str], outputs: list[str], name: str, **attributes: Attribute) -> list[str]:
        """Add a node with several outputs and return their names."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs
