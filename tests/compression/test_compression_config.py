"""What compressions are refused, each in one sentence and before anything is trained."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import dpfl
from dpfl.compression import Compression
from dpfl.errors import InputError
from dpfl.mechanisms import (
    AdaptiveClipping,
    BandedMatrix,
    DistributedDiscreteGaussian,
    DistributedSkellam,
    Gaussian,
    LocalGaussian,
    LocalLaplace,
    NoMechanism,
    TreeAggregation,
)

SHAPES = [(36, 3), (3,)]


def refusal(call: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    """The one sentence with which it is refused."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **settings)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+\.", message), message
    assert not re.search(r"[.?] ", message), message
    return message


@pytest.fixture(scope="module")
def data() -> dpfl.FederatedData:
    numbers = np.random.default_rng(0)
    x, y = numbers.normal(size=(60, 6, 6, 1)).astype(np.float32), numbers.integers(0, 3, 60)
    return dpfl.data.from_arrays(x, y, np.repeat(np.arange(20), 3), test=(x, y))


def experiment(data: dpfl.FederatedData, **settings: Any) -> dpfl.Experiment:
    values = {
        "model": "softmax",
        "local": dpfl.ClientTraining(epochs=1),
        "mechanism": Gaussian(clip_norm=1.0, noise_multiplier=1.0),
        "privacy": dpfl.Privacy(epsilon=None, delta=1e-2),
        "sampler": dpfl.Poisson(cohort=5),
        "rounds": 5,
    }
    return dpfl.Experiment(data=data, **{**values, **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 0}, "1 to 8 bits"),
        ({"bits": 9}, "1 to 8 bits"),
        ({"bits": -1}, "bits was -1"),
        ({"bits": 1.5}, "bits should be a valid integer"),
        ({"bits": "many"}, "bits should be a valid integer"),
        ({"rotation": True}, "float32 needs none"),
        ({"random_k": 0}, "random_k is a number of coordinates"),
        ({"random_k": -3}, "it was -3"),
        ({"random_k": -0.5}, "it was -0.5"),
        ({"random_k": 1.5}, "it was 1.5"),
        ({"random_k": float("nan")}, "it was nan"),
        ({"random_k": float("inf")}, "it was inf"),
        ({"random_k": "half"}, "random_k"),
        ({"top_k": 0}, "top_k is a number of coordinates"),
        ({"top_k": 2.5}, "it was 2.5"),
        ({"top_k": -1}, "it was -1"),
        ({"top_k": float("inf")}, "it was inf"),
        ({"rank": 0}, "at least 1, but it was 0"),
        ({"rank": -2}, "at least 1, but it was -2"),
        ({"rank": 1.5}, "rank should be a valid integer"),
        ({"sparsity": 1}, "a mask of nothing trains nothing"),
        ({"sparsity": 1.5}, "it was 1.5"),
        ({"sparsity": -0.1}, "it was -0.1"),
        ({"sparsity": float("nan")}, "it was nan"),
        ({"sparsity": 0.5, "pruning_begins": 0.7, "pruning_ends": 0.3}, "they were 0.7 and 0.3"),
        ({"sparsity": 0.5, "pruning_begins": -0.1}, "pruning_begins"),
        ({"sparsity": 0.5, "pruning_ends": 1.1}, "pruning_ends"),
        ({"sparsity": 0.5, "pruning_begins": float("nan")}, "pruning_begins"),
        ({"sparsity": 0.5, "pruning_every": 0}, "pruning_every should be greater than 0"),
        ({"random_k": 5, "rank": 1}, "random_k and rank each say"),
        ({"random_k": 5, "sparsity": 0.5}, "random_k and sparsity each say"),
        ({"rank": 1, "sparsity": 0.5}, "rank and sparsity each say"),
        ({"top_k": 5, "sparsity": 0.5}, "top_k and sparsity each say"),
        ({"error_feedback": True}, "give top_k"),
        ({"error_feedback": True, "random_k": 5}, "clients leave out is not fed back"),
        ({"lite": ("int4",)}, "lite"),
        ({"bitts": 4}, "did you mean 'bits'"),
    ],
    ids=str,
)
def test_settings_that_are_wrong_or_contradict_each_other(settings, words):
    message = refusal(Compression, **settings) if "bitts" not in settings else _misspelt(settings)
    assert words in message


def _misspelt(settings: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        Compression(**settings)
    return str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *({"bits": bits} for bits in range(1, 9)),
        {"bits": 1, "rotation": True},
        {"random_k": 1},
        {"random_k": 111},
        {"random_k": 0.999},
        {"random_k": 1e-9},
        {"top_k": 111, "error_feedback": True, "random_k": 3, "bits": 2},
        {"rank": 35},
        {"sparsity": 0.999, "pruning_begins": 0, "pruning_ends": 0},
        {"sparsity": 0.5, "pruning_begins": 1, "pruning_ends": 1},
    ],
    ids=str,
)
def test_settings_at_the_edge_are_taken(settings, data):
    compression = Compression(**settings)
    compression.check_shapes(SHAPES)
    plan = experiment(data, compression=compression).plan()
    assert plan.compression == compression
    assert compression.in_words() == "none" or settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"random_k": 112}, "random_k is 112, but the model has 111 weights"),
        ({"top_k": 112}, "top_k is 112, but the model has 111 weights"),
        ({"rank": 36}, "the longest side of one being 36"),
        ({"rank": 1000}, "makes no kernel's update smaller"),
    ],
    ids=str,
)
def test_what_the_model_is_too_small_for_is_refused_by_the_plan_and_the_run(settings, words, data):
    made = experiment(data, compression=Compression(**settings))
    assert words in refusal(made.plan)
    assert words in refusal(made.run, progress=False)


