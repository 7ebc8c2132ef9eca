"""Tests of the report of a curation: it shows what happened, it is one file, and names of files cannot add markup."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.curate.curated import Pool, cats_and_dogs, encoded, picture
from tests.training.pages.checker import Checker
from training.curate.drops import Drop
from training.curate.outcome import Outcome
from training.curate.report import reason_kind, write_report
from training.curate.table import Pixels
from training.data.dataset import decode

NASTY = "<script>alert('x')</script>\" onerror=\"alert(1)&"


def report(outcome: Outcome, pool: Pool, path: Path, **options: object) -> str:
    def read(index: int) -> Pixels:
        return decode(pool.read(index))

    write_report(path, outcome, read, name=f"set {NASTY}", **options)  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


def hostile() -> tuple[Pool, Outcome]:
    """Return images with markup in their names, labels and reasons, and their curation."""
    key = f"1/{NASTY}/a.jpg"
    pool = cats_and_dogs(6)
    files = pool.files | {key: encoded(picture(50))}
    pool = Pool(files, {k: k.split("/")[1] for k in files})
    drops = pool.drops(
        (key, f"stage {NASTY}", f"copy of 1/cats/00.jpg ({NASTY})", "1/cats/00.jpg"),
        ("1/cats/01.jpg", "duplicates", f"copy of {key} (similarity 0.9)", key),
        ("1/dogs/01.png", "leaks", f"copy of evaluation image val/{NASTY}.jpg", None),
        ("1/dogs/02.png", "quality", "blurry", None),
    )
    return pool, pool.outcome(drops, ["1/cats/05.jpg"], [], [(f"1/{NASTY}.gif", NASTY)], [f"s3://{NASTY}"])


def test_names_cannot_add_markup(tmp_path: Path) -> None:
    pool, outcome = hostile()
    page = Checker(report(outcome, pool, tmp_path / "r.html"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "link", "object", "form"})
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            assert attributes.get(name, "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert page.text.count(NASTY) >= 8


def test_the_page_needs_no_other_file_and_is_the_same_each_time(tmp_path: Path) -> None:
    pool, outcome = hostile()
    page = report(outcome, pool, tmp_path / "a.html")
    assert page == report(outcome, pool, tmp_path / "b.html")
    assert not re.search(r'(src|href)="(?!data:)|@import|url\(', page)
    assert "prefers-color-scheme: dark" in page


def test_a_dropped_image_is_beside_the_kept_one(tmp_path: Path) -> None:
    pool = cats_and_dogs(6)
    drops = pool.drops(
        ("1/cats/01.jpg", "duplicates", "copy of 1/cats/00.jpg (similarity 0.9)", "1/cats/00.jpg"),
        ("1/dogs/01.png", "leaks", "copy of evaluation image val/9.jpg", None),
    )
    seen: list[str] = []

    def beside(drop: Drop) -> Pixels:
        seen.append(drop.reason)
        return np.full((8, 8, 3), 200, np.uint8)

    page = report(pool.outcome(drops), pool, tmp_path / "r.html", beside=beside)
    assert seen == ["copy of evaluation image val/9.jpg"]
    cards = re.findall(r'<div class="pair">.*?</p></div>', page)
    assert len(cards) == 2
    images = [re.findall(r'title="([^"]*)"[^>]*base64,([^"]*)"', card) for card in cards]
    assert [[title for title, _ in card] for card in images] == [
        ["1/cats/01.jpg", "1/cats/00.jpg"],
        ["1/dogs/01.png", "copy of evaluation image val/9.jpg"],
    ]
    for number, data in ((1, images[0][0][1]), (0, images[0][1][1])):
        thumbnail = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), float)
        assert np.abs(thumbnail - picture(number)).mean() < 12
    assert re.findall(r"<h3>(.*?) <span", page) == [
        "duplicates: copy of another image",
        "leaks: copy of evaluation image",
    ]


def test_counts_of_stages_and_reasons(tmp_path: Path) -> None:
    pool = cats_and_dogs()
    drops = pool.drops(
        *((f"1/cats/{i:02d}.jpg", "quality", "blurry" if i else "dark", None) for i in range(5)),
        ("1/dogs/01.png", "balance", "cluster 17 has 31 images", None),
        ("1/dogs/02.png", "balance", "cluster 3 has 7 images", None),
        ("1/cats/04.jpg", "balance", "too late", None),
    )
    outcome = pool.outcome(drops, restored=["1/cats/03.jpg"], unreadable=[("1/z.jpg", "truncated")])
    page = report(outcome, pool, tmp_path / "r.html")
    rows = [re.sub(r"<[^>]*>", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    cells = [[cell for cell in row.split("|") if cell] for row in rows]
    assert cells[1:9] == [
        ["scan", "1", "25"],
        ["truncated", "1"],
        ["quality", "4", "21"],
        ["blurry", "3"],
        ["dark", "1"],
        ["balance", "2", "19"],
        ["cluster N has N images", "2"],
        *cells[8:9],
    ]
    tiles = dict(re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span>', page))
    assert tiles["26"] == "images found"
    assert tiles["19"] in ("kept (73.1%)", "to train on")


def test_an_image_that_cannot_be_read_has_a_box(tmp_path: Path) -> None:
    pool = cats_and_dogs(6)
    pool.files["1/cats/01.jpg"] = b"gone"
    drops = pool.drops(("1/cats/01.jpg", "quality", "blurry", None))
    assert "not readable" in report(pool.outcome(drops), pool, tmp_path / "r.html")


def test_sensitive_images_are_not_shown(tmp_path: Path) -> None:
    pool = cats_and_dogs(6)
    drops = pool.drops(("1/cats/01.jpg", "sensitive", "like the marked images", None))
    outcome = pool.outcome(drops)
    pool.n_read = 0
    page = report(outcome, pool, tmp_path / "r.html")
    assert "not shown" in page
    assert pool.n_read == page.count("data:image") == len(outcome.kept)


def test_many_reasons_and_many_images_stay_one_page(tmp_path: Path) -> None:
    n = 400
    files = {f"1/{i:03d}.jpg": encoded(picture(i % 5)) for i in range(n)}
    pool = Pool(files)
    pool.images = replace(pool.images, embedding=np.eye(n, 8, dtype=np.float32))
    drops = pool.drops(*((f"1/{i:03d}.jpg", "quality", "x" * (i % 30 + 1), None) for i in range(300)))
    page = report(pool.outcome(drops), pool, tmp_path / "r.html")
    assert page.count("data:image") == 48 + 8 * 10
    assert "other reasons" in page


@pytest.mark.parametrize(
    ("reason", "kept", "kind"),
    [
        ("copy of 1/a b/c (1).jpg (similarity 0.98)", "1/a b/c (1).jpg", "copy of another image"),
        ("same pixels as 2/x.jpg", "2/x.jpg", "same pixels as another image"),
        ("copy of evaluation image val/7.jpg (similarity 0.98)", None, "copy of evaluation image"),
        ("cluster 12 has 3,000 images", None, "cluster N has N images"),
        ("dark, blurry", None, "dark, blurry"),
        ("/", None, "/"),
        (
            "not a known image; it starts with 68 6c; supported formats: JPEG",
            None,
            "not a known image; supported formats: JPEG",
        ),
    ],
)
def test_the_kind_of_a_reason(reason: str, kept: str | None, kind: str) -> None:
    assert reason_kind(reason, kept) == kind
