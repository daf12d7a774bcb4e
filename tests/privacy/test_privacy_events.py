"""Privacy events: their noise can be scaled, and they survive JSON."""

import json
import math

import attr
import dp_accounting
import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    RandomizedResponseDpEvent,
    SampledWithoutReplacementDpEvent,
    SampledWithReplacementDpEvent,
    SelfComposedDpEvent,
    SingleEpochTreeAggregationDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    UnsupportedDpEvent,
    ZCDpEvent,
)
from dp_accounting.dp_event import DiscreteLaplaceDpEvent, MixtureOfGaussiansDpEvent, RepeatAndSelectDpEvent

from dpfl.errors import InputError
from dpfl.privacy import accounting, events
from dpfl.privacy.events import (
    BallsInBinsDpEvent,
    DiscreteGaussianSumDpEvent,
    RevealedPoissonSampledDpEvent,
    SkellamDpEvent,
    as_dict,
    from_dict,
    with_noise,
)

GAUSSIAN = GaussianDpEvent(1.5)
# One of every kind, with the same kind at twice the noise.
WITH_NOISE = {
    "gaussian": (GAUSSIAN, GaussianDpEvent(3.0)),
    "laplace": (LaplaceDpEvent(0.25), LaplaceDpEvent(0.5)),
    "poisson": (PoissonSampledDpEvent(0.1, GAUSSIAN), PoissonSampledDpEvent(0.1, GaussianDpEvent(3.0))),
    "revealed": (
        RevealedPoissonSampledDpEvent(0.1, GAUSSIAN),
        RevealedPoissonSampledDpEvent(0.1, GaussianDpEvent(3.0)),
    ),
    "without replacement": (
        SampledWithoutReplacementDpEvent(60, 20, GAUSSIAN),
        SampledWithoutReplacementDpEvent(60, 20, GaussianDpEvent(3.0)),
    ),
    "with replacement": (
        SampledWithReplacementDpEvent(60, 20, GAUSSIAN),
        SampledWithReplacementDpEvent(60, 20, GaussianDpEvent(3.0)),
    ),
    "balls in bins": (BallsInBinsDpEvent(3, 2, GAUSSIAN), BallsInBinsDpEvent(3, 2, GaussianDpEvent(3.0))),
    "truncated": (
        TruncatedSubsampledGaussianDpEvent(60, 0.3, 25, 1.5),
        TruncatedSubsampledGaussianDpEvent(60, 0.3, 25, 3.0),
    ),
    "mixture": (
        MixtureOfGaussiansDpEvent(1.5, (0.0, 1.0), (0.9, 0.1)),
        MixtureOfGaussiansDpEvent(3.0, (0.0, 1.0), (0.9, 0.1)),
    ),
    "best of several": (
        RepeatAndSelectDpEvent(SelfComposedDpEvent(GAUSSIAN, 7), 10.0, 1.0),
        RepeatAndSelectDpEvent(SelfComposedDpEvent(GaussianDpEvent(3.0), 7), 10.0, 1.0),
    ),
    "tree": (SingleEpochTreeAggregationDpEvent(1.5, 100), SingleEpochTreeAggregationDpEvent(3.0, 100)),
    "trees": (SingleEpochTreeAggregationDpEvent(1.5, (100, 7)), SingleEpochTreeAggregationDpEvent(3.0, (100, 7))),
    "skellam": (SkellamDpEvent(5.0, 2.0, 9.0), SkellamDpEvent(10.0, 2.0, 9.0)),
    "discrete gaussian": (
        DiscreteGaussianSumDpEvent(5.0, 30, 100, 2.0),
        DiscreteGaussianSumDpEvent(10.0, 30, 100, 2.0),
    ),
    "repeated": (SelfComposedDpEvent(GAUSSIAN, 7), SelfComposedDpEvent(GaussianDpEvent(3.0), 7)),
    "composed": (
        ComposedDpEvent((GAUSSIAN, LaplaceDpEvent(0.25))),
        ComposedDpEvent((GaussianDpEvent(3.0), LaplaceDpEvent(0.5))),
    ),
    "nested": (
        ComposedDpEvent(
            (
                SelfComposedDpEvent(PoissonSampledDpEvent(0.1, ComposedDpEvent((GAUSSIAN, GaussianDpEvent(8.0)))), 3),
                SelfComposedDpEvent(BallsInBinsDpEvent(3, 1, GAUSSIAN), 1),
                ComposedDpEvent((SkellamDpEvent(5.0, 2.0, 9.0),)),
            )
        ),
        ComposedDpEvent(
            (
                SelfComposedDpEvent(
                    PoissonSampledDpEvent(0.1, ComposedDpEvent((GaussianDpEvent(3.0), GaussianDpEvent(16.0)))), 3
                ),
                SelfComposedDpEvent(BallsInBinsDpEvent(3, 1, GaussianDpEvent(3.0)), 1),
                ComposedDpEvent((SkellamDpEvent(10.0, 2.0, 9.0),)),
            )
        ),
    ),
}
WITHOUT_NOISE = {
    "nothing": NoOpDpEvent(),
    "everything": NonPrivateDpEvent(),
    "unsupported": UnsupportedDpEvent(),
    "composed of nothing": ComposedDpEvent(()),
    "repeated nothing": SelfComposedDpEvent(NoOpDpEvent(), 3),
}
EVERY_EVENT = {
    **{name: event for name, (event, _) in WITH_NOISE.items()},
    **WITHOUT_NOISE,
    "randomized response": RandomizedResponseDpEvent(0.1, 4),
    "discrete laplace": DiscreteLaplaceDpEvent(0.5, 1),
    "zero-concentrated": ZCDpEvent(0.5, 0.1),
}
every_event = pytest.mark.parametrize("event", EVERY_EVENT.values(), ids=EVERY_EVENT.keys())


