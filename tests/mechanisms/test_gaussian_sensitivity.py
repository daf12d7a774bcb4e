"""However wicked the updates, a client moves the un-noised mean by at most clip / cohort."""

import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from guarantee_checks import changed, check_clipping, check_denominator, check_sensitivity, release, unnoised_mean
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfl.mechanisms import Gaussian, Plan
from dpfl.privacy import Privacy
from dpfl.sampling import Poisson

SETTINGS = settings(max_examples=30, deadline=None, derandomize=True, database=None)
ORDINARY = st.floats(-3, 3, width=32)
ANYTHING = st.one_of(
    ORDINARY,
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-45, 1e-30, 1e15, -1e18, 1e30, -3e38, math.nan, math.inf, -math.inf]),
)
SHAPES = st.lists(
    st.sampled_from([(), (1,), (5,), (2, 3), (1, 2, 2)]),
    min_size=1,
    max_size=4,
)
CLIPS = st.sampled_from([1e-6, 0.01, 0.7, 1.0, 3.5, 1e4])
COHORTS = st.sampled_from([1, 3, 20, 1000])
PER_LAYER = st.sampled_from(["per_layer", "per_layer_by_size"])
UNPROTECTED = Gaussian(clip_norm=1).plan(Privacy(epsilon=None), Poisson(cohort=1), 1000, 1)


def plan_of(clip: float, cohort: int, clipping: str = "flat") -> Plan:
    return changed(UNPROTECTED, mechanism=Gaussian(clip_norm=clip, clipping=clipping), cohort=cohort)


def nested(parts: list[Any], kind: str) -> Any:
    """The parts of an update as the structure that a model could have."""
    if kind == "dict":
        return {f"layer_{index}": part for index, part in enumerate(parts)}
    if kind == "nested":
        return {"first": parts[0], "rest": (list(parts[1:]), {})}
    return parts if kind == "list" else tuple(parts)


@st.composite
def cohorts(draw: st.DrawFn, values: st.SearchStrategy[float], size: int) -> tuple[Any, list[Any]]:
    """A template and some updates of one random structure."""
    shapes, kind = draw(SHAPES), draw(st.sampled_from(["list", "tuple", "dict", "nested"]))
    arrays = [
        st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)).map(
            lambda drawn, shape=shape: np.array(drawn, np.float32).reshape(shape)
        )
        for shape in shapes
    ]
    updates = [nested([draw(array) for array in arrays], kind) for _ in range(size)]
    return nested([tf.zeros(shape) for shape in shapes], kind), updates


class TestSensitivity:
    @SETTINGS
    @given(CLIPS, COHORTS, cohorts(ANYTHING, size=4))
    def test_of_any_updates(self, clip, cohort, drawn):
        template, updates = drawn
        check_sensitivity(plan_of(clip, cohort), template, updates[:3], others=updates[3:])

    @SETTINGS
    @given(CLIPS, COHORTS, cohorts(ORDINARY, size=4))
    def test_of_ordinary_updates(self, clip, cohort, drawn):
        template, updates = drawn
        check_sensitivity(plan_of(clip, cohort), template, updates[:3], others=updates[3:])

    def test_is_reached(self):
        # The bound is tight, so a looser clip would be seen.
        update, opposite = [np.float32([30, 40])], [np.float32([-30, -40])]
        mean = [unnoised_mean(plan_of(0.7, 20), records, [tf.zeros(2)]) for records in ([update], [opposite], [])]
        assert np.linalg.norm(mean[0] - mean[2]) == pytest.approx(0.7 / 20, rel=1e-5)
        assert np.linalg.norm(mean[0] - mean[1]) == pytest.approx(1.4 / 20, rel=1e-5)


class TestClipping:
    @SETTINGS
    @given(CLIPS, COHORTS, cohorts(ANYTHING, size=3))
    def test_of_any_updates(self, clip, cohort, drawn):
        check_clipping(plan_of(clip, cohort), *drawn)

    @SETTINGS
    @given(CLIPS, cohorts(ORDINARY, size=3))
    def test_of_ordinary_updates(self, clip, drawn):
        check_clipping(plan_of(clip, 20), *drawn)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
    @pytest.mark.parametrize("place", [0, 4, 5])
    def test_a_non_finite_update_contributes_exactly_zero(self, value, place):
        template, good = [tf.zeros(5), tf.zeros(())], [np.float32([0.1, -0.2, 0.3, 0, 0]), np.float32(0.1)]
        bad = [part.copy() for part in good]
        if place == 5:
            bad[1] = np.float32(value)
        else:
            bad[0][place] = value
        plan = plan_of(0.7, 20)
        assert not unnoised_mean(plan, [bad], template).any()
        np.testing.assert_array_equal(
            unnoised_mean(plan, [good, bad, good], template), unnoised_mean(plan, [good, good], template)
        )

    def test_all_tensors_are_clipped_together(self):
        update = [np.float32([0.7]), np.float32([[0.7, 0.7]])]
        contribution = unnoised_mean(plan_of(0.7, 1), [update], [tf.zeros(1), tf.zeros((1, 2))])
        np.testing.assert_allclose(contribution, 0.7 / math.sqrt(3), rtol=1e-6)

    def test_an_update_just_at_the_clip_is_unchanged(self):
        update = [np.float32([0.25, 0.25, 0.25, 0.25])]
        np.testing.assert_array_equal(unnoised_mean(plan_of(0.5, 1), [update], [tf.zeros(4)]), 0.25)


