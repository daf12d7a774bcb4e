"""Rounding to the safe side."""

from __future__ import annotations

import decimal


def rounded_up(value: float, digits: int) -> float:
    """Returns the smallest number of so many significant digits that is not below `value`."""
    # By way of the shortest decimal that stands for the float: 1.1 is meant, not 1.100000000000000088.
    return float(decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING).create_decimal(repr(float(value))))
