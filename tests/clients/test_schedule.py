"""Every example counts once an epoch, in an order of the client's own."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpfl.clients.schedule import examples_seen, minibatches, poisson_minibatch
from dpfl.randomness import Purpose, stateless_seed

FALSE_ALARM = 1e-6
SEED = stateless_seed(0, Purpose.SHUFFLING)
FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def schedule(
    sizes: list[int],
    *,
    steps: int = 0,
    epochs: int = 0,
    batch_size: int | None = 4,
    clients: list[int] | None = None,
    starts: list[int] | None = None,
    seed: np.ndarray = SEED,
    round_number: int = 0,
) -> list[list[list[int]]]:
    """The counted rows of each client's minibatches, after a look at the shapes."""
    clients = list(range(len(sizes))) if clients is None else clients
    starts = np.cumsum([0, *sizes[:-1]]).tolist() if starts is None else starts
    rows, mask = minibatches(
        tf.constant(starts, tf.int32),
        tf.constant(sizes, tf.int32),
        tf.constant(clients, tf.int32),
        steps=tf.constant(steps),
        epochs=tf.constant(epochs),
        batch_size=batch_size,
        seed=tf.constant(seed, tf.int32),
        round_number=tf.constant(round_number),
    )
    per_epoch = [-(-size // (batch_size or size)) for size in sizes]
    most = steps or max(epochs * count for count in per_epoch)
    assert rows.shape == mask.shape == (len(sizes), most, batch_size or max(sizes))
    assert rows.dtype == tf.int32
    assert mask.dtype == tf.float32
    rows, mask = rows.numpy(), mask.numpy()
    assert set(np.unique(mask)) <= {0.0, 1.0}
    for client, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        # Rows that do not count are gathered all the same: they must be the client's own.
        assert np.all((rows[client] >= start) & (rows[client] < start + size))
    return [
        [[int(row) for row, counts in zip(*batch, strict=True) if counts] for batch in zip(*pair, strict=True)]
        for pair in zip(rows, mask, strict=True)
    ]


def epochs_of(batches: list[list[int]], size: int, batch_size: int) -> list[list[list[int]]]:
    per_epoch = -(-size // batch_size)
    return [batches[start : start + per_epoch] for start in range(0, len(batches), per_epoch)]


def orders(count: int, size: int, **settings: object) -> np.ndarray:
    """Orders of the first epoch of many clients of one size, (count, size), rows counted from 0."""
    batches = schedule([size] * count, starts=[0] * count, batch_size=size, epochs=1, **settings)
    return np.array([client[0] for client in batches])


class TestEpochs:
    @FEW
    @given(st.lists(st.integers(1, 13), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 6))
    def test_every_example_counts_once_an_epoch(self, sizes, epochs, batch_size):
        starts = np.cumsum([0, *sizes])
        for client, batches in enumerate(schedule(sizes, epochs=epochs, batch_size=batch_size)):
            size, own = sizes[client], list(range(starts[client], starts[client + 1]))
            per_epoch = -(-size // batch_size)
            done, idle = batches[: epochs * per_epoch], batches[epochs * per_epoch :]
            assert not any(idle)
            for passed in epochs_of(done, size, batch_size):
                assert sorted(itertools.chain(*passed)) == own
                # Full minibatches, and what is left in the last.
                assert [len(batch) for batch in passed] == [batch_size] * (size // batch_size) + (
                    [size % batch_size] if size % batch_size else []
                )

    def test_unequal_clients(self):
        small, large, lone = schedule([3, 9, 1], epochs=2)
        assert [len(batch) for batch in small] == [3, 3, 0, 0, 0, 0]
        assert [len(batch) for batch in large] == [4, 4, 1, 4, 4, 1]
        assert [len(batch) for batch in lone] == [1, 1, 0, 0, 0, 0]
        assert lone[0] == lone[1] == [12]

    def test_one_example_in_batches_of_one(self):
        assert schedule([1], epochs=3, batch_size=1) == [[[0], [0], [0]]]

    def test_a_batch_larger_than_the_client(self):
        (only,) = schedule([5], epochs=2, batch_size=100)
        assert [sorted(batch) for batch in only] == [list(range(5))] * 2


class TestSteps:
    @FEW
    @given(st.lists(st.integers(1, 13), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 6))
    def test_every_client_takes_so_many_steps(self, sizes, steps, batch_size):
        starts = np.cumsum([0, *sizes])
        for client, batches in enumerate(schedule(sizes, steps=steps, batch_size=batch_size)):
            size, own = sizes[client], set(range(starts[client], starts[client + 1]))
            per_epoch = -(-size // batch_size)
            assert len(batches) == steps
            for step, batch in enumerate(batches):
                last = step % per_epoch == per_epoch - 1
                assert len(batch) == ((size - 1) % batch_size + 1 if last else batch_size)
            for passed in epochs_of(batches, size, batch_size):
                seen = list(itertools.chain(*passed))
                assert len(set(seen)) == len(seen)
                assert set(seen) == own if len(passed) == per_epoch else set(seen) < own

    def test_are_the_first_steps_of_the_epochs(self):
        for count in (1, 3, 6, 7):
            by_steps, by_epochs = schedule([9, 5], steps=count), schedule([9, 5], epochs=4)
            assert [client[:count] for client in by_steps] == [client[:count] for client in by_epochs]


class TestWholeClients:
    def test_every_minibatch_has_all_of_a_clients_examples(self):
        for stops in ({"steps": 3}, {"epochs": 3}):
            small, large = schedule([2, 5], batch_size=None, **stops)
            assert [sorted(batch) for batch in small] == [[0, 1]] * 3
            assert [sorted(batch) for batch in large] == [[2, 3, 4, 5, 6]] * 3

    def test_are_those_of_a_batch_that_is_large_enough(self):
        for stops in ({"steps": 3}, {"epochs": 2}):
            assert schedule([2, 5], batch_size=None, **stops) == schedule([2, 5], batch_size=5, **stops)


class TestExamplesSeen:
    @FEW
    @given(
        st.lists(st.integers(1, 13), min_size=1, max_size=5),
        st.integers(1, 9),
        st.sampled_from(["steps", "epochs"]),
        st.one_of(st.none(), st.integers(1, 6)),
    )
    def test_are_those_that_count_in_the_minibatches(self, sizes, count, unit, batch_size):
        stops = {"steps": 0, "epochs": 0, unit: count}
        seen = examples_seen(tf.constant(sizes), **stops, batch_size=batch_size)
        counted = [sum(map(len, batches)) for batches in schedule(sizes, batch_size=batch_size, **stops)]
        assert seen.numpy().tolist() == counted
        if unit == "epochs":
            assert counted == [count * size for size in sizes]

    def test_of_poisson_minibatches_are_those_to_be_expected(self):
        sizes = tf.constant([3, 10, 11])
        for stops, expected in (({"steps": 7, "epochs": 0}, [21, 35, 35]), ({"steps": 0, "epochs": 2}, [6, 20, 30])):
            seen = examples_seen(sizes, **stops, batch_size=5, sampling="poisson")
            assert seen.numpy().tolist() == expected


class TestOrder:
    def test_does_not_depend_on_who_is_trained_beside(self):
        sizes, clients, starts = [9, 4, 13, 1], [7, 2, 30, 11], [100, 0, 50, 90]
        together = schedule(sizes, clients=clients, starts=starts, epochs=3)
        for index in range(4):
            (alone,) = schedule([sizes[index]], clients=[clients[index]], starts=[starts[index]], epochs=3)
            assert together[index][: len(alone)] == alone
            assert not any(together[index][len(alone) :])

    def test_does_not_depend_on_the_place_in_the_chunk(self):
        sizes, clients, starts = [9, 4, 13, 1], [7, 2, 30, 11], [100, 0, 50, 90]
        straight = schedule(sizes, clients=clients, starts=starts, epochs=2)
        back = schedule(sizes[::-1], clients=clients[::-1], starts=starts[::-1], epochs=2)
        assert straight == back[::-1]

    def test_does_not_depend_on_where_the_examples_are(self):
        (here,), (there,) = (schedule([9], starts=[start], epochs=2) for start in (0, 1000))
        assert [[row + 1000 for row in batch] for batch in here] == there

    def test_does_not_depend_on_the_batch_size(self):
        in_batches = [list(itertools.chain(*schedule([12], epochs=1, batch_size=b)[0])) for b in (1, 4, 5, 12, 50)]
        assert all(order == in_batches[0] for order in in_batches)

    def test_is_repeatable(self):
        assert schedule([9, 5], epochs=2) == schedule([9, 5], epochs=2)

    def test_is_the_same_in_a_graph(self):
        @tf.function
        def in_graph(round_number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return minibatches(
                tf.constant([0, 9]),
                tf.constant([9, 5]),
                tf.constant([0, 1]),
                steps=tf.constant(0),
                epochs=tf.constant(2),
                batch_size=4,
                seed=tf.constant(SEED),
                round_number=round_number,
            )

        for number in (0, 3):
            rows, mask = (part.numpy() for part in in_graph(tf.constant(number)))
            compiled = [
                [r[m > 0].tolist() for r, m in zip(*pair, strict=True)] for pair in zip(rows, mask, strict=True)
            ]
            assert compiled == schedule([9, 5], epochs=2, round_number=number)

    def test_differs_by_round_epoch_client_and_seed(self):
        # 20 examples: two independent orders agree with probability 4e-19.
        batches = schedule([20, 20], starts=[0, 0], epochs=2, batch_size=20)
        later = schedule([20, 20], starts=[0, 0], epochs=2, batch_size=20, round_number=1)
        reseeded = schedule([20, 20], starts=[0, 0], epochs=2, batch_size=20, seed=stateless_seed(1, Purpose.SHUFFLING))
        seen = [tuple(batch) for drawn in (batches, later, reseeded) for client in drawn for batch in client]
        assert len(set(seen)) == len(seen) == 12

    def test_both_words_of_the_seed_count(self):
        seeds = [(0, 0), (0, 1), (1, 0), (-1, 0), (0, -1), (1, 1), (2**31 - 1, -(2**31))]
        drawn = {tuple(orders(1, 20, seed=np.int32(seed))[0]) for seed in seeds}
        assert len(drawn) == len(seeds)


class TestUniformity:
    """Chi-square tests; with random seeds each would fail with probability 1e-6."""

    def assert_uniform(self, orders: np.ndarray) -> None:
        """Every permutation of four examples equally often."""
        assert orders.shape[1] == 4
        _, counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)
        assert len(counts) == 24
        assert stats.chisquare(counts).pvalue >= FALSE_ALARM

    def test_of_positions(self):
        size, drawn = 8, orders(20_000, 8)
        counts = np.array([np.bincount(drawn[:, place], minlength=size) for place in range(size)])
        expected = len(drawn) / size
        # Row and column sums are fixed: (size - 1) ** 2 degrees of freedom, and this factor.
        statistic = np.sum((counts - expected) ** 2) / expected * (size - 1) / size
        assert stats.chi2.sf(statistic, (size - 1) ** 2) >= FALSE_ALARM

    def test_over_clients(self):
        self.assert_uniform(orders(24_000, 4))

    def test_over_epochs(self):
        (batches,) = schedule([4], epochs=24_000)
        self.assert_uniform(np.array(batches))

    @pytest.mark.parametrize("vary", ["round", "seed"])
    def test_over_rounds_and_seeds(self, vary):
        @tf.function
        def order(number: tf.Tensor) -> tf.Tensor:
            rows, _ = minibatches(
                tf.constant([0]),
                tf.constant([4]),
                tf.constant([0]),
                steps=tf.constant(0),
                epochs=tf.constant(1),
                batch_size=4,
                seed=tf.stack([number, 7]) if vary == "seed" else tf.constant(SEED),
                round_number=number if vary == "round" else tf.constant(0),
            )
            return rows[0, 0]

        self.assert_uniform(tf.map_fn(order, tf.range(2_400)).numpy())

    def test_successive_epochs_are_independent(self):
        (batches,) = schedule([4], epochs=24_000)
        first = np.array(batches)[:, 0]
        table = np.zeros((4, 4))
        np.add.at(table, (first[:-1], first[1:]), 1)
        assert stats.chi2_contingency(table)[1] >= FALSE_ALARM

    def test_neighbouring_clients_are_independent(self):
        first = orders(24_000, 4)[:, 0]
        table = np.zeros((4, 4))
        np.add.at(table, (first[:-1], first[1:]), 1)
        assert stats.chi2_contingency(table)[1] >= FALSE_ALARM


@functools.cache
def _compiled(batch_size: int, max_batch_size: int | None):
    @tf.function(autograph=False)
    def draw(records, steps, seed):
        def one(step):
            rows, mask = poisson_minibatch(
                records, step, batch_size=batch_size, max_batch_size=max_batch_size, seed=seed
            )
            well_formed = (tf.size(rows) == tf.size(mask)) & (tf.size(rows) >= 1)
            well_formed &= tf.reduce_all(rows[1:] > rows[:-1]) & tf.reduce_all((rows >= 0) & (rows < records))
            well_formed &= tf.reduce_all(mask == 1) | tf.reduce_all(tf.equal(mask, [0.0]))
            drawn = tf.tensor_scatter_nd_add(tf.zeros([records]), rows[:, None], mask)
            return drawn, well_formed

        return tf.map_fn(one, tf.range(steps), fn_output_signature=(tf.float32, tf.bool))

    return draw


def poisson(
    records: int, steps: int, *, batch_size: int = 4, max_batch_size: int | None = None, seed: np.ndarray = SEED
) -> np.ndarray:
    """Who is drawn in which step, bool of shape (steps, records), after a look at rows and masks."""
    draw = _compiled(batch_size, max_batch_size)
    drawn, well_formed = draw(tf.constant(records), tf.constant(steps), tf.constant(seed, tf.int32))
    assert well_formed.numpy().all()
    return drawn.numpy() > 0


class TestPoissonMinibatches:
    @pytest.mark.parametrize(("records", "batch_size"), [(50, 4), (50, 49), (7, 1), (1000, 1)])
    def test_each_example_is_drawn_at_the_rate(self, records, batch_size):
        drawn, rate = poisson(records, 2000, batch_size=batch_size), batch_size / records
        # All fail together with a probability below 1e-6 under the seed's randomness.
        low, high = stats.binom.interval(1 - FALSE_ALARM / records, 2000, rate)
        assert ((drawn.sum(axis=0) >= low) & (drawn.sum(axis=0) <= high)).all()
        sizes = drawn.sum(axis=1)
        expected = stats.binom.pmf(np.arange(records + 1), records, rate) * len(sizes)
        common = expected >= 5
        observed = np.bincount(sizes, minlength=records + 1)
        counts = np.append(observed[common], observed[~common].sum())
        predicted = np.append(expected[common], expected[~common].sum())
        kept = predicted > 0
        assert (
            stats.chisquare(counts[kept], predicted[kept] * counts.sum() / predicted[kept].sum()).pvalue > FALSE_ALARM
        )

    def test_examples_and_steps_are_independent(self):
        drawn = poisson(20, 4000, batch_size=6).astype(float)
        standard = (drawn - 0.3) / np.sqrt(0.3 * 0.7)
        # Sums of 4,000 products of variance 1: beyond 6.5 standard deviations with 1e-10 each.
        for lag in (0, 1, 2):
            products = standard[: len(standard) - lag].T @ standard[lag:] / np.sqrt(len(standard) - lag)
            if lag == 0:
                np.fill_diagonal(products, 0)
            assert np.abs(products).max() < 6.5

    def test_seeds_are_independent(self):
        one, other = (poisson(20, 2000, batch_size=6, seed=SEED + change) for change in (0, 1))
        products = (one - 0.3) * (other - 0.3) / 0.21
        assert np.abs(products.sum(axis=0)).max() / np.sqrt(2000) < 6.5
        np.testing.assert_array_equal(one[:5], poisson(20, 5, batch_size=6))

    @pytest.mark.parametrize("records", [1, 3, 4])
    def test_small_clients_take_part_whole(self, records):
        assert poisson(records, 50, batch_size=4).all()

    def test_empty_minibatches_occur_and_count_nobody(self):
        empty = (~poisson(30, 1000, batch_size=1).any(axis=1)).sum()
        low, high = stats.binom.interval(1 - FALSE_ALARM, 1000, (1 - 1 / 30) ** 30)
        assert low <= empty <= high

    def test_larger_samples_are_cut_to_a_random_part(self):
        free = poisson(12, 3000, batch_size=4)
        cut = poisson(12, 3000, batch_size=4, max_batch_size=4)
        np.testing.assert_array_equal(cut.sum(axis=1), np.minimum(free.sum(axis=1), 4))
        assert (free | ~cut).all()  # who is left was drawn
        too_many = free.sum(axis=1) > 4
        assert too_many.sum() > 800
        np.testing.assert_array_equal(cut[~too_many], free[~too_many])
        # Each of a sample of k is kept with probability 4 / k.
        for size in (5, 6):
            of_size = free.sum(axis=1) == size
            kept = [cut[of_size & free[:, example], example] for example in range(12)]
            for one in kept:
                low, high = stats.binom.interval(1 - FALSE_ALARM, len(one), 4 / size)
                assert low <= one.sum() <= high

    def test_a_limit_beyond_the_records_changes_nothing(self):
        np.testing.assert_array_equal(poisson(5, 100, max_batch_size=9), poisson(5, 100))
