"""Values that others published: each with its source, and the tolerance that its digits or its method allow."""

import math

import numpy as np
import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    SingleEpochTreeAggregationDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    ZCDpEvent,
    dp_event,
)

from dpfl.privacy import epsilon, poisson_gaussian
from dpfl.privacy.events import DiscreteGaussianSumDpEvent, SkellamDpEvent
from dpfl.privacy.rdp import renyi_divergences

ADD, REPLACE, ZERO = "add_or_remove_one", "replace_one", "replace_special"

# The FEMNIST setting of DESIGN.md: 3,383 clients, 120 a round, z = 1.2, 100 rounds, delta 1e-5.
CLIENTS, COHORT, NOISE, ROUNDS = 3383, 120, 1.2, 100


def case(identity, *values):
    return pytest.param(*values, id=identity)


class TestPoissonSampling:
    # noise multiplier, sampling rate, steps, delta, accountant, epsilon, relative tolerance
    @pytest.mark.parametrize(
        ("noise", "rate", "steps", "delta", "accountant", "published", "tolerance"),
        [
            # TensorFlow Privacy 0.9, privacy/analysis/compute_dp_sgd_privacy_test.py.
            case("tf-privacy, Test0", 1.3, 0.0025, 6000, 1e-5, "rdp", 0.7242234026109595, 1e-8),
            case("tf-privacy, Test1", 1.0, 0.001, 30000, 1e-7, "rdp", 1.4154988495444845, 1e-8),
            # dp-accounting 0.6 itself gives more at fractional orders, where it drops the signs of a series.
            case("tf-privacy, sampled, RDP", 0.7, 0.01, 120, 1e-5, "rdp", 3.2391922, 1e-7),
            case("tf-privacy, not sampled, RDP", 0.7, 1, 2, 1e-5, "rdp", 10.8602036, 1e-7),
            case("tf-privacy, sampled, PLD", 0.7, 0.01, 120, 1e-5, "pld", 2.4612381, 1e-5),
            case("tf-privacy, not sampled, PLD", 0.7, 1, 2, 1e-5, "pld", 10.1224946, 1e-5),
            # The same file, with microbatches: twice the sensitivity.
            case("tf-privacy, microbatched, sampled, RDP", 0.35, 0.01, 120, 1e-5, "rdp", 22.5970358, 1e-7),
            case("tf-privacy, microbatched, sampled, PLD", 0.35, 0.01, 120, 1e-5, "pld", 18.6977407, 1e-5),
            # Opacus, opacus/tests/accountants_test.py. Its PRV epsilon is an upper bound with an error of up to
            # 0.01, and its calibration stops 0.01 below epsilon 8; its RDP orders end at 63.
            case("opacus, RDP", 1.5, 0.04, 2250, 1e-5, "rdp", 7.32911117143, 1e-9),
            case("opacus, PRV", 1.5, 0.04, 2250, 1e-5, "pld", 6.777395712150674, 0.01 / 6.777),
            case("opacus, RDP calibrated by epochs", 1.416, 0.04, 2250, 1e-5, "rdp", 8, 0.002),
            case("opacus, RDP calibrated by steps", 1.3562, 0.04, 2000, 1e-5, "rdp", 8, 0.002),
            case("opacus, PRV calibrated by epochs", 1.34765625, 0.04, 2250, 1e-5, "pld", 8, 0.0026),
            case("opacus, PRV calibrated by steps", 1.2915, 0.04, 2000, 1e-5, "pld", 8, 0.0026),
            # jax-privacy 2, its documentation; two decimals.
            case("jax-privacy, documentation", 3.0, 0.1, 512, 1e-6, "pld", 3.77, 0.005 / 3.77),
            # dp-accounting 0.6, pld/pld_privacy_accountant_test.py: delta 0.15594 at epsilon 1, within 1e-3.
            case("dp-accounting, PLD of a sampled Gaussian", 0.5, 0.2, 3, 0.15594, "pld", 1, 1e-3),
            # DESIGN.md, FEMNIST setting; two decimals.
            case("DESIGN.md, FEMNIST", NOISE, COHORT / CLIENTS, ROUNDS, 1e-5, "pld", 1.71, 0.005 / 1.71),
        ],
    )
    def test_add_or_remove(self, noise, rate, steps, delta, accountant, published, tolerance):
        found = epsilon(poisson_gaussian(noise, rate, steps), delta, accountant=accountant)
        assert found == pytest.approx(published, rel=tolerance)

    # Koskela et al. 2020 (1906.03049), DPBayes/PLD-Accountant, tests/test_compute_delta.py and
    # examples/simple_usage_example.py: the deltas of these epsilons, by the Fourier accountant.
    @pytest.mark.parametrize(
        ("relation", "published", "noise", "rate", "steps", "delta"),
        [
            case("fourier R, sigma 2", ADD, 1.0, 2.0, 0.01, 10**4, 0.010224911209191894),
            case("fourier R, 100,000 steps", ADD, 1.0, 2.0, 0.01, 10**5, 0.39205728853284305),
            case("fourier R, epsilon 0.8", ADD, 0.8, 2.0, 0.01, 10**4, 0.022850339595771204),
            case("fourier R, sigma 1", ADD, 1.0, 1.0, 0.01, 10**4, 0.2391763947364977),
            case("fourier R, rate 0.02", ADD, 1.0, 2.0, 0.02, 10**4, 0.14991732969314892),
            case("fourier R, sigma 4", ADD, 1.0, 4.0, 0.01, 10**4, 4.243484012034273e-06),
            case("fourier S, sigma 2", REPLACE, 1.0, 2.0, 0.01, 10**4, 0.1282093857106282),
            case("fourier S, 100,000 steps", REPLACE, 1.0, 2.0, 0.01, 10**5, 0.8205538014405241),
            case("fourier S, epsilon 0.8", REPLACE, 0.8, 2.0, 0.01, 10**4, 0.16803207353601804),
            case("fourier S, sigma 1", REPLACE, 1.0, 1.0, 0.01, 10**4, 0.556809673151891),
            case("fourier S, rate 0.02", REPLACE, 1.0, 2.0, 0.02, 10**4, 0.5113118821506575),
            case("fourier S, sigma 4", REPLACE, 1.9931200626285734, 4.0, 0.01, 10**4, 1e-5),
        ],
    )
    def test_fourier_accountant(self, relation, published, noise, rate, steps, delta):
        found = epsilon(poisson_gaussian(noise, rate, steps), delta, relation=relation)
        assert found == pytest.approx(published, rel=5e-4)

    def test_replace_one_in_a_large_population(self):
        found = epsilon(poisson_gaussian(NOISE, COHORT / CLIENTS, ROUNDS), 1e-5, relation=REPLACE)
        assert found == pytest.approx(2.56, abs=0.005)  # DESIGN.md

    # dp-accounting before 0.6, rdp_privacy_accountant_test.py, test_compute_rdp_poisson_sampled_gaussian. In 0.6
    # it has 6.7058e-04 at order 1.5, since it drops the signs of a series.
    def test_renyi_divergences(self):
        orders = np.array([1.5, 2.5, 5.0, 50.0, 100.0])
        published = [6.5007e-04, 1.0854e-03, 2.1808e-03, 2.3846e-02, 1.6742e02]
        found = renyi_divergences(poisson_gaussian(2.5, 0.01, 50), orders, ADD)
        np.testing.assert_allclose(found, published, rtol=1e-4)


