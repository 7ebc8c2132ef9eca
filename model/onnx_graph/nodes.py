"""Nodes and initializers of a graph in the making; weights go into the model or, one by one, into a file beside it.

A protobuf message ends at 2 GiB and a giant's weights are 4.5 GB, so a large graph's initializers are written to the
data file as soon as they are made and only their places stay in memory. Every name is given by the caller, none is
invented, and nothing depends on the order of the weights' mapping: the same calls give the same bytes.
"""

from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

FloatArray = npt.NDArray[np.float32]
Weights = Mapping[str, npt.NDArray[np.floating]]
Attribute = int | float | list[int]

EXTERNAL_ALIGNMENT = 4096  # a page, so that runtimes can map the file
INLINE_BELOW_BYTES = 1024  # shapes and scalars stay in the graph, where shape inference reads them


class GraphBuilder:
    """Collects a graph.

    Args:
        weights: Meta's parameter names to arrays of any float type; each is read once, when it is needed.
        data: file for initializers of at least 1 KiB; None keeps all in the graph.
        location: that file's name as the graph says it.
    """

    def __init__(self, weights: Weights, data: BinaryIO | None = None, location: str = "") -> None:
        self._weights, self._data, self._location = weights, data, location
        self._names: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def weight(self, key: str) -> FloatArray:
        return self._weights[key].astype(np.float32, copy=False)

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        """An initializer; one of the same name is the same one."""
        if name in self._names:
            return name
        self._names.add(name)
        value = np.ascontiguousarray(value)
        if self._data is None or value.nbytes < INLINE_BELOW_BYTES:
            self.initializers.append(numpy_helper.from_array(value, name))
        else:
            self.initializers.append(self._written(name, value, self._data))
        return name

    def _written(self, name: str, value: npt.NDArray[np.generic], data: BinaryIO) -> onnx.TensorProto:
        data.write(b"\0" * (-data.tell() % EXTERNAL_ALIGNMENT))
        offset = data.tell()
        data.write(value.view(np.uint8).data)  # by view: numpy gives no buffer of a bfloat16
        tensor = TensorProto(name=name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        for key, entry in (("location", self._location), ("offset", str(offset)), ("length", str(value.nbytes))):
            tensor.external_data.add(key=key, value=entry)
        return tensor

    def node(self, op: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Attribute) -> str:
        """A node of one output, named as that output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain or None, **attributes))
        return output

    def several(self, op: str, inputs: list[str], outputs: list[str], name: str, **attributes: Attribute) -> list[str]:
        """A node of several outputs."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs
