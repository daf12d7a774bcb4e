"""Bytes that clients send and receive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dpfl.compression.config import count_of
from dpfl.mechanisms import Plan

if TYPE_CHECKING:
    from dpfl.models.functional import FunctionalModel

_FLOAT = 4
_INDEX = 4


class Traffic:
    """Bytes of a run, round by round.

    Up goes what a client sends: the message of the codec, whose length is that of one that is written here, or the
    integers of a distributed mechanism. Down comes the model in float32; of a pruned one the weights that are left,
    and a bit for each weight of a kernel that says whether it is. Where the server releases sparse changes (`top_k`), a
    client that took part before gets those since then, unless the whole model is shorter.

    Args:
        plan: of the run.
        model: whose weights travel.
        clients: their number.
    """

    def __init__(self, plan: Plan, model: FunctionalModel, clients: int) -> None:
        self._plan, self._shapes, self._parameters = plan, model.shapes, model.parameters
        self._last = np.full(clients, -1)
        self._messages: dict[int, int] = {}

    def up(self, number: int) -> int:
        """Bytes that each client of a round sends.

        Args:
            number: of the round, from 0.
        """
        compression, mechanism = self._plan.compression, self._plan.mechanism
        sent = compression.sent_coordinates(self._shapes, number, self._plan.rounds)
        if compression.bits is None:
            return mechanism.update_bytes(sent)
        if sent not in self._messages:
            from dpfl.compression.codec import Codec

            self._messages[sent] = Codec(compression.bits, compression.rotation).message_bytes(sent)
        beside = mechanism.update_bytes(sent) - _FLOAT * sent  # a weight, where clients have one
        return self._messages[sent] + beside

    def down(self, number: int, cohort: np.ndarray) -> int:
        """Bytes that all clients of a round receive; rounds are asked for in their order, as clients keep models.

        Args:
            number: of the round, from 0.
            cohort: indices of its clients.
        """
        last, self._last[cohort] = self._last[cohort], number
        top_k = self._plan.compression.top_k
        whole = self._whole_model(number)
        if top_k is None:
            return whole * len(cohort)
        count = count_of(top_k, self._parameters)
        change = _FLOAT * count + min(_INDEX * count, math.ceil(self._parameters / 8))
        return int(np.where(last < 0, whole, np.minimum(whole, (number - last) * change)).sum())

    def catch_up(self, cohorts: Sequence[np.ndarray]) -> None:
        """Notes rounds that were done before, by another process.

        Args:
            cohorts: of rounds 0, 1, ...
        """
        for number, cohort in enumerate(cohorts):
            self._last[cohort] = number

    def _whole_model(self, number: int) -> int:
        compression, rounds = self._plan.compression, self._plan.rounds
        if not compression.sparsity_after(number, rounds):
            return _FLOAT * self._parameters
        kernels = sum(math.prod(shape) for shape in self._shapes if len(shape) > 1)
        return _FLOAT * compression.sent_coordinates(self._shapes, number, rounds) + math.ceil(kernels / 8)
