"""Example-level accounting: each client's own rate and steps, the worst client, and words for it."""

import math

import dp_accounting
import numpy as np
import pytest

from dpfl.errors import InputError
from dpfl.privacy import epsilon, example_level, poisson_gaussian
from dpfl.privacy.example_level import client_epsilons

DELTA = 1e-5
RECORDS = np.array([10, 100, 100, 500, 20, 100])
ROUNDS = np.array([4, 4, 0, 10, 1, 4])
SETTING = {"noise_multiplier": 1.5, "batch_size": 20, "local_steps": 3, "delta": DELTA}


def found(**changed):
    return client_epsilons(**{**SETTING, "records": RECORDS, "participations": ROUNDS, **changed})


def is_one_sentence(message: str) -> bool:
    return message.endswith(".") and ". " not in message and "\n" not in message


class TestClientEpsilons:
    def test_each_client_pays_for_its_own_steps_at_its_own_rate(self):
        clients = found()
        np.testing.assert_array_equal(clients.sampling_rates, [1, 0.2, 0.2, 0.04, 1, 0.2])
        np.testing.assert_array_equal(clients.steps, [12, 12, 0, 30, 3, 12])
        for client, (rate, steps) in enumerate(zip(clients.sampling_rates, clients.steps, strict=True)):
            exact = epsilon(poisson_gaussian(1.5, rate, int(steps)), DELTA) if steps else 0
            assert clients.epsilons[client] == exact

    def test_who_never_takes_part_loses_nothing(self):
        assert found().epsilons[2] == 0
        assert not found(participations=0).epsilons.any()
        assert found(participations=0).worst == 0

    def test_one_number_of_rounds_for_all(self):
        np.testing.assert_array_equal(
            found(participations=4).epsilons, found(participations=np.full(len(RECORDS), 4)).epsilons
        )

    def test_fewer_records_than_a_batch_are_all_taken_without_amplification(self):
        clients = found(records=np.array([5, 19, 20, 21]), participations=2)
        np.testing.assert_array_equal(clients.sampling_rates[:3], 1)
        assert clients.epsilons[0] == clients.epsilons[1] == clients.epsilons[2] > clients.epsilons[3]
        assert clients.epsilons[0] == epsilon(poisson_gaussian(1.5, 1, 6), DELTA)

    def test_small_clients_and_busy_clients_pay_more(self):
        by_size = found(records=np.array([30, 60, 300]), participations=5).epsilons
        assert (np.diff(by_size) < 0).all()
        by_rounds = found(records=np.array([60, 60, 60]), participations=np.array([1, 5, 50])).epsilons
        assert (np.diff(by_rounds) > 0).all()

    def test_every_local_step_is_charged(self):
        # Not once per round: three local steps of one round are one local step of three rounds.
        np.testing.assert_array_equal(found().epsilons, found(local_steps=1, participations=3 * ROUNDS).epsilons)

    @pytest.mark.parametrize("accountant", ["pld", "rdp"])
    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "replace_special"])
    def test_relation_and_accountant_are_passed_on(self, relation, accountant):
        clients = found(relation=relation, accountant=accountant)
        event = poisson_gaussian(1.5, 0.2, 12)
        assert clients.epsilons[1] == epsilon(event, DELTA, relation=relation, accountant=accountant)
        assert (clients.relation, clients.accountant, clients.delta) == (relation, accountant, DELTA)

    def test_equal_clients_are_computed_once(self, monkeypatch):
        calls = []

        def counted(event, delta, **options):
            calls.append(event)
            return float(len(calls))

        monkeypatch.setattr(example_level, "epsilon", counted)
        clients = found(records=np.tile(RECORDS, 50), participations=np.tile(ROUNDS, 50))
        assert len(calls) == 4
        np.testing.assert_array_equal(clients.epsilons, np.tile(clients.epsilons[:6], 50))
        assert clients.epsilons[1] == clients.epsilons[5]

    def test_without_noise_nothing_is_guaranteed(self):
        clients = found(noise_multiplier=0.0)
        assert clients.worst == math.inf
        assert clients.epsilons[2] == 0
        assert "No differential privacy" in clients.statement()


