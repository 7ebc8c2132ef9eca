"""Make a planted set from a folder of images: a data set with copies, leaks and faults whose ground truth is known.

    python benchmarks/planted_set.py IMAGES OUT [--evaluation FOLDER] [--images 200] [--each 20] [--leaks 20]
        [--repeated 3] [--seed 0]

IMAGES contains one folder per class. The script needs Pillow only. The same arguments give the same files.

OUT/images      the data set to curate: originals, copies of them, faulty images and leaks, in folders by class
OUT/evaluation  images of FOLDER, if it is given; some of them leak into OUT/images
OUT/truth.json  for each file: its kind, the file that it was made from, and the parameters of the edit

A file name does not reveal the kind. The images from which blurred, dark and truncated files are made are not in the
set, so that a tool which finds them has found the fault and not a copy.
"""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageEnhance, ImageFilter

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
REPEATS = 50


@dataclass(frozen=True)
class Sizes:
    """How many images of each kind a planted set has.

    `images` is the number of originals, and `each` the number of copies and faults of each kind, each made from another
    image. `leaks` is the number of leaks of each kind, and `repeated` the number of images of one class of which there
    are `REPEATS`.
    """

    images: int = 200
    each: int = 20
    leaks: int = 20
    repeated: int = 3


class Made(NamedTuple):
    """An encoded file and the parameters with which it was made."""

    data: bytes
    suffix: str
    parameters: dict[str, Any]


def _saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _jpeg(image: Image.Image, rng: random.Random, **parameters: Any) -> Made:
    quality = rng.randint(80, 95)
    return Made(_saved(image, "JPEG", quality=quality), ".jpg", {**parameters, "quality": quality})


def reencoded(image: Image.Image, rng: random.Random) -> Made:
    """Encode the pixels as JPEG or WebP of quality 25 to 95, or as PNG."""
    file_format = rng.choice(("JPEG", "JPEG", "WEBP", "PNG"))
    if file_format == "PNG":
        return Made(_saved(image, "PNG"), ".png", {"format": file_format})
    quality = rng.randint(25, 95)
    suffix = ".jpg" if file_format == "JPEG" else ".webp"
    return Made(_saved(image, file_format, quality=quality), suffix, {"format": file_format, "quality": quality})


def resized(image: Image.Image, rng: random.Random) -> Made:
    """Scale both sides by a factor from 0.4 to 2."""
    factor = math.exp(rng.uniform(math.log(0.4), math.log(2)))
    size = round(image.width * factor), round(image.height * factor)
    resample = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS))
    return _jpeg(image.resize(size, resample), rng, factor=round(factor, 3))


def cropped(image: Image.Image, rng: random.Random) -> Made:
    """Cut out 75 % of the area at a random place. The aspect ratio changes by up to 25 %."""
    stretch = math.sqrt(math.exp(rng.uniform(-math.log(1.25), math.log(1.25))))
    width = min(image.width, round(image.width * math.sqrt(0.75) * stretch))
    height = min(image.height, round(image.width * image.height * 0.75 / width))
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    box = (left, top, left + width, top + height)
    return _jpeg(image.crop(box), rng, box=box)


def mirrored(image: Image.Image, rng: random.Random) -> Made:
    """Swap left and right."""
    return _jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), rng)


def turned(image: Image.Image, rng: random.Random) -> Made:
    """Rotate by 90, 180 or 270 degrees."""
    name = rng.choice(("ROTATE_90", "ROTATE_180", "ROTATE_270"))
    return _jpeg(image.transpose(Image.Transpose[name]), rng, degrees=int(name.rpartition("_")[2]))


def tilted(image: Image.Image, rng: random.Random) -> Made:
    """Rotate by 3 to 20 degrees. The corners are black or white, or the image is cut to a rectangle without them."""
    degrees = rng.choice((-1, 1)) * rng.uniform(3, 20)
    corners = rng.choice(("black", "white", "cut"))
    fill = "black" if corners == "cut" else corners
    rotated = image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)
    if corners == "cut":
        sine, cosine = abs(math.sin(math.radians(degrees))), math.cos(math.radians(degrees))
        # the largest rectangle of the image's aspect ratio inside the rotated image
        long, short = max(image.size), min(image.size)
        share = min(1 / (cosine + sine * long / short), 1 / (cosine + sine * short / long))
        width, height = int(image.width * share), int(image.height * share)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        rotated = rotated.crop((left, top, left + width, top + height))
    return _jpeg(rotated, rng, degrees=round(degrees, 2), corners=corners)


