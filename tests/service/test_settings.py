"""Tests of settings: they come from the environment only, typos are refused, and secrets are masked."""

import os
import re

import pytest

from service.addresses import masked_url
from service.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    for name in list(os.environ):
        if name.startswith("DINOV2_"):
            monkeypatch.delenv(name)


def test_defaults_are_local_and_embedded():
    settings = load_settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "auto")
    assert settings.redis_url is None
    assert settings.vector_store == "embedded"


def test_the_environment_is_read_and_the_command_line_wins(monkeypatch):
    monkeypatch.setenv("DINOV2_PORT", "9000")
    monkeypatch.setenv("DINOV2_CACHE_BYTES", "0")
    assert load_settings().port == 9000
    assert load_settings({"port": 9001}).port == 9001
    assert load_settings().cache_bytes == 0


def test_an_unknown_name_is_an_error_that_names_the_nearest(monkeypatch):
    monkeypatch.setenv("DINOV2_QUEUE_MAX_IMAGE", "5")
    with pytest.raises(ValueError, match=r"DINOV2_QUEUE_MAX_IMAGE .*did you mean DINOV2_QUEUE_MAX_IMAGES"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70000),
        ("engine", "magic"),
        ("engine", "torch:int8"),
        ("threads", 0),
        ("request_deadline_s", 0),
        ("redis_url", "http://x"),
        ("vector_store", "qdrant"),
        ("max_image_bytes", 2**40),
        ("max_image_pixels", 178_956_971),
        ("unknown", 1),
    ],
)
def test_bad_values_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        load_settings({name: value})


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_an_empty_value_means_the_default(monkeypatch, name):
    monkeypatch.setenv(f"DINOV2_{name.upper()}", "")
    assert getattr(load_settings(), name) == getattr(Settings(), name)
    monkeypatch.delenv(f"DINOV2_{name.upper()}")
    assert getattr(load_settings({name: ""}), name) == getattr(Settings(), name)


@pytest.mark.parametrize("name", ["header_timeout_s", "request_deadline_s", "shutdown_grace_s", "hang_timeout_s"])
@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_a_time_is_a_finite_number(monkeypatch, name, value):
    monkeypatch.setenv(f"DINOV2_{name.upper()}", value)
    with pytest.raises(ValueError, match=f"^{name}='{value}'"):
        load_settings()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:s3cret@cache:6379/0", "redis://cache:6379/0"),
        ("redis://:s3cret@cache", "redis://cache"),
        ("redis://:s3@cret@cache:1/", "redis://cache:1/"),
        ("rediss://s3cret@[::1]:6380/12", "rediss://[::1]:6380/12"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_of_a_redis_url_scheme_host_port_and_database_are_shown(url, shown):
    settings = Settings(redis_url=url)
    assert settings.redis_url == url
    assert settings.shown()["redis_url"] == masked_url(url) == shown
    assert "s3" not in str(settings.shown())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://:s3cret@cache", "not with http://"),
        ("s3cret", "but contains no ://"),
        ("redis:/:s3cret@cache", "but contains no ://"),
        ("rediss//:s3cret@cache", "but contains no ://"),
        ("redis://cache/0?password=s3cret", "options after"),
        ("redis://:1?s3cret@cache", "options after"),
        ("redis://:1#s3cret@cache", "options after"),
        ("redis://:1/s3cret@cache", "host is missing"),
        ("redis://cache/s3cret", "database number"),
        ("redis://:pw@cache:s3cret", "host or port"),
        ("redis://:s3cret@[cache", "host or port"),
        ("redis://:s3cret@:6379", "host is missing"),
        ("unix://s3cret", "unix:///path"),
    ],
)
def test_a_redis_url_that_is_refused_is_not_shown(monkeypatch, url, message):
    monkeypatch.setenv("DINOV2_REDIS_URL", url)
    with pytest.raises(ValueError, match=r"^redis_url: ") as error:
        load_settings()
    assert message in str(error.value)
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("embedded", "embedded"),
        ("milvus://vectors", "milvus://vectors"),
        ("milvus://user:s3cret@vectors:19530/photos", "milvus://vectors:19530/photos"),
        ("milvus+tls://user:s3%40cret@[::1]:1/", "milvus+tls://[::1]:1/"),
    ],
)
def test_of_a_vector_store_scheme_host_port_and_database_are_shown(url, shown):
    settings = Settings(vector_store=url)
    assert settings.vector_store == url
    assert settings.shown()["vector_store"] == shown


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:s3cret@vectors", "not with http://"),
        ("s3cret", "but has no valid scheme"),
        ("user:s3cret://vectors", "but has no valid scheme"),
        ("milvus://user:s3cret@vectors?x=1", "options after"),
        ("milvus://user:pw@vectors#s3cret", "options after"),
        ("milvus://user:pw/s3cret@vectors", "host or port"),
        ("milvus://user:pw@vectors/s3cret@x", "database name"),
        ("milvus://user:pw@vectors:s3cret", "host or port"),
        ("milvus://user:s3cret@", "host is missing"),
        ("milvus://s3cret@vectors", "user and password must be given together"),
        ("milvus://:s3cret@vectors", "user and password must be given together"),
    ],
)
def test_a_vector_store_that_is_refused_is_not_shown(monkeypatch, url, message):
    monkeypatch.setenv("DINOV2_VECTOR_STORE", url)
    with pytest.raises(ValueError, match=r"^vector_store: ") as error:
        load_settings()
    assert message in str(error.value)
    assert "s3cret" not in str(error.value)


def test_a_bad_value_is_told_in_one_line_with_the_name_and_the_value():
    with pytest.raises(ValueError, match=r"^port=70000: .*65535$"):
        load_settings({"port": 70000})