class TestGaussian:
    @pytest.mark.parametrize(
        ("noise", "steps", "relation", "accountant", "delta", "published", "tolerance"),
        [
            # Balle & Wang 2018 (1805.06530), algorithm 1; the value is in OpenDP's test of the analytic Gaussian.
            case("opendp, analytic Gaussian", 3.730632, 1, ADD, "pld", 1e-5, 1, 1e-4),
            case("opendp, analytic Gaussian, replaced", 2 * 3.730632, 1, REPLACE, "pld", 1e-5, 1, 1e-4),
            # dp-accounting 0.6, pld_privacy_accountant_test.py: delta 0.126936 at epsilon 1. It is also the duality
            # of 1-GDP (Dong et al. 2019, 1905.02383, corollary 2.13): Phi(-1/2) - e Phi(-3/2) = 0.126937.
            case("dp-accounting, 1-GDP", math.sqrt(3), 3, ADD, "pld", 0.126936, 1, 1e-4),
            # TF Privacy, as above, with microbatches and no sampling: twice the sensitivity, as in replacing.
            case("tf-privacy, microbatched, RDP", 0.7, 2, REPLACE, "rdp", 1e-5, 26.2880374, 1e-7),
            case("tf-privacy, microbatched, PLD", 0.7, 2, REPLACE, "pld", 1e-5, 24.7160779, 1e-5),
            # google/differential-privacy issue 378: dp-accounting 0.6 gives 4.73 by RDP, 9.997 by PLD is right.
            case("google issue 378, PLD", 1.0, 1, REPLACE, "pld", 1e-5, 9.997, 1e-4),
            # dp-accounting 0.6, rdp_privacy_accountant_test.py: epsilon 1 with orders 0.001 apart; ours are wider.
            case("dp-accounting, calibrated RDP", 4.530877117, 1, ADD, "rdp", 1e-6, 1, 2e-3),
        ],
    )
    def test_epsilon(self, noise, steps, relation, accountant, delta, published, tolerance):
        event = poisson_gaussian(noise, 1, steps)
        found = epsilon(event, delta, relation=relation, accountant=accountant)
        assert found == pytest.approx(published, rel=tolerance)

    @pytest.mark.parametrize("rho", [0.01, 0.5, 4.0])
    def test_concentrated_privacy(self, rho):
        # Bun & Steinke 2016 (1605.02658), proposition 1.3; today's conversion is better, by less than a quarter.
        published = rho + 2 * math.sqrt(rho * math.log(1e5))
        found = epsilon(ZCDpEvent(rho), 1e-5, accountant="rdp")
        assert 0.75 * published < found < published

    def test_concentrated_privacy_is_the_gaussians(self):
        # Bun & Steinke 2016 (1605.02658), proposition 1.6: noise z is 1 / (2 z^2)-concentrated.
        gaussian = epsilon(GaussianDpEvent(1.7), 1e-5, accountant="rdp")
        assert epsilon(ZCDpEvent(1 / (2 * 1.7**2)), 1e-5, accountant="rdp") == pytest.approx(gaussian)


