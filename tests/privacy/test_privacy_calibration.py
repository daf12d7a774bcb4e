"""From epsilon to noise: the target is met, from below, and closely."""

import decimal
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_accountants import analytic_gaussian_epsilon, fourier_epsilon

from dpfl.errors import InputError
from dpfl.privacy import calibration, epsilon, noise_multiplier, poisson_gaussian

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

    def test_replace_one_by_rdp(self):
        message = refusal(1, 1e-5, relation=REPLACE, accountant="rdp")
        assert message.startswith("the RDP accountant has no correct analysis")

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

    def test_rdp_is_silent(self, capfd):
        noise_multiplier(1, 1e-5, sampling_rate=0.1, steps=1, accountant="rdp")
        assert capfd.readouterr().err == ""