def test_limits_on_bytes_fit_into_each_other():
    Settings(max_image_bytes=10, max_body_bytes=10, max_buffered_bytes=10)
    with pytest.raises(ValueError, match="max_image_bytes=11 must not exceed max_body_bytes=10"):
        Settings(max_image_bytes=11, max_body_bytes=10)
    with pytest.raises(ValueError, match="max_body_bytes=10 must not exceed max_buffered_bytes=9"):
        Settings(max_image_bytes=5, max_body_bytes=10, max_buffered_bytes=9)


def test_names_that_only_compose_reads_are_let_through(monkeypatch):
    monkeypatch.setenv("DINOV2_MEMORY", "4g")
    assert load_settings().port == 8000


def test_a_request_never_brings_more_than_the_queue_takes():
    assert Settings(max_batch_items=64, queue_max_images=10).items_per_request == 10
    assert Settings(max_batch_items=10, queue_max_images=64).items_per_request == 10


@pytest.mark.parametrize("value", ["INFO", "Info", "info"])
def test_the_log_level_may_be_in_any_case(monkeypatch, value):
    monkeypatch.setenv("DINOV2_LOG_LEVEL", value)
    assert load_settings().log_level == "info"


def test_home_is_expanded_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DINOV2_DATA_DIR", "~/data")
    monkeypatch.setenv("DINOV2_ENGINE_PHOTOS", "~/images")
    settings = load_settings()
    assert (settings.data_dir, settings.engine_photos) == (tmp_path / "data", tmp_path / "images")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("port", "abc", "port='abc': must be an integer"),
        ("port", "-1", "port='-1': must be at least 0"),
        ("hang_timeout_s", "soon", "hang_timeout_s='soon': must be a number"),
        ("hang_timeout_s", "0", "hang_timeout_s='0': must be more than 0"),
        ("hang_timeout_s", "nan", "hang_timeout_s='nan': must be a finite number"),
        ("log_level", "loud", "log_level='loud': must be 'debug', 'info', 'warning' or 'error'"),
        ("data_dir", "~nobody-has-this-name/x", "data_dir='~nobody-has-this-name/x': "),
    ],
)
def test_errors_are_in_our_words(monkeypatch, name, value, message):
    monkeypatch.setenv(f"DINOV2_{name.upper()}", value)
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        load_settings()
    assert "Input should" not in str(error.value)
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("redis://cache:6379/0", "redis://:a%2Fb%40c%20d@cache:6379/0"),
        ("redis://user@cache", "redis://user:a%2Fb%40c%20d@cache"),
        ("rediss://user:@[::1]:6379/2", "rediss://user:a%2Fb%40c%20d@[::1]:6379/2"),
    ],
)
def test_the_password_of_redis_can_be_in_a_file(tmp_path, monkeypatch, url, whole):
    (tmp_path / "password").write_text("a/b@c d\n")
    monkeypatch.setenv("DINOV2_REDIS_URL", url)
    monkeypatch.setenv("DINOV2_REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    monkeypatch.setenv("DINOV2_JOBS_REDIS_URL", "redis://jobs")
    settings = load_settings()
    assert settings.redis_url == whole
    assert settings.jobs_redis_url == "redis://:a%2Fb%40c%20d@jobs"
    assert "a%2Fb" not in str(settings.shown())


@pytest.mark.parametrize(
    ("url", "content", "said"),
    [
        ("redis://:s3cret@cache", b"other", "the URL contains a password"),
        ("unix:///run/redis", b"other", "names a socket"),
        ("http://cache", b"other", "must start with redis://"),
        ("redis://cache", b"\n", "is empty"),
        ("redis://cache", b"\xff", "is not UTF-8"),
        ("redis://cache", None, "No such file"),
    ],
)
def test_a_password_file_that_cannot_be_used_is_refused(tmp_path, url, content, said):
    if content is not None:
        (tmp_path / "password").write_bytes(content)
    with pytest.raises(ValueError, match=f"redis_password_file: .*{said}") as error:
        load_settings({"redis_url": url, "redis_password_file": str(tmp_path / "password")})
    assert "s3cret" not in str(error.value)
    assert "other" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vector_store", "milvus://user:s3cret@milvus:19530"), ("originals_url", "s3://key:s3cret@bucket")],
)
def test_a_setting_with_a_secret_can_be_in_a_file(tmp_path, monkeypatch, name, value):
    (tmp_path / "secret").write_text(f"{value}\n")
    monkeypatch.setenv(f"DINOV2_{name.upper()}_FILE", str(tmp_path / "secret"))
    settings = load_settings()
    assert getattr(settings, name) == value
    assert "s3cret" not in str(settings.shown())
    with pytest.raises(ValueError, match=f"{name} and {name}_file must not both be set") as error:
        load_settings({name: value})
    assert "s3cret" not in str(error.value)
    (tmp_path / "secret").write_text("")
    with pytest.raises(ValueError, match=f"{name}_file: .*is empty"):
        load_settings()


def test_a_secret_in_a_file_is_checked_and_not_shown(tmp_path):
    (tmp_path / "secret").write_text("milvus://user:s3cret@host:99999999")
    with pytest.raises(ValueError, match="vector_store") as error:
        load_settings({"vector_store_file": str(tmp_path / "secret")})
    assert "s3cret" not in str(error.value)
    with pytest.raises(ValueError, match=r"vector_store_file: .*No such file"):
        load_settings({"vector_store_file": str(tmp_path / "none")})


def test_a_password_file_without_a_url_is_not_read():
    assert load_settings({"redis_password_file": "/nowhere"}).redis_url is None
