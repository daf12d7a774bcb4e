"""The clients' plan: the noise that keeps a target, whoever is the worst client, and what each run costs."""

import dataclasses
import math
import pickle

import dp_accounting
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent

from dpfl.clients import ClientTraining
from dpfl.clients.example_privacy import ClientPlan, check_clients, plan_clients
from dpfl.errors import InputError
from dpfl.privacy import Guarantee, Privacy, epsilon, noise_for, poisson_gaussian
from dpfl.privacy.example_level import ClientEpsilons
from dpfl.sampling import BaseSampler, Cyclic, Everyone, Poisson

RECORDS = np.array([30, 50, 45, 200, 81, 30, 79])
DELTA = 1e-4
ROUNDS = 6


def planned(
    *,
    records: np.ndarray = RECORDS,
    sampler: BaseSampler | None = None,
    rounds: int = ROUNDS,
    target: dict | None = None,
    **settings: object,
) -> ClientPlan:
    training = ClientTraining(**{"batch_size": 20, "steps": 3, "example_clip": 0.5, **settings})
    privacy = Privacy(**{"unit": "example", "epsilon": 4.0, "delta": DELTA, **(target or {})})
    return plan_clients(training, privacy, sampler or Poisson(cohort=3), records, rounds)


def refusal(**settings: object) -> str:
    with pytest.raises(InputError) as caught:
        planned(**settings)
    message = str(caught.value)
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message
    return message


def costs(plan: ClientPlan, rounds: int = ROUNDS) -> list[float]:
    """What every client pays in so many rounds, one after the other, from hand-written events."""
    training = plan.training
    found = []
    for records in plan.records.tolist():
        steps = training.steps or training.epochs * math.ceil(records / training.batch_size)
        rate = min(1, training.batch_size / records)
        if training.example_sampling == "shuffled":
            epochs = math.ceil(steps / math.ceil(records / training.batch_size))
            event = SelfComposedDpEvent(GaussianDpEvent(plan.noise_multiplier), epochs * rounds)
        elif training.max_batch_size is not None and training.max_batch_size < records:
            one = dp_accounting.TruncatedSubsampledGaussianDpEvent(
                records, rate, training.max_batch_size, plan.noise_multiplier
            )
            event = SelfComposedDpEvent(one, steps * rounds)
        else:
            event = poisson_gaussian(plan.noise_multiplier, rate, steps * rounds)
        target = plan.target
        found.append(epsilon(event, target.delta, relation=target.relation, accountant=target.accountant))
    return found


KINDS = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": None, "epochs": 2},
        {"steps": None, "epochs": 2, "batch_size": 40},
        {"batch_size": 300},
        {"max_batch_size": 22},
        {"steps": None, "epochs": 1, "max_batch_size": 30},
        {"target": {"accountant": "rdp"}},
        {"target": {"relation": "replace_one"}},
        {"example_sampling": "shuffled", "target": {"relation": "replace_one"}},
        {"example_sampling": "shuffled", "steps": None, "epochs": 2, "target": {"relation": "replace_special"}},
    ],
    ids=str,
)


class TestCalibration:
    @KINDS
    def test_the_worst_client_just_keeps_the_target(self, settings):
        plan = planned(**settings)
        found = costs(plan)
        assert max(found) <= 4
        assert max(found) > 3.98
        assert plan.guarantee.epsilon == max(found) == plan.guarantee.recomputed_epsilon()

    def test_the_worst_client_may_be_another_at_another_noise(self):
        # Few records cost more in a step, many records take more steps: at every noise the maximum counts.
        records = np.array([41, 60, 61, 80, 400, 2000])
        for target in (0.5, 8.0):
            plan = planned(records=records, steps=None, epochs=1, target={"epsilon": target})
            assert max(costs(plan)) == plan.guarantee.epsilon <= target

    @pytest.mark.parametrize("first", [30, 200])
    def test_it_does_not_matter_which_client_is_tried_first(self, first, monkeypatch):
        from dpfl.clients import example_privacy

        right = planned(steps=None, epochs=2)
        found = example_privacy._worst
        calls = []

        def misled(*arguments):
            calls.append(1)
            worst, spent = found(*arguments)
            return (first, spent) if len(calls) == 1 else (worst, spent)

        monkeypatch.setattr(example_privacy, "_worst", misled)
        plan = planned(steps=None, epochs=2)
        assert max(costs(plan)) <= 4
        assert plan.noise_multiplier == pytest.approx(right.noise_multiplier, rel=2e-3)

    def test_clients_are_charged_for_the_most_rounds_that_they_can_be_drawn_into(self):
        assert planned(sampler=Poisson(cohort=1)).noise_multiplier == planned(sampler=Everyone()).noise_multiplier
        cyclic = planned(sampler=Cyclic(cohort=3))  # 7 clients in 3 groups: 2 of 6 rounds
        assert max(costs(cyclic, rounds=2)) == cyclic.guarantee.epsilon <= 4
        assert cyclic.noise_multiplier < planned().noise_multiplier

    def test_equals_the_calibration_of_the_worst_clients_event(self):
        assert planned().noise_multiplier == noise_for(poisson_gaussian(1.0, 20 / 30, 3 * ROUNDS), 4.0, DELTA)

    def test_a_given_noise_makes_epsilon_a_budget(self):
        plan = planned(example_noise=3.0)
        assert plan.noise_multiplier == 3.0
        assert plan.guarantee.epsilon == max(costs(plan)) <= 4
        message = refusal(example_noise=1.0)
        cost = max(costs(planned(example_noise=1.0, target={"epsilon": None})))
        assert f"would spend epsilon {math.ceil(cost * 1000) / 1000:.4g}"[:-1] in message
        assert "more than the budget of 4" in message

    def test_without_epsilon_a_given_noise_is_accounted_for(self):
        plan = planned(example_noise=1.0, target={"epsilon": None})
        assert plan.guarantee.epsilon == max(costs(plan)) > 4

    @pytest.mark.parametrize("noise", [None, 0])
    def test_without_noise_nothing_is_guaranteed(self, noise):
        plan = planned(example_noise=noise, target={"epsilon": None})
        assert (plan.noise_multiplier, plan.is_private, plan.ledgers()) == (0, False, [])
        assert plan.guarantee.statement().startswith("No differential privacy is guaranteed: no noise")
        assert plan.realised(np.array([1, 0, 1, 1, 1, 1, 1])).epsilons[:2].tolist() == [math.inf, 0]

    def test_a_user_level_target_only_lends_its_delta_and_relation(self):
        plan = planned(example_noise=1.0, target={"unit": "user", "epsilon": 0.1})
        assert plan.guarantee.unit == "example"
        assert plan.guarantee.epsilon == max(costs(plan)) > 4


