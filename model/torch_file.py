"""Reads the tensors of a PyTorch file (`.pth`, `.pt`) as numpy arrays, without torch and without executing code.

Since version 1.6, `torch.save` writes a ZIP archive: `data.pkl` describes the objects, and one file `data/<key>` per
storage contains the storage's bytes. A pickle is a program, so this reader allows it to use only names that describe
tensors: `OrderedDict`, `torch.Size`, the functions that rebuild a tensor or a parameter, and the names of storage
types. Training checkpoints, such as those of mmcv, also contain numpy scalars. Each of these scalars is replaced with
an empty object. Any other name raises an error and is not imported.

The arrays are mapped from the file, so they take no memory until they are read. Files from torch versions before 1.6
raise an error.
"""

import io
import math
import pickle
import pickletools
import reprlib
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MAX_PICKLE_BYTES: Final = 2 << 20
"""The largest `data.pkl` that is read. The one of ViT-g has less than 100 kB."""

_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field; 30 bytes
_OPERATIONS: Final = frozenset(
    [
        "PROTO",
        "MARK",
        "STOP",
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "APPEND",
        "APPENDS",
        "SETITEM",
        "SETITEMS",
        "BINUNICODE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "GLOBAL",
        "REDUCE",
        "BUILD",
        "BINPERSID",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
    ]
)
"""The operations of pickle's protocol 2 that `torch.save` writes for tensors and plain values."""
_WITHOUT_PARTS: Final = frozenset(["BINUNICODE", "GLOBAL", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"])
"""Operations that create an object which contains no others, or which has no hash."""
MAX_REPEATS: Final = 1 << 22
_CRC_CHUNK: Final = 1 << 24
_DTYPES: Final = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class TorchFileError(ValueError):
    """The error raised when a file is not a readable PyTorch file of tensors. The message gives the reason."""


class _Ignored:
    """An empty object that takes the place of a numpy scalar or of one of its parts."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_IGNORED: Final = frozenset(
    [
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("_codecs", "encode"),  # how pickle protocol 2 stores the bytes of a scalar
    ]
)


class _StorageType(NamedTuple):
    """The type of a storage. A pickle refers to it by a name such as `torch.FloatStorage`."""

    name: str


def read_torch_file(path: Path) -> Any:
    """Return the object in a PyTorch file, usually a dictionary, with a numpy array in place of each tensor.

    Raises:
        TorchFileError: the file is damaged, has another format, or contains something other than tensors and plain
            Python values.
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive)
    except zipfile.BadZipFile as error:
        raise TorchFileError(
            f"not a readable ZIP archive, which torch has written since version 1.6 ({error}). The file is damaged or "
            "cut off, or its format is older: then load it with torch and save it again"
        ) from error


def _read(path: Path, archive: zipfile.ZipFile) -> Any:
    pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise TorchFileError(f"a ZIP archive with {len(pickles)} files named data.pkl instead of one")
    root = pickles[0].removesuffix("data.pkl")
    entries = {info.filename.removeprefix(root): info for info in archive.infolist()}
    if "byteorder" in entries and (order := _small_file(archive, entries["byteorder"], limit=64)) != b"little":
        raise TorchFileError(f"its byte order is {order.decode(errors='replace')!r} instead of 'little'")
    storages: dict[str, Array] = {}

    def storage(kind: str, key: str, count: int) -> Array:
        if key not in storages:
            if f"data/{key}" not in entries:
                raise TorchFileError(f"storage {key!r} is missing")
            storages[key] = _map(path, entries[f"data/{key}"], _DTYPES[kind], count)
        found = storages[key]
        if (found.dtype, found.size) != (_DTYPES[kind], count):
            raise TorchFileError(f"storage {key!r} is described twice, with different types or lengths")
        return found

    data = _small_file(archive, entries["data.pkl"], limit=MAX_PICKLE_BYTES)
    try:
        _check_operations(data)
        return _Unpickler(data, storage).load()
    except TorchFileError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise TorchFileError(f"its pickle is damaged: {type(error).__name__}: {str(error)[:200]}") from error


def _check_operations(data: bytes) -> None:
    """Check the operations of a pickle before any is executed, because some can take any amount of memory.

    A tuple that contains another tuple twice, and so on, takes a few bytes per level, but the time to hash it doubles
    with each level. `repeats` is an upper bound of the number of objects that a hash visits more than once.
    """
    sizes: dict[int, int] = {}
    repeats, previous = 0, ""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name not in _OPERATIONS:
            raise TorchFileError(f"its pickle has the operation {operation.name}, which torch does not write")
        if "BINPUT" in operation.name and int(argument or 0) > len(data):
            raise TorchFileError(f"its pickle refers to object {argument} of at most {len(data)}")
        if "BINPUT" in operation.name and previous not in _WITHOUT_PARTS:
            sizes[int(argument or 0)] = 1 + repeats
        elif "BINGET" in operation.name:
            repeats += sizes.get(int(argument or 0), 0)
        if repeats > MAX_REPEATS:
            raise TorchFileError("its pickle repeats objects inside objects too often")
        previous = operation.name


def _small_file(archive: zipfile.ZipFile, info: zipfile.ZipInfo, *, limit: int) -> bytes:
    if info.compress_type != zipfile.ZIP_STORED:
        raise TorchFileError(f"{info.filename} is compressed, which torch never does")
    if info.file_size > limit:
        raise TorchFileError(f"{info.filename} has {info.file_size} bytes; at most {limit} are read")
    return archive.read(info)


def _map(path: Path, info: zipfile.ZipInfo, dtype: np.dtype[Any], count: int) -> Array:
    """Memory-map a storage of `count` elements in the file, and check it against the CRC-32 in the archive."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise TorchFileError(f"{info.filename} is compressed, which torch never does")
    if info.file_size != count * dtype.itemsize:
        raise TorchFileError(
            f"{info.filename} has {info.file_size} bytes instead of {count * dtype.itemsize} ({count} of {dtype})"
        )
    if not count:
        return np.zeros(0, dtype)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise TorchFileError(f"{info.filename} has no header in the archive")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    try:
        values = np.memmap(path, dtype, mode="r", offset=start, shape=(count,))
    except ValueError as error:
        raise TorchFileError(f"{info.filename} reaches beyond the end of the file") from error
    crc, raw = 0, values.view(np.uint8)
    for at in range(0, raw.size, _CRC_CHUNK):
        crc = zlib.crc32(raw[at : at + _CRC_CHUNK].data, crc)
    if crc != info.CRC:
        raise TorchFileError(f"{info.filename} is damaged: its CRC-32 is {crc:08x} instead of {info.CRC:08x}")
    return values


class _Unpickler(pickle.Unpickler):
    """An unpickler that can create only arrays and plain Python values.

    `storage` is a function that takes a storage's type, key and number of elements, and returns its array.
    """

    def __init__(self, data: bytes, storage: Callable[[str, str, int], Array]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _StorageType(name)
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) in _IGNORED:
            return _Ignored
        if (module, name) not in allowed:
            raise TorchFileError(f"it refers to {module}.{name}, which is not a tensor and could run any code")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Array:
        match pid:
            case ("storage", _StorageType(name=kind), str(key), _, int(count)) if count >= 0:
                return self._storage(kind, key, count)
        raise TorchFileError(f"it refers to something other than a storage: {reprlib.repr(pid)[:100]}")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> Array:
    """Return the tensor with this size and stride (in elements) that begins at `offset` in a storage.

    The arguments come from the pickle, so they are checked.
    """
    if not isinstance(storage, np.ndarray) or not isinstance(offset, int) or offset < 0:
        raise TorchFileError("a tensor has no storage or a wrong offset")
    if not _are_counts(size) or not _are_counts(stride) or len(size) != len(stride):
        raise TorchFileError(f"a tensor has size {reprlib.repr(size)} and stride {reprlib.repr(stride)}")
    used = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # A tensor can have more elements than its storage (see `Tensor.expand`), and a copy of it could fill the memory.
    if offset + used > storage.size or math.prod(size) > storage.size:
        raise TorchFileError(f"a tensor of size {size} and stride {stride} does not fit its storage of {storage.size}")
    in_bytes = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, in_bytes, writeable=False)


def _parameter(tensor: object, *_: object) -> object:
    return tensor


def _are_counts(values: object) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
