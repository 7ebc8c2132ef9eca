"""Tests of the table of scanned images."""

from dataclasses import replace

import numpy as np
import pytest

from training.curate.table import Images


def make_table(n: int = 3) -> Images:
    numbers = np.arange(n)
    return Images(
        key=[f"0/{i:03d}.jpg" for i in numbers],
        sha256=np.repeat(numbers.astype(np.uint8)[:, None], 32, 1),
        pixels_sha256=np.repeat(numbers.astype(np.uint8)[:, None], 32, 1),
        phash=numbers.astype(np.uint64),
        width=np.full(n, 4, np.int32),
        height=np.full(n, 5, np.int32),
        n_bytes=np.full(n, 100, np.int64),
        label=[None] * n,
        measures={"darkness": numbers.astype(np.float32)},
        embedding=np.eye(n, 8, dtype=np.float32),
    )


def test_some_images_make_a_table_of_their_own() -> None:
    taken = make_table().take(np.array([0, 2]))
    assert len(taken) == 2
    assert list(taken.key) == ["0/000.jpg", "0/002.jpg"]
    assert taken.phash.tolist() == [0, 2]
    assert taken.measures["darkness"].tolist() == [0, 2]
    assert taken.embedding.argmax(1).tolist() == [0, 2]


def test_keys_must_be_unique_and_sorted() -> None:
    table = make_table()
    for keys in (["b", "a", "c"], ["a", "a", "b"]):
        with pytest.raises(ValueError, match="ascending order"):
            replace(table, key=keys)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("phash", np.zeros(3, np.int64)),
        ("width", np.zeros(2, np.int32)),
        ("embedding", np.zeros(3, np.float32)),
        ("measures", {"blur": np.zeros(3)}),
        ("label", ["a"]),
    ],
)
def test_columns_of_another_kind_or_length_are_refused(name: str, values: object) -> None:
    with pytest.raises(ValueError, match=name):
        replace(make_table(), **{name: values})
