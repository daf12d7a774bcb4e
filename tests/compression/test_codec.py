"""The codec of updates: what its bytes are, and that what comes out of them is unbiased.

Statistical checks have fixed seeds, so that they pass or fail for good; the probability with which they would fail for
seeds drawn at random stands beside each.
"""

import functools
import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl.compression import codec as module
from dpfl.compression.codec import BUCKET, Codec

BITS = range(1, 9)
LENGTHS = (1, 2, 7, 8, 9, 127, 128, 129, 300)
CODECS = [Codec(bits, rotation) for bits in BITS for rotation in (False, True)]
FLOAT32 = Codec(None, False)
EPSILON = float(np.finfo(np.float32).eps)
FALSE_ALARM = 1e-6

every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"{c.bits} bits{' rotated' * c.rotation}")
every_number_of_bits = pytest.mark.parametrize("bits", BITS)
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def vector(length: int, seed: int = 0) -> np.ndarray:
    """Coordinates of very different sizes, and some zeros."""
    numbers = np.random.default_rng(seed)
    drawn = numbers.normal(size=length) * 10.0 ** numbers.integers(-3, 2, length)
    return np.where(numbers.random(length) < 0.1, 0, drawn).astype(np.float32)


def seeds(signs: int = 1, rounding: int = 2) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.constant([signs, 5]), tf.constant([rounding, 6])


