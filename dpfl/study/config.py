"""A study as a YAML file."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Any, Literal

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dpfl.config import Config
from dpfl.data.files import SUFFIXES
from dpfl.errors import InputError
from dpfl.files import written_whole
from dpfl.simulation.experiment import Experiment
from dpfl.study import axes
from dpfl.study.study import Study

_NAMED_AXES = ("round_frequency", "clipping")


class Range(Config):
    """Values of an axis from `low` to `high`, both included, to three digits.

    Attributes:
        low: the first value; above 0 on a logarithmic scale.
        high: the last value.
        count: how many there are, at least 2.
        scale: "log" for equal ratios, "linear" for equal differences.
    """

    low: float
    high: float
    count: int
    scale: Literal["log", "linear"] = "log"

    def values(self) -> list[float]:
        """The values; see `value_range`."""
        return axes.value_range(self.low, self.high, self.count, self.scale)


class RoundFrequency(Config):
    """The axis `round_frequency`: numbers of rounds at fixed local work.

    Attributes:
        rounds: numbers of rounds, each a divisor of the local work.
        local_work: local steps of a client over all rounds, if it took part in each.
    """

    rounds: list[int] = pydantic.Field(min_length=1)
    local_work: int


class Clipping(Config):
    """The axis `clipping`: fixed clip norms, and such as follow a quantile of the updates' norms.

    Attributes:
        clip_norms: largest L2 norms of an update, under the Gaussian mechanism: a list or a range.
        quantiles: that adaptive clipping follows, each from 0 to 1.
        start: the clip norm of adaptive clipping in the first round.
    """

    clip_norms: list[float] | Range = pydantic.Field(default_factory=list)
    quantiles: list[float] = pydantic.Field(default_factory=list)
    start: float = 1.0

    @pydantic.field_validator("clip_norms", mode="before")
    @classmethod
    def _range_of(cls, given: Any) -> Any:
        """Made here, so that it is a range whose setting is complained about, and not a list."""
        return Range(**_mapping("clipping", given)) if isinstance(given, dict) else given


class StudyConfig(Config):
    """A study in plain values, as a YAML file has it.

    All experiments are `experiment` with other values for some settings: one experiment for each combination of a point
    of `points`, a row of `zip` and a value on each axis of `grid`. Settings go by their paths, such as
    "privacy.epsilon", and "none" stands for no epsilon.

    Attributes:
        experiment: the settings of `dpfl.Experiment` that all share. `data` is a name ("digits") or a mapping of the
            arguments of `dpfl.data.load`, of which `source` is a name, a file beside the YAML file, or a folder.
        grid: values by setting: a list, or a `Range` (`{low: 0.1, high: 4, count: 6}`, on a logarithmic scale). Two
            axes have names of their own: `round_frequency` (see `RoundFrequency`) and `clipping` (see `Clipping`).
        zip: lists of the same length by setting, whose values change together.
        points: experiments one by one, each a mapping of settings.
        ceiling: whether plain federated averaging, without clip and noise, runs beside each experiment.
        seeds: a number of seeds (0, 1, ...) or the seeds themselves, the same for all experiments.

    Raises:
        InputError: a setting does not exist or a value is wrong.
    """

    experiment: dict[str, Any]
    grid: dict[str, Any] = pydantic.Field(default_factory=dict)
    zip: dict[str, list[Any]] = pydantic.Field(default_factory=dict)
    points: list[dict[str, Any]] = pydantic.Field(default_factory=list)
    ceiling: bool = False
    seeds: int | list[int] = 3
    _beside: Path = pydantic.PrivateAttr(default=Path())

    @classmethod
    def from_yaml(cls, path: str | Path) -> StudyConfig:
        """Reads a study from a YAML 1.2 file.

        Args:
            path: of the file. Data files are looked for beside it, then in the working directory.

        Raises:
            InputError: the file cannot be read, or is not a study.
        """
        path = Path(path)
        try:
            content = YAML(typ="safe", pure=True).load(path.read_text())
        except OSError as error:
            raise InputError(f"the study {path} cannot be read ({error.strerror}): check the path.") from None
        except (YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a valid YAML file: {_complaint(error)}.") from None
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise InputError(f"{path} is not a study: give it the settings {', '.join(cls.model_fields)}.")
        config = cls(**content)
        config._beside = path.parent
        return config

    def to_yaml(self, path: str | Path) -> None:
        """Writes the study to a YAML file, from which `from_yaml` makes an equal one.

        Args:
            path: of the file, which appears when it is whole.
        """
        yaml = YAML()
        yaml.default_flow_style = None
        with written_whole(Path(path)) as part, part.open("w") as file:
            yaml.dump(self.model_dump(exclude_defaults=True), file)

    def study(self) -> Study:
        """The study itself, whose data is loaded now.

        Raises:
            InputError: a setting does not exist or a value is wrong.
        """
        base = Experiment(**{name: self._given(name, value) for name, value in self.experiment.items()})
        points = [base.replace(**_values(point)) for point in self.points] or [base]
        product: dict[Any, Any] = {}
        varied = list(dict.fromkeys(name for point in self.points for name in point))
        for name, axis in self.grid.items():
            values = _axis(name, axis)
            varied += [path for paths in values for path in (paths if isinstance(paths, tuple) else (paths,))]
            varied += ["mechanism.clip_norm", "mechanism.quantile"] if name == "clipping" else []
            product |= values
        varied += self.zip
        if twice := [path for path in varied if varied.count(path) > 1]:
            raise InputError(
                f"the setting {twice[0]} varies in two places, of which only one can count: leave one out."
            )
        if self.zip:
            if empty := [name for name, column in self.zip.items() if not column]:
                raise InputError(f"the list of {empty[0]} in zip is empty: give it values, or leave it out.")
            rows = [tuple(map(functools.partial(_value, name), column)) for name, column in self.zip.items()]
            lengths = {name: len(column) for name, column in self.zip.items()}
            if len(set(lengths.values())) > 1:
                raise InputError(f"the lists in zip must have the same length, but they have {lengths}.")
            product = {tuple(self.zip): list(zip(*rows, strict=True)), **product}
        return Study(points, product, self.seeds, self.ceiling)

    def _given(self, name: str, value: Any) -> Any:
        """A setting of the experiment with the data's file where it is, and no epsilon for "none"."""
        if name == "data" and isinstance(value, dict) and str(value.get("source", "")).lower().endswith(SUFFIXES):
            beside = self._beside / value["source"]
            return {**value, "source": str(beside)} if beside.is_file() else value
        if name == "privacy" and isinstance(value, dict):
            return {inner: _value(f"privacy.{inner}", each) for inner, each in value.items()}
        return value


