"""Tests of the names of the published weights, and of downloads from a server that misbehaves in many ways."""

import errno
import hashlib
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from model import downloads
from model.config import CONFIGS
from model.downloads import MAX_ATTEMPTS, download
from model.zoo import ENTRIES, DownloadError, DownloadOptions, Hosts, ZooEntry, resolve
from tests.disk_log import DiskLog
from tests.model.torch_files import torch_file
from tests.model.weights_server import Server, weights_server

CONTENT = torch_file({"weight": np.arange(1 << 18, dtype=np.float32)})  # about 1 MiB
SAFETENSORS = safetensors.numpy.save({"weight": np.arange(1 << 18, dtype=np.float32)})
ENTRY = replace(ENTRIES["dinov2_vits14"], size_bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())


def test_the_eight_released_backbones() -> None:
    assert list(ENTRIES) == [f"dinov2_vit{size}14{suffix}" for suffix in ("", "_reg") for size in "sblg"]
    assert ENTRIES.keys() < CONFIGS.keys()
    assert {entry.licence for entry in ENTRIES.values()} == {"Apache-2.0"}
    small, giant = ENTRIES["dinov2_vits14"], ENTRIES["dinov2_vitg14_reg"]
    assert small.url == "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
    assert small.size_bytes == 88_283_115
    assert small.sha256 == "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"
    assert giant.url == "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"
    assert giant.timm_name == "vit_giant_patch14_reg4_dinov2.lvd142m"
    assert giant.hf_name == "facebook/dinov2-with-registers-giant"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dinov2_vitb14", "dinov2_vitb14"),
        ("vit_base_patch14_dinov2.lvd142m", "dinov2_vitb14"),
        ("timm/vit_base_patch14_dinov2.lvd142m", "dinov2_vitb14"),
        ("vit_large_patch14_reg4_dinov2", "dinov2_vitl14_reg"),
        ("facebook/dinov2-giant", "dinov2_vitg14"),
        ("facebook/dinov2-with-registers-small", "dinov2_vits14_reg"),
        ("dinov2_vits14_reg4", "dinov2_vits14_reg"),
        (" DINOv2_ViTS14 ", "dinov2_vits14"),
    ],
)
def test_names_and_aliases(name: str, expected: str) -> None:
    assert resolve(name).name == expected


def test_no_alias_means_two_things() -> None:
    names = [name for entry in ENTRIES.values() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))


def test_unknown_names_get_near_matches_and_the_list() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'dinov2_vits16': did you mean dinov2_vits14") as caught:
        resolve("dinov2_vits16")
    assert all(name in str(caught.value) for name in ENTRIES)
    with pytest.raises(ValueError, match="unknown model 'resnet50': the known names are"):
        resolve("resnet50")


@pytest.fixture
def server() -> Iterator[Server]:
    with weights_server(CONTENT) as running:
        yield running


def fetch(server: Server, cache: Path, entry: ZooEntry = ENTRY) -> Path:
    return download(entry, DownloadOptions(cache, Hosts(server.url, None)), retry_wait_s=0.001)


