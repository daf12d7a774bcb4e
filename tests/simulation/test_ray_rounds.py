"""One run over Ray actors on several nodes: the numbers of one process, whoever is lost on the way."""

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import dpfl
from dpfl.data import FederatedData
from dpfl.simulation import ray_rounds
from dpfl.simulation.ray_rounds import Actors, RayRounds, balanced_parts
from dpfl.simulation.run import _start
from dpfl.simulation.state import NORM_BINS

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)")

ROUNDS = 4
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "adaptive_clipping": {"mechanism": dpfl.AdaptiveClipping(clip_norm=0.5, count_noise=1.0)},
    "both_units": {
        "local": dpfl.ClientTraining(batch_size=4, epochs=1, example_clip=1.0, example_noise=1.5),
        "privacy.delta": 1e-3,
    },
}


def experiment(images: FederatedData, **settings: Any) -> dpfl.Experiment:
    """Four rounds of Poisson cohorts of about twelve, with noise."""
    base = dpfl.Experiment(
        data=images,
        local=dpfl.ClientTraining(learning_rate=0.3, batch_size=4, epochs=1),
        mechanism=dpfl.Gaussian(clip_norm=0.5),
        privacy=dpfl.Privacy(epsilon=4, delta=1e-2),
        sampler=dpfl.Poisson(cohort=12),
        rounds=ROUNDS,
        evaluate_every=ROUNDS,
    )
    return base.replace(**settings)


def start(configured: dpfl.Experiment, actors: Actors | None) -> tuple[Any, list[np.ndarray]]:
    """A run before its first round, and its cohorts."""
    plan = configured.plan()
    _, rounds = _start(configured, plan, configured.client_plan(plan.rounds), 0, actors)
    return rounds, [plan.sampler.clients(0, number, plan.population) for number in range(ROUNDS)]