def recoloured(image: Image.Image, rng: random.Random) -> Made:
    """Change brightness, contrast, saturation and hue."""
    parameters = {
        "brightness": round(rng.uniform(0.6, 1.4), 3),
        "contrast": round(rng.uniform(0.6, 1.4), 3),
        "saturation": round(rng.uniform(0.0, 2.0), 3),
        "hue": round(rng.uniform(-0.1, 0.1), 3),
    }
    image = ImageEnhance.Brightness(image).enhance(parameters["brightness"])
    image = ImageEnhance.Contrast(image).enhance(parameters["contrast"])
    image = ImageEnhance.Color(image).enhance(parameters["saturation"])
    hue, saturation, value = image.convert("HSV").split()
    shift = round(parameters["hue"] * 256)
    image = Image.merge("HSV", (hue.point([(level + shift) % 256 for level in range(256)]), saturation, value))
    return _jpeg(image.convert("RGB"), rng, **parameters)


def blurred(image: Image.Image, rng: random.Random) -> Made:
    """Blur with a radius of 2.5 to 4 % of the short side."""
    radius = rng.uniform(0.025, 0.04) * min(image.size)
    return _jpeg(image.filter(ImageFilter.GaussianBlur(radius)), rng, radius=round(radius, 2))


def dark(image: Image.Image, rng: random.Random) -> Made:
    """Reduce the brightness to 5 to 20 %."""
    brightness = rng.uniform(0.05, 0.2)
    return _jpeg(ImageEnhance.Brightness(image).enhance(brightness), rng, brightness=round(brightness, 3))


Edit = Callable[[Image.Image, random.Random], Made]
COPIES: dict[str, Edit] = {
    "reencoded": reencoded,
    "resized": resized,
    "cropped": cropped,
    "mirrored": mirrored,
    "turned": turned,
    "tilted": tilted,
    "recoloured": recoloured,
}
"""The kinds of copies that are made by an edit. Further kinds: `exact` (the same bytes) and `repeated`."""
FAULTS: dict[str, Edit] = {"blurred": blurred, "dark": dark}
"""The kinds of faulty images that are made by an edit. Another kind: `truncated`."""


class PlantedSet:
    """Writes files and records their ground truth."""

    def __init__(self, out: Path, seed: int) -> None:
        self._out, self._seed = out, seed
        self.truth: dict[str, dict[str, Any]] = {}

    def rng(self, *purpose: str) -> random.Random:
        """Return a random generator that depends only on the seed and the purpose."""
        return random.Random("/".join((str(self._seed), *purpose)))

    def add(self, part: str, source: Path, made: Made, kind: str, of: str | None = None, number: int = 0) -> str:
        """Write a file made from the image `source` into the folder `part`, and return its path below OUT."""
        purpose = f"{self._seed}/{kind}/{number}/{source.parent.name}/{source.name}"
        name = hashlib.sha256(purpose.encode()).hexdigest()[:12] + made.suffix
        path = f"{part}/{source.parent.name}/{name}"
        (self._out / path).parent.mkdir(parents=True, exist_ok=True)
        (self._out / path).write_bytes(made.data)
        self.truth[path] = {"kind": kind, "of": of, "made_from": source.name, "parameters": made.parameters}
        return path


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _unchanged(path: Path) -> Made:
    return Made(path.read_bytes(), path.suffix.lower(), {})


def _truncated(path: Path, rng: random.Random) -> Made:
    data, share = path.read_bytes(), rng.uniform(0.3, 0.7)
    return Made(data[: int(len(data) * share)], path.suffix.lower(), {"share": round(share, 3)})


