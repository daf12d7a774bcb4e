"""The privacy unit and the neighbouring relation: what a guarantee protects."""

from __future__ import annotations

from typing import Literal

Unit = Literal["user", "example"]
Relation = Literal["add_or_remove_one", "replace_one", "replace_special"]
Accountant = Literal["pld", "rdp"]

UNIT_IN_WORDS: dict[str, str] = {
    "user": "all the data of one client",
    "example": "one training example",
}
RELATION_IN_WORDS: dict[str, str] = {
    "add_or_remove_one": "is added to {data} or removed from it",
    "replace_one": "in {data} is replaced by any other data",
    "replace_special": "in {data} is replaced by an empty contribution",
}
