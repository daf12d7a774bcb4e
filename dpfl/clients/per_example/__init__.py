"""Clipped sums of per-example gradients of any Keras model, for little more than plain training costs."""

from dpfl.clients.per_example.checks import check_model
from dpfl.clients.per_example.gradients import ClippedGradients, Clipping, clipped_gradients

__all__ = ["ClippedGradients", "Clipping", "check_model", "clipped_gradients"]
