"""Write the Grafana dashboard deploy/grafana/dinov2.json: `python deploy/grafana/dashboard.py`.

The dashboard is a list of rows, and each row has panels with PromQL queries. A test fails if the file differs from what
this script writes, or if a query names a metric that the service does not have. The script needs only Python.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

OUT = Path(__file__).with_name("dinov2.json")
COLUMNS = 24  # the width of Grafana's grid
HEIGHT = 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
I = 'instance=~"$instance"'  # noqa: E741  a matcher in most queries
V1 = f'{I},route=~"/v1/.*"'
OURS = f'{I},job="dinov2"'  # for metrics that other programs have too


class Query(NamedTuple):
    """One PromQL query. `legend` names its lines and may contain labels in double braces."""

    expr: str
    legend: str
    exemplars: bool = False


class Panel(NamedTuple):
    """One panel. `unit` is one of Grafana's units. `kind` is timeseries, stat or table."""

    title: str
    unit: str
    queries: list[Query]
    text: str = ""
    kind: str = "timeseries"
    stacked: bool = False


def one(
    title: str,
    unit: str,
    expr: str,
    legend: str = "",
    text: str = "",
    *,
    kind: str = "timeseries",
    stacked: bool = False,
) -> Panel:
    """Return a panel with one query."""
    return Panel(title, unit, [Query(expr, legend)], text, kind, stacked)


def rate(name: str, by: str, matcher: str = I) -> str:
    """Return a query for the rate of a counter, for each value of the label `by`."""
    return f"sum by ({by}) (rate({name}{{{matcher}}}[$__rate_interval]))"


def mean(name: str, by: str) -> str:
    """Return a query for the mean of a histogram's observations, for each value of the label `by`."""
    return f"{rate(f'{name}_sum', by)} / {rate(f'{name}_count', by)}"


def quantile(share: float, name: str, by: str, matcher: str = I) -> str:
    """Return a query for a quantile of a histogram, for each value of the label `by`."""
    return f"histogram_quantile({share}, sum by ({by}, le) (rate({name}_bucket{{{matcher}}}[$__rate_interval])))"


def latency(share: float) -> Panel:
    """Return a panel with a quantile of the duration of requests, for each route."""
    query = Query(quantile(share, "dinov2_request_duration_seconds", "route", V1), "{{route}}", exemplars=share == 0.99)
    text = f"{share:.0%} of the requests were answered within this time."
    text += " A dot is a traced request." if query.exemplars else ""
    return Panel(f"Latency p{share * 100:.0f} by route", "s", [query], text)


