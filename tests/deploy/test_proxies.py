"""The examples of proxies pass everything on that the service accepts, and hide what is not for clients."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from service.settings import Settings

FOLDER = Path(__file__).parents[2] / "deploy" / "proxy"
CADDYFILE = (FOLDER / "Caddyfile").read_text()
NGINX = {path.name: path.read_text() for path in FOLDER.glob("*.conf")}
LIMIT_BYTES = Settings.model_fields["max_body_bytes"].default
DEADLINE_S = Settings.model_fields["request_deadline_s"].default
INTERNAL = ["/metrics", "/livez", "/readyz", "/metrics/", "/images/metrics", "/images/readyz"]
PUBLIC = ["/v1/models", "/v1/collections/metrics", "/docs", "/v1/collections/x/items/metrics.jpg"]


def values(text: str, name: str) -> list[str]:
    """The values of a directive of nginx, without comments."""
    return re.findall(rf"^\s*{name}\s+([^;]+);", text, re.MULTILINE)


def test_bodies_of_the_allowed_size_pass() -> None:
    [size] = values(NGINX["service.conf"], "client_max_body_size")
    assert int(size.removesuffix("m")) * 2**20 >= LIMIT_BYTES
    [size] = re.findall(r"max_size (\d+)MiB", CADDYFILE)
    assert int(size) * 2**20 >= LIMIT_BYTES


def test_nothing_is_buffered_that_must_arrive_at_once() -> None:
    text = NGINX["service.conf"]
    [upload] = re.findall(r"location @upload \{([^}]+)\}", text)
    assert values(upload, "proxy_request_buffering") == ["off"]
    sizes = re.findall(r'if \(\$content_length ~ "([^"]+)"\)', text)
    assert len(sizes) == 2
    for size in sizes:
        assert re.search(size, "1000000")
        assert not re.search(size, "999999")
        assert not re.search(size, "")
    [events] = re.findall(r"location ~ (\S+events\S+) \{([^}]+)\}", text)
    pattern, block = events
    assert values(block, "proxy_buffering") == ["off"]
    assert values(block, "proxy_read_timeout") == ["1h"]
    for path in ("/v1/jobs/4f/events", "/images/v1/jobs/4f/events", "/v1/jobs/4f/events/"):
        assert re.search(pattern, path), path
    for path in ("/v1/jobs/4f", "/v1/jobs/4f/events/x", "/v1/collections/events"):
        assert not re.search(pattern, path), path
    assert "flush_interval" not in CADDYFILE or "flush_interval -1" in CADDYFILE  # events are flushed by default


def test_the_proxies_wait_longer_than_the_service() -> None:
    times = [*values(NGINX["service.conf"], "proxy_read_timeout"), *re.findall(r"header_timeout (\w+)", CADDYFILE)]
    assert len(times) == 3
    for time in times:
        assert int(time[:-1]) * {"s": 1, "h": 3600}[time[-1]] > DEADLINE_S


def test_containers_that_start_later_are_found() -> None:
    text = NGINX["service.conf"]
    assert "127.0.0.11" in values(text, "resolver")[0]
    assert set(values(text, "proxy_pass")) == {"$backend"}  # a name in a variable is resolved again
    assert "dynamic a" in CADDYFILE


def test_the_address_of_the_client_is_passed_on() -> None:
    assert "X-Forwarded-For $proxy_add_x_forwarded_for" in values(NGINX["service.conf"], "proxy_set_header")
    for text in (NGINX["nginx.conf"], CADDYFILE):
        assert "DINOV2_TRUSTED_PROXIES=1" in text
    assert "trusted_proxies" not in CADDYFILE  # Caddy itself trusts nobody, and sends the address that it sees


def test_what_is_not_for_clients_is_hidden() -> None:
    [nginx] = re.findall(r"location ~ (\S+metrics\S+) \{", NGINX["nginx.conf"])
    [caddy] = re.findall(r"@internal path_regexp (\S+)", CADDYFILE)
    assert "respond @internal 404" in CADDYFILE
    for pattern in (nginx, caddy):
        assert [path for path in INTERNAL if not re.search(pattern, path)] == []
        assert [path for path in PUBLIC if re.search(pattern, path)] == []


READING = [
    "/v1/embeddings",
    "/images/v1/classify",
    "/v1/collections/x/search",
    "/v1/collections/x/duplicates/",
    "/v1/collections/x/find-region",
]
CHANGING = [
    "/v1/collections/x/items",
    "/v1/jobs",
    "/v1/collections/x/restore",
    "/v1/jobs/4f/cancel",
    "/v1/jobs/search/retry",
]


def test_a_post_request_that_changes_something_is_not_repeated() -> None:
    """nginx repeats POST requests only with `non_idempotent`."""
    text = NGINX["service.conf"]
    assert text.count("non_idempotent") == 1
    [pattern, block] = re.search(r"location ~ (\S+embeddings\S+) \{(.+?)^\}", text, re.DOTALL | re.MULTILINE).groups()
    assert "non_idempotent" in block
    assert [path for path in READING if not re.search(pattern, path)] == []
    assert [path for path in CHANGING if re.search(pattern, path)] == []
    outside = text.replace(block, "")
    assert values(outside, "proxy_next_upstream") == ["error timeout http_503"]
    assert "lb_retry_match" not in CADDYFILE  # by default, Caddy repeats GET only


def test_every_route_that_may_be_repeated_exists() -> None:
    from service.routes import openapi as _  # noqa: F401
    from tests.fakes import FakeEngine, create_app, fake_artifact

    app = create_app(Settings(), fake_artifact(), FakeEngine())
    posts = {path.rsplit("/", 1)[1] for path, methods in app.openapi()["paths"].items() if "post" in methods}
    names = set(re.search(r"\?\(([a-z|-]+)\)/\?\$ \{", NGINX["service.conf"])[1].split("|"))
    assert names <= posts
    assert not names & {"items", "aliases", "jobs", "restore", "snapshots", "cancel", "retry"}


def test_temporary_files_are_in_the_writable_folder() -> None:
    for name in ("nginx.conf", "scale.conf"):
        assert values(NGINX[name], "pid") == ["/tmp/nginx.pid"]
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
            assert values(NGINX[name], f"{kind}_temp_path")[0].startswith("/tmp/")
        assert values(NGINX[name], "include") == ["/etc/nginx/dinov2/service.conf"]


@pytest.mark.skipif(shutil.which("caddy") is None, reason="needs caddy")
def test_caddy_accepts_its_file() -> None:
    command = ["caddy", "validate", "--adapter", "caddyfile", "--config", str(FOLDER / "Caddyfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_nginx_accepts_its_files(tmp_path: Path) -> None:
    text = NGINX["scale.conf"].replace("/tmp/", f"{tmp_path}/").replace("/etc/nginx/dinov2", str(FOLDER))
    (tmp_path / "scale.conf").write_text(text)
    command = ["nginx", "-e", "stderr", "-t", "-c", str(tmp_path / "scale.conf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
