"""The plan: sampler, clip, noise, denominator and guarantee come from one object and agree."""

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf
from guarantee_checks import (
    changed,
    check_accounting,
    check_denominator,
    check_noise_distribution,
    check_recorded_event,
    check_sensitivity,
    check_wicked_neighbours,
    check_wicked_records,
    noise,
    release,
    wicked_records,
)

from dpfl.errors import InputError
from dpfl.mechanisms import Deployment, Gaussian, NoMechanism, Plan
from dpfl.privacy import Guarantee, Privacy, accounting, epsilon, poisson_gaussian
from dpfl.privacy.events import from_dict
from dpfl.sampling import (
    BallsInBins,
    BaseSampler,
    CappedPoisson,
    Cyclic,
    CyclicPoisson,
    Everyone,
    FixedSize,
    Poisson,
)

TARGET = Privacy(epsilon=0.5, delta=1e-3)
# Milliseconds to account for where everybody takes part.
QUICK = TARGET.replace(accountant="rdp")


def planned(
    target: Privacy = TARGET, *, clip: float = 0.7, cohort: int = 20, population: int = 60, rounds: int = 4
) -> Plan:
    return Gaussian(clip_norm=clip).plan(target, Poisson(cohort=cohort), population, rounds)


def assert_extrapolates(plan: Plan, guarantee: Guarantee) -> None:
    """The plan extrapolates to a guarantee, and says that it is an extrapolation."""
    label, *assumptions = plan.extrapolated.assumptions
    assert label.startswith("This is an extrapolation")
    assert dataclasses.replace(plan.extrapolated, assumptions=tuple(assumptions)) == guarantee


def refusal(function: object, *arguments: object, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **settings)
    message = str(caught.value)
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message
    return message