def refusal(values: object) -> str:
    with pytest.raises(InputError) as caught:
        from_dict(values)
    message = str(caught.value)
    assert message.endswith(".")
    assert ". " not in message
    return message


class TestWithNoise:
    @pytest.mark.parametrize(("event", "doubled"), WITH_NOISE.values(), ids=WITH_NOISE.keys())
    def test_scales_all_noise_and_nothing_else(self, event, doubled):
        before = repr(event)
        assert with_noise(event, 2) == doubled
        assert with_noise(doubled, 0.5) == event
        assert repr(event) == before

    @pytest.mark.parametrize("event", WITHOUT_NOISE.values(), ids=WITHOUT_NOISE.keys())
    def test_leaves_what_has_no_noise(self, event):
        assert with_noise(event, 2) == event

    @every_event
    def test_by_one_changes_nothing(self, event):
        assert with_noise(event, 1) == event

    def test_twice_is_with_the_product(self):
        event = EVERY_EVENT["nested"]
        assert with_noise(with_noise(event, 2), 4) == with_noise(event, 8)

    def test_can_be_accounted_for(self):
        event = SelfComposedDpEvent(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)), 10)
        spent = [accounting.epsilon(with_noise(event, factor), 1e-5) for factor in (1, 2, 4)]
        assert spent == sorted(spent, reverse=True)
        assert spent[1] == accounting.epsilon(
            SelfComposedDpEvent(PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), 10), 1e-5
        )

    def test_events_with_noise_can_be_hashed(self):
        # The ledger remembers what each event costs.
        assert len({event for event, _ in WITH_NOISE.values()}) == len(WITH_NOISE)
        assert hash(with_noise(EVERY_EVENT["nested"], 2)) == hash(WITH_NOISE["nested"][1])


class TestAsPlainValues:
    @every_event
    def test_survive_json(self, event):
        text = json.dumps(as_dict(event), allow_nan=False)
        again = from_dict(json.loads(text))
        assert again == event
        assert type(again) is type(event)
        assert json.dumps(as_dict(again)) == text

    @every_event
    def test_name_their_kind_and_every_field(self, event):
        values = as_dict(event)
        assert values["event"] == type(event).__name__
        fields = {field.name for field in attr.fields(type(event))}
        assert set(values) - {"event", "of"} == fields - {"event"}
        assert ("of" in values) == ("event" in fields)

    def test_read_like_words(self):
        event = SelfComposedDpEvent(PoissonSampledDpEvent(0.1, GAUSSIAN), 7)
        assert as_dict(event) == {
            "event": "SelfComposedDpEvent",
            "count": 7,
            "of": {
                "event": "PoissonSampledDpEvent",
                "sampling_probability": 0.1,
                "of": {"event": "GaussianDpEvent", "noise_multiplier": 1.5},
            },
        }

    def test_keep_every_digit(self):
        event = GaussianDpEvent(math.pi * 1e-7)
        assert from_dict(json.loads(json.dumps(as_dict(event)))).noise_multiplier == math.pi * 1e-7

    def test_are_a_copy(self):
        event = ComposedDpEvent((GAUSSIAN, GAUSSIAN))
        values = as_dict(event)
        values["events"].pop()
        assert len(event.events) == 2

    def test_every_kind_of_this_package_is_tested(self):
        own = {
            kind
            for kind in vars(events).values()
            if isinstance(kind, type) and issubclass(kind, dp_accounting.DpEvent) and kind.__module__ == events.__name__
        }
        assert own
        assert own <= {type(event) for event in EVERY_EVENT.values()}

    def test_every_kind_of_dp_accounting_is_tested(self):
        theirs = {
            kind
            for kind in vars(dp_accounting.dp_event).values()
            if isinstance(kind, type) and issubclass(kind, dp_accounting.DpEvent) and kind is not dp_accounting.DpEvent
        }
        assert theirs <= {type(event) for event in EVERY_EVENT.values()}


class TestRefusals:
    @pytest.mark.parametrize(
        "name", ["gaussian", "", None, 3, "DpEvent", "InputError", "Any", "with_noise", "RdpAccountant", "__doc__"]
    )
    def test_an_unknown_kind(self, name):
        assert refusal({"event": name}) == (
            f"there is no privacy event {name!r}: take it from the JSON of a guarantee."
        )

    def test_no_kind(self):
        assert refusal({"noise_multiplier": 1.0}).startswith("there is no privacy event None")

    def test_an_unknown_kind_inside(self):
        values = as_dict(SelfComposedDpEvent(GAUSSIAN, 7))
        values["of"]["event"] = "NormalDpEvent"
        assert refusal(values).startswith("there is no privacy event 'NormalDpEvent'")

    @pytest.mark.parametrize("values", [{}, {"noise": 1.0}, {"noise_multiplier": 1.0, "rounds": 3}])
    def test_other_fields(self, values):
        assert refusal({"event": "GaussianDpEvent", **values}).startswith(
            "the privacy event GaussianDpEvent does not have the fields"
        )
