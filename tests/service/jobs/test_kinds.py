"""Tests of the kinds of jobs: what they may read, which commands they run, and what they report."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

import service.jobs.curate as curate_job
from service.errors import InvalidRequest
from service.jobs.context import ChildFailed, Context, Hold, JobFailed
from service.jobs.evaluate import PATHS, EvaluateParams
from service.jobs.kinds import KINDS, accepted_params, checked_params
from service.jobs.records import Job, NewJob
from service.jobs.roots import data_source, model_source
from service.jobs.store import JobStore
from service.jobs.train import MODELS, REFUSED, last_line, phase_of, progress_of
from service.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A data folder with a data set, an artifact and a run, and secrets beside it."""
    for folder in ("data/datasets/shop", "data/artifacts/mine-12345678", "data/jobs/train-0123456789/run", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    return Settings(data_dir=tmp_path / "data")


def test_data_below_the_root_is_allowed(tmp_path: Path, settings: Settings) -> None:
    shop = str(tmp_path / "data/datasets/shop")
    for text in (shop, "shop", "./shop/", f"{shop}/../shop", "shop/../shop"):
        assert data_source(text, settings) == shop
    assert data_source("shop/a-{000..123}.tar", settings) == f"{shop}/a-{{000..123}}.tar"
    assert data_source("shop/a-*.tar", settings) == f"{shop}/a-*.tar"
    assert data_source("not-there-yet", settings) == str(tmp_path / "data/datasets/not-there-yet")


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "data/datasets/set [1]").mkdir()
    (tmp_path / "data/datasets/link [1]").symlink_to(tmp_path / "secret")
    assert data_source("set [1]", settings) == str(tmp_path / "data/datasets/set [1]")
    with pytest.raises(ValueError, match="is not below"):
        data_source("link [1]", settings)


@pytest.mark.parametrize(
    "text",
    [
        "/etc",
        "../secret",
        "shop/../../../secret",
        "link",
        "link/deeper",
        "link/a-{00..12}.tar",
        "shop/../../secret/*.tar",
        "{shop,link}/a.tar",
        "*/a.tar",
        "shop/{a,../../x}.tar",
        "shop/..*",
        "",
        "a\0b",
        "file:///etc",
        "s3://bucket/images",
        "http://169.254.169.254/latest",
        "FILE:/etc",
        "simplecache::file:///etc",
    ],
)
def test_other_data_is_refused(tmp_path: Path, settings: Settings, text: str) -> None:
    (tmp_path / "data/datasets/link").symlink_to(tmp_path / "secret")
    (tmp_path / "secret/deeper").mkdir()
    with pytest.raises(ValueError, match=r"is not below|only the last part|is not a path"):
        data_source(text, settings)


@pytest.mark.parametrize("text", ["x" * 5000, "x" * 256, "a/" * 3000])
@pytest.mark.parametrize("read", [data_source, model_source])
def test_a_path_that_is_too_long_is_refused(
    settings: Settings, text: str, read: Callable[[str, Settings], str]
) -> None:
    with pytest.raises(ValueError, match="too long for a path"):
        read(text, settings)


def test_the_message_does_not_tell_whether_a_path_exists(tmp_path: Path, settings: Settings) -> None:
    messages = []
    for name in ("secret", "nothing"):
        with pytest.raises(ValueError, match="is not below") as caught:
            data_source(str(tmp_path / name), settings)
        messages.append(str(caught.value).replace(name, "X"))
    assert messages[0] == messages[1]


def test_roots_are_folders_and_urls(tmp_path: Path) -> None:
    roots = f"{tmp_path}/other, s3://bucket/images ,"
    settings = Settings(data_dir=tmp_path, job_roots=roots)
    (tmp_path / "real").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "real")
    assert data_source(f"{tmp_path}/other/x", settings) == f"{tmp_path}/real/x"
    assert data_source("s3://bucket/images/a-{00..12}.tar", settings) == "s3://bucket/images/a-{00..12}.tar"
    for text in (
        *("s3://bucket/images2/a.tar", "s3://bucket/images/../secret/a.tar", "s3://bucket/images/%2e%2e/a.tar"),
        *("s3://other/images/a.tar", "s3://bucket/images/x::file:///etc", f"{tmp_path}/datasets"),
    ):
        with pytest.raises(ValueError, match="is not below"):
            data_source(text, settings)


