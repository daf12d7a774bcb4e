"""The accounting commands: every mechanism and sampler, both directions, and what they refuse."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

MECHANISMS = [
    ("gaussian", "poisson", "--cohort 90"),
    ("gaussian", "capped_poisson", "--cohort 90 --set sampler.cap=120"),
    ("gaussian", "fixed_size", "--cohort 90 --relation replace_one"),
    ("gaussian", "everyone", ""),
    ("gaussian", "balls_in_bins", "--cohort 100"),
    ("adaptive_clipping", "poisson", "--cohort 90 --set mechanism.quantile=0.7"),
    ("tree_aggregation", "cyclic", "--cohort 30 --set mechanism.restart_every=10"),
    ("banded_matrix", "cyclic_poisson", "--cohort 30 --set sampler.groups=5 --set mechanism.bands=5"),
    ("discrete_gaussian", "cyclic", "--cohort 30 --dimension 650 --relation replace_special"),
    ("skellam", "everyone", "--dimension 650 --relation replace_one"),
    ("local_gaussian", "poisson", "--cohort 90 --relation replace_special"),
    ("local_laplace", "fixed_size", "--cohort 9 --relation replace_one"),
]


@pytest.mark.parametrize(("mechanism", "sampler", "more"), MECHANISMS)
def test_noise_and_epsilon_are_inverse_for_every_mechanism(
    mechanism: str, sampler: str, more: str, dpfl: Callable
) -> None:
    common = f"--mechanism {mechanism} --sampler {sampler} --clients 300 --steps 20 --delta 1e-3 {more} --json"
    code, out, err = dpfl(f"noise --epsilon 8 {common}")
    assert (code, err) == (0, "")
    calibrated = json.loads(out)
    assert 0.998 * 8 <= calibrated["epsilon"] <= 8
    code, out, _ = dpfl(f"epsilon --noise-multiplier {calibrated['noise_multiplier']} {common}")
    assert (code, json.loads(out)) == (0, calibrated)


def test_rounds_are_the_last_that_stay_within_epsilon(dpfl: Callable) -> None:
    common = "--noise-multiplier 1.2 --clients 3383 --cohort 120 --delta 1e-5 --json"
    code, out, _ = dpfl(f"rounds --epsilon 1.71 {common}")
    found = json.loads(out)
    assert code == 0
    assert found["epsilon"] <= 1.71
    _, out, _ = dpfl(f"epsilon --steps {found['steps'] + 1} {common}")
    assert json.loads(out)["epsilon"] > 1.71
    assert found["steps"] == 100


def test_cohort_is_the_last_that_stays_within_epsilon(dpfl: Callable) -> None:
    common = "--noise-multiplier 1.2 --clients 3383 --steps 100 --delta 1e-5 --json"
    code, out, _ = dpfl(f"cohort --epsilon 1.71 {common}")
    found = json.loads(out)
    assert code == 0
    assert found["cohort"] == 120
    _, out, _ = dpfl(f"epsilon --cohort 121 {common}")
    assert json.loads(out)["epsilon"] > 1.71 >= found["epsilon"]


@pytest.mark.parametrize(
    ("mechanism", "more"),
    [
        ("adaptive_clipping", "--sampler poisson --set mechanism.count_noise=0.5"),
        ("gaussian", "--sampler cyclic_poisson --set sampler.groups=5"),
    ],
)
def test_cohorts_of_other_mechanisms_and_samplers(mechanism: str, more: str, dpfl: Callable) -> None:
    code, out, _ = dpfl(
        f"cohort --epsilon 4 --noise-multiplier 3 --steps 60 --delta 1e-3 --clients 300 --mechanism {mechanism} {more} "
        "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert found["epsilon"] <= 4
    assert 10 < found["cohort"] == found["expected_cohort"] <= 300


def test_both_accountants_on_request(dpfl: Callable) -> None:
    code, out, _ = dpfl(
        "epsilon --noise-multiplier 1.2 --sampling-rate 0.0355 --steps 100 --delta 1e-5 --both-accountants"
    )
    assert code == 0
    assert re.search(r"epsilon by PLD: 1\.70\d+\nepsilon by RDP: [12]\.\d+", out)


def test_a_record_is_verified_from_its_event_alone(dpfl: Callable, tmp_path: Path) -> None:
    _, out, _ = dpfl("noise --epsilon 2 --clients 300 --cohort 90 --steps 20 --delta 1e-3 --json")
    guarantee = json.loads(out)
    del guarantee["noise_multiplier"]
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"record": {}, "guarantee": guarantee, "history": {}}))
    code, out, _ = dpfl(f"verify {record}")
    assert code == 0
    assert "confirmed: computed anew, this event costs epsilon 1.99" in out

    row = {"epsilon_spent": 0.1}
    record.write_text(json.dumps({"record": row, "guarantee": guarantee, "history": {}}))
    code, _, err = dpfl(f"verify {record}")
    assert (code, "says that epsilon 0.1 was spent" in err) == (2, True)

    record.write_text(json.dumps({"record": {}, "guarantee": guarantee, "extrapolated": {**guarantee, "epsilon": 1.5}}))
    code, _, err = dpfl(f"verify {record}")
    assert (code, "states epsilon 1.5, but" in err) == (2, True)

    guarantee["epsilon"] = 1.5
    record.write_text(json.dumps(guarantee))
    code, _, err = dpfl(f"verify {record}")
    assert code == 2
    assert "states epsilon 1.5, but its event costs 1.99" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("epsilon --noise-multiplier 1 --steps 10 --delta 1e-5", "tell either --clients"),
        ("epsilon --noise-multiplier 1 --steps 10 --delta 1e-5 --clients 9 --sampling-rate 0.1", "stands for Poisson"),
        ("epsilon --noise-multiplier 1 --steps 10 --delta 1e-5 --clients 9 --cohort 10", "exceeds the 9 clients"),
        (
            "epsilon --noise-multiplier 1 --steps 10 --delta 1e-5 --clients 9",
            "the sampler poisson needs its cohort: give --cohort",
        ),
        (
            "epsilon --noise-multiplier 1 --steps 10 --delta 1e-5 --clients 9 --cohort 3 --sampler everyone",
            "leave --cohort",
        ),
        (
            "noise --epsilon 1 --steps 9 --delta 1e-5 --clients 9 --cohort 3 --sampler cyclic_poisson",
            "give --set sampler.groups=...",
        ),
        ("noise --epsilon 1 --steps 9 --delta 1e-5 --clients 9 --set sampler.cohort=3", "is --cohort: give that"),
        ("rounds --epsilon 1 --noise-multiplier 0 --delta 1e-5 --clients 9 --cohort 3", "without noise"),
        ("cohort --epsilon 1 --noise-multiplier 0 --steps 3 --delta 1e-5 --clients 9", "without noise"),
        (
            "noise --epsilon 1 --steps 9 --delta 1e-5 --clients 9 --cohort 3 --unit example --relation replace_one "
            "--mechanism local_gaussian",
            "choose --unit user",
        ),
        ("epsilon --noise-multiplier 1 --steps 0 --delta 1e-5 --clients 9 --cohort 3", "number of rounds from 1"),
        ("epsilon --noise-multiplier -1 --steps 9 --delta 1e-5 --clients 9 --cohort 3", "at least 0.01"),
        ("epsilon --noise-multiplier 1 --steps 9 --delta 0 --clients 9 --cohort 3", "delta must lie between"),
        ("noise --epsilon 1 --steps 9 --delta 1e-5 --clients 9 --cohort 3 --mechanism gauss", "there is no mechanism"),
        ("noise --epsilon 1 --steps 9 --delta 1e-5 --clients 9 --cohort 3 --mechanism none", "there is no mechanism"),
        ("noise --epsilon 1 --steps 9 --delta 1e-5 --clients 9 --cohort 3 --sampler random", "there is no sampler"),
        ("noise --epsilon 1 --steps 9 --delta 1e-5 --clients 9 --cohort 3 --set bands=8", "--set takes mechanism"),
        (
            "noise --epsilon 1 --steps 9 --delta 1e-5 --clients 9 --cohort 3 --set mechanism.band=8",
            "'band' is not a setting of Gaussian",
        ),
        (
            "noise --epsilon 1 --steps 9 --delta 1e-5 --clients 9 --cohort 3 --mechanism tree_aggregation",
            "needs a sampler that separates",
        ),
        (
            "noise --epsilon 1 --steps 9 --delta 1e-5 --clients 9 --mechanism skellam --sampler everyone "
            "--relation replace_one",
            "dimension",
        ),
        ("rounds --epsilon 0.1 --noise-multiplier 0.5 --delta 1e-5 --clients 9 --cohort 9", "even the smallest number"),
        ("verify nothing.json", "cannot be read as JSON"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(words: str, sentence: str, dpfl: Callable) -> None:
    code, out, err = dpfl(words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
