"""Who takes part in a round."""

import inspect
import itertools

import numpy as np
import pytest
from mechanisms.guarantee_checks import check_poisson

from dpfl.errors import InputError
from dpfl.sampling import Poisson


def cohorts(sampler: Poisson, population: int, rounds: int, seed: int = 0) -> list[list[int]]:
    return [sampler.clients(seed, number, population).tolist() for number in range(rounds)]


class TestPoisson:
    @pytest.mark.parametrize(
        ("cohort", "population", "seed"),
        [(20, 60, 0), (20, 60, 1), (2, 100, 0), (95, 100, 0), (1, 2, 3)],
    )
    def test_everybody_takes_part_independently_at_the_rate(self, cohort, population, seed):
        # With random seeds each of these would fail with a probability of some 3e-6.
        check_poisson(Poisson(cohort=cohort), population, seed=seed)

    def test_seeds_draw_independent_cohorts(self):
        # One round each of 3,000 seeds is as good as 3,000 rounds of one.
        class AcrossSeeds(Poisson):
            def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
                return super().clients(round_number, seed, population)

        check_poisson(AcrossSeeds(cohort=20), 60)

    def test_sizes_vary_around_the_expected_cohort(self):
        sizes = [len(cohort) for cohort in cohorts(Poisson(cohort=30), 300, 200)]
        # The mean of 200 binomial sizes is 30 +- 0.37; further off than 5 of these with probability 6e-7.
        assert abs(np.mean(sizes) - 30) <= 5 * np.sqrt(300 * 0.1 * 0.9 / 200)
        assert min(sizes) < 25 < 35 < max(sizes)

    def test_empty_cohorts_happen(self):
        # At rate 1 / 1000 a third of the rounds has nobody; none of 200 with probability 1e-40.
        assert [] in cohorts(Poisson(cohort=1), 1000, 200)

    def test_seed_and_round_decide(self):
        sampler = Poisson(cohort=20)
        assert cohorts(sampler, 60, 5) == cohorts(Poisson(cohort=20), 60, 5)
        assert len({tuple(cohort) for cohort in cohorts(sampler, 60, 50)}) == 50
        assert len({tuple(cohorts(sampler, 60, 1, seed)[0]) for seed in range(50)}) == 50

    def test_a_round_is_no_seed(self):
        # Were they added, seed 1 would draw in round 0 what seed 0 draws in round 1.
        sampler = Poisson(cohort=20)
        assert len({tuple(cohort) for seed in range(20) for cohort in cohorts(sampler, 60, 20, seed)}) == 400

    def test_order_of_the_questions_does_not_matter(self):
        sampler = Poisson(cohort=20)
        later = sampler.clients(4, 7, 60)
        sampler.clients(4, 3, 60)
        np.testing.assert_array_equal(sampler.clients(4, 7, 60), later)

    def test_has_no_say_in_the_global_generator(self):
        np.random.seed(0)  # noqa: NPY002
        expected = np.random.random()  # noqa: NPY002
        np.random.seed(0)  # noqa: NPY002
        first = Poisson(cohort=20).clients(0, 0, 60)
        assert np.random.random() == expected  # noqa: NPY002
        np.testing.assert_array_equal(Poisson(cohort=20).clients(0, 0, 60), first)

    def test_a_larger_cohort_contains_the_smaller_of_the_same_seed(self):
        for number in range(20):
            nested = [set(Poisson(cohort=size).clients(3, number, 100).tolist()) for size in (1, 5, 20, 60, 99, 100)]
            for smaller, larger in itertools.pairwise(nested):
                assert smaller <= larger

    def test_ascending_unique_int32(self):
        for number in range(50):
            drawn = Poisson(cohort=20).clients(1, number, 60)
            assert drawn.dtype == np.int32
            assert drawn.tolist() == sorted(set(drawn.tolist()))
            assert set(drawn.tolist()) <= set(range(60))

    @pytest.mark.parametrize("population", [1, 7, 500])
    def test_at_rate_one_everybody_takes_part(self, population):
        for drawn in cohorts(Poisson(cohort=population), population, 20):
            assert drawn == list(range(population))

    def test_rate(self):
        assert Poisson(cohort=20).rate(60) == 20 / 60
        assert Poisson(cohort=60).rate(60) == 1

    @pytest.mark.parametrize("population", [0, 1, 19])
    def test_a_cohort_beyond_the_population_is_refused(self, population):
        sampler = Poisson(cohort=20)
        message = f"the expected cohort of 20 exceeds the {population} clients of the data; "
        for ask in (sampler.rate, lambda size: sampler.clients(0, 0, size), sampler.in_words):
            with pytest.raises(InputError) as caught:
                ask(population)
            assert str(caught.value) == f"{message}choose a cohort of at most {population}."

    @pytest.mark.parametrize("cohort", [0, -1, 2.5, "many", None])
    def test_an_impossible_cohort_is_refused(self, cohort):
        with pytest.raises(InputError, match="cohort should be "):
            Poisson(cohort=cohort)

    def test_in_words(self):
        words = Poisson(cohort=120).in_words(3383)
        assert words == "on a Poisson sample of the 3383 clients at rate 0.0354715 (expected cohort 120)"

    def test_takes_what_a_plan_gives(self):
        # The broken samplers of test_broken_mechanisms.py override this signature.
        assert list(inspect.signature(Poisson.clients).parameters) == ["self", "seed", "round_number", "population"]