class TestOtherSampling:
    @pytest.mark.parametrize(("cap", "published"), [(180, 1.71), (150, 3.07), (120, 7.40)])
    def test_capped_poisson(self, cap, published):
        # DESIGN.md, FEMNIST setting (2508.15089); two decimals.
        one = TruncatedSubsampledGaussianDpEvent(CLIENTS, COHORT / CLIENTS, cap, NOISE)
        assert epsilon(SelfComposedDpEvent(one, ROUNDS), 1e-5) == pytest.approx(published, abs=0.005)

    def test_truncated_batches(self):
        # dp-accounting 0.6, pld_privacy_accountant_test.py, test_truncated_subsampled_gaussian_basic.
        first, second = (TruncatedSubsampledGaussianDpEvent(size, 0.5, 2, 1.0) for size in (4, 3))
        event = ComposedDpEvent([SelfComposedDpEvent(first, 3), SelfComposedDpEvent(second, 2)])
        assert epsilon(event, 1e-6) == pytest.approx(17.904330, rel=1e-5)

    @pytest.mark.parametrize("accountant", ["pld", "rdp"])
    def test_fixed_size(self, accountant):
        # DESIGN.md, FEMNIST setting: one client at +C among others at -C costs 8.81, and no bound may be below it.
        one = SampledWithoutReplacementDpEvent(CLIENTS, COHORT, GaussianDpEvent(NOISE))
        found = epsilon(SelfComposedDpEvent(one, ROUNDS), 1e-5, relation=REPLACE, accountant=accountant)
        known_data = PoissonSampledDpEvent(COHORT / CLIENTS, GaussianDpEvent(NOISE / 2))
        assert epsilon(SelfComposedDpEvent(known_data, ROUNDS), 1e-5) == pytest.approx(8.81, abs=0.005)
        assert 8.81 <= found < 1.7 * 8.81

    def test_fixed_size_in_one_round(self):
        # Wang, Balle & Kasiviswanathan 2019 (1808.00087), theorem 9 with the pair above: log(1 + q (e^eps - 1)).
        inner = epsilon(GaussianDpEvent(2.0), 1e-4, relation=REPLACE)
        sampled = SampledWithoutReplacementDpEvent(1000, 50, GaussianDpEvent(2.0))
        assert epsilon(sampled, 0.05 * 1e-4, relation=REPLACE) == pytest.approx(
            math.log1p(0.05 * math.expm1(inner)), rel=1e-3
        )

    def test_sampled_laplace(self):
        # dp-accounting 0.6, pld_privacy_accountant_test.py, test_poisson_subsampled_laplace: 3 log(1 + q (e^2 - 1)).
        event = SelfComposedDpEvent(PoissonSampledDpEvent(0.2, LaplaceDpEvent(0.5)), 3)
        assert epsilon(event, 1e-14) == pytest.approx(2.46964, abs=1e-3)

    def test_laplace(self):
        # The same file, test_laplace_basic.
        event = ComposedDpEvent(
            [SelfComposedDpEvent(LaplaceDpEvent(1.0), 3), SelfComposedDpEvent(LaplaceDpEvent(2), 2)]
        )
        assert epsilon(event, 1e-14) == pytest.approx(4, abs=1e-6)


