"""Writes PyTorch files without torch, so that the tests of downloads and exports run where it is not installed."""

import io
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


def write_torch_file(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as `torch.save` writes a dictionary of tensors."""
    path.write_bytes(torch_file(arrays))


def torch_file(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the content of the file that `write_torch_file` writes."""
    items = [_text(name) + _tensor(str(i), array) for i, (name, array) in enumerate(arrays.items())]
    body = pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS + pickle.STOP
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
        archive.writestr("archive/version", "3\n")
    return written.getvalue()