class WatchedActor(ray_rounds._Actor):
    """Says in a folder where it is at work, and holds on or fails as long as a file there says so."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._folder = Path(os.environ["DPFL_TEST_FOLDER"])

    def sum(self, state: list[np.ndarray], clients: np.ndarray) -> list[np.ndarray]:
        import ray

        (self._folder / f"at_work-{os.getpid()}").write_text(ray.get_runtime_context().get_node_id())
        if (self._folder / "fail").exists():
            raise KeyError("of the training")
        while (self._folder / "hold").exists():
            time.sleep(0.02)
        return super().sum(state, clients)


class Site:
    """Three Ray nodes on this machine, with three actors on them."""

    def __init__(self, nodes: Any, actors: Actors, folder: Path) -> None:
        self.nodes, self.actors, self.folder = nodes, actors, folder

    def at_work(self) -> dict[int, str]:
        """The node of each actor that is or was at a part, by its process."""
        files = self.folder.glob("at_work-*")
        return {int(file.name.split("-")[1]): node for file in files if (node := file.read_text())}

    def in_the_middle(self, strike: Callable[[dict[int, str]], None]) -> threading.Thread:
        """Lets the actors of the next round hold on until all are at work and `strike` has struck."""
        for file in self.folder.glob("at_work-*"):
            file.unlink()
        (self.folder / "hold").touch()

        def wait_and_strike() -> None:
            try:
                deadline = time.monotonic() + 60
                while len(self.at_work()) < self.actors.count and time.monotonic() < deadline:
                    time.sleep(0.02)
                strike(self.at_work())
            finally:
                (self.folder / "hold").unlink()

        thread = threading.Thread(target=wait_and_strike)
        thread.start()
        return thread


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    from dpfl.simulation.cluster import _ray

    ray = _ray()
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("actors")
    os.environ["DPFL_TEST_FOLDER"] = str(folder)  # which nodes and their actors inherit
    nodes = Cluster()
    try:
        for number, cpus in enumerate((2, 1, 1)):
            more = {"include_dashboard": False} if number == 0 else {}
            _patiently(lambda cpus=cpus, more=more: nodes.add_node(num_cpus=cpus, object_store_memory=10**8, **more))
        ray.init(nodes.address, logging_level="ERROR", log_to_driver=False)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray_rounds, "_Actor", WatchedActor)
            actors = Actors(ray, 3, 1)
            with actors:
                yield Site(nodes, actors, folder)
    finally:
        ray.shutdown()
        nodes.shutdown()
        del os.environ["DPFL_TEST_FOLDER"]


def _patiently(begin: Callable[[], Any]) -> Any:
    """Ray gives up on its own processes after 15 seconds, which is short on a busy machine."""
    for _ in range(4):
        try:
            return begin()
        except Exception as error:
            last = error
    raise last


def same(some: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, other, strict=True))


@needs_ray
@pytest.mark.slow
def test_a_cluster_of_its_own_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def begin_and_end() -> None:
        with dpfl.RayCluster(actors=3).started() as actors:
            assert actors.count == 3
            assert actors._ray.cluster_resources()["CPU"] == 3  # as many as were asked for, whatever the machine has
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _patiently(begin_and_end)
    import ray

    assert not ray.is_initialized()


@needs_ray
@pytest.mark.slow
class TestOnThreeNodes:
    @pytest.mark.parametrize("name", CONFIGURATIONS)
    def test_gives_the_numbers_of_one_process_and_the_same_bits_again(
        self, site: Site, images: FederatedData, name: str
    ) -> None:
        configured = experiment(images, **CONFIGURATIONS[name])
        one, cohorts = start(configured, None)
        cohorts[1] = np.zeros(0, np.int64)  # releases noise alone
        many, _ = start(configured, site.actors)
        assert isinstance(many, RayRounds)
        first = many.state()
        expected, measured = one.run(cohorts), many.run(cohorts)
        assert measured.keys() == expected.keys()
        for key in expected:
            np.testing.assert_allclose(measured[key], expected[key], rtol=1e-4, atol=1e-5, err_msg=key)
        for a, b in zip(many.state(), one.state(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert many.evaluate("test") == pytest.approx(one.evaluate("test"), abs=1e-4)

        once = many.state()
        many.restore(first)
        many.run(cohorts[:2])
        many.run(cohorts[2:])
        assert same(many.state(), once)

    def test_noise_is_added_once_and_never_by_an_actor(self, site: Site, images: FederatedData) -> None:
        still = experiment(images, **{"local.learning_rate": 1e-12, "privacy.epsilon": 0.5})
        rounds, cohorts = start(still, site.actors)
        parts = [cohorts[0][:3], cohorts[0][3:]]
        sums = site.actors.sums(rounds.state(), parts)
        norm = rounds._engine.partial_sum(rounds._state, cohorts[0][:0], rounds._settings)
        # Nobody moves, so that what an actor sends is nothing but counts and the clip norm.
        for clients, sent in zip(parts, sums, strict=True):
            for array, nothing in zip(sent, norm, strict=True):
                if array.shape == (NORM_BINS,):
                    assert array.sum() == len(clients)  # counted by the norms of their updates
                elif array.ndim:
                    np.testing.assert_allclose(array, nothing, atol=1e-9)
        before = rounds.weights()
        rounds.run(cohorts[:1])
        moved = np.concatenate([(a - b).ravel() for a, b in zip(rounds.weights(), before, strict=True)])
        plan = still.plan()
        expected = plan.noise_multiplier * 0.5 / plan.expected_cohort
        # 111 weights: the sample's deviation is within a quarter, and sqrt(2) or more of it would not be.
        assert moved.std() == pytest.approx(expected, rel=0.25)

    def test_an_error_of_the_training_is_raised_as_what_it_is(self, site: Site, images: FederatedData) -> None:
        rounds, cohorts = start(experiment(images), site.actors)
        (site.folder / "fail").touch()
        try:
            with pytest.raises(KeyError, match="of the training") as raised:
                rounds.run(cohorts)
        finally:
            (site.folder / "fail").unlink()
        assert raised.type is KeyError

    def test_data_is_shared_and_not_copied(self, site: Site, images: FederatedData) -> None:
        import ray

        shared = ray.get(ray.put(images))
        assert not shared.x.flags.owndata
        assert not shared.x.flags.writeable
        again = ray.get(ray.put(images))
        assert shared.fingerprint == images.fingerprint == again.fingerprint

    def test_a_run_leaves_the_cluster_as_it_was(self, site: Site, images: FederatedData, tmp_path: Path) -> None:
        import ray

        configured = experiment(images, rounds=2)
        one = configured.run(0, progress=False)
        cluster = dpfl.RayCluster(actors=1)
        many = configured.run(0, progress=False, cluster=cluster, checkpoints=tmp_path, checkpoint_every=1)
        assert many.record["run_id"] == one.record["run_id"]
        for a, b in zip(many.weights, one.weights, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        assert ray.is_initialized()
        # What the actors did is kept for a process that goes on by itself.
        kept = configured.run(0, progress=False, checkpoints=tmp_path)
        assert same(kept.weights, many.weights)

    def test_refuses_more_actors_than_there_is_room_for(self, site: Site) -> None:
        with (
            pytest.raises(dpfl.InputError, match="room for 4 actors of 1 threads"),
            dpfl.RayCluster(actors=5).started(),
        ):
            pass
        with pytest.raises(dpfl.InputError, match="room for 0 actors"), dpfl.RayCluster(threads=3).started():
            pass

    @pytest.mark.parametrize("lost", ["process", "node"])  # the node last: it does not come back
    def test_what_is_lost_in_the_middle_of_a_round_is_done_by_others(
        self, site: Site, images: FederatedData, lost: str
    ) -> None:
        rounds, cohorts = start(experiment(images), site.actors)
        first = rounds.state()
        measured = rounds.run(cohorts)
        undisturbed = rounds.state()
        struck = []

        def strike(at_work: dict[int, str]) -> None:
            ends = {node.node_id: node for node in site.nodes.worker_nodes}
            process, node = next((process, node) for process, node in at_work.items() if node in ends)
            if lost == "process":
                os.kill(process, signal.SIGKILL)
            else:
                site.nodes.remove_node(ends[node], allow_graceful=False)
            struck.append(process)

        rounds.restore(first)
        thread = site.in_the_middle(strike)
        again = rounds.run(cohorts)
        thread.join()
        assert len(struck) == 1
        with pytest.raises(ProcessLookupError):
            os.kill(struck[0], 0)
        assert same(rounds.state(), undisturbed)
        assert all(np.array_equal(again[key], measured[key]) for key in measured)


@needs_ray
def test_an_address_where_nothing_is_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def nobody_there(*_: Any, **__: Any) -> None:
        raise ConnectionError("Could not reach it.\nand a page more")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", nobody_there)
    with (
        pytest.raises(dpfl.InputError, match=r"^the Ray cluster at 'nowhere:1' cannot be used \(Could not reach it\)"),
        dpfl.RayCluster(address="nowhere:1").started(),
    ):
        pass


def test_without_ray_the_sentence_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, images: FederatedData
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(dpfl.InputError, match=r"pip install 'ray>=2\.30'"):
        experiment(images).run(cluster=dpfl.RayCluster())


def test_a_cluster_is_not_for_the_other_engine(images: FederatedData) -> None:
    with pytest.raises(dpfl.InputError, match='choose engine="graph"'):
        experiment(images, engine="tff").run(cluster=dpfl.RayCluster())


@pytest.mark.parametrize("settings", [{"actors": 0}, {"threads": 0}, {"actor": 2}])
def test_settings_of_a_cluster_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(dpfl.InputError):
        dpfl.RayCluster(**settings)


@hypothesis.given(costs=st.lists(st.integers(1, 1000), max_size=60), parts=st.integers(1, 9))
def test_parts_are_balanced_and_hold_every_client_once(costs: list[int], parts: int) -> None:
    clients = np.arange(len(costs)) * 3 + 1
    found = balanced_parts(clients, np.array(costs, np.int64), parts)
    assert len(found) == min(parts, len(costs))
    assert sorted(np.concatenate([*found, np.zeros(0, np.int64)])) == list(clients)
    loads = [sum(costs[(client - 1) // 3] for client in part) for part in found]
    assert not loads or max(loads) - min(loads) <= max(costs)
