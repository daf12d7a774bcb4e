"""From epsilon to noise: the target is met, from below, and closely."""

import decimal
import math

import dp_accounting
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_accountants import analytic_gaussian_epsilon, fourier_epsilon

from dpfl.errors import InputError
from dpfl.privacy import (
    accounting,
    calibration,
    epsilon,
    largest_count,
    noise_for,
    noise_multiplier,
    poisson_gaussian,
)
from dpfl.privacy.events import BallsInBinsDpEvent, RevealedPoissonSampledDpEvent, SkellamDpEvent, with_noise
from dpfl.privacy.rounding import rounded_up

ADD, REPLACE, ZERO = "add_or_remove_one", "replace_one", "replace_special"
TARGETS = [
    # epsilon, delta, sampling rate, steps, relation, accountant
    (0.1, 1e-5, 1.0, 1, ADD, "pld"),
    (0.5, 1e-3, 0.3, 100, ADD, "pld"),
    (1.0, 1e-5, 120 / 3383, 100, ZERO, "pld"),
    (1.0, 1e-5, 120 / 3383, 100, REPLACE, "pld"),
    (2.0, 1e-8, 0.9, 1000, ADD, "pld"),
    (8.0, 1e-5, 0.1, 2000, ADD, "pld"),
    (20.0, 1e-5, 1.0, 50, ADD, "pld"),
    (0.01, 1e-4, 1.0, 10, ADD, "rdp"),
    (0.5, 1e-3, 0.3, 100, ADD, "rdp"),
    (1.0, 1e-5, 0.001, 1000, ADD, "rdp"),
    (4.0, 1e-5, 1.0, 30, ZERO, "rdp"),
    (100.0, 1e-6, 1.0, 200, ADD, "rdp"),
    (100.0, 1e-6, 0.01, 5, ADD, "pld"),
    (0.02, 1e-5, 0.001, 10_000, ADD, "pld"),
    (4.0, 1e-10, 0.001, 1000, REPLACE, "pld"),
    (2.0, 1e-5, 0.1, 50, REPLACE, "rdp"),
]
FEW = settings(max_examples=5, deadline=None, derandomize=True, database=None)


