"""Queries inside TensorFlow Federated release what they release in a plain graph.

As in the in-graph engine, that is a loop over the clients in a `tf.function`. Run eagerly, the
noise is the same too, but clipping can differ by one unit in the last place. Noise that clients draw themselves
cannot be the same in TFF, which does not say which client it is; there its distribution is tested.
"""

import importlib.util
import json
import math

import numpy as np
import pytest
from own_process import answer_of
from scipy import stats

pytestmark = [
    pytest.mark.slow,  # Importing TensorFlow Federated alone takes some seconds.
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow_federated") is None,
        reason="TensorFlow Federated has wheels for Linux on x86_64 alone",
    ),
]

SAME_IN_BOTH = (
    "gaussian",
    "gaussian, per layer",
    "gaussian, per layer by size",
    "adaptive clipping",
    "tree",
    "tree, honaker",
    "tree, restarted",
    "tree, honaker, restarted",
    "banded",
)
CLIENTS, SIZE, EXPECTED, CLIP, NOISE = 2, 2000, 60, 0.7, 1.5
# The standard deviation of the sum of two clients' noise, in clip norms: distributed clients add shares of 60.
BY_CLIENTS = {
    "local gaussian": NOISE * math.sqrt(CLIENTS),
    "local laplace": NOISE * math.sqrt(2 * CLIENTS),
    "discrete gaussian": NOISE * math.sqrt(CLIENTS / EXPECTED),
    "skellam": NOISE * math.sqrt(CLIENTS / EXPECTED),
}
FALSE_ALARM = 1e-6

