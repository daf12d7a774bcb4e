"""The ledger: what a run has spent after each round."""

import itertools
import math

import dp_accounting
import pytest

from dpfl.mechanisms import Gaussian, NoMechanism
from dpfl.privacy import Privacy, epsilon, poisson_gaussian
from dpfl.privacy.ledger import Ledger
from dpfl.sampling import Poisson


def ledger_of(noise: float, rate: float, *, budget: float = math.inf) -> Ledger:
    return Ledger(lambda rounds: poisson_gaussian(noise, rate, rounds), 1e-5, budget=budget)


def test_nothing_is_spent_before_the_first_round():
    ledger = ledger_of(1.0, 0.1)
    assert (ledger.rounds, ledger.epsilon) == (0, 0.0)


def test_every_round_is_charged_at_once():
    ledger, spent = ledger_of(1.0, 0.1), [0.0]
    for rounds in range(1, 21):
        ledger.advance()
        spent.append(ledger.epsilon)
        exact = epsilon(poisson_gaussian(1.0, 0.1, rounds), 1e-5)
        assert exact <= spent[-1] * (1 + 1e-9)
        assert spent[-1] <= exact * 1.01 + 1e-3
    assert all(later > earlier for earlier, later in itertools.pairwise(spent))


def test_several_rounds_cost_what_they_cost_one_by_one():
    at_once, one_by_one = ledger_of(1.3, 0.2), ledger_of(1.3, 0.2)
    at_once.advance(7)
    for _ in range(7):
        one_by_one.advance()
    assert at_once.epsilon == one_by_one.epsilon == at_once.epsilon_after(7)


def test_a_budget_affords_rounds_until_it_is_spent():
    budget = 3.0
    ledger = ledger_of(1.0, 0.1, budget=budget)
    while ledger.affords():
        ledger.advance()
    exact = [epsilon(poisson_gaussian(1.0, 0.1, ledger.rounds + more), 1e-5) for more in (0, 1)]
    assert ledger.epsilon <= budget < exact[1] * 1.01
    assert exact[0] <= budget
    assert not ledger.affords(2)


def test_without_a_budget_every_round_is_affordable():
    assert ledger_of(0.5, 1.0).affords(1000)


def test_a_plan_keeps_a_ledger_that_ends_at_its_guarantee():
    plan = Gaussian(clip_norm=1.0).plan(Privacy(epsilon=2, delta=1e-3), Poisson(cohort=20), 100, 30)
    ledger = plan.ledger()
    ledger.advance(30)
    assert plan.guarantee.epsilon * (1 - 1e-9) <= ledger.epsilon <= plan.guarantee.epsilon * 1.001
    assert ledger.epsilon_after(1) < ledger.epsilon


def test_a_run_without_noise_spends_everything_in_one_round():
    plan = NoMechanism().plan(Privacy(epsilon=None, delta=1e-3), Poisson(cohort=20), 100, 30)
    ledger = plan.ledger()
    ledger.advance()
    assert ledger.epsilon == math.inf


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_relation_and_accountant_are_those_of_the_guarantee(relation: str, accountant: str):
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(3.0), 5)
    ledger = Ledger(lambda rounds: event, 1e-5, relation=relation, accountant=accountant, budget=math.inf)
    ledger.advance(5)
    found = epsilon(event, 1e-5, relation=relation, accountant=accountant)
    assert ledger.epsilon == pytest.approx(found, rel=1e-2)