def images_of(folder: Path) -> list[Path]:
    """Return the paths of the different images in a folder, sorted. Files with the same bytes are listed once."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    by_digest = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in reversed(files)}
    return sorted(by_digest.values())


def _sample(paths: list[Path], count: int, rng: random.Random, what: str) -> list[Path]:
    if len(paths) < count:
        raise SystemExit(f"{what}: {count} images are needed, and there are {len(paths)}")
    return rng.sample(paths, count)


def plant(images: Path, out: Path, evaluation: Path | None, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Write a planted set to the folder `out`, and return its ground truth.

    Args:
        images: the folder of images, with one folder per class.
        out: the folder that the set is written to. It must not exist.
        evaluation: a folder of evaluation images, or None for a set without leaks.
        sizes: the numbers of images of each kind.
        seed: the seed of all random choices.
    """
    if out.exists():
        raise SystemExit(f"{out} exists")
    planted = PlantedSet(out, seed)
    extra = sizes.each * (len(FAULTS) + 1)
    chosen = _sample(images_of(images), sizes.images + extra, planted.rng("images"), str(images))
    originals, rest = chosen[: sizes.images], chosen[sizes.images :]
    paths = {source: planted.add("images", source, _unchanged(source), "original") for source in originals}
    for kind in ("exact", *COPIES):
        for source in _sample(originals, sizes.each, planted.rng(kind), "--images"):
            made = (
                _unchanged(source) if kind == "exact" else COPIES[kind](_open(source), planted.rng(kind, source.name))
            )
            planted.add("images", source, made, kind, paths[source])
    _repeat_class(planted, originals, paths, sizes.repeated)
    for kind in FAULTS:
        for _ in range(sizes.each):
            source = rest.pop()
            planted.add("images", source, FAULTS[kind](_open(source), planted.rng(kind, source.name)), kind)
    for source in rest:
        planted.add("images", source, _truncated(source, planted.rng("truncated", source.name)), "truncated")
    if evaluation is not None:
        _leak(planted, evaluation, sizes.leaks)
    truth = {"seed": seed, **asdict(sizes), "files": dict(sorted(planted.truth.items()))}
    (out / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")
    return truth


def _repeat_class(planted: PlantedSet, originals: list[Path], paths: dict[Path, str], most: int) -> None:
    """Repeat up to `most` images of one class until there are `REPEATS` of each, as JPEGs of different quality."""
    by_class: dict[str, list[Path]] = {}
    for source in originals:
        by_class.setdefault(source.parent.name, []).append(source)
    largest = max(by_class, key=lambda name: (len(by_class[name]), name))
    for source in by_class[largest][:most]:
        image = _open(source)
        for number in range(REPEATS - 1):
            quality = 40 + number
            made = Made(_saved(image, "JPEG", quality=quality), ".jpg", {"quality": quality})
            planted.add("images", source, made, "repeated", paths[source], number)


def _leak(planted: PlantedSet, evaluation: Path, count: int) -> None:
    """Copy the evaluation images, and plant a copy of some of them: `count` unchanged, and `count` of every edit."""
    kinds: dict[str, Edit | None] = {"exact": None, **COPIES}
    sources = images_of(evaluation)
    paths = {source: planted.add("evaluation", source, _unchanged(source), "evaluation") for source in sources}
    for kind, edit in kinds.items():
        for source in _sample(sources, min(count, len(sources)), planted.rng("leak", kind), str(evaluation)):
            made = _unchanged(source) if edit is None else edit(_open(source), planted.rng("leak", kind, source.name))
            planted.add("images", source, made, f"leak_{kind}", paths[source])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images, with one folder per class")
    parser.add_argument("out", type=Path, help="folder that the set is written to")
    parser.add_argument("--evaluation", type=Path, help="folder of evaluation images that leak into the set")
    parser.add_argument("--images", dest="count", type=int, default=Sizes.images, help="number of originals")
    parser.add_argument("--each", type=int, default=Sizes.each, help="number of copies and faults of each kind")
    parser.add_argument("--leaks", type=int, help="number of leaks of each kind (default: as --each)")
    parser.add_argument("--repeated", type=int, default=Sizes.repeated, help=f"images that occur {REPEATS} times")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    leaks = given.each if given.leaks is None else given.leaks
    sizes = Sizes(given.count, given.each, leaks, given.repeated)
    truth = plant(given.images, given.out, given.evaluation, sizes, given.seed)
    kinds = [entry["kind"] for entry in truth["files"].values()]
    for kind in sorted(set(kinds)):
        print(f"{kind:20} {kinds.count(kind)}")


if __name__ == "__main__":
    main()
