"""Tests of the sources of `dinov2 index`: every kind yields its images, and hostile or broken files are listed without
stopping the run.
"""

import datetime
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import fsspec
import pytest

from model.folder import Account
from service.errors import ImageTooLarge
from service.ingest.folders import Content, Entry, File, Photo, Problem, Remote, find_place
from service.ingest.listed import Allowed
from service.ingest.sources import find_photos, read_photo
from service.ingest.unpacking import MAX_SIDECAR_BYTES
from tests.fakes import no_file_left_open, photo

pa = pytest.importorskip("pyarrow", reason="the extra `parquet`")
import pyarrow.parquet as pq  # noqa: E402

AN_HOUR_EAST = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))


def taken(*sources: object, **options: object) -> tuple[dict[str, Content], dict[str, str]]:
    """Return two dictionaries: content by id, and the reason by source for each image that could not be read."""
    contents, problems = {}, {}
    for one in find_photos([str(source) for source in sources], **options):
        if isinstance(one, Problem):
            problems[one.source] = one.reason
            continue
        try:
            contents[one.id] = one.load()
        except (ImageTooLarge, OSError, ValueError) as error:
            problems[one.source] = str(error)
    return contents, problems


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


MEMBERS = [("a.jpg", b"A"), ("a.json", b'{"label": 1}'), ("deep/b.png", b"B"), ("notes.txt", b"no photo")]


def test_a_folder_at_any_depth_with_sidecars(tmp_path: Path) -> None:
    (tmp_path / "shelf" / "ünder ✓").mkdir(parents=True)
    for name in ["b.jpg", "A.PNG", "notes.txt", ".hidden.jpg", "shelf/c.webp", "shelf/ünder ✓/写真.jpg"]:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "b.json").write_text('{"brand": "Arla"}')
    contents, problems = taken(tmp_path)
    assert list(contents) == ["A.PNG", "b.jpg", "shelf/c.webp", "shelf/ünder ✓/写真.jpg"]
    assert contents["b.jpg"] == (b"b.jpg", {"brand": "Arla"})
    assert not problems


