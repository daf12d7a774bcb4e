"""Studies on a Ray cluster: the results of one machine, and a node that is killed in the middle."""

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import dpfl
from dpfl.simulation.experiment import Experiment

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)"),
    pytest.mark.slow,
]

SameRuns = Callable[[pd.DataFrame, pd.DataFrame], None]


@pytest.fixture
def nodes() -> Iterator[Any]:
    from dpfl.simulation.cluster import _ray

    ray = _ray()
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for number in range(2):
            more = {"include_dashboard": False} if number == 0 else {}
            cluster.add_node(num_cpus=1, object_store_memory=10**8, **more)
        ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_node_that_is_killed_costs_no_run(nodes: Any, base: Experiment, same_runs: SameRuns, tmp_path: Path) -> None:
    study = dpfl.Study(base.replace(model="cnn", rounds=60), {"mechanism.clip_norm": [0.25, 0.5, 1.0]}, seeds=2)
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "ray").glob("records/*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        node = nodes.worker_nodes.copy().pop()
        killed.append(os.getpid())
        nodes.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=kill_one)
    thread.start()
    frame = study.run(tmp_path / "ray", ray="auto", progress=False).frame()
    thread.join()
    assert killed
    assert len(list((tmp_path / "ray").glob("records/*.json"))) == 6
    undisturbed = study.run(tmp_path / "processes", workers=2, progress=False).frame()
    same_runs(frame, undisturbed)
