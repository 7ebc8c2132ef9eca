"""A list names only files in its own folder, unless the operator allows more. Nothing but plain files is opened."""

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import httpx
import pytest

from service.errors import ImageTooLarge
from service.ingest import listed, sources, web
from service.ingest.folders import Disk, File, Photo
from service.ingest.listed import Allowed
from service.ingest.sources import find_photos, read_photo
from service.ingest.web import PublicOnly, Web
from service.public_addresses import why_not_public
from tests.hostile_urls import FORMS

PUBLIC = "93.184.216.34"
NOTHING = Allowed()
OUTSIDE = "it is outside the folder of"


def taken(source: Path | str, allowed: Allowed = NOTHING) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the content of each image by id, and the reason of each problem by source."""
    contents, problems = {}, {}
    for one in find_photos([str(source)], allowed=allowed):
        try:
            if isinstance(one, Photo):
                contents[one.id] = one.load().data
            else:
                problems[one.source] = one.reason
        except (OSError, ValueError) as error:
            problems[one.source] = str(error)
    return contents, problems


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """A folder with an image, next to a folder that no list may read."""
    (tmp_path / "lists" / "below").mkdir(parents=True)
    (tmp_path / "lists" / "below" / "a.jpg").write_bytes(b"A")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "b.jpg").write_bytes(b"B")
    (tmp_path / "lists-secret.jpg").write_bytes(b"C")
    return tmp_path / "lists"


def outside(lists: Path) -> list[str]:
    """Addresses of files outside the folder of the list."""
    (lists / "link.jpg").symlink_to(lists.parent / "secret" / "b.jpg")
    (lists / "linked").symlink_to(lists.parent / "secret")
    (lists / "chain.jpg").symlink_to(lists / "link.jpg")
    secret = lists.parent / "secret" / "b.jpg"
    fsspec.filesystem("memory").pipe("/listed/m.jpg", b"M")
    return [
        str(secret),
        secret.as_uri(),
        f"local://{secret}",
        "../secret/b.jpg",
        "below/../../secret/b.jpg",
        "../lists-secret.jpg",
        "link.jpg",
        "chain.jpg",
        "linked/b.jpg",
        "memory://listed/m.jpg",
        f"simplecache::file://{secret}",
        "/etc/hostname",
        "/proc/self/environ",
        ".",
        "..",
    ]


def write_lists(folder: Path, addresses: list[str]) -> list[Path]:
    """Write the same addresses as a list of each kind."""
    (folder / "x.txt").write_text("\n".join(addresses))
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"image": address}) for address in addresses))
    (folder / "x.csv").write_text("\n".join(["path", *addresses]))
    return [folder / name for name in ("x.txt", "x.jsonl", "x.csv")]


def test_a_list_may_not_name_what_is_outside_its_folder(lists: Path) -> None:
    addresses = outside(lists)
    inside = ["below/a.jpg", str(lists / "below" / "a.jpg"), "./below/../below/a.jpg", (lists / "below/a.jpg").as_uri()]
    for path in write_lists(lists, [*addresses, *inside]):
        contents, problems = taken(path)
        assert contents == dict.fromkeys(inside, b"A")
        assert set(problems) == set(addresses)
        assert all(OUTSIDE in reason and "--allow-outside" in reason for reason in problems.values()), problems


def test_what_is_outside_can_be_allowed(lists: Path) -> None:
    names = ["../secret/b.jpg", "link.jpg", "linked/b.jpg", str(lists.parent / "secret" / "b.jpg")]
    outside(lists)
    (lists / "x.txt").write_text("\n".join([*names, "memory://listed/m.jpg"]))
    contents, problems = taken(lists / "x.txt", Allowed(outside=True))
    assert contents == {**dict.fromkeys(names, b"B"), "memory://listed/m.jpg": b"M"}
    assert problems == {}


def test_a_parquet_file_may_name_no_more_than_a_list(lists: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra `parquet`")
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"path": ["below/a.jpg", "../secret/b.jpg", "http://images.example.com/a.jpg"]}), lists / "x.parquet"
    )
    contents, problems = taken(lists / "x.parquet")
    assert contents == {"below/a.jpg": b"A"}
    assert OUTSIDE in problems["../secret/b.jpg"]
    assert "--allow-web" in problems["http://images.example.com/a.jpg"]


def test_a_list_in_another_file_system_stays_there(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    (tmp_path / "local.jpg").write_bytes(b"L")
    names = [
        "a.jpg",
        "memory:///there/lists/a.jpg",
        "../b.jpg",
        "memory:///there/b.jpg",
        "memory:///there/lists/../b.jpg",
    ]
    memory.pipe("/there/lists/x.txt", "\n".join([*names, str(tmp_path / "local.jpg")]).encode())
    memory.pipe("/there/lists/a.jpg", b"A")
    memory.pipe("/there/b.jpg", b"B")
    contents, problems = taken("memory://there/lists/x.txt")
    assert contents == {"a.jpg": b"A", "memory:///there/lists/a.jpg": b"A"}
    assert len(problems) == 4
    assert all(OUTSIDE in reason for reason in problems.values())


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/a.jpg", "https://images.example.com/a.jpg", "HTTP://127.0.0.1:1/a.jpg"]
)
def test_web_addresses_in_lists_must_be_allowed(lists: Path, address: str) -> None:
    (lists / "x.txt").write_text(address)
    for allowed in (Allowed(), Allowed(outside=True)):
        assert taken(lists / "x.txt", allowed)[1] == {
            address: "a list may not name web addresses; --allow-web permits this"
        }


def test_a_web_address_within_another_address_is_never_allowed(lists: Path) -> None:
    addresses = ["simplecache::http://127.0.0.1:1/a.jpg", "zip://a.jpg::https://127.0.0.1:1/b.zip"]
    (lists / "x.txt").write_text("\n".join(addresses))
    problems = taken(lists / "x.txt", Allowed(outside=True, web=True))[1]
    assert problems == dict.fromkeys(
        addresses, "a web address must be http:// or https://, and not a part of another address"
    )


# The guard of web addresses


def resolved(host: str, port: int) -> list[str]:
    """Resolve addresses as the system does, and names below example.com to a public address."""
    if host.endswith("example.com"):
        return [PUBLIC]
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)]


def image(data: bytes) -> httpx.Response:
    return httpx.Response(200, stream=httpx.ByteStream(data))


def guarded(
    answer: Callable[[httpx.Request], httpx.Response], resolve: web.Resolve = resolved
) -> tuple[Web, list[httpx.Request]]:
    """Return a guarded reader, and the list of requests that passed the guard."""
    passed: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        passed.append(request)
        return answer(request)

    return Web(lambda: PublicOnly(resolve, httpx.MockTransport(handle))), passed


def test_a_public_image_is_fetched_from_the_address_that_was_checked() -> None:
    reader, passed = guarded(lambda request: image(b"image"))
    assert reader.read("https://images.example.com/a.jpg", 10) == b"image"
    assert passed[0].url.host == PUBLIC
    assert passed[0].headers["host"] == "images.example.com"
    assert passed[0].extensions["sni_hostname"] == "images.example.com"
    with pytest.raises(ImageTooLarge, match="limit of 3 bytes"):
        reader.read("https://images.example.com/a.jpg", 3)


@pytest.mark.parametrize("url", [*FORMS.values(), *(url.replace("https:", "http:", 1) for url in FORMS.values())])
def test_no_form_of_a_url_reaches_this_network(url: str) -> None:
    reader, passed = guarded(lambda request: image(b"image"))
    try:
        reader.read(url, 10)
    except (OSError, ValueError):
        return
    assert [why_not_public(request.url.host) for request in passed] == [None] * len(passed)


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/a.jpg", "//169.254.169.254/", "http://10.0.0.1:8080/", "file:///etc/passwd"]
)
def test_redirects_are_checked_too(target: str) -> None:
    reader, passed = guarded(lambda request: httpx.Response(302, headers={"location": target}))
    with pytest.raises(OSError, match=r"is not public|is not a web address"):
        reader.read("https://images.example.com/a.jpg", 10)
    assert [request.url.host for request in passed] == [PUBLIC]


def test_redirects_keep_the_name_of_the_host() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        moved = request.url.path == "/old"
        return httpx.Response(302, headers={"location": "/new"}) if moved else image(b"new")

    reader, passed = guarded(answer)
    assert reader.read("https://images.example.com/old", 10) == b"new"
    assert [request.headers["host"] for request in passed] == ["images.example.com"] * 2


def test_one_address_that_is_not_public_is_enough_to_refuse_a_name() -> None:
    reader, passed = guarded(lambda request: httpx.Response(200), lambda host, port: [PUBLIC, "192.168.1.1"])
    with pytest.raises(OSError, match=r"images\.example\.com is not public: 192\.168\.1\.1"):
        reader.read("https://images.example.com/a.jpg", 10)
    assert passed == []


def test_the_other_address_of_a_name_is_tried() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == PUBLIC:
            raise httpx.ConnectError("unreachable")
        return image(b"image")

    reader, passed = guarded(answer, lambda host, port: [PUBLIC, "2606:2800:220:1:248:1893:25c8:1946"])
    assert reader.read("https://images.example.com/a.jpg", 10) == b"image"
    assert len(passed) == 2


def test_compressed_and_endless_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b""))
    reader, passed = guarded(lambda request: compressed)
    with pytest.raises(OSError, match="compressed with 'gzip'"):
        reader.read("https://images.example.com/a.jpg", 10)
    assert passed[0].headers["accept-encoding"] == "identity"
    monkeypatch.setattr(web, "_LIMIT_S", -1.0)
    reader, _ = guarded(lambda request: image(b"image"))
    with pytest.raises(OSError, match="not complete after"):
        reader.read("https://images.example.com/a.jpg", 10)


# Files that are not plain files


@pytest.fixture
def special(tmp_path: Path) -> list[Path]:
    """A pipe, a socket and a link to a device, each with names that make `index` open a file."""
    folder = tmp_path / "special"
    folder.mkdir()
    for name in ("a.jpg", "b.tar", "c.parquet", "d.json", "metadata.jsonl"):
        os.mkfifo(folder / name)
    (folder / "d.jpg").write_bytes(b"D")
    (folder / "e.jpg").symlink_to("/dev/zero")
    (folder / "f.tar").symlink_to("/dev/zero")
    os.mkfifo(folder / "g.txt")
    return sorted(folder.iterdir())


def within(seconds: float, work: Callable[[], object]) -> None:
    """Run a function in a thread, and fail if it does not end in time."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()


