"""Commands that account for privacy without training anything."""

from __future__ import annotations

import dataclasses
import fractions
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from dpfl.errors import InputError

if TYPE_CHECKING:
    from dpfl.config import Config
    from dpfl.mechanisms import Plan
    from dpfl.privacy import Guarantee

# What `rounds` tries at most.
_MOST_STEPS = 1_000_000

_IF_DONE_SO = (
    "It holds if units take part just as the sampling says, each contributes at most the clip norm, and the noise is "
    "drawn afresh wherever the mechanism draws it."
)

RelationOption = Annotated[
    Literal["add_or_remove_one", "replace_one", "replace_special"],
    typer.Option(help="The neighbouring relation: what may differ between two datasets."),
]
AccountantOption = Annotated[
    Literal["pld", "rdp"],
    typer.Option(help="The accountant: pld is tight (rdp where it has no answer), rdp is looser."),
]
_Mechanism = Annotated[
    str,
    typer.Option(
        help="gaussian, adaptive_clipping, tree_aggregation, banded_matrix, discrete_gaussian, skellam, "
        "local_gaussian or local_laplace."
    ),
]
_Sampler = Annotated[
    str,
    typer.Option(help="poisson, capped_poisson, fixed_size, everyone, cyclic, cyclic_poisson or balls_in_bins."),
]
_Clients = Annotated[int | None, typer.Option(help="Number of units in the population: clients, or examples.")]
_Cohort = Annotated[int | None, typer.Option(help="Expected number of units in a step.")]
_Rate = Annotated[
    float | None,
    typer.Option(help="Instead of clients and cohort: probability of a unit to take part in a step, (0, 1]."),
]
_Steps = Annotated[int, typer.Option(help="Noisy sums released: rounds (user) or local steps (example).")]
_Delta = Annotated[float, typer.Option(help="Probability mass outside the epsilon bound, (0, 1).")]
_Unit = Annotated[Literal["user", "example"], typer.Option(help="The privacy unit: what one neighbour differs in.")]
_Noise = Annotated[
    float,
    typer.Option(
        help="Noise multiplier: standard deviation of the noise (of one node for tree_aggregation, of one client for "
        "local_gaussian; the scale for local_laplace) divided by the clip norm."
    ),
]
_Epsilon = Annotated[float, typer.Option(help="The epsilon that must not be exceeded.")]
_ClipNorm = Annotated[float, typer.Option(help="Clip norm, for the statement: epsilon does not depend on it.")]
_Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A further setting; may be repeated: sampler.cap, sampler.groups; mechanism.clipping (gaussian), "
        "quantile, clip_learning_rate, count_noise (adaptive_clipping), restart_every, variance_reduction "
        "(tree_aggregation), bands, momentum (banded_matrix), steps, bits, beta (discrete_gaussian, skellam). "
        "Example: mechanism.bands=8.",
    ),
]
_Dimension = Annotated[
    int | None, typer.Option(help="Number of weights of the model, for discrete_gaussian and skellam.")
]
_Both = Annotated[bool, typer.Option("--both-accountants", help="Also print epsilon by PLD and by RDP.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a statement in words.")]


def epsilon(
    noise_multiplier: _Noise,
    steps: _Steps,
    delta: _Delta,
    clients: _Clients = None,
    cohort: _Cohort = None,
    sampling_rate: _Rate = None,
    mechanism: _Mechanism = "gaussian",
    sampler: _Sampler = "poisson",
    settings: _Settings = None,
    clip_norm: _ClipNorm = 1.0,
    dimension: _Dimension = None,
    unit: _Unit = "user",
    relation: RelationOption = "add_or_remove_one",
    accountant: AccountantOption = "pld",
    both: _Both = False,
    as_json: _Json = False,
) -> None:
    """Epsilon of a mechanism, from its noise."""
    question = _Question(
        mechanism, sampler, settings, clients, cohort, sampling_rate, dimension, clip_norm, delta, relation, accountant
    )
    _print(question.plan(steps, noise=noise_multiplier), unit, both, as_json)


