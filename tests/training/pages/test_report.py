"""The report of a run and its charts: everything that is there is shown, nothing that is missing hurts."""

import base64
import io
import json
import re
import shutil
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from model.checkpoint import save_checkpoint
from model.vit import DinoVisionTransformer
from tests.training.pages.checker import Checker
from training.config import TrainConfig
from training.pages import charts
from training.pages.charts import Series, line_chart, tick_label, ticks
from training.pages.report import write_report

EVALUATED = [
    {"step": 10, "knn_cls_10": 0.3, "view_certainty": 0.31, "held_out_rankme_share": 0.4, "held_out_loss": 0.9},
    {"step": 20, "knn_cls_10": 0.4, "view_certainty": 0.29, "held_out_rankme_share": 0.5, "held_out_loss": 0.8},
]
NASTY = "<script>alert('x')</script>&\""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run's folder with everything in it, and hostile names."""
    out = tmp_path_factory.mktemp("runs") / "groceries"
    out.mkdir()
    vit = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 28}
    config = TrainConfig(data=f"/photos/{NASTY}", out=out, recipe="smoke", vit=vit, lr=0.0123, n_prototypes=64)
    (out / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    with (out / "metrics.jsonl").open("w") as file:
        for step in range(1, 31):
            line = {"step": step, "loss": 5 - step / 10, "dino": 4 - step / 20, "ibot": None if step == 7 else 3.0}
            line |= {"dino_over_ln_k": 0.9, "teacher_entropy": 2.0, "lr": 1e-3, "grad_norm_backbone": 0.5}
            line |= {"images_per_s": 100.0 + step, "mfu": 0.41, "data_wait_share": 0.02, "seconds": 20.0}
            line |= {"peak_memory_bytes": 3 * 2**30, "time": 1.8e9 + 20 * step}
            file.write(json.dumps(line) + "\n")
        file.write('{"step": 31, "lo')
    (out / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in EVALUATED))
    events = [{"step": i, "kind": "warning", "message": f"event {i} {NASTY}"} for i in range(25)]
    (out / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (out / "knn.json").write_text(
        json.dumps({"cls": {"1": 0.5, "10": 0.575, "20": 0.625}, "mean": {"1": 0.25, "20": None}})
    )
    (out / "skipped.txt").write_text("".join(f"{i}{NASTY}.jpg: OSError: broken\n" for i in range(12)))
    (out / "sheets").mkdir()
    Image.new("RGB", (20, 10), "red").save(out / "sheets" / "step_00000010.png")
    Image.new("RGB", (2800, 1400), "blue").save(out / "sheets" / "step_00000020.png")
    backbone = DinoVisionTransformer(config.vit_config)
    facts = {"photos": 2640, "revision": "abc123", "hardware": "NVIDIA H100", "torch": "2.13", "data_sha256": "f" * 64}
    facts["measure"] = {"view_certainty": 0.31}
    save_checkpoint(out / "checkpoint.safetensors", backbone.state_dict(), config.vit_config, facts)
    return out


def test_the_page_says_what_was_run_and_what_came_out(whole_run):
    page = write_report(whole_run).read_text()
    checked = Checker(page)
    for words in (
        *(
            "Training: smoke",
            "dinov2_vitt14 (embed_dim 16",
            "62.5%",
            "57.5%10-NN, released checkpoint",
            "31.0%view_certainty, best",
            "2,640",
            "10 min",
            "115",
            "images/s",
        ),
        *("41.0%", "2.0%", "3.00 GiB", "k = 20", "25.0%", "abc123", "NVIDIA H100", "0.0123", "0.004"),
        *(
            "12 files could not be read",
            "event 24",
            "5 earlier events",
            "dinov2 export",
            "checkpoint.safetensors   # then: dinov2 serve",
        ),
    ):
        assert words in checked.text, words
    assert "event 4 " not in checked.text
    assert "koleo_weight" not in checked.text  # as the default
    assert checked.text.count("OSError: broken") == 10


def test_nothing_from_outside_becomes_part_of_the_page(whole_run):
    page = write_report(whole_run).read_text()
    tags = {tag for tag, _ in Checker(page).tags}
    assert "script" not in tags
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # it stands by itself
    assert not re.search(r"url\(|@import|https?://", page)


def test_all_curves_are_there_and_are_well_formed(whole_run):
    page = write_report(whole_run).read_text()
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(found) == 11
    for svg in found:
        ElementTree.fromstring(svg)
    titles = re.findall(r'aria-label="(.*?)"', page)
    assert titles[:3] == ["Losses", "DINO loss and ln K", "k-NN during the run"]


def test_the_last_sheet_is_in_it_and_small(whole_run):
    page = write_report(whole_run).read_text()
    [image] = [attributes for tag, attributes in Checker(page).tags if tag == "img"]
    picture = Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))))
    assert picture.size == (1400, 700)
    assert picture.getpixel((5, 5))[2] > 200
    assert "00000020" in image["alt"]