class TestGaussian:
    def test_carries_what_it_was_made_of(self):
        sampler = Poisson(cohort=20)
        plan = Gaussian(clip_norm=0.7).plan(TARGET, sampler, 60, 4)
        assert plan.sampler is sampler
        assert (plan.mechanism.name, plan.population, plan.rounds, plan.clip_norm) == ("gaussian", 60, 4, 0.7)
        assert plan.mechanism == Gaussian(clip_norm=0.7)
        assert plan.target is TARGET
        assert plan.expected_cohort == 20
        assert plan.extrapolated is None
        assert plan.is_private

    def test_the_guarantee_is_what_the_accountant_finds_for_the_plan(self):
        plan = planned()
        event = poisson_gaussian(plan.noise_multiplier, 20 / 60, plan.rounds)
        assert plan.event() == event
        assert plan.guarantee.epsilon == epsilon(event, 1e-3)
        assert 0.999 * 0.5 <= plan.guarantee.epsilon <= 0.5

    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
    @pytest.mark.parametrize(("cohort", "rounds"), [(6, 30), (60, 3)])
    def test_the_guarantee_is_what_an_independent_accountant_finds(self, relation, cohort, rounds):
        plan = planned(Privacy(epsilon=0.8, delta=1e-3, relation=relation), cohort=cohort, rounds=rounds)
        check_accounting(plan)
        assert 0.999 * 0.8 <= plan.guarantee.epsilon <= 0.8

    def test_the_guarantee_repeats_the_target(self):
        made = planned(TARGET.replace(relation="replace_special")).guarantee
        assert (made.unit, made.relation, made.delta, made.steps) == ("user", "replace_special", 1e-3, 4)
        assert made.accountant == "pld"
        assert made.accounted_by.startswith("PLD (dpfl ")

    def test_the_statement_names_noise_clip_and_sampling(self):
        plan = planned()
        text = plan.guarantee.statement()
        assert f"noise multiplier {plan.noise_multiplier:g} " in text
        assert "clipped to L2 norm 0.7 in each of 4 rounds" in text
        assert "Poisson sample of the 60 clients at rate 0.333333 (expected cohort 20)" in text
        json.dumps(plan.guarantee.as_dict(), allow_nan=False)

    def test_the_accountant_is_the_targets(self):
        plan = planned(TARGET.replace(accountant="rdp"), cohort=60)
        assert plan.guarantee.accountant == "rdp"
        assert plan.guarantee.accounted_by.startswith("RDP (dpfl ")
        assert plan.noise_multiplier > planned(cohort=60).noise_multiplier

    def test_noise_grows_with_the_clip_and_the_multiplier_does_not(self):
        for clip in (0.01, 0.7, 50):
            plan = planned(clip=clip)
            assert plan.noise_multiplier == planned().noise_multiplier
            state = plan.query(0).initial_global_state().numerator_state
            assert state.stddev.numpy() == np.float32(plan.noise_multiplier * clip)

    def test_more_is_charged_for_more(self):
        base = planned(QUICK, cohort=60).noise_multiplier
        assert planned(QUICK, cohort=60, rounds=5).noise_multiplier > base
        assert planned(QUICK.replace(epsilon=0.49), cohort=60).noise_multiplier > base
        assert planned(QUICK.replace(delta=9e-4), cohort=60).noise_multiplier > base
        assert planned().noise_multiplier < planned(cohort=21).noise_multiplier < base

    @pytest.mark.parametrize("clip", [0, -1, math.nan, math.inf, -math.inf, 1e-25, 0.99e-9, 1.01e9, 1e39])
    def test_impossible_clip_is_refused(self, clip):
        # Squares of updates near 1e-25 underflow in float32, so that nothing would be clipped; it has no 1e39.
        assert refusal(Gaussian, clip_norm=clip).startswith("the clip norm must be a positive number between 1e-09 and")

    def test_weak_delta_is_refused_unless_allowed(self):
        weak = QUICK.replace(delta=1 / 60)
        assert "is no privacy for 60 clients" in refusal(planned, weak)
        assert planned(weak.replace(allow_weak_delta=True), cohort=60).is_private
        assert planned(weak, cohort=59, population=59).is_private

    def test_weak_delta_is_no_matter_without_noise(self):
        assert not planned(Privacy(epsilon=None, delta=0.5)).is_private

    def test_cohort_beyond_the_population_is_refused(self):
        assert "cohort of 61 exceeds the 60 clients" in refusal(planned, cohort=61)
        assert "cohort of 61 exceeds the 60 clients" in refusal(planned, Privacy(epsilon=None), cohort=61)

    @pytest.mark.parametrize("rounds", [0, -1])
    def test_no_rounds_are_refused(self, rounds):
        message = f"a whole number of rounds from 1 to 1,000,000,000 must be planned, but it was {rounds}."
        assert refusal(planned, rounds=rounds) == message
        assert refusal(planned, Privacy(epsilon=None), rounds=rounds) == message

    def test_epsilon_beyond_protection_is_refused(self):
        assert refusal(TARGET.replace, epsilon=101).startswith("epsilon must be a positive number up to 100")

    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "replace_special"])
    def test_without_an_epsilon_updates_are_clipped_and_nothing_is_promised(self, relation):
        plan = planned(Privacy(epsilon=None, relation=relation))
        assert (plan.noise_multiplier, plan.clip_norm) == (0, 0.7)
        assert plan.query(0).initial_global_state().numerator_state.stddev.numpy() == 0
        assert plan.guarantee.epsilon == math.inf
        assert not plan.is_private
        assert plan.guarantee.statement().startswith("No differential privacy")
        template, records = wicked_records(0.7)
        released, _ = release(plan.query(0), records[7:8], template)
        assert math.isclose(math.sqrt(sum(np.sum(p**2) for p in tf.nest.flatten(released))), 0.7 / 20, rel_tol=1e-5)

    @pytest.mark.parametrize("clip", [1e-9, 1e9])
    def test_the_extreme_clips_are_kept(self, clip):
        plan = planned(clip=clip)
        check_wicked_records(plan)
        check_wicked_neighbours(plan)
        check_noise_distribution(plan)


# With the relation that each has an analysis under.
SAMPLERS = {
    "poisson": (Poisson(cohort=20), "add_or_remove_one"),
    "capped_poisson": (CappedPoisson(cohort=20), "add_or_remove_one"),
    "capped_poisson, low": (CappedPoisson(cohort=20, cap=25), "replace_special"),
    "fixed_size": (FixedSize(cohort=20), "replace_one"),
    "everyone": (Everyone(), "replace_one"),
    "cyclic": (Cyclic(cohort=25), "add_or_remove_one"),
    "cyclic_poisson": (CyclicPoisson(cohort=6, groups=5), "replace_special"),
    "balls_in_bins": (BallsInBins(cohort=20), "add_or_remove_one"),
}


