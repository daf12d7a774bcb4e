"""Whole runs that are compressed: what is sent has the length that is reported, what is pruned stays zero, and a run
that was killed gives the numbers of the undisturbed one."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import dpfl
from dpfl.compression import Compression
from dpfl.data import FederatedData
from dpfl.mechanisms.compressed_queries import CompressedMeanQuery
from dpfl.models.functional import FunctionalModel
from dpfl.simulation.checkpoints import Checkpoints
from dpfl.simulation.engine import GraphRounds
from dpfl.simulation.result import Result
from dpfl.simulation.run import run
from dpfl.simulation.traffic import Traffic

ROUNDS, CLIENTS, COHORT = 6, 30, 10
KERNEL, WEIGHTS = 36 * 3, 36 * 3 + 3  # the softmax regression's
PRUNING = {"sparsity": 0.9, "pruning_begins": 0.2, "pruning_ends": 0.7}
DP_SGD = {
    "local": dpfl.ClientTraining(learning_rate=0.3, batch_size=4, epochs=1, example_clip=1.0, example_noise=0.7),
    "mechanism": dpfl.NoMechanism(),
    "privacy": dpfl.Privacy(unit="example", epsilon=None, delta=1e-3),
}


@pytest.fixture(scope="module")
def base(images: FederatedData) -> dpfl.Experiment:
    return dpfl.Experiment(
        data=images,
        model="softmax",
        local=dpfl.ClientTraining(learning_rate=0.3, batch_size=4, epochs=1),
        mechanism=dpfl.Gaussian(clip_norm=0.5, noise_multiplier=0.7),
        privacy=dpfl.Privacy(epsilon=None, delta=1e-2, accountant="rdp"),
        sampler=dpfl.Poisson(cohort=COHORT),
        rounds=ROUNDS,
        evaluate_every=ROUNDS,
    )


def kept(result: Result) -> int:
    return sum(np.count_nonzero(weight) for weight in result.weights)


def pruned_coordinates(number: int) -> int:
    level = Compression(**PRUNING).sparsity_after(number, ROUNDS)
    return KERNEL - round(level * KERNEL) + 3


def traffic_of(base: dpfl.Experiment, settings: dict[str, Any]) -> Traffic:
    plan = base.replace(compression=Compression(**settings)).plan()
    return Traffic(plan, FunctionalModel("softmax", (6, 6, 1), 3), CLIENTS)


class TestBytes:
    @pytest.mark.parametrize(
        ("settings", "each"),
        [
            ({"bits": 1}, lambda number: 14 + 4),
            ({"bits": 4}, lambda number: 56 + 4),
            ({"bits": 8, "rotation": True}, lambda number: 128 + 4),
            ({"random_k": 20}, lambda number: 80),
            ({"random_k": 0.5, "bits": 2}, lambda number: 7 * 2 + 4),
            ({"rank": 2}, lambda number: 4 * (2 * 3 + 3)),
            ({"rank": 1, "bits": 3}, lambda number: 3 + 4),
            (PRUNING, lambda number: 4 * pruned_coordinates(number)),
            (PRUNING | {"bits": 4}, lambda number: 4 * math.ceil(pruned_coordinates(number) / 8) + 4),
        ],
        ids=lambda value: None if callable(value) else str(value),
    )
    def test_up_are_those_of_the_messages(self, settings, each, base):
        """Of updates in each round's subspace, over rounds of a model that moves by what is released."""
        experiment = base.replace(compression=Compression(**settings))
        plan = experiment.plan()
        traffic = Traffic(plan, FunctionalModel("softmax", (6, 6, 1), 3), CLIENTS)
        numbers = np.random.default_rng(0)
        query = plan.query(0, [np.zeros((36, 3), np.float32), np.zeros(3, np.float32)])
        assert isinstance(query, CompressedMeanQuery)
        state = query.initial_global_state()
        weights = [tf.constant(numbers.normal(size=shape), tf.float32) for shape in ((36, 3), (3,))]
        for number in range(ROUNDS):
            params = query.derive_sample_params(state)
            total = query.initial_sample_state()
            for client in range(3):
                update = [tf.constant(numbers.normal(size=part.shape), tf.float32) for part in weights]
                update = query.onto(params, update)
                own = query.client_params(params, tf.constant(client))
                message = query.message(own, update)
                assert len(message) == each(number)
                total = query.accumulate_preprocessed_record(total, query.preprocess_record(own, update))
            assert traffic.up(number) == each(number)
            released, state, _ = query.get_noised_result(total, state)
            weights = [weight + part for weight, part in zip(weights, released, strict=True)]
            masks = query.subspaces.masks(weights, tf.constant(number + 1))
            weights = [weight * mask for weight, mask in zip(weights, masks, strict=True)] if masks else weights
            state = query.after_release(state, weights)
        if "sparsity" in settings:
            assert len({each(number) for number in range(ROUNDS)}) > 2

    def test_up_in_the_history_are_those_of_all_clients(self, base):
        experiment = base.replace(compression=Compression(**PRUNING, bits=4))
        plan = experiment.plan()
        traffic = Traffic(plan, FunctionalModel("softmax", (6, 6, 1), 3), CLIENTS)
        for number, row in enumerate(experiment.run(0, progress=False).history):
            assert row["bytes_up"] == traffic.up(number) * row["cohort"]
            assert row["bytes_down"] == traffic.down(number, plan.sampler.clients(0, number, CLIENTS))

    def test_up_of_weighted_clients_have_their_weight(self, base):
        weighted = {"mechanism": dpfl.NoMechanism(weighting="examples")}
        sizes = []
        for compression in (Compression(), Compression(bits=4, random_k=20)):
            row = base.replace(compression=compression, rounds=1, **weighted).run(0, progress=False).history[0]
            sizes.append(row["bytes_up"] / row["cohort"])
        assert sizes == [4 * WEIGHTS + 4, 12 + 4 + 4]

    @pytest.mark.slow
    def test_up_of_distributed_ones_are_integers_of_the_coordinates_that_are_left(self, base):
        distributed = {
            "mechanism": dpfl.DistributedSkellam(clip_norm=0.5, bits=20),
            "sampler": dpfl.Cyclic(cohort=COHORT),
            "privacy.relation": "replace_special",
            "rounds": 1,
        }
        rows = [
            base.replace(compression=compression, **distributed).run(0, progress=False).history[0]
            for compression in (Compression(), Compression(random_k=20))
        ]
        assert [row["bytes_up"] / row["cohort"] for row in rows] == [128 * 20 / 8, 32 * 20 / 8]

    def test_down_comes_the_whole_model(self, base):
        for settings in ({}, {"bits": 2}, {"random_k": 9}, {"rank": 1}):
            traffic = traffic_of(base, settings)
            assert [traffic.down(number, np.arange(number)) for number in range(3)] == [0, 4 * WEIGHTS, 8 * WEIGHTS]

    def test_down_comes_of_a_pruned_model_what_is_left_and_a_bitmap(self, base):
        traffic = traffic_of(base, PRUNING)
        for number in range(ROUNDS):
            coordinates = pruned_coordinates(number)
            whole = 4 * WEIGHTS if coordinates == WEIGHTS else 4 * coordinates + math.ceil(KERNEL / 8)
            assert traffic.down(number, np.arange(7)) == 7 * whole

    @pytest.mark.parametrize(("top_k", "change"), [(2, 2 * 4 + 2 * 4), (20, 20 * 4 + 14), (0.5, 56 * 4 + 14)])
    def test_down_come_the_changes_since_a_client_took_part(self, top_k, change, base):
        """Values, and indices or a bitmap, whichever is shorter; the whole model if nobody had it or it is shorter."""
        traffic, resumed, last = traffic_of(base, {"top_k": top_k}), traffic_of(base, {"top_k": top_k}), {}
        cohorts = [base.sampler.clients(0, number, CLIENTS) for number in range(20)]
        for number, cohort in enumerate(cohorts):
            expected = 0
            for client in cohort:
                missed = number - last.get(client, -1_000_000)
                expected += min(4 * WEIGHTS, missed * change)
                last[client] = number
            if number == 7:
                resumed.catch_up(cohorts[:7])
            for one in (traffic, resumed) if number >= 7 else (traffic,):
                assert one.down(number, cohort) == expected


