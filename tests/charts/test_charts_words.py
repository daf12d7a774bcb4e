import pandas as pd
import pytest

from dpfl.charts import words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(1e-3, "1e-3"), (2.5e-6, "2.5e-6"), (0.25, "0.25"), (89.85, "89.85"), (300.0, "300")],
        *[(3383, "3,383"), (12345.0, "12,345"), (0, "0"), (float("nan"), "none")],
    ],
)
def test_numbers_are_short(value, text):
    assert words.number(value) == text


def test_lists():
    assert words.several(["a"]) == "a"
    assert words.several(["a", "b", "c"]) == "a, b and c"


@pytest.mark.parametrize(
    ("relation", "phrase"),
    [
        ("add_or_remove_one", "by adding or removing one example"),
        ("replace_one", "by replacing one example"),
        ("replace_special", "by replacing one example with an empty contribution"),
        ("zero_out", "in the sense of zero out (example)"),
    ],
)
def test_the_guarantee_is_stated_whole(relation, phrase):
    run = {"unit": "example", "relation": relation, "sampler": "poisson", "accountant": "rdp", "mechanism": "gaussian"}
    sentence = words.guarantee(pd.DataFrame([run]), [1e-5])
    assert sentence == (
        f"Guarantee: example-level (ε, δ)-differential privacy, δ = 1e-5; neighbours differ {phrase}; "
        "Gaussian mechanism; Poisson sampling; RDP accountant."
    )


def test_minibatches_of_examples_are_what_is_sampled_where_these_are_protected():
    run = {"unit": "example", "relation": "add_or_remove_one", "sampler": "everyone", "accountant": "pld"}
    run |= {"mechanism": "none", "example_sampling": "poisson"}
    assert "(DP-SGD); Poisson minibatches; PLD accountant" in words.guarantee(pd.DataFrame([run]), [1e-5])
    assert "; no sampling; " in words.guarantee(pd.DataFrame([run | {"unit": "user"}]), [1e-5])


def test_seeds_that_differ_are_stated_as_a_range():
    assert "means over 2 to 5 seeds" in words.statistics(pd.Series([5, 2, 3]))
    assert words.statistics(pd.Series([1, 1])) == "One seed per point, so there are no intervals."
