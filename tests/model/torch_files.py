"""Writes PyTorch files without torch, so that the tests of downloads and exports run where it is not installed."""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ONE_NUMBER = struct.Struct("<i")
STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text)) + text.encode()


def _number(value: int) -> bytes:
    return pickle.BININT + ONE_NUMBER.pack(value)


def _numbers(values: tuple[int, ...]) -> bytes:
    return pickle.MARK + b"".join(map(_number, values)) + pickle.TUPLE


def _tensor(key: str, array: np.ndarray) -> bytes:
    storage = pickle.MARK + _text("storage") + b"ctorch\n" + STORAGES[array.dtype.name].encode() + b"\n"
    storage += _text(key) + _text("cpu") + _number(array.size) + pickle.TUPLE + pickle.BINPERSID
    stride = tuple(step // array.itemsize for step in np.asarray(array, order="C").strides)
    hooks = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n"
        + pickle.MARK
        + (storage + _number(0) + _numbers(array.shape) + _numbers(stride) + pickle.NEWFALSE + hooks)
        + (pickle.TUPLE + pickle.REDUCE)
    )


def write_torch_file(path: Path, arrays: Mapping[str, np.ndarray], *, root: str = "archive") -> None:
    """Write arrays as `torch.save` writes a dictionary of tensors."""
    items = [_text(name) + _tensor(str(i), array) for i, (name, array) in enumerate(arrays.items())]
    body = pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS + pickle.STOP
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", body)
        archive.writestr(f"{root}/byteorder", "little")
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"{root}/data/{i}", array.tobytes())
        archive.writestr(f"{root}/version", "3\n")
