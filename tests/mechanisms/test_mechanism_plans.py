"""The plan: sampler, clip, noise, denominator and guarantee come from one object and agree."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from guarantee_checks import (
    check_accounting,
    check_noise_distribution,
    check_wicked_neighbours,
    check_wicked_records,
    release,
    wicked_records,
)

from dpfl.errors import InputError
from dpfl.mechanisms import Gaussian, NoMechanism, Plan
from dpfl.privacy import Privacy, epsilon, poisson_gaussian
from dpfl.sampling import Poisson

TARGET = Privacy(epsilon=0.5, delta=1e-3)
# Milliseconds to account for where everybody takes part.
QUICK = TARGET.replace(accountant="rdp")


def planned(
    target: Privacy = TARGET, *, clip: float = 0.7, cohort: int = 20, population: int = 60, rounds: int = 4
) -> Plan:
    return Gaussian(clip_norm=clip).plan(target, Poisson(cohort=cohort), population, rounds)


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
        assert (plan.mechanism, plan.population, plan.rounds, plan.clip_norm) == ("gaussian", 60, 4, 0.7)
        assert plan.sampling_rate == 20 / 60
        assert plan.is_private

    def test_the_guarantee_is_what_the_accountant_finds_for_the_plan(self):
        plan = planned()
        event = poisson_gaussian(plan.noise_multiplier, plan.sampling_rate, plan.rounds)
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
        assert made.accountant.startswith("PLD (dp-accounting ")

    def test_the_statement_names_noise_clip_and_sampling(self):
        plan = planned()
        text = plan.guarantee.statement()
        assert f"noise multiplier {plan.noise_multiplier:g} " in text
        assert "clipped to L2 norm 0.7 in each of 4 rounds" in text
        assert "Poisson sample of the 60 clients at rate 0.333333 (expected cohort 20)" in text
        json.dumps(plan.guarantee.as_dict(), allow_nan=False)

    def test_the_accountant_is_the_targets(self):
        plan = planned(TARGET.replace(accountant="rdp"), cohort=60)
        assert plan.guarantee.accountant.startswith("RDP (dp-accounting ")
        assert plan.noise_multiplier > planned(cohort=60).noise_multiplier

    def test_noise_grows_with_the_clip_and_the_multiplier_does_not(self):
        for clip in (0.01, 0.7, 50):
            plan = planned(clip=clip)
            assert plan.noise_multiplier == planned().noise_multiplier
            assert plan.noise_stddev == plan.noise_multiplier * clip

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
        assert refusal(planned, rounds=rounds).startswith("at least 1 step must be released")

    def test_epsilon_beyond_protection_is_refused(self):
        assert refusal(TARGET.replace, epsilon=101).startswith("epsilon must be a positive number up to 100")

    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "replace_special"])
    def test_without_an_epsilon_updates_are_clipped_and_nothing_is_promised(self, relation):
        plan = planned(Privacy(epsilon=None, relation=relation))
        assert (plan.noise_multiplier, plan.noise_stddev, plan.clip_norm) == (0, 0, 0.7)
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


class TestNoMechanism:
    def plan(self, **settings: int) -> Plan:
        values = {"cohort": 20, "population": 60, "rounds": 4, **settings}
        return NoMechanism().plan(
            Privacy(epsilon=None), Poisson(cohort=values["cohort"]), values["population"], values["rounds"]
        )

    def test_promises_nothing(self):
        plan = self.plan()
        assert (plan.mechanism, plan.noise_multiplier, plan.noise_stddev, plan.clip_norm) == ("none", 0, 0, math.inf)
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