class TestGuarantee:
    @KINDS
    def test_survives_a_record(self, settings):
        guarantee = planned(**settings).guarantee
        again = Guarantee.from_json(guarantee.to_json())
        assert again == guarantee
        assert again.recomputed_epsilon() == guarantee.epsilon

    def test_says_what_it_holds_for(self):
        plan = planned()
        text = plan.guarantee.statement()
        assert plan.guarantee.unit == "example"
        assert plan.guarantee.steps == 18
        for part in (
            "differential privacy at example level",
            "each client's updates of all rounds",
            "when one training example is added to the training data or removed from it",
            f"the Gaussian mechanism with noise multiplier {plan.noise_multiplier:g} on the sum of a minibatch's",
            "clipped to L2 norm 0.5",
            "in each of 18 steps, on Poisson samples of a client's 30 records at rate 0.666667",
            "no trusted server is needed",
            "parallel composition",
            "the worst client, one with 30 records, charged for 6 of the 6 rounds",
            "amplification by the sampling of clients is not counted",
            "How many records each client has counts as public",
            "choice of hyperparameters",
            "pseudo-random",
            "whoever is behind several records is protected less",
        ):
            assert part in text

    def test_words_of_other_minibatches(self):
        shuffled = planned(example_sampling="shuffled", target={"relation": "replace_one"}).guarantee.statement()
        assert "minibatches of 20 from shuffled epochs" in shuffled
        assert "only where an example is replaced" in shuffled
        assert "Poisson" not in shuffled
        assert "of which at most 25 are used" in planned(max_batch_size=25).guarantee.statement()
        assert "layer by layer" in planned(example_clipping="per_layer").guarantee.statement()
        assert "AUTO-S" in planned(example_clipping="automatic").guarantee.statement()


class TestSpending:
    @KINDS
    def test_ledgers_give_the_worst_client_after_each_round(self, settings):
        plan = planned(**settings)
        ledgers = plan.ledgers()
        for rounds in (1, 3, ROUNDS):
            spent = max(ledger.epsilon_after(rounds) for ledger in ledgers)
            exact = max(costs(plan, rounds))
            assert exact * (1 - 1e-6) <= spent <= exact * 1.02

    @KINDS
    def test_a_run_costs_each_client_its_own_rounds(self, settings):
        plan = planned(**settings)
        taken = np.array([1, 0, ROUNDS, 2, 3, ROUNDS, 1])
        realised = plan.realised(taken)
        assert isinstance(realised, ClientEpsilons)
        for client, rounds in enumerate(taken.tolist()):
            exact = costs(plan, rounds)[client] if rounds else 0
            assert exact * (1 - 1e-6) <= realised.epsilons[client] <= exact * 1.02
        assert realised.worst <= plan.guarantee.epsilon

    def test_travels_to_workers(self):
        plan = planned()
        again = pickle.loads(pickle.dumps(plan))
        assert dataclasses.asdict(again.guarantee) == dataclasses.asdict(plan.guarantee)
        assert again.noise_multiplier == plan.noise_multiplier


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "word"),
        [
            ({"example_clip": None}, "give the client training an example_clip"),
            ({"target": {"unit": "user"}}, "example_noise=None"),
            ({"example_noise": 0.0}, "without noise in the local steps epsilon 4 cannot be kept"),
            ({"example_sampling": "shuffled"}, "add_or_remove_one"),
            ({"max_batch_size": 25, "target": {"accountant": "rdp"}}, "by the RDP accountant"),
            ({"target": {"delta": 1e-2}}, "no privacy for 515 examples"),
            ({"target": {"delta": 1e-2, "unit": "user"}, "example_noise": 1.0}, "no privacy for 515 examples"),
        ],
    )
    def test_one_sentence(self, settings, word):
        assert word in refusal(**settings)

    def test_a_weak_delta_can_be_allowed_and_needs_no_allowance_without_noise(self):
        weak = {"delta": 1e-2, "allow_weak_delta": True}
        assert planned(target=weak).guarantee.delta == 1e-2
        assert not planned(target={"delta": 1e-2, "epsilon": None}).is_private

    def test_plain_clients_of_a_user_level_target_are_fine(self):
        check_clients(ClientTraining(epochs=1), Privacy(epsilon=1), RECORDS)