def test_what_is_known_of_a_file_goes_with_it(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    os.utime(tmp_path / "a.jpg", (1_700_000_000.25, 1_700_000_000.25))
    (found,) = find_photos([str(tmp_path)])
    assert isinstance(found, Photo)
    assert found.stamp == {"bytes": 5, "modified": "2023-11-14T22:13:20.250000+00:00"}
    assert found.source == str(tmp_path / "a.jpg")


def test_a_file_with_any_name_is_a_photo_when_it_is_the_source(tmp_path: Path) -> None:
    (tmp_path / "scan").write_bytes(b"x")
    assert taken(tmp_path / "scan")[0] == {"scan": (b"x", {})}


def test_missing_sources_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: no such file or folder"):
        find_photos([str(tmp_path), str(tmp_path / "none")])
    with pytest.raises(ValueError, match="no source"):
        find_photos([])
    with pytest.raises(ValueError, match="nonsense://x"):
        find_photos(["nonsense://x"])


def test_files_that_vanish_break_or_are_too_large(tmp_path: Path) -> None:
    for name in ["gone.jpg", "large.jpg", "kept.jpg", "described.jpg"]:
        (tmp_path / name).write_bytes(b"12345678901"[: 11 if name == "large.jpg" else 5])
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "described.json").write_text('{"label": 1')
    found = find_photos([str(tmp_path)], max_bytes=10)
    first = [next(found)]
    (tmp_path / "gone.jpg").unlink()
    contents, problems = {}, {}
    for one in [*first, *found]:
        try:
            assert isinstance(one, Photo)
            contents[one.id] = one.load()
        except (AssertionError, ImageTooLarge, OSError, ValueError) as error:
            problems[Path(one.source).name] = one.reason if isinstance(one, Problem) else str(error)
    assert list(contents) == ["kept.jpg"]
    assert problems["gone.jpg"]
    assert "limit of 10 bytes" in problems["large.jpg"]
    assert problems["link.jpg"] == "No such file or directory"
    assert problems["described.jpg"].startswith("described.json: not JSON")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_listed(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    assert taken(tmp_path)[1] == {str(tmp_path / "locked"): "Permission denied"}


def test_a_name_that_is_no_text_still_has_a_source(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"x")
    (found,) = find_photos([str(tmp_path)])
    assert found.source == f"{tmp_path.as_uri()}/%FF.jpg"
    assert not found.id.isprintable()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_says_what_is_known_of_its_members_and_what_it_holds_in_memory(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tar" if mode == "w" else "x.tar.gz")
    with tarfile.open(path, mode) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.mtime = 5, 1_700_000_000
        tar.addfile(info, io.BytesIO(b"12345"))
    (found,) = find_photos([str(path)])
    assert isinstance(found, Photo)
    assert found.stamp == {"bytes": 5, "modified": "2023-11-14T22:13:20+00:00"}
    assert found.held_bytes == (0 if mode == "w" else 5)  # a plain one is read by position


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_with_metadata(tmp_path: Path, mode: str) -> None:
    path = write_tar(tmp_path / ("x.tar" if mode == "w" else "x.tar.gz"), MEMBERS, mode)
    contents, problems = taken(path)
    assert contents == {"a.jpg": (b"A", {"label": 1}), "deep/b.png": (b"B", {})}
    assert not problems
    (found, _) = find_photos([str(path)])
    assert found.source == f"tar://a.jpg::{path}"
    with fsspec.open(found.source) as file:
        assert file.read() == b"A"
    assert list(taken(tmp_path)[0]) == [f"{path.name}/a.jpg", f"{path.name}/deep/b.png"]


def test_a_plain_tar_is_not_read_before_it_is_asked_for(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", ((f"{index}.jpg", bytes(2**20)) for index in range(20)))
    tracemalloc.start()
    found = list(find_photos([str(path)]))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(found[3].load().data) == 2**20


def test_a_tar_that_means_harm_unpacks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "evil.tar"
    names = ["../../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg", "./fine.jpg", "./._fine.jpg"]
    write_tar(path, [(name, b"x") for name in names])
    with tarfile.open(path, "a") as tar:
        for name, kind in [("link.jpg", tarfile.SYMTYPE), ("dev.jpg", tarfile.CHRTYPE), ("hard.jpg", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    contents, problems = taken(path)
    assert list(contents) == ["fine.jpg"]
    assert sorted(problems.values()) == ["not a plain file"] * 3 + ["the name points outside the archive"] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["evil.tar"]


def test_members_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    for mode, name in [("w", "x.tar"), ("w:gz", "x.tgz")]:
        path = write_tar(tmp_path / name, [("a.jpg", bytes(11)), ("b.jpg", b"B")], mode)
        contents, problems = taken(path, max_bytes=10)
        assert list(contents) == ["b.jpg"]
        assert problems == {f"tar://a.jpg::{path}": "has 11 bytes; the limit is 10"}


def test_metadata_of_a_member_has_a_limit_of_its_own(tmp_path: Path) -> None:
    large = b'{"text": "' + b"x" * MAX_SIDECAR_BYTES + b'"}'
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A"), ("a.json", large)])
    contents, problems = taken(path)
    assert contents == {"a.jpg": (b"A", {})}
    assert problems == {f"tar://a.json::{path}": f"has {len(large)} bytes; the limit is {MAX_SIDECAR_BYTES}"}


def test_metadata_apart_from_its_photo_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A"), ("b.jpg", b"B"), ("a.json", b"{}"), ("b.json", b"[1]")])
    contents, problems = taken(path)
    assert set(contents) == {"a.jpg", "b.jpg"}
    assert all("must be adjacent" in reason for reason in problems.values())
    assert len(problems) == 2
    beside = write_tar(tmp_path / "y.tar", [("b.jpg", b"B"), ("b.json", b"[1]")])
    assert taken(beside)[1] == {f"tar://b.jpg::{beside}": "b.json: not a JSON object"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.99])
def test_a_cut_tar_gives_what_comes_before(tmp_path: Path, mode: str, share: float) -> None:
    members = {f"{index}.jpg": os.urandom(4000) for index in range(10)}
    whole = write_tar(tmp_path / "whole", members.items(), mode).read_bytes()
    end = len(whole) if mode == "w:gz" else 10 * (512 + 4096)
    path = tmp_path / ("x.tar" if mode == "w" else "x.tar.gz")
    path.write_bytes(whole[: int(end * share)])
    contents, problems = taken(path)
    assert int(10 * share) - 1 <= len(contents) < 10
    assert all(content.data == members[name] for name, content in contents.items())
    assert "truncated" in problems[str(path)]


def test_a_tar_with_a_damaged_header_does_not_end_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", ((f"{index}.jpg", bytes(512)) for index in range(4)))
    data = bytearray(path.read_bytes())
    data[2048:2060] = b"\xff" * 12
    path.write_bytes(data)
    contents, problems = taken(path)
    assert len(contents) == 2
    assert "no end mark" in problems[str(path)]
    (tmp_path / "none.tar").write_bytes(b"this is no tar at all")
    assert "damaged" in taken(tmp_path / "none.tar")[1][str(tmp_path / "none.tar")]


def write_table(path: Path, columns: dict[str, object], group: int = 3) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_parquet_as_hugging_face_writes_it(tmp_path: Path) -> None:
    images = [{"bytes": f"{row}".encode(), "path": f"{row}.jpg"} for row in range(50)]
    path = write_table(
        tmp_path / "train.parquet",
        {
            "image": images,
            "label": list(range(50)),
            "when": [datetime.date(2026, 1, 1)] * 50,
            "score": [float("nan")] * 50,
            "mask": [b"x"] * 50,
        },
        group=20,
    )
    with no_file_left_open():
        contents, problems = taken(path)
    assert not problems
    assert contents["train.parquet#7"] == (b"7", {"path": "7.jpg", "label": 7, "when": "2026-01-01"})
    assert [content.data for content in contents.values()] == [f"{row}".encode() for row in range(50)]


def test_parquet_rows_can_be_had_in_any_order(tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.parquet", {"photo": [bytes([row]) for row in range(200)]}, group=90)
    found = list(find_photos([str(path)]))
    for row in [150, 3, 199, 0, 89, 1, 90, 91, 2]:  # 1: asked for too late, in the row group that is being read
        assert found[row].load().data == bytes([row])


def test_a_row_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.parquet", {"image": [bytes(11), bytes(10)]})
    contents, problems = taken(path, max_bytes=10)
    assert list(contents) == ["x.parquet#1"]
    assert problems == {f"{path}#0": "the image has 11 bytes; the limit is 10"}


def test_parquet_nulls_and_columns(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "x.parquet",
        {"image": [b"A", None, b"C"], "other": [b"1", b"2", b"3"], "brand": ["x", None, "z"], "n": [1, 2, 3]},
    )
    contents, problems = taken(path)
    assert contents == {
        "x.parquet#0": (b"A", {"brand": "x", "n": 1}),
        "x.parquet#2": (b"C", {"brand": "z", "n": 3}),
    }
    assert problems == {f"{path}#1": "the row has no image"}
    assert taken(path, image_column="other")[0]["x.parquet#1"].data == b"2"
    for wanted, said in [("none", "the columns are image, other, brand, n"), ("n", "neither images nor addresses")]:
        assert said in taken(path, image_column=wanted)[1][str(path)]
    ambiguous = write_table(tmp_path / "y.parquet", {"a": [b"A"], "b": [b"B"]})
    assert "--image-column" in taken(ambiguous)[1][str(ambiguous)]
    empty = write_table(tmp_path / "z.parquet", {"n": [1]})
    assert "no image column" in taken(empty)[1][str(empty)]


def test_parquet_of_paths(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"A")
    fsspec.filesystem("memory").pipe("/paths/b.jpg", b"B")
    path = write_table(
        tmp_path / "x.parquet", {"path": ["a.jpg", "memory://paths/b.jpg", None, "none.jpg"], "n": [1, 2, 3, 4]}
    )
    contents, problems = taken(path, allowed=Allowed(outside=True))
    assert contents == {"a.jpg": (b"A", {"n": 1}), "memory://paths/b.jpg": (b"B", {"n": 2})}
    assert problems == {f"{path}#2": "the row has no address", "none.jpg": "No such file or directory"}


def test_a_damaged_parquet_is_listed(tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.parquet", {"image": [os.urandom(2000) for _ in range(9)]})
    whole = path.read_bytes()
    (tmp_path / "y.parquet").write_bytes(whole[:500])
    assert "cannot be read" in taken(tmp_path / "y.parquet")[1][str(tmp_path / "y.parquet")]
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    contents, problems = taken(path)
    assert problems
    assert len(contents) < 9


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "x.parquet", {"image": [b"A"]})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install pyarrow"):
        list(find_photos([str(path)]))


def test_lists(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a b.jpg").write_bytes(b"A")
    fsspec.filesystem("memory").pipe("/lists/c.jpg", b"C")
    absolute = str(tmp_path / "photos" / "a b.jpg")
    (tmp_path / "list.txt").write_text(f"photos/a b.jpg\n\n{absolute}\nmemory://lists/c.jpg\nphotos/none.jpg\n")
    outside = Allowed(outside=True)
    contents, problems = taken(tmp_path / "list.txt", allowed=outside)
    assert contents == {"photos/a b.jpg": (b"A", {}), absolute: (b"A", {}), "memory://lists/c.jpg": (b"C", {})}
    assert problems == {"photos/none.jpg": "No such file or directory"}
    lines = [
        {"image": "photos/a b.jpg", "id": "one", "brand": "x", "n": 0, "metadata": {"n": 1}},  # the inner one wins
        {"url": "memory://lists/none.jpg"},
        {"brand": "x"},
        {"image": "photos/a b.jpg", "id": 7.5},
        [1],
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "list.jsonl").write_text(f"{text}\n{{broken\n")
    contents, problems = taken(tmp_path / "list.jsonl", allowed=outside)
    assert contents == {"one": (b"A", {"brand": "x", "n": 1})}
    where = f"{tmp_path / 'list.jsonl'}:"
    assert {source.removeprefix(where): reason for source, reason in problems.items()} == {
        "memory:///lists/none.jpg": "/lists/none.jpg: no such file or folder",
        "3": problems[f"{where}3"],
        "4": "the id 7.5 is not a string or an integer",
        "5": "the line: not a JSON object",
        "6": problems[f"{where}6"],
    }
    assert "not JSON" in problems[f"{where}6"]
    assert problems[f"{where}3"].startswith("the line has no address of an image: add one of image, uri, url, path")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lists_as_other_programs_write_them(tmp_path: Path, encoding: str, ending: str) -> None:
    for name in ("ä.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    texts = {
        "list.txt": ["ä.jpg", "b.jpg"],
        "metadata.jsonl": ['{"file_name": "ä.jpg", "id": 7, "source": "flickr"}', '{"file_name": "b.jpg"}'],
        "list.csv": ["id,file_name,brand", '7,ä.jpg,"Arla, Sweden"', ",b.jpg,"],
        "excel.csv": ["id;file_name;brand", '7;ä.jpg;"Arla, Sweden"', ";b.jpg;"],
        "list.tsv": ["file_name\tid\tbrand", "ä.jpg\t7\tArla, Sweden", "b.jpg"],
    }
    for name, lines in texts.items():
        (tmp_path / name).write_bytes((ending.join(lines) + ending).encode(encoding))
    read = {name: taken(tmp_path / name) for name in texts}
    assert not [problems for _, problems in read.values() if problems]
    contents = {name: found for name, (found, _) in read.items()}
    a, b = "ä.jpg".encode(), b"b.jpg"
    assert contents["list.txt"] == {"ä.jpg": (a, {}), "b.jpg": (b, {})}
    assert contents["metadata.jsonl"] == {"7": (a, {"source": "flickr"}), "b.jpg": (b, {})}
    for name in ("list.csv", "excel.csv", "list.tsv"):
        assert contents[name] == {"7": (a, {"brand": "Arla, Sweden"}), "b.jpg": (b, {})}, name
    assert taken(tmp_path / "list.csv", image_column="brand")[1].keys() == {"Arla, Sweden", f"{tmp_path}/list.csv:3"}


def test_a_table_without_a_column_of_images_and_lines_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a.jpg,1\nb.jpg,2\n")
    assert "no image column among a.jpg, 1; its first row" in taken(tmp_path / "a.csv")[1][str(tmp_path / "a.csv")]
    (tmp_path / "empty.csv").write_bytes(b"")
    assert "among no columns" in taken(tmp_path / "empty.csv")[1][str(tmp_path / "empty.csv")]
    (tmp_path / "a.txt").write_bytes(b"\xff.jpg\nb.jpg\n")
    (tmp_path / "b.jpg").write_bytes(b"B")
    assert taken(tmp_path / "a.txt") == ({"b.jpg": (b"B", {})}, {f"{tmp_path}/a.txt:1": "the line is not UTF-8"})
    (tmp_path / "cut.txt").write_bytes(b"\xff\xfea\0b")
    assert taken(tmp_path / "cut.txt")[1]


@pytest.mark.parametrize(
    ("name", "said"),
    [("x.zip", "unpack it"), ("x.json", r"must be a \.jsonl file"), ("x.xlsx", r"\.csv"), ("x.pdf", "not an image")],
)
def test_kinds_of_sources_that_are_not_read_are_named_at_once(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"[]")
    with pytest.raises(ValueError, match=rf"a \.{name[2:]} file cannot be indexed; .*{said}.*A source is a folder"):
        find_photos([str(tmp_path / name)])
    (tmp_path / name).write_bytes(photo())  # the content decides
    assert list(taken(tmp_path / name)[0]) == [name]


class Listed:
    """A file system that reports the same file information as an object store."""

    protocol = "s3"
    rows = (
        {"name": "bucket/shelf/", "size": 0, "type": "directory"},  # the folder itself
        {"name": "bucket/shelf/a.jpg", "size": 5, "type": "file", "ETag": '"e1"', "LastModified": AN_HOUR_EAST},
        {"name": "bucket/shelf/.b.jpg", "size": 5, "type": "file"},
    )

    def ls(self, folder: str, detail: bool) -> list[dict[str, object]]:
        return list(self.rows)

    def unstrip_protocol(self, path: str) -> str:
        return f"s3://{path}"


def test_a_listing_of_an_object_store() -> None:
    hidden, entry = Remote(Listed()).listing("bucket/shelf")  # type: ignore[arg-type]
    assert isinstance(entry, Entry)
    assert isinstance(hidden, Entry)
    assert (entry.ignored, hidden.ignored) == (None, "hidden")
    assert (entry.path, entry.name, entry.is_folder) == ("bucket/shelf/a.jpg", "a.jpg", False)
    assert entry.stamp == {"bytes": 5, "modified": "2026-01-01T11:00:00+00:00", "etag": '"e1"'}


def test_a_file_of_unknown_size_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(bytes(10))
    (tmp_path / "b.jpg").write_bytes(bytes(11))
    place, path = find_place(str(tmp_path / "a.jpg"))
    assert File(place, path, "a.jpg").read(10) == bytes(10)
    with pytest.raises(ImageTooLarge):
        File(place, str(tmp_path / "b.jpg"), "b.jpg").read(10)


def test_links_to_folders_are_followed_but_loops_are_not(tmp_path: Path) -> None:
    for name in ("photos/a.jpg", "elsewhere/b.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"A")
    (tmp_path / "photos" / "round.jpg").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    account = Account()
    assert list(taken(tmp_path / "photos", account=account)[0]) == ["a.jpg", "linked/b.jpg"]
    assert account.ignored == {"links to a folder above": 2}


def test_members_of_a_tar_follow_the_rule_of_folders(tmp_path: Path) -> None:
    image = photo()
    names = ["a.jfif", "b", "v1.2/c.jpg", "d.txt", "e.dng", "._f.jpg", ".x/g.jpg"]
    members = [*((name, image) for name in names), ("h", b"no image"), ("a.json", b"{}"), ("a.png", image)]
    for mode, name in (("w", "x.tar"), ("w:gz", "x.tgz")):
        account = Account()
        contents, problems = taken(write_tar(tmp_path / name, members, mode), account=account)
        assert list(contents) == ["a.jfif", "b", "v1.2/c.jpg", "a.png"]
        assert not problems
        assert account.ignored == {".txt": 1, ".dng": 1, "hidden": 2, "without suffix": 1, ".json": 1}
        assert account.archives == 1


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_dots_in_the_names_of_members(tmp_path: Path, mode: str) -> None:
    """`img` is the key of all members in WebDataset, but each image keeps its own metadata."""
    members: list[tuple[str, bytes]] = []
    for n in range(200):
        members += [(f"img.{n:04}.jpg", b"A"), (f"img.{n:04}.json", json.dumps({"n": n}).encode())]
    members += [("b.depth.png", b"D"), ("b.jpg", b"B"), ("b.json", b'{"n": 7}')]
    contents, problems = taken(write_tar(tmp_path / ("x.tar" if mode == "w" else "x.tgz"), members, mode))
    assert not problems
    assert [content.metadata["n"] for content in contents.values()] == [*range(200), 7, 7]


def test_metadata_files_of_hugging_face_describe_the_images_of_their_folder(tmp_path: Path) -> None:
    for name in ("a.jpg", "train/b.jpg", "train/deep/c.jpg", "test/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"A")
    lines = [{"file_name": "train/b.jpg", "text": "outer", "n": 1}, {"file_name": "./a.jpg", "id": 7, "text": "a"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n{torn\n")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\nb.jpg,inner\ndeep/c.jpg,c\nnone.jpg,x\n")
    (tmp_path / "a.json").write_text('{"text": "its own"}')
    account = Account()
    contents, problems = taken(tmp_path, account=account)
    assert {name: content.metadata for name, content in contents.items()} == {
        "a.jpg": {"id": "7", "text": "its own"},
        "test/d.jpg": {},
        "train/b.jpg": {"text": "inner"},
        "train/deep/c.jpg": {"text": "c"},
    }
    assert list(problems) == [f"{tmp_path}/metadata.jsonl:3"]
    assert account.ignored == {".jsonl": 1, ".csv": 1, ".json": 1}
    for name, text in (("metadata.csv", "image_id,n\n7,1\n"), ("metadata.jsonl", '{"image_id": 7}\n')):
        (tmp_path / "test" / name).write_text(text)  # of another kind
    assert taken(tmp_path / "test") == ({"d.jpg": (b"A", {})}, {})


def test_names_of_folders_as_metadata(tmp_path: Path) -> None:
    for name in ("top.jpg", "arla/milk/a.jpg", "arla/b.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"A")
    (tmp_path / "photos" / "arla" / "b.json").write_text('{"brand": "none", "n": 1}')
    write_tar(tmp_path / "photos" / "x.tar", [("cats/c.jpg", b"C")])
    (tmp_path / "list.txt").write_text("photos/arla/b.jpg\n")
    contents = taken(tmp_path / "photos", folders_as=("brand", "kind"))[0]
    assert {name: content.metadata for name, content in contents.items()} == {
        "arla/b.jpg": {"brand": "arla", "n": 1},
        "arla/milk/a.jpg": {"brand": "arla", "kind": "milk"},
        "top.jpg": {},
        "x.tar/cats/c.jpg": {"brand": "x.tar", "kind": "cats"},
    }
    assert taken(tmp_path / "list.txt", folders_as=("brand",))[0]["photos/arla/b.jpg"].metadata == {}
    assert taken(tmp_path / "photos" / "x.tar", folders_as=("brand",))[0]["cats/c.jpg"].metadata == {"brand": "cats"}


def test_places_behind_fsspec(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/shelf/a.jpg": b"A", "/shelf/deep/b.jpg": b"B", "/shelf/a.json": b'{"n": 1}', "/shelf/.x.jpg": b""})
    write_tar(tmp_path / "x.tar", MEMBERS)
    memory.pipe("/shelf/x.tar", (tmp_path / "x.tar").read_bytes())
    contents, problems = taken("memory://shelf")
    assert contents == {
        "a.jpg": (b"A", {"n": 1}),
        "deep/b.jpg": (b"B", {}),
        "x.tar/a.jpg": (b"A", {"label": 1}),
        "x.tar/deep/b.png": (b"B", {}),
    }
    assert not problems
    sources = [one.source for one in find_photos(["memory://shelf"])]
    assert sources[0] == "memory:///shelf/a.jpg"
    assert sources[2] == "tar://a.jpg::memory:///shelf/x.tar"
    (tmp_path / "a.jpg").write_bytes(b"A")
    assert list(taken((tmp_path / "a.jpg").as_uri())[0]) == ["a.jpg"]


def test_a_photo_at_an_address(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo())
    fsspec.filesystem("memory").pipe("/one/b.jpg", b"B")
    assert read_photo(str(tmp_path / "a.jpg")) == photo()
    assert read_photo("memory://one/b.jpg") == b"B"
    with pytest.raises(OSError, match="no such file"):
        read_photo("memory://one/none.jpg")
    with pytest.raises(ImageTooLarge):
        read_photo(str(tmp_path / "a.jpg"), max_bytes=3)
    with pytest.raises(OSError, match="refused"):
        read_photo("http://127.0.0.1:1/a.jpg")


def test_photos_on_the_web(tmp_path: Path) -> None:
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    (tmp_path / "a.jpg").write_bytes(b"A" * 20)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}"
        contents, problems = taken(f"{base}/a.jpg", f"{base}/none.jpg")
        large = taken(f"{base}/a.jpg", max_bytes=10)[1]
        server.shutdown()
        thread.join()
    assert contents == {f"{base}/a.jpg": (b"A" * 20, {})}
    assert problems == {f"{base}/none.jpg": "HTTP 404"}
    assert "limit of 10 bytes" in large[f"{base}/a.jpg"]
