"""What Dockerfile and docker-compose.yml promise, read from the files: no Docker needed. deploy/smoke.py tries the same
promises on running containers.
"""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
SERVICES = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = {
    re.search(r" AS (\S+)", text)[1]: text for text in re.split(r"^(?=FROM )", DOCKERFILE, flags=re.MULTILINE)[1:]
}
TARGETS = ("serve", "serve-gpu", "train")
SERVING = ("service", "service-gpu", "replica")
"""The Compose services that answer requests."""
OURS = (*SERVING, "worker", "worker-gpu", "build-engine")


def variables(text: str) -> dict[str, str]:
    """Variables that Compose reads, with their defaults."""
    return dict(re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", text))


# docker-compose.yml


@pytest.mark.parametrize("name", SERVICES)
def test_containers_keep_only_what_they_need(name: str) -> None:
    container = SERVICES[name]
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["restart"] == ("no" if name == "build-engine" else "unless-stopped")
    assert container["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert container["mem_limit"]
    [tmpfs] = container["tmpfs"]
    assert re.fullmatch(r"/tmp:size=\d+[mg]", tmpfs)
    assert container["pids_limit"] >= (4096 if name in OURS else 512)
    assert container["ulimits"] == {"nofile": {"soft": 65536, "hard": 65536}}
    assert not {"privileged", "network_mode", "cap_add", "pid", "ipc"} & set(container)
    assert container.get("user") != "root"


def test_milvus_has_limits_too() -> None:
    milvus = yaml.safe_load((ROOT / "deploy" / "compose.milvus.yml").read_text())["services"]["milvus"]
    assert milvus["security_opt"] == ["no-new-privileges:true"]
    assert {"pids_limit", "ulimits", "mem_limit", "logging"} <= set(milvus)
    assert "ports" not in milvus


def test_without_a_profile_only_the_service_and_its_cache_start() -> None:
    assert {name for name, container in SERVICES.items() if "profiles" not in container} == {"service", "redis"}
    assert SERVICES["service"]["deploy"]["replicas"] == "${CPU_SERVICES:-1}"


def test_the_header_and_the_documentation_name_every_profile() -> None:
    profiles = {profile for container in SERVICES.values() for profile in container.get("profiles", [])}
    header = re.search(r"^# Profiles: (.+?)\. ", COMPOSE_TEXT, re.MULTILINE)[1]
    named = set(re.sub(r" \(.*?\)", "", header).split(", "))
    assert named == profiles - {"build-engine"} | {"cpu"}
    page = (ROOT / "docs" / "deployment.md").read_text()
    assert [profile for profile in sorted(profiles | {"cpu"}) if f"`{profile}`" not in page] == []


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"\$\{[A-Z0-9_]+_PUBLISH:-127\.0\.0\.1:(\d+)\}:\d+", port), port
    if name in SERVING:  # the service judges the published address, not the one that it listens on
        published = SERVICES[name].get("ports", SERVICES["proxy"]["ports"])[0].rpartition(":")[0]
        assert SERVICES[name]["environment"]["DINOV2_PUBLISH"] == published
        assert SERVICES[name]["environment"]["DINOV2_AUTH"] == "${DINOV2_AUTH:-auto}"
    assert ("ports" in SERVICES[name]) == (
        name in ("service", "service-gpu", "proxy", "prometheus", "grafana")
    )  # so neither Redis nor the worker


def test_only_our_containers_reach_redis() -> None:
    assert COMPOSE["networks"]["redis"] == {"internal": True}
    for name, container in SERVICES.items():
        reaches = "redis" in container.get("networks", [])
        assert reaches == (name in (*SERVING, "worker", "worker-gpu", "redis", "redis-jobs")), name
    for name in ("redis", "redis-jobs"):
        assert SERVICES[name]["networks"] == ["redis"]
        assert SERVICES[name]["user"] == "redis"


@pytest.mark.parametrize("name", [*SERVING, "worker", "worker-gpu"])
def test_our_containers_start_after_a_healthy_redis(name: str) -> None:
    assert SERVICES[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert SERVICES[name]["env_file"] == [{"path": "dinov2.env", "required": False}]


def test_the_password_of_redis_is_random_and_in_a_file() -> None:
    """The first start makes it. The containers of the service read it from Redis's volume and never write there."""
    [script] = SERVICES["redis"]["command"]
    assert "/dev/urandom" in script
    assert "requirepass" in script
    assert re.search(r"if \[ ! -s password \]; then", script)
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]
    for name in (*SERVING, "worker", "worker-gpu", "redis-jobs"):
        assert "redis:/run/redis:ro" in SERVICES[name]["volumes"]
    for name in (*SERVING, "worker", "worker-gpu"):
        given = SERVICES[name]["environment"]
        assert given["DINOV2_REDIS_URL"] == "redis://redis:6379/0"
        assert given["DINOV2_REDIS_PASSWORD_FILE"] == "/run/redis/password"


def test_no_password_is_in_the_files() -> None:
    for file in ("docker-compose.yml", ".env.example", "deploy/compose.milvus.yml", "deploy/kubernetes/redis.yaml"):
        lines = (ROOT / file).read_text().splitlines()
        found = [line for line in lines if re.search(r"(?i)(password|secret)\w*\s*[:=]\s*['\"]?\w", line)]
        assert [line for line in found if "/run/" not in line and "dinov2-redis" not in line] == []
    grafana = SERVICES["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert grafana["GF_AUTH_BASIC_ENABLED"] == "false"
    assert grafana["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"


def redis_options(name: str) -> dict[str, str]:
    [script] = SERVICES[name]["command"]
    return dict(re.findall(r"--([\w-]+) ([^\s\\]+)", script))


def test_the_two_redis_servers_have_opposite_policies() -> None:
    cache, jobs = redis_options("redis"), redis_options("redis-jobs")
    assert (cache["maxmemory-policy"], cache["appendonly"]) == ("allkeys-lru", "no")
    assert (jobs["maxmemory-policy"], jobs["appendonly"]) == ("noeviction", "yes")
    assert "JOBS_REDIS_URL=redis://redis-jobs:6379/0" not in COMPOSE_TEXT  # only with the profile rq
    assert SERVICES["service"]["environment"]["DINOV2_JOBS_REDIS_URL"] == "${DINOV2_JOBS_REDIS_URL:-}"
    assert SERVICES["redis-jobs"]["profiles"] == ["rq"]
    assert cache["stop-writes-on-bgsave-error"] == "no"  # a full disk must not stop the cache
    memory = {"512mb": 512, "256mb": 256, "1g": 1024, "512m": 512}
    for name, options in (("redis", cache), ("redis-jobs", jobs)):
        [within] = variables(options["maxmemory"]).values()
        [limit] = variables(SERVICES[name]["mem_limit"]).values()
        assert memory[within] * 2 <= memory[limit]
        assert "PONG" in SERVICES[name]["healthcheck"]["test"][1]  # redis-cli exits 0 on NOAUTH too


def test_the_grace_of_compose_covers_that_of_the_service() -> None:
    from service.settings import Settings

    grace_s = Settings.model_fields["shutdown_grace_s"].default
    for name in SERVING:
        # uvicorn's second, joining the batcher (5 s), closing
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > grace_s + 8
    assert int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) >= 60


def test_settings_in_compose_and_dockerfile_exist() -> None:
    from service.settings import READ_BY_COMPOSE, Settings

    known = {f"DINOV2_{name.upper()}" for name in Settings.model_fields}
    given = {name for name in SERVICES["service"]["environment"] if name.startswith("DINOV2_")}
    on_the_host = {name for name in variables(COMPOSE_TEXT) if name.startswith("DINOV2_")}
    assert on_the_host <= known | READ_BY_COMPOSE
    given |= set(re.findall(r"\b(DINOV2_\w+)=", STAGES["runtime"]))
    assert given - READ_BY_COMPOSE <= known
    assert {"DINOV2_HOST", "DINOV2_PORT", "DINOV2_DATA_DIR", "DINOV2_REDIS_URL"} <= given


def test_the_example_of_the_environment_explains_each_variable_with_its_default() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    shown: dict[str, set[str]] = {}
    for number, line in enumerate(lines):
        if match := re.fullmatch(r"#? ?([A-Z][A-Z0-9_]+)=(.*)", line):
            shown.setdefault(match[1], set()).add(match[2])
            assert lines[number - 1].startswith("#"), f"{match[1]} is not explained"
    read: dict[str, set[str]] = {}
    for name, default in re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", COMPOSE_TEXT):
        read.setdefault(name, set()).add(default)
    milvus = variables((ROOT / "deploy" / "compose.milvus.yml").read_text())
    assert set(shown) - {"COMPOSE_PROFILES", "COMPOSE_FILE"} == set(read) | set(milvus)
    for name, defaults in read.items():
        assert shown[name] & defaults, f"{name} is {defaults} in docker-compose.yml, {shown[name]} in .env.example"


def test_gpu_services_ask_for_one_gpu_and_only_in_their_profiles() -> None:
    gpus = {"service-gpu": "gpu", "worker-gpu": "train-gpu", "build-engine": "build-engine"}
    for name, container in SERVICES.items():
        devices = container.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        assert bool(devices) == (name in gpus)
        if devices:
            assert container["profiles"] == [gpus[name]]
            assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert SERVICES["service-gpu"]["healthcheck"] == {"start_period": "60m"}


def test_compose_builds_targets_and_arguments_that_exist() -> None:
    for name, target in (
        ("service", None),
        ("service-gpu", "serve-gpu"),
        ("worker", "train"),
        ("worker-gpu", "train"),
        ("build-engine", "serve-gpu"),
    ):
        build = SERVICES[name]["build"]
        assert build.get("target") == target
        arguments = {argument for text in STAGES.values() for argument in re.findall(r"^ARG (\w+)", text, re.MULTILINE)}
        assert set(build["args"]) <= arguments
    # The plan is built by the library that the service has.
    assert SERVICES["build-engine"]["build"]["args"]["TENSORRT"] == "${TENSORRT:-1}"
    assert "build" not in SERVICES["replica"]
    assert SERVICES["replica"]["image"] == SERVICES["service"]["image"]


def test_every_container_that_serves_is_found_by_the_proxy_and_shares_the_data() -> None:
    for name in SERVING:
        assert SERVICES[name]["networks"]["default"]["aliases"] == ["backend"]
    for name in (*SERVING, "worker", "worker-gpu"):
        assert "data:/data" in SERVICES[name]["volumes"]
    assert "http://backend:8000" in (ROOT / "deploy" / "proxy" / "scale.conf").read_text()
    assert set(COMPOSE["volumes"]) == {
        volume.partition(":")[0]
        for container in SERVICES.values()
        for volume in container.get("volumes", [])
        if not volume.startswith((".", "$"))
    } | {"images"}


def test_files_that_compose_mounts_exist() -> None:
    overlays = [COMPOSE, *(yaml.safe_load(path.read_text()) for path in (ROOT / "deploy").glob("compose.*.yml"))]
    for overlay in overlays:
        for container in overlay["services"].values():
            for volume in container.get("volumes", []):
                if volume.startswith("./"):
                    assert (ROOT / volume.partition(":")[0]).exists(), volume


def test_commands_of_containers_exist() -> None:
    from typer.main import get_command

    from cli import app

    commands = set(get_command(app).commands)
    named = {words[1] for name in OURS if (words := SERVICES[name].get("command"))}
    named |= {re.search(r'^CMD \["dinov2", "(\S+)"', STAGES["runtime"], re.MULTILINE)[1]}
    assert named <= commands
    assert SERVICES["worker"]["command"] == ["dinov2", "worker"]


# Dockerfile


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_is_not_root_and_has_its_own_packages(target: str) -> None:
    text = STAGES[target]
    assert text.startswith("FROM runtime AS")
    assert re.search(r"^USER (\d+):\1$", text, re.MULTILINE)
    [source] = re.findall(r"^COPY --from=(\S+) /opt/venv /opt/venv$", text, re.MULTILINE)
    assert source == {"serve": "venv", "serve-gpu": "venv-gpu", "train": "venv-train"}[target]
    assert "pip uninstall -y" in STAGES[source]


def test_the_default_target_serves_and_tells_its_health() -> None:
    assert list(STAGES)[-1] == "serve"
    # A first start downloads and exports a model, and compares each engine of a GPU with float32 on the CPU.
    assert re.search(r"^HEALTHCHECK .*--start-period=30m .*\n.*python.*/readyz", STAGES["runtime"], re.MULTILINE)
    assert "pip" not in STAGES["runtime"]
    assert "HEALTHCHECK" not in STAGES["serve"] + STAGES["serve-gpu"]
    assert re.search(r"^HEALTHCHECK NONE$", STAGES["train"], re.MULTILINE)  # a worker has no port
    assert re.search(r"apt-get install .*\bgcc\b.*libc6-dev", STAGES["train"])


@pytest.mark.parametrize("stage", ["packages-gpu", "packages-train"])
@pytest.mark.parametrize(
    ("value", "installed"), [("0", None), ("1", "tensorrt"), ("rtx", "tensorrt-rtx"), ("2", "an error")]
)
def test_tensorrt_is_a_build_argument(stage: str, value: str, installed: str | None) -> None:
    """Run the command of the Dockerfile with a pip that only prints its arguments."""
    command = re.search(r"^ARG TENSORRT=0\nRUN ((?:.*\\\n)*.*)$", STAGES[stage], re.MULTILINE)[1]
    shown = command.replace("/opt/venv/bin/pip", "echo")
    done = subprocess.run(["sh", "-c", shown], env={"TENSORRT": value}, capture_output=True, text=True, check=False)
    if installed == "an error":
        assert done.returncode == 1
        assert done.stderr == "TENSORRT must be 0, 1 or rtx, not 2\n"
        return
    assert done.returncode == 0
    words = done.stdout.split()
    assert ("https://pypi.nvidia.com" in words) == (value == "1")
    assert not any(word.startswith(".") for word in words)  # the extra would install ONNX Runtime for CPUs again
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [requirement.partition(";")[0] for requirement in extras[installed]] if installed else []
    assert [word for word in words if ">=" in word] == wanted


def test_gpu_images_get_the_drivers_cuda_library() -> None:
    for target in TARGETS:
        given = re.search(r"NVIDIA_DRIVER_CAPABILITIES=(\S+)", STAGES[target])
        assert (given and given[1]) == (None if target == "serve" else "compute,utility")


def test_tensorrt_comes_after_the_packages_that_every_gpu_image_has() -> None:
    for stage in ("packages-gpu", "packages-train"):
        text = STAGES[stage]
        assert text.index("--require-hashes") < text.index("ARG TENSORRT")  # so that its layer is reused
    assert "TENSORRT" not in STAGES["packages"]


def test_the_code_comes_after_the_dependencies() -> None:
    """A change of the code must not install the dependencies again."""
    for name, text in STAGES.items():
        copied = re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        if name == "packages":
            assert copied == ["pyproject.toml constraints.txt LICENSE ./", "hashes hashes"]
        else:
            assert bool(copied) == (name == "code")
        if name.startswith("packages-"):
            assert text.startswith("FROM packages AS")


def test_the_builder_of_docker_20_can_read_the_dockerfile() -> None:
    """No syntax line, here-document, mount or linked copy."""
    assert not re.search(r"# *syntax=|<<|--mount|--link|@sha256", DOCKERFILE)
    assert re.search(r"^ARG BASE_IMAGE=\S+-slim", DOCKERFILE, re.MULTILINE)
    for name, text in STAGES.items():
        base = re.match(r"FROM (\S+)", text)[1]
        assert base == "${BASE_IMAGE}" or base in list(STAGES)[: list(STAGES).index(name)]


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    copied = {
        path for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for path in line.split()[:-1]
    }
    assert copied == sent
    assert [path for path in sorted(copied) if not (ROOT / path).exists()] == []


def test_every_package_is_built_into_the_image() -> None:
    """The packages of pyproject.toml: first as empty folders, then as themselves.

    The only module beside them is that of torch hub, which the image does not need.
    """
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.rstrip("*") for pattern in found}
    assert [path.name for path in ROOT.glob("*.py")] == ["hubconf.py"]
    made = re.search(r"^RUN mkdir (.+?) &&", STAGES["packages"], re.MULTILINE)
    assert made
    assert set(made[1].split()) == packages
    copied = set(re.findall(r"^COPY (\w+) \1$", STAGES["code"], re.MULTILINE))
    assert copied == packages
