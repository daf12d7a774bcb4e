"""The axes of a study: which settings take which values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dpfl.errors import InputError
from dpfl.mechanisms import AdaptiveClipping, Gaussian, NoMechanism
from dpfl.privacy import Privacy
from dpfl.simulation.experiment import Experiment

Axes = Mapping[Any, Sequence[Any]]


def grid(base: Experiment, axes: Axes) -> list[Experiment]:
    """Returns the experiments of a grid, the last axis varying fastest.

    Args:
        base: what the experiments share.
        axes: values by setting; a dot reaches into a group ("privacy.epsilon"), and a tuple of
            settings takes tuples of values, which change together.

    Raises:
        InputError: a setting does not exist or is on two axes, or a value is wrong.
    """
    paths = [path for name in axes for path in (name if isinstance(name, tuple) else (name,))]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise InputError(f"the setting {twice[0]} is on two axes, of which only one can count: leave one out.")
    for name, axis in axes.items():
        if isinstance(axis, str) or not isinstance(axis, Sequence) or not axis:
            raise InputError(f"the axis {name} must be a list of values, at least one, but it was {axis!r}.")
        if isinstance(name, tuple) and any(not isinstance(v, tuple) or len(v) != len(name) for v in axis):
            raise InputError(f"the axis {name} must be a list of tuples with {len(name)} values each.")
    names = [name if isinstance(name, tuple) else (name,) for name in axes]
    values = [[value if isinstance(name, tuple) else (value,) for value in axis] for name, axis in axes.items()]
    experiments = []
    for point in itertools.product(*values):
        settings = {
            name: value
            for group, together in zip(names, point, strict=True)
            for name, value in zip(group, together, strict=True)
        }
        experiments.append(base.replace(**settings))
    return experiments


def round_frequency(rounds: Sequence[int], local_work: int) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Returns the axis of numbers of rounds at fixed local work: with more rounds, fewer local steps in each.

    Args:
        rounds: numbers of rounds, each a divisor of the local work.
        local_work: local steps of a client over all rounds, if it took part in each.

    Raises:
        InputError: the local work cannot be split evenly into the rounds.
    """
    if local_work < 1:
        raise InputError(f"the local work must be at least 1 local step, but it was {local_work}.")
    for count in rounds:
        if count < 1 or local_work % count:
            raise InputError(
                f"{local_work} local steps cannot be split evenly into {count} rounds: choose numbers of rounds "
                "that divide the local work."
            )
    return {("rounds", "local.steps"): [(count, local_work // count) for count in rounds]}


def clipping(
    clip_norms: Sequence[float] = (), quantiles: Sequence[float] = (), start: float = 1.0
) -> dict[str, list[Gaussian | AdaptiveClipping]]:
    """Returns the axis of clip norms: fixed ones, and such as follow a quantile of the updates' norms.

    Args:
        clip_norms: largest L2 norms of an update, under the Gaussian mechanism.
        quantiles: that adaptive clipping follows, each from 0 to 1.
        start: the clip norm of adaptive clipping in the first round.

    Raises:
        InputError: a value is wrong.
    """
    if not len(clip_norms) + len(quantiles):
        raise InputError("the axis clipping has no values: give it clip_norms, quantiles, or both.")
    fixed = [Gaussian(clip_norm=clip_norm) for clip_norm in clip_norms]
    return {"mechanism": [*fixed, *(AdaptiveClipping(clip_norm=start, quantile=quantile) for quantile in quantiles)]}


def value_range(low: float, high: float, count: int, scale: Literal["log", "linear"] = "log") -> list[float]:
    """Returns values from `low` to `high`, both included, to three digits.

    Args:
        low: the first value; above 0 on a logarithmic scale.
        high: the last value.
        count: how many there are, at least 2.
        scale: "log" for equal ratios, "linear" for equal differences.

    Raises:
        InputError: there is no such range.
    """
    if scale not in ("log", "linear"):
        raise InputError(f"the scale of a range is 'log' or 'linear', but it was {scale!r}.")
    if count < 2 or not low < high or (scale == "log" and low <= 0):
        above = ", above 0" if scale == "log" else ""
        raise InputError(
            f"a {scale} range needs at least 2 values and its low end below the high one{above}, but it was {count} "
            f"values from {low:g} to {high:g}."
        )
    values = np.geomspace(low, high, count) if scale == "log" else np.linspace(low, high, count)
    return [float(f"{value:.3g}") for value in values]


def ceilings(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Returns plain federated averaging, without clip and noise, in the place of each experiment.

    Experiments that become the same are there once. Where weights of updates are chosen they stay.
    """
    plain: dict[str, Experiment] = {}
    for experiment in experiments:
        mechanism = experiment.mechanism if isinstance(experiment.mechanism, NoMechanism) else NoMechanism()
        # A new group, since settings of DP-SGD are refused without an example_clip.
        local = experiment.local.without_example_privacy()
        privacy = Privacy(epsilon=None)
        one = experiment.replace(mechanism=mechanism, local=local, privacy=privacy)
        plain.setdefault(one.configuration, one)
    return list(plain.values())
