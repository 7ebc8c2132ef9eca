"""What Dockerfile and docker-compose.yml promise, read from the files: no Docker needed. deploy/smoke.py tries the same
promises on running containers.
"""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = re.split(r"^(?=FROM )", DOCKERFILE, flags=re.MULTILINE)[1:]
BUILD, FINAL = STAGES


@pytest.mark.parametrize("name", SERVICES)
def test_containers_keep_only_what_they_need(name: str) -> None:
    container = SERVICES[name]
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["restart"] == "unless-stopped"
    assert "/tmp" in container["tmpfs"]
    assert container["mem_limit"]
    assert "privileged" not in container
    assert "network_mode" not in container


def test_only_redis_gets_capabilities_back() -> None:
    assert {name for name, container in SERVICES.items() if "cap_add" in container} == {"redis"}
    assert set(SERVICES["redis"]["cap_add"]) == {"CHOWN", "SETGID", "SETUID"}  # its entrypoint steps down to a user


def test_only_loopback_is_published_and_never_redis() -> None:
    for container in SERVICES.values():
        for port in container.get("ports", []):
            assert port == "${DINOV2_PUBLISH:-127.0.0.1:8000}:8000"
        if "ports" in container:  # the service judges the published address, not the one that it listens on
            assert container["environment"]["DINOV2_PUBLISH"] == "${DINOV2_PUBLISH:-127.0.0.1:8000}"
            assert container["environment"]["DINOV2_AUTH"] == "${DINOV2_AUTH:-auto}"
    assert "ports" not in SERVICES["redis"]


@pytest.mark.parametrize("name", ["service", "service-gpu"])
def test_the_service_starts_after_a_healthy_redis(name: str) -> None:
    assert SERVICES[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_redis_wants_the_password_that_the_service_sends() -> None:
    command = SERVICES["redis"]["command"]
    password = command[command.index("--requirepass") + 1]
    assert password == SERVICES["redis"]["environment"]["REDISCLI_AUTH"]
    for name in ("service", "service-gpu"):
        assert SERVICES[name]["environment"]["DINOV2_REDIS_URL"] == f"redis://:{password}@redis:6379/0"


def test_redis_keeps_its_data_and_stays_within_its_memory() -> None:
    redis = SERVICES["redis"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "allkeys-lru"
    assert options["--maxmemory"] == "${REDIS_MAXMEMORY:-512mb}"
    assert redis["volumes"] == ["redis:/data"]
    assert "redis" in COMPOSE["volumes"]
    assert "PONG" in redis["healthcheck"]["test"][1]  # redis-cli exits 0 on NOAUTH too


def test_the_grace_of_compose_covers_that_of_the_service() -> None:
    from service.settings import Settings

    grace_s = Settings.model_fields["shutdown_grace_s"].default
    assert (
        int(SERVICES["service"]["stop_grace_period"].removesuffix("s")) > grace_s + 8
    )  # uvicorn's second, joining the batcher (5 s), closing


def test_settings_in_compose_and_dockerfile_exist() -> None:
    from service.settings import Settings

    known = {f"DINOV2_{name.upper()}" for name in Settings.model_fields}
    given = {name for name in SERVICES["service"]["environment"] if name.startswith("DINOV2_")}
    from service.settings import READ_BY_COMPOSE

    on_the_host = set(re.findall(r"\$\{(DINOV2_\w+)", (ROOT / "docker-compose.yml").read_text()))
    assert on_the_host <= known | READ_BY_COMPOSE
    given |= set(re.findall(r"\b(DINOV2_\w+)=", FINAL))
    assert given <= known
    assert {"DINOV2_HOST", "DINOV2_PORT", "DINOV2_DATA_DIR", "DINOV2_REDIS_URL"} <= given


def test_the_gpu_service_asks_for_a_gpu_and_only_in_its_profile() -> None:
    gpu = SERVICES["service-gpu"]
    assert gpu["profiles"] == ["gpu"]
    assert "profiles" not in SERVICES["service"]
    assert gpu["build"]["args"] == {"VARIANT": "gpu"}
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_the_image_is_not_root_and_tells_its_health() -> None:
    assert re.search(r"^USER (\d+):\1$", FINAL, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*\n.*python.*/readyz", FINAL, re.MULTILINE)
    assert "COPY --from=build" in FINAL
    assert "pip" not in FINAL


def test_any_builder_can_read_the_dockerfile() -> None:
    """Docker 20.10, without BuildKit too: no syntax line, here-document, mount or linked copy."""
    assert not re.search(r"# *syntax=|<<|--mount|--link|@sha256", DOCKERFILE)
    assert re.search(r"^ARG BASE_IMAGE=\S+-slim", DOCKERFILE, re.MULTILINE)
    assert all(stage.startswith("FROM ${BASE_IMAGE}") for stage in STAGES)


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    copied = {path for line in re.findall(r"^COPY (?!--from)(.+)$", BUILD, re.MULTILINE) for path in line.split()[:-1]}
    assert copied == sent
    assert [path for path in sorted(copied) if not (ROOT / path).exists()] == []


def test_every_package_is_built_into_the_image() -> None:
    """The packages of pyproject.toml: first as empty folders, then as themselves.

    The only module beside them is that of torch hub, which the image does not need.
    """
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.rstrip("*") for pattern in found}
    assert [path.name for path in ROOT.glob("*.py")] == ["hubconf.py"]
    made = re.search(r"^RUN mkdir (.+?) &&", BUILD, re.MULTILINE)
    assert made
    assert set(made[1].split()) == packages
    copied = set(re.findall(r"^COPY (\w+) \1$", BUILD, re.MULTILINE))
    assert copied == packages
