"""Events that dp-accounting 0.6 lacks, and events as plain values.

A `dp_accounting.DpEvent` describes what is released; accountants turn it into epsilon. The noise multipliers of
Gaussian and Laplace events are relative to the contribution of one unit (the clip norm): accountants
double the sensitivity where the relation replaces a unit.
"""

from __future__ import annotations

from typing import Any

import attr
import dp_accounting
from dp_accounting import dp_event

from dpfl.errors import InputError


@attr.s(frozen=True, slots=True, auto_attribs=True)
class BallsInBinsDpEvent(dp_accounting.DpEvent):
    """Each unit falls into one of `bins` releases at random; `releases` of them are made.

    Attributes:
        bins: the number of equally likely bins.
        releases: how many bins are summed and released, each with fresh noise; from 1 to `bins`.
        event: of one release, a `GaussianDpEvent`.
    """

    bins: int
    releases: int
    event: dp_accounting.DpEvent


@attr.s(frozen=True, slots=True, auto_attribs=True)
class RevealedPoissonSampledDpEvent(dp_accounting.DpEvent):
    """A Poisson sample of which everybody learns who is in it: there is no amplification.

    Units that are not drawn lose nothing, so that over many steps a unit pays for about as many as it is drawn.

    Attributes:
        sampling_probability: with which a unit is drawn.
        event: what is released of a unit that is drawn.
    """

    sampling_probability: float
    event: dp_accounting.DpEvent


@attr.s(frozen=True, slots=True, auto_attribs=True)
class SkellamDpEvent(dp_accounting.DpEvent):
    """Integer vectors plus Skellam noise (Agarwal et al. 2021, 2110.04995).

    Attributes:
        standard_deviation: of the noise on each coordinate of the sum, in integer steps.
        l2_sensitivity: the largest L2 norm of one unit's integer vector.
        l1_sensitivity: the largest L1 norm of one unit's integer vector.
    """

    standard_deviation: float
    l2_sensitivity: float
    l1_sensitivity: float


@attr.s(frozen=True, slots=True, auto_attribs=True)
class DiscreteGaussianSumDpEvent(dp_accounting.DpEvent):
    """Integer vectors, each with discrete Gaussian noise, summed (Kairouz et al. 2021, 2102.06387).

    Attributes:
        standard_deviation: of the noise on each coordinate of the sum, in integer steps.
        summands: how many equal shares the noise consists of.
        dimension: the number of coordinates.
        l2_sensitivity: the largest L2 norm of one unit's integer vector.
    """

    standard_deviation: float
    summands: int
    dimension: int
    l2_sensitivity: float


_NOISE_FIELDS = ("noise_multiplier", "standard_deviation")


def with_noise(event: dp_accounting.DpEvent, factor: float) -> dp_accounting.DpEvent:
    """The same event with all its noise multiplied by a factor."""

    def scaled(name: str, value: Any) -> Any:
        if name in _NOISE_FIELDS:
            return value * factor
        if isinstance(value, dp_accounting.DpEvent):
            return with_noise(value, factor)
        if isinstance(value, list | tuple):
            return type(value)(scaled("", part) for part in value)
        return value

    values = attr.asdict(event, recurse=False)
    return type(event)(**{name: scaled(name, value) for name, value in values.items()})


def as_dict(event: dp_accounting.DpEvent) -> dict[str, Any]:
    """An event as plain values for JSON: its class under "event", and its fields."""

    def plain(value: Any) -> Any:
        if isinstance(value, dp_accounting.DpEvent):
            return as_dict(value)
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return value

    fields = {name: plain(value) for name, value in attr.asdict(event, recurse=False).items()}
    clash = fields.pop("event", None)
    return {"event": type(event).__name__, **fields, **({} if clash is None else {"of": clash})}


def from_dict(values: dict[str, Any]) -> dp_accounting.DpEvent:
    """The event that `as_dict` wrote.

    Raises:
        InputError: the values describe no event that dpfl knows.
    """

    def event(value: Any) -> Any:
        if isinstance(value, dict):
            return from_dict(value)
        return tuple(event(part) for part in value) if isinstance(value, list) else value

    name = values.get("event")
    kind = globals().get(str(name)) or getattr(dp_event, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, dp_accounting.DpEvent) and kind is not dp_accounting.DpEvent):
        raise InputError(f"there is no privacy event {name!r}: take it from the JSON of a guarantee.")
    fields = {
        ("event" if field == "of" else field): event(value) for field, value in values.items() if field != "event"
    }
    try:
        return kind(**fields)
    except TypeError:
        raise InputError(f"the privacy event {name} does not have the fields {', '.join(fields)}.") from None