@pytest.mark.parametrize(("sampler", "relation"), SAMPLERS.values(), ids=SAMPLERS.keys())
class TestWithEverySampler:
    def plan(self, sampler: BaseSampler, relation: Any, **settings: Any) -> Plan:
        target = Privacy(epsilon=3, delta=1e-3, relation=relation).replace(**settings)
        return Gaussian(clip_norm=0.7).plan(target, sampler, 60, 7)

    def test_the_noise_is_enough_and_hardly_more(self, sampler, relation):
        plan = self.plan(sampler, relation)
        assert 0.995 * 3 <= plan.guarantee.epsilon <= 3
        check_recorded_event(plan)

    def test_the_event_is_the_samplers_with_the_plans_noise_and_rounds(self, sampler, relation):
        plan = self.plan(sampler, relation)
        gaussian = poisson_gaussian(plan.noise_multiplier, 1, 1).event
        assert plan.event() == sampler.event(gaussian, 60, 7)
        for rounds in (1, 2, 7):
            assert plan.event(rounds) == sampler.event(gaussian, 60, rounds)

    def test_sums_are_divided_by_the_expected_cohort(self, sampler, relation):
        plan = self.plan(sampler, relation, epsilon=None)
        assert plan.expected_cohort == sampler.expected_cohort(60)
        assert plan.query(0).initial_global_state().denominator.numpy() == np.float32(sampler.expected_cohort(60))
        check_denominator(plan)

    def test_the_statement_says_how_clients_are_drawn(self, sampler, relation):
        text = self.plan(sampler, relation).guarantee.statement()
        assert sampler.in_words(60) in text
        assert f"(relation {relation})" in text

    def test_relations_without_an_analysis_are_refused(self, sampler, relation):
        for other in {"add_or_remove_one", "replace_one", "replace_special"} - set(sampler.relations):
            message = refusal(self.plan, sampler, other)
            assert message.startswith(f"the sampler {sampler.name} has no known analysis under the relation {other}")
            # Without noise nothing is analysed.
            assert not self.plan(sampler, other, epsilon=None).is_private


class TestFixedNoise:
    def plan(self, noise: float = 1.1, *, rounds: int = 12, sampler: BaseSampler | None = None, **target: Any) -> Plan:
        mechanism = Gaussian(clip_norm=0.7, noise_multiplier=noise)
        wanted = Privacy(**{"epsilon": None, "delta": 1e-3, **target})
        return mechanism.plan(wanted, sampler or Poisson(cohort=20), 60, rounds)

    def test_without_a_target_its_epsilon_is_stated(self):
        plan = self.plan()
        assert (plan.noise_multiplier, plan.rounds) == (1.1, 12)
        assert plan.guarantee.epsilon == epsilon(poisson_gaussian(1.1, 1 / 3, 12), 1e-3)
        assert plan.is_private
        assert plan.guarantee.assumptions
        check_accounting(plan)
        check_recorded_event(plan)
        check_noise_distribution(plan)

    def test_without_a_target_the_delta_must_not_be_weak(self):
        assert "is no privacy for 60 clients" in refusal(self.plan, delta=0.5)

    def test_without_a_target_the_relation_must_have_an_analysis(self):
        assert "no known analysis" in refusal(lambda: self.plan(sampler=FixedSize(cohort=20)))

    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "replace_special"])
    @pytest.mark.parametrize("accountant", ["pld", "rdp"])
    def test_a_budget_ends_training_before_the_round_that_exceeds_it(self, relation, accountant):
        analysis = {"relation": relation, "accountant": accountant}
        plan = self.plan(rounds=1000, epsilon=8, **analysis)
        assert 1 < plan.rounds < 1000
        assert plan.guarantee.steps == plan.rounds
        assert plan.guarantee.epsilon <= 8 < epsilon(plan.event(plan.rounds + 1), 1e-3, **analysis)
        check_recorded_event(plan)

    @pytest.mark.parametrize(
        "sampler", [Cyclic(cohort=20), BallsInBins(cohort=20), Everyone(), CyclicPoisson(cohort=5, groups=3)]
    )
    def test_a_budget_with_samplers_whose_cost_is_a_staircase(self, sampler):
        plan = self.plan(rounds=500, sampler=sampler, epsilon=8)
        assert plan.rounds < 500
        assert plan.guarantee.epsilon <= 8 < epsilon(plan.event(plan.rounds + 1), 1e-3)

    def test_a_budget_that_suffices_cuts_nothing(self):
        free = self.plan(rounds=12)
        plan = self.plan(rounds=12, epsilon=round(free.guarantee.epsilon + 0.1, 3))
        assert plan.rounds == 12
        assert plan.guarantee.epsilon == free.guarantee.epsilon
        assert self.plan(rounds=12, epsilon=free.guarantee.epsilon).rounds == 12

    def test_a_budget_below_one_round_is_refused(self):
        one = self.plan(rounds=1).guarantee.epsilon
        assert self.plan(rounds=5, epsilon=one * 1.001).rounds == 1
        message = refusal(lambda: self.plan(rounds=5, epsilon=one * 0.99))
        assert "epsilon" in message

    @pytest.mark.parametrize("noise", [0, 0.009, -1, math.nan, math.inf])
    def test_impossible_noise_is_refused(self, noise):
        assert refusal(self.plan, noise).startswith(
            "the noise multiplier must be at least 0.01 and at most 1e+09, but it was"
        )


