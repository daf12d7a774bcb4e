"""Balls-in-bins sampling: the bounds against closed forms, quadrature, simulation and themselves."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from scipy import integrate, optimize, special

from dpfl.errors import InputError
from dpfl.privacy import balls_in_bins
from dpfl.privacy.balls_in_bins import divergences, loss_bounds
from dpfl.privacy.events import BallsInBinsDpEvent

EPSILONS = np.array([-2.0, -0.5, -0.01, 0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0])
DIRECTIONS = pytest.mark.parametrize("removes", [True, False], ids=["removes", "adds"])


def bins(count: int, noise: float, releases: int | None = None) -> BallsInBinsDpEvent:
    return BallsInBinsDpEvent(count, count if releases is None else releases, GaussianDpEvent(noise))


def epsilon_at(delta: float, event: BallsInBinsDpEvent, removes: bool) -> float:
    def excess(epsilon: float) -> float:
        return divergences(event, np.array([epsilon]), removes)[0] - delta

    return 0.0 if excess(0) <= 0 else float(optimize.brentq(excess, 0, 100, xtol=1e-10))


def gaussian_epsilon(delta: float, noise: float, rate: float = 1.0, removes: bool = True) -> float:
    """Epsilon of one Gaussian sum over a Poisson sample, in closed form."""
    side = AdjacencyType.REMOVE if removes else AdjacencyType.ADD
    loss = GaussianPrivacyLoss(noise, sampling_prob=rate, adjacency_type=side)
    if loss.get_delta_for_epsilon(0) <= delta:
        return 0.0
    return float(optimize.brentq(lambda e: loss.get_delta_for_epsilon(e) - delta, 0, 1000, xtol=1e-10))


def is_one_sentence(message: str) -> bool:
    return message.endswith(".") and ". " not in message and "\n" not in message


class TestOneRelease:
    """One of k bins is released: the Gaussian on a Poisson sample at rate 1 / k."""

    @DIRECTIONS
    @pytest.mark.parametrize(("count", "noise"), [(10, 0.5), (10, 1.0), (100, 2.0), (1000, 0.8), (7, 0.2)])
    def test_closely_above_the_subsampled_gaussian(self, count, noise, removes):
        for delta in (1e-3, 1e-6, 1e-9):
            exact = gaussian_epsilon(delta, noise, 1 / count, removes)
            assert exact - 1e-9 <= epsilon_at(delta, bins(count, noise, 1), removes) <= exact * 1.002 + 1e-9

    @DIRECTIONS
    @pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
    def test_one_bin_is_the_gaussian(self, noise, removes):
        assert 1 <= epsilon_at(1e-6, bins(1, noise), removes) / gaussian_epsilon(1e-6, noise) < 1.002


class TestTwoReleases:
    """Of two terms, one is integrated in closed form (Black & Scholes 1973) and the other by quadrature."""

    @staticmethod
    def exact(count: int, noise: float, epsilon: float, removes: bool) -> float:
        spread = 1 / noise
        threshold = math.exp(epsilon if removes else -epsilon)

        def beyond(strike: float) -> float:
            """E (Y - strike)_+ if the unit is removed, E (strike - Y)_+ if not, of one lognormal Y."""
            if strike <= 0:
                return 1 - strike if removes else 0.0
            near = -math.log(strike) / spread + spread / 2
            if removes:
                return special.ndtr(near) - strike * special.ndtr(near - spread)
            return strike * special.ndtr(spread - near) - special.ndtr(-near)

        def integrand(x: float) -> float:
            other = math.exp(spread * x - spread**2 / 2)
            return beyond(count * threshold - (count - 2) - other) * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)

        # Pieces, since the integrand has a kink where the strike vanishes.
        strike = count * threshold - (count - 2)
        kink = [] if strike <= 0 else [(math.log(strike) + spread**2 / 2) / spread]
        cuts = sorted({-12.0, -4.0, 0.0, 4.0, 12.0 + spread, *(cut for cut in kink if -12 < cut < 12 + spread)})
        total = sum(
            integrate.quad(integrand, low, high, epsabs=0, epsrel=1e-10, limit=500)[0]
            for low, high in itertools.pairwise(cuts)
        )
        return total / (count if removes else count * threshold)

    @DIRECTIONS
    @pytest.mark.parametrize(("count", "noise"), [(2, 0.5), (2, 1.0), (2, 3.0), (5, 0.7), (50, 1.5)])
    def test_closely_above_the_integral(self, count, noise, removes):
        for delta in (1e-2, 1e-5):
            found = epsilon_at(delta, bins(count, noise, 2), removes)
            assert self.exact(count, noise, found, removes) <= delta * (1 + 1e-6)
            if found > 1e-3:
                assert self.exact(count, noise, found * 0.998, removes) > delta


class TestManyReleases:
    @pytest.mark.parametrize(
        ("count", "releases", "noise"), [(10, 10, 0.5), (10, 10, 1.0), (100, 100, 1.0), (100, 40, 0.7), (33, 33, 3.0)]
    )
    def test_simulation(self, count, releases, noise):
        # The divergences as means over outputs with the unit (removed) and without it (added).
        samples = 200_000
        rng = np.random.default_rng(20_240_917)
        losses = {}
        for present in (True, False):
            outputs = rng.standard_normal((samples, releases)) * noise
            if present:
                fell = rng.integers(count, size=samples)
                seen = fell < releases
                outputs[np.flatnonzero(seen), fell[seen]] += 1
            ratios = (np.exp(outputs / noise**2 - 1 / (2 * noise**2)).sum(axis=1) + count - releases) / count
            losses[present] = np.log(ratios) if present else -np.log(ratios)
        compared = 0
        for epsilon in EPSILONS:
            for removes in (True, False):
                hits = np.maximum(-np.expm1(epsilon - losses[removes]), 0)
                if np.count_nonzero(hits) < 1000:
                    continue  # too few for an error bar
                compared += 1
                error = 4 * hits.std() / math.sqrt(samples)
                found = divergences(bins(count, noise, releases), np.array([epsilon]), removes)[0]
                assert abs(found - hits.mean()) <= error + 2e-3 * hits.mean()
        assert compared >= 10

    @pytest.mark.parametrize(
        ("count", "noise"),
        [
            (10, 0.5),
            (10, 3.0),
            (100, 1.0),
            pytest.param(300, 0.5, marks=pytest.mark.slow),
            pytest.param(1000, 2.0, marks=pytest.mark.slow),
        ],
    )
    def test_a_finer_grid_changes_little(self, count, noise, monkeypatch):
        event = bins(count, noise)
        found = [epsilon_at(1e-6, event, removes) for removes in (True, False)]
        monkeypatch.setattr(balls_in_bins, "_POINTS", 3000)
        balls_in_bins._sum_of.cache_clear()
        finer = [epsilon_at(1e-6, event, removes) for removes in (True, False)]
        balls_in_bins._sum_of.cache_clear()
        # The error falls as the square of the step: 5 / 9 of it is seen here, and 0.2 % of epsilon is allowed.
        for coarse, fine in zip(found, finer, strict=True):
            assert fine <= coarse < fine * (1 + 0.002 * 5 / 9)

    @pytest.mark.parametrize(("count", "releases"), [(10, 10), (64, 17)])
    def test_the_mean_is_preserved(self, count, releases):
        # H(P||Q)(e) = 1 - exp(e) + exp(e) H(Q||P)(-e) holds if and only if the likelihood ratio has mean 1.
        event = bins(count, 0.8, releases)
        forward, backward = divergences(event, EPSILONS, True), divergences(event, -EPSILONS, False)
        np.testing.assert_allclose(forward, 1 - np.exp(EPSILONS) + np.exp(EPSILONS) * backward, atol=1e-9)

    @DIRECTIONS
    def test_falls_with_epsilon_noise_and_bins_and_rises_with_releases(self, removes):
        grid = np.linspace(-3, 12, 400)
        base = divergences(bins(20, 0.8, 10), grid, removes)
        assert (np.diff(base) <= 1e-12).all()
        for cheaper in (bins(20, 1.0, 10), bins(30, 0.8, 10), bins(20, 0.8, 5)):
            found = divergences(cheaper, grid, removes)
            assert (found <= base + 1e-12).all()
            assert (found < base - 1e-4).any()

    def test_an_epoch_costs_less_than_everybody_and_about_as_much_as_poisson_sampling(self):
        # Chua et al. 2024 (2412.16802): similar or better than Poisson sampling in practical regimes.
        sampled = dp_accounting.PoissonSampledDpEvent(1 / 100, GaussianDpEvent(1.0))
        poisson = dp_accounting.pld.PLDAccountant().compose(sampled, 100).get_epsilon(1e-6)
        found = max(epsilon_at(1e-6, bins(100, 1.0), removes) for removes in (True, False))
        assert 0.4 * poisson < found < 1.2 * poisson
        assert found < 0.2 * gaussian_epsilon(1e-6, 1.0)


class TestLossBounds:
    @pytest.mark.parametrize("event", [bins(10, 0.5), bins(100, 1.0), bins(100, 3.0, 40), bins(1, 2.0)])
    def test_next_to_nothing_lies_outside(self, event):
        for removes in (True, False):
            lowest, highest = loss_bounds(event, removes)
            assert lowest < 0 < highest
            above, below = divergences(event, np.array([highest + 0.01, lowest - 0.01]), removes)
            assert above < 1e-20
            # Below all losses the divergence is that of certainty.
            assert below == pytest.approx(1 - math.exp(lowest - 0.01), abs=1e-12)
            assert divergences(event, np.array([0.5 * highest]), removes)[0] > 1e-20

    def test_the_directions_mirror_each_other(self):
        removed, added = (loss_bounds(bins(10, 1.0), removes) for removes in (True, False))
        # The likely losses differ between the directions, but not by how far they may reach.
        assert removed[0] == pytest.approx(-added[1], rel=0.1)
        assert removed[1] > -added[0]


class TestExtremes:
    @DIRECTIONS
    def test_any_epsilon_has_a_divergence(self, removes):
        found = divergences(bins(5, 0.5), np.array([-1e6, -800.0, 0.0, 800.0, 1e6]), removes)
        assert found[:2] == pytest.approx([1, 1], abs=1e-12)
        assert 0 < found[2] < 1
        assert found[3] <= found[2]
        assert 0 <= found[4] < 1e-20

    def test_little_noise(self):
        # One bin: the Gaussian, at an epsilon of hundreds.
        exact = gaussian_epsilon(1e-6, 0.05)
        assert exact > 250
        for removes in (True, False):
            assert divergences(bins(1, 0.05), np.array([exact]), removes)[0] >= 1e-6 * (1 - 1e-6)
            assert divergences(bins(1, 0.05), np.array([exact * 1.003]), removes)[0] <= 1e-6

    @pytest.mark.parametrize("removes", [True, False])
    @pytest.mark.parametrize(
        ("event", "word"),
        [
            (bins(10, 0.01), "noise multipliers from 0.05"),
            (bins(10, 0.0), "noise multipliers from 0.05"),
            (bins(10, math.nan), "noise multipliers from 0.05"),
            (bins(10, 1.0, 11), "of 10 bins"),
            (bins(10, 1.0, 0), "of 10 bins"),
            (BallsInBinsDpEvent(10, 10, dp_accounting.LaplaceDpEvent(1.0)), "Gaussian noise alone"),
        ],
        ids=["little noise", "no noise", "nan", "too many releases", "no release", "laplace"],
    )
    def test_refusals_are_one_sentence(self, event, word, removes):
        for refused in (lambda: divergences(event, EPSILONS, removes), lambda: loss_bounds(event, removes)):
            with pytest.raises(InputError, match=word) as refusal:
                refused()
            assert is_one_sentence(str(refusal.value))
