"""Make the gallery. `python docs/gallery.py FOLDER` runs its commands and writes the page. Without FOLDER, only the
page is written.

FOLDER contains the images of the Grocery Store Dataset (MIT licence), for example `FOLDER/val/Avocado/Avocado_004.jpg`.
The pictures are written to docs/gallery/. The page docs/gallery.md shows each picture with the command that made it.
A test compares the stored page with the output of this script.
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gallery.md"
PICTURES = ROOT / "docs" / "gallery"


class Picture(NamedTuple):
    """A picture: its heading, the command without `dinov2`, and what the picture shows. In the command, `{Name_001}`
    stands for the path of an image, and the picture is the file after `-o`."""

    heading: str
    command: str
    shows: str


CASES: Final = [
    Picture(
        "Attention of all blocks",
        "attention {Honeydew-Melon_002} --format figure --size 224 -o attention-figure.png",
        "Each row is a block, and each column is a head. In each map, the brightest patches get the most attention "
        "from the class token.",
    ),
    Picture(
        "Attention over the image",
        "attention {Yellow-Onion_005} --format overlay --size 224 -o attention.png",
        "The mean over the heads of the last block.",
    ),
    Picture(
        "Rollout",
        "attention {Honeydew-Melon_002} --format overlay --fuse-blocks rollout --size 224 -o rollout.png",
        "The attention, followed through all blocks from the last to the first.",
    ),
    Picture(
        "Colours of patch features",
        "features {Honeydew-Melon_001} {Honeydew-Melon_004} --format pca --size 224 -o features.png",
        "The first three principal components of the patches of both images, as red, green and blue. Similar parts "
        "have similar colours.",
    ),
    Picture(
        "Foreground",
        "segment {Honeydew-Melon_002} --format overlay --size 224 -o foreground.png",
        "The first principal component divides the image into foreground and background.",
    ),
    Picture(
        "One object",
        "segment {Cantaloupe_004} --method cut --format overlay --size 224 -o cut.png",
        "The part that a normalised cut separates. Its outline follows the colours of the image.",
    ),
    Picture(
        "Several objects",
        "segment {Honeydew-Melon_001} --method multi --format overlay --size 224 -o multi.png",
        "Repeated cuts. Each colour is an object.",
    ),
    Picture(
        "Groups of similar patches",
        "segment {Honeydew-Melon_001} --method cluster --k 4 --format overlay --size 224 -o cluster.png",
        "Four groups, found by k-means on the patch features.",
    ),
    Picture(
        "A region from one point",
        'segment {Cantaloupe_004} --method prompt --prompts \'[{"points": [{"x": 85, "y": 190}]}]\' --format overlay '
        "--size 224 -o prompt.png",
        "The part that is similar to the point and connected to it.",
    ),
    Picture(
        "Objects without labels",
        "detect {Honeydew-Melon_001} --format overlay --size 224 -o detect.png",
        "A box around each object, with its score.",
    ),
    Picture(
        "Corresponding parts",
        "match {God-Morgon-Red-Grapefruit-Juice_001} {God-Morgon-Red-Grapefruit-Juice_003} --format png --size 224 "
        "-o match.png",
        "Each line connects two patches that are each other's nearest neighbour. Yellow lines have the highest scores.",
    ),
]

HEAD: Final = """# Gallery

The command below each picture made it, with the demo model: a network with 4 blocks that was trained on 2,640 images of
groceries, on two CPU cores. The images were chosen to show what each command does. On many other images, the results of
this model are worse. Larger models give finer and more reliable results. The images are from the
[Grocery Store Dataset](https://github.com/marcusklasson/GroceryStoreDataset) (Copyright (c) 2019 Marcus Klasson, MIT
licence). `python docs/gallery.py FOLDER` makes all pictures again.
[vision.md](vision.md) describes the commands.
"""


def picture_name(case: Picture) -> str:
    """Return the file name of a picture."""
    words = shlex.split(case.command)
    return words[words.index("-o") + 1]


def page() -> str:
    """Return the text of the page."""
    parts = [HEAD]
    for case in CASES:
        shown = _filled(case.command, {})
        parts.append(
            f"## {case.heading}\n\n![{case.heading}](gallery/{picture_name(case)})\n\n{case.shows}\n\n"
            f"```sh\ndinov2 {shown}\n```\n"
        )
    return "\n".join(parts)


def _filled(command: str, paths: dict[str, str]) -> str:
    """Replace each `{Name_001}` in a command with its path in `paths`, or with the name of its file."""
    words = command.split(" ")
    for i, word in enumerate(words):
        if word.startswith("{") and word.endswith("}") and ":" not in word:
            words[i] = paths.get(word[1:-1], f"{word[1:-1]}.jpg")
    return " ".join(words)


def make(folder: Path) -> None:
    """Run all commands with the images in a folder."""
    paths = {path.stem: str(path.resolve()) for path in folder.glob("**/*.jpg")}
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as data:
        for case in CASES:
            words = shlex.split(_filled(case.command, paths))
            print("dinov2", *words)
            command = [sys.executable, "-m", "cli", *words, "--data-dir", data]
            command[command.index("-o") + 1] = str(PICTURES / picture_name(case))
            subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603  # the commands of this file


if __name__ == "__main__":
    if len(sys.argv) > 1:
        make(Path(sys.argv[1]))
    PAGE.write_text(page())