class TestDeployment:
    DEPLOYMENT = Deployment(clients=100_000, cohort=1000)

    def plan(self, deployment: Deployment | None = DEPLOYMENT, **settings: Any) -> Plan:
        target = Privacy(epsilon=2, delta=1e-6).replace(**settings)
        return Gaussian(clip_norm=0.7).plan(target, Poisson(cohort=20), 60, 10, deployment=deployment)

    def test_the_mean_has_as_much_noise_as_the_deployments(self):
        plan = self.plan()
        deployed = Gaussian(clip_norm=0.7).plan(plan.target, Poisson(cohort=1000), 100_000, 10)
        assert plan.noise_multiplier / 20 == pytest.approx(deployed.noise_multiplier / 1000, rel=1e-12)
        for ours, theirs in zip(noise(plan, 3, 2, [(50,)]), noise(deployed, 3, 2, [(50,)]), strict=True):
            np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)

    def test_states_what_each_of_the_two_guarantees(self):
        plan = self.plan()
        deployed = Gaussian(clip_norm=0.7).plan(plan.target, Poisson(cohort=1000), 100_000, 10)
        assert_extrapolates(plan, deployed.guarantee)
        assert 0.995 * 2 <= plan.extrapolated.epsilon <= 2
        assert "100000 clients" in plan.extrapolated.statement()
        assert "60 clients" in plan.guarantee.statement()
        assert plan.guarantee.epsilon > 2 * plan.extrapolated.epsilon

    def test_the_guarantee_is_what_the_simulation_really_does(self):
        plan = self.plan()
        assert (plan.population, plan.expected_cohort, plan.rounds) == (60, 20, 10)
        assert plan.sampler == Poisson(cohort=20)
        assert plan.event() == poisson_gaussian(plan.noise_multiplier, 1 / 3, 10)
        check_recorded_event(plan)
        recorded = from_dict(plan.extrapolated.event)
        assert epsilon(recorded, 1e-6) == plan.extrapolated.epsilon
        check_noise_distribution(plan)
        check_wicked_neighbours(plan)

    def test_the_target_stays(self):
        plan = self.plan()
        assert plan.target == Privacy(epsilon=2, delta=1e-6)
        assert (plan.guarantee.delta, plan.guarantee.relation) == (1e-6, "add_or_remove_one")
        assert (plan.extrapolated.accountant, plan.extrapolated.delta) == ("pld", 1e-6)

    def test_so_little_noise_that_nobody_is_protected_is_stated_all_the_same(self):
        plan = self.plan(Deployment(clients=10_000_000, cohort=100_000), delta=1e-8)
        larger = Poisson(cohort=100_000)
        deployed = Gaussian(clip_norm=0.7).plan(plan.target, larger, 10_000_000, plan.rounds)
        assert plan.noise_multiplier == pytest.approx(deployed.noise_multiplier * 20 / 100_000)
        assert plan.extrapolated.epsilon <= 2
        assert plan.guarantee.epsilon > 100

    def test_a_smaller_deployment_is_refused(self):
        message = refusal(self.plan, Deployment(clients=60, cohort=10), delta=1e-3)
        assert message == "the deployment's expected cohort must be at least the simulated one, 20, but it was 10."

    def test_the_accountant_is_the_targets_unless_there_is_too_little_noise_for_it(self):
        much, little = self.plan(Deployment(clients=600, cohort=40), delta=1e-4), self.plan(delta=1e-8)
        assert (much.guarantee.accountant, little.guarantee.accountant) == ("pld", "rdp")

    def test_of_the_same_size_changes_nothing(self):
        plan, plain = self.plan(Deployment(clients=60, cohort=20), delta=1e-3), self.plan(None, delta=1e-3)
        assert plan.noise_multiplier == plain.noise_multiplier
        assert_extrapolates(plan, plain.guarantee)

    def test_a_delta_too_weak_for_the_deployment_is_refused(self):
        assert "is no privacy for 100000 clients" in refusal(self.plan, delta=1e-3)

    def test_a_cohort_beyond_the_deployment_is_refused(self):
        assert "cohort of 1000 exceeds the 500 clients" in refusal(self.plan, Deployment(clients=500, cohort=1000))

    def test_without_a_target_there_is_no_noise(self):
        plan = self.plan(epsilon=None)
        assert plan.noise_multiplier == 0
        assert not plan.is_private
        assert plan.extrapolated is not None
        assert plan.extrapolated.epsilon == math.inf

    def test_a_fixed_noise_is_the_deployments(self):
        fixed = Gaussian(clip_norm=0.7, noise_multiplier=5.0)
        plan = fixed.plan(
            Privacy(epsilon=None, delta=1e-6),
            Poisson(cohort=20),
            60,
            10,
            deployment=Deployment(clients=5000, cohort=200),
        )
        assert plan.noise_multiplier == pytest.approx(0.5, rel=1e-12)
        assert plan.extrapolated.epsilon == epsilon(poisson_gaussian(5.0, 0.04, 10), 1e-6)

    def test_a_budget_cuts_the_rounds_of_both(self):
        fixed = Gaussian(clip_norm=0.7, noise_multiplier=2.0)
        plan = fixed.plan(
            Privacy(epsilon=1, delta=1e-6),
            Poisson(cohort=20),
            60,
            5000,
            deployment=Deployment(clients=5000, cohort=200),
        )
        assert 1 < plan.rounds < 5000
        assert plan.guarantee.steps == plan.extrapolated.steps == plan.rounds
        assert plan.extrapolated.epsilon <= 1 < epsilon(poisson_gaussian(2.0, 0.04, plan.rounds + 1), 1e-6)

    @pytest.mark.parametrize(
        "kind", [pytest.param(CappedPoisson, marks=pytest.mark.slow), FixedSize, Cyclic, BallsInBins]
    )
    def test_with_other_samplers(self, kind):
        relation = "replace_one" if kind is FixedSize else "replace_special"
        plan = Gaussian(clip_norm=0.7).plan(
            Privacy(epsilon=4, delta=1e-5, relation=relation),
            kind(cohort=20),
            60,
            6,
            deployment=Deployment(clients=2000, cohort=100),
        )
        assert plan.noise_multiplier > 0
        assert 0.995 * 4 <= plan.extrapolated.epsilon <= 4 < plan.guarantee.epsilon
        check_recorded_event(plan)

    def test_with_everyone(self):
        target = Privacy(epsilon=4, delta=1e-5)
        plan = Gaussian(clip_norm=0.7).plan(target, Everyone(), 60, 6, deployment=Deployment(clients=600))
        everybody = Gaussian(clip_norm=0.7).plan(target, Everyone(), 600, 6)
        assert plan.noise_multiplier == pytest.approx(everybody.noise_multiplier / 10, rel=1e-12)
        assert_extrapolates(plan, everybody.guarantee)
        message = refusal(
            lambda: Gaussian(clip_norm=0.7).plan(
                target, Everyone(), 60, 6, deployment=Deployment(clients=600, cohort=6)
            )
        )
        assert message == "the sampler everyone takes everyone: leave the deployment's cohort out."

    def test_a_missing_cohort_is_refused(self):
        message = refusal(self.plan, Deployment(clients=600))
        assert message == "the sampler poisson needs the deployment's cohort: give it a number of clients."

    def test_a_cap_of_the_simulation_is_not_the_deployments(self):
        target = Privacy(epsilon=2, delta=1e-6)
        message = refusal(
            lambda: Gaussian(clip_norm=0.7).plan(
                target, CappedPoisson(cohort=20, cap=30), 60, 6, deployment=self.DEPLOYMENT
            )
        )
        assert message.startswith("the cap of 30 is for the simulated cohort: leave the cap out")

    @pytest.mark.parametrize("settings", [{"clients": 0}, {"clients": 5, "cohort": 0}, {"clients": 2.5}, {"cohort": 5}])
    def test_impossible_deployments_are_refused(self, settings):
        refusal_of = pytest.raises(InputError)
        with refusal_of as caught:
            Deployment(**settings)
        assert "clients" in str(caught.value) or "cohort" in str(caught.value)