@pytest.mark.parametrize(
    "missing",
    [
        *("config.json", "metrics.jsonl", "evaluations.jsonl", "events.jsonl", "knn.json", "skipped.txt"),
        *("sheets", "checkpoint.safetensors"),
    ],
)
def test_what_is_missing_or_damaged_is_left_out(whole_run, tmp_path, missing):
    out = shutil.copytree(whole_run, tmp_path / "run")
    damaged = out / missing
    if damaged.is_dir():
        (damaged / "step_99999999.png").write_bytes(b"no picture")
    else:
        damaged.write_bytes(b"\xff\x00 nothing of the kind")
    Checker(write_report(out).read_text())
    shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
    page = Checker(write_report(out).read_text()).text
    assert "Training:" in page
    assert ("dinov2 export" in page) == (missing != "checkpoint.safetensors")


def test_values_of_odd_types_do_no_harm(tmp_path):
    odd = {"vit": ["none"], "n_prototypes": "many", "recipe": ["x"], "unknown_setting": {"a": 1}}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    lines = [{"step": "one", "loss": 1}, {"step": 2, "loss": "low", "time": 1e30}, {"step": 3, "loss": True}, {"x": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "knn.json").write_text('{"cls": {"1": "good"}, "mean": 3}')
    assert "unknown_setting" in Checker(write_report(tmp_path).read_text()).text


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run's folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_chart_draws_its_points_where_they_belong():
    svg = line_chart(
        [
            Series("a & b", [(0, 0.0), (50, None), (60, float("nan")), (100, 10.0)]),
            Series("c", [(0, 10.0), (100, 0.0)]),
        ],
        title="<t>",
        y_label="y",
        mark=(10.0, "top"),
        floor=0,
    )
    tree = ElementTree.fromstring(re.search(r"<svg.*</svg>", svg, re.DOTALL).group())
    first, second = [p.get("d") for p in tree.iter("path") if "stroke" in (p.get("style") or "")]
    bottom, left, right = charts.HEIGHT - charts.BOTTOM, charts.LEFT, charts.WIDTH - charts.RIGHT
    inner = bottom - charts.TOP
    top = bottom - inner * 10 / 10.5  # 5 % of air above
    assert first == f"M{left:.1f} {bottom:.1f}M{right:.1f} {top:.1f}"  # a gap, no line over what is missing
    assert second == f"M{left:.1f} {top:.1f}L{right:.1f} {bottom:.1f}"
    assert "&lt;t&gt;" in svg
    assert "a &amp; b" in svg


@pytest.mark.parametrize(
    "points",
    [[(5, 3.0)], [(1, 2.0), (2, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -1e9), (2, 1e9)], [(1, 1e-7), (2, 2e-7)]],
    ids=str,
)
def test_charts_of_few_equal_or_extreme_values(points):
    svg = line_chart([Series("x", points)], title="t", floor=0)
    numbers = [float(n) for n in re.findall(r'c[xy]="(.*?)"', svg)]
    assert numbers
    assert all(0 <= n <= charts.WIDTH for n in numbers)


def test_a_chart_of_nothing_is_nothing():
    assert line_chart([], title="t") == ""
    assert line_chart([Series("x", [(1, None), (2, float("inf"))])], title="t") == ""


def test_a_long_run_makes_no_long_page():
    points = [(step, torch.rand(()).item()) for step in range(100_000)]
    svg = line_chart([Series("x", points)], title="t")
    assert len(svg) < 40_000
    assert f"{charts.WIDTH - charts.RIGHT:.1f}" in svg  # the last point is there


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.5, 10.5, [2, 4, 6, 8, 10]),
        (-3, 3, [-2, 0, 2]),
        (0, 2460, [0, 500, 1000, 1500, 2000]),
        (1, 1, [1]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, "0"), (0.05, "0.05"), (1200, "1,200"), (25_000, "25k"), (3_000_000, "3M"), (2e-6, "2e-6"), (-0.3, "-0.3")],
)
def test_tick_labels_are_short(value, label):
    assert tick_label(value) == label
