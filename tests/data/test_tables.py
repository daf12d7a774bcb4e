from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpfl.data import from_dataframe


def table(rows: int = 60) -> pd.DataFrame:
    number = np.arange(rows)
    return pd.DataFrame(
        {
            "student": [f"s{k % 6}" for k in number],
            "age": number.astype(float) * 10 + 3,
            "grade": np.where(number % 3 == 0, "pass", "fail"),
            "dept": np.array(["law", "art", "medicine"])[number % 3],
            "late": number % 2 == 0,
            "constant": 7,
            "city": pd.Categorical(np.where(number % 2 == 0, "Bern", "Genf"), ["Genf", "Bern", "Chur"]),
        }
    )


def test_columns_become_features() -> None:
    frame = table()
    data = from_dataframe(frame, client="student", label="grade")
    assert data.example_shape == (3 + 3 + 3,)  # age, constant, late; three departments; three cities
    assert data.client_ids == tuple(f"s{k}" for k in range(6))
    assert data.class_names == ("fail", "pass")
    for k in range(6):
        for row, label in zip(*data.client(k), strict=True):
            number = round((row[0] - 3) / 10)
            assert number % 6 == k
            assert row[1:3].tolist() == [7, number % 2 == 0]
            assert row[3:6].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]][number % 3]  # art, law, medicine
            assert row[6:].tolist() == [[0, 1, 0], [1, 0, 0]][number % 2]  # Genf, Bern, Chur
            assert data.class_names[label] == frame["grade"][number]


def test_features_may_be_chosen_and_ordered() -> None:
    data = from_dataframe(table(), "student", "grade", features=["late", "age"])
    assert data.example_shape == (2,)
    assert from_dataframe(table(), "student", "grade", "age").example_shape == (1,)


def test_the_label_may_have_any_type() -> None:
    frame = table()
    frame["stars"] = np.arange(60) % 5 + 1
    data = from_dataframe(frame, "student", "stars", ["age"])
    assert data.class_names == ("1", "2", "3", "4", "5")
    for row, label in zip(data.x, data.y, strict=True):
        assert label == round((row[0] - 3) / 10) % 5
    assert from_dataframe(frame, "student", "late", ["age"]).class_names == ("False", "True")
    assert from_dataframe(frame, "student", "city", ["age"]).class_names == ("Genf", "Bern")


def test_nullable_types() -> None:
    frame = table().convert_dtypes()
    assert str(frame["age"].dtype) == "Int64"
    plain, nullable = (from_dataframe(each, "student", "grade", seed=3) for each in (table(), frame))
    assert plain.fingerprint == nullable.fingerprint