def noise(
    epsilon: _Epsilon,
    steps: _Steps,
    delta: _Delta,
    clients: _Clients = None,
    cohort: _Cohort = None,
    sampling_rate: _Rate = None,
    mechanism: _Mechanism = "gaussian",
    sampler: _Sampler = "poisson",
    settings: _Settings = None,
    clip_norm: _ClipNorm = 1.0,
    dimension: _Dimension = None,
    unit: _Unit = "user",
    relation: RelationOption = "add_or_remove_one",
    accountant: AccountantOption = "pld",
    both: _Both = False,
    as_json: _Json = False,
) -> None:
    """Noise multiplier of a mechanism, from its epsilon, rounded up."""
    question = _Question(
        mechanism, sampler, settings, clients, cohort, sampling_rate, dimension, clip_norm, delta, relation, accountant
    )
    _print(question.plan(steps, epsilon=epsilon), unit, both, as_json)


def rounds(
    epsilon: _Epsilon,
    noise_multiplier: _Noise,
    delta: _Delta,
    clients: _Clients = None,
    cohort: _Cohort = None,
    sampling_rate: _Rate = None,
    mechanism: _Mechanism = "gaussian",
    sampler: _Sampler = "poisson",
    settings: _Settings = None,
    clip_norm: _ClipNorm = 1.0,
    dimension: _Dimension = None,
    unit: _Unit = "user",
    relation: RelationOption = "add_or_remove_one",
    accountant: AccountantOption = "pld",
    both: _Both = False,
    as_json: _Json = False,
) -> None:
    """The largest number of steps that a noise multiplier keeps within epsilon."""
    question = _Question(
        mechanism, sampler, settings, clients, cohort, sampling_rate, dimension, clip_norm, delta, relation, accountant
    )
    if noise_multiplier == 0:
        raise InputError("without noise no number of steps stays within an epsilon: give a positive noise multiplier.")
    plan = question.plan(_MOST_STEPS, noise=noise_multiplier, epsilon=epsilon)
    _print(plan, unit, both, as_json)
    if plan.rounds == _MOST_STEPS:
        print(f"no more than {_MOST_STEPS:,} steps were tried: more may stay within epsilon", file=sys.stderr)


def cohort(
    epsilon: _Epsilon,
    noise_multiplier: _Noise,
    steps: _Steps,
    delta: _Delta,
    clients: Annotated[int, typer.Option(help="Number of units in the population: clients, or examples.")],
    mechanism: _Mechanism = "gaussian",
    sampler: _Sampler = "poisson",
    settings: _Settings = None,
    clip_norm: _ClipNorm = 1.0,
    dimension: _Dimension = None,
    unit: _Unit = "user",
    relation: RelationOption = "add_or_remove_one",
    accountant: AccountantOption = "pld",
    both: _Both = False,
    as_json: _Json = False,
) -> None:
    """The largest expected cohort that a noise multiplier keeps within epsilon."""
    from dpfl.privacy import largest_count

    if noise_multiplier == 0:
        raise InputError("without noise no cohort stays within an epsilon: give a positive noise multiplier.")

    def question(size: int) -> _Question:
        return _Question(
            mechanism, sampler, settings, clients, size, None, dimension, clip_norm, delta, relation, accountant
        )

    most = clients // getattr(question(1).sampler_config(), "groups", 1)
    largest = largest_count(
        lambda size: question(size).event(steps, noise_multiplier),
        epsilon,
        delta,
        largest=most,
        relation=relation,
        accountant=accountant,
    )
    plan = question(largest).plan(steps, noise=noise_multiplier)
    _print(plan, unit, both, as_json, cohort=largest, expected_cohort=plan.expected_cohort)