def _axis(name: str, given: Any) -> dict[Any, list[Any]]:
    """An axis of the grid as `grid` takes it."""
    if name == "round_frequency":
        frequency = RoundFrequency(**_mapping(name, given))
        return dict(axes.round_frequency(frequency.rounds, frequency.local_work))
    if name == "clipping":
        clipping = Clipping(**_mapping(name, given))
        norms = clipping.clip_norms.values() if isinstance(clipping.clip_norms, Range) else clipping.clip_norms
        return dict(axes.clipping(norms, clipping.quantiles, clipping.start))
    if name not in Experiment.model_fields and (near := difflib.get_close_matches(name, _NAMED_AXES, n=1)):
        raise InputError(f"'{name}' is not an axis: did you mean '{near[0]}'?")
    if isinstance(given, dict):
        return {name: list(Range(**_mapping(name, given)).values())}
    if not isinstance(given, list):
        raise InputError(
            f"the axis {name} must be a list of values or a range with low, high and count, but it was {given!r}."
        )
    return {name: [_value(name, value) for value in given]}


def _complaint(error: Exception) -> str:
    """What is wrong with a YAML file, and in which line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    text = f"{problem} in line {mark.line + 1}" if problem and mark else str(error)
    return " ".join(text.split())


def _mapping(name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(inner, str) for inner in given):
        raise InputError(
            f"the axis {name} takes settings of its own, but it was {given!r}: see dpfl.study.StudyConfig."
        )
    return given


def _values(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(name, value) for name, value in settings.items()}


def _value(name: str, value: Any) -> Any:
    """A value of a setting, where "none" stands for no epsilon."""
    return None if name == "privacy.epsilon" and value == "none" else value
