"""The statement says no less than what holds."""

import dataclasses
import decimal
import json
import math
import re

import dp_accounting
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl.errors import InputError
from dpfl.privacy import Guarantee, epsilon, events, poisson_gaussian
from dpfl.privacy.relations import RELATION_IN_WORDS, UNIT_IN_WORDS
from dpfl.privacy.rounding import rounded_up

MANY = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def guarantee(**changes: object) -> Guarantee:
    values = {
        "unit": "user",
        "relation": "add_or_remove_one",
        "epsilon": 1.70749,
        "delta": 1e-5,
        "mechanism": "the Gaussian mechanism with noise multiplier 1.2",
        "sampler": "on a Poisson sample of the 3383 clients at rate 0.0354715",
        "steps": 100,
        "accountant": "pld",
        "accounted_by": "PLD (dpfl 0.1.0)",
        "released": "the models after all rounds",
        "assumptions": ("The server is trusted.", "Accuracies are not covered."),
        "event": events.as_dict(poisson_gaussian(1.2, 120 / 3383, 100)),
    }
    return Guarantee(**{**values, **changes})


def stated(text: str) -> tuple[float, float]:
    """The epsilon and the delta of a statement."""
    epsilon, delta = re.match(r"\(([^,]+), ([^)]+)\)-differential privacy", text).groups()
    return float(epsilon), float(delta)


class TestRoundedUp:
    @MANY
    @given(st.floats(1e-12, 1e12), st.integers(1, 12))
    def test_is_never_below_and_at_most_one_unit_above(self, value, digits):
        result = rounded_up(value, digits)
        assert value <= result
        unit = decimal.Decimal(1).scaleb(decimal.Decimal(value).adjusted() - digits + 1)
        assert decimal.Decimal(result) - decimal.Decimal(value) <= unit * decimal.Decimal("1.001")

    @pytest.mark.parametrize(
        ("value", "digits", "result"),
        [
            (1.70741, 4, 1.708),
            (9.9999, 4, 10.0),
            (4, 4, 4),
            (0.5, 1, 0.5),
            (123456.1, 4, 123500),
            (1e-7 / 3, 2, 3.4e-8),
        ],
    )
    def test_examples(self, value, digits, result):
        assert rounded_up(value, digits) == result

    @pytest.mark.parametrize("value", [1.1, 0.1, 2.7])
    def test_a_number_of_so_many_digits_stays(self, value):
        assert rounded_up(value, 4) == value


class TestStatement:
    @MANY
    @given(st.floats(1e-6, 1e4))
    def test_epsilon_is_rounded_up_to_four_digits(self, epsilon):
        said, _ = stated(guarantee(epsilon=epsilon).statement())
        assert epsilon <= said <= epsilon * 1.0011

    def test_epsilon_as_a_reader_sees_it(self):
        assert guarantee(epsilon=1.70741).statement().startswith("(1.708, 1e-05)-differential privacy at user level")

    @pytest.mark.parametrize("delta", [1 / 3384, 1 / 1797, 1.234564e-5])
    def test_delta_is_never_understated(self, delta):
        assert stated(guarantee(delta=delta).statement())[1] >= delta

    @pytest.mark.parametrize("delta", [1e-5, 1e-3, 2.5e-8, 0.01])
    def test_delta(self, delta):
        assert stated(guarantee(delta=delta).statement())[1] == delta

    @pytest.mark.parametrize("relation", RELATION_IN_WORDS)
    @pytest.mark.parametrize("unit", UNIT_IN_WORDS)
    def test_names_unit_and_relation_in_words(self, unit, relation):
        text = guarantee(unit=unit, relation=relation).statement()
        assert f"at {unit} level" in text
        change = RELATION_IN_WORDS[relation].format(data="the training data")
        assert f"when {UNIT_IN_WORDS[unit]} {change} (relation {relation})" in text

    def test_relations_are_told_apart(self):
        assert len(set(RELATION_IN_WORDS.values())) == len(RELATION_IN_WORDS) == 3

    def test_names_everything_that_a_reviewer_needs(self):
        made = guarantee()
        text = made.statement()
        for part in (made.mechanism, made.sampler, made.accounted_by, made.released, *made.assumptions):
            assert part in text

    @pytest.mark.parametrize(
        ("unit", "steps", "words"),
        [
            ("user", 100, "in each of 100 rounds,"),
            ("user", 1, "in each of 1 round,"),
            ("example", 2, "in each of 2 steps,"),
            ("example", 1, "in each of 1 step,"),
        ],
    )
    def test_counts_what_is_released(self, unit, steps, words):
        assert words in guarantee(unit=unit, steps=steps).statement()

    def test_without_noise_there_is_no_differential_privacy(self):
        text = guarantee(epsilon=math.inf).statement()
        assert text.startswith("No differential privacy")
        assert "inf" not in text
        assert "(" not in text.split(":")[0]

    def test_is_one_paragraph_of_sentences(self):
        for made in (guarantee(), guarantee(epsilon=math.inf)):
            text = made.statement()
            assert "\n" not in text
            assert "  " not in text
            assert text.endswith(".")


