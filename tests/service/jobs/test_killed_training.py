"""A training job that is killed several times ends with the weights of an undisturbed one."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="trains a small network")

ROOT = Path(__file__).parents[3]

WORKER = """
from service.jobs.queue import LocalQueue, open_jobs
from service.jobs.worker import Times, Worker
from service.settings import load_settings
settings = load_settings()
times = Times(lease_s=2, renew_s=0.3, retry_s=0)
with Worker(open_jobs(settings), settings, only=["train"], times=times) as worker:
    LocalQueue().work(worker)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the training in /proc")
def test_three_kills_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/killed_training.py does the same with the lease of real workers and 20 kills."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import killed_training

    figures = killed_training.compare(tmp_path, 3, seed=1, epochs=60, worker=(sys.executable, "-c", WORKER))
    assert figures["kills"] == {"worker": 1, "training": 1, "both": 1}
    assert figures["attempts"] > 1
    assert figures["bit_equal"]
