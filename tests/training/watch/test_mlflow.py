"""The MLflow sink, with a small client in place of MLflow's."""

import os
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from training.watch.monitor import Monitor, RunSize
from training.watch.sinks import MLFLOW_ENVIRONMENT, make_sinks

SETTINGS = {"recipe": "grocery", "lr": 0.004, "vit": {"depth": 6}} | {f"setting_{i}": i for i in range(200)}


class Client:
    """MLflow's client, for one tracking store in memory. It refuses what a server refuses."""

    def __init__(self):
        self.experiments, self.runs, self.addresses = {}, {}, []

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name):
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment_id, run_name):
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = SimpleNamespace(
            experiment=experiment_id, name=run_name, status="RUNNING", params={}, metrics=[]
        )
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id, status):
        self.runs[run_id].status = status

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100
        for metric in metrics:
            assert "+" not in metric.key
            self.runs[run_id].metrics.append((metric.step, metric.key, metric.value))
        for param in params:
            assert len(param.value) <= 500
            assert param.key not in self.runs[run_id].params
            self.runs[run_id].params[param.key] = param.value

    def set_terminated(self, run_id, status):
        self.runs[run_id].status = status


@pytest.fixture
def client(monkeypatch):
    """The store of a stand-in for the module `mlflow`."""
    made = Client()
    entities = SimpleNamespace(
        Metric=lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step),
        Param=lambda key, value: SimpleNamespace(key=key, value=value),
    )
    module = SimpleNamespace(
        MlflowClient=lambda tracking_uri: made.addresses.append(tracking_uri) or made, entities=entities
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for name in MLFLOW_ENVIRONMENT:
        monkeypatch.setenv(name, "set by the user")
    return made


def sink_of(out, address="file:runs/mlflow", settings=SETTINGS):
    return make_sinks(out, 0, None, settings, pytest.fail, mlflow=address)[-1]


def test_a_run_has_the_names_the_parameters_and_the_metrics_of_the_training_run(tmp_path, client):
    (tmp_path / "mine").mkdir()
    sink = sink_of(tmp_path / "mine")
    sink.write(3, {"loss": 2.0, "knn_cls+mean_10": 0.5})
    [run] = client.runs.values()
    assert client.addresses == ["file:runs/mlflow"]
    assert client.experiments == {"grocery": run.experiment}
    assert run.name == "mine"
    assert run.params == {key: str(value) for key, value in SETTINGS.items()}
    assert run.metrics == [(3, "loss", 2.0), (3, "knn_cls_mean_10", 0.5)]
    assert run.status == "RUNNING"
    sink.close()
    assert run.status == "FINISHED"
    assert sink.name == "mlflow"


def test_a_resumed_training_continues_its_run_and_sends_the_parameters_once(tmp_path, client):
    sink_of(tmp_path).close()
    sink = sink_of(tmp_path, settings=SETTINGS | {"lr": 1.0})  # settings that only watch may differ
    [run] = client.runs.values()
    assert run.status == "RUNNING"
    assert run.params["lr"] == "0.004"
    sink.write(7, {"loss": 1.0})
    assert run.metrics == [(7, "loss", 1.0)]


def test_another_store_gets_a_run_of_its_own_in_the_same_experiment(tmp_path, client):
    sink_of(tmp_path)
    sink_of(tmp_path, "http://mlflow:5000")
    sink_of(tmp_path, "http://mlflow:5000")
    assert len(client.runs) == 2
    assert len({run.experiment for run in client.runs.values()}) == 1


def test_a_run_that_an_exception_ends_has_failed(tmp_path, client):
    def run_training():
        with Monitor(
            tmp_path / "metrics.jsonl", RunSize(10, 0, 8), Console(quiet=True), sinks=[sink_of(tmp_path)]
        ) as monitor:
            monitor.evaluated(2, {"knn_cls_10": 0.25})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training()
    [run] = client.runs.values()
    assert run.status == "FAILED"
    assert run.metrics == [(2, "knn_cls_10", 0.25)]


def test_a_long_setting_is_cut_to_what_every_store_accepts(tmp_path, client):
    sink_of(tmp_path, settings={"recipe": "x", "data": "a" * 900})
    [run] = client.runs.values()
    assert run.params["data"] == "a" * 500


def test_mlflow_asked_for_and_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for name in MLFLOW_ENVIRONMENT:
        monkeypatch.setenv(name, "set by the user")
    with pytest.raises(ValueError, match="mlflow='file:runs' needs MLflow: pip install mlflow-skinny"):
        make_sinks(tmp_path, 0, None, {}, pytest.fail, mlflow="file:runs")


def test_mlflow_is_not_imported_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # an import would fail
    assert "mlflow" not in [sink.name for sink in make_sinks(tmp_path, 0, None, {}, pytest.fail)]


def test_a_store_that_does_not_answer_is_told_and_left_out(tmp_path, client, monkeypatch):
    def no_server(name):
        raise ConnectionError("refused")

    monkeypatch.setattr(client, "get_experiment_by_name", no_server)
    said = []
    sinks = make_sinks(tmp_path, 0, None, SETTINGS, said.append, mlflow="http://mlflow:5000")
    assert "mlflow" not in [sink.name for sink in sinks]
    assert said == ["warning: mlflow cannot be used in this run (ConnectionError: refused)"]


def test_environment_variables_of_the_user_take_precedence(tmp_path, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "99")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    sink_of(tmp_path)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99"
    assert os.environ["MLFLOW_ALLOW_FILE_STORE"] == "true"