def test_standardize_uses_training_examples_alone() -> None:
    plain = from_dataframe(table(), "student", "grade", seed=2)
    scaled = from_dataframe(table(), "student", "grade", seed=2, standardize=True)
    np.testing.assert_allclose(scaled.x[:, 0].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.x[:, 0].std(), 1, atol=1e-5)
    mean, std = plain.x[:, 0].mean(dtype=np.float64), plain.x[:, 0].std(dtype=np.float64)
    np.testing.assert_allclose(scaled.x_test[:, 0], (plain.x_test[:, 0] - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.x_validation[:, 0], (plain.x_validation[:, 0] - mean) / std, rtol=1e-4, atol=1e-5)
    assert abs(scaled.x_test[:, 0].mean()) > 1e-3
    assert (scaled.x[:, 1] == 0).all()  # the constant
    np.testing.assert_array_equal(scaled.x[:, 2:], plain.x[:, 2:])  # booleans and categories stay
    assert set(scaled.assumptions) - set(plain.assumptions) == {
        "Features are standardised by mean and standard deviation of the training examples, "
        "which the guarantee does not cover."
    }


def test_standardize_does_not_lose_large_numbers_to_float32() -> None:
    frame = table()
    frame["age"] += 1.6e9  # time stamps in seconds
    scaled = from_dataframe(frame, "student", "grade", seed=2, standardize=True)
    reference = from_dataframe(table(), "student", "grade", seed=2, standardize=True)
    np.testing.assert_allclose(scaled.x[:, 0], reference.x[:, 0], atol=1e-5)


def test_public_sets_are_assumptions() -> None:
    sentences = from_dataframe(table(), "student", "grade").assumptions
    assert "The categories in 'dept', 'city' are treated as public." in sentences
    assert "The classes in column 'grade' are treated as public." in sentences
    assert not any("categories" in s for s in from_dataframe(table(), "student", "grade", ["age"]).assumptions)


def test_without_client_column_rows_are_dealt() -> None:
    data = from_dataframe(table(), None, "grade", ["age", "student"], clients=7, partition="shards:2")
    assert data.num_clients == 7
    assert data.example_shape == (7,)


def test_split_options_reach_the_data() -> None:
    data = from_dataframe(
        table(), "student", "grade", split="clients", test_fraction=0.3, validation_fraction=0, name="t"
    )
    assert (data.num_clients, len(data.x_test), len(data.x_validation), data.name) == (4, 20, 0, "t")


def _changed(column: str, values: Any) -> pd.DataFrame:
    return table().assign(**{column: values})


def _hole(column: str) -> pd.DataFrame:
    frame = table()
    frame.loc[[4, 9], column] = None
    return frame


@pytest.mark.parametrize(
    ("frame", "options", "words"),
    [
        (table(), {"client": "studnet"}, ["'studnet'", "did you mean 'student'"]),
        (table(), {"label": "grades"}, ["'grades'", "did you mean 'grade'"]),
        (table(), {"features": ["age", "lat"]}, ["'lat'", "'late'"]),
        (table(), {"features": ["zzzz"]}, ["'zzzz'", "valid are 'student', 'age'"]),
        (table(), {"features": []}, ["at least one feature"]),
        (table(), {"features": ["age", "grade"]}, ["'grade'", "twice"]),
        (table(), {"features": ["age", "student"]}, ["'student'", "twice"]),
        (table(), {"features": ["age", "age"]}, ["'age'", "twice"]),
        (table(), {"client": "grade"}, ["'grade'", "twice"]),
        (table(), {"client": None}, ["client ids or the number of clients"]),
        (table(), {"clients": 3}, ["without client ids"]),
        (_hole("age"), {}, ["'age'", "missing", "2 of 60 rows"]),
        (_hole("age"), {"missing": "guess"}, ["'guess'", "'refuse', 'drop' or 'fill'"]),
        (_hole("dept"), {}, ["'dept'", "missing", "2 of 60 rows"]),
        (_hole("city"), {}, ["'city'", "missing", "2 of 60 rows"]),
        (_hole("grade"), {}, ["'grade'", "missing in 2 rows", "row 4"]),
        (_hole("student"), {}, ["client ids", "missing in 2 rows", "row 4"]),
        (_changed("age", np.where(np.arange(60) < 3, np.inf, 1)), {}, ["'age'", "infinite", "3 of 60"]),
        (_changed("age", pd.Timestamp("2020-01-01")), {}, ["'age'", "datetime64", "numbers"]),
        (_changed("age", 1j), {}, ["'age'", "complex128", "numbers"]),
        (_changed("grade", np.arange(60) / 7), {"label": "missing"}, ["'missing'"]),
        (table().iloc[:0], {}, ["0 classes"]),
        (table().rename(columns={"age": "late"}), {}, ["'late'", "more than once"]),
    ],
)
def test_what_is_refused(frame: pd.DataFrame, options: dict[str, Any], words: list[str], refuses: Any) -> None:
    with refuses(*words):
        from_dataframe(frame, **({"client": "student", "label": "grade"} | options))


def test_missing_values_are_dropped() -> None:
    frame = table().convert_dtypes()
    frame.loc[[4, 9], "age"] = None
    frame.loc[12, "student"] = None
    frame.loc[13, "grade"] = None
    dropped = from_dataframe(frame, "student", "grade", missing="drop")
    assert dropped.fingerprint == from_dataframe(table().drop([4, 9, 12, 13]), "student", "grade").fingerprint
    frame.loc[20, "city"] = None  # a column that is not used
    used = ["age", "dept"]
    assert from_dataframe(frame, "student", "grade", used, missing="drop").fingerprint == (
        from_dataframe(table().drop([4, 9, 12, 13]), "student", "grade", used).fingerprint
    )


@pytest.mark.parametrize("convert", [pd.DataFrame.convert_dtypes, lambda frame: frame], ids=["nullable", "plain"])
def test_missing_values_are_filled(convert: Any) -> None:
    frame = table().astype({"late": object})
    frame.loc[[4, 9], ["age", "city", "dept", "late"]] = None
    frame.loc[12, "student"] = None
    frame.loc[13, "grade"] = None
    filled = from_dataframe(convert(frame), "student", "grade", missing="fill", test_fraction=0.02)
    rest = table().drop([12, 13])
    mean = rest.drop([4, 9])["age"].mean()
    by_hand = rest.astype({"city": str, "dept": str, "late": str})
    by_hand.loc[[4, 9], ["age", "city", "dept", "late"]] = [mean, "missing", "missing", "missing"]
    expected = from_dataframe(by_hand, "student", "grade", test_fraction=0.02)
    np.testing.assert_array_equal(filled.x, expected.x)
    np.testing.assert_array_equal(filled.y, expected.y)
    assert "Missing values in 'age' become the mean, which is not covered." in filled.assumptions
    assert "The categories in 'dept', 'late', 'city' are treated as public." in filled.assumptions


def test_a_table_without_holes_is_the_same_however_they_are_treated() -> None:
    refused, dropped, filled = (
        from_dataframe(table(), "student", "grade", missing=m) for m in ("refuse", "drop", "fill")
    )
    assert refused.fingerprint == dropped.fingerprint == filled.fingerprint
    assert refused.assumptions == filled.assumptions


def test_too_many_categories_are_refused(refuses: Any) -> None:
    frame = pd.DataFrame({"c": np.arange(2001) % 5, "y": np.arange(2001) % 2, "id": np.arange(2001).astype(str)})
    with refuses("'id'", "2001 categories"):
        from_dataframe(frame, "c", "y")
    assert from_dataframe(frame.iloc[1:], "c", "y").example_shape == (2000,)


def test_column_names_that_are_numbers() -> None:
    frame = pd.DataFrame(np.arange(60).reshape(20, 3) % 7)
    assert from_dataframe(frame, 0, 2).example_shape == (1,)  # type: ignore[arg-type]
