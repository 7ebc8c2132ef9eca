"""Tests of the memory for decoding: what images take, whose turn it is, and what is refused."""

import asyncio
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.decode import TooLarge, decode
from service.clients import Sender, current_sender
from service.features import decode_memory, pipeline
from service.features.decode_memory import DecodeMemory, MustWait, Reservation
from service.outcomes import numbered
from service.settings import Settings
from tests.fakes import photo, running, until
from tests.hostile_images import encoded, png_of_zeros

ROOT = Path(__file__).parents[3]
MEMORY = 1000  # 250 bytes for small images of up to 62 bytes, 750 for large ones


async def took(memory: DecodeMemory, n_bytes: int) -> Reservation:
    reservation = Reservation(memory)
    try:
        reservation.take(n_bytes)
    except MustWait:
        await reservation.wait()
    return reservation


async def test_images_of_a_client_get_memory_in_their_order():
    memory, order = DecodeMemory(MEMORY), []

    async def image(name: str, n_bytes: int) -> None:
        reservation = await took(memory, n_bytes)
        order.append(name)
        await asyncio.sleep(0.01)
        reservation.release()

    first = await took(memory, 500)
    tasks = [asyncio.create_task(image(f"large {n}", n)) for n in (700, 100, 400)]
    await asyncio.sleep(0.02)
    assert order == []  # 100 would fit, but does not overtake 700
    first.release()
    await asyncio.gather(*tasks)
    assert order == ["large 700", "large 100", "large 400"]
    assert memory.held == 0


async def test_clients_wait_for_memory_in_turn():
    memory, order = DecodeMemory(MEMORY), []

    async def image(client: str, number: int) -> None:
        current_sender.set(Sender(client, number))
        reservation = await took(memory, 700)
        order.append(client)
        reservation.release()

    first = await took(memory, 700)
    tasks = [asyncio.create_task(image(client, n)) for n, client in enumerate(["many"] * 5 + ["one", "two"])]
    await asyncio.sleep(0.01)
    first.release()
    await asyncio.gather(*tasks)
    assert order == ["many", "one", "two", "many", "many", "many", "many"]


async def test_small_images_do_not_wait_for_large_ones():
    memory = DecodeMemory(MEMORY)
    large = await took(memory, 750)
    waiting = asyncio.create_task(took(memory, 700))
    await asyncio.sleep(0)
    small = [Reservation(memory) for _ in range(4)]
    for reservation in small:
        reservation.take(62)
    with pytest.raises(MustWait):
        Reservation(memory).take(62)
    assert memory.held == 750 + 4 * 62
    for reservation in (*small, large):
        reservation.release()
    (await waiting).release()
    assert memory.held == 0


async def test_memory_goes_back_to_the_system_when_many_bytes_have_become_free(monkeypatch):
    returned = threading.Event()
    monkeypatch.setattr(decode_memory, "return_small_blocks", returned.set)
    monkeypatch.setattr(decode_memory, "_TRIM_AFTER_S", 0.0)
    memory = DecodeMemory(2**30)
    for size, expected in ((2**26, False), (2**27, True)):
        first, second = await took(memory, size), await took(memory, 2**10)
        first.release()
        second.release()
        assert returned.wait(0.1 if not expected else 5) is expected


async def test_an_image_that_can_never_fit_is_refused_at_once():
    with pytest.raises(TooLarge, match="DINOV2_DECODE_MEMORY_BYTES"):
        Reservation(DecodeMemory(MEMORY)).take(751)


async def test_an_image_whose_client_leaves_gives_up_its_turn_and_its_memory():
    memory = DecodeMemory(MEMORY)
    first = await took(memory, 750)
    leaving, next_in_line = (asyncio.create_task(took(memory, n)) for n in (750, 100))
    await asyncio.sleep(0)
    leaving.cancel()
    first.release()
    (await next_in_line).release()
    assert memory.held == 0
    first = await took(memory, 750)
    leaving = asyncio.create_task(took(memory, 750))
    await asyncio.sleep(0)
    first.release()  # the memory has been given to the task that is then cancelled
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert memory.held == 0


async def test_many_threads_never_take_more_than_there_is():
    memory, most = DecodeMemory(MEMORY), 0
    lock = threading.Lock()

    async def image(n_bytes: int) -> None:
        nonlocal most
        reservation = Reservation(memory)

        def work() -> None:
            nonlocal most
            reservation.take(n_bytes)
            with lock:
                most = max(most, memory.held)

        while True:
            try:
                await asyncio.to_thread(work)
                break
            except MustWait:
                await reservation.wait()
        reservation.release()

    await asyncio.gather(*(image(100 + 13 * n % 600) for n in range(60)))
    assert 500 < most <= MEMORY
    assert memory.held == 0


@pytest.mark.parametrize("side", [1200, 2400])
def test_what_an_image_takes_is_announced_before_it_is_decoded(side: int) -> None:
    sizes: list[int] = []
    decode(png_of_zeros(side, colour=6), on_memory=sizes.append)
    assert sizes == [side * side * (4 + 5)]