def test_pipes_and_devices_in_a_folder_are_not_opened(special: list[Path]) -> None:
    results: list[tuple[dict[str, bytes], dict[str, str]]] = []
    within(20, lambda: results.append(taken(special[0].parent)))
    [(contents, problems)] = results
    assert contents == {}
    folder = special[0].parent
    assert problems[str(folder / "metadata.jsonl")] == "not a plain file"
    assert "not a plain file" in problems[str(folder / "b.tar")]
    assert "not a plain file" in problems[str(folder / "f.tar")]
    assert "not a plain file" in problems[str(folder / "c.parquet")]
    assert problems[str(folder / "d.jpg")] == "not a plain file"  # its metadata cannot be read


def test_pipes_and_devices_are_no_sources(special: list[Path]) -> None:
    for path in (*(path for path in special if path.name != "d.jpg"), Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match="not a plain file"):
            find_photos([str(path)])
    with pytest.raises(OSError, match="not a plain file"):
        read_photo("/dev/zero")


def test_pipes_and_devices_in_lists_are_not_opened(special: list[Path]) -> None:
    folder = special[0].parent
    names = [path.name for path in special if path.name != "d.jpg"] + ["/dev/zero", "/dev/null"]
    (folder / "x.txt").write_text("\n".join(names))
    results: list[tuple[dict[str, bytes], dict[str, str]]] = []
    within(20, lambda: results.append(taken(folder / "x.txt", Allowed(outside=True))))
    [(contents, problems)] = results
    assert contents == {}
    assert set(problems.values()) == {"not a plain file"}