class TestCorrelatedNoise:
    @pytest.mark.parametrize(("noise", "published"), [(1.13, 19.74), (8.83, 2.04)])
    def test_tree(self, noise, published):
        # Kairouz et al. 2021 (2103.00039), StackOverflow, by way of dp-accounting's and TF Privacy's tests: 1,600
        # rounds at delta 1e-6, with an older conversion than ours.
        event = SingleEpochTreeAggregationDpEvent(noise, 1600)
        assert 0.8 * published < epsilon(event, 1e-6, relation=ZERO, accountant="rdp") < published

    def test_tree_as_gaussians(self):
        # DESIGN.md: a unit enters the 11 nodes of its path; 17.67 by PLD.
        found = epsilon(SelfComposedDpEvent(GaussianDpEvent(1.13), 11), 1e-6, relation=ZERO)
        assert found == pytest.approx(17.67, abs=0.005)

    def test_banded_matrix(self):
        # Choquette-Choo et al. 2023 (2306.08153), theorem 4; jax-privacy's amplified_bandmf_event: with b bands, T
        # rounds cost what T / b sampled Gaussians do. 16 bands, 8,192 rounds: jax-privacy's 3.77 for 512 of them.
        bands, rounds = 16, 8192
        assert epsilon(poisson_gaussian(3.0, 0.1, math.ceil(rounds / bands)), 1e-6) == pytest.approx(3.77, abs=0.005)


class TestDistributedNoise:
    # google-research/federated, distributed_dp/accounting_utils.py, by its authors: the values of its functions at
    # orders 2, 8 and 32, without rounding and scaling.
    @pytest.mark.parametrize(
        ("event", "published"),
        [
            case("skellam, much noise", SkellamDpEvent(50.0, 10.0, 80.0), [0.0400312, 0.1600792, 0.6402712]),
            case("skellam, little noise", SkellamDpEvent(3.0, 2.0, 4.0), [5 / 9, 55 / 27, 70 / 9]),
            case("ddgauss, large shares", DiscreteGaussianSumDpEvent(2 * 10**0.5, 10, 100, 5.0), [0.625, 2.5, 10.0]),
            case(
                "ddgauss, small shares",
                DiscreteGaussianSumDpEvent(0.7 * 10**0.5, 10, 100, 5.0),
                [11.820200095443308, 32.20098357045456, 93.42547336637294],
            ),
            case(
                "ddgauss, smaller shares",
                DiscreteGaussianSumDpEvent(0.5 * 4**0.5, 4, 3, 2.0),
                [8.402801185093072, 20.40280118509307, 68.40280118509307],
            ),
        ],
    )
    def test_renyi_divergences(self, event, published):
        found = renyi_divergences(event, np.array([2.0, 8.0, 32.0]), ZERO)
        np.testing.assert_allclose(found, published, rtol=1e-9)


class TestTuning:
    @pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 2.0, 5.0])
    def test_best_of_purely_private_runs(self, shape):
        # Papernot & Steinke 2022 (2110.03620), corollary 3, as dp-accounting tests it: (2 + shape) epsilon, at an
        # order so large that it stands for pure privacy.
        event = dp_event.RepeatAndSelectDpEvent(LaplaceDpEvent(1.0), 1000, shape)
        assert renyi_divergences(event, np.array([1e10]), ADD)[0] == pytest.approx(2 + shape)

    @pytest.mark.parametrize(("single", "mean"), [(1.0, 10.0), (0.1, 100.0)])
    def test_best_of_a_poisson_number_of_purely_private_runs(self, single, mean):
        # The same file, test_repeat_and_select_pure_poisson, at the order 1 + 1 / (e^epsilon - 1).
        order = 1 + 1 / math.expm1(single)
        event = dp_event.RepeatAndSelectDpEvent(LaplaceDpEvent(1 / single), mean, math.inf)
        published = (
            single
            + math.log1p(math.expm1((1 - 2 * order) * single) * (order - 1) / (2 * order - 1)) / (order - 1)
            + math.log(mean) * math.expm1(single)
        )
        found = renyi_divergences(event, np.array([order, 1e10, 1e100]), ADD)[0]
        assert found == pytest.approx(published, rel=1e-3)