def test_models(tmp_path: Path, settings: Settings) -> None:
    data = tmp_path / "data"
    (data / "datasets/best.safetensors").touch()
    (data / "artifacts/link").symlink_to(tmp_path / "secret")
    assert model_source("dinov2_vits14_reg", settings) == "dinov2_vits14_reg"
    assert model_source("mine-12345678", settings) == str(data / "artifacts/mine-12345678")
    assert model_source("train-0123456789", settings) == str(data / "jobs/train-0123456789/run")
    assert model_source(f"{data}/jobs/train-0123456789/run", settings) == str(data / "jobs/train-0123456789/run")
    assert model_source("best.safetensors", settings) == str(data / "datasets/best.safetensors")
    outside = ("/etc/passwd", "link", "../../secret", f"{tmp_path}/secret", "s3://bucket/model")
    for text in (*outside, "none", "jobs.sqlite3"):
        with pytest.raises(ValueError, match="is neither a published model"):
            model_source(text, settings)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["out=/tmp/x"], "a job cannot set out: the run is stored in the job's folder"),
        (["mlflow=http://10.0.0.1"], "a job cannot set mlflow: a job does not send metrics to other machines"),
        (["init=/etc/passwd"], "is neither a published model"),
        (['teacher="/etc/passwd"'], "is neither a published model"),
        (["init='a\"b'"], "must not contain quotes"),
        (["--out=/tmp/x"], "must match the pattern"),
        (["epochs"], "must match the pattern"),
    ],
)
def test_settings_of_training_that_a_job_cannot_set(settings: Settings, overrides: list[str], error: str) -> None:
    with pytest.raises(InvalidRequest, match=error):
        checked_params("train", {"data": "shop", "recipe": "smoke", "overrides": overrides}, settings)


def test_a_recipe_is_a_name(settings: Settings) -> None:
    for recipe in ("../x", "mine.toml", "/etc/x.toml", "--help"):
        with pytest.raises(InvalidRequest, match="recipe"):
            checked_params("train", {"data": ["shop"], "recipe": recipe}, settings)


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"recipe": "continu"}, r"unknown recipe 'continu': .*continue, .*smoke"),
        ({"recipe": "continue"}, "the recipe continue needs init"),
        ({"recipe": "smoke", "overrides": ["epoch=3"]}, "unknown setting 'epoch': did you mean epochs"),
        ({"recipe": "smoke", "overrides": ["epochs=3", "flip=1.5"]}, "flip=1.5: must be at most 1"),
        ({"recipe": "smoke", "overrides": ["epochs=3"], "hours": 2}, "--hours 2 and epochs contradict each other"),
    ],
)
def test_a_training_that_could_not_start_is_refused_at_once(
    settings: Settings, params: dict[str, Any], error: str
) -> None:
    with pytest.raises(InvalidRequest, match=error):
        accepted_params("train", {"data": ["shop"], **params}, settings)


