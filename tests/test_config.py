"""Settings are validated, immutable, and refused in one sentence."""

import pickle
import re

import pydantic
import pytest

from dpfl.clients import ClientTraining
from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.mechanisms import Gaussian, Mechanism, NoMechanism
from dpfl.privacy import Privacy
from dpfl.sampling import Poisson


class Inner(Config):
    size: int = pydantic.Field(default=3, gt=0)
    rate: float = 0.5


class Outer(Config):
    title: str = "plain"
    count: int
    inner: Inner = Inner()
    mechanism: Mechanism = pydantic.Field(default=Gaussian(clip_norm=1.0), discriminator="name")

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Outer":
        if self.count == 13:
            raise InputError("the count 13 brings bad luck: choose another one.")
        return self


def refusal(make: object, **settings: object) -> str:
    """The one sentence with which the settings are refused."""
    with pytest.raises(InputError) as caught:
        make(**settings)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+[.?]", message), message
    assert not re.search(r"[.?] ", message), message
    assert "pydantic" not in message
    assert "validation error" not in message
    return message


class TestUnknownFields:
    @pytest.mark.parametrize(
        ("make", "wrong", "near"),
        [(Inner, "sise", "size"), (Inner, "rates", "rate"), (Inner, "Rate", "rate"), (Privacy, "epsilom", "epsilon")],
    )
    def test_the_nearest_name_is_offered(self, make, wrong, near):
        settings = {"epsilon": 1} if make is Privacy else {}
        message = refusal(make, **settings, **{wrong: 1})
        assert message == f"'{wrong}' is not a setting of {make.__name__}: did you mean '{near}'?"

    def test_without_a_near_one_all_are_named(self):
        assert refusal(Inner, colour=1) == "'colour' is not a setting of Inner: known are size, rate."

    @pytest.mark.parametrize(
        ("make", "wrong", "near"),
        [(Poisson, "cohrt", "cohort"), (Gaussian, "clipnorm", "clip_norm"), (Privacy, "epsilom", "epsilon")],
    )
    def test_the_nearest_name_is_offered_for_a_required_field(self, make, wrong, near):
        assert f"did you mean '{near}'?" in refusal(make, **{wrong: 1})

    def test_in_a_nested_group_the_group_is_named(self):
        message = refusal(Outer, count=1, inner={"sise": 4})
        assert message == "'sise' is not a setting of Inner: did you mean 'size'?"


class TestWrongValues:
    @pytest.mark.parametrize(
        ("make", "settings", "message"),
        [
            (Poisson, {}, "Poisson lacks 'cohort': give it a value."),
            (Poisson, {"cohort": 0}, "cohort should be greater than 0, but it was 0."),
            (Poisson, {"cohort": None}, "cohort should be a valid integer, but it was None."),
            (Inner, {"rate": [1]}, "rate should be a valid number, but it was [1]."),
            (Outer, {"count": 1, "title": 5}, "title should be a valid string, but it was 5."),
            (Privacy, {"epsilon": {}}, "epsilon should be a valid number, but it was {}."),
            (Outer, {"count": 13}, "the count 13 brings bad luck: choose another one."),
        ],
    )
    def test_each_kind_of_complaint(self, make, settings, message):
        assert refusal(make, **settings) == message

    @pytest.mark.parametrize(
        ("make", "settings", "field", "value"),
        [
            (Poisson, {"cohort": "many"}, "cohort", "'many'"),
            (Poisson, {"cohort": 2.5}, "cohort", "2.5"),
            (Gaussian, {"clip_norm": "small"}, "clip_norm", "'small'"),
            (Gaussian, {"clip_norm": None}, "clip_norm", "None"),
            (ClientTraining, {"epochs": "all"}, "epochs", "'all'"),
            (ClientTraining, {"epochs": 1, "batch_size": 0}, "batch_size", "0"),
            (ClientTraining, {"epochs": -1}, "epochs", "-1"),
            (ClientTraining, {"epochs": 1, "learning_rate": "fast"}, "learning_rate", "'fast'"),
            (Privacy, {"epsilon": "four"}, "epsilon", "'four'"),
            (Privacy, {"epsilon": 4, "delta": "tiny"}, "delta", "'tiny'"),
            (Privacy, {"epsilon": 4, "unit": "group"}, "unit", "'group'"),
            (Privacy, {"epsilon": 4, "allow_weak_delta": "maybe"}, "allow_weak_delta", "'maybe'"),
            (Outer, {"count": 1, "inner": 3}, "inner", "3"),
            (Outer, {"count": 1, "mechanism": {"name": "gauss"}}, "mechanism", "{'name': 'gauss'}"),
        ],
    )
    def test_field_and_value_are_named(self, make, settings, field, value):
        message = refusal(make, **settings)
        assert message.startswith(f"{field} ")
        assert message.endswith(f"but it was {value}.")

    def test_the_first_of_several_is_named(self):
        assert refusal(Inner, size="x", rate="y").startswith("size ")

    def test_a_nested_groups_own_sentence_is_kept(self):
        message = refusal(Outer, count=1, mechanism={"name": "gaussian", "clip_norm": -1})
        assert message.startswith("the clip norm must be a positive number between")

    def test_local_training_needs_exactly_one_of_epochs_and_steps(self):
        for settings in ({}, {"epochs": 1, "steps": 1}):
            assert refusal(ClientTraining, **settings).startswith("local training needs either epochs or steps")
        assert ClientTraining(steps=3).epochs is None

    @pytest.mark.parametrize("rate", [0, -0.1, float("nan"), float("inf")])
    def test_learning_rates_are_positive_and_finite(self, rate):
        assert refusal(ClientTraining, epochs=1, learning_rate=rate).startswith("the clients' learning rate must be")


