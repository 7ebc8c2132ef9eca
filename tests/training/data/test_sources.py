"""Sources: folders, tar shards on disk and behind URLs, Hugging Face datasets; cut, changed, damaged and odd ones."""

import gzip
import hashlib
import io
import os
import re
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import httpx
import numpy as np
import pytest
from PIL import Image

import training.data.blobs
import training.data.shards
from training.data.batches import Reading, shuffled
from training.data.blobs import Changed, LocalBlob, open_blob
from training.data.dataset import Photo, Subset, find_images, split_source
from training.data.joined import JoinedSource
from training.data.loader import open_loader
from training.data.shards import index_shard
from training.data.sources import FolderSource, HuggingFaceSource, TarSource, expand_braces, open_source, source_digest


def png(value, size=(6, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(file, "png")
    return file.getvalue()


def write_tar(file, members, **options):
    """`members`: names with contents; a str is the target of a link, None a folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type = tarfile.DIRTYPE if content is None else tarfile.SYMTYPE
                member.linkname = content or ""
                tar.addfile(member)
    return file


def samples(first, n, folder=""):
    return [(f"{folder}{i:04}.png", png(i)) for i in range(first, first + n)]


def values(source):
    """Which images of `png` a source holds."""
    pixels = [Photo(source, i).read()[0, 0].astype(int) for i in range(len(source))]
    return [red + 256 * green for red, green, _ in pixels]


def names(source):
    return [source.name(i) for i in range(len(source))]


def labels(source):
    found = [source.label(i) for i in range(len(source))]
    if not isinstance(source, FolderSource):  # of which some labels are no classes
        classes = source.classes()
        assert [classes.names[number] if number >= 0 else None for number in classes.numbers] == found
    return found


@pytest.fixture
def index_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("index")


# Folders


def test_a_folder_of_images(tmp_path, index_dir):
    for name in ("cats/ä ö.png", "cats/deep/1.png", "dogs/日本.png", "top.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(len(name)))
    source = open_source(tmp_path, index_dir)
    assert isinstance(source, FolderSource)
    assert names(source) == ["cats/deep/1.png", "cats/ä ö.png", "dogs/日本.png", "top.png"]
    assert labels(source) == ["deep", "cats", "dogs", tmp_path.name]
    assert [Photo(source, i).read().shape for i in range(4)] == [(4, 6, 3)] * 4
    assert source.fingerprint(0) == str(len(png(15)))
    before, neighbour = source.version(0), source.version(1)
    os.utime(tmp_path / "cats/deep/1.png", ns=(0, 1))
    assert source.version(0) != before
    assert Subset(source, np.array([1])).version(0) == source.version(1) == neighbour


def test_a_name_that_is_no_text_can_be_logged(tmp_path, index_dir):
    with open(os.fsencode(tmp_path) + b"/a\xff.png", "wb") as file:
        file.write(png(1))
    source = open_source(tmp_path, index_dir)
    assert source.name(0) == "a\\xff.png"
    assert values(source) == [1]


def test_a_digest_of_contents_is_that_of_the_folder(tmp_path, index_dir):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(3):
            (tmp_path / part / "a" / f"{i}.png").write_bytes(png(i))
    train, val = split_source(open_source(tmp_path, index_dir), 0.5, seed=0)
    assert names(val) == ["val/a/0.png", "val/a/1.png", "val/a/2.png"]
    before = source_digest(train, contents=True), source_digest(train, contents=False)
    contents = hashlib.sha256()
    for path in find_images(tmp_path / "train"):
        contents.update(path.relative_to(tmp_path).as_posix().encode() + b"\0")
        contents.update(hashlib.sha256(path.read_bytes()).digest())
    assert before[0] == contents.hexdigest()
    same_size = png(1)[:-1] + b"x"
    (tmp_path / "train" / "a" / "1.png").write_bytes(same_size)
    assert source_digest(train, contents=True) != before[0]
    assert source_digest(train, contents=False) == before[1]  # as its docstring says
    (tmp_path / "train" / "a" / "1.png").write_bytes(same_size + b"y")
    assert source_digest(train, contents=False) != before[1]


def test_an_empty_part_is_an_error(tmp_path, index_dir):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "1.png").write_bytes(png(1))
    with pytest.raises(ValueError, match=re.escape(f"no images below {tmp_path / 'val'}")):
        open_source(tmp_path, index_dir)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("empty", "nothing to train on in .*empty: it has no images .* tar shards .* Hugging Face .*; it is empty"),
        ("missing", "missing does not exist; data must be a folder, a .tar or a URL"),
        ("a-{0..2}.tar", r"a-1\.tar does not exist"),
        ("none-*.tar", r"none-\*\.tar does not exist"),
        ("notes.txt", r"notes\.txt is not a tar; data must be a folder of images"),
        ("photos.zip", r"photos\.zip is not a tar; unpack it first; data must be a folder of images"),
        ("lists", r"nothing to train on in .*; it contains other files \(2 \.txt, 1 hidden, 1 without suffix\)"),
        ("text.tar", r"no images in .*; text\.tar: not a tar, or damaged, or truncated"),
        ("zero.tar", r"no images in .*; zero\.tar: not a tar, or damaged, or truncated: empty file"),
        ("noimages.tar", r"no images in .*noimages\.tar; it contains other files \(1 \.json\)"),
        ("a-{3..1}.tar", r"\{3\.\.1\} must count up"),
        ("bogus://x/y.tar", "bogus"),
        ("http://[::/a.tar", "Invalid"),
        ("http://127.0.0.1:1/folder/", r"over HTTP, name the shards: \.\.\./name\.tar or \.\.\./name-\{000\.\.123\}"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, index_dir, spec, words):
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "a-0.tar", samples(0, 1))
    (tmp_path / "lists").mkdir()
    for name in ("notes.txt", "photos.zip", "lists/a.txt", "lists/b.txt", "lists/c", "lists/.d"):
        (tmp_path / name).write_text("hello")
    (tmp_path / "text.tar").write_text("hello " * 1000)
    (tmp_path / "zero.tar").write_bytes(b"")
    write_tar(tmp_path / "noimages.tar", [("a.json", b"{}")])
    with pytest.raises(ValueError, match=words):
        open_source(spec if "://" in spec else tmp_path / spec, index_dir)


# Tar shards


def test_members_of_a_tar_with_labels_by_the_rules_of_webdataset(tmp_path, index_dir):
    long = "x" * 150 + "/ü ñ/" + "y" * 90
    tar = write_tar(
        tmp_path / "one.tar",
        [
            ("./cats/1.png", png(1)),
            ("./cats/1.cls", b"7\n"),
            ("cats", None),
            ("cats/2.cls", b" tabby "),
            ("cats/2.left.PNG", png(2)),
            ("cats/2.right.png", png(3)),
            ("cats/2.json", b"{}"),
            ("cats/3.png", png(4)),
            ("4.png", png(5)),
            ("link.png", "cats/1.png"),
            (f"{long}.png", png(6)),
        ],
    )
    source = open_source(tar, index_dir)
    assert isinstance(source, TarSource)
    assert names(source) == [
        f"one.tar/{name}" for name in ("cats/1.png", "cats/2.left.PNG", "cats/2.right.png", "cats/3.png", "4.png")
    ] + [f"one.tar/{long}.png"]
    assert values(source) == [1, 2, 3, 4, 5, 6]
    assert labels(source) == ["7", "tabby", "tabby", "cats", None, "ü ñ"]
    assert [(s.name, "link" in s.reason) for s in source.skipped] == [("one.tar/link.png", True)]
    assert source.fingerprint(0) == str(len(png(1)))
    os.utime(tar, ns=(0, 1))
    assert open_source(tar, index_dir).version(0) != source.version(0)
    assert JoinedSource([source, source]).version(6) == source.version(0)


def test_dots_in_the_names_of_members_do_not_mix_labels_and_the_suffix_may_have_any_case(tmp_path, index_dir):
    members = []
    for i in range(3):
        members += [(f"img.{i:04}.left.png", png(i)), (f"img.{i:04}.CLS" if i else "img.0000.cls", str(i).encode())]
    members += [("v1.5/a.png", png(3)), ("v1.5/a.Cls", b"seven"), ("img.0009.png", png(4)), ("b.png", png(5))]
    source = open_source(write_tar(tmp_path / "a.tar", members), index_dir)
    assert dict(zip(values(source), labels(source), strict=True)) == {
        0: "0",
        1: "1",
        2: "2",
        3: "seven",
        4: None,
        5: None,
    }
    with_key = open_source(write_tar(tmp_path / "b.tar", [*members, ("img.cls", b"any")]), index_dir)
    assert labels(with_key) == ["0", "1", "2", "seven", "any", None]


def test_members_follow_the_rule_of_folders(tmp_path, index_dir):
    members = [(name, png(i)) for i, name in enumerate(["a.jfif", "b", "c.heic", "._d.png", "x/.y/e.png", "f.txt"])]
    source = open_source(write_tar(tmp_path / "a.tar", [*members, ("g", b"no image")]), index_dir)
    assert names(source) == ["a.tar/a.jfif", "a.tar/b", "a.tar/c.heic"]
    assert source.ignored == {"hidden": 2, ".txt": 1, "without suffix": 1}
    assert open_source(tmp_path / "a.tar", index_dir).ignored == source.ignored  # from the stored index


def test_members_whose_names_lead_out_of_the_tar_are_listed_and_not_used(tmp_path, index_dir):
    members = [
        ("a.png", png(0)),
        ("../../b.png", png(1)),
        ("/c.png", png(2)),
        ("d/../a.png", png(3)),
        ("../n.txt", b""),
    ]
    source = open_source(write_tar(tmp_path / "a.tar", members), index_dir)
    assert names(source) == ["a.tar/a.png", "a.tar/c.png"]
    assert values(source) == [0, 2]
    assert [one.name for one in source.skipped] == ["a.tar/../../b.png", "a.tar/d/../a.png"]
    assert all("leads out of its folder" in one.reason for one in source.skipped)
    assert source.ignored == {".txt": 1}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_gives_what_tarfile_gives(tmp_path, index_dir, form):
    members = [(f"{'d' * 60}/{i}/{'f' * 60}{i}.png", png(i)) for i in range(5)]
    tar = write_tar(tmp_path / "a.tar", members, format=form)
    assert values(open_source(tar, index_dir)) == list(range(5))


@pytest.mark.parametrize("spec", ["", "s-{000..002}.tar", "s-*.tar", "s-{000,001,002}.tar"])
def test_shards_by_folder_and_by_pattern(tmp_path, index_dir, spec):
    for number in range(3):
        write_tar(tmp_path / "shards" / f"s-00{number}.tar", samples(10 * number, 4))
    (tmp_path / "shards" / "._s-000.tar").write_text("of macOS")
    (tmp_path / "shards" / "README.md").write_text("no shard")
    source = open_source(tmp_path / "shards" / spec, index_dir)
    assert values(source) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert source.ignored == ({} if spec else {"hidden": 1, ".md": 1})
    assert source.name(5) == "s-001.tar/0011.png"
    with pytest.raises(IndexError):
        source.name(12)


def test_braces():
    assert expand_braces("a-{08..11}{x,y}.tar") == [f"a-{n}{c}.tar" for n in ("08", "09", "10", "11") for c in "xy"]
    assert expand_braces("{9..10}") == ["9", "10"]
    assert expand_braces("plain") == ["plain"]
    with pytest.raises(ValueError, match="at most 1000000"):
        expand_braces("{0..99999999999}")


def test_parts_by_the_names_of_shards_and_by_folders_in_them(tmp_path, index_dir):
    for name, first in (("in-train-0.tar", 0), ("in-train-1.tar", 10), ("in-val-0.tar", 20)):
        write_tar(tmp_path / "a" / name, samples(first, 2))
    train, val = split_source(open_source(tmp_path / "a", index_dir), 0.5, seed=0)
    assert (values(train), values(val)) == ([0, 1, 10, 11], [20, 21])
    tar = write_tar(tmp_path / "b.tar", samples(0, 3, "set/train/x/") + samples(5, 2, "set/val/x/"))
    train, val = split_source(open_source(tar, index_dir), 0.5, seed=0)
    assert (values(train), values(val)) == ([0, 1, 2], [5, 6])
    for held_out in ("Validation", "valid", "test"):
        for name, first in (("test-set-TRAIN-0.tar", 0), (f"test-set-{held_out}-0.tar", 20)):
            write_tar(tmp_path / held_out / name, samples(first, 2))
        train, val = split_source(open_source(tmp_path / held_out, index_dir), 0.5, seed=0)
        assert (values(train), values(val)) == ([0, 1], [20, 21])
        tar = write_tar(tmp_path / "d.tar", samples(0, 3, "set/Train/x/") + samples(5, 2, f"set/{held_out}/x/"))
        train, val = split_source(open_source(tar, index_dir), 0.5, seed=0)
        assert (values(train), values(val)) == ([0, 1, 2], [5, 6])
    tar = write_tar(tmp_path / "c.tar", samples(0, 8, "set/train/x/"))
    train, val = split_source(open_source(tar, index_dir), 0.25, seed=0)
    assert (len(train), len(val)) == (6, 2)


def test_an_index_is_kept_and_made_anew_when_the_shard_changes(tmp_path, index_dir, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", samples(0, 3))
    made = []
    monkeypatch.setattr(
        training.data.shards, "index_shard", lambda blob, shard: made.append(shard) or index_shard(blob, shard)
    )
    first = open_source(tar, index_dir)
    again = open_source(tar, index_dir)
    assert made == ["a.tar"]
    assert (names(again), labels(again), values(again)) == (names(first), labels(first), values(first))
    write_tar(tar, samples(5, 2))
    assert values(open_source(tar, index_dir)) == [5, 6]
    (kept,) = index_dir.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])  # as a full disk leaves it
    assert values(open_source(tar, index_dir)) == [5, 6]
    assert len(made) == 3
    assert [path.name for path in index_dir.iterdir()] == [kept.name]


def test_a_shard_that_changes_while_a_run_reads_it_stops_the_run(tmp_path, index_dir):
    tar = write_tar(tmp_path / "a.tar", samples(0, 30))
    source = open_source(tar, index_dir)
    write_tar(tar, samples(100, 31))
    with pytest.raises(Changed, match=r"a\.tar has changed since it was opened"):
        source.encoded(0)
    with open_loader(source, 8, shuffled(4, 0), cache_bytes=0) as loader, pytest.raises(Changed):
        loader.batch(0)


@pytest.mark.parametrize("cut", [0.5, 0.87])
def test_a_cut_shard_gives_what_is_whole_and_lists_the_rest(tmp_path, index_dir, cut):
    members = [(f"{i:04}.png", png(i) + bytes(700)) for i in range(20)]
    data = write_tar(tmp_path / "whole.tar", members).read_bytes()
    n_whole = 0
    with tarfile.open(tmp_path / "whole.tar") as tar:
        end = int(cut * tar.getmembers()[-1].offset_data)
        n_whole = sum(m.offset_data + m.size <= end for m in tar.getmembers())
    (tmp_path / "cut.tar").write_bytes(data[:end])
    write_tar(tmp_path / "next.tar", samples(50, 2))
    (tmp_path / "text.tar").write_text("an error page of some server" * 100)
    source = open_source(str(tmp_path / "{cut,text,next}.tar"), index_dir)
    assert values(source) == [*range(n_whole), 50, 51]
    assert all("truncated" in s.reason for s in source.skipped)
    assert [s.name for s in source.skipped if "/" not in s.name] == ["cut.tar", "text.tar"]


def test_a_shard_cut_between_members_and_one_damaged_inside_are_told(tmp_path, index_dir):
    data = bytearray(write_tar(tmp_path / "a.tar", samples(0, 5)).read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        third = tar.getmembers()[3].offset
    (tmp_path / "cut.tar").write_bytes(data[:third])
    data[third : third + 512] = b"x" * 512
    (tmp_path / "hurt.tar").write_bytes(data)
    cut, hurt = open_source(tmp_path / "cut.tar", index_dir), open_source(tmp_path / "hurt.tar", index_dir)
    assert values(cut) == values(hurt) == [0, 1, 2]
    assert [s.reason for s in cut.skipped] == ["the zeros at the end of the tar are missing, so it may be truncated"]
    assert [s.reason for s in hurt.skipped] == [f"damaged at byte {third} of {len(data)}; the rest cannot be read"]


def test_a_header_that_claims_a_giant_name_is_not_read(tmp_path, index_dir):
    whole = write_tar(tmp_path / "a.tar", samples(0, 1)).read_bytes()[:1024]
    bomb = tarfile.TarInfo("././@LongLink")
    bomb.type, bomb.size = tarfile.GNUTYPE_LONGNAME, 2**33
    (tmp_path / "a.tar").write_bytes(whole + bomb.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    source = open_source(tmp_path / "a.tar", index_dir)
    assert values(source) == [0]
    assert "a header of 8589934592 bytes" in source.skipped[0].reason


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")]
)
def test_a_small_compressed_tar_is_unpacked_in_memory(tmp_path, index_dir, suffix, mode, monkeypatch):
    with tarfile.open(tmp_path / f"a{suffix}", mode) as tar:
        for name, content in samples(0, 3, "cats/"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = open_source(tmp_path / f"a{suffix}", index_dir)
    assert values(source) == [0, 1, 2]
    assert labels(source) == ["cats"] * 3
    monkeypatch.setattr(training.data.shards, "MAX_UNPACKED", 2000)
    with pytest.raises(ValueError, match=r"unpacks to more than 2000 bytes; unpack it \((gunzip|bunzip2|unxz)\)"):
        open_source(tmp_path / f"a{suffix}", index_dir)
    monkeypatch.setattr(training.data.shards, "MAX_UNPACKED", 10)
    with pytest.raises(ValueError, match=r"has \d+ bytes; unpack it"):
        open_source(tmp_path / f"a{suffix}", index_dir)


def test_a_damaged_or_unknown_compressed_tar_is_refused(tmp_path, index_dir):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(9000))[:-10])
    with pytest.raises(ValueError, match=r"a\.tar\.gz cannot be unpacked"):
        open_source(tmp_path / "a.tar.gz", index_dir)
    (tmp_path / "a.tar.zst").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"unpack it \(unzstd\): a compressed tar has no random access"):
        open_source(tmp_path / "a.tar.zst", index_dir)


def test_threads_read_a_shard_at_once(tmp_path, index_dir):
    source = open_source(write_tar(tmp_path / "a.tar", samples(0, 40)), index_dir)
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(0, 40, 400).tolist()
        assert list(pool.map(source.encoded, order)) == [png(i) for i in order]


# Behind URLs


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.mark.parametrize("spec", ["memory://bucket/s-{0..1}.tar", "memory://bucket", Path("memory://bucket/s-*.tar")])
def test_shards_behind_fsspec(tmp_path, index_dir, memory, spec):
    for number in range(2):
        memory.pipe(f"/bucket/s-{number}.tar", write_tar(tmp_path / "x.tar", samples(10 * number, 3)).read_bytes())
    source = open_source(spec, index_dir)
    assert names(source) == [f"s-{n}.tar/00{n}{i}.png" for n in range(2) for i in range(3)]
    assert values(source) == [0, 1, 2, 10, 11, 12]
    assert len(list(index_dir.iterdir())) == 2


def test_a_shard_behind_fsspec_that_was_replaced_is_indexed_anew(tmp_path, index_dir, memory):
    for first in (0, 5):
        memory.pipe("/b/s.tar", write_tar(tmp_path / "x.tar", samples(first, 3)).read_bytes())
        assert values(open_source("memory://b/s.tar", index_dir)) == [first, first + 1, first + 2]
    with pytest.raises(ValueError, match=r"memory://b/none\.tar: no such file"):
        open_source("memory://b/none.tar", index_dir)
    with pytest.raises(ValueError, match="no tar shards at memory://nothing"):
        open_source("memory://nothing", index_dir)


def test_headers_of_a_remote_shard_are_read_in_few_requests(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(training.data.shards, "READ_AHEAD_REMOTE", 20_000)
    members = [(f"{i}.png", png(i) + bytes(400)) for i in range(50)] + [("big.png", png(50) + bytes(200_000))]
    memory.pipe("/b/s.tar", write_tar(tmp_path / "x.tar", [*members, ("last.png", png(51))]).read_bytes())
    blob = open_blob("memory://b/s.tar", httpx.Client())
    reads = []
    real = blob.read
    monkeypatch.setattr(blob, "read", lambda offset, length: reads.append(length) or real(offset, length))
    assert len(index_shard(blob, "s").names) == 52
    assert len(reads) <= 7
    assert sum(reads) < 130_000  # the big one was hopped over


class RangeServer(BaseHTTPRequestHandler):
    """A web server with ranges, as object stores have."""

    files: ClassVar[dict[str, bytes]] = {}
    failures: ClassVar[list[int]] = []
    etag = '"1"'

    def do_GET(self):
        if self.failures:
            self.send_response(self.failures.pop())
            self.end_headers()
            return
        data = self.files.get(self.path.partition("?")[0])
        if data is None:
            self.send_response(404)
            self.end_headers()
            return
        if self.headers.get("If-Match", self.etag) != self.etag:
            self.send_response(412)
            self.end_headers()
            return
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", self.etag)
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_shards_on_a_web_server(tmp_path, index_dir, serve, monkeypatch):
    server = type("Server", (RangeServer,), {"files": {}, "failures": []})
    for number in range(2):
        tar = write_tar(tmp_path / "x.tar", samples(10 * number, 3, "cats/"))
        server.files[f"/data/s-{number}.tar"] = tar.read_bytes()
    url = serve(server)
    source = open_source(f"{url}/data/s-{{0..1}}.tar?token=secret", index_dir)
    assert names(source) == [f"s-{n}.tar/cats/00{n}{i}.png" for n in range(2) for i in range(3)]
    assert labels(source) == ["cats"] * 6
    assert sorted(path.name.rpartition("-")[0] for path in index_dir.iterdir()) == ["s-0.tar", "s-1.tar"]  # no secret
    with open_loader(source, 8, shuffled(3, seed=0), cache_bytes=0, reading=Reading(workers=4)) as loader:
        assert len({*loader.batch(0).names, *loader.batch(1).names}) == 6

    pauses = []
    monkeypatch.setattr(training.data.blobs.time, "sleep", pauses.append)
    server.failures += [503, 429]
    assert values(source)[:1] == [0]
    assert pauses == [1, 2]
    server.failures += [503, 503, 503]
    with pytest.raises(OSError, match=r"/data/s-0\.tar: HTTP 503"):
        source.encoded(0)
    server.etag = '"2"'
    with pytest.raises(Changed, match="has changed"):
        source.encoded(0)
    with pytest.raises(ValueError, match="HTTP 404, no such file"):
        open_source(f"{url}/data/s-7.tar", index_dir)


def test_a_web_server_without_ranges_is_refused_before_it_sends_all(tmp_path, index_dir, serve):
    write_tar(tmp_path / "a.tar", [("a.png", bytes(5_000_000))])

    class Plain(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments):
            pass

        def copyfile(self, source, output):
            with suppress(OSError):  # the client hangs up, which is the point
                super().copyfile(source, output)

    with pytest.raises(ValueError, match="does not answer range requests; download the file and give its local path"):
        open_source(f"{serve(Plain)}/a.tar", index_dir)


def test_a_server_that_is_not_there_is_an_os_error(index_dir, monkeypatch):
    monkeypatch.setattr(training.data.blobs.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:1/a\.tar: .*refused"):
        open_source("http://127.0.0.1:1/a.tar", index_dir)


# Hugging Face


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A DatasetDict with train and test, and its first part alone."""
    datasets = pytest.importorskip("datasets", reason="Hugging Face sources need the library")
    folder = tmp_path_factory.mktemp("hf")
    file = folder / "file.png"
    file.write_bytes(png(3))
    features = datasets.Features(
        {"id": datasets.Value("int64"), "photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )

    def rows(first, n):
        photos = [{"bytes": png(i), "path": None} for i in range(first, first + n)]
        kinds = [i % 2 for i in range(n)]
        return datasets.Dataset.from_dict({"id": [*range(n)], "photo": photos, "kind": kinds}, features=features)

    mixed = datasets.Dataset.from_dict(
        {
            "id": [0, 1, 2, 3],
            "photo": [
                {"bytes": png(1), "path": "x.png"},
                {"bytes": b"broken", "path": None},
                None,
                {"bytes": None, "path": str(file)},
            ],
            "kind": [0, None, -1, 1],
        },
        features=features,
    )
    datasets.DatasetDict({"train": rows(0, 5), "test": rows(10, 3)}).save_to_disk(folder / "both")
    rows(0, 6).select([4, 1, 2]).save_to_disk(folder / "one")
    mixed.save_to_disk(folder / "mixed")
    rows(0, 2).remove_columns("photo").save_to_disk(folder / "noimage")
    return folder


def test_a_dataset_dict_with_its_parts(hugging_face, index_dir):
    source = open_source(hugging_face / "both", index_dir)
    assert isinstance(source, HuggingFaceSource)
    train, val = split_source(source, 0.5, seed=0)
    assert (values(train), values(val)) == ([0, 1, 2, 3, 4], [10, 11, 12])
    assert names(val) == ["test/0", "test/1", "test/2"]
    assert labels(train) == ["cat", "dog", "cat", "dog", "cat"]
    assert [train.fingerprint(i) for i in range(5)] == [str(len(png(i))) for i in range(5)]
    again, single = open_source(hugging_face / "both", index_dir), open_source(hugging_face / "one", index_dir)
    assert again.version(0) == source.version(0) != single.version(0)
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(0, 5, 200).tolist()
        assert list(pool.map(train.encoded, order)) == [png(i) for i in order]


def test_a_single_dataset_and_its_order(hugging_face, index_dir):
    source = open_source(hugging_face / "one", index_dir)
    assert values(source) == [4, 1, 2]
    assert [source.fingerprint(i) for i in range(3)] == [str(len(png(i))) for i in (4, 1, 2)]
    assert source.parts == {}


def test_rows_without_images_or_labels(hugging_face, index_dir):
    source = open_source(hugging_face / "mixed", index_dir)
    assert labels(source) == ["cat", None, None, "dog"]
    assert Photo(source, 3).read().shape == (4, 6, 3)
    with pytest.raises(ValueError, match="the row has no image"):
        source.encoded(2)
    assert len(source_digest(source, contents=False)) == len(source_digest(source, contents=True)) == 64
    with open_loader(source, 8, shuffled(2, seed=0)) as loader:
        assert [s.name for s in loader.skipped] == ["data/1", "data/2"]


def test_a_dataset_without_images_and_a_damaged_one_are_refused(hugging_face, index_dir, tmp_path):
    with pytest.raises(
        ValueError, match=r"0 columns of type Image .* needs exactly one; its columns are \['id', 'kind'\]"
    ):
        open_source(hugging_face / "noimage", index_dir)
    (tmp_path / "dataset_dict.json").write_text("{}{")
    with pytest.raises(ValueError, match="cannot be opened"):
        open_source(tmp_path, index_dir)


def test_without_the_library_the_error_says_how_to_get_it(tmp_path, index_dir, monkeypatch):
    (tmp_path / "dataset_dict.json").write_text('{"splits": []}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_source(tmp_path, index_dir)


# A hurried user


def test_five_percent_broken_files_train_the_same_streamed_again(tmp_path, index_dir):
    for i in range(100):
        (tmp_path / f"{i:03}.jpg").write_bytes(png(i) if i % 20 else b"I am text")
    source = open_source(tmp_path, index_dir)
    runs = []
    for workers in (1, 4):
        with open_loader(source, 8, shuffled(10, seed=0), cache_bytes=0, reading=Reading(workers=workers)) as loader:
            runs.append([loader.batch(step).names for step in range(10)])
            assert sorted(s.name for s in loader.skipped) == [f"{i:03}.jpg" for i in range(0, 100, 20)]
    assert runs[0] == runs[1]
    assert len(open_loader(source, 8, shuffled(10, seed=0))) == 95


def test_a_folder_with_one_photo(tmp_path, index_dir):
    (tmp_path / "1.png").write_bytes(png(1))
    train, held_out = split_source(open_source(tmp_path, index_dir), 0.1, seed=0)
    assert (len(train), len(held_out)) == (1, 0)
    with pytest.raises(ValueError, match="batch_size=4 must be 1 to 1"):
        open_loader(train, 8, shuffled(4, seed=0)).batch(0)


def test_a_local_blob_reads_exactly_what_is_asked(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    blob = LocalBlob(tmp_path / "x")
    assert blob.read(10, 5) == bytes(range(10, 15))
    with pytest.raises(Changed):
        blob.read(98, 5)