@functools.cache
def compiled(codec: Codec) -> Any:
    """The message of a vector, and the vector of the message, in graph."""

    def both(values: tf.Tensor, signs: tf.Tensor, rounding: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        message = codec.encode(values, signs, rounding)
        return message, codec.decode(message, tf.size(values), signs)

    return tf.function(both, [tf.TensorSpec([None]), tf.TensorSpec([2], tf.int32), tf.TensorSpec([2], tf.int32)])


def through(codec: Codec, values: np.ndarray, signs: int = 1, rounding: int = 2) -> np.ndarray:
    return compiled(codec)(tf.constant(values), *seeds(signs, rounding))[1].numpy()


def written_bytes(codec: Codec, length: int) -> int:
    """The length of a message by the format as it is documented, counted by hand."""
    if codec.bits is None:
        return 4 * length
    buckets = math.ceil(length / 128)
    codes = 128 * buckets if codec.rotation else length
    groups = math.ceil(codes / 8)
    return groups * 8 * codec.bits // 8 + 4 * buckets


def scales_of(codec: Codec, values: np.ndarray, signs: int = 1) -> np.ndarray:
    """The scale of each coordinate's bucket, read off the end of the message."""
    buckets = math.ceil(len(values) / 128)
    message = compiled(codec)(tf.constant(values), *seeds(signs))[0].numpy()
    return np.repeat(message[-4 * buckets :].view("<f4").astype(np.float64), 128)[: len(values)]


class TestMessages:
    @every_codec
    def test_are_as_long_as_documented_and_come_back_as_long_as_the_vector(self, codec):
        for length in LENGTHS:
            message, decoded = compiled(codec)(vector(length), *seeds())
            assert (message.dtype, decoded.dtype) == (tf.uint8, tf.float32)
            assert message.shape == (written_bytes(codec, length),)
            assert codec.message_bytes(length) == written_bytes(codec, length)
            assert decoded.shape == (length,)

    def test_eight_times_fewer_bytes(self):
        assert FLOAT32.message_bytes(100_000) == 400_000
        assert Codec(4, False).message_bytes(100_000) == 50_000 + 4 * 782
        assert Codec(2, True).message_bytes(128) == 32 + 4

    def test_of_float32_are_the_floats_themselves(self):
        values = np.float32([1.5, -0.0, np.inf, 1e-30, 3e38])
        assert FLOAT32.encode(tf.constant(values), *seeds()).numpy().tobytes() == values.tobytes()
        np.testing.assert_array_equal(through(FLOAT32, values), values)
        assert np.isnan(through(FLOAT32, np.float32([np.nan, 1]))).tolist() == [True, False]

    @every_number_of_bits
    def test_have_the_codes_first_and_then_the_scales(self, bits):
        codec, largest = Codec(bits, False), [3.0, 0.25]
        values = np.concatenate([np.full(128, largest[0]), -np.full(9, largest[1])]).astype(np.float32)
        message = codec.encode(tf.constant(values), *seeds()).numpy()
        # The largest code 128 times, and the smallest, which is 0, nine times; then 7 more to fill the group.
        top = 2 * codec.top
        bits_of_codes = np.unpackbits(message[:-8], bitorder="little").reshape(-1, bits)
        codes = bits_of_codes @ (1 << np.arange(bits))
        assert codes.tolist() == [top] * 128 + [0] * 16
        assert message[-8:].view("<f4").tolist() == largest

    @every_codec
    def test_are_a_function_of_the_seeds(self, codec):
        values = vector(300)
        first, again, other = (compiled(codec)(values, *seeds(rounding=r))[0].numpy() for r in (2, 2, 3))
        np.testing.assert_array_equal(first, again)
        np.testing.assert_array_equal(codec.encode(tf.constant(values), *seeds()), first)
        assert (other != first).mean() > 0.02
        np.testing.assert_array_equal(other[-4 * 3 :], first[-4 * 3 :])  # the scales are not rounded

    @every_number_of_bits
    def test_two_clients_round_independently(self, bits):
        """Errors of two rounding seeds: correlated beyond the bound with probability 1e-6, by Hoeffding."""
        codec, size = Codec(bits, False), 8192
        values = np.float32(np.random.default_rng(3).uniform(-1, 1, size))
        errors = np.stack([(through(codec, values, rounding=r) - values) for r in (7, 8)]) * codec.top
        products = errors[0] * errors[1] / scales_of(codec, values) ** 2  # in [-1, 1], of mean 0
        assert abs(products.mean()) <= math.sqrt(2 * math.log(2 / FALSE_ALARM) / size)
        assert np.abs(products).mean() > 0.01


class TestPacking:
    @SETTINGS
    @given(st.data(), st.sampled_from(BITS), st.integers(1, 70))
    def test_gives_back_the_codes(self, data, bits, count):
        codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
        packed = module._packed(tf.constant(codes, tf.int64), bits)
        groups = -(-count // 8)
        assert packed.shape == (groups * bits,)
        unpacked = module._unpacked(packed, bits).numpy()
        assert unpacked[:count].tolist() == codes
        assert unpacked[count:].tolist() == [0] * (8 * groups - count)

    @every_number_of_bits
    @pytest.mark.parametrize("count", [1, 8, 9, 256])
    def test_of_the_largest_and_smallest_codes(self, bits, count):
        for code in (0, 1, 2**bits - 1):
            codes = tf.fill([count], tf.constant(code, tf.int64))
            assert set(module._unpacked(module._packed(codes, bits), bits).numpy()[:count]) == {code}

    @every_number_of_bits
    def test_is_little_endian_bit_by_bit(self, bits):
        codes = np.random.default_rng(bits).integers(0, 2**bits, 24)
        expected = np.packbits((codes[:, None] >> np.arange(bits) & 1).ravel().astype(np.uint8), bitorder="little")
        np.testing.assert_array_equal(module._packed(tf.constant(codes, tf.int64), bits), expected)


class TestRounding:
    @every_number_of_bits
    @pytest.mark.parametrize("length", [1, 129, 3000])
    def test_every_coordinate_comes_to_a_neighbouring_level(self, bits, length):
        codec, values = Codec(bits, False), vector(length)
        values[-1] = 0.5  # no bucket of zeros alone
        scales = scales_of(codec, values)
        largest = [np.abs(values[at : at + 128]).max() for at in range(0, length, 128)]
        np.testing.assert_array_equal(scales[::128], largest)
        for rounding in range(5):
            decoded = through(codec, values, rounding=rounding).astype(np.float64)
            step = scales / codec.top
            levels = decoded / step + codec.top
            np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
            distance = np.abs(decoded - values) / step
            assert distance.max() < 1 + 1e-4, f"{distance.max()} levels away"

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_zero_is_exact_from_two_bits_on(self, bits):
        """Among a million zeros: a float32 sum of a level and a draw close to 1 would come to the next level."""
        values = np.zeros(2**20, np.float32)
        values[::128] = 1
        decoded = through(Codec(bits, False), values)
        np.testing.assert_array_equal(decoded[::128], 1)
        decoded[::128] = 0
        assert not decoded.any()

    @every_codec
    def test_a_vector_of_zeros_comes_back(self, codec):
        assert not through(codec, np.zeros(130, np.float32)).any()

    @every_number_of_bits
    def test_levels_themselves_are_exact(self, bits):
        codec = Codec(bits, False)
        levels = (np.arange(round(2 * codec.top) + 1) - codec.top).astype(np.float32)
        values = np.concatenate([levels[:127], levels[-1:]] if len(levels) > 128 else [levels])
        for rounding in range(5):
            np.testing.assert_array_equal(through(codec, values, rounding=rounding), values)

    @SETTINGS
    @given(st.sampled_from(CODECS), st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=140))
    def test_error_is_at_most_a_step(self, codec, values):
        """Of each coordinate; after a rotation, of the norm of each bucket, in which there are 128."""
        values = np.float32(values)
        scales = scales_of(codec, values)
        error = np.abs(through(codec, values).astype(np.float64) - values)
        if not codec.rotation:
            assert np.all(error <= scales / codec.top * (1 + 1e-4) + 1e-37)
            return
        for at in range(0, len(values), BUCKET):
            bound = math.sqrt(BUCKET) * scales[at] / codec.top
            assert np.linalg.norm(error[at : at + BUCKET]) <= bound * (1 + 1e-4) + 1e-36

    def test_rotation_helps_where_one_coordinate_is_much_larger_than_the_others(self):
        values = np.float32(np.random.default_rng(0).normal(size=1280))
        values[::128] *= 100
        plain, rotated = (
            np.mean([np.linalg.norm(through(Codec(2, rotation), values, rounding=r) - values) for r in range(5)])
            for rotation in (False, True)
        )
        assert rotated < plain / 1.5


class TestNonFinite:
    @every_codec
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_bucket_comes_back_as_nan_and_others_as_they_were(self, codec, bad):
        values = vector(300)
        good = through(codec, values)
        values[140] = bad
        decoded = through(codec, values)
        assert np.isnan(decoded[128:256]).all()
        np.testing.assert_array_equal(decoded[:128], good[:128])
        np.testing.assert_array_equal(decoded[256:], good[256:])

    @every_codec
    def test_no_number_so_large_that_anything_else_than_it_or_what_is_not_finite_comes_out(self, codec):
        largest = float(np.finfo(np.float32).max)
        decoded = through(codec, np.float32([largest, -largest, 1.0, 0.0]))
        assert np.all(~np.isfinite(decoded) | (np.abs(decoded) <= largest))


def check_unbiased(codec: Codec, draws: int = 1500) -> None:
    """The mean of many roundings is the vector: false with probability 1e-6 for all coordinates, by Hoeffding.

    A coordinate is rounded to one of two levels; rotated back it is a sum of 128 such, each times 1 / sqrt(128), the
    squares of whose ranges add up to the same.
    """
    values = vector(150, seed=4)
    signs = seeds()[0]

    @tf.function
    def decoded() -> tf.Tensor:
        def one(number: tf.Tensor) -> tf.Tensor:
            message = codec.encode(tf.constant(values), signs, tf.stack([number, 1]))
            return codec.decode(message, tf.constant(len(values)), signs)

        return tf.map_fn(one, tf.range(draws), fn_output_signature=tf.TensorSpec([len(values)]))

    found = decoded().numpy().astype(np.float64)
    steps = scales_of(codec, values) / codec.top
    bound = steps * math.sqrt(math.log(2 * len(values) / FALSE_ALARM) / (2 * draws)) + 8 * EPSILON * steps * codec.top
    off = np.abs(found.mean(axis=0) - values) / bound
    assert off.max() <= 1, f"coordinate {off.argmax()} is {off.max():.2f} bounds from its expected value"
    assert found.std(axis=0).max() > 0


class TestUnbiasedness:
    @pytest.mark.parametrize("rotation", [False, True])
    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_the_mean_of_many_messages_is_the_vector(self, bits, rotation):
        check_unbiased(Codec(bits, rotation))

    @pytest.mark.parametrize("rotation", [False, True])
    def test_rounding_to_the_nearest_is_seen(self, rotation, monkeypatch):
        true = tf.random.stateless_uniform

        def uniform(shape, seed, *arguments, **options):
            drawn = true(shape, seed, *arguments, **options)
            return 0.4 + 0.2 * drawn if drawn.dtype == tf.float32 else drawn

        monkeypatch.setattr(tf.random, "stateless_uniform", uniform)
        with pytest.raises(AssertionError, match="bounds from its expected value"):
            check_unbiased(Codec(2, rotation))


class TestRotation:
    def test_is_orthonormal_and_its_own_inverse(self):
        matrix = module._rotated(tf.eye(BUCKET)).numpy().astype(np.float64)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(BUCKET), atol=1e-6)
        np.testing.assert_allclose(matrix, matrix.T)
        values = np.float32(np.random.default_rng(0).normal(size=(5, BUCKET)))
        np.testing.assert_allclose(module._rotated(module._rotated(values)), values, atol=1e-5)

    def test_spreads_one_coordinate_over_all(self):
        np.testing.assert_allclose(np.abs(module._rotated(tf.eye(BUCKET))), 1 / math.sqrt(BUCKET), rtol=1e-6)

    def test_signs_are_fair_and_new_with_each_seed(self):
        """1e-6 each for the mean and the correlation of two seeds, by Hoeffding."""
        shape = tf.constant([100, BUCKET])
        one, other = (module._signs(shape, tf.constant([seed, 0])).numpy() for seed in (1, 2))
        assert set(np.unique(one)) == {-1.0, 1.0}
        bound = math.sqrt(2 * math.log(2 / FALSE_ALARM) / one.size)
        assert abs(one.mean()) <= bound
        assert abs((one * other).mean()) <= bound
        np.testing.assert_array_equal(one, module._signs(shape, tf.constant([1, 0])))

    def test_other_signs_are_another_message(self):
        values = vector(128)
        assert (through(Codec(2, True), values, signs=1) != through(Codec(2, True), values, signs=2)).mean() > 0.5