ROWS: dict[str, list[Panel]] = {
    "Overview": [
        one(
            "Availability, last hour",
            "percentunit",
            "1 - (dinov2:error_ratio:rate1h or vector(0))",
            text="Accepted requests to /v1/ that did not fail with a status of 500 or above. The objective is 99.9 %.",
            kind="stat",
        ),
        one(
            "Fast enough, last hour",
            "percentunit",
            "1 - dinov2:slow_ratio:rate1h",
            "{{route}}",
            "Share of the requests within the objective: /v1/embeddings 1 s, searches 0.25 s. The objective is 99 %.",
            kind="stat",
        ),
        one("Requests per second", "reqps", f"sum(rate(dinov2_requests_total{{{V1}}}[5m]))", kind="stat"),
        one("Alerts that fire", "none", 'count(ALERTS{alertstate="firing"}) or vector(0)', kind="stat"),
    ],
    "Traffic": [
        one("Requests by route", "reqps", rate("dinov2_requests_total", "route", V1), "{{route}}", stacked=True),
        one("Requests by status", "reqps", rate("dinov2_requests_total", "status", V1), "{{status}}", stacked=True),
        one("Bytes received", "Bps", rate("dinov2_request_bytes_total", "route"), "{{route}}", stacked=True),
        one("Requests in flight", "none", f"dinov2_requests_in_flight{{{I}}}", "{{instance}}"),
    ],
    "Errors": [
        one(
            "Requests that failed, by code",
            "reqps",
            rate("dinov2_request_errors_total", "code"),
            "{{code}}",
            "docs/errors.md explains the codes. The access log has the message of each error.",
            stacked=True,
        ),
        one(
            "Images that failed, by code",
            "ops",
            rate("dinov2_failed_images_total", "code"),
            "{{code}}",
            "Images of requests that failed, and of requests that were answered for their other images.",
            stacked=True,
        ),
        Panel(
            "Engine",
            "none",
            [
                Query(rate("dinov2_engine_errors_total", "instance"), "errors per second {{instance}}"),
                Query(f"dinov2_engine_up{{{I}}}", "up {{instance}}"),
            ],
            "Forward passes that failed, and whether the thread that runs the network works.",
        ),
    ],
    "Latency": [latency(0.5), latency(0.95), latency(0.99)],
    "Stages": [
        one(
            "Stages p95",
            "s",
            quantile(0.95, "dinov2_stage_duration_seconds", "stage"),
            "{{stage}}",
            "Time that one image spends in each stage.",
        ),
        one(
            "Mean time by stage",
            "s",
            mean("dinov2_stage_duration_seconds", "stage"),
            "{{stage}}",
            "The sum is the mean time of an image.",
            stacked=True,
        ),
        Panel(
            "Decoding",
            "percentunit",
            [
                Query("dinov2:decode_share:rate5m", "share"),
                Query(f"dinov2:decode_busy:rate5m{{{I}}}", "busy {{instance}}"),
            ],
            "The share of the working time that is spent on decoding, and how busy the decoding threads are. At 100 %, "
            "give the service more CPUs.",
        ),
    ],
    "Batches and queue": [
        one("Images per second", "none", rate("dinov2_images_total", "instance"), "{{instance}}"),
        one("Images per forward pass", "none", mean("dinov2_batch_images", "instance"), "{{instance}}"),
        one(
            "Batch fill",
            "percentunit",
            mean("dinov2_batch_fill_ratio", "instance"),
            "{{instance}}",
            "Mean share of the largest batch (DINOV2_BATCH_MAX_PATCHES, or as measured at the start).",
        ),
        one(
            "Queue age",
            "s",
            f"dinov2_queue_oldest_seconds{{{I}}}",
            "{{instance}}",
            "How long the oldest image has waited for the engine.",
        ),
        Panel(
            "Queue",
            "none",
            [
                Query(f"dinov2_queue_images{{{I}}}", "images {{instance}}"),
                Query(f"max(dinov2_queue_images_limit{{{I}}})", "limit"),
                Query(f"dinov2_queue_patches{{{I}}}", "patches {{instance}}"),
            ],
            "Images that are accepted and not yet answered, and their limit; patches that wait for the engine.",
        ),
        Panel(
            "Spared and lost work",
            "ops",
            [
                Query(rate("dinov2_coalesced_images_total", "job"), "shared"),
                Query(rate("dinov2_dropped_images_total", "job"), "client left"),
            ],
            "Images that shared the computation of an identical image, and images whose clients left.",
        ),
    ],
    "Cache": [
        one(
            "Hit ratio by layer",
            "percentunit",
            f"{rate('dinov2_cache_hits_total', 'layer')} / "
            f"({rate('dinov2_cache_hits_total', 'layer')} + {rate('dinov2_cache_misses_total', 'layer')})",
            "{{layer}}",
        ),
        Panel(
            "Look-ups by layer",
            "ops",
            [
                Query(rate("dinov2_cache_hits_total", "layer"), "hits {{layer}}"),
                Query(rate("dinov2_cache_misses_total", "layer"), "misses {{layer}}"),
            ],
        ),
        Panel(
            "Redis",
            "none",
            [
                Query(f"dinov2_cache_up{{{I}}}", "up {{instance}}"),
                Query(rate("dinov2_cache_events_total", "event"), "{{event}}"),
            ],
            "Whether the cache works, and its events per second.",
        ),
    ],
    "Limits": [
        one(
            "Requests over a limit",
            "reqps",
            rate("dinov2_rate_limited_requests_total", "reason"),
            "{{reason}}",
            "Requests that a rate limit refused.",
            stacked=True,
        ),
        one(
            "Pixels by client",
            "none",
            rate("dinov2_rate_limit_pixels_total", "client"),
            "{{client}}",
            "Pixels per second that the rate limits charged to each API key.",
            stacked=True,
        ),
        Panel(
            "Limits in Redis",
            "none",
            [
                Query(f"dinov2_rate_limit_degraded{{{I}}}", "Redis failed {{instance}}"),
                Query(rate("dinov2_rate_limit_redis_events_total", "event"), "{{event}}"),
            ],
            "1 if Redis has failed, so the replica limits its clients alone; and events per second.",
        ),
        one("URLs of images", "ops", rate("dinov2_image_urls_total", "result"), "{{result}}", stacked=True),
    ],
    "Collections": [
        one("Items", "none", "max by (collection) (dinov2_collection_items)", "{{collection}}"),
        Panel(
            "Disk space",
            "bytes",
            [
                Query("max by (collection) (dinov2_collection_disk_bytes)", "{{collection}}"),
                Query("max by (part) (dinov2_store_disk_bytes)", "{{part}}"),
            ],
            "Vectors and segments of each collection, and the parts of the store that they share.",
        ),
        one(
            "Recall",
            "percentunit",
            "min by (collection) (dinov2_index_recall_ratio)",
            "{{collection}}",
            "Share of the true ten nearest items that sampled searches found.",
        ),
    ],
    "Model and migration": [
        one("Models", "none", f"dinov2_model_info{{{I}}}", text="The models of each replica.", kind="table"),
        one("Live generation", "none", f"dinov2_generation{{{I}}}", "{{instance}}", "All replicas should agree."),
        one(
            "Migration",
            "none",
            "max(dinov2_migration_pending_items)",
            "pending",
            "Items that wait for a vector of the new model.",
        ),
        Panel(
            "Not searchable",
            "none",
            [
                Query("max by (collection) (dinov2_items_without_live_vector)", "items of {{collection}}"),
                Query("max(dinov2_unsearchable_collections)", "collections"),
            ],
            "Items without a vector of the live model, and collections of a model that is not loaded.",
        ),
    ],
    "Jobs": [
        one("Jobs by state", "none", "max by (state) (dinov2_jobs)", "{{state}}"),
        one("Time since progress", "s", "max(dinov2_job_seconds_since_progress)", "slowest job"),
        one("Time since a worker reported", "s", "max(dinov2_worker_heartbeat_age_seconds)", "oldest report"),
    ],
    "Host": [
        one("Memory of the process", "bytes", f"process_resident_memory_bytes{{{OURS}}}", "{{instance}}"),
        one("CPUs in use", "none", f"rate(process_cpu_seconds_total{{{OURS}}}[$__rate_interval])", "{{instance}}"),
        Panel(
            "Disk of the data folder",
            "bytes",
            [
                Query(f"dinov2_data_dir_free_bytes{{{I}}}", "free {{instance}}"),
                Query(f"dinov2_data_dir_size_bytes{{{I}}}", "size {{instance}}"),
            ],
        ),
        one("Up for", "s", f"time() - process_start_time_seconds{{{OURS}}}", "{{instance}}", kind="stat"),
        one("Last backup", "s", "time() - max(dinov2_last_backup_timestamp_seconds > 0)", "ago", kind="stat"),
        one("Versions", "none", f"dinov2_build_info{{{I}}}", kind="table"),
        one(
            "Spans",
            "ops",
            rate("dinov2_trace_spans_total", "result"),
            "{{result}}",
            "Spans that were sent to the collector, and spans that were lost.",
        ),
    ],
}