def test_a_pipe_that_replaces_a_file_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    plain = os.stat(__file__)
    with monkeypatch.context() as patch:
        patch.setattr("service.ingest.folders.os.stat", lambda path: plain)
        with pytest.raises(OSError, match="not a plain file"):
            Disk().open(str(tmp_path / "a.jpg"))


def test_a_file_that_grows_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    [found] = find_photos([str(tmp_path / "a.jpg")], max_bytes=10)
    assert isinstance(found, Photo)
    (tmp_path / "a.jpg").write_bytes(bytes(10**6))
    with pytest.raises(ImageTooLarge, match="limit of 10 bytes"):
        found.load()
    assert len(Disk().read(str(tmp_path / "a.jpg"), 10)) == 11


# Limits of lists


def test_rows_of_any_length_end_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.ingest.lists._MAX_LINE_CHARACTERS", 50)
    (tmp_path / "a.jpg").write_bytes(b"A")
    for row in ("x" * 60, ",".join(['"\n"'] * 60)):
        (tmp_path / "x.csv").write_text(f"path,n\na.jpg,1\n{row}\na.jpg,2\n")
        contents, problems = taken(tmp_path / "x.csv")
        assert contents == {"a.jpg": b"A"}
        assert "a row has more than 50 characters" in problems[str(tmp_path / "x.csv")]


def test_a_description_of_a_folder_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_DESCRIBED_BYTES", 20)
    (tmp_path / "a.jpg").write_bytes(b"A")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "label": 1}\n')
    contents, problems = taken(tmp_path)
    assert contents == {"a.jpg": b"A"}
    assert "index the file itself as a list" in problems[str(tmp_path / "metadata.jsonl")]


def test_a_list_in_the_root_folder_has_this_folder() -> None:
    """Not the working folder, which an empty path would mean."""
    file = File(Disk(), "/x.txt", "x.txt")
    assert listed.locate(file, "etc/hostname", Allowed())[1] == "/etc/hostname"


def test_schemes() -> None:
    assert listed._schemes_of("a::b.jpg") == []
    assert listed._schemes_of("zip://a.jpg::S3://b/c.zip") == ["zip", "s3"]
    assert listed.is_web("http://[::1]/a.jpg")
    assert not listed.is_web("httpx://a")
