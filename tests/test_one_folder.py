"""Checks that `train`, `index` and `embed` use the same files of a folder, and account for all of them."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from rich.console import Console
from typer.testing import CliRunner

import cli
from model.decode import FORMATS
from tests.training.tiny import TINY
from training.config import TrainConfig
from training.data.sources import open_source
from training.train import train

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))


def encode(kind: str, image: Image.Image = RGB, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def much_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 2**21, zip=True)
    return info


PNG, JPEG = encode("PNG"), encode("JPEG")
GREY_16 = Image.fromarray(np.arange(24 * 36, dtype=np.uint16).reshape(24, 36) * 70)

USED: dict[str, bytes] = {
    "a/plain.jpg": JPEG,
    "a/UPPER.JPG": JPEG,
    "a/saved.jfif": JPEG,
    "a/old.jpe": JPEG,
    "a/without_suffix": PNG,
    "a/photo.jpg_large": JPEG,
    "a/photo.png.bak": PNG,
    "a/wrong_suffix.png": JPEG,
    "a/two.dots.in.name.png": PNG,
    "a/ümläut 写真 🙂.png": PNG,
    "a/with space.png": PNG,
    "a/grey16.png": encode("PNG", GREY_16),
    "a/palette.png": encode("PNG", RGB.quantize(16), transparency=3),
    "b/alpha.webp": encode("WEBP", RGB.convert("RGBA"), lossless=True),
    "b/cmyk.jpg": encode("JPEG", RGB.convert("CMYK")),
    "b/animated.gif": encode("GIF", RGB.quantize(8), save_all=True, append_images=[RGB.rotate(90).quantize(8)]),
    "b/pages.tif": encode("TIFF", RGB, save_all=True, append_images=[RGB]),
    "b/windows.dib": encode("BMP"),
    "b/much_text.png": encode("PNG", pnginfo=much_text()),
    "b/large_profile.png": encode("PNG", icc_profile=np.random.default_rng(1).bytes(1_200_000)),
    "b/torn_exif.jpg": encode("JPEG", exif=b"Exif\0\0II*\0\xf0\xff\xff\xff"),
    "b/video_behind.jpg": JPEG + b"\0\0\0\x18ftypmp42" * 9,
    "b/deep/er/folder.jpg/image.png": PNG,
    "b/copy_of_plain.jpg": JPEG,
}
IGNORED: dict[str, bytes] = {
    "a/._plain.jpg": b"\0\5\x16\7",
    "a/.DS_Store": b"\0\0\0\1Bud1",
    "a/.ipynb_checkpoints/plain-checkpoint.jpg": JPEG,
    "a/Thumbs.db": b"\xd0\xcf\x11\xe0",
    "a/desktop.ini": b"[.ShellClassInfo]",
    "a/plain.json": b'{"brand": "Arla"}',
    "a/labels.csv": b"file,label\n",
    "a/notes.txt": JPEG,
    "a/page.html": b"<html>",
    "a/annotations.xml": b"<a/>",
    "a/paper.pdf": b"%PDF-1.7",
    "a/script.py": b"pass",
    "b/clip.mp4": b"\0\0\0\x18ftypmp42",
    "b/drawing.svg": b"<svg/>",
    "b/raw.dng": encode("TIFF"),
    "b/weights.pth": b"PK\3\4",
    "b/more.zip": b"PK\3\4",
    "b/array.npy": b"\x93NUMPY",
    "b/README": b"no image",
    "b/empty": b"",
    "b/picture.ppm": encode("PPM"),
    "b/icon.ico": encode("ICO"),
    "b/data.unknown": b"anything",
    "__MACOSX/._plain.jpg": b"\0\5\x16\7",
}
FAILED: dict[str, bytes] = {
    "a/empty.jpg": b"",
    "a/text.jpg": b"404 not found",
    "a/cut.png": PNG[: len(PNG) // 2],
    "b/cut.jpg": JPEG[:200],
    "b/phone.heic": b"\0\0\0\x18ftypheic" + bytes(40),
    "b/float.tif": encode("TIFF", Image.fromarray(np.ones((8, 8), np.float32))),
    "b/thin.png": encode("PNG", Image.new("RGB", (300, 2))),
}
LINKS = 2  # one linked file and one linked folder with one image: used as well


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name, data in {**USED, **IGNORED, **FAILED}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.png").write_bytes(PNG)
    (folder / "a" / "linked.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (folder / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "b" / "broken_link.jpg").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "a" / "pipe.jpg")
    return folder


def test_three_commands_agree_about_forty_kinds_of_odd_files(folder: Path, tmp_path: Path) -> None:
    if "AVIF" in FORMATS:
        (folder / "b" / "image.avif").write_bytes(encode("AVIF"))
    n_used = len(USED) + LINKS + ("AVIF" in FORMATS)
    n_ignored = len(IGNORED) - 1 + 1  # the hidden folder counts as a folder; the pipe counts
    n_failed = len(FAILED) + 1  # the broken link
    assert len(USED) + LINKS + len(IGNORED) + n_failed > 40
    lines, used = {}, {}
    for name, run in {"embed": embedded, "index": indexed, "train": trained}.items():
        used[name], lines[name] = run(folder, tmp_path / name)
    lines["train"] = lines["train"][10:]  # begins with the time of day
    accounts = {name: line.replace(f"{folder}/", "") for name, line in lines.items()}
    assert accounts["embed"].startswith(
        f"{n_used + n_ignored + n_failed} files: {n_used} used, {n_ignored} ignored (3 hidden, 2 without suffix, "
    ), accounts
    assert accounts["embed"].endswith("; hidden folders: 1; links to a folder above: 1")
    assert f"{n_failed} failed (" in accounts["embed"]
    # The names of the first failed files depend on the order in which they are found.
    assert len({before_names(line) for line in accounts.values()}) == 1, accounts
    assert used["embed"] == used["index"] == used["train"]
    assert set(USED) <= used["embed"]


def before_names(account: str) -> str:
    start, failed, names = account.partition(" failed (")
    return start + failed + names.partition(")")[2]


Outcome = tuple[set[str], str]
Command = Callable[[Path, Path], Outcome]


def embedded(folder: Path, out: Path) -> Outcome:
    out.mkdir()
    words = ["embed", str(folder), "--out", str(out / "x.npz"), "--data-dir", str(out), "--threads", "1"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    with np.load(out / "x.npz") as file:
        return {Path(path).relative_to(folder).as_posix() for path in file["paths"].tolist()}, last_line(result.stdout)


def indexed(folder: Path, out: Path) -> Outcome:
    errors = out.with_suffix(".jsonl")
    words = ["index", str(folder), "-c", "shop", "--data-dir", str(out), "--threads", "1", "--errors", str(errors)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 1, result.output  # some files failed
    failed = {json.loads(line)["source"] for line in errors.read_text().splitlines()}
    exported = CliRunner().invoke(
        cli.app, ["collections", "export", "shop", "--out", f"{out}.npz", "--data-dir", str(out)]
    )
    assert exported.exit_code == 0, exported.output
    with np.load(f"{out}.npz") as file:
        ids = set(file["ids"].tolist())
    assert not {str(folder / name) for name in ids} & failed
    return ids, last_line(result.stdout)


def trained(folder: Path, out: Path) -> Outcome:
    console = Console(file=io.StringIO(), width=80)
    train(TrainConfig.model_validate({"data": folder, "out": out, **TINY, "epochs": 1, "batch_size": 8}), console)
    source = open_source(folder, out / "index")
    failed = {line.partition(": ")[0] for line in (out / "skipped.txt").read_text().splitlines()}
    return {source.name(i) for i in range(len(source))} - failed, last_line(console.file.getvalue())  # type: ignore[attr-defined]


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