class TestTarget:
    @pytest.mark.parametrize(("target", "delta", "rate", "steps", "relation", "accountant"), TARGETS)
    def test_is_met_from_below_within_a_thousandth(self, target, delta, rate, steps, relation, accountant):
        noise = noise_multiplier(
            target, delta, sampling_rate=rate, steps=steps, relation=relation, accountant=accountant
        )
        spent = epsilon(poisson_gaussian(noise, rate, steps), delta, relation=relation, accountant=accountant)
        assert 0.999 * target <= spent <= target

    @FEW
    @given(
        st.floats(0.2, 4),
        st.sampled_from([1e-6, 1e-3]),
        st.floats(0.1, 1),
        st.integers(1, 200),
        st.sampled_from([ADD, REPLACE]),
    )
    def test_is_met_anywhere(self, target, delta, rate, steps, relation):
        noise = noise_multiplier(target, delta, sampling_rate=rate, steps=steps, relation=relation)
        spent = epsilon(poisson_gaussian(noise, rate, steps), delta, relation=relation)
        assert 0.999 * target <= spent <= target

    @pytest.mark.parametrize("target", [0.05, 0.3, 0.7, 1.1, 1.9, 2.3, 3.7, 6.1, 9.7, 17.3, 31.0, 77.0])
    def test_is_never_exceeded_however_close_the_first_root_is(self, target):
        # RDP knows no mesh, so the root is found on either side of the target, and half of these need a second step.
        noise = noise_multiplier(target, 1e-5, sampling_rate=1, steps=20, accountant="rdp")
        spent = epsilon(poisson_gaussian(noise, 1, 20), 1e-5, accountant="rdp")
        assert 0.999 * target <= spent <= target

    @pytest.mark.parametrize("relation", [ADD, REPLACE])
    @pytest.mark.parametrize(("target", "delta", "rate", "steps"), [(0.5, 1e-3, 0.3, 100), (2.0, 1e-5, 0.2, 30)])
    def test_an_independent_accountant_confirms_it(self, target, delta, rate, steps, relation):
        noise = noise_multiplier(target, delta, sampling_rate=rate, steps=steps, relation=relation)
        assert fourier_epsilon(noise, rate, steps, delta, relation) == pytest.approx(target, rel=1.2e-3)

    @pytest.mark.parametrize(("relation", "sensitivity"), [(ADD, 1), (REPLACE, 2)])
    def test_the_closed_form_confirms_it(self, relation, sensitivity):
        noise = noise_multiplier(3, 1e-5, sampling_rate=1, steps=20, relation=relation)
        assert 0.9985 * 3 <= analytic_gaussian_epsilon(noise, 1e-5, steps=20, sensitivity=sensitivity) <= 3

    @pytest.mark.parametrize(("target", "delta", "rate", "steps", "relation", "accountant"), TARGETS[:2] + TARGETS[-2:])
    def test_noise_has_six_digits(self, target, delta, rate, steps, relation, accountant):
        noise = noise_multiplier(
            target, delta, sampling_rate=rate, steps=steps, relation=relation, accountant=accountant
        )
        assert len(decimal.Decimal(repr(noise)).normalize().as_tuple().digits) <= 6
        assert float(f"{noise:.6g}") == noise

    def test_replace_one_needs_more_noise_than_add_or_remove(self):
        wanted = {r: noise_multiplier(0.5, 1e-3, sampling_rate=0.3, steps=100, relation=r) for r in (ADD, REPLACE)}
        assert wanted[REPLACE] > 1.3 * wanted[ADD]

    def test_rdp_needs_no_less_noise_than_pld(self):
        wanted = [noise_multiplier(0.5, 1e-3, sampling_rate=0.3, steps=100, accountant=a) for a in ("pld", "rdp")]
        assert wanted[0] < wanted[1]

    @pytest.mark.parametrize(
        ("target", "delta", "rate", "steps", "relation", "accountant"), TARGETS[1:5] + TARGETS[-3:]
    )
    def test_little_less_noise_is_too_little(self, target, delta, rate, steps, relation, accountant):
        noise = noise_multiplier(
            target, delta, sampling_rate=rate, steps=steps, relation=relation, accountant=accountant
        )
        less = poisson_gaussian(noise * 0.998, rate, steps)
        assert epsilon(less, delta, relation=relation, accountant=accountant) > target

    def test_numbers_are_the_same_however_they_are_written(self):
        plain = noise_multiplier(2, 1e-5, sampling_rate=1, steps=10)
        assert noise_multiplier(2.0, 1e-5, sampling_rate=1.0, steps=10) == plain