def verify(
    record: Annotated[Path, typer.Argument(help="A record that a run left behind (records/*.json), or a guarantee.")],
) -> None:
    """Compute the epsilon of a recorded guarantee anew, from the record alone."""
    from dpfl.privacy import Guarantee

    try:
        content = json.loads(record.read_text())
    except (OSError, ValueError):
        raise InputError(f"{record} cannot be read as JSON: give a run's record or the JSON of a guarantee.") from None
    content = content if isinstance(content, dict) else {}
    stated = content.get("guarantee", content)
    others = (content.get(name) for name in ("extrapolated", "user_guarantee", "example_guarantee"))
    for values in (stated, *(other for other in others if other not in (None, stated))):
        _verify(Guarantee.from_dict(values))
    row = content.get("record", {})
    columns = {
        "epsilon_spent": stated,
        "user_epsilon": content.get("user_guarantee"),
        "example_epsilon": content.get("example_guarantee"),
    }
    for column, guarantee in columns.items():
        if guarantee is not None and (spent := row.get(column, guarantee["epsilon"])) != guarantee["epsilon"]:
            raise InputError(
                f"the record's row says that epsilon {spent} was spent, but its guarantee states "
                f"{guarantee['epsilon']}: do not rely on it."
            )


def _verify(guarantee: Guarantee) -> None:
    """Prints a statement and what its event costs; refuses one whose event costs more than is stated."""
    found = guarantee.recomputed_epsilon()
    Console().print(guarantee.statement(), highlight=False)
    if not found <= guarantee.epsilon * (1 + 1e-6):
        raise InputError(
            f"the record states epsilon {guarantee.epsilon:g}, but its event costs {found:g}: do not rely on it."
        )
    print(f"the event: {guarantee.privacy_event()}")
    print(f"confirmed: computed anew, this event costs epsilon {found:.6g} (compare the event with the words above)")


@dataclasses.dataclass(frozen=True)
class _Question:
    """What is to be accounted for, but for noise and number of steps."""

    mechanism: str
    sampler: str
    settings: list[str] | None
    clients: int | None
    cohort: int | None
    sampling_rate: float | None
    dimension: int | None
    clip_norm: float
    delta: float
    relation: Any
    accountant: Any

    def plan(self, steps: int, *, noise: float | None = None, epsilon: float | None = None) -> Plan:
        """Plans so many steps with a noise, for an epsilon, or until the noise has spent the epsilon."""
        from dpfl.privacy import Privacy

        clients, _ = self._population()
        mechanism = self.mechanism_config(noise)
        target = Privacy(
            epsilon=epsilon,
            delta=self.delta,
            relation=self.relation,
            accountant=self.accountant,
            allow_weak_delta=True,
        )
        plan = mechanism.plan(target, self.sampler_config(), clients, steps, dimension=self.dimension)
        if self.sampling_rate is None:
            return plan
        in_words = f"on a Poisson sample at rate {self.sampling_rate:g}"
        return dataclasses.replace(plan, guarantee=dataclasses.replace(plan.guarantee, sampler=in_words))

    def event(self, steps: int, noise: float) -> Any:
        """The privacy event of so many steps with a noise, whether or not it makes a sensible plan."""
        clients, _ = self._population()
        sampler = self.sampler_config()
        mechanism = self.mechanism_config(noise)
        mechanism.check_sampler(sampler, clients, self.relation)
        return mechanism.event(noise, sampler, clients, steps, self.dimension)

    def mechanism_config(self, noise: float | None) -> Any:
        """The mechanism with its settings; a noise of 0 is none."""
        from dpfl.config import kinds
        from dpfl.mechanisms import Mechanism

        flags = {"clip_norm": self.clip_norm, "noise_multiplier": noise or None}
        return _made("mechanism", self.mechanism, kinds(Mechanism), flags, self.settings)

    def sampler_config(self) -> Any:
        """The sampler with its settings."""
        from dpfl.config import kinds
        from dpfl.sampling import Sampler

        _, cohort = self._population()
        return _made("sampler", self.sampler, kinds(Sampler), {"cohort": cohort}, self.settings)

    def _population(self) -> tuple[int, int | None]:
        """The number of units, and the expected cohort."""
        if self.sampling_rate is None:
            if self.clients is None:
                raise InputError("tell either --clients (and --cohort), or --sampling-rate.")
            return self.clients, self.cohort
        if self.clients is not None or self.cohort is not None or self.sampler != "poisson":
            raise InputError(
                "--sampling-rate stands for Poisson sampling without a number of clients: leave it out, or leave out "
                "--clients, --cohort and --sampler."
            )
        from dpfl.privacy.calibration import check_sampling

        check_sampling(self.sampling_rate, 1)
        cohort, clients = fractions.Fraction(str(self.sampling_rate)).as_integer_ratio()
        return clients, cohort


