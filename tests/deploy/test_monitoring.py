"""Tests of the alerts, of the dashboard and of their metrics.

promtool, which belongs to Prometheus, runs the unit tests of the alerts. Where it is missing, those tests are skipped,
and the others still compare the files with each other and with /metrics.
"""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from service.telemetry import Metrics
from tests.fakes import running

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RUNBOOK = ROOT / "deploy" / "RUNBOOK.md"
UNIT_TESTS = ("alerts_test.yml", "alerts_days_test.yml")
PLANNED: dict[str, set[str]] = {}
"""Metrics that alerts and panels use and that the service does not have yet, with their labels. A test fails if the
service has one of them: remove it here then."""
PROMETHEUS_OWN = {"up", "ALERTS"}  # Prometheus itself makes these series
SCRAPE_LABELS = {"job", "instance", "le", "alertstate"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus, or https://prometheus.io"
)


def groups() -> list[dict[str, Any]]:
    content: dict[str, list[dict[str, Any]]] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    return content["groups"]


RULES = [rule for group in groups() for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}


def unit_tests() -> list[dict[str, Any]]:
    return [test for name in UNIT_TESTS for test in yaml.safe_load((PROMETHEUS / name).read_text())["tests"]]


def cases(alert: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the unit tests of an alert, each with its group of series."""
    return [(test, case) for test in unit_tests() for case in test["alert_rule_test"] if case["alertname"] == alert]


def dashboard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", GRAFANA / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def panels() -> list[dict[str, Any]]:
    content = json.loads((GRAFANA / "dinov2.json").read_text())
    return [panel for panel in content["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """Return every PromQL expression of the rules and of the dashboard, by where it is."""
    found = {f"rule {rule.get('alert') or rule['record']}": rule["expr"] for rule in RULES}
    content = json.loads((GRAFANA / "dinov2.json").read_text())
    found |= {f"annotation {one['name']}": one["expr"] for one in content["annotations"]["list"]}
    found |= {f"variable {one['name']}": one["query"]["query"] for one in content["templating"]["list"][1:]}
    for panel in panels():
        found |= {f"panel {panel['title']} {target['refId']}": target["expr"] for target in panel["targets"]}
    return found


def metrics_in(expr: str) -> set[str]:
    """Return the names of the metrics in a PromQL expression."""
    return set(re.findall(r"\b(?:dinov2|process|python)_\w+|\bdinov2:[\w:]+|\bup\b|\bALERTS\b", without_texts(expr)))


def without_texts(expr: str) -> str:
    """Return the expression without the values of its label matchers."""
    return re.sub(r'"[^"]*"', '""', expr)


def selectors(expr: str) -> list[tuple[str, set[str]]]:
    """Return each metric that the expression selects, with the labels that it matches."""
    found = re.findall(r"\b((?:dinov2|process)_\w+)\{([^}]*)\}", without_texts(expr))
    return [(name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))) for name, matchers in found]


def base(name: str) -> str:
    """Return the name of a metric without the suffix of a histogram's series."""
    return re.sub(r"_(bucket|sum|count)$", "", name)


def labels_of_metrics() -> dict[str, set[str]]:
    """Return the labels of each metric that the service declares."""
    labels = {}
    for collector in vars(Metrics()).values():
        if hasattr(collector, "_labelnames"):
            labels[collector._name + ("_total" if collector._type == "counter" else "")] = set(collector._labelnames)
    return labels


def kebab(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


@needs_promtool
def test_each_alert_fires_and_is_silent_as_its_unit_tests_say() -> None:
    result = subprocess.run(
        ["promtool", "test", "rules", *UNIT_TESTS],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("SUCCESS") + result.stderr.count("SUCCESS") == len(UNIT_TESTS)


@needs_promtool
def test_the_configuration_is_valid() -> None:
    subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=PROMETHEUS, capture_output=True, check=True)


@needs_promtool
def test_the_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    expressions = [expr for where, expr in queries().items() if not where.startswith(("rule", "variable"))]
    assert len(expressions) > 50
    filled = [expr.replace("$__rate_interval", "5m").replace("$instance", ".*") for expr in expressions]
    rules = [{"record": f"panel:query_{number}", "expr": expr} for number, expr in enumerate(filled)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    result = subprocess.run(
        ["promtool", "check", "rules", "panels.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_unit_tests_in_which_it_fires_and_in_which_it_is_silent(alert: str) -> None:
    firing = [case for _, case in cases(alert) if case["exp_alerts"]]
    silent = [(test, case) for test, case in cases(alert) if not case["exp_alerts"]]
    assert firing
    assert silent
    for case in firing:
        assert all(
            expected["exp_labels"]["severity"] == ALERTS[alert]["labels"]["severity"] for expected in case["exp_alerts"]
        )
    used = {base(name) for name in metrics_in(ALERTS[alert]["expr"])} - RECORDED
    for test, _ in silent:  # a silent test without the alert's series would prove nothing
        series = " ".join(one["series"] for one in test["input_series"])
        assert all(name in series for name in used)


def test_one_unit_test_is_a_healthy_service_and_covers_all_alerts() -> None:
    [healthy] = [test for test in unit_tests() if len(test["alert_rule_test"]) > 1]
    assert {case["alertname"] for case in healthy["alert_rule_test"]} == set(ALERTS)
    assert not any(case["exp_alerts"] for case in healthy["alert_rule_test"])


def test_each_recorded_rule_has_a_unit_test_of_its_value() -> None:
    expressions = " ".join(one["expr"] for test in unit_tests() for one in test.get("promql_expr_test", []))
    assert metrics_in(expressions) == RECORDED


def test_no_unit_test_is_about_an_alert_that_is_gone() -> None:
    assert {case["alertname"] for test in unit_tests() for case in test["alert_rule_test"]} == set(ALERTS)


def test_prometheus_stores_the_exemplars_that_panels_show() -> None:
    assert any(target.get("exemplar") for panel in panels() for target in panel["targets"])
    command = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["command"]
    assert "--enable-feature=exemplar-storage" in command


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_says_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"deploy/RUNBOOK.md#{kebab(alert)}"
    assert f"`{alert}`" in (ROOT / "docs" / "observability.md").read_text()


@pytest.mark.parametrize("alert", ALERTS)
def test_the_runbook_has_a_section_for_each_alert(alert: str) -> None:
    """A heading with the name of the alert, or with its words, gives the anchor."""
    text = RUNBOOK.read_text()
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)
    }
    anchors = headings | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    assert kebab(alert) in anchors


async def test_every_metric_of_alerts_and_panels_exists(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        text = (await run.client.get("/metrics")).text
    served = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    assert "dinov2_requests_total" in served
    known = served | set(PLANNED) | PROMETHEUS_OWN
    for where, expr in queries().items():
        names = metrics_in(expr)
        assert names, where
        missing = {name for name in names if ":" not in name and not {name, base(name)} & known}
        assert not missing, f"{where}: {missing}"
        assert {name for name in names if ":" in name} <= RECORDED, where
    stale = set(PLANNED) & served
    assert not stale, f"the service has {stale} now: remove them from PLANNED"
    used = {base(name) for expr in queries().values() for name in metrics_in(expr)}
    assert set(PLANNED) <= used


def test_every_label_that_a_query_matches_exists() -> None:
    labels = labels_of_metrics() | PLANNED
    checked = 0
    for where, expr in queries().items():
        for name, matched in selectors(expr):
            if name.startswith("dinov2_"):
                unknown = matched - labels[base(name)] - SCRAPE_LABELS
                assert not unknown, f"{where}: {name} has no label {unknown}"
                checked += 1
    assert checked > 50


def test_the_dashboard_is_what_its_script_writes() -> None:
    assert (GRAFANA / "dinov2.json").read_text() == dashboard().text()


def test_no_two_panels_overlap_and_all_have_queries() -> None:
    taken = set()
    for panel in panels():
        assert panel["title"]
        assert panel["targets"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    numbers = [panel["id"] for panel in panels()]
    assert len(set(numbers)) == len(numbers)


def test_what_grafana_loads_at_its_start() -> None:
    source = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "dinov2.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert provider["providers"][0]["options"]["path"] == "/etc/grafana/dinov2"


def test_the_names_of_metrics_are_found_in_expressions() -> None:
    """The helpers of these tests read PromQL with regular expressions."""
    expr = 'sum by (x) (rate(dinov2_a_bucket{le="1.0",y!="dinov2_text"}[5m])) / dinov2:b:rate5m * up{job="dinov2"}'
    assert metrics_in(expr) == {"dinov2_a_bucket", "dinov2:b:rate5m", "up"}
    assert selectors(expr) == [("dinov2_a_bucket", {"le", "y"})]
    assert kebab("ReplicaOnAnotherGeneration") == "replica-on-another-generation"