class TestPerLayerClipping:
    @pytest.mark.parametrize("clipping", ["per_layer", "per_layer_by_size"])
    def test_has_the_sensitivity_noise_and_cost_of_flat_clipping(self, clipping):
        mechanism = Gaussian(clip_norm=0.7, clipping=clipping)
        plan = mechanism.plan(TARGET, Poisson(cohort=20), 60, 4)
        assert plan.noise_multiplier == planned().noise_multiplier
        assert plan.guarantee.epsilon == planned().guarantee.epsilon
        assert plan.event() == planned().event()
        check_recorded_event(plan)
        check_wicked_neighbours(plan)
        check_noise_distribution(plan)
        template, records = wicked_records(0.7)
        check_sensitivity(plan, template, records[:6], others=records[6:])

    @pytest.mark.parametrize("clipping", ["per_layer", "per_layer_by_size"])
    def test_is_named(self, clipping):
        plan = changed(planned(), mechanism=Gaussian(clip_norm=0.7, clipping=clipping))
        assert "shares for each tensor" in plan.mechanism.in_words(1.0)
        assert plan.structure == ("gaussian", clipping)

    def test_another_kind_is_refused(self):
        with pytest.raises(InputError, match="clipping should be "):
            Gaussian(clip_norm=1, clipping="by_tensor")


