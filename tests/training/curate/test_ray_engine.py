"""Tests of the workers on a Ray cluster: two nodes on this machine, of which one is killed."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs Ray: make test-ray")

from tests.training.curate.small_images import fill_folder
from tests.training.curate.test_scan import contents, run
from training.curate.ray_engine import ATTEMPTS, RayWorkers


def noting():
    return note


def note(item: tuple[str, int]) -> int:
    """Note the node that has begun the item, take some time, and return the item's number."""
    import ray

    folder, number = item
    (Path(folder) / f"{ray.get_runtime_context().get_node_id()}-{number}").touch()
    time.sleep(0.3)
    return number


def failing_to_start():
    raise ValueError("the model cannot be used")


def counting():
    return Counter()


class Counter:
    """Returns the number of items that it has been given."""

    def __init__(self) -> None:
        self.items = 0

    def __call__(self, item: int) -> int:
        self.items += 1
        return self.items


def dying():
    return die


def die(attempts: str) -> None:
    """Note an attempt in a file, and kill this process."""
    with Path(attempts).open("a") as file:
        file.write(f"{os.getpid()}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def refusing():
    return refuse


def refuse(item: int) -> int:
    raise OSError(f"image {item} cannot be read")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - by default 15, with which the processes wait for others
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
    ray.init(address=started.address, log_to_driver=False)
    yield started
    ray.shutdown()
    started.shutdown()


def test_a_scan_gives_the_same_as_with_local_workers(tmp_path: Path, cluster, monkeypatch) -> None:
    monkeypatch.setattr("training.curate.scan.PART_IMAGES", 4)
    source = fill_folder(tmp_path / "in", 10)
    local = contents(run(source, tmp_path / "local"))
    assert contents(run(source, tmp_path / "ray", RayWorkers())) == local


def test_errors_reach_the_caller(cluster) -> None:
    with pytest.raises(OSError, match="image 7 cannot be read"):
        list(RayWorkers()(refusing, [7]))
    with pytest.raises(ValueError, match="the model cannot be used"):
        list(RayWorkers()(failing_to_start, [7]))


def test_an_item_that_kills_each_process_is_an_error_after_some_attempts(tmp_path: Path, cluster) -> None:
    attempts = tmp_path / "attempts"
    with pytest.raises(OSError, match=rf"not finished in {ATTEMPTS} attempts .* its process was killed"):
        list(RayWorkers()(dying, [str(attempts)]))
    assert len(set(attempts.read_text().split())) == ATTEMPTS
    assert list(RayWorkers()(counting, [1])) == [1]


def test_a_process_makes_its_worker_object_once(cluster) -> None:
    assert max(RayWorkers()(counting, list(range(12)))) > 1


def test_a_scan_on_a_cluster_that_loses_a_node_gives_the_same_bytes(tmp_path: Path, cluster, monkeypatch) -> None:
    monkeypatch.setattr("training.curate.scan.PART_IMAGES", 2)
    source = fill_folder(tmp_path / "in", 40)
    local = contents(run(source, tmp_path / "local"))
    second = cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()

    class LosingNode(RayWorkers):
        """Kills the second node after the first result."""

        def __call__(self, make, items):
            for number, result in enumerate(super().__call__(make, items)):
                if number == 0:
                    cluster.remove_node(second, allow_graceful=False)
                yield result

    assert contents(run(source, tmp_path / "ray", LosingNode())) == local


def test_the_work_goes_on_when_a_node_is_killed(tmp_path: Path, cluster) -> None:
    second = cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    numbers = list(range(60))
    results = RayWorkers()(noting, [(str(tmp_path), number) for number in numbers])
    done = []
    for number in results:
        done.append(number)
        if any(path.name.startswith(second.node_id) for path in tmp_path.iterdir()):
            break
    assert len(done) < len(numbers), "the second node has done nothing"
    cluster.remove_node(second, allow_graceful=False)
    done += results
    assert sorted(done) == numbers