def _made(
    group: str, name: str, known: dict[str, type[Config]], flags: dict[str, Any], words: list[str] | None
) -> Config:
    """A mechanism or a sampler, from the options that have names of their own and from --set."""
    known = {kind: config for kind, config in known.items() if kind != "none"}
    if name not in known:
        raise InputError(f"there is no {group} '{name}': choose {', '.join(known)}.")
    given = _settings(group, words or [])
    for field, value in flags.items():
        option = f"--{field.replace('_', '-')}"
        if field in given:
            raise InputError(f"'--set {group}.{field}' is {option}: give that instead.")
        if value is not None and field not in known[name].model_fields:
            raise InputError(f"the {group} {name} has no {field}: leave {option} out.")
    given.update({field: value for field, value in flags.items() if value is not None})
    for field, described in known[name].model_fields.items():
        if described.is_required() and field not in given:
            option = f"--{field.replace('_', '-')}" if field in flags else f"--set {group}.{field}=..."
            raise InputError(f"the {group} {name} needs its {field}: give {option}.")
    return known[name](**given)


def _settings(group: str, words: list[str]) -> dict[str, Any]:
    """The settings of the mechanism or of the sampler, from words like "mechanism.bands=8"."""
    settings: dict[str, dict[str, Any]] = {"mechanism": {}, "sampler": {}}
    for word in words:
        path, equals, text = word.partition("=")
        whose, _, name = path.partition(".")
        if not equals or whose not in settings or not name:
            raise InputError(
                "--set takes mechanism.NAME=VALUE or sampler.NAME=VALUE, such as mechanism.bands=8, "
                f"but it was '{word}'."
            )
        try:
            settings[whose][name] = json.loads(text)
        except ValueError:
            settings[whose][name] = text
    return settings[group]


def _print(plan: Plan, unit: Any, both: bool, as_json: bool, **more: Any) -> None:
    """Prints what a plan guarantees, whatever its noisy sums are used for."""
    guarantee = dataclasses.replace(
        plan.guarantee,
        unit=unit,
        released="what is computed from the noisy sums",
        assumptions=(_IF_DONE_SO,) if plan.is_private else (),
    )
    if unit == "example":
        guarantee = _at_example_level(guarantee)
    accountants = guarantee.epsilon_by_accountant() if both and plan.is_private else {}
    if as_json:
        found = {"epsilon_by_accountant": accountants} if both else {}
        print(json.dumps({"noise_multiplier": plan.noise_multiplier, **more, **found, **guarantee.as_dict()}))
        return
    Console().print(guarantee.statement(), highlight=False)
    for name, value in {**more, **{f"epsilon by {key.upper()}": value for key, value in accountants.items()}}.items():
        print(f"{name}: {value:.6g}")


def _at_example_level(guarantee: Guarantee) -> Guarantee:
    """The same in the words of DP-SGD, for mechanisms that leave the noise to the server."""
    if "client" in guarantee.mechanism:
        raise InputError("where clients draw the noise, clients are what is protected: choose --unit user.")
    return dataclasses.replace(
        guarantee,
        mechanism=guarantee.mechanism.replace("update", "gradient"),
        sampler=guarantee.sampler.replace("client", "example"),
    )
