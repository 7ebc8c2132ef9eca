"""Tests of the reader of PyTorch files: it reads what torch writes, executes nothing, and says what is wrong."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.torch_file import TorchFileError, read_torch_file
from tests.model.torch_files import write_torch_file

RNG = np.random.default_rng(0)
ARRAYS = {
    "weight": RNG.standard_normal((3, 4)).astype(np.float32),
    "half": RNG.standard_normal(5).astype(np.float16),
    "steps": np.arange(3),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.float32(3.5).reshape(()),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_torch_file(tmp_path / "x.pth", ARRAYS)
    return tmp_path / "x.pth"


def changed(path: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """Write the archive again, with the content of each file changed; None removes the file."""
    target = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def with_pickle(path: Path, body: bytes) -> Path:
    return changed(path, lambda name, content: body if name.endswith("data.pkl") else content)


def test_arrays_come_back_as_written(path: Path) -> None:
    read = read_torch_file(path)
    assert list(read) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
        assert not read[name].flags.writeable


def test_what_torch_writes_is_read_and_what_the_tests_write_is_torchs(path: Path) -> None:
    torch = pytest.importorskip("torch", reason="files are compared with torch's: pip install '.[train]'")
    for name, tensor in torch.load(path, weights_only=True).items():
        np.testing.assert_array_equal(tensor.numpy(), ARRAYS[name])
    whole = torch.randn(4, 6)
    tensors = {
        "whole": whole,
        "rows": whole[1:3],  # shares the storage
        "transposed": whole.t(),
        "bf16": torch.randn(7).bfloat16(),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    torch.save({"teacher": tensors, "iteration": 5, "name": "x", "more": [1.5, (None, True)]}, path)
    read = read_torch_file(path)
    assert (read["iteration"], read["name"], read["more"]) == (5, "x", [1.5, (None, True)])
    for name, tensor in tensors.items():
        expected = tensor.detach()
        np.testing.assert_array_equal(read["teacher"][name].astype(np.float32), expected.float().numpy(), err_msg=name)
    assert read["teacher"]["bf16"].dtype.name == "bfloat16"


@pytest.mark.parametrize(
    "name", ["os\nsystem", "builtins\neval", "torch\nload", "torch._utils\n_rebuild_tensor", "collections\nCounter"]
)
def test_no_other_name_is_imported(path: Path, name: str) -> None:
    body = b"\x80\x02c" + name.encode() + b"\n(X\x04\0\0\0truetR."
    with pytest.raises(TorchFileError, match=rf"refers to {name.replace(chr(10), '.')}, which is not a tensor"):
        read_torch_file(with_pickle(path, body))


def test_code_is_not_run(path: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(TorchFileError, match="could run any code"):
        read_torch_file(with_pickle(path, pickle.dumps({"a": Evil()}, protocol=2)))
    assert not (tmp_path / "made").exists()


def test_numpy_scalars_of_training_checkpoints_are_replaced_with_objects_without_content(path: Path) -> None:
    content = {"best": np.float64(0.25), "best_so_far": np.float32(1.5), "iter": 7}
    read = read_torch_file(with_pickle(path, pickle.dumps(content, protocol=2)))
    assert read["iter"] == 7
    assert {type(read[name]).__name__ for name in ("best", "best_so_far")} == {"_Ignored"}
    assert vars(read["best"]) == {}


def test_a_changed_byte_of_the_weights_is_noticed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(ARRAYS["weight"].tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(TorchFileError, match=r"archive/data/0 is damaged: its CRC-32 is"):
        read_torch_file(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(TorchFileError, match="damaged or cut off"):
        read_torch_file(path)


def test_other_archives(path: Path, tmp_path: Path) -> None:
    def without(ending: str) -> Callable[[str, bytes], bytes | None]:
        return lambda name, content: None if name.endswith(ending) else content

    with pytest.raises(TorchFileError, match=r"0 files named data\.pkl instead of one"):
        read_torch_file(changed(path, without("data.pkl")))
    with pytest.raises(TorchFileError, match="storage '0' is missing"):
        read_torch_file(changed(path, without("data/0")))
    with pytest.raises(TorchFileError, match="has 44 bytes instead of 48"):
        read_torch_file(changed(path, lambda name, content: content[:-4] if name.endswith("data/0") else content))
    with pytest.raises(TorchFileError, match="byte order is 'big' instead of 'little'"):
        read_torch_file(changed(path, lambda name, content: b"big" if name.endswith("byteorder") else content))
    with pytest.raises(TorchFileError, match="is compressed, which torch never does"):
        read_torch_file(changed(path, lambda name, content: content, compression=zipfile.ZIP_DEFLATED))
    shutil.copy(path, tmp_path / "two.pth")
    with zipfile.ZipFile(tmp_path / "two.pth", "a") as archive:
        archive.writestr("other/data.pkl", b".")
    with pytest.raises(TorchFileError, match=r"2 files named data\.pkl instead of one"):
        read_torch_file(tmp_path / "two.pth")


def test_a_huge_pickle_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.torch_file.MAX_PICKLE_BYTES", 100)
    with pytest.raises(TorchFileError, match=r"data.pkl has \d+ bytes; at most 100 are read"):
        read_torch_file(path)


def test_operations_that_take_memory_are_refused_before_they_run(path: Path) -> None:
    with pytest.raises(TorchFileError, match="refers to object 200000000 of at most 9"):
        read_torch_file(with_pickle(path, b"\x80\x02}r" + (200_000_000).to_bytes(4, "little") + b"."))
    with pytest.raises(TorchFileError, match="has the operation EMPTY_SET, which torch does not write"):
        read_torch_file(with_pickle(path, b"\x80\x04(" + b"\x8f" * 1000 + b"l."))
    small = changed(path, lambda name, content: content, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(TorchFileError, match="is compressed, which torch never does"):
        read_torch_file(small)


def tensor(offset: int, size: tuple[object, ...], stride: tuple[object, ...]) -> bytes:
    """Return a pickle of one tensor in the storage of `weight`, of 12 elements."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuJ\x0c\0\0\0tQ"
    rest = b"".join(pickle.dumps(value, protocol=2)[2:-1] for value in (offset, size, stride, False, None))
    return b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR."