class TestNoMechanism:
    def plan(self, **settings: int) -> Plan:
        values = {"cohort": 20, "population": 60, "rounds": 4, **settings}
        return NoMechanism().plan(
            Privacy(epsilon=None), Poisson(cohort=values["cohort"]), values["population"], values["rounds"]
        )

    def test_promises_nothing(self):
        plan = self.plan()
        assert (plan.mechanism.name, plan.noise_multiplier, plan.clip_norm) == ("none", 0, math.inf)
        assert plan.query(0).initial_global_state().numerator_state.stddev.numpy() == 0
        assert plan.extrapolated is None
        assert plan.guarantee.epsilon == math.inf
        assert not plan.is_private
        assert plan.guarantee.statement().startswith("No differential privacy")
        json.dumps(plan.guarantee.as_dict(), allow_nan=False)

    def test_refuses_an_epsilon(self):
        message = refusal(NoMechanism().plan, Privacy(epsilon=8), Poisson(cohort=20), 60, 4)
        assert message.startswith("the mechanism none cannot keep epsilon 8")

    def test_refuses_a_cohort_beyond_the_population(self):
        assert "cohort of 61 exceeds the 60 clients" in refusal(self.plan, cohort=61)

    def test_divides_the_exact_sum_by_the_expected_cohort(self):
        updates = [np.float32([1e6, -3]), np.float32([2e6, 5]), np.float32([0, 0])]
        released, state = release(self.plan().query(0), [[update] for update in updates], [tf.zeros(2)])
        np.testing.assert_allclose(released[0], np.float32([3e6, 2]) / 20)
        np.testing.assert_array_equal(release(self.plan().query(0), [], [tf.zeros(2)], state)[0][0], [0, 0])

    def test_counts_a_diverged_client_as_zero(self):
        updates = [np.float32([np.nan, 1]), np.float32([1, 2]), np.float32([np.inf, 1])]
        released, _ = release(self.plan().query(0), [[update] for update in updates], [tf.zeros(2)])
        np.testing.assert_allclose(released[0], np.float32([1, 2]) / 20)