class TestNesting:
    def test_groups_can_be_given_as_plain_values(self):
        made = Outer(count=1, inner={"size": 5}, mechanism={"name": "none"})
        assert made.inner == Inner(size=5)
        assert made.mechanism == NoMechanism()

    def test_plain_values_come_back(self):
        made = Outer(count=2, inner=Inner(rate=0.1), mechanism=Gaussian(clip_norm=3))
        assert Outer(**made.model_dump()) == made


class TestReplace:
    def test_changes_one_field_of_a_copy(self):
        before = Outer(count=1)
        after = before.replace(count=2)
        assert (before.count, after.count) == (1, 2)
        assert after.inner == before.inner

    def test_nothing_makes_an_equal_copy(self):
        assert Outer(count=1).replace() == Outer(count=1)

    def test_reaches_into_nested_groups(self):
        after = Outer(count=1).replace(**{"inner.size": 9, "inner.rate": 0.25, "mechanism.clip_norm": 2, "count": 4})
        assert (after.inner, after.mechanism, after.count) == (Inner(size=9, rate=0.25), Gaussian(clip_norm=2), 4)

    def test_a_group_and_a_field_of_it(self):
        for settings in (
            {"inner": Inner(size=7), "inner.rate": 0.1},
            {"inner.rate": 0.1, "inner": Inner(size=7)},
        ):
            assert Outer(count=1).replace(**settings).inner == Inner(size=7, rate=0.1)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"cuont": 3}, "'cuont' is not a setting of Outer: did you mean 'count'?"),
            ({"iner.size": 3}, "'iner.size' is not a setting of Outer: did you mean 'inner'?"),
            ({"inner.sise": 3}, "'sise' is not a setting of Inner: did you mean 'size'?"),
            ({"count.more": 3}, "'count.more' is not a setting: 'count' has no settings of its own."),
            ({"count": 13}, "the count 13 brings bad luck: choose another one."),
            ({"inner.size": 0}, "size should be greater than 0, but it was 0."),
            ({"inner": None}, "inner should be a valid dictionary or instance of Inner, but it was None."),
        ],
    )
    def test_is_checked_again(self, settings, message):
        assert refusal(Outer(count=1).replace, **settings) == message

    def test_a_refused_change_changes_nothing(self):
        made = Outer(count=1)
        refusal(made.replace, **{"inner.size": 0})
        assert made == Outer(count=1)

    def test_swaps_mechanisms(self):
        assert Outer(count=1).replace(mechanism=NoMechanism()).mechanism == NoMechanism()
        assert Outer(count=1).replace(mechanism={"name": "none"}).mechanism == NoMechanism()


class TestImmutability:
    @pytest.mark.parametrize(
        ("made", "field"),
        [
            (Poisson(cohort=3), "cohort"),
            (Gaussian(clip_norm=1), "clip_norm"),
            (Privacy(epsilon=1), "epsilon"),
            (ClientTraining(epochs=1), "epochs"),
            (Outer(count=1), "inner"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_nothing_can_be_set_or_deleted(self, made, field):
        before = getattr(made, field)
        with pytest.raises(ValueError, match="frozen"):
            setattr(made, field, 2)
        with pytest.raises(ValueError, match="frozen"):
            delattr(made, field)
        with pytest.raises((ValueError, AttributeError)):
            made.something_new = 2
        assert getattr(made, field) == before

    def test_equality_and_hash_are_by_value(self):
        assert Outer(count=1) == Outer(count=1) != Outer(count=2)
        assert hash(Outer(count=1)) == hash(Outer(count=1))
        assert len({Gaussian(clip_norm=1), Gaussian(clip_norm=1.0), Gaussian(clip_norm=2)}) == 2

    def test_pickles(self):
        made = Outer(count=3, inner=Inner(size=8), mechanism=NoMechanism())
        assert pickle.loads(pickle.dumps(made)) == made