class TestAsDict:
    def test_is_strict_json_and_comes_back(self):
        made = guarantee()
        values = json.loads(json.dumps(made.as_dict(), allow_nan=False))
        assert Guarantee(**{**values, "assumptions": tuple(values["assumptions"])}) == made

    def test_infinity_becomes_none(self):
        values = guarantee(epsilon=math.inf).as_dict()
        assert values["epsilon"] is None
        json.dumps(values, allow_nan=False)

    def test_has_every_field(self):
        assert set(guarantee().as_dict()) == {field.name for field in dataclasses.fields(Guarantee)}

    def test_epsilon_is_not_rounded(self):
        assert guarantee(epsilon=1.7074713239701205).as_dict()["epsilon"] == 1.7074713239701205


class TestCheckedFromTheRecord:
    def test_json_comes_back(self):
        for made in (guarantee(), guarantee(epsilon=math.inf)):
            assert Guarantee.from_json(made.to_json()) == made

    def test_epsilon_is_computed_anew_from_the_event(self):
        found = Guarantee.from_json(guarantee(epsilon=0.1).to_json()).recomputed_epsilon()
        assert found == pytest.approx(1.7075, abs=1e-3)

    @pytest.mark.parametrize(("relation", "accountant"), [("replace_one", "pld"), ("add_or_remove_one", "rdp")])
    def test_it_follows_relation_and_accountant(self, relation, accountant):
        found = guarantee(relation=relation, accountant=accountant).recomputed_epsilon()
        event = poisson_gaussian(1.2, 120 / 3383, 100)
        assert found == epsilon(event, 1e-5, relation=relation, accountant=accountant) > 1.75

    def test_without_noise_it_is_infinite(self):
        event = events.as_dict(dp_accounting.NonPrivateDpEvent())
        assert guarantee(accountant="none", event=event).recomputed_epsilon() == math.inf

    def test_both_accountants_answer_on_request(self):
        found = guarantee().epsilon_by_accountant()
        assert set(found) == {"pld", "rdp"}
        assert 1.70 < found["pld"] < found["rdp"] < 2.1

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"epsilon": 1}', "no JSON"])
    def test_what_is_none_is_refused_in_a_sentence(self, text):
        with pytest.raises(InputError, match=r"^[^.\n]*guarantee: give what Guarantee\.\w+ (wrote|gave)\.$"):
            Guarantee.from_json(text)

    def test_fields_that_are_not_there_are_refused(self):
        with pytest.raises(InputError, match="not the fields of a guarantee"):
            Guarantee.from_dict({**guarantee().as_dict(), "epsilom": 1})


def test_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        guarantee().epsilon = 0.1