def test_a_model_without_kernels_cannot_be_pruned():
    assert "no kernel that could be pruned" in refusal(Compression(sparsity=0.5).check_shapes, [(5,), ()])
    assert "makes no kernel's update smaller" in refusal(Compression(rank=1).check_shapes, [(5,), ()])


CYCLIC = {
    "sampler": dpfl.Cyclic(cohort=5),
    "privacy": dpfl.Privacy(epsilon=None, delta=1e-2, relation="replace_special"),
}
DISTRIBUTED = [DistributedDiscreteGaussian(clip_norm=1.0), DistributedSkellam(clip_norm=1.0)]
CORRELATED = [TreeAggregation(clip_norm=1.0), BandedMatrix(clip_norm=1.0, bands=2)]


def named(mechanism: Any) -> str:
    return mechanism.name


class TestMechanisms:
    @pytest.mark.parametrize("mechanism", DISTRIBUTED, ids=named)
    def test_distributed_ones_have_bits_of_their_own_and_rotate_over_all_coordinates(self, mechanism, data):
        settings = {**CYCLIC, "mechanism": mechanism.replace(noise_multiplier=2.0)}
        message = refusal(experiment, data, compression=Compression(bits=4), **settings)
        assert "mechanism.bits" in message
        message = refusal(experiment, data, compression=Compression(sparsity=0.5), **settings)
        assert "choose random_k or rank" in message
        for left in ({"random_k": 9}, {"rank": 1}, {"top_k": 9, "error_feedback": True}):
            assert experiment(data, compression=Compression(**left), **settings).plan().noise_multiplier > 0

    @pytest.mark.parametrize("mechanism", CORRELATED, ids=named)
    @pytest.mark.parametrize("settings", [{"random_k": 9}, {"rank": 1}, {"random_k": 9, "bits": 2}], ids=str)
    def test_correlated_ones_need_the_same_coordinates_in_each_round(self, mechanism, settings, data):
        message = refusal(experiment, data, compression=Compression(**settings), mechanism=mechanism, **CYCLIC)
        assert f"the noise of the mechanism {mechanism.name} cancels over the rounds" in message
        assert next(iter(settings)) in message

    @pytest.mark.parametrize("mechanism", CORRELATED, ids=named)
    @pytest.mark.parametrize("settings", [{"bits": 2, "rotation": True}, {"sparsity": 0.5}, {"top_k": 5}], ids=str)
    def test_correlated_ones_take_the_rest(self, mechanism, settings, data):
        experiment(data, compression=Compression(**settings), mechanism=mechanism, **CYCLIC)

    @pytest.mark.parametrize(
        "mechanism",
        [Gaussian(clip_norm=1), AdaptiveClipping(clip_norm=1), LocalGaussian(clip_norm=1), LocalLaplace(clip_norm=1)],
        ids=named,
    )
    @pytest.mark.parametrize("selection", [{"random_k": 9}, {"rank": 1}, {"sparsity": 0.5}], ids=str)
    def test_others_take_all(self, mechanism, selection):
        mechanism.check_compression(Compression(bits=3, rotation=True, **selection))

    def test_the_plan_refuses_what_the_experiment_refuses(self):
        plan, compression = CORRELATED[0].replace(noise_multiplier=1.0).plan, Compression(random_k=9)
        settings = (CYCLIC["privacy"], CYCLIC["sampler"], 20, 5)
        assert "cancels over the rounds" in refusal(plan, *settings, compression=compression)

    def test_weights_by_examples_are_not_for_tff(self, data):
        settings = {"mechanism": NoMechanism(weighting="examples"), "compression": Compression(bits=4)}
        message = refusal(experiment, data, engine="tff", **settings)
        assert 'choose engine="graph"' in message
        experiment(data, **settings)
        experiment(data, engine="tff", **{**settings, "compression": Compression(top_k=5)})

    def test_a_query_of_compressed_updates_needs_their_template(self, data):
        plan = experiment(data, compression=Compression(bits=4)).plan()
        assert "give the query the template" in refusal(plan.query, 0)


class TestWords:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({}, "none"),
            ({"bits": 1}, "1 bit"),
            ({"bits": 4, "rotation": True, "random_k": 0.1}, "random k 0.1, 4 bits rotated"),
            ({"rank": 2, "top_k": 50, "error_feedback": True}, "rank 2, top k 50 with feedback"),
            ({"sparsity": 0.9, "bits": 8}, "sparsity 0.9, 8 bits"),
        ],
        ids=str,
    )
    def test_name_what_is_done(self, settings, words):
        assert Compression(**settings).in_words() == words

    def test_the_guarantee_says_that_it_does_not_depend_on_the_compression(self, data):
        private = {
            "privacy": dpfl.Privacy(epsilon=4, delta=1e-2),
            "mechanism": Gaussian(clip_norm=1.0),
        }
        plain, compressed = (
            experiment(data, compression=Compression(**settings), **private).plan().guarantee
            for settings in ({}, {"bits": 4, "top_k": 9})
        )
        assert compressed.epsilon == plain.epsilon
        assert compressed.event == plain.event
        (more,) = set(compressed.assumptions) - set(plain.assumptions)
        assert "4 bits, top k 9" in more

    def test_the_noise_is_calibrated_for_the_coordinates_that_are_left(self, data):
        """Only where a mechanism needs their number; others' noise on each coordinate is the same."""
        settings = {**CYCLIC, "privacy": CYCLIC["privacy"].replace(epsilon=8)}
        plans = [
            experiment(data, compression=compression, mechanism=DistributedSkellam(clip_norm=1.0), **settings).plan()
            for compression in (Compression(), Compression(random_k=9))
        ]
        assert [plan.dimension for plan in plans] == [111, 9]
