"""Tests of what a curation has decided: the checks of an outcome, and the choice of held-out images."""

import numpy as np
import pytest

from tests.training.curate.curated import Pool
from training.curate.outcome import Outcome, check_apart, split


def pool_of(n: int, same_pixels: dict[str, str] | None = None) -> Pool:
    return Pool({f"1/{i:04d}.jpg": i.to_bytes(4) for i in range(n)}, same_pixels=same_pixels)


def test_an_outcome_says_what_became_of_every_image() -> None:
    pool = pool_of(4)
    drops = pool.drops(("1/0001.jpg", "quality", "blurry", None), ("1/0001.jpg", "balance", "many", None))
    outcome = pool.outcome(drops, ["1/0002.jpg"])
    assert outcome.train.tolist() == [0, 3]
    assert outcome.drop_of[1].stage == "quality"
    none, kept = np.zeros(0, np.int64), np.array([0, 2, 3])
    for wrong, message in (
        ((none, none, drops), "none of 4 images is kept"),
        ((np.array([0, 3, 2]), none, drops), "ascending order"),
        ((kept, np.array([1]), drops), r"held out but not kept: 1/0001\.jpg"),
        ((np.array([0, 3]), none, drops), r"neither kept nor dropped: 1/0002\.jpg"),
        ((np.arange(4), none, drops), r"both kept and dropped: 1/0001\.jpg"),
        ((kept, none, drops, frozenset({1})), r"restored but not kept: 1/0001\.jpg"),
    ):
        with pytest.raises(ValueError, match=message):
            Outcome(pool.images, *wrong)  # type: ignore[arg-type]


def test_about_the_wished_share_is_held_out_and_images_stay_in_their_part() -> None:
    images = pool_of(2000).images
    few, many = np.arange(0, 2000, 2), np.arange(2000)
    held_out = split(images, many, [], 0.1, seed=3)
    assert 150 <= len(held_out) <= 250
    assert (np.diff(held_out) > 0).all()
    assert split(images, few, [], 0.1, seed=3).tolist() == [i for i in held_out.tolist() if i % 2 == 0]
    assert split(images, many, [], 0.1, seed=4).tolist() != held_out.tolist()
    assert split(images, many, [], 0, seed=3).tolist() == []
    with pytest.raises(ValueError, match="held_out_share=1 must be at least 0 and less than 1"):
        split(images, many, [], 1, seed=3)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_neither_part_is_empty(share: float) -> None:
    images = pool_of(3).images
    held_out = split(images, np.arange(3), [], share, seed=0)
    assert len(held_out) == (1 if share < 0.5 else 2)


def test_images_that_show_the_same_are_in_the_same_part() -> None:
    """Copies that are restored, and images with equal pixels, follow each other over several links."""
    n = 600
    same = {f"1/{i:04d}.jpg": f"1/{i - 1:04d}.jpg" for i in range(1, n, 3)}
    pool = pool_of(n, same)
    images = pool.images
    drops = pool.drops(*((f"1/{i:04d}.jpg", "duplicates", "copy", f"1/{i - 1:04d}.jpg") for i in range(2, n, 3)))
    held_out = set(split(images, np.arange(n), drops, 0.3, seed=1).tolist())
    for start in range(0, n, 3):
        assert len({start, start + 1, start + 2} & held_out) in (0, 3)
    assert 0.2 * n < len(held_out) < 0.4 * n


def test_copies_in_both_parts_are_refused() -> None:
    pool = pool_of(4, {"1/0003.jpg": "1/0000.jpg"})
    check_apart(pool.images, np.array([1, 2]), np.array([0, 3]))
    with pytest.raises(ValueError, match=r"1/0003\.jpg is held out, but 1/0000\.jpg has the same pixels"):
        check_apart(pool.images, np.array([0, 1]), np.array([2, 3]))
    pool.images.pixels_sha256[3] = 7
    with pytest.raises(ValueError, match="has the same perceptual hash"):
        check_apart(pool.images, np.array([0, 1]), np.array([2, 3]))