def panel_json(panel: Panel, number: int, x: int, y: int, width: int) -> dict[str, Any]:
    """Return a panel as Grafana stores it."""
    is_table = panel.kind == "table"
    targets = [
        {
            "datasource": SOURCE,
            "refId": chr(ord("A") + index),
            "expr": query.expr,
            "legendFormat": query.legend,
            "exemplar": query.exemplars,
            **({"instant": True, "format": "table"} if is_table else {}),
        }
        for index, query in enumerate(panel.queries)
    ]
    custom: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {"fillOpacity": 20 if panel.stacked else 0, "showPoints": "never", "spanNulls": False}
        custom["stacking"] = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        options = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "none"}
    hidden = {"Time": True, "Value": True, "__name__": True, "job": True}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": HEIGHT},
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": options,
        "transformations": [{"id": "organize", "options": {"excludeByName": hidden}}] if is_table else [],
    }


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana stores it. The panels of a row have the same width, at most four in a line."""
    panels: list[dict[str, Any]] = []
    y, number = 0, 1
    for title, row in ROWS.items():
        head = {"id": number, "type": "row", "title": title, "collapsed": False, "panels": []}
        panels.append(head | {"gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}})
        y, number = y + 1, number + 1
        lines = -(-len(row) // 4)
        in_line = -(-len(row) // lines)
        for position, panel in enumerate(row):
            x, width = position % in_line * (COLUMNS // in_line), COLUMNS // in_line
            panels.append(panel_json(panel, number, x, y + position // in_line * HEIGHT, width))
            number += 1
        y += lines * HEIGHT
    return {
        "uid": "dinov2",
        "title": "dinov2-service",
        "tags": ["dinov2"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "templating": {"list": [_source_variable(), _instance_variable()]},
        "annotations": {"list": [_restarts()]},
        "panels": panels,
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _instance_variable() -> dict[str, Any]:
    query = "label_values(dinov2_build_info, instance)"
    return {
        "name": "instance",
        "label": "Replica",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "instances"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _restarts() -> dict[str, Any]:
    """Return the annotation that marks each change of the live model."""
    return {
        "name": "New live model",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "purple",
        "expr": "changes(max(dinov2_generation)[1m:15s]) > 0",
        "titleFormat": "New live model",
    }


def text() -> str:
    """Return the content of dinov2.json."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    OUT.write_text(text())
