"""The faster PLD accountant gives what dp-accounting's own gives."""

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl.privacy.pld import FasterPLDAccountant, _divergences

Relation = dp_accounting.NeighboringRelation


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(0.3, 50), st.floats(1e-5, 0.999), st.sampled_from([AdjacencyType.ADD, AdjacencyType.REMOVE]))
def test_divergences_are_those_of_dp_accounting(noise, rate, side):
    loss = GaussianPrivacyLoss(noise, sampling_prob=rate, adjacency_type=side)
    epsilons = np.concatenate([np.linspace(-8, 8, 101), np.log1p(-rate) * np.array([1, -1, 0.999, -0.999])])
    expected = loss.get_delta_for_epsilon(epsilons)
    np.testing.assert_allclose(_divergences(loss, epsilons), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("relation", [Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_SPECIAL, Relation.REPLACE_ONE])
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [(1.0, 0.3, 30, 1e-3), (0.7, 0.01, 120, 1e-5), (20, 0.5, 300, 1e-6), (2, 1, 5, 1e-5)],
)
def test_epsilon_is_that_of_dp_accounting(relation, noise, rate, steps, delta):
    gaussian = dp_accounting.GaussianDpEvent(noise)
    step = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    event = dp_accounting.ComposedDpEvent([dp_accounting.SelfComposedDpEvent(step, steps), gaussian])
    ours, theirs = FasterPLDAccountant(relation, 1e-3), PLDAccountant(relation, 1e-3)
    assert ours.compose(event).get_epsilon(delta) == pytest.approx(theirs.compose(event).get_epsilon(delta), rel=1e-7)


@pytest.mark.parametrize(
    "event",
    [
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(0)),
        dp_accounting.PoissonSampledDpEvent(0, dp_accounting.GaussianDpEvent(0)),
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.LaplaceDpEvent(1.0)),
        dp_accounting.NonPrivateDpEvent(),
    ],
)
def test_other_events_are_left_to_dp_accounting(event):
    accountants = FasterPLDAccountant(), PLDAccountant()
    ours, theirs = (accountant.compose(event).get_epsilon(1e-5) for accountant in accountants)
    assert ours == theirs
    assert FasterPLDAccountant().supports(event)