def test_the_settings_of_a_training_are_checked_without_torch(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "no-torch").mkdir()
    (tmp_path / "no-torch" / "torch.py").write_text("raise ImportError('torch is not installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "no-torch"))
    params = {"data": ["shop"], "recipe": "continue", "overrides": ["init=dinov2_vits14"]}
    assert accepted_params("train", params, settings) == checked_params("train", params, settings)
    assert caplog.text == ""  # it was checked


@pytest.mark.parametrize("way", ["slow", "broken", "missing"])
def test_a_training_whose_settings_cannot_be_checked_is_accepted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    def start(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        assert way != "missing"
        if way == "slow":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 1, b"", b"Traceback")

    monkeypatch.setattr(subprocess, "run", start)
    if way == "missing":
        monkeypatch.setattr("service.jobs.train.find_spec", lambda name: None)
    accepted_params("train", {"data": ["shop"], "recipe": "unknown"}, settings)
    assert ("were not checked" in caplog.text) == (way != "missing")


def _is_text(field: Any) -> bool:
    """Return whether a setting is a path or any text."""
    words = str(field.annotation)
    return re.search(r"\b(Path|str)\b", words) is not None and "Literal" not in words


def test_every_setting_of_training_that_names_a_file_or_server_is_checked() -> None:
    pytest.importorskip("torch", reason="the configuration of training imports torch")
    from training.config import TrainConfig

    harmless = {"device", "model", "teacher_model", "vit"}  # names and numbers
    named = {name for name, field in TrainConfig.model_fields.items() if _is_text(field)}
    assert named == MODELS | REFUSED.keys() | harmless


def test_every_setting_of_an_evaluation_that_names_a_file_is_checked(tmp_path: Path, settings: Settings) -> None:
    pytest.importorskip("torch", reason="the settings of evaluations import torch")
    from training.evaluate.settings import SETTINGS

    named = {name for task in SETTINGS.values() for name, field in task.model_fields.items() if _is_text(field)}
    assert named == PATHS
    given = {"model": "auto", "task": "retrieval", "data": "shop"}
    params = checked_params("evaluate", {**given, "settings": "ground_truth=shop/truth.json"}, settings)
    assert isinstance(params, EvaluateParams)
    assert params.settings == [f'ground_truth="{tmp_path}/data/datasets/shop/truth.json"']
    with pytest.raises(InvalidRequest, match="is not below a folder"):
        checked_params("evaluate", {**given, "settings": ["ground_truth=/etc/passwd"]}, settings)


class Commands(Context[Any]):
    """A context that records commands instead of running them."""

    def __init__(self, job: Job, params: Any, settings: Settings, store: JobStore) -> None:
        super().__init__(job, params, settings, store, Hold(job.lease, 8))
        self.commands: list[list[str]] = []
        self.answer: Callable[[], str] = str

    def run_command(self, arguments: Sequence[str], watch: Callable[[], object] = lambda: None) -> str:
        self.commands.append(list(arguments))
        answer = self.answer()
        watch()
        return answer


@pytest.fixture
def context_of(settings: Settings) -> Callable[..., Commands]:
    store = JobStore(settings.data_dir)

    def make(kind: str, **params: Any) -> Commands:
        store.create(NewJob(kind, params))
        job = store.claim("a", [kind], 8)
        assert job is not None
        return Commands(job, checked_params(kind, params, settings), settings, store)

    return make


def test_train(tmp_path: Path, context_of: Callable[..., Commands]) -> None:
    overrides = ["epochs=3", "init=mine-12345678", "init=dinov2_vits14"]
    context = context_of("train", data="shop", recipe="smoke", hours=2, overrides=overrides)
    out, data = context.folder / "run", tmp_path / "data"

    def run() -> str:
        out.mkdir()
        (out / "config.json").write_text(json.dumps({"epochs": 4}))
        lines = ('{"step": 1}', '{"step": 2, "epoch": 1.0, "loss": 3.5, "x": 1}', '{"step": 3, "ep')
        (out / "metrics.jsonl").write_text("\n".join(lines))
        return ""

    context.answer = run
    KINDS["train"].run(context)
    assert context.commands == [
        [
            *("train", f"--data={data}/datasets/shop", "--recipe=smoke", f"--out={out}", "--hours=2.0"),
            *("--", "epochs=3", f'init="{data}/artifacts/mine-12345678"', 'init="dinov2_vits14"'),
        ]
    ]
    figures = {"step": 2, "epoch": 1.0, "loss": 3.5}
    job = context._store.renew(context.job.lease, 8)
    assert job.results == {"train": {"run": f"jobs/{job.id}/run", "figures": figures}}
    assert (job.progress, job.text, job.metrics) == (0.25, "step 2, epoch 1.00 of 4", figures)
    KINDS["train"].run(context)
    assert len(context.commands) == 1, "a finished step was repeated"


def test_a_training_that_a_check_stopped_says_why(context_of: Callable[..., Commands]) -> None:
    context = context_of("train", data=["shop"], recipe="smoke")
    out = context.folder / "run"

    def stopped() -> str:
        out.mkdir(exist_ok=True)
        raise ChildFailed(3, "error: something")

    context.answer = stopped
    with pytest.raises(JobFailed, match=r"something \(exit status 3\)"):
        KINDS["train"].run(context)
    (out / "stopped.json").write_text(json.dumps({"reason": "features are equal"}))
    with pytest.raises(JobFailed, match="a check stopped the training: features are equal"):
        KINDS["train"].run(context)


def test_progress_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    assert progress_of(tmp_path) == (0.0, "starting", {})
    (tmp_path / "metrics.jsonl").write_text('{"half": ')
    assert last_line(tmp_path / "metrics.jsonl") == {}
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0, "knn_cls_10": 0.5}\n')
    assert progress_of(tmp_path)[2] == {"evaluation_step": 0, "evaluation_knn_cls_10": 0.5}