class TestMinibatches:
    def test_truncation_is_charged(self):
        clients = found(max_batch_size=25)
        one = dp_accounting.TruncatedSubsampledGaussianDpEvent(100, 0.2, 25, 1.5)
        assert clients.epsilons[1] == epsilon(dp_accounting.SelfComposedDpEvent(one, 12), DELTA)
        assert clients.epsilons[1] > found().epsilons[1]
        # Who has no more records than the limit is never truncated.
        for client in (0, 4):
            assert clients.epsilons[client] == found().epsilons[client]

    def test_a_whole_client_beyond_the_limit(self):
        one = dp_accounting.TruncatedSubsampledGaussianDpEvent(18, 1.0, 15, 1.5)
        clients = found(records=np.array([18]), participations=2, max_batch_size=15)
        assert clients.epsilons[0] == epsilon(dp_accounting.SelfComposedDpEvent(one, 6), DELTA)

    def test_shuffled_examples_are_in_one_step_an_epoch(self):
        clients = found(
            sampling="shuffled",
            relation="replace_one",
            records=np.array([10, 40, 41, 400]),
            local_steps=np.array([3, 4, 4, 4]),
            participations=5,
        )
        # Steps per epoch: 1, 2, 3, 20; each round starts a new epoch.
        for client, epochs in enumerate((3, 2, 2, 1)):
            event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.5), epochs * 5)
            assert clients.epsilons[client] == epsilon(event, DELTA, relation="replace_one")
        assert "shuffled epoch" in clients.statement()
        assert "Poisson" not in clients.statement()

    def test_clients_may_differ_in_their_local_steps(self):
        steps = np.array([1, 2, 3, 4, 5, 6])
        clients = found(local_steps=steps)
        for client in range(6):
            assert clients.epsilons[client] == found(local_steps=int(steps[client])).epsilons[client]
            assert clients.steps[client] == steps[client] * ROUNDS[client]

    def test_a_coarser_grid_gives_no_less(self):
        coarse, fine = found(pld_interval=3.2e-3).epsilons, found().epsilons
        assert (coarse >= fine).all()
        np.testing.assert_allclose(coarse, fine, rtol=0.01)


class TestSummaries:
    def test_worst_and_quantiles_are_epsilons_of_clients(self):
        clients = found()
        assert clients.worst == clients.epsilons.max() == clients.epsilons[0]
        in_order = np.sort(clients.epsilons)
        np.testing.assert_array_equal(clients.quantiles(0, 0.5, 0.95, 1), in_order[[0, 2, 5, 5]])

    def test_frame(self):
        clients = found()
        frame = clients.frame()
        assert list(frame.columns) == ["client", "records", "sampling_rate", "steps", "epsilon"]
        np.testing.assert_array_equal(frame["client"], np.arange(6))
        np.testing.assert_array_equal(frame["records"], RECORDS)
        np.testing.assert_array_equal(frame["epsilon"], clients.epsilons)
        np.testing.assert_array_equal(frame["steps"], clients.steps)

    @pytest.mark.parametrize(
        ("relation", "words"),
        [
            ("add_or_remove_one", "one training example is added to the data of a client or removed from it"),
            ("replace_one", "one training example in the data of a client is replaced by any other data"),
        ],
    )
    def test_statement(self, relation, words):
        clients = found(relation=relation)
        text = clients.statement()
        for part in (
            words,
            f"relation {relation}",
            "example level",
            "exactly one client",
            "parallel composition",
            "over the 6 clients",
            "Amplification by the sampling of clients is not counted.",
            "PLD accountant",
            "noise multiplier 1.5",
            "not for release",
        ):
            assert part in text
        stated = float(text[1 : text.index(",")])
        assert clients.worst <= stated <= clients.worst * 1.001
        assert "1e-05" in text

    def test_statement_rounds_up(self):
        text = found().statement()
        median = float(text.split("median ")[1].split(",")[0])
        assert found().quantiles(0.5)[0] <= median <= found().quantiles(0.5)[0] * 1.001


class TestRefusals:
    @pytest.mark.parametrize(
        ("changed", "word"),
        [
            ({"records": np.array([10, 0])}, "number of records"),
            ({"records": np.array([10, -3])}, "number of records"),
            ({"records": np.array([10.5, 3.0])}, "number of records"),
            ({"records": np.array([], dtype=int), "participations": 1}, "shapes"),
            ({"records": np.array([[10, 3]]), "participations": 1}, "shapes"),
            ({"participations": np.array([1, 2])}, "shapes"),
            ({"participations": -1}, "number of rounds"),
            ({"participations": 1.5}, "number of rounds"),
            ({"batch_size": 0}, "batch size"),
            ({"batch_size": 2.5}, "batch size"),
            ({"local_steps": 0}, "local steps"),
            ({"delta": 0.0}, "delta"),
            ({"relation": "substitute"}, "relation"),
            ({"accountant": "prv"}, "accountant"),
            ({"noise_multiplier": -1.0}, "noise multiplier"),
            ({"local_steps": np.array([1, 2])}, "shapes"),
            ({"sampling": "cyclic"}, "sampling of examples"),
            ({"sampling": "shuffled"}, "add_or_remove_one"),
            ({"sampling": "shuffled", "relation": "replace_one", "max_batch_size": 30}, "never larger"),
            ({"max_batch_size": 0}, "largest minibatch"),
            ({"max_batch_size": 30, "accountant": "rdp"}, "by the RDP accountant"),
        ],
    )
    def test_one_sentence(self, changed, word):
        with pytest.raises(InputError, match=word) as refusal:
            found(**changed)
        assert is_one_sentence(str(refusal.value))