def refusal(*arguments: float, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        noise_multiplier(*arguments, **{"sampling_rate": 0.1, "steps": 10, **settings})
    message = str(caught.value)
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message
    return message


class TestRefusals:
    @pytest.mark.parametrize("target", [0, -1, 100.001, 1e6, math.nan, math.inf])
    def test_epsilon(self, target):
        assert refusal(target, 1e-5).startswith("epsilon must be a positive number up to 100")

    @pytest.mark.parametrize("delta", [0, 1, -0.1, 2, math.nan])
    def test_delta(self, delta):
        assert refusal(1, delta).startswith("delta must lie between 0 and 1")

    @pytest.mark.parametrize("rate", [0, -0.5, 1.001, math.nan])
    def test_sampling_rate(self, rate):
        assert refusal(1, 1e-5, sampling_rate=rate).startswith("the sampling rate must lie between 0 (excluded) and 1")

    @pytest.mark.parametrize("steps", [0, -1])
    def test_steps(self, steps):
        assert refusal(1, 1e-5, steps=steps).startswith("at least 1 step must be released")

    def test_a_target_beyond_any_noise(self):
        message = refusal(1e-4, 1e-9, sampling_rate=1, steps=10_000, accountant="rdp")
        assert "cannot be met with any noise multiplier up to 100000" in message

    def test_a_target_that_needs_hardly_any_noise(self, monkeypatch):
        # The true limit, 0.02, takes seconds to reach.
        monkeypatch.setattr(calibration, "_SMALLEST_NOISE", 0.5)
        assert "hardly any noise is needed" in refusal(50, 1e-5, sampling_rate=1, steps=1)

    def test_a_fraction_of_a_step(self):
        assert "a whole number of them" in refusal(1, 1e-5, steps=1.9, sampling_rate=1)


class TestHardTargets:
    def test_where_epsilon_jumps_the_safe_side_is_taken(self):
        settings = {"sampling_rate": 1.5615e-4, "steps": 66}
        noise = noise_multiplier(0.0267511, 1.99e-8, **settings, accountant="rdp")
        assert epsilon(poisson_gaussian(noise, **settings), 1.99e-8, accountant="rdp") <= 0.0267511
        assert epsilon(poisson_gaussian(noise * 0.999, **settings), 1.99e-8, accountant="rdp") > 0.0267511

    def test_where_delta_exceeds_the_sampling_rate_no_noise_is_needed(self):
        message = refusal(0.712788, 0.00913469, sampling_rate=0.00184771, steps=1)
        assert "no noise would be needed" in message

    @pytest.mark.parametrize("noise", [1e-3, -1, float("nan"), float("inf")])
    def test_noise_that_no_accountant_can_take_is_refused(self, noise):
        with pytest.raises(InputError, match="noise multiplier must be 0"):
            poisson_gaussian(noise, 0.1, 1)

    @pytest.mark.parametrize("steps", [float("nan"), float("inf"), 0, 1.5])
    def test_steps_are_whole(self, steps):
        with pytest.raises(InputError, match="at least 1 step"):
            poisson_gaussian(1, 0.1, steps)

    def test_at_a_jump_the_result_is_the_next_number_of_six_digits(self, monkeypatch):
        # Epsilon is infinite up to the noise 1.23456 and next to nothing beyond: less than 1.23457 is too little.
        def jumping(event: dp_accounting.DpEvent, *arguments: object, **settings: object) -> float:
            return math.inf if event.noise_multiplier <= 1.23456 else 0.1

        monkeypatch.setattr(calibration, "epsilon", jumping)
        for accountant in ("pld", "rdp"):
            arguments = (dp_accounting.GaussianDpEvent(1.0), 1.0, 1e-5, ADD, accountant)
            assert calibration._calibrate.__wrapped__(*arguments) == 1.23457

    def test_the_result_is_a_noise_that_was_accounted_for(self, monkeypatch):
        # Not one that was rounded up once more, by way of its logarithm.
        confirmed = set()
        true_epsilon = accounting.epsilon

        def noted(event: dp_accounting.DpEvent, *arguments: object, **settings: object) -> float:
            spent = true_epsilon(event, *arguments, **settings)
            if spent <= 2.0:
                confirmed.add(event.noise_multiplier)
            return spent

        monkeypatch.setattr(calibration, "epsilon", noted)
        for delta in (1e-4, 1e-5, 1e-6, 1e-7):
            arguments = (dp_accounting.GaussianDpEvent(1.0), 2.0, delta, ADD, "pld")
            noise = calibration._calibrate.__wrapped__(*arguments)
            assert noise in confirmed
            assert noise == rounded_up(noise, 6)

    def test_rdp_is_silent(self, capfd):
        noise_multiplier(1, 1e-5, sampling_rate=0.1, steps=1, accountant="rdp")
        assert capfd.readouterr().err == ""


GAUSSIAN = dp_accounting.GaussianDpEvent(1.0)
REPEATED = dp_accounting.SelfComposedDpEvent
EVENTS = [
    (REPEATED(dp_accounting.SampledWithoutReplacementDpEvent(3383, 120, GAUSSIAN), 100), REPLACE),
    (REPEATED(dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 0.1, 110, 1.0), 20), ADD),
    (REPEATED(RevealedPoissonSampledDpEvent(0.1, GAUSSIAN), 50), ZERO),
    (REPEATED(RevealedPoissonSampledDpEvent(0.2, dp_accounting.LaplaceDpEvent(1.0)), 5), REPLACE),
    (BallsInBinsDpEvent(5, 3, GAUSSIAN), ADD),
    (REPEATED(SkellamDpEvent(1000.0, 300.0, 9000.0), 5), ZERO),
    (dp_accounting.SingleEpochTreeAggregationDpEvent(1.0, [10, 20]), ZERO),
    (dp_accounting.ComposedDpEvent([REPEATED(dp_accounting.PoissonSampledDpEvent(0.1, GAUSSIAN), 9), GAUSSIAN]), ADD),
]


