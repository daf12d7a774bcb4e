"""Every draw is a function of seed, purpose and path, and of nothing else."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from dpfl.errors import InputError
from dpfl.randomness import Purpose, generator, stateless_seed

SEEDS = (0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1)


def head(seed: int, purpose: Purpose, *path: int) -> tuple[float, ...]:
    return tuple(generator(seed, purpose, *path).random(4))


class TestGenerator:
    def test_is_repeatable(self):
        assert head(3, Purpose.SAMPLING, 5) == head(3, Purpose.SAMPLING, 5)

    def test_is_the_same_in_another_process(self):
        code = "from dpfl.randomness import *; print(generator(3, Purpose.SAMPLING, 5).random(4).tolist())"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert told.stdout.strip() == str(list(head(3, Purpose.SAMPLING, 5)))

    def test_never_changes_between_versions(self):
        # Results that were published must be found again: these values are part of the interface.
        assert generator(0, Purpose.SAMPLING, 0).integers(0, 1000, 5).tolist() == [312, 703, 635, 685, 798]

    def test_seeds_purposes_and_paths_never_share_a_stream(self):
        paths = [(), (0,), (1,), (2**31,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
        heads = [head(*where[:2], *where[2]) for where in itertools.product(SEEDS, Purpose, paths)]
        assert len(set(heads)) == len(heads) == len(SEEDS) * len(Purpose) * len(paths)

    def test_a_path_is_no_seed(self):
        # Were they added, seed 1 in round 0 would be seed 0 in round 1.
        table = {head(seed, Purpose.SAMPLING, number) for seed in range(30) for number in range(30)}
        assert len(table) == 900

    def test_neighbouring_seeds_and_rounds_are_uncorrelated(self):
        streams = np.stack(
            [
                generator(seed, purpose, number).random(2000)
                for seed in (0, 1)
                for purpose in (Purpose.SAMPLING, Purpose.SHUFFLING, Purpose.NOISE)
                for number in (0, 1, 2)
            ]
        )
        correlations = np.abs(np.triu(np.corrcoef(streams), k=1))
        pairs = 18 * 17 // 2
        # With random seeds this would fail with probability 1e-6.
        assert correlations.max() <= stats.norm.isf(1e-6 / 2 / pairs) / np.sqrt(2000)


class TestStatelessSeed:
    def test_is_two_int32(self):
        made = stateless_seed(7, Purpose.NOISE)
        assert made.shape == (2,)
        assert made.dtype == np.int32

    def test_is_repeatable(self):
        np.testing.assert_array_equal(stateless_seed(7, Purpose.NOISE), stateless_seed(7, Purpose.NOISE))

    def test_never_changes_between_versions(self):
        assert stateless_seed(0, Purpose.NOISE).tolist() == [1216546553, -399230508]

    def test_differs_by_seed_and_purpose(self):
        made = {tuple(stateless_seed(seed, purpose)) for seed in range(500) for purpose in Purpose}
        assert len(made) == 500 * len(Purpose)

    def test_uses_all_bits(self):
        bits = np.stack([stateless_seed(seed, Purpose.NOISE) for seed in range(2000)]).view(np.uint32)
        ones = [np.mean(bits[:, word] >> np.uint32(bit) & 1) for word in (0, 1) for bit in range(32)]
        # Each is 0.5 +- 0.011; the furthest of 64 is beyond 5.5 deviations with probability 3e-6.
        assert np.max(np.abs(np.array(ones) - 0.5)) <= 5.5 * 0.5 / np.sqrt(2000)


class TestSeeds:
    @pytest.mark.parametrize("seed", [-1, -(2**40), 2**64])
    def test_others_are_refused(self, seed):
        for draw in (lambda: generator(seed, Purpose.MODEL), lambda: stateless_seed(seed, Purpose.MODEL)):
            with pytest.raises(InputError) as caught:
                draw()
            assert (
                str(caught.value)
                == f"a seed must be a whole number of at least 0 and below 2 ** 64, but it was {seed}."
            )

    def test_numpy_integers_are_fine(self):
        assert head(np.int64(5), Purpose.MODEL, np.int32(2)) == head(5, Purpose.MODEL, 2)

    def test_purposes_keep_their_numbers(self):
        # They are part of every stream: a changed number changes every published result.
        kept = {"INITIAL_WEIGHTS": 1, "SAMPLING": 2, "SHUFFLING": 3, "NOISE": 4, "MODEL": 5}
        assert {name: Purpose[name].value for name in kept} == kept