def left_over(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {f"{ENTRY.filename}.lock"}


def test_download_and_second_call(server: Server, tmp_path: Path) -> None:
    path = fetch(server, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "dinov2_vits14_pretrain.pth"
    assert path.read_bytes() == CONTENT
    assert left_over(path.parent) == {path.name}
    assert fetch(server, path.parent) == path
    assert [request[0] for request in server.requests] == ["/mirror/dinov2_vits14/dinov2_vits14_pretrain.pth"]


def test_dropped_connections_resume(server: Server, tmp_path: Path) -> None:
    server.sent_per_connection = [300_000, 1, 400_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert [request[1:] for request in server.requests] == [
        (None, None),
        ("bytes=300000-", '"v1"'),
        ("bytes=300001-", '"v1"'),
        ("bytes=700001-", '"v1"'),
    ]
    assert left_over(tmp_path) == {ENTRY.filename}


def test_a_line_that_breaks_again_and_again_but_delivers_is_no_failure(server: Server, tmp_path: Path) -> None:
    server.sent_per_connection = [100_000] * (MAX_ATTEMPTS + 2)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == MAX_ATTEMPTS + 3


def test_fruitless_attempts_end_and_wait_longer_each_time(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    server.sent_per_connection = [1000] + [0] * 10
    with pytest.raises(DownloadError):
        fetch(server, tmp_path)
    assert len(server.requests) == MAX_ATTEMPTS  # the first, which delivered, is the first of those in a row
    assert waits == [0.001, 0.002, 0.004]


def test_the_bytes_are_on_the_disk_before_they_have_their_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = DiskLog(monkeypatch)
    log.assert_durable(fetch(server, tmp_path))


def test_a_later_call_resumes_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    server.sent_per_connection = [500_000] + [0] * 10
    with pytest.raises(DownloadError, match="cannot download dinov2_vits14 from http://127"):
        fetch(server, tmp_path)
    assert (tmp_path / f"{ENTRY.filename}.part").read_bytes() == CONTENT[:500_000]
    server.sent_per_connection = []
    server.requests.clear()
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert [request[1] for request in server.requests] == ["bytes=500000-"]


def test_a_complete_part_only_needs_its_name(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{ENTRY.filename}.part").write_bytes(CONTENT)
    (tmp_path / f"{ENTRY.filename}.part.validator").write_text('"v1"')
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert left_over(tmp_path) == {ENTRY.filename}


def test_a_file_that_changed_meanwhile_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{ENTRY.filename}.part").write_bytes(b"x" * 1000)
    (tmp_path / f"{ENTRY.filename}.part.validator").write_text('"v0"')
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[0][1:] == ("bytes=1000-", '"v0"')


def test_a_spoiled_part_is_noticed_and_fetched_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{ENTRY.filename}.part").write_bytes(b"x" * 1000)
    (tmp_path / f"{ENTRY.filename}.part.validator").write_text('"v1"')
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert [request[1] for request in server.requests] == ["bytes=1000-", None]


def test_a_part_that_is_too_long(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{ENTRY.filename}.part").write_bytes(CONTENT + b"x")
    (tmp_path / f"{ENTRY.filename}.part.validator").write_text('"v1"')
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.sent_per_connection = [300_000, 200_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 3


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_validator_nothing_is_glued_together(server: Server, tmp_path: Path, etag: str | None) -> None:
    server.etag = etag
    server.sent_per_connection = [300_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert [request[1] for request in server.requests] == [None, None]


def test_wrong_bytes(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(DownloadError, match=r"sha256 [0-9a-f]{64} instead of") as caught:
        fetch(server, tmp_path)
    assert str(ENTRY.sha256) in str(caught.value)
    assert left_over(tmp_path) == set()


def test_bytes_that_are_wrong_once_are_downloaded_again(server: Server, tmp_path: Path) -> None:
    server.wrong_answers = 1
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_without_a_known_hash_the_checksums_inside_the_file_are_checked(server: Server, tmp_path: Path) -> None:
    entry = replace(ENTRY, size_bytes=None, sha256=None)
    server.wrong_answers = 1
    assert fetch(server, tmp_path, entry).read_bytes() == CONTENT
    server.wrong_answers = 2
    with pytest.raises(DownloadError, match=r"archive/data/0 is damaged: its CRC-32 is \w+ instead of"):
        fetch(server, tmp_path / "again", entry)
    assert left_over(tmp_path / "again") == set()


# Hugging Face's file


def test_hugging_face_is_asked_if_meta_does_not_deliver(server: Server, tmp_path: Path) -> None:
    server.statuses, server.content = [404], SAFETENSORS
    path = download(ENTRY, DownloadOptions(tmp_path, Hosts(server.url, server.url)), retry_wait_s=0.001)
    assert path == tmp_path / "dinov2-small.safetensors"
    assert [request[0] for request in server.requests] == [
        "/mirror/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "/mirror/facebook/dinov2-small/resolve/main/model.safetensors",
    ]
    assert download(ENTRY, DownloadOptions(tmp_path, Hosts(server.url, server.url))) == path
    assert len(server.requests) == 2  # the second call uses the file


@pytest.mark.parametrize("wrong", [1, 2])
def test_the_hash_that_hugging_face_sends_is_checked(server: Server, tmp_path: Path, wrong: int) -> None:
    server.content, sha256 = SAFETENSORS, hashlib.sha256(SAFETENSORS).hexdigest()
    server.redirect_etag = f'"{sha256}"'
    server.wrong_answers = wrong
    options = DownloadOptions(tmp_path, Hosts(None, server.url))
    if wrong == 1:
        assert download(ENTRY, options, retry_wait_s=0.001).read_bytes() == SAFETENSORS
    else:
        with pytest.raises(DownloadError, match=f"has sha256 [0-9a-f]+ instead of {sha256}"):
            download(ENTRY, options, retry_wait_s=0.001)


def test_a_page_instead_of_a_file_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>log in to the hotel's network</html>"
    entry = replace(ENTRY, size_bytes=None, sha256=None)
    with pytest.raises(DownloadError, match=r"not a readable ZIP archive.*; nor from .*deserializing header"):
        download(entry, DownloadOptions(tmp_path, Hosts(server.url, server.url)), retry_wait_s=0.001)
    assert left_over(tmp_path) == set()


def test_if_both_fail_both_reasons_are_given(server: Server, tmp_path: Path) -> None:
    server.statuses = [404, 403]
    with pytest.raises(DownloadError, match=r"\.pth: .* 404 Not Found; nor from .*\.safetensors: .* 403 Forbidden\."):
        download(ENTRY, DownloadOptions(tmp_path, Hosts(server.url, server.url)), retry_wait_s=0.001)


def test_progress_is_reported(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(downloads, "REPORT_S", 0.0)
    reports: list[tuple[int, int | None]] = []
    options = DownloadOptions(tmp_path, Hosts(server.url, None), lambda done, total: reports.append((done, total)))
    with caplog.at_level("INFO", logger="model.downloads"):
        download(ENTRY, options)
    assert reports[0] == (0, len(CONTENT))
    assert reports[-1] == (len(CONTENT), len(CONTENT))
    assert reports == sorted(reports)
    assert "downloading dinov2_vits14_pretrain.pth: 1 of 1 MB" in caplog.text


def test_wrong_size_is_refused_before_it_is_fetched(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>log in to the hotel's network</html>"
    with pytest.raises(DownloadError, match=f"42 bytes instead of {len(CONTENT)}: not the published file"):
        fetch(server, tmp_path)
    assert left_over(tmp_path) == set()


def test_without_a_known_hash_the_length_must_fit(server: Server, tmp_path: Path) -> None:
    entry = replace(ENTRY, size_bytes=None, sha256=None)
    server.sent_per_connection = [300_000]
    assert fetch(server, tmp_path, entry).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [503, 429, 500])
def test_passing_troubles_are_waited_out(server: Server, tmp_path: Path, status: int) -> None:
    server.statuses = [status, status]
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_refusal_is_final(server: Server, tmp_path: Path) -> None:
    server.statuses = [404]
    with pytest.raises(DownloadError, match="returned 404 Not Found"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1


def test_no_server_tells_the_manual_way(server: Server, tmp_path: Path) -> None:
    url = server.url
    server.server_close()
    with pytest.raises(DownloadError) as caught:
        download(ENTRY, DownloadOptions(tmp_path, Hosts(url, None)), retry_wait_s=0.001)
    message = str(caught.value)
    assert f"curl -fLO {url}/dinov2_vits14/dinov2_vits14_pretrain.pth" in message
    assert f"put the file at {tmp_path / 'dinov2_vits14_pretrain.pth'}" in message
    assert f"{len(CONTENT)} bytes" in message
    assert str(ENTRY.sha256) in message


@pytest.mark.parametrize("base_url", ["https://[::1", "ftp://127.0.0.1/x", "http://no-such-host.invalid"])
def test_mirrors_that_cannot_be(base_url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot download dinov2_vits14 from .* To download it manually, run "):
        download(ENTRY, DownloadOptions(tmp_path, Hosts(base_url, None)), retry_wait_s=0.001)


def test_a_file_put_there_by_hand(server: Server, tmp_path: Path) -> None:
    (tmp_path / ENTRY.filename).write_bytes(CONTENT)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    (tmp_path / ENTRY.filename).write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match=r"delete .* to download it again"):
        fetch(server, tmp_path)
    assert (tmp_path / ENTRY.filename).exists()
    assert server.requests == []


def test_too_little_space_is_seen_before(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = downloads.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=f"{len(CONTENT)} bytes are needed, but only 1000 are free"):
        fetch(server, tmp_path)
    assert left_over(tmp_path) == set()


def test_only_what_is_missing_must_fit_on_the_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.sent_per_connection = [800_000] + [0] * 10
    with pytest.raises(DownloadError):
        fetch(server, tmp_path)
    server.sent_per_connection = []
    usage = downloads.shutil.disk_usage(tmp_path)._replace(free=len(CONTENT) - 800_000)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


class FullDisk(io.FileIO):
    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_is_cleaned(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(self: Path, mode: str = "r", *args: object, **more: object) -> object:
        return FullDisk(self, mode) if self.suffix == ".part" and mode == "wb" else real(self, mode, *args, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DownloadError, match="the disk is full"):
        fetch(server, tmp_path)
    assert left_over(tmp_path) == set()


def test_two_at_once_fetch_it_once(server: Server, tmp_path: Path) -> None:
    server.sent_per_connection = [300_000, 300_000]
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(server, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == CONTENT for path in paths] == [True] * 4
    assert [request[1] for request in server.requests] == [None, "bytes=300000-", "bytes=600000-"]


def test_progress_goes_to_a_terminal_only(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    download(ENTRY, DownloadOptions(tmp_path, Hosts(server.url, None)))
    assert capsys.readouterr() == ("", "")


def test_needs_no_torch() -> None:
    code = "import sys, model, model.zoo, model.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_documented_names() -> None:
    table = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for entry in ENTRIES.values():
        assert f"| `{entry.name}` | `{entry.timm_name}` | `{entry.hf_name}` |" in table
    assert ENTRIES["dinov2_vits14"].url in table
