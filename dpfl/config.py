"""Validated, immutable configuration: the base of everything that a user sets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

import pydantic
import pydantic_core

from dpfl.errors import InputError


class Config(pydantic.BaseModel):
    """An immutable group of settings that is validated when it is made.

    Unknown fields are refused, and equality is by value. `replace` makes a changed copy and validates
    it, which pydantic's own `model_copy` does not.

    Raises:
        InputError: one sentence for the first setting that is wrong.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except pydantic.ValidationError as error:
            # A name that is not known goes first: what it was meant for may be reported as missing.
            complaints = sorted(error.errors(), key=lambda complaint: complaint["type"] != "extra_forbidden")
            raise InputError(_sentence(type(self), complaints[0])) from None

    def replace(self, **settings: Any) -> Any:
        """Returns a copy with other values, validated.

        Args:
            **settings: new values by field; `{"local.steps": 3}` reaches into a nested group.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        nested: dict[str, dict[str, Any]] = {}
        for path, value in settings.items():
            name, dot, rest = path.partition(".")
            if name not in values or (dot and not rest):
                raise InputError(_unknown_field(type(self), path, name))
            if rest:
                nested.setdefault(name, {})[rest] = value
            else:
                values[name] = value
        for name, inner in nested.items():
            if not isinstance(values[name], Config):
                path = f"{name}.{next(iter(inner))}"
                raise InputError(f"'{path}' is not a setting: '{name}' has no settings of its own.")
            values[name] = values[name].replace(**inner)
        return type(self)(**values)


def kinds(union: Any) -> dict[str, type[Config]]:
    """The members of a union that is told apart by `name`, by their names."""
    members = get_args(get_args(union)[0])
    return {member.model_fields["name"].default: member for member in members}


def _unknown_field(config: type[Config], path: str, name: str) -> str:
    known = list(config.model_fields)
    groups = [(field, group) for field in known for group in _groups_in(config.model_fields[field].annotation)]
    inside = dict.fromkeys(f"{field}.{inner}" for field, group in groups for inner in group.model_fields)
    near = [field for field in inside if field.endswith(f".{name}")] or difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}."
    return f"'{path}' is not a setting of {config.__name__}: {hint}"


def _group_at(config: type[Config], location: Sequence[int | str]) -> type[Config]:
    """The group of settings at a place inside another; the members of a union go by their names there."""
    by_name: dict[Any, type[Config]] = {}
    for part in location:
        if part in by_name:
            config = by_name[part]
            continue
        members = _groups_in(config.model_fields[str(part)].annotation)
        by_name = {member.model_fields["name"].default: member for member in members if "name" in member.model_fields}
        config = members[0]
    return config


def _groups_in(annotation: Any) -> list[type[Config]]:
    """The groups of settings that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [group for part in get_args(annotation) for group in _groups_in(part)]


def _sentence(config: type[Config], error: pydantic_core.ErrorDetails) -> str:
    """One sentence for a person from pydantic's first complaint."""
    context = error.get("ctx", {})
    if isinstance(context.get("error"), InputError):
        return str(context["error"])
    # Without what pydantic calls the members of a union of plain types.
    path = ".".join(str(part) for part in error["loc"] if not re.fullmatch(r"int|float|str|bool|\w*\[.*\]", str(part)))
    if error["type"] in ("extra_forbidden", "missing"):
        group, name = _group_at(config, error["loc"][:-1]), str(error["loc"][-1])
        if error["type"] == "extra_forbidden":
            return _unknown_field(group, path, name)
        return f"{group.__name__} lacks '{name}': give it a value."
    if error["type"].startswith("union_tag"):
        known = context.get("expected_tags", "its name")
        return f"{path} must be given by {known}, but it was {error['input']!r}."
    if error["type"] == "model_attributes_type":
        return (
            f"{path} must be made by one of dpfl's classes for it, or a mapping of its name and settings, but it was "
            f"{error['input']!r}."
        )
    if error["type"] == "too_short":
        return f"{path} needs at least {context['min_length']} value, but it was {error['input']!r}."
    if error["type"] == "dict_type":
        return f"{path} should be a mapping of settings to values, but it was {error['input']!r}."
    complaint = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{path or config.__name__} {complaint}, but it was {error['input']!r}."