class TestPerLayerClipping:
    @SETTINGS
    @given(CLIPS, COHORTS, PER_LAYER, cohorts(ANYTHING, size=4))
    def test_sensitivity_to_any_updates(self, clip, cohort, clipping, drawn):
        template, updates = drawn
        check_sensitivity(plan_of(clip, cohort, clipping), template, updates[:3], others=updates[3:])

    @SETTINGS
    @given(CLIPS, COHORTS, PER_LAYER, cohorts(ORDINARY, size=4))
    def test_sensitivity_to_ordinary_updates(self, clip, cohort, clipping, drawn):
        template, updates = drawn
        check_sensitivity(plan_of(clip, cohort, clipping), template, updates[:3], others=updates[3:])

    @SETTINGS
    @given(CLIPS, PER_LAYER, cohorts(ANYTHING, size=1))
    def test_each_tensor_keeps_its_direction_and_at_most_its_share(self, clip, clipping, drawn):
        template, (update,) = drawn
        received, _ = release(plan_of(clip, 1, clipping).query(0), [update], template)
        sent, came = (tf.nest.flatten(record) for record in (update, received))
        with np.errstate(over="ignore", invalid="ignore"):
            norms = [float(np.sqrt(np.sum(np.square(part)))) for part in sent]
            whole = math.sqrt(sum(norm**2 for norm in norms))
        if not whole < np.finfo(np.float32).max ** 0.5:
            assert all(not part.any() for part in came)
            return
        sizes = [part.size if "size" in clipping else 1 for part in sent]
        shares = [clip * math.sqrt(size / sum(sizes)) for size in sizes]
        for part, kept, norm, share in zip(sent, came, norms, shares, strict=True):
            np.testing.assert_allclose(kept, part * min(1, share / max(norm, 1e-30)), rtol=1e-5, atol=1e-36)

    @pytest.mark.parametrize(
        ("clipping", "shares"),
        [
            ("flat", (0.5, 0.5 * math.sqrt(3))),
            ("per_layer", (0.5**0.5, 0.5**0.5)),
            ("per_layer_by_size", (0.5, 0.75**0.5)),
        ],
    )
    def test_shares(self, clipping, shares):
        update = [np.full(1, 30, np.float32), np.full(3, -30, np.float32)]
        received, _ = release(plan_of(1.0, 1, clipping).query(0), [update], [tf.zeros(1), tf.zeros(3)])
        np.testing.assert_allclose([np.linalg.norm(part) for part in received], shares, rtol=1e-6)

    @pytest.mark.parametrize("clipping", ["per_layer", "per_layer_by_size"])
    def test_a_non_finite_tensor_leaves_nothing_of_the_update(self, clipping):
        template = [tf.zeros(2), tf.zeros(3)]
        for bad in (math.nan, math.inf, 1e30):
            update = [np.float32([0.1, 0.1]), np.float32([0, bad, 0])]
            assert not unnoised_mean(plan_of(1.0, 1, clipping), [update], template).any()

    def test_splits_the_noise_no_differently(self):
        flat, split = (
            release(changed(plan_of(0.7, 3, clipping), noise_multiplier=2.0).query(4), [], [tf.zeros(4), tf.zeros(2)])
            for clipping in ("flat", "per_layer")
        )
        for first, second in zip(flat[0], split[0], strict=True):
            np.testing.assert_array_equal(first, second)


class TestDenominator:
    @pytest.mark.parametrize("cohort", [1, 2, 7, 100])
    def test_is_the_expected_cohort(self, cohort):
        check_denominator(plan_of(0.7, cohort))

    def test_of_an_empty_cohort_divides_the_noise_alone(self):
        plan = changed(plan_of(0.5, 10), noise_multiplier=2.0)
        wider = changed(plan, cohort=40)
        narrow, wide = (release(p.query(0), [], [tf.zeros(30)])[0][0] for p in (plan, wider))
        assert np.all(np.isfinite(narrow))
        assert narrow.any()
        np.testing.assert_allclose(narrow, 4 * wide, rtol=1e-6)
