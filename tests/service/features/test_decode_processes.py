"""Tests of the processes that decode: the same pixels and errors, and what happens when one dies, hangs or takes too
much memory.
"""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.decode import FORMATS, Broken, DecodeLimits, TooLarge, Unsupported, decode
from service.features import decode_processes
from service.features.decode_memory import DecodeMemory, MustWait, Reservation
from service.features.decode_processes import ISOLATED, DecodeProcesses
from tests.fakes import photo, running, until
from tests.hostile_images import encoded, tiff, whole_files

TIFF = whole_files()["TIFF"][1]


@pytest.fixture(scope="module")
def processes() -> Iterator[DecodeProcesses]:
    pool = DecodeProcesses()
    yield pool
    pool.close()


def child(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Make new processes run `code` before each image."""
    script = folder / "child.py"
    script.write_text(
        "from service.features import decode_child\n"
        "whole = decode_child.decode\n"
        f"def decode(data, *args, **options):\n    {code}\n    return whole(data, *args, **options)\n"
        "decode_child.decode = decode\ndecode_child.main()\n"
    )
    monkeypatch.setattr(decode_processes, "_COMMAND", (sys.executable, str(script)))


@pytest.mark.parametrize("name", sorted(ISOLATED & set(FORMATS)))
def test_pixels_are_those_of_this_process(processes: DecodeProcesses, name: str) -> None:
    for data in whole_files()[name]:
        sizes: list[tuple[int, int]] = []
        memory: list[int] = []
        pixels = processes.decode(
            data, DecodeLimits(), on_size=lambda *size, seen=sizes: seen.append(size), on_memory=memory.append
        )
        np.testing.assert_array_equal(pixels, decode(data))
        assert sizes == [pixels.shape[1::-1]]
        assert len(memory) == 1
    assert len(processes.pids) == 1


def test_a_large_image_comes_whole(processes: DecodeProcesses) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1501, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "TIFF", compression="packbits")
    np.testing.assert_array_equal(processes.decode(data, DecodeLimits()), noise)


def test_errors_are_those_of_this_process(processes: DecodeProcesses) -> None:
    for data, limits, kind in (
        (TIFF[:200], DecodeLimits(), Broken),
        (TIFF, DecodeLimits(max_pixels=100), TooLarge),
        (encoded(Image.new("F", (9, 9)), "TIFF"), DecodeLimits(), Unsupported),
    ):
        with pytest.raises(kind) as here:
            decode(data, limits)
        with pytest.raises(kind) as there:
            processes.decode(data, limits)
        assert str(there.value) == str(here.value)


def test_hooks_refuse_an_image_before_it_is_decoded(processes: DecodeProcesses) -> None:
    before = processes.pids
    memory = DecodeMemory(1000)
    with pytest.raises(TooLarge, match="DINOV2_DECODE_MEMORY_BYTES"):
        processes.decode(TIFF, DecodeLimits(), on_memory=Reservation(memory).take)
    memory = DecodeMemory(4 * 40 * 24 * 12)
    Reservation(memory).take(40 * 24 * 12 * 3)
    with pytest.raises(MustWait):
        processes.decode(TIFF, DecodeLimits(), on_memory=Reservation(memory).take)
    assert processes.decode(TIFF, DecodeLimits()).shape == (24, 40, 3)
    assert processes.pids == before


def test_a_process_that_is_killed_costs_one_try() -> None:
    reasons: list[str] = []
    pool = DecodeProcesses(reasons.append)
    try:
        pool.decode(TIFF, DecodeLimits())
        [pid] = pool.pids

        def kill(width: int, height: int) -> None:
            if not reasons:
                os.kill(pid, signal.SIGKILL)

        assert pool.decode(TIFF, DecodeLimits(), on_size=kill).shape == (24, 40, 3)
        assert reasons == ["crash"]
        assert pool.pids != [pid]
    finally:
        pool.close()


def test_an_image_that_crashes_the_decoder_is_broken(monkeypatch, tmp_path) -> None:
    child(monkeypatch, tmp_path, "import ctypes; ctypes.string_at(0)")
    reasons: list[str] = []
    pool = DecodeProcesses(reasons.append)
    with pytest.raises(Broken, match="crashed twice"):
        pool.decode(TIFF, DecodeLimits())
    assert reasons == ["crash", "crash"]
    assert pool.pids == []


def test_a_decoder_that_never_ends_is_ended(monkeypatch, tmp_path) -> None:
    child(monkeypatch, tmp_path, "import signal, os; os.kill(os.getpid(), signal.SIGXCPU)")
    reasons: list[str] = []
    with pytest.raises(TooLarge, match="more than 20 seconds of processor time"):
        DecodeProcesses(reasons.append).decode(TIFF, DecodeLimits())
    monkeypatch.setattr(decode_processes, "WALL_S", 0.2)
    child(monkeypatch, tmp_path, "import time; time.sleep(60)")
    for data in (TIFF, TIFF + bytes(2**24)):  # the second one does not fit into the socket's buffer
        with pytest.raises(TooLarge):
            DecodeProcesses(reasons.append).decode(data, DecodeLimits())
    assert reasons == ["time"] * 3


def test_the_processor_time_of_each_image_is_limited_by_the_kernel(monkeypatch, tmp_path) -> None:
    child(
        monkeypatch,
        tmp_path,
        "import resource; used, _ = resource.getrlimit(resource.RLIMIT_CPU)\n"
        "    from service.features.decode_child import CPU_S; assert CPU_S <= used <= CPU_S + 30\n"
        "    resource.setrlimit(resource.RLIMIT_CPU, (0, -1))\n"
        "    while True: pass",
    )
    with pytest.raises(TooLarge, match="processor time"):
        DecodeProcesses().decode(TIFF, DecodeLimits())


def test_memory_beyond_what_was_announced_is_not_given(monkeypatch, tmp_path) -> None:
    child(monkeypatch, tmp_path, "bytes(300 * 2**20)")
    pool = DecodeProcesses()
    try:
        with pytest.raises(TooLarge, match="more memory"):
            pool.decode(TIFF, DecodeLimits())
    finally:
        pool.close()


def test_processes_end_when_they_are_idle_and_are_replaced(monkeypatch, tmp_path) -> None:
    child(monkeypatch, tmp_path, "from service.features import decode_child as child; child.IDLE_S = 0.05")
    pool = DecodeProcesses(lambda reason: pytest.fail(reason))
    try:
        pool.decode(TIFF, DecodeLimits())
        [pid] = pool.pids
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists():  # it leaves no zombie
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pool.decode(TIFF, DecodeLimits())
        assert pool.pids != [pid]
    finally:
        pool.close()


def test_closing_ends_idle_and_busy_processes(monkeypatch, tmp_path) -> None:
    child(monkeypatch, tmp_path, "import time; time.sleep(60)")
    pool = DecodeProcesses()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            pool.decode(TIFF, DecodeLimits())
        except Broken as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not pool.pids:
        time.sleep(0.01)
    [pid] = pool.pids
    pool.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_imports_neither_torch_nor_the_web_framework(processes: DecodeProcesses) -> None:
    processes.decode(TIFF, DecodeLimits())
    [pid] = processes.pids
    mapped = Path(f"/proc/{pid}/maps").read_text()
    assert "/PIL/" in mapped
    assert not any(name in mapped for name in ("/torch/", "/onnxruntime/", "/pydantic_core/", "/faiss/"))


# ---- in the service


async def test_the_service_decodes_these_formats_in_processes_that_end_with_it(tmp_path):
    async with running(tmp_path, cache_bytes=0) as run:
        pool = run.service.pipeline.decoding.processes
        assert (await run.embed([photo()]))[0].error is None
        assert pool.pids == []
        [outcome] = await run.embed([TIFF])
        assert outcome.error is None
        [pid] = pool.pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_killed_process_costs_no_image_of_the_service(tmp_path):
    async with running(tmp_path, cache_bytes=0) as run:
        pool = run.service.pipeline.decoding.processes
        images = [encoded(Image.new("RGB", (40, 30 + n)), "TIFF", compression="tiff_lzw") for n in range(12)]
        task = asyncio.create_task(run.embed(images))
        await until(lambda: bool(pool.pids), 20)
        os.kill(pool.pids[0], signal.SIGKILL)
        assert [outcome.error for outcome in await task] == [None] * 12


def test_jpeg_data_in_a_tiff_has_few_scans(processes: DecodeProcesses) -> None:
    def tiff_with(scans: int) -> bytes:
        jpeg = encoded(Image.new("L", (160, 160)), "JPEG", progressive=True)
        last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
        jpeg = jpeg[:-2] + last * scans + jpeg[-2:]
        sizes = {256: (4, 1, 160), 257: (4, 1, 160), 278: (4, 1, 160), 258: (3, 1, 8)}
        place = {273: (4, 1, -1), 279: (4, 1, len(jpeg)), 259: (3, 1, 7), 262: (3, 1, 1), 277: (3, 1, 1)}
        return tiff({**sizes, **place}, jpeg)

    assert processes.decode(tiff_with(5), DecodeLimits()).shape == (160, 160, 3)
    with pytest.raises(Broken):
        processes.decode(tiff_with(50), DecodeLimits())


def test_a_process_that_cannot_start_leaves_no_open_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_processes, "_COMMAND", ("/nonexistent",))
    pool, before = DecodeProcesses(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(FileNotFoundError):
            pool.decode(TIFF, DecodeLimits())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
