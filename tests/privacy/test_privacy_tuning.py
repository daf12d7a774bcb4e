"""The price of tuning: closed forms of the paper, simulation, and what the number of trials does."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, LaplaceDpEvent
from scipy import optimize, stats

from dpfl.errors import InputError
from dpfl.privacy import epsilon, poisson_gaussian
from dpfl.privacy.events import SkellamDpEvent
from dpfl.privacy.rdp import rdp_epsilon
from dpfl.privacy.tuning import all_of, best_of

DELTA = 1e-6
RUN = poisson_gaussian(2.0, 0.05, 200)


def is_one_sentence(message: str) -> bool:
    return message.endswith(".") and ". " not in message and "\n" not in message


def concentrated_best_of(rho: float, trials: float, shape: float, delta: float) -> float:
    """Papernot & Steinke 2022 (2110.03620), corollary 4, minimised over all orders, not just a list of them."""

    def mean(gamma: float) -> float:
        if shape == 0:
            return (1 / gamma - 1) / math.log(1 / gamma)
        return shape * (1 - gamma) / (gamma * (1 - gamma**shape))

    gamma = optimize.brentq(lambda value: mean(value) - trials, 1e-9, 1 - 1e-9, xtol=1e-14)
    assert rho <= math.log(1 / gamma)

    def converted(order: float) -> float:
        order_used = max(order, 1 + math.sqrt(math.log(trials) / rho))  # Renyi divergences rise with the order
        divergence = (
            rho * (order_used - 1)
            + math.log(trials) / (order_used - 1)
            + 2 * (1 + shape) * math.sqrt(rho * math.log(1 / gamma))
            - shape * rho
        )
        return divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

    return float(optimize.minimize_scalar(converted, bounds=(1.05, 1024), method="bounded").fun)


class TestBestOf:
    @pytest.mark.parametrize(("distribution", "shape"), [("logarithmic", 0), ("geometric", 1), (0.5, 0.5), (5.0, 5.0)])
    @pytest.mark.parametrize(("noise", "trials"), [(3.0, 10.0), (1.0, 100.0), (10.0, 1000.0)])
    def test_gaussian_trials_by_the_papers_corollary(self, distribution, shape, noise, trials):
        exact = concentrated_best_of(1 / (2 * noise**2), trials, shape, DELTA)
        found = best_of(GaussianDpEvent(noise), DELTA, trials=trials, distribution=distribution)
        # The best order and lambda-hat lie between those of the list.
        assert exact * (1 - 1e-6) <= found < 1.005 * exact

    @pytest.mark.parametrize(("distribution", "factor"), [("logarithmic", 2), ("geometric", 3), (0.5, 2.5)])
    def test_many_purely_private_trials_cost_a_few_of_them(self, distribution, factor):
        # Corollary 3: (2 + shape) epsilon, however many trials; orders are finite here and so is their excess.
        for trials in (10, 1e4):
            assert best_of(LaplaceDpEvent(1.0), 1e-12, trials=trials, distribution=distribution) < factor * 1.05

    def test_simulated_selection_keeps_the_bound(self):
        # Trials of randomised response on a score of one bit; the best is whether any trial shows a 1.
        one_bit = 1.0
        chance = {True: 1 / (1 + math.exp(-one_bit)), False: 1 / (1 + math.exp(one_bit))}
        trials = 8.0
        found = best_of(LaplaceDpEvent(1 / one_bit), 1e-9, trials=trials)

        def none_shows(present: bool) -> float:
            counts = np.arange(1, 2000)
            return float(stats.geom.pmf(counts, 1 / trials) @ (1 - chance[present]) ** counts)

        losses = [
            abs(math.log(none_shows(True) / none_shows(False))),
            abs(math.log((1 - none_shows(True)) / (1 - none_shows(False)))),
        ]
        assert one_bit < max(losses) <= found

    @pytest.mark.parametrize("distribution", ["geometric", "logarithmic", "poisson", 2.0])
    def test_between_one_run_and_all(self, distribution):
        found = best_of(RUN, DELTA, trials=20, distribution=distribution)
        assert rdp_epsilon(RUN, DELTA, "add_or_remove_one") < found < all_of(RUN, DELTA, trials=20, accountant="rdp")

    @pytest.mark.parametrize("distribution", ["geometric", "logarithmic", "poisson", 2.0])
    def test_rises_with_trials(self, distribution):
        found = [best_of(RUN, DELTA, trials=trials, distribution=distribution) for trials in (1, 2, 10, 100, 1000)]
        assert found == sorted(found)
        assert found[0] < found[-1]

    def test_distributions_that_vary_more_cost_less(self):
        found = [best_of(RUN, DELTA, trials=50, distribution=shape) for shape in ("logarithmic", 0.5, "geometric", 3.0)]
        assert found == sorted(found)
        assert found[0] < 0.9 * found[-1]

    def test_names_are_shapes(self):
        assert best_of(RUN, DELTA, trials=10) == best_of(RUN, DELTA, trials=10, distribution=1.0)
        assert best_of(RUN, DELTA, trials=10, distribution="logarithmic") == pytest.approx(
            best_of(RUN, DELTA, trials=10, distribution=1e-6), rel=1e-4
        )

    def test_relation(self):
        replaced = best_of(GaussianDpEvent(4.0), DELTA, trials=10, relation="replace_one")
        assert replaced == pytest.approx(best_of(GaussianDpEvent(2.0), DELTA, trials=10))

    def test_no_noise(self):
        assert best_of(GaussianDpEvent(0.0), DELTA, trials=10) == math.inf


class TestAllOf:
    def test_is_composition(self):
        assert all_of(GaussianDpEvent(6.0), DELTA, trials=9) == pytest.approx(
            epsilon(GaussianDpEvent(2.0), DELTA), rel=1e-3
        )

    def test_one_trial_is_the_run(self):
        assert all_of(RUN, DELTA, trials=1) == pytest.approx(epsilon(RUN, DELTA), rel=1e-6)

    def test_relation_and_accountant_are_passed_on(self):
        found = all_of(GaussianDpEvent(6.0), DELTA, trials=9, relation="replace_one", accountant="rdp")
        assert found == pytest.approx(rdp_epsilon(GaussianDpEvent(1.0), DELTA, "add_or_remove_one"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "word"),
        [
            ({"trials": 0.5}, "mean number of trials"),
            ({"trials": math.nan}, "mean number of trials"),
            ({"trials": math.inf}, "mean number of trials"),
            ({"trials": 5, "distribution": "uniform"}, "no distribution 'uniform'"),
            ({"trials": 5, "distribution": -1.0}, "shape"),
            ({"trials": 5, "distribution": math.inf}, "shape"),
        ],
    )
    def test_best_of(self, arguments, word):
        with pytest.raises(InputError, match=word) as refusal:
            best_of(RUN, DELTA, **arguments)
        assert is_one_sentence(str(refusal.value))

    def test_delta(self):
        for delta in (0.0, 1.0):
            with pytest.raises(InputError, match="delta"):
                best_of(RUN, delta, trials=5)
            with pytest.raises(InputError, match="delta"):
                all_of(RUN, delta, trials=5)

    def test_a_run_without_renyi_analysis(self):
        for event in (
            SkellamDpEvent(10.0, 1.0, 1.0),
            dp_accounting.TruncatedSubsampledGaussianDpEvent(10, 0.1, 5, 1.0),
        ):
            with pytest.raises(InputError, match=f"tuning {type(event).__name__}") as refusal:
                best_of(event, DELTA, trials=5)
            assert is_one_sentence(str(refusal.value))

    @pytest.mark.parametrize("trials", [0, -1, 2.5, math.nan])
    def test_all_of_takes_a_whole_number_of_trials(self, trials):
        with pytest.raises(InputError, match="whole number") as refusal:
            all_of(RUN, DELTA, trials=trials)
        assert is_one_sentence(str(refusal.value))
