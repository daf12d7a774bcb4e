from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl.data import partitions
from dpfl.data.partitions import dirichlet, iid, parse, shards

TEXTS = st.sampled_from(["iid", "dirichlet:0.01", "dirichlet:0.3", "dirichlet:1000", "shards:1", "shards:3"])


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int, str]:
    text = draw(TEXTS)
    labels = np.array(draw(st.lists(st.integers(-3, 6), min_size=3, max_size=80)))
    clients = draw(st.integers(1, len(labels) // (3 if text == "shards:3" else 1)))
    return labels, clients, draw(st.integers(0, 2**40)), text


@given(cases())
@settings(deadline=None)
def test_every_example_has_one_client_and_every_client_an_example(
    case: tuple[np.ndarray, int, int, str],
) -> None:
    labels, clients, seed, text = case
    owner = parse(text)(labels, clients, seed)
    assert owner.shape == labels.shape
    assert owner.dtype == np.int64
    sizes = np.bincount(owner, minlength=clients)
    assert len(sizes) == clients
    assert sizes.min() >= 1
    np.testing.assert_array_equal(owner, parse(text)(labels, clients, seed))
    if not text.startswith("shards"):
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("text", ["iid", "dirichlet:0.3", "shards:2"])
def test_seeds_differ(text: str) -> None:
    labels = np.arange(200) % 10
    partition = parse(text)
    assert (partition(labels, 20, 0) != partition(labels, 20, 1)).any()


def _skew(owner: np.ndarray, labels: np.ndarray) -> float:
    """Mean share of the commonest class of a client."""
    counts = np.zeros((owner.max() + 1, labels.max() + 1))
    np.add.at(counts, (owner, labels), 1)
    return float((counts.max(axis=1) / counts.sum(axis=1)).mean())


def test_dirichlet_skew_falls_with_alpha_from_one_class_to_iid() -> None:
    labels = np.arange(5000) % 10
    skews = [_skew(dirichlet(labels, 100, alpha, seed=1), labels) for alpha in (1e-9, 0.1, 1, 10, 1e6)]
    assert skews == sorted(set(skews), reverse=True)
    assert skews[0] > 0.9
    assert skews[1] - skews[2] > 0.05
    assert skews[-1] == pytest.approx(_skew(iid(labels, 100, seed=1), labels), abs=0.02)


@pytest.mark.parametrize("text", ["iid", "dirichlet:1e9"])
def test_a_shuffle_with_the_same_seed_is_not_undone(text: str) -> None:
    labels = np.random.default_rng(0).permutation(np.arange(6000) % 10)
    assert _skew(parse(text)(labels, 100, 0), labels) < 0.3


def test_dirichlet_mixtures_follow_the_class_frequencies() -> None:
    """The share of a class over clients has mean p and variance p (1 - p) / (alpha + 1), here plus sampling."""
    labels = np.repeat([0, 1], [30_000, 90_000])
    owner = dirichlet(labels, 1200, 3.0, seed=0)
    share = np.bincount(owner, weights=labels == 0) / np.bincount(owner)
    assert share.mean() == pytest.approx(0.25, abs=1e-9)
    early = share[:600]  # the last clients are left with what the others did not take
    expected = 0.25 * 0.75 / 4
    sampling = (0.25 * 0.75 - expected) / 100
    assert early.mean() == pytest.approx(0.25, abs=0.03)
    assert early.var() == pytest.approx(expected + sampling, rel=0.2)


def test_a_rare_class_does_not_slow_dirichlet_down() -> None:
    labels = np.r_[np.zeros(10_000, int), 1]
    assert np.bincount(dirichlet(labels, 1000, 1e-200, seed=0)).min() == 10


def test_shards_give_a_client_few_classes_and_equal_sizes() -> None:
    labels = np.random.default_rng(0).permutation(np.arange(6000) % 10)
    owner = shards(labels, 100, 2, seed=0)
    assert set(np.bincount(owner)) == {60}
    classes = np.array([len(np.unique(labels[owner == client])) for client in range(100)])
    assert classes.max() <= 2
    assert (classes == 2).mean() > 0.7
    assert max(len(np.unique(labels[iid(labels, 100, 0) == client])) for client in range(5)) > 5


@pytest.mark.parametrize(
    "partition",
    [iid, lambda labels, clients, seed: dirichlet(labels, clients, 1, seed), parse("shards:1")],
)
def test_more_clients_than_examples_are_refused(partition: Callable[..., Any], refuses: Any) -> None:
    labels = np.zeros(5, int)
    with refuses("6 clients", "5 examples"):
        partition(labels, 6, 0)
    with refuses("clients is 0", "at least 1"):
        partition(labels, 0, 0)
    with refuses("(5, 1)"):
        partition(labels[:, None], 2, 0)
    assert sorted(partition(labels, 5, 0)) == [0, 1, 2, 3, 4]


def test_other_refusals(refuses: Any) -> None:
    with refuses("3 clients with 2 shards", "6 examples", "there are 5"):
        shards(np.zeros(5), 3, 2, 0)
    with refuses("shards_per_client is 0"):
        shards(np.zeros(5), 3, 0, 0)
    for alpha in (0.0, -1.0, np.nan, np.inf):
        with refuses("alpha", "above 0"):
            dirichlet(np.zeros(5), 3, alpha, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "IID",
        "iid:2",
        "iid:",
        "dirichlet",
        "dirichlet:",
        "dirichlet:x",
        "dirichlet:0",
        "dirichlet:nan",
        "dirichlet:inf",
        "shards",
        "shards:0",
        "shards:1.5",
        "shards:-1",
        "random",
    ],
)
def test_unknown_partitions_are_refused_with_the_valid_forms(text: str, refuses: Any) -> None:
    with refuses(repr(text), "'iid'", "dirichlet:ALPHA", "shards:PER_CLIENT"):
        parse(text)


def test_strings_name_the_partitions() -> None:
    labels = np.arange(100) % 7
    np.testing.assert_array_equal(parse("iid")(labels, 9, 3), iid(labels, 9, 3))
    np.testing.assert_array_equal(parse("dirichlet:0.3")(labels, 9, 3), dirichlet(labels, 9, 0.3, 3))
    np.testing.assert_array_equal(parse("shards:2")(labels, 9, 3), shards(labels, 9, 2, 3))
    assert partitions.parse is parse