@pytest.mark.parametrize(
    ("offset", "size", "stride", "message"),
    [
        (1, (3, 4), (4, 1), "does not fit its storage of 12"),
        (0, (3, 4), (5, 1), "does not fit its storage of 12"),
        (0, (10**9, 4), (0, 1), "does not fit its storage of 12"),
        (13, (0,), (1,), "does not fit its storage of 12"),
        (-1, (2,), (1,), "no storage or a wrong offset"),
        (0, (-1,), (1,), "a tensor has size"),
        (0, (3,), (-1,), "a tensor has size"),
        (0, (3, 4), (1,), "a tensor has size"),
        (0, (2.5,), (1,), "a tensor has size"),
        (0, (1 << 60,), (0,), "a tensor has size"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(
    path: Path, offset: int, size: tuple[object, ...], stride: tuple[object, ...], message: str
) -> None:
    rows = read_torch_file(with_pickle(path, tensor(2, (2, 3), (4, 1))))
    np.testing.assert_array_equal(rows, ARRAYS["weight"].ravel()[[[2, 3, 4], [6, 7, 8]]])
    with pytest.raises(TorchFileError, match=message):
        read_torch_file(with_pickle(path, tensor(offset, size, stride)))


@pytest.mark.parametrize(
    "body", [b"", b"\x80\2", b"\x80\2]", b"\x80\2(X\1\0\0\0aQ.", b"\x80\2X\1\0\0\0aQ.", b"nonsense"]
)
def test_a_damaged_pickle(path: Path, body: bytes) -> None:
    with pytest.raises(TorchFileError, match=r"its pickle is damaged|something other than a storage"):
        read_torch_file(with_pickle(path, body))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "none.pth")


def nested_tuples(levels: int) -> bytes:
    """Return the operations that create a tuple which contains the same tuple twice, and so on."""
    body = pickle.EMPTY_TUPLE + pickle.BINPUT + b"\0"
    for i in range(levels):
        get = pickle.BINGET + bytes([i])
        body += get + get + pickle.TUPLE2 + pickle.BINPUT + bytes([i + 1])
    return body


@pytest.mark.parametrize(("before", "after"), [(b"", pickle.BINPERSID), (b"}(", b"tNs")])
def test_nested_tuples_take_neither_time_nor_memory(path: Path, before: bytes, after: bytes) -> None:
    """Without a check, the first file takes the memory for 2**60 parentheses, and the second the time to hash them."""
    for levels in (12, 60):
        body = pickle.PROTO + b"\2" + before + nested_tuples(levels) + after + b"."
        bad = changed(path, lambda name, data, body=body: body if "pkl" in name else data)
        if levels == 60:
            with pytest.raises(TorchFileError, match="repeats objects inside objects too often"):
                read_torch_file(bad)
        elif after == pickle.BINPERSID:
            with pytest.raises(TorchFileError, match="something other than a storage") as caught:
                read_torch_file(bad)
            assert len(str(caught.value)) < 200
        elif after == b"tNs":
            assert len(read_torch_file(bad)) == 1


def test_a_tuple_that_many_parts_share_is_read(path: Path) -> None:
    """An optimizer has the same tuple in each group of parameters."""
    pair = pickle.NONE + pickle.NONE + pickle.TUPLE2 + pickle.BINPUT + b"\1"
    body = pickle.PROTO + b"\2" + pickle.EMPTY_LIST + b"(" + pair + (pickle.BINGET + b"\1") * 20_000 + pickle.APPENDS
    good = changed(path, lambda name, data: body + b"." if "pkl" in name else data)
    assert read_torch_file(good) == [(None, None)] * 20_001
