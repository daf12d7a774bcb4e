"""From events to epsilon: published values, independent accountants, closed forms, monotonicity."""

import math

import dp_accounting
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_accountants import analytic_gaussian_epsilon, fourier_epsilon, prv_epsilon

from dpfl.errors import InputError
from dpfl.privacy import accountant_for, accounting, epsilon, epsilon_by_accountant, poisson_gaussian
from dpfl.privacy.events import BallsInBinsDpEvent, RevealedPoissonSampledDpEvent, SkellamDpEvent

FEW = settings(max_examples=8, deadline=None, derandomize=True, database=None)
NOISE = st.floats(1.5, 8.0)
RATE = st.one_of(st.just(1.0), st.floats(0.005, 0.999))
STEPS = st.integers(1, 300)
DELTA = st.sampled_from([1e-8, 1e-5, 1e-3])
ACCOUNTANT = st.sampled_from(["pld", "rdp"])
RELATIONS = ["add_or_remove_one", "replace_one", "replace_special"]


def is_one_sentence(message: str) -> bool:
    return message.endswith(".") and ". " not in message and "\n" not in message


def spent(accountant: str, noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon on a mesh coarse enough for properties of many examples."""
    return epsilon(poisson_gaussian(noise, rate, steps), delta, accountant=accountant, pld_interval=1e-3)


class TestPublishedValues:
    @pytest.mark.parametrize(
        ("accountant", "noise", "rate", "steps", "delta", "published", "tolerance"),
        [
            # TensorFlow Privacy 0.9, privacy/analysis/compute_dp_sgd_privacy_lib_test.py. RDP in
            # dp-accounting 0.6 drifts by up to 0.04 % from the version that these were made with.
            ("rdp", 1.3, 0.0025, 6000, 1e-5, 0.7242234, 4e-4),
            ("rdp", 1.0, 0.001, 30000, 1e-7, 1.4154988, 4e-4),
            ("rdp", 0.7, 0.01, 120, 1e-5, 3.2392676, 4e-4),
            ("pld", 0.7, 0.01, 120, 1e-5, 2.4612381, 1e-6),
            ("rdp", 0.7, 1.0, 2, 1e-5, 10.8602036, 4e-4),
            ("pld", 0.7, 1.0, 2, 1e-5, 10.1224946, 1e-6),
            # Opacus, opacus/tests/accountants_test.py.
            ("rdp", 1.5, 0.04, 2250, 1e-5, 7.3291112, 4e-4),
            # jax-privacy 2, its documentation of dp_accounting; published with two decimals.
            ("pld", 3.0, 0.1, 512, 1e-6, 3.77, 0.005 / 3.77),
        ],
    )
    def test_poisson_add_or_remove(self, accountant, noise, rate, steps, delta, published, tolerance):
        found = epsilon(poisson_gaussian(noise, rate, steps), delta, accountant=accountant)
        assert found == pytest.approx(published, rel=tolerance)

    def test_three_gaussians_of_sqrt_three_are_one_of_unit_noise(self):
        # dp-accounting, pld_privacy_accountant_test.py: delta(1) = 0.126936.
        assert epsilon(poisson_gaussian(math.sqrt(3), 1, 3), 0.126936) == pytest.approx(1, abs=1e-4)

    @pytest.mark.parametrize(("relation", "published"), [("add_or_remove_one", 1.71), ("replace_one", 2.56)])
    def test_large_population(self, relation, published):
        # 3,383 clients, 120 a round: the FEMNIST setting of DESIGN.md, rounded to two decimals there.
        event = poisson_gaussian(1.2, 120 / 3383, 100)
        assert epsilon(event, 1e-5, relation=relation) == pytest.approx(published, abs=0.005)

    def test_replace_one_doubles_the_sensitivity(self):
        # DESIGN.md: 9.997 by PLD; an accountant that forgets the doubling says 4.73 (RDP) or 4.38 (PLD).
        assert epsilon(poisson_gaussian(1, 1, 1), 1e-5, relation="replace_one") == pytest.approx(9.997, abs=5e-4)


class TestIndependentAccountants:
    @pytest.mark.parametrize(
        ("noise", "rate", "steps", "delta"),
        [
            (1.2, 120 / 3383, 100, 1e-5),
            (3.0, 0.3, 100, 1e-3),
            (6.0, 0.5, 10, 1e-4),
            (5.0, 0.9, 100, 1e-5),
            (10.0, 1.0, 200, 1e-5),
        ],
    )
    def test_prv_accountant_agrees(self, noise, rate, steps, delta):
        lower, estimate, upper = prv_epsilon(noise, rate, steps, delta)
        found = epsilon(poisson_gaussian(noise, rate, steps), delta)
        assert found == pytest.approx(estimate, rel=0.01)
        assert lower <= found <= upper

    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
    @pytest.mark.parametrize(
        ("noise", "rate", "steps", "delta"),
        [(1.2, 120 / 3383, 100, 1e-5), (3.0, 0.1, 512, 1e-6), (5.0, 0.9, 100, 1e-5)],
    )
    def test_fourier_accountant_agrees(self, noise, rate, steps, delta, relation):
        found = epsilon(poisson_gaussian(noise, rate, steps), delta, relation=relation)
        assert found == pytest.approx(fourier_epsilon(noise, rate, steps, delta, relation), rel=1e-4)

    @pytest.mark.parametrize(("relation", "sensitivity"), [("add_or_remove_one", 1), ("replace_one", 2)])
    @pytest.mark.parametrize(("noise", "steps", "delta"), [(1.0, 1, 1e-3), (20.0, 1000, 1e-8)])
    def test_closed_form_of_the_gaussian_without_sampling(self, relation, sensitivity, noise, steps, delta):
        exact = analytic_gaussian_epsilon(noise, delta, steps=steps, sensitivity=sensitivity)
        found = epsilon(poisson_gaussian(noise, 1, steps), delta, relation=relation)
        assert exact * (1 - 1e-9) <= found <= exact * (1 + 1e-4)

    def test_the_independent_accountants_agree_with_each_other(self):
        # Otherwise an error in one of them could hide behind a tolerance.
        exact = analytic_gaussian_epsilon(2, 1e-5, steps=10)
        assert fourier_epsilon(2, 1, 10, 1e-5, "add_or_remove_one") == pytest.approx(exact, rel=1e-5)
        assert prv_epsilon(2, 1, 10, 1e-5)[1] == pytest.approx(exact, rel=1e-5)
        assert fourier_epsilon(2, 0.3, 20, 1e-5, "add_or_remove_one") == pytest.approx(
            prv_epsilon(2, 0.3, 20, 1e-5)[1], rel=1e-5
        )


class TestShape:
    @FEW
    @given(NOISE, RATE, STEPS, DELTA)
    def test_pld_never_exceeds_rdp(self, noise, rate, steps, delta):
        assert spent("pld", noise, rate, steps, delta) <= spent("rdp", noise, rate, steps, delta)

    @FEW
    @given(NOISE, RATE, STEPS, DELTA, ACCOUNTANT, st.floats(1.02, 3))
    def test_falls_with_noise(self, noise, rate, steps, delta, accountant, factor):
        assert spent(accountant, noise * factor, rate, steps, delta) <= spent(accountant, noise, rate, steps, delta)

    @FEW
    @given(NOISE, RATE, STEPS, DELTA, ACCOUNTANT, st.integers(1, 100))
    def test_rises_with_steps(self, noise, rate, steps, delta, accountant, extra):
        assert spent(accountant, noise, rate, steps, delta) <= spent(accountant, noise, rate, steps + extra, delta)

    @FEW
    @given(NOISE, st.floats(0.005, 0.5), STEPS, DELTA, ACCOUNTANT, st.floats(1.05, 2))
    def test_rises_with_the_sampling_rate(self, noise, rate, steps, delta, accountant, factor):
        assert spent(accountant, noise, rate, steps, delta) <= spent(accountant, noise, rate * factor, steps, delta)

    @pytest.mark.parametrize("relation", RELATIONS)
    def test_rises_as_delta_falls(self, relation):
        event = poisson_gaussian(3, 0.2, 30)
        found = [epsilon(event, delta, relation=relation, pld_interval=1e-3) for delta in (1e-2, 1e-4, 1e-6, 1e-8)]
        assert found == sorted(found)
        assert found[0] < found[-1]

    @pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
    def test_replace_one_costs_more_than_add_or_remove_and_zeroing_the_same(self, rate):
        event = poisson_gaussian(3, rate, 20)
        found = {relation: epsilon(event, 1e-5, relation=relation, pld_interval=1e-3) for relation in RELATIONS}
        assert found["replace_one"] > 1.3 * found["add_or_remove_one"]
        assert found["replace_special"] == pytest.approx(found["add_or_remove_one"], rel=1e-9)

    def test_every_discretisation_is_an_upper_bound(self):
        exact = analytic_gaussian_epsilon(2, 1e-5, steps=10)
        event = poisson_gaussian(2, 1, 10)
        found = [epsilon(event, 1e-5, pld_interval=interval) for interval in (1e-2, 1e-3, 1e-4)]
        assert found == sorted(found, reverse=True)
        assert found[-1] >= exact

    @pytest.mark.parametrize("rate", [0.1, 1])
    @pytest.mark.parametrize("relation", RELATIONS)
    @pytest.mark.parametrize("accountant", ["pld", "rdp"])
    def test_without_noise_nothing_is_guaranteed(self, rate, relation, accountant):
        assert epsilon(poisson_gaussian(0, rate, 1), 1e-5, relation=relation, accountant=accountant) == math.inf


GAUSSIAN = dp_accounting.GaussianDpEvent(2.0)
FIXED_SIZE = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, GAUSSIAN)
SKELLAM = SkellamDpEvent(100.0, 10.0, 100.0)


class TestWhoAnswers:
    @pytest.mark.parametrize(
        ("event", "relation", "answers"),
        [
            (poisson_gaussian(1, 0.1, 5), "add_or_remove_one", "pld"),
            (poisson_gaussian(1, 0.1, 5), "replace_one", "pld"),
            (FIXED_SIZE, "replace_one", "pld"),
            (RevealedPoissonSampledDpEvent(0.1, GAUSSIAN), "replace_special", "pld"),
            (SKELLAM, "replace_one", "rdp"),
            (dp_accounting.ZCDpEvent(0.0, 0.1), "add_or_remove_one", "rdp"),
            (dp_accounting.SingleEpochTreeAggregationDpEvent(2.0, [3, 4]), "replace_special", "rdp"),
            # One part without a privacy loss distribution leaves all to RDP.
            (dp_accounting.ComposedDpEvent([GAUSSIAN, SKELLAM]), "replace_one", "rdp"),
        ],
    )
    def test_rdp_only_where_pld_has_no_answer(self, event, relation, answers):
        assert accountant_for(event, relation, "pld") == answers
        assert accountant_for(event, relation, "rdp") == "rdp"
        by_rdp = epsilon(event, 1e-5, relation=relation, accountant="rdp")
        found = epsilon(event, 1e-5, relation=relation)
        assert (found == by_rdp) == (answers == "rdp")
        expected = {"pld": found, "rdp": by_rdp} if answers == "pld" else {"rdp": by_rdp}
        assert epsilon_by_accountant(event, 1e-5, relation=relation) == expected

    def test_pld_alone_is_reported_where_rdp_has_no_answer(self):
        event = BallsInBinsDpEvent(4, 4, GAUSSIAN)
        assert accountant_for(event, "add_or_remove_one", "pld") == "pld"
        assert epsilon_by_accountant(event, 1e-5) == {"pld": epsilon(event, 1e-5)}

    @pytest.mark.parametrize("noise", [0.8, 3.0])
    def test_rdp_doubles_the_sensitivity_where_a_unit_is_replaced(self, noise):
        # dp-accounting 0.6 gives the value of add-or-remove under both relations.
        exact = analytic_gaussian_epsilon(noise, 1e-5, sensitivity=2)
        found = epsilon(poisson_gaussian(noise, 1, 1), 1e-5, relation="replace_one", accountant="rdp")
        assert exact < found < 1.15 * exact


class TestEvent:
    @pytest.mark.parametrize("rate", [1e-6, 0.25, 0.999999])
    def test_each_step_is_a_poisson_sample(self, rate):
        sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(1.5))
        assert poisson_gaussian(1.5, rate, 7) == dp_accounting.SelfComposedDpEvent(sampled, 7)

    def test_everybody_is_no_sample(self):
        assert poisson_gaussian(1.5, 1, 7) == dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.5), 7)

    @pytest.mark.parametrize(
        "arguments",
        [
            (-0.1, 0.5, 1),
            (math.nan, 0.5, 1),
            (1, 0, 1),
            (1, -0.1, 1),
            (1, 1.0001, 1),
            (1, math.nan, 1),
            (1, 0.5, 0),
            (1, 0.5, -3),
        ],
    )
    def test_impossible_sampling_is_refused(self, arguments):
        with pytest.raises(InputError) as refusal:
            poisson_gaussian(*arguments)
        assert is_one_sentence(str(refusal.value))


class TestRefusals:
    @pytest.mark.parametrize("delta", [0, 1, -1e-5, 1.5, math.nan, math.inf])
    def test_delta_outside_the_open_unit_interval(self, delta):
        with pytest.raises(InputError, match="delta must lie between 0 and 1") as refusal:
            epsilon(poisson_gaussian(1, 0.5, 1), delta)
        assert is_one_sentence(str(refusal.value))

    @pytest.mark.parametrize(
        ("accountant", "who"), [("pld", "no accountant has an"), ("rdp", "the RDP accountant has no")]
    )
    def test_event_that_the_accountant_cannot_analyse(self, accountant, who):
        fixed_size = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, dp_accounting.GaussianDpEvent(1.0))
        event = dp_accounting.SelfComposedDpEvent(fixed_size, 7)
        for asked in (
            lambda: epsilon(event, 1e-5, accountant=accountant),
            lambda: accountant_for(event, "add_or_remove_one", accountant),
        ):
            with pytest.raises(InputError, match=f"{who} analysis of SampledWithoutReplacementDpEvent") as refusal:
                asked()
            assert is_one_sentence(str(refusal.value))

    def test_event_that_only_pld_can_analyse(self):
        event = BallsInBinsDpEvent(4, 4, dp_accounting.GaussianDpEvent(2.0))
        with pytest.raises(InputError, match="the RDP accountant has no analysis of BallsInBinsDpEvent"):
            epsilon(event, 1e-5, accountant="rdp")

    def test_too_little_memory(self, monkeypatch):
        def out_of_memory(*arguments: object) -> float:
            raise MemoryError

        monkeypatch.setattr(accounting, "pld_epsilon", out_of_memory)
        with pytest.raises(InputError, match="needs more memory") as refusal:
            epsilon(poisson_gaussian(1, 1, 1), 1e-5)
        assert is_one_sentence(str(refusal.value))

    @pytest.mark.parametrize("name", ["PLD", "RDP", "prv"])
    def test_unknown_accountant(self, name):
        # Were it taken for RDP, replace-one would cost 4.73 here instead of 9.997.
        with pytest.raises(InputError, match=f"there is no accountant '{name}'") as refusal:
            epsilon(poisson_gaussian(1, 1, 1), 1e-5, relation="replace_one", accountant=name)
        assert is_one_sentence(str(refusal.value))

    def test_unknown_relation(self):
        with pytest.raises(InputError, match="there is no relation 'substitute'") as refusal:
            epsilon(poisson_gaussian(1, 1, 1), 1e-5, relation="substitute")
        assert is_one_sentence(str(refusal.value))