class TestPruning:
    @pytest.mark.slow
    @pytest.mark.parametrize(("server", "bits"), [("momentum", 4), ("adam", None)])
    def test_the_last_model_has_the_sparsity(self, server, bits, base):
        experiment = base.replace(
            compression=Compression(**PRUNING, bits=bits), server=dpfl.ServerOptimizer(name=server, learning_rate=0.5)
        )
        result = experiment.run(0, progress=False)
        kernel, bias = result.weights
        assert np.count_nonzero(kernel) == KERNEL - round(0.9 * KERNEL)
        assert np.count_nonzero(bias) == 3
        assert result.record["sparsity"] == 0.9

    def test_weights_once_pruned_stay_zero(self, base):
        experiment = base.replace(
            compression=Compression(**PRUNING), server=dpfl.ServerOptimizer(name="momentum"), evaluate_every=1
        )
        seen: list[np.ndarray] = []
        true = GraphRounds.run

        def noting(rounds: GraphRounds, cohorts: Any) -> Any:
            measured = true(rounds, cohorts)
            seen.append(np.array(rounds.weights()[0]) == 0)
            return measured

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GraphRounds, "run", noting)
            experiment.run(0, progress=False)
        assert [np.count_nonzero(zero) for zero in seen] == [
            KERNEL + 3 - pruned_coordinates(number) for number in range(1, ROUNDS + 1)
        ]
        for before, after in itertools.pairwise(seen):
            assert np.all(after[before])

    def test_clients_that_train_by_dp_sgd_keep_pruned_weights_zero(self, base):
        result = base.replace(compression=Compression(**PRUNING), **DP_SGD).run(0, progress=False)
        assert np.count_nonzero(result.weights[0]) == KERNEL - round(0.9 * KERNEL)
        assert result.history[-1]["update_norm"] > 0
        assert math.isfinite(result.loss)

    @pytest.mark.slow
    def test_clients_that_train_by_dp_sgd_quantise(self, base):
        plain, quantised = (
            base.replace(compression=compression, **DP_SGD).run(0, progress=False)
            for compression in (Compression(), Compression(bits=8))
        )
        difference = max(np.abs(a - b).max() for a, b in zip(plain.weights, quantised.weights, strict=True))
        assert 0 < difference < 0.1
        assert quantised.history[0]["bytes_up"] == (112 + 4) * quantised.history[0]["cohort"]