class TestAnyMechanism:
    @pytest.mark.parametrize(("event", "relation"), EVENTS)
    def test_target_is_met_from_below_within_a_thousandth(self, event, relation):
        factor = noise_for(event, 2, 1e-5, relation=relation)
        assert factor == rounded_up(factor, 6)
        assert 0.999 * 2 <= epsilon(with_noise(event, factor), 1e-5, relation=relation) <= 2

    def test_noise_multiplier_is_that_of_poisson_samples(self):
        settings = {"relation": REPLACE, "accountant": "rdp"}
        expected = noise_for(poisson_gaussian(1, 0.2, 10), 1.5, 1e-5, **settings)
        assert noise_multiplier(1.5, 1e-5, sampling_rate=0.2, steps=10, **settings) == expected

    @pytest.mark.parametrize(
        "event",
        [
            REPEATED(dp_accounting.SampledWithoutReplacementDpEvent(1000, 1, GAUSSIAN), 5),
            dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 0.001, 5, 1.0),
            RevealedPoissonSampledDpEvent(0.001, GAUSSIAN),
            dp_accounting.ComposedDpEvent(
                [RevealedPoissonSampledDpEvent(0.001, GAUSSIAN), dp_accounting.NoOpDpEvent()]
            ),
        ],
    )
    def test_a_delta_that_needs_no_noise(self, event):
        with pytest.raises(InputError, match=r"so that no noise would be needed and nobody would be protected; .*\.$"):
            noise_for(event, 1, 0.01, relation=REPLACE)

    @pytest.mark.parametrize(
        ("event", "message"),
        [
            (dp_accounting.NonPrivateDpEvent(), "cannot be met with any noise multiplier"),
            (dp_accounting.ZCDpEvent(0.0, 1e-9), "hardly any noise is needed"),  # with_noise has nothing to scale
            (dp_accounting.UnsupportedDpEvent(), "no accountant has an analysis"),
        ],
    )
    def test_what_noise_cannot_change_ends_with_a_sentence(self, event, message):
        with pytest.raises(InputError, match=message):
            noise_for(event, 1, 1e-5)


class TestLargestCount:
    def test_is_the_last_number_of_rounds_within_the_target(self):
        found = largest_count(lambda rounds: poisson_gaussian(1.2, 0.05, rounds), 2, 1e-5, largest=10_000)
        spent = [epsilon(poisson_gaussian(1.2, 0.05, rounds), 1e-5) for rounds in (found, found + 1)]
        assert spent[0] <= 2 < spent[1]

    def test_is_the_last_cohort_within_the_target(self):
        found = largest_count(
            lambda cohort: poisson_gaussian(5, cohort / 1000, 100), 2, 1e-5, largest=1000, relation=REPLACE
        )
        spent = [epsilon(poisson_gaussian(5, n / 1000, 100), 1e-5, relation=REPLACE) for n in (found, found + 1)]
        assert spent[0] <= 2 < spent[1]

    @pytest.mark.parametrize("last", [5, 6, 7, 11, 99, 100])
    def test_every_answer_is_found(self, last, monkeypatch):
        # Epsilon is the number itself, and a little more on a coarse grid.
        def counting(event: float, delta: float, *, pld_interval: float, **settings: object) -> float:
            return event + (1.5 if pld_interval > accounting.PLD_INTERVAL else 0)

        monkeypatch.setattr(calibration, "epsilon", counting)
        assert largest_count(float, last, 1e-5, smallest=5, largest=100) == last

    @pytest.mark.parametrize("accountant", ["pld", "rdp"])
    def test_all_of_them_may_fit(self, accountant):
        rounds = largest_count(
            lambda rounds: poisson_gaussian(50, 0.01, rounds), 8, 1e-5, largest=37, accountant=accountant
        )
        assert rounds == 37

    def test_not_even_the_smallest_fits(self):
        with pytest.raises(
            InputError,
            match=r"^even the smallest number, 3 \(.*\), costs epsilon 8\.386 at delta 1e-05, more than 1; .*\.$",
        ):
            largest_count(lambda rounds: poisson_gaussian(1, 1, rounds), 1, 1e-5, smallest=3, largest=9)

    def test_an_empty_range(self):
        with pytest.raises(InputError, match="must not be below the smallest"):
            largest_count(lambda rounds: poisson_gaussian(1, 1, rounds), 1, 1e-5, smallest=3, largest=2)

    @pytest.mark.parametrize(("target", "delta"), [(0, 1e-5), (1, 0), (math.nan, 1e-5)])
    def test_impossible_targets(self, target, delta):
        with pytest.raises(InputError):
            largest_count(lambda rounds: poisson_gaussian(1, 1, rounds), target, delta, largest=2)
