"""The coordinates that are trained, sent and noised: bases are orthonormal, public, and new where they should be."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl.compression import Compression
from dpfl.compression.config import count_of, kept_weights
from dpfl.compression.subspace import Projection, Subspace, Subspaces, largest_of_all
from dpfl.noise import round_seed

SHAPES = [(3, 3, 2, 4), (4,), (20, 6), (5, 12), (), (2, 2)]
DIMENSION = sum(math.prod(shape) for shape in SHAPES)
ROUNDS = 10
SEED = tf.constant([3, 4])
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)
SELECTIONS = {
    "random k": Compression(random_k=17),
    "random fraction": Compression(random_k=0.3),
    "one coordinate": Compression(random_k=1),
    "all at random": Compression(random_k=DIMENSION),
    "rank 1": Compression(rank=1),
    "rank 3": Compression(rank=3),
    "rank 7": Compression(rank=7),
    "pruned": Compression(sparsity=0.8, pruning_begins=0.0, pruning_ends=0.2),
    "nothing": Compression(),
}

every_selection = pytest.mark.parametrize("name", SELECTIONS)


def tensors(seed: int, shapes: Sequence[tuple[int, ...]] = SHAPES, front: tuple[int, ...] = ()) -> list[tf.Tensor]:
    numbers = np.random.default_rng(seed)
    return [tf.constant(numbers.normal(size=front + tuple(shape)), tf.float32) for shape in shapes]


def flat(parts: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.float64).ravel() for part in parts])


def selected(name: str, round_number: int = 4, weights: int = 0) -> tuple[Subspaces, Subspace]:
    subspaces = Subspaces(SELECTIONS[name], SHAPES, ROUNDS)
    masks = subspaces.masks(tensors(weights), tf.constant(round_number))
    return subspaces, subspaces.of_round(SEED, tf.constant(round_number), masks)


class TestRecords:
    @every_selection
    def test_have_the_stated_shapes_and_coordinates(self, name):
        subspaces, subspace = selected(name)
        record = subspaces.records(subspace, tensors(1))
        assert [part.shape for part in record] == subspaces.record_shapes == SELECTIONS[name].record_shapes(SHAPES)
        sent = subspaces.sent(subspace, record)
        expected = SELECTIONS[name].sent_coordinates(SHAPES, 4, ROUNDS)
        assert sent.shape == (int(subspaces.sent_count(subspace)),) == (expected,)
        assert np.all(sent != 0)  # every coordinate that is sent says something

    @every_selection
    def test_of_an_update_in_the_subspace_are_as_long_as_it_and_give_it_back(self, name):
        subspaces, subspace = selected(name)
        record = subspaces.records(subspace, tensors(1))
        update = subspaces.updates(subspace, record)
        assert [part.shape for part in update] == [tf.TensorShape(shape) for shape in SHAPES]
        assert np.linalg.norm(flat(update)) == pytest.approx(np.linalg.norm(flat(record)), rel=1e-5)
        for again, part in zip(subspaces.records(subspace, update), record, strict=True):
            np.testing.assert_allclose(again, part, atol=1e-5)

    @every_selection
    def test_of_two_updates_keep_their_inner_product_there(self, name):
        """The basis is orthonormal: noise on records is as much noise on updates."""
        subspaces, subspace = selected(name)
        shapes = subspaces.record_shapes
        one, other = (subspaces.records(subspace, subspaces.updates(subspace, tensors(s, shapes))) for s in (1, 2))
        there, here = (flat(subspaces.updates(subspace, record)) for record in (one, other)), (flat(one), flat(other))
        np.testing.assert_allclose(math.prod(map(float, [np.dot(*there)])), np.dot(*here), rtol=1e-4, atol=1e-4)

    @every_selection
    def test_come_through_what_is_sent(self, name):
        subspaces, subspace = selected(name)
        record = subspaces.records(subspace, tensors(1))
        received = subspaces.received(subspace, subspaces.sent(subspace, record))
        for one, other in zip(received, record, strict=True):
            np.testing.assert_array_equal(one, other)

    @every_selection
    def test_never_get_longer(self, name):
        subspaces, subspace = selected(name)
        update = tensors(1)
        assert np.linalg.norm(flat(subspaces.records(subspace, update))) <= np.linalg.norm(flat(update)) * (1 + 1e-6)

    @every_selection
    def test_a_number_that_is_not_finite_is_not_lost_where_it_is_sent(self, name):
        subspaces, subspace = selected(name)
        update = [tf.fill(shape, math.nan) for shape in SHAPES]
        assert np.isnan(flat(subspaces.records(subspace, update))).any()


class TestProjection:
    @every_selection
    def test_is_what_records_and_updates_do(self, name):
        subspaces, subspace = selected(name)
        update = tensors(1)
        there_and_back = subspaces.updates(subspace, subspaces.records(subspace, update))
        for one, other in zip(subspaces.onto(subspace, update), there_and_back, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)

    @every_selection
    def test_is_orthogonal(self, name):
        """Twice is once; and it may be moved from one side of an inner product to the other."""
        subspaces, subspace = selected(name)
        one, other = tensors(1), tensors(2)
        once, of_other = subspaces.onto(subspace, one), subspaces.onto(subspace, other)
        np.testing.assert_allclose(flat(subspaces.onto(subspace, once)), flat(once), atol=1e-5)
        assert np.dot(flat(once), flat(other)) == pytest.approx(np.dot(flat(one), flat(of_other)), rel=1e-3, abs=1e-3)

    @every_selection
    @pytest.mark.parametrize("front", [(3,), (2, 3)])
    def test_of_several_clients_is_that_of_each(self, name, front):
        subspaces, subspace = selected(name)
        many = subspaces.onto(subspace, tensors(1, front=front))
        for at in itertools.product(*map(range, front)):
            one = subspaces.onto(subspace, [part[at] for part in tensors(1, front=front)])
            np.testing.assert_allclose(flat([part[at] for part in many]), flat(one), atol=1e-5)

    @every_selection
    def test_of_gated_weights_gradients_come_out_projected(self, name):
        subspaces, subspace = selected(name)
        projection, weights, slope = Projection(subspaces, SEED.numpy()), tensors(0), tensors(5)
        with tf.GradientTape() as tape:
            tape.watch(weights)
            through = projection.gated(weights, tf.constant(4))
            loss = tf.add_n([tf.reduce_sum(weight * part) for weight, part in zip(through, slope, strict=True)])
        np.testing.assert_array_equal(flat(through), flat(weights))
        found = flat(tape.gradient(loss, weights))
        np.testing.assert_allclose(found, flat(subspaces.onto(subspace, slope)), atol=1e-5)


class TestRandomK:
    @pytest.mark.parametrize("name", ["random k", "random fraction", "one coordinate", "all at random"])
    def test_are_so_many_distinct_coordinates(self, name):
        subspaces, subspace = selected(name)
        indices = subspace.indices.numpy()
        (count,) = subspaces.record_shapes[0]
        assert len(set(indices)) == len(indices) == count
        assert indices.min() >= 0
        assert indices.max() < DIMENSION
        np.testing.assert_array_equal(np.flatnonzero(flat(subspace.masks)), np.sort(indices))

    def test_are_new_in_each_round_and_the_same_for_all(self):
        subspaces = Subspaces(Compression(random_k=17), SHAPES, ROUNDS)
        rounds = [frozenset(subspaces.of_round(SEED, tf.constant(t)).indices.numpy()) for t in range(20)]
        assert len(set(rounds)) == 20
        another = Subspaces(Compression(random_k=17), SHAPES, ROUNDS)
        assert [frozenset(another.of_round(SEED, tf.constant(t)).indices.numpy()) for t in range(20)] == rounds
        assert frozenset(another.of_round(tf.constant([3, 5]), tf.constant(0)).indices.numpy()) != rounds[0]

    def test_every_coordinate_is_as_likely(self):
        """Hoeffding over 400 rounds, for all coordinates together: false alarm 1e-6."""
        subspaces, rounds = Subspaces(Compression(random_k=0.3), SHAPES, ROUNDS), 400
        of_round = tf.function(lambda number: subspaces.of_round(SEED, number).indices)
        counts = np.bincount(
            np.concatenate([of_round(tf.constant(t)).numpy() for t in range(rounds)]), minlength=DIMENSION
        )
        rate = count_of(0.3, DIMENSION) / DIMENSION
        bound = math.sqrt(math.log(2 * DIMENSION / 1e-6) / (2 * rounds))
        assert np.abs(counts / rounds - rate).max() <= bound

    def test_counts(self):
        assert [count_of(k, 100) for k in (1, 7, 100, 0.5, 0.001, 0.999)] == [1, 7, 100, 50, 1, 100]


class TestRank:
    @pytest.mark.parametrize("rank", [1, 3, 7])
    def test_bases_are_orthonormal_and_on_the_longer_side(self, rank):
        _, subspace = selected(f"rank {rank}")
        sides = [max(math.prod(shape[:-1]), shape[-1]) for shape in SHAPES if len(shape) > 1]
        assert [basis.shape for basis in subspace.bases] == [(side, rank) for side in sides if side > rank]
        for basis in subspace.bases:
            np.testing.assert_allclose(tf.matmul(basis, basis, transpose_a=True), np.eye(rank), atol=1e-6)

    def test_updates_have_that_rank(self):
        subspaces, subspace = selected("rank 3")
        update = subspaces.onto(subspace, tensors(1))
        ranks = [np.linalg.matrix_rank(np.reshape(part, (-1, part.shape[-1])), tol=1e-4) for part in update[2:4]]
        assert ranks == [3, 3]
        # Vectors, and kernels that it would not make smaller, go whole.
        for index in (1, 4, 5):
            np.testing.assert_array_equal(update[index], tensors(1)[index])

    def test_bases_are_new_in_each_round_and_for_each_tensor(self):
        subspaces = Subspaces(Compression(rank=2), [(20, 6), (20, 6)], ROUNDS)
        bases = [basis.numpy() for t in range(5) for basis in subspaces.of_round(SEED, tf.constant(t)).bases]
        for one, other in itertools.combinations(bases, 2):
            assert np.abs(one - other).max() > 0.1
        again = Subspaces(Compression(rank=2), [(20, 6), (20, 6)], ROUNDS).of_round(SEED, tf.constant(0)).bases
        np.testing.assert_array_equal(again[0], bases[0])

    def test_bases_prefer_no_direction(self):
        """The mean of projections is rank / side of the identity; 0.2 is over six standard errors of 500 rounds."""
        subspaces = Subspaces(Compression(rank=2), [(8, 3)], ROUNDS)
        basis = tf.function(lambda number: subspaces.of_round(SEED, number).bases[0])
        drawn = np.stack([basis(tf.constant(t)).numpy() for t in range(500)])
        np.testing.assert_allclose(np.einsum("tik,tjk->ij", drawn, drawn) / 500, np.eye(8) * 2 / 8, atol=0.06)
        np.testing.assert_allclose(drawn.mean(axis=0), 0, atol=0.12)  # signs are fair as well


WEIGHTS = st.sampled_from([0.0, 0.0, 1.0, 1.0, -1.0, 2.5, -0.25, 1e-30, 1e30])


class TestMasks:
    @SETTINGS
    @given(st.data(), st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999]), st.integers(0, ROUNDS))
    def test_have_as_many_ones_as_are_sent_whatever_the_weights(self, data, sparsity, done):
        shapes = [(3, 4), (4,), (2, 2, 3)]
        compression = Compression(sparsity=sparsity, pruning_begins=0.2, pruning_ends=0.7)
        subspaces = Subspaces(compression, shapes, ROUNDS)
        weights = [
            tf.constant(data.draw(st.lists(WEIGHTS, min_size=size, max_size=size)), tf.float32, shape)
            for shape, size in ((shape, math.prod(shape)) for shape in shapes)
        ]
        masks = subspaces.masks(weights, tf.constant(done))
        assert set(np.unique(flat(masks))) <= {0.0, 1.0}
        assert np.sum(flat(masks)) == compression.sent_coordinates(shapes, done, ROUNDS)
        assert np.all(masks[1] == 1)
        level = compression.sparsity_after(done, ROUNDS)
        for mask, weight, shape in zip(masks, weights, shapes, strict=True):
            assert np.sum(mask) == kept_weights(shape, level) >= 1
            kept, pruned = np.abs(weight)[mask == 1], np.abs(weight)[mask == 0]
            assert pruned.size == 0 or kept.min() >= pruned.max()
        # Of the pruned weights they are the same again, also where they are zero for other reasons.
        pruned = [weight * mask for weight, mask in zip(weights, masks, strict=True)]
        for one, other in zip(subspaces.masks(pruned, tf.constant(done)), masks, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_of_a_kernel_of_zeros_are_its_first_weights(self):
        subspaces = Subspaces(Compression(sparsity=0.5, pruning_begins=0, pruning_ends=0), [(2, 3)], 4)
        (mask,) = subspaces.masks([tf.zeros((2, 3))], tf.constant(2))
        np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 0]])

    def test_before_the_first_pruning_are_all_ones(self):
        subspaces = Subspaces(Compression(sparsity=0.5, pruning_begins=0.3), SHAPES, ROUNDS)
        for done in range(3):
            for mask in (*subspaces.masks(tensors(0), tf.constant(done)), *subspaces.all_masks()):
                assert np.all(mask == 1)
        assert np.sum(flat(subspaces.masks(tensors(0), tf.constant(4)))) < DIMENSION

    def test_there_are_none_without_pruning(self):
        for compression in (Compression(), Compression(random_k=3), Compression(rank=1)):
            subspaces = Subspaces(compression, SHAPES, ROUNDS)
            assert subspaces.all_masks() == subspaces.masks(tensors(0), tf.constant(3)) == ()


class TestLargestOfAll:
    @SETTINGS
    @given(st.lists(WEIGHTS, min_size=7, max_size=7), st.integers(1, 7))
    def test_keeps_the_largest_by_magnitude_and_no_more(self, values, count):
        parts = [tf.constant(values[:4], tf.float32, (2, 2)), tf.constant(values[4:])]
        kept = flat(largest_of_all(parts, count))
        whole = flat(parts)
        assert np.count_nonzero(kept) <= count
        np.testing.assert_array_equal(kept[kept != 0], whole[kept != 0])
        np.testing.assert_array_equal(np.sort(np.abs(kept))[-count:], np.sort(np.abs(whole))[-count:])


def test_rounds_of_a_subspace_do_not_use_the_runs_seed_itself():
    """Round 0 included: its seed is another one, so that no two purposes share a stream."""
    assert not np.array_equal(round_seed(SEED, tf.constant(0)), SEED)
