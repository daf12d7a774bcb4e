"""Renyi divergences: against quadrature, exact sums, the library where it is right, and tighter accountants."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, dp_event
from dp_accounting.rdp import RdpAccountant
from independent_accountants import analytic_gaussian_epsilon, fourier_epsilon
from scipy import integrate, special

from dpfl.privacy.events import (
    BallsInBinsDpEvent,
    DiscreteGaussianSumDpEvent,
    RevealedPoissonSampledDpEvent,
    SkellamDpEvent,
)
from dpfl.privacy.rdp import ORDERS, rdp_epsilon, renyi_divergences

RELATIONS = ["add_or_remove_one", "replace_one", "replace_special"]
SOME_ORDERS = np.array([1.1, 1.5, 2.0, 3.7, 8.0, 40.0, 200.0])


def divergence(log_first: np.ndarray, log_second: np.ndarray, order: float) -> float:
    """The Renyi divergence of discrete distributions on the same points, up to their far tails."""
    kept = (log_first > -600) & (log_second > -600)
    return special.logsumexp(order * log_first[kept] + (1 - order) * log_second[kept]) / (order - 1)


class TestAdditiveNoise:
    @pytest.mark.parametrize(
        ("relation", "sensitivity"), [("add_or_remove_one", 1), ("replace_one", 2), ("replace_special", 1)]
    )
    def test_gaussian_closed_form(self, relation, sensitivity):
        # Mironov 2017 (1702.07476), proposition 7.
        found = renyi_divergences(GaussianDpEvent(1.7), SOME_ORDERS, relation)
        np.testing.assert_allclose(found, SOME_ORDERS * sensitivity**2 / (2 * 1.7**2), rtol=1e-12)

    @pytest.mark.parametrize(("relation", "sensitivity"), [("add_or_remove_one", 1), ("replace_one", 2)])
    def test_laplace_closed_form(self, relation, sensitivity):
        # Mironov 2017 (1702.07476), proposition 6.
        order, scale = 3.0, 1.3 / sensitivity
        exact = math.log(
            order / (2 * order - 1) * math.exp((order - 1) / scale)
            + (order - 1) / (2 * order - 1) * math.exp(-order / scale)
        ) / (order - 1)
        found = renyi_divergences(LaplaceDpEvent(1.3), np.array([order]), relation)
        assert found[0] == pytest.approx(exact, rel=1e-12)

    def test_replace_one_is_not_the_value_of_add_or_remove(self):
        # google/differential-privacy issue 378: dp-accounting 0.6 says 4.73 for both; the truth is 9.997.
        assert rdp_epsilon(GaussianDpEvent(1.0), 1e-5, "add_or_remove_one") == pytest.approx(4.7285, abs=1e-3)
        assert 9.997 < rdp_epsilon(GaussianDpEvent(1.0), 1e-5, "replace_one") < 10.8

    def test_concentrated_privacy_is_taken_as_given(self):
        for relation in RELATIONS:
            found = renyi_divergences(dp_accounting.ZCDpEvent(0.3, 0.1), SOME_ORDERS, relation)
            np.testing.assert_allclose(found, 0.1 + 0.3 * SOME_ORDERS)

    @pytest.mark.parametrize("noise", [20.0, 80.0])
    def test_large_orders_pay_where_epsilon_is_small(self, noise):
        found = rdp_epsilon(GaussianDpEvent(noise), 1e-5, "add_or_remove_one")
        library = RdpAccountant().compose(GaussianDpEvent(noise)).get_epsilon(1e-5)
        assert analytic_gaussian_epsilon(noise, 1e-5) < found <= library
        assert all(order in ORDERS for order in RdpAccountant()._orders)

    def test_large_orders_are_not_missing(self):
        # Gaussian(25): the best order is near 170, in the library's gap between 128 and 256.
        found = rdp_epsilon(GaussianDpEvent(25.0), 1e-5, "add_or_remove_one")
        assert found < 0.97 * RdpAccountant().compose(GaussianDpEvent(25.0)).get_epsilon(1e-5)


class TestComposition:
    def test_divergences_add_up(self):
        first, second = GaussianDpEvent(2.0), PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0))
        both = dp_accounting.ComposedDpEvent([SelfComposedDpEvent(first, 3), second])
        for relation in RELATIONS:
            parts = [renyi_divergences(part, SOME_ORDERS, relation) for part in (first, second)]
            np.testing.assert_allclose(renyi_divergences(both, SOME_ORDERS, relation), 3 * parts[0] + parts[1])

    @pytest.mark.parametrize("relation", RELATIONS)
    def test_nothing_costs_nothing_and_no_noise_everything(self, relation):
        assert rdp_epsilon(dp_accounting.NoOpDpEvent(), 1e-5, relation) == 0
        assert rdp_epsilon(SelfComposedDpEvent(dp_accounting.NonPrivateDpEvent(), 0), 1e-5, relation) == 0
        for event in (dp_accounting.NonPrivateDpEvent(), GaussianDpEvent(0.0)):
            assert rdp_epsilon(event, 1e-5, relation) == math.inf
            assert rdp_epsilon(dp_accounting.ComposedDpEvent([event, GaussianDpEvent(1.0)]), 1e-5, relation) == math.inf


class TestPoissonSampled:
    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special"])
    @pytest.mark.parametrize(("rate", "noise"), [(0.03, 0.8), (0.001, 2.0), (0.5, 5.0)])
    def test_adding_and_zeroing_are_the_librarys_at_integer_orders(self, rate, noise, relation):
        event = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
        orders = np.array([2.0, 3.0, 11.0, 63.0, 256.0])
        found = renyi_divergences(event, orders, relation)
        np.testing.assert_allclose(found, RdpAccountant(orders).compose(event).rdp, rtol=1e-6)

    @pytest.mark.parametrize(("rate", "noise"), [(0.01, 0.5), (0.01, 0.35), (0.3, 1.0), (0.9, 3.0), (0.05, 0.2)])
    @pytest.mark.parametrize("order", [1.1, 1.5, 2.0, 7.5, 30.0])
    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
    def test_quadrature(self, rate, noise, order, relation):
        def log_density(x, shift):
            unit = math.log(rate) - (x - shift) ** 2 / (2 * noise**2)
            return np.logaddexp(unit, math.log1p(-rate) - x**2 / (2 * noise**2))

        def log_integrand(x):
            without = log_density(x, -1) if relation == "replace_one" else -(x**2) / (2 * noise**2)
            return order * log_density(x, 1) + (1 - order) * without

        pieces = np.linspace(-2 - 14 * noise, order + 2 + 14 * noise, 60)
        peak = max(log_integrand(x) for x in np.linspace(pieces[0], pieces[-1], 3000))
        total = sum(
            integrate.quad(lambda x: math.exp(log_integrand(x) - peak), low, high, epsabs=1e-16, epsrel=1e-12)[0]
            for low, high in itertools.pairwise(pieces)
        )
        exact = (math.log(total / (noise * math.sqrt(2 * math.pi))) + peak) / (order - 1)
        event = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
        found = renyi_divergences(event, np.array([order]), relation)
        assert found[0] == pytest.approx(exact, rel=1e-7)
        if relation == "add_or_remove_one":  # The library is above it: its series at fractional orders has no signs.
            assert found[0] <= RdpAccountant([order]).compose(event).rdp[0] * (1 + 1e-8)

    @pytest.mark.parametrize(("rate", "noise", "order"), [(0.999, 10.0, 256.0), (1 - 1e-6, 3.0, 64.0)])
    def test_high_orders_where_nearly_everybody_is_replaced(self, rate, noise, order):
        # The peak of the integrand lies at nearly 2 order - 1, as it does for N(1, z^2) from N(-1, z^2).
        points = np.arange(-20 * noise, 2 * order + 20 * noise, noise / 50)

        def log_density(shift):
            units = (-((points - shift) ** 2) / (2 * noise**2), -(points**2) / (2 * noise**2))
            return np.logaddexp(math.log(rate) + units[0], math.log1p(-rate) + units[1])

        log_integral = special.logsumexp(order * log_density(1) + (1 - order) * log_density(-1))
        exact = (log_integral - math.log(50 * math.sqrt(2 * math.pi))) / (order - 1)
        event = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
        found = renyi_divergences(event, np.array([order]), "replace_one")
        assert found[0] == pytest.approx(exact, rel=1e-9)

    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
    def test_tiny_rates_do_not_vanish_in_rounding(self, relation):
        # To first order in the rate: order q^2 chi^2 / 2, where replacing counts both units and their difference.
        noise, order = 1.0, 2.0
        chi_square = math.expm1(1 / noise**2)
        if relation == "replace_one":
            chi_square = 2 * chi_square + 2 * (1 - math.exp(-1 / noise**2))
        for rate in (1e-4, 1e-6, 1e-9):
            event = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
            found = renyi_divergences(event, np.array([order]), relation)[0]
            exact = order * rate**2 * chi_square / 2
            assert exact * (1 - 1e-3) <= found <= exact * (1 + 1e-3) + 1e-13

    def test_nothing_in_the_sample(self):
        for nothing in (dp_accounting.ComposedDpEvent([]), SelfComposedDpEvent(GaussianDpEvent(0.0), 0)):
            fixed = dp_accounting.SampledWithoutReplacementDpEvent(10, 2, nothing)
            for event in (PoissonSampledDpEvent(0.2, nothing), fixed):
                assert not renyi_divergences(event, SOME_ORDERS, "replace_one").any()

    def test_too_little_noise_leaves_small_orders(self):
        found = renyi_divergences(PoissonSampledDpEvent(0.1, GaussianDpEvent(0.02)), SOME_ORDERS, "replace_one")
        assert np.isfinite(found[:4]).all()
        assert np.isinf(found[-1])

    def test_everybody_is_the_gaussian_and_nobody_is_nothing(self):
        everybody = renyi_divergences(PoissonSampledDpEvent(1.0, GaussianDpEvent(2.0)), SOME_ORDERS, "replace_one")
        np.testing.assert_allclose(everybody, SOME_ORDERS * 4 / 8)
        nobody = renyi_divergences(PoissonSampledDpEvent(0.0, GaussianDpEvent(2.0)), SOME_ORDERS, "replace_one")
        assert not nobody.any()

    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
    @pytest.mark.parametrize(("rate", "noise", "steps"), [(120 / 3383, 1.2, 100), (0.3, 5.0, 50), (0.01, 0.6, 200)])
    def test_little_above_the_tight_epsilon(self, rate, noise, steps, relation):
        tight = fourier_epsilon(noise, rate, steps, 1e-5, relation)
        event = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
        assert tight < rdp_epsilon(event, 1e-5, relation) < 1.35 * tight

    def test_composed_gaussians_of_whole_noise_in_one_sample(self):
        # dp-accounting's own function takes the first of the noise multipliers 1 and 2 for both if they are ints.
        inner = dp_accounting.ComposedDpEvent([GaussianDpEvent(1), SelfComposedDpEvent(GaussianDpEvent(2), 3)])
        one = GaussianDpEvent((1 + 3 / 4) ** -0.5)
        for relation in RELATIONS:
            np.testing.assert_allclose(
                renyi_divergences(PoissonSampledDpEvent(0.1, inner), SOME_ORDERS, relation),
                renyi_divergences(PoissonSampledDpEvent(0.1, one), SOME_ORDERS, relation),
            )


class TestWithoutReplacement:
    @staticmethod
    def event(sample, inner):
        return dp_accounting.SampledWithoutReplacementDpEvent(1000, sample, inner)

    @pytest.mark.parametrize(("sample", "noise"), [(10, 1.5), (50, 4.0), (200, 8.0)])
    def test_library_at_the_noise_relative_to_a_replacement(self, sample, noise):
        orders = np.array([1.5, 2.0, 4.3, 16.0, 63.0])
        replaces = dp_accounting.NeighboringRelation.REPLACE_ONE
        library = RdpAccountant(orders, replaces).compose(self.event(sample, GaussianDpEvent(noise / 2))).rdp
        everyone = orders * 4 / (2 * noise**2)
        found = renyi_divergences(self.event(sample, GaussianDpEvent(noise)), orders, "replace_one")
        np.testing.assert_allclose(found, np.minimum(library, everyone), rtol=1e-9)
        assert (library < everyone).any()

    @pytest.mark.parametrize(("sample", "noise"), [(10, 1.5), (50, 4.0), (300, 8.0)])
    def test_never_below_the_worst_known_data(self, sample, noise):
        # One client at +C among others at -C: (1 - q) N(0, z^2) + q N(2, z^2) against N(0, z^2).
        known_data = PoissonSampledDpEvent(sample / 1000, GaussianDpEvent(noise / 2))
        worst = renyi_divergences(known_data, SOME_ORDERS, "add_or_remove_one")
        found = renyi_divergences(self.event(sample, GaussianDpEvent(noise)), SOME_ORDERS, "replace_one")
        assert (found >= worst * (1 - 1e-9)).all()

    def test_general_bound_by_hand(self):
        # Wang et al. 2019 (1808.00087), theorem 9 at order 3, with epsilon(infinity) infinite.
        skellam, rate = SkellamDpEvent(30.0, 5.0, 20.0), 0.02
        two, three = renyi_divergences(skellam, np.array([2.0, 3.0]), "replace_one")
        exact = (
            math.log(
                1 + rate**2 * 3 * min(4 * (math.exp(two) - 1), 2 * math.exp(two)) + rate**3 * 2 * math.exp(2 * three)
            )
            / 2
        )
        found = renyi_divergences(self.event(20, skellam), np.array([3.0]), "replace_one")
        assert found[0] == pytest.approx(exact, rel=1e-12)

    def test_skellam_of_fine_steps_is_like_gaussian(self):
        gaussian = SelfComposedDpEvent(self.event(50, GaussianDpEvent(4.0)), 50)
        skellam = SelfComposedDpEvent(self.event(50, SkellamDpEvent(4e4, 1e4, 1e5)), 50)
        exact = rdp_epsilon(gaussian, 1e-5, "replace_one")
        # Theorem 9 knows less of the noise than theorem 27 does.
        assert exact <= rdp_epsilon(skellam, 1e-5, "replace_one") < 1.2 * exact

    def test_a_sample_of_all_and_of_none(self):
        inner = SkellamDpEvent(30.0, 5.0, 20.0)
        whole = renyi_divergences(self.event(1000, inner), SOME_ORDERS, "replace_one")
        np.testing.assert_array_equal(whole, renyi_divergences(inner, SOME_ORDERS, "replace_one"))
        assert not renyi_divergences(self.event(0, inner), SOME_ORDERS, "replace_one").any()

    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special"])
    def test_other_relations_have_no_analysis(self, relation):
        with pytest.raises(dp_accounting.UnsupportedEventError):
            rdp_epsilon(self.event(10, GaussianDpEvent(1.0)), 1e-5, relation)


class TestRevealedSample:
    @pytest.mark.parametrize(("relation", "sensitivity"), [("replace_one", 2), ("replace_special", 1)])
    def test_mixture_of_a_gaussian_and_nothing(self, relation, sensitivity):
        rate, noise, order = 0.2, 1.5, 4.0
        drawn = math.exp((order - 1) * order * sensitivity**2 / (2 * noise**2))
        exact = math.log(1 - rate + rate * drawn) / (order - 1)
        event = RevealedPoissonSampledDpEvent(rate, GaussianDpEvent(noise))
        assert renyi_divergences(event, np.array([order]), relation)[0] == pytest.approx(exact, rel=1e-12)

    @pytest.mark.parametrize("relation", ["replace_one", "replace_special"])
    def test_dearer_than_a_secret_sample_and_cheaper_than_everybody(self, relation):
        inner = GaussianDpEvent(2.0)
        secret = renyi_divergences(PoissonSampledDpEvent(0.1, inner), SOME_ORDERS, relation)
        revealed = renyi_divergences(RevealedPoissonSampledDpEvent(0.1, inner), SOME_ORDERS, relation)
        assert (secret < revealed).all()
        assert (revealed < renyi_divergences(inner, SOME_ORDERS, relation)).all()

    @pytest.mark.parametrize(("rate", "fraction"), [(0.0, 0.0), (1.0, 1.0)])
    def test_nobody_and_everybody(self, rate, fraction):
        event = RevealedPoissonSampledDpEvent(rate, GaussianDpEvent(2.0))
        found = renyi_divergences(event, SOME_ORDERS, "replace_special")
        np.testing.assert_allclose(found, fraction * SOME_ORDERS / 8)

    def test_a_revealed_presence_protects_nobody_who_is_added(self):
        with pytest.raises(dp_accounting.UnsupportedEventError):
            rdp_epsilon(RevealedPoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), 1e-5, "add_or_remove_one")


class TestSkellam:
    @staticmethod
    def exact(deviation: float, shift: int, order: float) -> float:
        """In one dimension; exp(-mu) I_k(mu) is the mass of k."""
        points = np.arange(-int(40 * deviation) - shift, int(40 * deviation) + shift + 1)
        with np.errstate(divide="ignore"):
            shifted, noise = (np.log(special.ive(np.abs(points - by), deviation**2)) for by in (shift, 0))
        return divergence(shifted, noise, order)

    @pytest.mark.parametrize(("deviation", "shift"), [(0.5, 1), (3.0, 1), (3.0, 3), (10.0, 2), (40.0, 10)])
    @pytest.mark.parametrize("order", [2.0, 5.0, 12.0])
    def test_never_below_the_exact_divergence_in_one_dimension(self, deviation, shift, order):
        event = SkellamDpEvent(deviation, shift, shift)
        found = renyi_divergences(event, np.array([order]), "replace_special")[0]
        assert found >= self.exact(deviation, shift, order)

    @pytest.mark.parametrize("order", [2.0, 5.0, 12.0])
    def test_tight_with_much_noise(self, order):
        found = renyi_divergences(SkellamDpEvent(40.0, 10, 10), np.array([order]), "replace_special")[0]
        assert found < 1.002 * self.exact(40.0, 10, order)

    def test_replacing_doubles_both_sensitivities(self):
        np.testing.assert_array_equal(
            renyi_divergences(SkellamDpEvent(20.0, 3.0, 5.0), SOME_ORDERS, "replace_one"),
            renyi_divergences(SkellamDpEvent(20.0, 6.0, 10.0), SOME_ORDERS, "replace_special"),
        )

    def test_between_integer_orders_the_bound_is_the_chord(self):
        event = SkellamDpEvent(20.0, 3.0, 5.0)
        low, middle, high = renyi_divergences(event, np.array([4.0, 4.5, 5.0]), "replace_special")
        assert 3.5 * middle == pytest.approx((3 * low + 4 * high) / 2)

    def test_without_noise_nothing_is_guaranteed(self):
        assert rdp_epsilon(SkellamDpEvent(0.0, 1.0, 1.0), 1e-5, "replace_special") == math.inf


class TestDiscreteGaussianSum:
    @pytest.mark.parametrize(("share", "summands"), [(0.1, 2), (0.3, 10), (0.5, 3), (0.6, 5), (1.5, 4)])
    @pytest.mark.parametrize("shift", [1, 2])
    @pytest.mark.parametrize("order", [1.1, 2.0, 6.0])
    def test_never_below_the_exact_divergence_in_one_dimension(self, share, summands, shift, order):
        points = np.arange(-200.0, 201.0)
        one = np.exp(-(points**2) / (2 * share**2))
        one = total = one / one.sum()
        for _ in range(summands - 1):
            total = np.convolve(total, one, mode="same")
        with np.errstate(divide="ignore"):
            noise = np.log(total)
        event = DiscreteGaussianSumDpEvent(share * math.sqrt(summands), summands, 1, shift)
        found = renyi_divergences(event, np.array([order]), "replace_special")[0]
        assert found >= divergence(np.roll(noise, shift), noise, order) * (1 - 1e-9)

    def test_large_shares_are_one_gaussian(self):
        event = DiscreteGaussianSumDpEvent(100.0, 10, 1000, 50.0)
        found = renyi_divergences(event, SOME_ORDERS, "replace_special")
        np.testing.assert_allclose(found, SOME_ORDERS * 0.25 / 2, rtol=1e-9)

    def test_small_shares_cost_more_with_dimension(self):
        small, large = (
            rdp_epsilon(DiscreteGaussianSumDpEvent(6.0, 100, dimension, 6.0), 1e-5, "replace_special")
            for dimension in (1, 10_000)
        )
        assert rdp_epsilon(GaussianDpEvent(1.0), 1e-5, "replace_special") < small < large

    def test_one_share_is_the_discrete_gaussian(self):
        # Canonne et al. 2020 (2004.00010), theorem 4: as good as the Gaussian, in any dimension.
        event = DiscreteGaussianSumDpEvent(2.0, 1, 10**6, 3.0)
        found = renyi_divergences(event, SOME_ORDERS, "replace_special")
        np.testing.assert_allclose(found, SOME_ORDERS * 9 / 8)

    @pytest.mark.parametrize(("share", "summands"), [(0.1, 2), (0.1, 5), (0.49, 3)])
    def test_shares_below_a_half_are_beyond_the_proposition(self, share, summands):
        # At 0.1 and orders near 1 its formula would be too small by a third: 34.3 where 49.3 is true of two shares.
        event = DiscreteGaussianSumDpEvent(share * math.sqrt(summands), summands, 1, 1.0)
        assert rdp_epsilon(event, 1e-5, "replace_special") == math.inf

    @pytest.mark.parametrize("summands", [2, 3, 7, 10, 1000])
    def test_shares_of_just_a_half_are_within_it(self, summands):
        event = DiscreteGaussianSumDpEvent(0.5 * math.sqrt(summands), summands, 1, 1.0)
        assert rdp_epsilon(event, 1e-5, "replace_special") < math.inf

    def test_replacing_doubles_the_sensitivity(self):
        np.testing.assert_array_equal(
            renyi_divergences(DiscreteGaussianSumDpEvent(4.0, 9, 20, 3.0), SOME_ORDERS, "replace_one"),
            renyi_divergences(DiscreteGaussianSumDpEvent(4.0, 9, 20, 6.0), SOME_ORDERS, "replace_special"),
        )

    def test_without_noise_nothing_is_guaranteed(self):
        assert rdp_epsilon(DiscreteGaussianSumDpEvent(0.0, 5, 10, 1.0), 1e-5, "replace_special") == math.inf


class TestUnsupported:
    @pytest.mark.parametrize(
        ("event", "relation"),
        [
            (SkellamDpEvent(10.0, 1.0, 1.0), "add_or_remove_one"),
            (DiscreteGaussianSumDpEvent(10.0, 5, 10, 1.0), "add_or_remove_one"),
            (PoissonSampledDpEvent(0.1, LaplaceDpEvent(1.0)), "add_or_remove_one"),
            (PoissonSampledDpEvent(0.1, LaplaceDpEvent(1.0)), "replace_one"),
            (PoissonSampledDpEvent(0.1, SkellamDpEvent(10.0, 1.0, 1.0)), "replace_special"),
            (dp_accounting.SingleEpochTreeAggregationDpEvent(1.0, 10), "add_or_remove_one"),
            (dp_accounting.SingleEpochTreeAggregationDpEvent(1.0, 10), "replace_one"),
            (dp_accounting.TruncatedSubsampledGaussianDpEvent(10, 0.1, 5, 1.0), "add_or_remove_one"),
            (BallsInBinsDpEvent(5, 5, GaussianDpEvent(1.0)), "add_or_remove_one"),
            (dp_accounting.UnsupportedDpEvent(), "replace_special"),
        ],
        ids=lambda value: value if isinstance(value, str) else type(value).__name__,
    )
    def test_no_analysis_is_not_approximated(self, event, relation):
        composed = dp_accounting.ComposedDpEvent([GaussianDpEvent(1.0), SelfComposedDpEvent(event, 2)])
        with pytest.raises(dp_accounting.UnsupportedEventError):
            rdp_epsilon(composed, 1e-5, relation)


def test_repeat_and_select_uses_the_doubled_sensitivity():
    event = dp_event.RepeatAndSelectDpEvent
    assert rdp_epsilon(event(GaussianDpEvent(4.0), 10, 1), 1e-5, "replace_one") == pytest.approx(
        rdp_epsilon(event(GaussianDpEvent(2.0), 10, 1), 1e-5, "add_or_remove_one")
    )
