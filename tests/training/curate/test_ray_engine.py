"""Tests of the workers on a Ray cluster: two nodes on this machine, of which one is killed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")

from tests.training.curate.small_images import fill_folder
from tests.training.curate.test_scan import contents, run
from training.curate.ray_engine import RayWorkers


def noting():
    return note


def note(item: tuple[str, int]) -> int:
    """Note the node that has begun the item, take some time, and return the item's number."""
    import ray

    folder, number = item
    (Path(folder) / f"{ray.get_runtime_context().get_node_id()}-{number}").touch()
    time.sleep(0.5)
    return number


def refusing():
    return refuse


def refuse(item: int) -> int:
    raise OSError(f"image {item} cannot be read")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
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


def test_errors_of_actors_reach_the_caller(cluster) -> None:
    with pytest.raises(OSError, match="image 7 cannot be read"):
        list(RayWorkers()(refusing, [7]))


def test_the_work_goes_on_when_a_node_is_killed(tmp_path: Path, cluster) -> None:
    second = cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    numbers = list(range(120))
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
