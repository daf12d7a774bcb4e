"""Privacy loss distributions: dp-accounting's values, closed forms, what is attainable, and round-off."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    TruncatedSubsampledGaussianDpEvent,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss, LaplacePrivacyLoss
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_accountants import analytic_gaussian_epsilon
from scipy import integrate, optimize, special, stats

from dpfl.errors import InputError
from dpfl.privacy import balls_in_bins, epsilon
from dpfl.privacy.events import BallsInBinsDpEvent, RevealedPoissonSampledDpEvent
from dpfl.privacy.pld import composed_epsilon, connected, has_pld, pld_epsilon, releases
from dpfl.privacy.profiles import pair_of

ADD, REPLACE, ZERO = "add_or_remove_one", "replace_one", "replace_special"
COARSE = 1e-3
EPSILONS = np.linspace(0, 8, 101)


def poisson(rate: float, noise: float) -> dp_accounting.DpEvent:
    return PoissonSampledDpEvent(rate, GaussianDpEvent(noise))


def by_dp_accounting(event: dp_accounting.DpEvent, delta: float, relation: str) -> float:
    neighbours = dp_accounting.NeighboringRelation[relation.upper()]
    return PLDAccountant(neighbours, COARSE).compose(event).get_epsilon(delta)


class TestProfiles:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.floats(0.3, 50), st.floats(1e-5, 0.999))
    def test_of_gaussian_samples_are_those_of_dp_accounting(self, noise, rate):
        pair = pair_of(poisson(rate, noise), ADD)
        replaced = pair_of(poisson(rate, noise), REPLACE)
        for profile, side in (
            (pair.forward, AdjacencyType.REMOVE),
            (pair.backward, AdjacencyType.ADD),
            (replaced.forward, AdjacencyType.REPLACE),
        ):
            theirs = GaussianPrivacyLoss(noise, sampling_prob=rate, adjacency_type=side)
            expected = theirs.get_delta_for_epsilon(EPSILONS)
            np.testing.assert_allclose(profile(EPSILONS), expected, rtol=1e-9, atol=1e-14)

    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(st.floats(0.2, 20), st.floats(1e-4, 0.999))
    def test_of_laplace_samples_are_those_of_dp_accounting(self, noise, rate):
        pair = pair_of(PoissonSampledDpEvent(rate, LaplaceDpEvent(noise)), ZERO)
        for profile, side in ((pair.forward, AdjacencyType.REMOVE), (pair.backward, AdjacencyType.ADD)):
            theirs = LaplacePrivacyLoss(noise, sampling_prob=rate, adjacency_type=side)
            expected = theirs.get_delta_for_epsilon(EPSILONS)
            np.testing.assert_allclose(profile(EPSILONS), expected, rtol=1e-9, atol=1e-14)

    def test_of_gaussian_noise_keeps_its_digits_in_the_tail(self):
        # Both terms of the closed form are about 1e-15; the reference integrates the density of their difference.
        shift, far = 0.5, 4.0
        points = np.linspace(far / shift + shift / 2 - shift, 60, 2_000_001)  # above epsilon in N(shift, 1)
        difference = np.exp(-((points - shift) ** 2) / 2) - np.exp(far - points**2 / 2)
        exact = integrate.trapezoid(np.maximum(difference, 0), points) / math.sqrt(2 * math.pi)
        found = pair_of(GaussianDpEvent(1 / shift), ADD).forward(np.array([far]))
        assert found == pytest.approx(exact, rel=1e-6)


class TestAgainstDpAccounting:
    @pytest.mark.parametrize("relation", [ADD, REPLACE, ZERO])
    @pytest.mark.parametrize(
        ("step", "steps", "delta"),
        [
            (poisson(0.3, 1.0), 30, 1e-3),
            (poisson(0.01, 0.7), 120, 1e-5),
            (poisson(0.5, 20), 300, 1e-6),
            (poisson(0.1, 8), 5000, 1e-6),
            (poisson(1e-4, 0.4), 1000, 1e-7),
            (poisson(0.9, 0.5), 2, 1e-5),
            (poisson(0.01, 0.4), 10, 1e-10),
            (GaussianDpEvent(2.0), 5, 1e-5),
            (GaussianDpEvent(50.0), 1, 1e-3),
            (GaussianDpEvent(0.3), 4, 1e-5),
            (TruncatedSubsampledGaussianDpEvent(500, 0.1, 60, 1.5), 40, 1e-5),
            (TruncatedSubsampledGaussianDpEvent(500, 0.1, 40, 2.5), 10, 1e-5),
        ],
    )
    def test_epsilon_agrees(self, step, steps, delta, relation):
        event = SelfComposedDpEvent(step, steps)
        expected = by_dp_accounting(event, delta, relation)
        assert pld_epsilon(event, delta, relation, COARSE) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(
        ("step", "steps", "delta"),
        [
            (LaplaceDpEvent(2.0), 10, 1e-5),
            (LaplaceDpEvent(0.5), 1, 1e-5),
            (LaplaceDpEvent(10.0), 200, 1e-6),
            (PoissonSampledDpEvent(0.1, LaplaceDpEvent(1.0)), 20, 1e-6),
            (PoissonSampledDpEvent(0.8, LaplaceDpEvent(3.0)), 50, 1e-3),
        ],
    )
    def test_laplace_agrees(self, step, steps, delta):
        event = SelfComposedDpEvent(step, steps)
        assert pld_epsilon(event, delta, ADD, COARSE) == pytest.approx(by_dp_accounting(event, delta, ADD), rel=1e-6)

    @pytest.mark.parametrize("relation", [ADD, REPLACE])
    def test_a_mixed_composition_agrees(self, relation):
        parts = [SelfComposedDpEvent(poisson(0.1, 1.5), 20), GaussianDpEvent(3.0), poisson(0.5, 2.0), NoOpDpEvent()]
        event = SelfComposedDpEvent(ComposedDpEvent([*parts, poisson(0.1, 1.5)]), 1)
        expected = by_dp_accounting(event, 1e-5, relation)
        assert pld_epsilon(event, 1e-5, relation, COARSE) == pytest.approx(expected, rel=1e-6)

    def test_a_mechanism_whose_loss_hardly_reaches_zero(self):
        # The largest loss of someone who is added is -log(1 - q): almost all of epsilon is the other direction's.
        event = SelfComposedDpEvent(poisson(0.001, 0.5), 3)
        expected = by_dp_accounting(event, 1e-2, ADD)
        assert pld_epsilon(event, 1e-2, ADD, COARSE) == pytest.approx(expected, abs=1e-9)


class TestClosedForms:
    @pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10, 1e-20, 1e-30])
    @pytest.mark.parametrize("steps", [1, 400, 10_000])
    def test_composed_gaussians_however_small_delta_is(self, steps, delta):
        # Round-off of a plain FFT would be about 1e-16, far above the smallest delta here.
        noise = 2.5 * math.sqrt(steps)
        pair = pair_of(GaussianDpEvent(noise), ADD)
        reach = 15 / noise  # beyond lies less than e^-100 of the mass
        loss = connected(pair.forward, pair.backward, (-reach, reach), reach / 3000)
        exact = analytic_gaussian_epsilon(2.5, delta) if delta > 1e-14 else tiny_gaussian_epsilon(2.5, delta)
        assert exact * (1 - 1e-9) <= composed_epsilon([loss], [steps], delta) <= exact * (1 + 1e-3)

    @pytest.mark.parametrize(("relation", "sensitivity"), [(ADD, 1), (REPLACE, 2)])
    @pytest.mark.parametrize(("noise", "steps"), [(0.1, 3), (100.0, 7), (3.0, 1_000_000)])
    def test_gaussians_with_little_and_with_much_noise(self, noise, steps, relation, sensitivity):
        exact = analytic_gaussian_epsilon(noise, 1e-5, steps=1, sensitivity=sensitivity)
        event = SelfComposedDpEvent(GaussianDpEvent(noise * math.sqrt(steps)), steps)
        found = pld_epsilon(event, 1e-5, relation, min(COARSE, 0.01 / noise))
        assert exact * (1 - 1e-9) <= found <= exact * (1 + 1e-4)

    @pytest.mark.parametrize(("relation", "sensitivity"), [(ZERO, 1), (REPLACE, 2)])
    @pytest.mark.parametrize(("rate", "noise", "steps", "delta"), [(0.1, 3.0, 50, 1e-5), (0.7, 8.0, 5, 1e-3)])
    def test_a_revealed_sample_is_a_binomial_number_of_gaussians(
        self, rate, noise, steps, delta, relation, sensitivity
    ):
        def excess(at: float) -> float:
            drawn = np.arange(1, steps + 1)
            shifts = sensitivity * np.sqrt(drawn) / noise
            spent = special.ndtr(shifts / 2 - at / shifts) - np.exp(at + special.log_ndtr(-shifts / 2 - at / shifts))
            return float(stats.binom.pmf(drawn, steps, rate) @ spent) - delta

        exact = optimize.brentq(excess, 1e-9, 100, xtol=1e-12)
        event = SelfComposedDpEvent(RevealedPoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
        assert exact * (1 - 1e-9) <= pld_epsilon(event, delta, relation, COARSE) <= exact * (1 + 1e-3)

    @pytest.mark.parametrize(("relation", "sensitivity"), [(ADD, 1), (ZERO, 1), (REPLACE, 2)])
    def test_one_laplace_release(self, relation, sensitivity):
        # delta = 1 - exp((epsilon - sensitivity / scale) / 2)
        exact = sensitivity / 0.8 + 2 * math.log1p(-1e-3)
        assert epsilon(LaplaceDpEvent(0.8), 1e-3, relation=relation) == pytest.approx(exact, rel=1e-6)


def tiny_gaussian_epsilon(noise: float, delta: float) -> float:
    """The closed form of Balle & Wang by the logarithms of its two terms, which differ by a factor here."""
    mu = 1 / noise

    def excess(at: float) -> float:
        first, second = special.log_ndtr(mu / 2 - at / mu), at + special.log_ndtr(-mu / 2 - at / mu)
        return first + math.log(-math.expm1(second - first)) - math.log(delta)

    return optimize.brentq(excess, 0, 60 * mu, xtol=1e-13)


class TestFixedSize:
    """3,383 clients, 120 in every round, noise 1.2, 100 rounds, delta 1e-5: the FEMNIST setting of DESIGN.md."""

    EVENT = SelfComposedDpEvent(SampledWithoutReplacementDpEvent(3383, 120, GaussianDpEvent(1.2)), 100)

    def attainable(self, ours: int) -> float:
        """One client has +C in so many rounds where the other, and everybody else, have -C; in the rest vice versa."""
        pair = pair_of(poisson(120 / 3383, 0.6), ADD)
        there = connected(pair.forward, pair.backward, (-30, 30), COARSE)
        back = connected(pair.backward, pair.forward, (-30, 30), COARSE)
        counts = [count for count in (ours, 100 - ours) if count]
        return composed_epsilon([there, back] if 0 < ours < 100 else [there if ours else back], counts, 1e-5)

    def test_lies_above_what_real_neighbours_attain(self):
        attained = [self.attainable(ours) for ours in (0, 1, 50, 99, 100)]
        bound = pld_epsilon(self.EVENT, 1e-5, REPLACE, COARSE)
        assert max(attained) == pytest.approx(8.81, abs=0.005)  # DESIGN.md
        assert max(attained) <= bound <= 1.07 * max(attained)

    def test_one_release_is_exact(self):
        event = SampledWithoutReplacementDpEvent(3383, 120, GaussianDpEvent(1.2))
        # Both directions in which a client may be replaced count.
        assert epsilon(event, 1e-3, relation=REPLACE) == pytest.approx(epsilon(poisson(120 / 3383, 0.6), 1e-3))

    def test_everybody_is_no_sample(self):
        event = SampledWithoutReplacementDpEvent(50, 50, GaussianDpEvent(3.0))
        found = pld_epsilon(event, 1e-5, REPLACE, 1e-4)
        assert found == pytest.approx(analytic_gaussian_epsilon(3.0, 1e-5, sensitivity=2), rel=1e-6)

    def test_is_dearer_than_poisson_sampling_and_cheaper_than_renyi(self):
        event = SelfComposedDpEvent(SampledWithoutReplacementDpEvent(100, 20, GaussianDpEvent(4.0)), 30)
        sampled = SelfComposedDpEvent(poisson(0.2, 4.0), 30)
        found = epsilon(event, 1e-5, relation=REPLACE)
        assert epsilon(sampled, 1e-5, relation=REPLACE) < found
        assert found < epsilon(event, 1e-5, relation=REPLACE, accountant="rdp")


class TestCappedSample:
    @pytest.mark.parametrize(("cap", "expected"), [(180, 1.71), (150, 3.07), (120, 7.40)])
    def test_numbers_of_the_design(self, cap, expected):
        event = SelfComposedDpEvent(TruncatedSubsampledGaussianDpEvent(3383, 120 / 3383, cap, 1.2), 100)
        assert pld_epsilon(event, 1e-5, ADD, COARSE) == pytest.approx(expected, abs=0.005)

    @pytest.mark.parametrize("relation", [ADD, REPLACE])
    def test_a_cap_that_is_never_reached_costs_nothing(self, relation):
        capped = SelfComposedDpEvent(TruncatedSubsampledGaussianDpEvent(100, 0.2, 100, 2.0), 10)
        free = SelfComposedDpEvent(poisson(0.2, 2.0), 10)
        assert pld_epsilon(capped, 1e-5, relation, COARSE) == pld_epsilon(free, 1e-5, relation, COARSE)

    @pytest.mark.parametrize("cap", [1, 10])
    def test_everybody_drawn_and_most_turned_away(self, cap):
        event = TruncatedSubsampledGaussianDpEvent(10, 1.0, cap, 2.0)
        expected = by_dp_accounting(event, 1e-5, ADD)
        assert pld_epsilon(event, 1e-5, ADD, COARSE) == pytest.approx(expected, rel=1e-6)


class TestBallsInBins:
    def test_one_bin_is_no_sampling(self):
        event = BallsInBinsDpEvent(1, 1, GaussianDpEvent(2.0))
        exact = analytic_gaussian_epsilon(2.0, 1e-5)
        assert exact <= epsilon(event, 1e-5) <= 1.001 * exact

    @pytest.mark.parametrize("relation", [ADD, ZERO])
    def test_one_epoch_costs_the_dearer_direction(self, relation):
        event = BallsInBinsDpEvent(10, 4, GaussianDpEvent(1.0))

        def excess(at: float) -> float:
            sides = (balls_in_bins.divergences(event, np.array([at]), removes) for removes in (True, False))
            return max(float(side[0]) for side in sides) - 1e-4

        exact = optimize.brentq(excess, 1e-6, 20)
        assert exact * (1 - 1e-9) <= epsilon(event, 1e-4, relation=relation) <= exact * (1 + 1e-3)

    def test_epochs_cost_more_than_one_and_less_than_their_sum(self):
        one = BallsInBinsDpEvent(10, 10, GaussianDpEvent(2.0))
        single, three = (epsilon(SelfComposedDpEvent(one, count), 1e-5, pld_interval=COARSE) for count in (1, 3))
        assert 1.2 * single < three < 3 * single


class TestComposition:
    def test_a_coarser_grid_never_gives_less(self):
        events = [
            (SelfComposedDpEvent(poisson(0.05, 1.1), 50), ADD),
            (SelfComposedDpEvent(poisson(0.05, 1.1), 50), REPLACE),
            (SelfComposedDpEvent(SampledWithoutReplacementDpEvent(100, 10, GaussianDpEvent(4.0)), 50), REPLACE),
            (SelfComposedDpEvent(TruncatedSubsampledGaussianDpEvent(100, 0.1, 12, 4.0), 50), ADD),
            (SelfComposedDpEvent(RevealedPoissonSampledDpEvent(0.1, LaplaceDpEvent(4.0)), 50), ZERO),
        ]
        for event, relation in events:
            found = [pld_epsilon(event, 1e-5, relation, 1e-4 * 4**level) for level in range(4)]
            assert found == sorted(found)

    def test_rises_with_every_round(self):
        step = poisson(0.035, 1.2)
        found = [pld_epsilon(SelfComposedDpEvent(step, rounds), 1e-5, ADD, COARSE) for rounds in range(1, 60)]
        assert found == sorted(found)

    def test_order_and_nesting_do_not_matter(self):
        first, second = poisson(0.1, 2.0), PoissonSampledDpEvent(0.2, LaplaceDpEvent(5.0))
        nested = ComposedDpEvent([first, SelfComposedDpEvent(ComposedDpEvent([second, first]), 2)])
        flat = ComposedDpEvent([second, second, first, first, first])
        assert pld_epsilon(nested, 1e-5, ADD, COARSE) == pytest.approx(pld_epsilon(flat, 1e-5, ADD, COARSE), rel=1e-9)

    def test_both_directions_are_composed_apart(self):
        # Someone is added throughout or removed throughout; the larger of both counts.
        pair = pair_of(poisson(0.3, 1.0), ADD)
        sides = [(pair.forward, pair.backward), (pair.backward, pair.forward)]
        each = [composed_epsilon([connected(*side, (-60, 60), COARSE)], [20], 1e-3) for side in sides]
        assert each[1] < 0.99 * each[0]
        event = SelfComposedDpEvent(poisson(0.3, 1.0), 20)
        assert pld_epsilon(event, 1e-3, ADD, COARSE) == pytest.approx(each[0], rel=1e-9)

    @pytest.mark.parametrize(
        ("event", "expected"),
        [
            (NoOpDpEvent(), 0),
            (ComposedDpEvent([]), 0),
            (SelfComposedDpEvent(GaussianDpEvent(1.0), 0), 0),
            (PoissonSampledDpEvent(0, GaussianDpEvent(0)), 0),
            (GaussianDpEvent(math.inf), 0),
            (PoissonSampledDpEvent(1e-6, GaussianDpEvent(1.0)), 0),
            (NonPrivateDpEvent(), math.inf),
            (ComposedDpEvent([GaussianDpEvent(1.0), NonPrivateDpEvent()]), math.inf),
            (PoissonSampledDpEvent(0.1, GaussianDpEvent(0)), math.inf),
            (LaplaceDpEvent(0.0), math.inf),
        ],
    )
    def test_extremes(self, event, expected):
        assert epsilon(event, 1e-5) == expected

    def test_equal_releases_are_counted_and_gaussians_are_one(self):
        event = ComposedDpEvent([poisson(0.1, 2.0), GaussianDpEvent(3.0), poisson(0.1, 2.0), poisson(1, 4.0)])
        (sampled, twice), (gaussian, once) = releases(event, ADD).items()
        assert (sampled, twice, once) == (poisson(0.1, 2.0), 2, 1)
        assert gaussian.noise_multiplier == pytest.approx(2.4)  # 1 / sqrt(1 / 9 + 1 / 16)

    @pytest.mark.parametrize(
        ("event", "relation"),
        [
            (SampledWithoutReplacementDpEvent(10, 2, GaussianDpEvent(1.0)), ADD),
            (SampledWithoutReplacementDpEvent(10, 2, LaplaceDpEvent(1.0)), REPLACE),
            (PoissonSampledDpEvent(0.1, LaplaceDpEvent(1.0)), REPLACE),
            (BallsInBinsDpEvent(4, 4, GaussianDpEvent(1.0)), REPLACE),
            (PoissonSampledDpEvent(0.1, SampledWithoutReplacementDpEvent(10, 2, GaussianDpEvent(1.0))), REPLACE),
            # A sample that names a client shows that it was there.
            (RevealedPoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)), ADD),
            (dp_accounting.ZCDpEvent(0.0, 0.1), ADD),
            (dp_accounting.SingleEpochTreeAggregationDpEvent(1.0, [1, 2]), ZERO),
            (dp_accounting.UnsupportedDpEvent(), ADD),
        ],
    )
    def test_what_has_no_known_pair(self, event, relation):
        assert not has_pld(ComposedDpEvent([GaussianDpEvent(1.0), event]), relation)
        with pytest.raises(dp_accounting.UnsupportedEventError):
            pld_epsilon(event, 1e-5, relation, COARSE)


class TestRefusals:
    @pytest.mark.parametrize("noise", [0.001, 1e-9])
    def test_a_loss_of_too_many_values(self, noise):
        with pytest.raises(InputError, match=r"the PLD accountant needs more memory for this than there is; .*RDP"):
            epsilon(GaussianDpEvent(noise), 1e-5)

    @pytest.mark.parametrize("event", [GaussianDpEvent(-1.0), GaussianDpEvent(math.nan), LaplaceDpEvent(-0.1)])
    def test_negative_noise(self, event):
        with pytest.raises(InputError, match=r"noise multiplier of an event must not be negative, but it was .*\.$"):
            epsilon(event, 1e-5)

    @pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
    def test_impossible_sampling(self, rate):
        with pytest.raises(InputError, match=r"must lie between 0 and 1, but it was .*\.$"):
            epsilon(poisson(rate, 1.0), 1e-5)
