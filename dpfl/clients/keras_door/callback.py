"""Epsilon while a model trains, and an end before it exceeds a budget."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from dpfl.clients.keras_door.model import DPModel
from dpfl.errors import InputError
from dpfl.privacy import Accountant, Relation
from dpfl.privacy.accounting import check_analysis, check_delta, check_epsilon


class EpsilonCallback(tf.keras.callbacks.Callback):
    """Shows the epsilon spent so far at the end of every epoch, and keeps training within a budget.

    Epsilon joins the epoch's logs, hence Keras' line for the epoch and `History`, as "epsilon". It depends on no
    data. At the end the guarantee is printed in one line, unless fit is silent (`verbose=0`).

    Args:
        delta: the probability mass outside the bound; below 1 / examples.
        relation: the neighbouring relation.
        accountant: "pld" or "rdp".
        epsilon_budget: the epsilon that all training of the model together may not exceed: fit ends before the step
            that would exceed it, be it in the middle of an epoch; None for no limit.
        allow_weak_delta: accepts a delta of 1 / examples and more.

    Raises:
        InputError: a value is out of range; and from fit, before any training, if the model is no `DPModel`, the budget
            does not even pay for one step, or there is no analysis of what fit does.
    """

    def __init__(
        self,
        delta: float,
        relation: Relation = "add_or_remove_one",
        accountant: Accountant = "pld",
        epsilon_budget: float | None = None,
        allow_weak_delta: bool = False,
    ) -> None:
        super().__init__()
        check_delta(delta)
        check_analysis(relation, accountant)
        if epsilon_budget is not None:
            check_epsilon(epsilon_budget)
        self._supports_tf_logs = True  # else Keras copies all metrics to NumPy after every step
        self._analysis: dict[str, Any] = {"delta": delta, "relation": relation, "accountant": accountant}
        self._allow_weak_delta = allow_weak_delta
        self._budget = epsilon_budget
        self._left = math.inf
        self._expected_steps = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Computes how many steps the budget pays for; see the class."""
        if not isinstance(self.model, DPModel):
            raise InputError("EpsilonCallback needs a model that trains privately: wrap it in dpfl.DPModel.")
        self._plan()

    def _plan(self) -> None:
        planned = (self.params.get("epochs") or 1) * (self.params.get("steps") or 1)
        self._left = self.model.affordable_steps(
            planned, self._budget, allow_weak_delta=self._allow_weak_delta, **self._analysis
        )
        self._expected_steps = self.model.steps

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Computes it anew where another callback has restored a ledger since."""
        if self._budget is not None and self.model.steps != self._expected_steps:
            self._plan()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Ends the training after the last step that the budget pays for."""
        self._left -= 1
        self._expected_steps += 1
        if self._left <= 0:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds epsilon to the epoch's logs."""
        if logs is not None:
            logs["epsilon"] = self.model.epsilon(**self._analysis)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Prints the guarantee in one line."""
        if self.params.get("verbose"):
            spent, steps = self.model.epsilon(**self._analysis), self.model.steps
            delta, relation, accountant = self._analysis.values()
            limit = "" if self._budget is None else f", of a budget of {self._budget:g}"
            print(
                f"epsilon {spent:.4g} at delta {delta:g}{limit}: {steps} steps in all, relation {relation}, accountant "
                f"{accountant}"
            )