def test_a_training_tells_what_it_does_before_its_first_step(context_of: Callable[..., Commands]) -> None:
    context = context_of("train", data="shop", recipe="smoke")
    texts = []
    context.report = lambda progress, text="", metrics=None: texts.append(text)  # type: ignore[method-assign]

    def run() -> str:
        context._recent = b"Warning: slow\n08:03:57  listing images\n08:03:58  decoding 5 images, 40 %\n08:03:59  comp"
        return ""

    context.answer = run
    KINDS["train"].run(context)
    assert texts == ["decoding 5 images, 40 %"]
    assert phase_of("") == phase_of("Traceback\n") == ""


def test_a_child_knows_that_it_belongs_to_a_job(context_of: Callable[..., Commands]) -> None:
    context = context_of("train", data="shop", recipe="smoke")
    code = "from cli.shared import tell_next; print('08:00:00  before'); tell_next('dinov2 serve'); print('after')"
    assert Context.run(context, [sys.executable, "-c", code]) == context.recent_output == "08:00:00  before\nafter\n"


def test_advice_is_printed_outside_of_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    from cli.shared import tell_next

    tell_next("dinov2 serve")
    assert capsys.readouterr().out == "next: dinov2 serve\n"


def test_export(tmp_path: Path, context_of: Callable[..., Commands]) -> None:
    context = context_of("export", source="train-0123456789", name="mine", precision=["int8", "fp16"], sizes=["518"])
    data = tmp_path / "data"
    context.answer = lambda: f"warning\n{data}/artifacts/mine-abcdef12\nfingerprint abcdef1234\nmodel.onnx: parity\n"
    KINDS["export"].run(context)
    assert context.commands == [
        [
            *("export", f"--data-dir={data}", "--weights-dtype=float32", "--name=mine", "--precision=int8,fp16"),
            *("--sizes=518", "--", f"{data}/jobs/train-0123456789/run"),
        ]
    ]
    job = context._store.renew(context.job.lease, 8)
    assert job.results == {"export": {"artifact": "artifacts/mine-abcdef12", "fingerprint": "abcdef1234"}}


def test_build_engine(tmp_path: Path, context_of: Callable[..., Commands]) -> None:
    context = context_of("build-engine", model="mine-12345678", precision="fp8", images="shop", rebuild=True)
    data = tmp_path / "data"
    context.answer = lambda: "plan\nTensorRT\nparity\nnext\n"
    KINDS["build-engine"].run(context)
    assert context.commands == [
        [
            *("build-engine", f"--data-dir={data}", "--precision=fp8", f"--images={data}/datasets/shop", "--rebuild"),
            *("--", f"{data}/artifacts/mine-12345678"),
        ]
    ]


def test_curate(tmp_path: Path, context_of: Callable[..., Commands]) -> None:
    context = context_of("curate", data="shop", settings=["quality.dark=0.1"], workers=2)
    data, out = tmp_path / "data", context.folder / "dataset"
    context.answer = lambda: f"scan of images: 10 of 40, 0:00:03 left\ndataset: {out}, digest {'ab' * 32}\n"
    KINDS["curate"].run(context)
    assert context.commands == [
        ["curate", f"--out={out}", "--set=quality.dark=0.1", "--workers=2", "--", f"{data}/datasets/shop"]
    ]
    result = {"dataset": f"jobs/{context.job.id}/dataset", "digest": "ab" * 32}
    assert context._store.renew(context.job.lease, 8).results == {"curate": result}


def test_the_progress_of_a_curation_is_that_of_its_last_stage() -> None:
    output = "scan: 10 of 40\nscan: 1,024 of 2,048, 0:00:03 left\nquality: 3 of 9 images dropped; 1 s\n"
    assert curate_job.progress_of(output) == (0.5, "scan: 1,024 of 2,048, 0:00:03 left")
    assert curate_job.progress_of("done\n") == (0.0, "")


