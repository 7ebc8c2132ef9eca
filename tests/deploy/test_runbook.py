"""deploy/RUNBOOK.md: its links lead somewhere, it has a section for each alert, and its commands exist."""

import re
import shlex
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "deploy" / "RUNBOOK.md").read_text()
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


ANCHORS = [anchor(heading) for heading in re.findall(r"^#+ (.+)$", RUNBOOK, re.MULTILINE)]


def test_links_lead_somewhere() -> None:
    assert len(ANCHORS) == len(set(ANCHORS))
    for target in re.findall(r"\]\(([^)]+)\)", RUNBOOK):
        if target.startswith("#"):
            assert target[1:] in ANCHORS, target
        elif not target.startswith("https://"):
            assert (ROOT / "deploy" / target).resolve().is_file(), target


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    alerts = [rule for rule in rules if "alert" in rule]
    linked = [rule["annotations"]["runbook"].partition("#")[2] for rule in alerts]
    sections = [anchor(heading) for heading in re.findall(r"^## (.+)$", RUNBOOK.partition("\n# Alerts\n")[2], re.M)]
    assert sorted(linked) == sorted(sections)
    for rule, target in zip(alerts, linked, strict=True):
        assert re.sub(r"(?<!^)(?=[A-Z])", "-", rule["alert"]).lower() == target


def test_commands_exist() -> None:
    from typer.main import get_command

    from cli import app

    named = {tuple(shlex.split(text)[1:3]) for text in re.findall(r"dinov2 (?=[a-z])[a-z ]+", RUNBOOK)}
    commands = get_command(app).commands
    for words in named:
        assert words[0] in commands, words
        group = getattr(commands[words[0]], "commands", None)
        if group is not None and len(words) > 1:
            assert words[1] in group, words
