"""Rounding to the safe side."""

from __future__ import annotations

import decimal


def rounded_up(value: float, digits: int) -> float:
    """Returns the smallest number of so many significant digits that is not below `value`."""
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    return float(context.create_decimal_from_float(value))
