"""Tests of the view of jobs, with a worker of this process that runs jobs which the tests control."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.jobs.context import Context, JobFailed
from service.jobs.export import ExportParams
from service.jobs.kind import Kind
from service.jobs.store import JobStore
from service.jobs.worker import Worker
from service.settings import Settings
from tests.service.playground.conftest import watched_page
from tests.service.test_server import ROOT, Server

MARKUP = "<img src=x onerror=alert(1)>"


@dataclass
class Hand:
    """What the jobs wait for: a job named `slow` goes on when `gate` is set."""

    gate: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)

    def work(self, context: Context[ExportParams]) -> None:
        name = context.params.name or ""
        context.log(f"begin {name}")
        if name == "broken":
            raise JobFailed(f"{MARKUP} cannot be exported")
        context.step("first", lambda: {"images": 3, "note": MARKUP})
        if name == "asks":
            context.wait_for_approval("approval", f"use it? {MARKUP}")
        if name == "slow":
            context.report(0.25, f"a quarter {MARKUP}", {"loss": 7.125})
            while not self.gate.wait(0.05):
                context.check_cancelled()
            for number in range(3):
                context.log(f"line {number} {MARKUP}")
            context.report(0.75, "three quarters", {"loss": 3.5})
        context.step("second", lambda: "done")

    def run(self, data_dir: Path) -> None:
        kinds = {"export": Kind("export", ExportParams, self.work)}
        with Worker(JobStore(data_dir), Settings(data_dir=data_dir), kinds=kinds) as worker:
            while not self.stop.is_set():
                if not worker.run_next():
                    self.stop.wait(0.05)


@dataclass
class Place:
    server: Server
    api: httpx.Client
    hand: Hand

    def start(self, name: str) -> str:
        body = {"kind": "export", "source": "dinov2_vits14", "name": name}
        answer = self.api.post("/v1/jobs", json=body).raise_for_status().json()
        return str(answer["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.api.get(f"/v1/jobs/{job_id}").raise_for_status().json()
        return answer

    def wait(self, job_id: str, *states: str) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while (job := self.job(job_id))["state"] not in states:
            assert time.monotonic() < deadline, job
            time.sleep(0.05)
        return job


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    data_dir = tmp_path_factory.mktemp("jobs") / "data"
    (data_dir / "datasets" / "shop").mkdir(parents=True)
    server, hand = Server(data_dir, DINOV2_LOCAL_WORKER="false"), Hand()
    thread = threading.Thread(target=hand.run, args=(data_dir,))
    thread.start()
    try:
        with httpx.Client(base_url=server.url, timeout=60) as api:
            yield Place(server, api, hand)
    finally:
        hand.gate.set()
        hand.stop.set()
        thread.join()
        server.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def view(browser: Any, place: Place) -> AsyncIterator[Any]:
    """A page of the service with the worker."""
    place.hand.gate.clear()
    async with watched_page(browser, place.server.url) as page:
        yield page


async def shown(page: Any, selector: str, text: str) -> None:
    """Wait until an element contains a text."""
    await page.locator(selector).filter(has_text=text).first.wait_for()


async def test_a_job_is_followed_live_in_the_list(view: Any, place: Place) -> None:
    await view.goto("/#jobs")
    await shown(view, "#jobs-connection", "updated live")
    job = place.start("slow")
    row = f"#jobs tr[data-job='{job}']"
    await shown(view, row, "25 %")
    await shown(view, row, f"a quarter {MARKUP}")
    assert await view.locator("#jobs img").count() == 0
    assert await view.eval_on_selector(f"{row} progress", "one => one.value") == place.job(job)["progress"] == 0.25
    place.hand.gate.set()
    await shown(view, row, "succeeded")
    listed = [one["id"] for one in place.api.get("/v1/jobs").json()["data"]]
    assert await view.eval_on_selector_all("#jobs tbody tr", "all => all.map(one => one.dataset.job)") == listed
    await view.select_option("#jobs-state", "failed")
    await view.wait_for_function("() => !document.querySelector('#jobs tbody tr')")


async def test_an_open_job_shows_figures_steps_and_a_log_that_follows(view: Any, place: Place) -> None:
    job = place.start("slow")
    await view.goto(f"/#jobs?job={job}")
    await shown(view, "#job-progress", "25 %")
    await shown(view, "#job-figures", "7.125")
    await shown(view, "#job-steps", "first")
    await shown(view, "#log", "begin slow")
    place.hand.gate.set()
    await shown(view, "#job .state", "succeeded")
    await shown(view, "#log", f"line 2 {MARKUP}")
    await shown(view, "#job-steps", "second")
    answer = place.job(job)
    assert await view.locator("#job-steps > li").count() == len(answer["steps"]) == 2
    log = place.api.get(f"/v1/jobs/{job}/log").text
    await view.wait_for_function("text => document.getElementById('log').textContent === text", arg=log)
    assert await view.locator("main img").count() == 0


async def test_a_running_job_is_cancelled_retried_and_removed(view: Any, place: Place) -> None:
    job = place.start("slow")
    await view.goto(f"/#jobs?job={job}")
    await shown(view, "#job .state", "running")
    await view.get_by_role("button", name="Cancel", exact=True).click()
    await view.get_by_role("button", name="Cancel the job").click()
    await shown(view, "#job .state", "cancelled")
    assert place.job(job)["state"] == "cancelled"
    place.hand.gate.set()
    await view.get_by_role("button", name="Retry").click()
    await shown(view, "#job .state", "succeeded")
    assert place.job(job)["attempt"] == 2
    await view.get_by_role("button", name="Remove").click()
    await view.keyboard.press("Escape")
    assert place.job(job)["state"] == "succeeded"  # nothing happens without the confirmation
    await view.get_by_role("button", name="Remove").click()
    await view.get_by_role("button", name="Remove the job").click()
    await view.wait_for_selector("#jobs")
    assert place.api.get(f"/v1/jobs/{job}").status_code == 404


async def test_a_job_that_waits_is_approved(view: Any, place: Place) -> None:
    job = place.start("asks")
    await view.goto(f"/#jobs?job={job}")
    await shown(view, "#job .state", "waiting")
    await view.get_by_role("button", name="Approve").click()
    await shown(view, "dialog", MARKUP)
    await view.locator("dialog").get_by_role("button", name="Approve").click()
    await shown(view, "#job .state", "succeeded")


async def test_errors_with_markup_are_shown_as_text(view: Any, place: Place) -> None:
    job = place.start("broken")
    place.wait(job, "failed")
    await view.goto(f"/#jobs?job={job}")
    await shown(view, "#job-error", f"{MARKUP} cannot be exported")
    await view.goto("/#jobs")
    await shown(view, f"#jobs tr[data-job='{job}']", MARKUP)
    await view.goto("/#jobs?start=export")
    await view.fill("#job-source", MARKUP)
    await view.get_by_role("button", name="Start", exact=True).click()
    await shown(view, "#job-form [role='alert']", MARKUP)
    assert await view.locator("main img").count() == 0


async def test_the_form_has_the_parameters_of_every_kind(view: Any, place: Place) -> None:
    document = place.api.get("/openapi.json").json()
    schema = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    text = str(schema)
    names = re.findall(r"#/components/schemas/(\w+)", text)
    if len(names) == 1:
        names = re.findall(r"#/components/schemas/(\w+)", str(document["components"]["schemas"][names[0]]))
    await view.goto("/#jobs?start=retrain")
    await view.wait_for_selector("#job-form")
    kinds = await view.eval_on_selector_all("#job-kind option", "all => all.map(one => one.value)")
    assert len(kinds) == len(names) == 7
    for name in names:
        properties = document["components"]["schemas"][name]["properties"]
        await view.select_option("#job-kind", properties["kind"].get("const") or properties["kind"]["enum"][0])
        for parameter in properties:
            if parameter != "kind":
                assert await view.locator(f"#job-{parameter}").count() == 1, (name, parameter)


async def test_a_job_is_started_by_the_form(view: Any, place: Place) -> None:
    place.hand.gate.set()
    await view.goto("/#jobs?start=export&source=dinov2_vits14")
    await view.fill("#job-name", "by-hand")
    await view.fill("#job-sizes", "518\n224")
    await view.get_by_role("button", name="Start", exact=True).click()
    await view.wait_for_url("**/#jobs?job=*")
    job = place.job(view.url.partition("job=")[2])
    assert job["params"] == {"source": "dinov2_vits14", "name": "by-hand", "sizes": ["518", "224"]}
    await shown(view, "#job .state", "succeeded")


async def test_a_job_is_not_started_twice_while_it_is_checked(view: Any, place: Place) -> None:
    held: list[Any] = []
    await view.route("**/v1/jobs", lambda route: held.append(route))
    await view.goto("/#jobs?start=export&source=dinov2_vits14")
    await view.wait_for_selector("#job-form")
    before = len(held)
    start = view.get_by_role("button", name="Start", exact=True)
    await start.click()
    await shown(view, "#job-form", "The parameters are being checked")
    assert await start.is_disabled()
    await view.keyboard.press("Enter")
    assert len([route for route in held[before:] if route.request.method == "POST"]) == 1
    for route in held:
        await route.abort()
    await shown(view, "#job-form .error", "")
    assert await start.is_enabled()


async def test_a_schedule_is_created_and_removed(view: Any, place: Place) -> None:
    await view.goto("/#jobs?start=export&source=dinov2_vits14")
    await view.click("#job-form summary")
    await view.fill("#job-every", "sunday 03:00")
    await view.fill("#job-schedule", "weekly")
    await view.get_by_role("button", name="Start", exact=True).click()
    await shown(view, "#schedules tr[data-schedule='weekly']", "sunday 03:00 (UTC)")
    await shown(view, "#schedule-created", "The schedule weekly creates its next job at")
    [schedule] = place.api.get("/v1/schedules").json()["data"]
    assert (schedule["kind"], schedule["params"]) == ("export", {"source": "dinov2_vits14"})
    await view.get_by_role("button", name="Remove the schedule weekly").click()
    await view.get_by_role("dialog").get_by_role("button", name="Remove").click()
    await shown(view, "#schedules", "There are no schedules")
    assert place.api.get("/v1/schedules").json()["data"] == []


async def test_a_retraining_without_torch_is_explained(view: Any, place: Place) -> None:
    """The worker of this test runs exports only, as one without torch does."""
    await view.goto("/#jobs?start=retrain")
    await shown(view, "#job-needs", "needs a worker with torch")
    await view.fill("#job-data", "shop")
    await view.fill("#job-hours", "0.5")
    await view.check("#job-approve")
    await view.get_by_role("button", name="Start", exact=True).click()
    await shown(view, "#job-blocked", "which needs torch")
    await shown(view, "#job-blocked", "pip install -e '.[train]'")
    job = place.job(view.url.partition("job=")[2])
    assert job["params"] == {"data": "shop", "hours": 0.5, "approve": True} | job["params"]
    await shown(view, "#job-blocked", job["blocked"])
    await view.get_by_role("button", name="Cancel", exact=True).click()
    await view.get_by_role("button", name="Cancel the job").click()
    await shown(view, "#job .state", "cancelled")


async def test_the_stream_goes_on_after_an_interruption(view: Any, place: Place) -> None:
    """Requests for the stream fail twice. No event is missed, because the last number is sent."""
    numbers: list[str | None] = []

    async def fail(route: Any) -> None:
        numbers.append(route.request.headers.get("last-event-id"))
        if len(numbers) < 3:
            await route.abort()
        else:
            await route.continue_()

    await view.route("**/v1/jobs/events", fail)
    last = place.api.get("/v1/jobs").json()["last_event"]
    await view.goto("/#jobs")
    await shown(view, "#jobs-connection", "connecting again")
    place.hand.gate.set()
    job = place.start("slow")
    place.wait(job, "succeeded")
    await shown(view, "#jobs-connection", "updated live")
    await shown(view, f"#jobs tr[data-job='{job}']", "succeeded")
    assert [int(one) for one in numbers if one] == [last] * len(numbers)


def new_key(data_dir: Path) -> str:
    """Create an API key with the scope admin."""
    program = "import sys; from cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "keys", "create", "me", "--scopes=admin", f"--data-dir={data_dir}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.search(r"dv2_\w+", made.stdout)
    assert found, made.stdout
    return found[0]


async def test_a_key_is_asked_for_and_kept_in_the_session_only(browser: Any, tmp_path: Path) -> None:
    key = new_key(tmp_path / "data")
    server = Server(tmp_path / "data", DINOV2_AUTH="on", DINOV2_LOCAL_WORKER="false")
    try:
        async with watched_page(browser, server.url) as page:
            await page.goto("/#jobs")
            await shown(page, "main [role='alert']", "This service needs an API key")
            await page.locator("main").get_by_role("button", name="Enter an API key").first.click()
            await page.fill("#key-input", key)
            await page.keyboard.press("Enter")
            await shown(page, "main", "There are no jobs here")
            await shown(page, "#jobs-connection", "updated live")
            stored = await page.evaluate(
                "[Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
            )
            assert key in stored[0]
            assert key not in str(stored[1:])
            assert key not in await page.content()
            await page.goto("/#models")
            await page.wait_for_selector("#models article")
    finally:
        server.stop()