@pytest.mark.slow
class TestSelections:
    @pytest.mark.parametrize("settings", [{"random_k": 20}, {"rank": 1}], ids=str)
    def test_a_round_moves_the_model_within_its_subspace_alone(self, settings, base):
        experiment = base.replace(compression=Compression(**settings), rounds=1)
        plan = experiment.plan()
        result = experiment.run(0, progress=False)
        query = plan.query(0, result.weights)
        params = query.derive_sample_params(query.initial_global_state())
        zero = {"mechanism": dpfl.NoMechanism(), "local.learning_rate": 1e-30}
        before = experiment.replace(compression=Compression(), **zero).run(0, progress=False).weights
        moved = [tf.constant(after - old) for after, old in zip(result.weights, before, strict=True)]
        assert max(np.abs(part).max() for part in moved) > 0.01
        for part, projected in zip(moved, query.onto(params, moved), strict=True):
            np.testing.assert_allclose(part, projected, atol=1e-6)

    def test_clients_train_within_them(self, base):
        """Else what they send would be a projection of an update that was trained with all weights."""
        zero = {"mechanism": dpfl.NoMechanism(), "rounds": 1}
        several = dpfl.ClientTraining(learning_rate=1.0, batch_size=2, epochs=5)
        plain, selected = (
            base.replace(compression=compression, local=several, **zero).run(0, progress=False).weights
            for compression in (Compression(), Compression(random_k=0.5))
        )
        chosen = np.concatenate([(part != 0).ravel() for part in selected])
        assert chosen.sum() >= 1
        one, other = (np.concatenate([part.ravel() for part in weights]) for weights in (plain, selected))
        assert np.abs(one - other)[chosen].max() > 1e-3

    def test_top_k_changes_so_many_weights(self, base):
        experiment = base.replace(compression=Compression(top_k=7), rounds=1)
        initial = base.replace(
            rounds=1,
            mechanism=dpfl.NoMechanism(),
            **{"local.learning_rate": 1e-30},
        ).run(0, progress=False)
        after = experiment.run(0, progress=False)
        changed = sum(
            np.count_nonzero(np.abs(a - b) > 1e-20) for a, b in zip(after.weights, initial.weights, strict=True)
        )
        assert changed == 7


class Killed(BaseException):
    """In place of the end of the process."""


def told(result: Result) -> str:
    """All that a run says of itself but for how long it took, to the last bit."""
    return json.dumps(
        {
            "record": {**result.record, "seconds": None},
            "history": result.history,
            "weights": [weight.tobytes().hex() for weight in result.weights],
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        PRUNING | {"bits": 2},
        {"top_k": 9, "error_feedback": True},
        {"random_k": 20, "bits": 4, "rotation": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("killed_in", [4])
def test_killed_and_resumed_it_gives_the_undisturbed_numbers(settings, killed_in, base, tmp_path: Path):
    server = dpfl.ServerOptimizer(name="momentum")
    experiment = base.replace(compression=Compression(**settings), server=server, evaluate_every=2)
    plan, true = experiment.plan(), GraphRounds.run
    undisturbed = run(experiment, plan, None, 3)

    def dying(rounds: GraphRounds, cohorts: Any) -> Any:
        measured = true(rounds, cohorts)
        if int(rounds._state.round) >= killed_in:
            raise Killed
        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphRounds, "run", dying)
        with pytest.raises(Killed):
            run(experiment, plan, None, 3, lambda rounds: None, Checkpoints(tmp_path, 1))
    resumed = run(experiment, plan, None, 3, lambda rounds: None, Checkpoints(tmp_path, 1))
    assert told(resumed) == told(undisturbed)
    assert told(run(experiment, plan, None, 4)) != told(undisturbed)


@pytest.mark.slow
def test_the_record_names_the_compression(base):
    compression = Compression(bits=4, random_k=20, top_k=0.5)
    record = base.replace(compression=compression, rounds=1).run(0, progress=False).record
    assert record["compression"] == compression.in_words()
    assert json.loads(record["compression_settings"]) == json.loads(json.dumps(compression.model_dump()))
    assert (record["bits"], record["random_k"], record["top_k"], record["rank"]) == (4, 20, 0.5, None)