def test_every_setting_of_a_curation_that_names_a_file_is_checked(tmp_path: Path, settings: Settings) -> None:
    pytest.importorskip("torch", reason="the settings of curations import torch")
    from training.curate.settings import Address, CurateSettings

    paths = {
        f"{section}.{name}"
        for section, outer in CurateSettings.model_fields.items()
        for name, field in getattr(outer.annotation, "model_fields", {}).items()
        if Address in get_args(field.annotation)
    }
    assert paths == curate_job.MODELS | curate_job.DATA
    folder = tmp_path / "data" / "artifacts" / "mine-12345678"
    params = checked_params("curate", {"data": "shop", "settings": ["scan.model=mine-12345678"]}, settings)
    assert isinstance(params, curate_job.CurateParams)
    assert params.settings == [f'scan.model="{folder}"']
    for override in ("scan.model=/etc", "scan.model=7", "scan={model='/etc'}"):
        with pytest.raises(InvalidRequest):
            checked_params("curate", {"data": "shop", "settings": [override]}, settings)


def test_a_curation_with_a_setting_that_does_not_exist_is_refused(tmp_path: Path, settings: Settings) -> None:
    pytest.importorskip("torch", reason="curations need torch")
    with pytest.raises(InvalidRequest, match=r"quality.dark=2: must be at most 1"):
        accepted_params("curate", {"data": "shop", "settings": ["quality.dark=2"]}, settings)


def test_the_dataset_of_a_curation_job_is_data_for_other_jobs(tmp_path: Path, settings: Settings) -> None:
    dataset = tmp_path / "data" / "jobs" / "curate-1" / "dataset"
    dataset.mkdir(parents=True)
    assert data_source("curate-1", settings) == str(dataset)
    dataset.rmdir()
    dataset.symlink_to("/etc")
    assert data_source("curate-1", settings) == str(tmp_path / "data" / "datasets" / "curate-1")


def test_evaluate(tmp_path: Path, context_of: Callable[..., Commands]) -> None:
    context = context_of("evaluate", model="auto", task="knn", data="shop", settings=["k=20"])
    data, out = tmp_path / "data", context.folder / "evaluation.json"
    report = {"task": "knn", "model": "m", "fingerprint": "f", "figures": {"top1": 0.5}, "notes": []}

    def run() -> str:
        out.write_text(json.dumps({**report, "protocol": {}}))
        return ""

    context.answer = run
    KINDS["evaluate"].run(context)
    assert context.commands == [
        [
            *("eval", "--task=knn", f"--data={data}/datasets/shop", f"--out={out}", f"--data-dir={data}"),
            *(f"--cache={context.folder}/features", "--", "auto", "k=20"),
        ]
    ]
    assert context._store.renew(context.job.lease, 8).results == {"evaluate": report}


@pytest.mark.parametrize("command", ["train", "export", "build-engine", "eval"])
def test_the_commands_accept_these_options(command: str) -> None:
    """A renamed option of a command would break its jobs."""
    import typer.main

    from cli import app

    options = {
        "train": {"--data", "--recipe", "--out", "--hours"},
        "export": {"--data-dir", "--weights-dtype", "--name", "--precision", "--sizes"},
        "build-engine": {"--data-dir", "--precision", "--images", "--rebuild"},
        "eval": {"--task", "--data", "--out", "--data-dir", "--cache"},
    }[command]
    group: Any = typer.main.get_command(app)
    found = {option for parameter in group.commands[command].params for option in parameter.opts}
    assert options <= found


def test_an_export_really_runs(tmp_path: Path) -> None:
    """The bundled model, exported by a real child process."""
    from model.artifact import BUNDLED_DIR
    from service.jobs.queue import LocalQueue
    from service.jobs.worker import Worker

    (bundled,) = [path for path in BUNDLED_DIR.iterdir() if path.is_dir()]
    settings = Settings(data_dir=tmp_path, job_roots=str(BUNDLED_DIR))
    store = JobStore(tmp_path)
    job = store.create(NewJob("export", {"source": str(bundled), "name": "copy"}))
    with Worker(store, settings) as worker:
        LocalQueue().work(worker, once=True)
    job = store.get(job.id)
    assert job.state == "succeeded", job.error
    (artifact,) = (tmp_path / "artifacts").iterdir()
    assert job.results["export"]["artifact"] == os.path.join("artifacts", artifact.name)
    assert "fingerprint" in store.read_log(job.id)[0].decode()