SCRIPT = """
import json
import os
import sys

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", GRPC_VERBOSITY="NONE", GRPC_ENABLE_FORK_SUPPORT="0")
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from dpfl.mechanisms import Gaussian
from dpfl.mechanisms.adaptive_clipping import AdaptiveClipping
from dpfl.mechanisms.banded_matrix import BandedMatrix
from dpfl.mechanisms.distributed import DistributedDiscreteGaussian, DistributedSkellam
from dpfl.mechanisms.local import LocalGaussian, LocalLaplace
from dpfl.mechanisms.tree_aggregation import TreeAggregation
from dpfl.privacy import Privacy
from dpfl.sampling import Cyclic, Everyone, Poisson

shapes = [(3, 2), (2,), ()]
template = [tf.zeros(shape) for shape in shapes]
draws = np.random.default_rng(0)

def records(count):
    return [[np.asarray(draws.normal(size=shape), np.float32) for shape in shapes] for _ in range(count)]

diverged = [np.full(shape, np.nan, np.float32) for shape in shapes]
cohorts = [records(4), [], [*records(2), diverged, *records(1)], records(2), records(3)]

def by_tff(query, template, cohorts):
    factory = tff.aggregators.DifferentiallyPrivateFactory(query)
    process = factory.create(tff.to_type([tff.TensorType(np.float32, part.shape.as_list()) for part in template]))
    state, released = process.initialize(), []
    for cohort in cohorts:
        output = process.next(state, cohort)
        state = output.state
        released.append([np.asarray(part).tolist() for part in output.result])
    return released

def by_loop(query, template, cohorts):
    @tf.function
    def one_round(state, *cohort):
        params = query.derive_sample_params(state)
        def body(index, total):
            record = query.preprocess_record(params, [part[index] for part in cohort])
            return index + 1, query.accumulate_preprocessed_record(total, record)
        loop = (tf.constant(0), query.initial_sample_state(template))
        _, total = tf.while_loop(lambda index, _: index < tf.shape(cohort[0])[0], body, loop)
        return query.get_noised_result(total, state)[:2]

    state, released = query.initial_global_state(), []
    for cohort in cohorts:
        parts = zip(*cohort) if cohort else [[] for _ in template]
        stacked = [np.array(part, np.float32).reshape(-1, *like.shape) for part, like in zip(parts, template)]
        result, state = one_round(state, *stacked)
        released.append([part.numpy().tolist() for part in result])
    return released

def planned(mechanism, sampler, relation="add_or_remove_one", dimension=None):
    target = Privacy(epsilon=None, delta=1e-3, relation=relation, accountant="rdp")
    return mechanism.replace(noise_multiplier=1.5).plan(target, sampler, 60, 5, dimension=dimension)

tree, poisson, cyclic = TreeAggregation(clip_norm=0.7), Poisson(cohort=20), Cyclic(cohort=20)
plain = tree.replace(variance_reduction="none")
plans = {
    "gaussian": Gaussian(clip_norm=0.7).plan(Privacy(epsilon=1, delta=1e-3), poisson, 60, 5),
    "gaussian, per layer": planned(Gaussian(clip_norm=0.7, clipping="per_layer"), poisson),
    "gaussian, per layer by size": planned(Gaussian(clip_norm=0.7, clipping="per_layer_by_size"), poisson),
    "adaptive clipping": planned(AdaptiveClipping(clip_norm=0.7), poisson),
    "tree": planned(plain, cyclic),
    "tree, honaker": planned(tree, cyclic),
    "tree, restarted": planned(plain.replace(restart_every=3), cyclic),
    "tree, honaker, restarted": planned(tree.replace(restart_every=3), cyclic),
    "banded": planned(BandedMatrix(clip_norm=0.7, bands=3), cyclic),
}
released = {
    name: {how.__name__: how(plan.query(7, template), template, cohorts) for how in (by_tff, by_loop)}
    for name, plan in plans.items()
}

size, update = 2000, [np.full(2000, 0.01, np.float32)]
noised = {
    "local gaussian": LocalGaussian(clip_norm=0.7),
    "local laplace": LocalLaplace(clip_norm=0.7),
    "discrete gaussian": DistributedDiscreteGaussian(clip_norm=0.7),
    "skellam": DistributedSkellam(clip_norm=0.7),
}
vector = [tf.zeros(size)]
for name, mechanism in noised.items():
    plan = planned(mechanism, Everyone(), "replace_special", size)
    released[name] = {
        "noisy": by_tff(plan.query(7, vector), vector, [[update, update]] * 3),
        "empty": by_tff(plan.query(7, vector), vector, [[]]),
    }

with open(sys.argv[1], "w") as file:
    json.dump(released, file)
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[list[float]]]]:
    """What mechanisms release in some rounds: by TFF and in a loop.

    Five rounds, the second with nobody and the third with a diverged client; of those whose clients draw the noise,
    three rounds of two clients with the same update, and one with nobody.
    """
    folder = tmp_path_factory.mktemp("tff")
    return json.loads(answer_of(SCRIPT, folder)[0])


# Functions, not classes: so pytest-xdist runs them in one process, with one fixture.
same_in_both = pytest.mark.parametrize("name", SAME_IN_BOTH)
noised_by_clients = pytest.mark.parametrize("name", BY_CLIENTS)


@same_in_both
def test_all_rounds_are_the_same(released, name):
    assert len(released[name]["by_tff"]) == 5
    # TFF's worker has a TensorFlow of its own, whose logarithms and cosines may differ in the last bit of float32.
    by_tff, by_loop = (numbers_in(released[name][engine]) for engine in ("by_tff", "by_loop"))
    np.testing.assert_allclose(by_tff, by_loop, rtol=1e-6, atol=1e-6)


@same_in_both
def test_every_round_has_noise_of_its_own(released, name):
    seen = [json.dumps(released[name]["by_tff"][number][1]) for number in range(5)]
    assert len(set(seen)) == 5
    assert all(value != 0 and value == value for value in released[name]["by_tff"][1][1])


def numbers_in(nested) -> list[float]:
    """All numbers in nested lists, in order."""
    return [number for part in nested for number in numbers_in(part)] if isinstance(nested, list) else [nested]


def noise_of_clients(released, name) -> np.ndarray:
    """What the two clients' sums are beside their updates, in clip norms; shape (3, coordinates)."""
    sums = np.array([rounds[0] for rounds in released[name]["noisy"]]) * EXPECTED / CLIP
    norm = 0.01 * (SIZE if "laplace" in name else math.sqrt(SIZE)) / CLIP
    return sums - CLIENTS * 0.01 / CLIP / max(1, norm)


@noised_by_clients
def test_the_mean_is_right(released, name):
    # By the central limit theorem; 1e-6, and what is left to rounding.
    noise = noise_of_clients(released, name)
    deviation = BY_CLIENTS[name] / math.sqrt(noise.size)
    assert abs(noise.mean()) <= stats.norm.isf(FALSE_ALARM / 2) * deviation * 1.02


@noised_by_clients
def test_two_clients_share_no_noise(released, name):
    # Did they, the sum's variance would be twice as large. 1e-6 by the central limit theorem, for which the
    # kurtosis of two Laplace draws together is 4.5, and 2 % for rounding.
    noise = noise_of_clients(released, name)
    ratio = np.mean(np.square(noise)) / BY_CLIENTS[name] ** 2
    bound = stats.norm.isf(FALSE_ALARM / 2) * math.sqrt((3.5 if "laplace" in name else 2) / noise.size)
    assert abs(ratio - 1) <= bound + 0.02


@noised_by_clients
def test_rounds_share_no_noise(released, name):
    correlations = np.corrcoef(noise_of_clients(released, name))[np.triu_indices(3, k=1)]
    assert np.max(np.abs(correlations)) <= stats.norm.isf(FALSE_ALARM / 6) / math.sqrt(SIZE)


@noised_by_clients
def test_nobody_adds_no_noise(released, name):
    assert not np.any(released[name]["empty"])