PEAK = """import sys
from pathlib import Path
from model.decode import decode
decode(Path(sys.argv[2]).read_bytes())
data = Path(sys.argv[1]).read_bytes()
def peak():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use
before = peak()
decode(data)
print(peak() - before)"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("PNG", "LA", {"compress_level": 1}),
        ("WEBP", "RGBA", {"lossless": True, "method": 0}),
        ("TIFF", "RGBA", {"compression": "tiff_deflate", "tiffinfo": {278: 2000}}),
    ],
)
def test_decoding_takes_no_more_than_announced(tmp_path, image_format: str, mode: str, options: dict[str, Any]) -> None:
    y, x = np.mgrid[0:2000, 0:2000]
    image = Image.fromarray(np.stack([x // 9, y // 9, (x + y) // 20], -1).astype(np.uint8)).convert(mode)
    files = [tmp_path / "large", tmp_path / "small"]
    for file, one in zip(files, (image, image.resize((20, 20))), strict=True):
        file.write_bytes(encoded(one, image_format, **options))
    announced: list[int] = []
    decode(files[0].read_bytes(), on_memory=announced.append)
    command = [sys.executable, "-c", PEAK, *map(str, files)]
    took = int(subprocess.run(command, capture_output=True, check=True, timeout=60, cwd=ROOT).stdout)
    assert 0.4 * announced[0] < took < announced[0] + 2**22


# ---- in the service


async def test_images_of_a_request_take_turns_for_the_memory(tmp_path):
    """Each image takes 36 MiB, and 48 MiB are for large images, so they are decoded one after another."""
    images = [png_of_zeros(side, colour=6) for side in (2000, 2001, 2002, 2003)]
    async with running(tmp_path, cache_bytes=0, decode_memory_bytes=2**26) as run:
        memory, highest = run.service.pipeline.decoding.memory, 0
        task = asyncio.create_task(run.embed(images))
        while not task.done():
            highest = max(highest, memory.held)
            await asyncio.sleep(0.001)
        assert all(outcome.error is None for outcome in await task)
        assert memory.held == 0
    assert 30 * 2**20 < highest < 48 * 2**20


async def test_an_image_that_needs_more_than_there_is_gets_a_413(tmp_path):
    async with running(tmp_path, cache_bytes=0, decode_memory_bytes=2**26) as run:
        answer = await run.client.post(
            "/v1/embeddings", content=png_of_zeros(3000), headers={"content-type": "image/png"}
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "image_too_large"
        assert "DINOV2_DECODE_MEMORY_BYTES" in answer.json()["error"]["message"]
        assert (await run.embed([photo()]))[0].error is None


async def test_an_analysed_image_holds_its_memory_until_it_is_answered(tmp_path):
    async with running(tmp_path, cache_bytes=0) as run:
        held: list[int] = []
        memory = run.service.pipeline.decoding.memory
        await run.service.pipeline.analyse(photo(), lambda analysed: held.append(memory.held))
        with pytest.raises(ZeroDivisionError):
            await run.service.pipeline.analyse(photo(), lambda analysed: 1 // 0)
        await until(lambda: memory.held == 0)
    assert held == [40 * 32 * 16]


@pytest.mark.parametrize("cut", [0.5, 1.0])
async def test_the_error_of_an_image_keeps_no_pixels(tmp_path, monkeypatch, cut: float):
    def refuse(rgb, spec):
        raise ValueError("too thin for a patch")

    monkeypatch.setattr(pipeline, "preprocess", refuse)
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)), "PNG")
    async with running(tmp_path, cache_bytes=0) as run:
        [outcome] = await run.service.pipeline.embed(numbered([data[: int(len(data) * cut)]]))
    error: BaseException | None = outcome.error
    assert error is not None
    kept: list[Any] = []
    while error is not None:
        kept += [v for frame, _ in traceback.walk_tb(error.__traceback__) for v in frame.f_locals.values()]
        error = error.__cause__ or error.__context__
    assert not [value for value in kept if isinstance(value, Image.Image | np.ndarray)]


async def test_a_waiting_image_is_charged_once(tmp_path):
    async with running(tmp_path, cache_bytes=0, decode_memory_bytes=2**26, rate_pixels_per_s=10**9) as run:
        images = [("file", (f"{side}.png", png_of_zeros(side, colour=6))) for side in (2000, 2001, 2002)]
        answer = await run.client.post("/v1/embeddings", files=images)
        assert answer.status_code == 200
        charged = run.service.metrics.registry.get_sample_value(
            "dinov2_rate_limit_pixels_total", {"client": "_addresses"}
        )
    assert charged == 2000**2 + 2001**2 + 2002**2 + 3 * 28 * 28 + 50_000


def test_the_default_is_three_eighths_of_the_memory(monkeypatch):
    monkeypatch.setattr("service.settings.available_memory", lambda: 8000)
    assert Settings().memory_for_decoding == 3000
    assert Settings(decode_memory_bytes=2**26).memory_for_decoding == 2**26
