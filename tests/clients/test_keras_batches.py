"""Minibatches: how often, how many, and which."""

import itertools

import numpy as np
import pytest
from scipy import stats

import dpfl
from dpfl.clients.keras_door.batches import ShuffledBatches, with_class_weights

_UNLIKELY = 1e-7


def _numbers(examples):
    return np.arange(examples, dtype=np.float32)[:, None], np.arange(examples)


def _taken(batches, steps, first_step=0):
    return list(itertools.islice(batches.dataset(first_step).as_numpy_iterator(), steps))


def test_every_example_is_drawn_on_its_own_at_the_rate():
    steps, examples = 4000, 40
    batches = dpfl.PoissonBatches(*_numbers(examples), 6, seed=3)
    drawn = np.zeros((steps, examples))
    for step in range(steps):
        drawn[step, batches.rows(step)] = 1
    # Each test fails with a probability below 1e-7 by chance.
    frequencies = drawn.sum(0)
    assert (stats.binom.sf(frequencies - 1, steps, 0.15) > _UNLIKELY / 2 / examples).all()
    assert (stats.binom.cdf(frequencies, steps, 0.15) > _UNLIKELY / 2 / examples).all()
    sizes = np.bincount(drawn.sum(1).astype(int), minlength=13)[:13]
    sizes[12] = steps - sizes[:12].sum()
    expected = stats.binom.pmf(np.arange(13), examples, 0.15)
    expected[12] = 1 - expected[:12].sum()
    assert stats.chisquare(sizes, steps * expected).pvalue > _UNLIKELY
    # Neighbours in place and in time are uncorrelated.
    for one, other in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])):
        correlation = np.mean((one - 0.15) * (other - 0.15)) / (0.15 * 0.85)
        assert abs(correlation) < stats.norm.isf(_UNLIKELY / 2) / np.sqrt(one.size)


def test_truncation_keeps_a_random_part():
    batches = dpfl.PoissonBatches(*_numbers(20), 8, seed=4, max_batch_size=9)
    rows = [batches.rows(step) for step in range(4000)]
    sizes = np.array([len(part) for part in rows])
    assert sizes.max() == 9
    share = stats.binom.sf(8, 20, 0.4)
    assert stats.binomtest(int((sizes == 9).sum()), 4000, share).pvalue > _UNLIKELY
    full = np.concatenate([part for part in rows if len(part) == 9])
    counts, total = np.bincount(full, minlength=20), len(full) // 9
    assert all(stats.binomtest(int(count), total, 9 / 20).pvalue > _UNLIKELY / 20 for count in counts)


def test_minibatches_hold_their_rows():
    x, y = _numbers(30)
    weights = np.linspace(0.5, 2, 30)
    batches = dpfl.PoissonBatches({"a": x, "b": x.astype(np.float64)}, y, 3, seed=5, sample_weight=weights)
    for step, (inputs, labels, marks) in enumerate(_taken(batches, 80)):
        rows = batches.rows(step)
        np.testing.assert_array_equal(labels[: marks.count], rows)
        np.testing.assert_array_equal(inputs["a"][: marks.count, 0], rows)
        assert inputs["b"].dtype == np.float32
        np.testing.assert_allclose(marks.weights[: marks.count], weights[rows], rtol=1e-6)
        assert len(labels) == max(len(rows), 1)
        assert marks.charge == 1
        if not len(rows):
            assert marks.weights.tolist() == [0.0]
    assert any(not len(batches.rows(step)) for step in range(80))


def test_a_fixed_size_is_filled_up_with_nobody():
    batches = dpfl.PoissonBatches(*_numbers(30), 3, seed=5, max_batch_size=6)
    for step, (_, labels, marks) in enumerate(_taken(batches, 40)):
        assert len(labels) == 6
        assert marks.count == len(batches.rows(step))
        np.testing.assert_array_equal(marks.weights, (np.arange(6) < marks.count).astype(np.float32))


def test_minibatches_follow_seed_and_step():
    first, second, other = (dpfl.PoissonBatches(*_numbers(500), 50, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.rows(9), second.rows(9))
    assert not np.array_equal(first.rows(9), first.rows(10))
    assert not np.array_equal(first.rows(9), other.rows(9))
    secret = [dpfl.PoissonBatches(*_numbers(500), 50).rows(0) for _ in range(2)]
    assert not np.array_equal(*secret)
    np.testing.assert_array_equal(_taken(first, 1, first_step=70)[0][1], first.rows(70))


def test_shuffled_passes_use_everybody_once():
    batches = ShuffledBatches(*_numbers(10), 4, seed=6)
    assert batches.steps_per_epoch == 3
    taken = _taken(batches, 6, first_step=5)
    sizes = [int(marks.count) for _, _, marks in taken]
    assert sizes == [4, 4, 2, 4, 4, 2]
    assert [int(marks.charge) for _, _, marks in taken] == [1, 0, 0, 1, 0, 0]
    passes = [np.concatenate([labels for _, labels, _ in part]) for part in (taken[:3], taken[3:])]
    for one in passes:
        assert sorted(one) == list(range(10))
    assert not np.array_equal(*passes)


def test_class_weights():
    weights = {0: 2.0, 1: 3.0, 2: 5.0}
    expected = [2.0, 5.0, 3.0]
    for labels in ([0, 2, 1], [[0], [2], [1]], np.eye(3)[[0, 2, 1]], np.array([0.0, 2.0, 1.0])):
        np.testing.assert_allclose(with_class_weights(np.asarray(labels), weights, None), expected)
    np.testing.assert_allclose(with_class_weights(np.array([0, 2, 1]), weights, [1, 2, 3]), [2, 10, 9])
    with pytest.raises(dpfl.InputError, match="lacks the classes 7"):
        with_class_weights(np.array([7]), weights, None)
    with pytest.raises(dpfl.InputError, match="one array"):
        with_class_weights([np.zeros(3), np.zeros(3)], weights, None)
