"""Build the image, start docker-compose.yml, and check that the deployment works as documented.

    python3 deploy/smoke.py [--only base] [--no-build] [--build-option=--network=host] [--keep]

The script needs only Docker with Compose and Python's standard library. It runs separate Compose projects on ports
18000 to 18003, so it does not affect other deployments on the same machine, and it removes the volumes of these
projects at the end. To add override files, set the environment variable COMPOSE_FILE, which Compose reads. The script
prints each step with the seconds since the start. The exit status is 1 if a check fails.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, Final

from smoke_published import check_published
from smoke_scale import check_monitoring, check_scale
from smoke_tools import IMAGE, Load, Project, computed, expect, noise, run, say, wait_until

PORT: Final = 18000


def check_container(project: Project) -> None:
    """Check that the container of the service is restricted as docker-compose.yml says."""
    status = project.inside("service", "python", "-c", "print(open('/proc/self/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    expect("the service does not run as root", fields["Uid"].split()[0] == "10001", f"uid {fields['Uid'].split()[0]}")
    expect("the service has no capabilities", int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0)
    expect("the service cannot gain privileges", fields["NoNewPrivs"] == "1")
    probe = "import sys\ntry: open('/opt/venv/x', 'w')\nexcept OSError as e: sys.exit(print(e.strerror))"
    expect(
        "the root file system of the service is read-only",
        "Read-only" in project.inside("service", "python", "-c", probe),
    )
    sizes = run("docker", "image", "inspect", "-f", "{{.Size}}", IMAGE)
    say(f"     the image has {int(sizes) / 1e6:.0f} MB")


def cache_is(project: Project, status: str) -> Callable[[], bool]:
    """Return a function that tells whether /readyz reports this status of the cache: "ok" or "degraded"."""
    return lambda: project.service.get("/readyz")["cache"]["status"].startswith(status)


def check_redis(project: Project, image: bytes) -> None:
    """Check the password of Redis. Stop Redis for five seconds and check that requests succeed the whole time."""
    expect("Redis requires a password", "NOAUTH" in project.inside("redis", "redis-cli", "ping"))
    password = project.inside("service", "cat", "/run/redis/password")
    expect("the password is random", len(password) == 44, f"{len(password)} characters, made at the first start")

    def embed() -> str:
        project.service.embed(image)
        return ""

    with Load().sending({"embed": embed}, pause_s=0.2) as load:
        project.compose("kill", "-s", "KILL", "redis")
        seconds = wait_until("the cache is degraded", cache_is(project, "degraded"))
        expect("without Redis, the cache is degraded and the service stays ready", True, f"after {seconds:.1f} s")
        time.sleep(5)
        during = len(load.sent)
        project.compose("start", "redis")
        seconds = wait_until("the cache is ok", cache_is(project, "ok"))
        expect("the service uses Redis again", True, f"{seconds:.1f} s after the start of Redis")
        time.sleep(2)
    counts = f"{len(load.sent)} sent, {during} while Redis was down"
    expect("no request failed during the outage", not load.failures(), counts)
    slowest = load.slowest_ms()
    expect("every request took less than 3 s", slowest < 3000, f"the slowest took {slowest:.0f} ms")
    expect("the service was not restarted", project.inspect("service", "{{.RestartCount}}") == "0")


def check_base(port: int, keep: bool) -> None:
    """Check the deployment that `docker compose up` starts: the service and Redis."""
    project = Project("dinov2-smoke", port)
    try:
        seconds = project.up()
        ready = project.service.get("/readyz")
        about = f"after {seconds:.1f} s, model {ready['model']}, cache {ready['cache']}"
        expect("the service is ready", ready["status"] == "ready", about)
        check_container(project)

        image = noise()
        first = project.service.embed(image)
        vector = first["data"][0]["embedding"]
        expect("the service embeds an image on the published port", computed(first), f"{len(vector)} numbers")
        again = project.service.embed(image)
        expect("the second response for the same image comes from the cache", not computed(again))
        check_redis(project, noise())

        project.service.embed(image)
        project.compose("restart", "redis", "service")
        project.up()
        again = project.service.embed(image)
        same = again["data"][0]["embedding"] == vector
        expect("after a restart of Redis and the service, the cached vector is there", not computed(again) and same)
        check_stop(project)
    finally:
        finish(project, keep)


def check_stop(project: Project) -> None:
    """Check that the service exits with status 0 after SIGTERM."""
    started = time.monotonic()
    project.compose("stop", "service")
    status = project.inspect("service", "{{.State.ExitCode}}")
    seconds = time.monotonic() - started
    expect("the service exits cleanly after SIGTERM", status == "0", f"{seconds:.1f} s, exit status {status}")


def finish(project: Project, keep: bool) -> None:
    """Remove a project, unless `keep` is true."""
    if not keep:
        project.remove()


def main() -> None:
    checks: dict[str, Callable[[int, bool], Any]] = {
        "base": check_base,
        "scale": check_scale,
        "published": check_published,
        "monitoring": check_monitoring,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=checks, action="append", help="run only these checks; repeatable")
    parser.add_argument("--no-build", action="store_true", help=f"use the existing image {IMAGE}")
    parser.add_argument("--build-option", action="append", default=[], help="option for docker build; repeatable")
    parser.add_argument("--keep", action="store_true", help="do not remove the containers and volumes at the end")
    options = parser.parse_args()
    if not options.no_build:
        run("docker", "build", "-q", "-t", IMAGE, *options.build_option, ".")
        say("the image is built")
    for name in options.only or checks:
        say(f"--- {name}")
        checks[name](PORT, options.keep)
    say("all checks passed")


if __name__ == "__main__":
    main()
