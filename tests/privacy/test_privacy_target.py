"""The target that a user asks for."""

import math

import pytest

from dpfl.errors import InputError
from dpfl.privacy import Privacy
from dpfl.privacy.target import check_weak_delta


def refusal(**settings: object) -> str:
    with pytest.raises(InputError) as caught:
        Privacy(**settings)
    message = str(caught.value)
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message
    return message


class TestPrivacy:
    def test_defaults_are_the_strict_ones(self):
        target = Privacy(epsilon=4)
        assert (target.unit, target.relation, target.accountant) == ("user", "add_or_remove_one", "pld")
        assert target.delta == 1e-5
        assert not target.allow_weak_delta

    def test_no_noise_must_be_asked_for(self):
        assert refusal() == "Privacy lacks 'epsilon': give it a value."
        assert Privacy(epsilon=None).epsilon is None

    @pytest.mark.parametrize("epsilon", [0, -1, math.nan, math.inf, -math.inf])
    def test_epsilon_is_positive_and_finite(self, epsilon):
        assert refusal(epsilon=epsilon).startswith("epsilon must be a positive number")

    @pytest.mark.parametrize("delta", [0, 1, -1e-5, 1.5, math.nan, math.inf])
    def test_delta_lies_between_zero_and_one(self, delta):
        assert refusal(epsilon=1, delta=delta).startswith("delta must lie between 0 and 1")

    def test_delta_is_checked_without_an_epsilon_too(self):
        assert refusal(epsilon=None, delta=2).startswith("delta must lie between 0 and 1")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("relation", "substitute"),
            ("accountant", "PLD"),
            ("accountant", "prv"),
            ("unit", "group"),
        ],
    )
    def test_words_are_known_ones(self, field, value):
        message = refusal(epsilon=1, **{field: value})
        assert message.startswith(f"{field} should be")
        assert message.endswith(f"but it was '{value}'.")

    @pytest.mark.parametrize("change", [{"relation": "remove_one"}, {"accountant": "gdp"}, {"epsilon": -1}])
    def test_a_changed_copy_is_checked_again(self, change):
        with pytest.raises(InputError):
            Privacy(epsilon=1, accountant="rdp").replace(**change)


class TestWeakDelta:
    @pytest.mark.parametrize("delta", [0.01, 0.0100001, 0.5])
    def test_is_refused(self, delta):
        with pytest.raises(InputError, match=r"no privacy for 100 clients: choose a delta below .* 0\.01"):
            check_weak_delta(delta, 100, allowed=False)

    def test_is_allowed_knowingly(self):
        check_weak_delta(0.5, 100, allowed=True)

    def test_is_refused_for_examples_in_their_own_words(self):
        with pytest.raises(
            InputError, match=r"no privacy for 1000 examples: choose a delta below 1 / examples = 0\.001"
        ):
            check_weak_delta(0.001, 1000, allowed=False, units="examples")

    def test_below_one_in_the_population_is_fine(self):
        check_weak_delta(0.00999, 100, allowed=False)