class TestWeightsByExamples:
    """Their mean, which no mechanism with a guarantee has."""

    def query(self) -> Any:
        return NoMechanism(weighting="examples").plan(Privacy(epsilon=None), Poisson(cohort=20), 60, 4).query(0)

    def mean(self, updates: list[np.ndarray], examples: list[int]) -> np.ndarray:
        query = self.query()
        state = query.initial_global_state()
        params, total = query.derive_sample_params(state), query.initial_sample_state([tf.zeros(2)])
        for client, (update, count) in enumerate(zip(updates, examples, strict=True)):
            of_client = query.client_params(params, tf.constant(client), tf.constant(count))
            total = query.accumulate_preprocessed_record(total, query.preprocess_record(of_client, [update]))
        result, after, event = query.get_noised_result(total, state)
        assert after == state
        assert isinstance(event, dp_accounting.NonPrivateDpEvent)
        return result[0].numpy()

    def test_is_divided_by_the_weights_of_those_who_came(self):
        updates = [np.float32([1e6, -3]), np.float32([2e6, 5]), np.float32([0, 0])]
        np.testing.assert_allclose(self.mean(updates, [1, 3, 4]), [7e6 / 8, 12 / 8], rtol=1e-6)
        np.testing.assert_array_equal(self.mean([], []), [0, 0])

    def test_a_diverged_client_counts_as_absent(self):
        updates = [np.float32([np.nan, 1]), np.float32([1, 2]), np.float32([np.inf, 1])]
        np.testing.assert_array_equal(self.mean(updates, [5, 3, 7]), [1, 2])
        np.testing.assert_array_equal(self.mean(updates[:1], [5]), [0, 0])

    def test_whoever_does_not_say_how_many_examples_is_refused(self):
        query = self.query()
        message = refusal(query.preprocess_record, query.derive_sample_params(()), [np.float32([1, 2])])
        assert "tff.aggregators.MeanFactory()" in message

    def test_mechanisms_with_noise_do_not_know_them(self):
        assert "'weighting' is not a setting of Gaussian" in refusal(Gaussian, clip_norm=1, weighting="examples")
        query = planned().query(0)
        params = query.derive_sample_params(query.initial_global_state())
        assert query.client_params(params, tf.constant(3), tf.constant(1000)) is params


class TestPlan:
    def test_is_immutable(self, plan):
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.noise_multiplier = 0.0

    def test_is_the_same_when_made_again(self):
        assert planned() == planned()

    def test_needs_no_tensorflow_before_its_query(self):
        code = (
            "import sys; from dpfl.mechanisms import Gaussian; from dpfl.privacy import Privacy\n"
            "from dpfl.sampling import Poisson\n"
            "plan = Gaussian(clip_norm=1).plan(Privacy(epsilon=None), Poisson(cohort=2), 4, 3)\n"
            "plan.guarantee.statement(), plan.sampler.clients(0, 0, 4)\n"
            "sys.exit('tensorflow' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_all_that_a_reader_needs_is_in_the_guarantees_json(self, plan):
        check_recorded_event(plan)
        again = Guarantee.from_json(plan.guarantee.to_json())
        assert again == plan.guarantee
        assert accounting.epsilon(from_dict(again.event), again.delta) == plan.guarantee.epsilon

    def test_plans_that_differ_in_numbers_share_a_structure(self):
        other = planned(TARGET.replace(epsilon=0.7), clip=0.3, cohort=21, rounds=9)
        assert other.structure == planned().structure == ("gaussian", "flat")
        weightings = [NoMechanism(weighting=weighting) for weighting in ("equal", "examples")]
        plans = [mechanism.plan(Privacy(epsilon=None), Poisson(cohort=2), 60, 1) for mechanism in weightings]
        assert [plan.structure for plan in plans] == [("none", "equal"), ("none", "examples")]

    def test_the_template_is_optional_and_changes_nothing(self, plan):
        template, record = [tf.zeros(3)], [np.float32([1, 2, 3])]
        without, _ = release(plan.query(3), [record], template)
        with_it, _ = release(plan.query(3, template), [record], template)
        np.testing.assert_array_equal(without[0], with_it[0])
