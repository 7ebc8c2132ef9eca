"""Settings: from the environment only, typos refused, secrets masked."""

import os

import pytest

from service.settings import Settings, load_settings, masked_url


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    for name in list(os.environ):
        if name.startswith("DINOV2_"):
            monkeypatch.delenv(name)


def test_defaults_are_local_and_embedded():
    settings = load_settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "auto")
    assert settings.redis_url is None


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
        ("threads", 0),
        ("request_deadline_s", 0),
        ("redis_url", "http://x"),
        ("max_image_bytes", 2**40),
        ("max_image_pixels", 178_956_971),
        ("unknown", 1),
    ],
)
def test_bad_values_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        load_settings({name: value})


def test_an_empty_redis_url_means_none(monkeypatch):
    monkeypatch.setenv("DINOV2_REDIS_URL", "")
    assert load_settings().redis_url is None


def test_passwords_are_masked():
    settings = Settings(redis_url="redis://user:s3cret@cache:6379/0")
    assert settings.shown()["redis_url"] == "redis://user:***@cache:6379/0"
    assert "s3cret" not in str(settings.shown())
    assert masked_url("redis://cache:6379/0") == "redis://cache:6379/0"
    with pytest.raises(ValueError, match="redis_url") as error:
        load_settings({"redis_url": "http://:s3cret@cache"})
    assert "s3cret" not in str(error.value)


def test_a_bad_value_is_told_in_one_line_with_the_name_and_the_value():
    with pytest.raises(ValueError, match=r"^port=70000: .*65535$"):
        load_settings({"port": 70000})


def test_a_request_never_brings_more_than_the_queue_takes():
    assert Settings(max_batch_items=64, queue_max_images=10).items_per_request == 10
