"""TFF's client data in and out, offline, with genuine TFF in a program of its own."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import client_data_program as program
import numpy as np
import pytest

import dpfl
from dpfl.data.text import SHAKESPEARE_CHARACTERS
from dpfl.errors import InputError

needs_tff = (
    pytest.mark.slow,  # TensorFlow Federated and its worker take their time.
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow_federated") is None,
        reason="TensorFlow Federated has wheels for Linux on x86_64 alone",
    ),
)
GIVEN = "The held-out examples that were given are treated as public"
BELONG = "Held-out examples belong to clients that train"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program wrote."""
    folder = tmp_path_factory.mktemp("client_data")
    (folder / "home").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "HOME": str(folder / "home"),
        # A network that refuses, wherever this runs; but for TFF, which would speak to its worker through it.
        "https_proxy": "http://127.0.0.1:9",
        "no_grpc_proxy": "localhost,127.0.0.1",
    }
    environment.pop("DPFL_DATA_DIR", None)
    with (folder / "printed").open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, program.__file__, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            code = process.wait(timeout=400)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, (folder / "printed").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def answer(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "answer.json").read_text())


@pytest.fixture(scope="module")
def kept(folder: Path) -> Any:
    """A dataset that the program loaded, as the arrays and names in it."""
    return lambda name: dict(np.load(folder / f"{name}.npz"))


# Functions, not classes: so pytest-xdist runs them in one process, with one fixture.
def in_tff(test: Any) -> Any:
    for mark in needs_tff:
        test = mark(test)
    return test


def same(found: np.ndarray, expected: Any) -> None:
    np.testing.assert_array_equal(found, expected, strict=isinstance(expected, np.ndarray))


@in_tff
@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        *((kind, program.IDS) for kind in ("slices", "function", "batches", "named tuples")),
        *((kind, sorted(program.IDS)) for kind in ("files", "sql")),
    ],
)
def test_every_kind_of_client_data_gives_the_same_as_arrays(answer, kind, ids) -> None:
    x, y, owners = program.own_examples()
    client = np.array([ids.index(name) for name in program.IDS])[owners]
    order = np.argsort(client, kind="stable")
    expected = dpfl.data.from_arrays(
        x[order],
        y[order],
        client[order],
        num_classes=4,
        split="clients",
        test_fraction=0.25,
        validation_fraction=0,
        seed=3,
    )
    assert answer["fingerprints"][kind] == expected.fingerprint
    assert answer["ids"][kind] == [ids[int(k)] for k in expected.client_ids]
    assert answer["assumptions"] == list(expected.assumptions)


@in_tff
def test_some_clients_with_held_out_examples_of_others(kept) -> None:
    x, y, owners = program.own_examples()
    data = kept("tested")
    assert data["client_ids"].tolist() == ["zoe", "10"]
    assert data["offsets"].tolist() == [0, 3, 4]
    same(data["x"], x[:4])
    same(data["y"], y[:4])
    same(data["x_test"], x[owners == 2][:5])
    same(data["y_test"], y[owners == 2][:5])
    by_name = [program.IDS.index(name) for name in sorted(program.IDS)]
    same(data["x_validation"], np.concatenate([x[owners == k] for k in by_name]))
    same(data["y_validation"], np.concatenate([y[owners == k] for k in by_name]))
    assert [sentence.split(":")[0] for sentence in data["assumptions"]] == [GIVEN]
    assert data["name"] == "tested"


@in_tff
def test_clients_are_drawn_by_the_seed(answer) -> None:
    drawn = answer["drawn"]
    for ids in drawn:
        assert len(set(ids)) == 2
        assert ids == sorted(ids, key=program.IDS.index)
    assert set().union(*drawn) == set(program.IDS)


@in_tff
def test_columns_are_strung_together_and_words_are_classes(kept) -> None:
    data = kept("columns")
    same(data["x"], np.array([[1.5, 51], [2.5, 102], [3.5, 255]], np.float32))
    same(data["y"], np.array([0, 1, 0], np.int32))
    assert data["class_names"].tolist() == ["cat", "dog"]
    assert data["assumptions"][0] == "The classes are taken from the data and treated as public."


@in_tff
def test_images_of_bytes_are_scaled_and_get_a_channel(kept) -> None:
    data = kept("images")
    same(data["x"], np.broadcast_to(np.float32([0.2, 0.4, 1.0])[:, None, None, None], (3, 2, 2, 1)).copy())
    assert data["y"].tolist() == [51, 102, 255]


def rows(split: dict[str, list[dict[str, Any]]], feature: str) -> np.ndarray:
    """A feature of all examples, clients in the order of their names, as TFF has them."""
    return np.array([example[feature] for client in sorted(split) for example in split[client]])


@in_tff
def test_emnist(kept) -> None:
    content, data = program.emnist(True), kept("emnist")
    train, test = content["digits_only_train"], content["digits_only_test"]
    for part, split in (("", train), ("_test", test)):
        same(data[f"x{part}"], 1 - rows(split, "pixels")[..., None])
        same(data[f"y{part}"], rows(split, "label").astype(np.int32))
    assert data["client_ids"].tolist() == ["f0000_14", "f0001_41", "f2"]
    assert data["offsets"].tolist() == [0, 5, 8, 10]
    assert (str(data["name"]), "".join(data["class_names"])) == ("emnist", string.digits)
    assert [sentence.split(":")[0] for sentence in data["assumptions"]] == [GIVEN]


@in_tff
def test_emnist_with_letters_of_some_writers(kept) -> None:
    content, data = program.emnist(False), kept("emnist62")
    writers = data["client_ids"].tolist()
    mine = {writer: content["all_train"][writer] for writer in writers}
    assert len(mine) == 2
    found = np.concatenate([data["x"], data["x_validation"]])
    same(np.sort(found, axis=0), np.sort(1 - rows(mine, "pixels")[..., None], axis=0))
    assert len(data["x_validation"]) == round(0.2 * len(found))
    same(data["x_test"], 1 - rows(content["all_test"], "pixels")[..., None])
    assert (str(data["name"]), len(data["class_names"])) == ("emnist-62", 62)
    assert data["class_names"][[10, 36]].tolist() == ["A", "a"]
    assert [sentence.split(":")[0] for sentence in data["assumptions"]] == [BELONG, GIVEN]


@in_tff
def test_emnist_as_tff_has_it(answer) -> None:
    held_out, *ids = answer["emnist from TFF"]
    train = program.emnist(True)["digits_only_train"]
    (writer,) = set(train) - set(ids)
    assert len(ids) == 2
    assert np.float32(held_out) == train[writer][0]["pixels"][0, 0]


@in_tff
def test_cifar100(kept) -> None:
    content, data = program.cifar100(), kept("cifar100")
    for part, split in (("", content["train"]), ("_test", content["test"])):
        same(data[f"x{part}"], rows(split, "image").astype(np.float32) / np.float32(255))
        same(data[f"y{part}"], rows(split, "label").astype(np.int32))
    assert data["client_ids"].tolist() == ["0", "10", "2"]
    assert data["offsets"].tolist() == [0, 4, 7, 9]
    assert (str(data["name"]), len(data["class_names"])) == ("cifar100", 100)


def next_token_examples(texts: list[list[int]], length: int, never: tuple[int, ...] = ()) -> tuple[list, list]:
    """Examples of texts in numbers, the slow way."""
    pairs = [
        (([0] * length + text[:t])[-length:], text[t])
        for text in texts
        for t in range(1, len(text))
        if text[t] not in never
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


@in_tff
def test_shakespeare(kept) -> None:
    data = kept("shakespeare")

    def numbers(text: bytes) -> list[int]:
        return [88, *(SHAKESPEARE_CHARACTERS.find(chr(byte)) + 1 or 87 for byte in text), 89]

    for part, split in (("", "train"), ("_test", "test")):
        texts = [numbers(text) for text in rows(program.SHAKESPEARE[split], "snippets").tolist()]
        x, y = next_token_examples(texts, 4)
        assert data[f"x{part}"].tolist() == x
        assert data[f"y{part}"].tolist() == y
    assert data["client_ids"].tolist() == ["HAMLET", "LEAR_FOOL"]
    assert data["offsets"].tolist() == [0, 12, 18]
    assert "".join(data["class_names"][1:87]) == SHAKESPEARE_CHARACTERS
    assert len(data["class_names"]) == 90


@in_tff
def test_stackoverflow(kept, answer) -> None:
    data = kept("stackoverflow")
    # the, code, is, # are 1 to 4; 5 is any other word, 6 the beginning, 7 the end; two sentences a client, four words.
    texts = [[6, 1, 2, 3, 1], [6, 5, 3, 2, 7], [6, 2, 5, 3, 7], [6, 3, 3, 7]]
    x, y = next_token_examples(texts, 4, never=(5, 7))
    assert data["x"].tolist() == x
    assert data["y"].tolist() == y
    assert data["client_ids"].tolist() == ["77", "8", "9"]
    assert data["offsets"].tolist() == [0, 6, 8, 10]
    tests = {tuple(words) for words in data["x_test"].tolist()}
    assert len(data["x_test"]) == 4  # of two clients
    assert tests <= {(0, 0, 0, 6), (0, 0, 6, 1), (0, 0, 6, 3), (0, 0, 6, 4)}
    assert data["class_names"].tolist() == [
        *("<padding>", "the", "code", "is", "#"),
        *("<unknown>", "<beginning>", "<end>"),
    ]
    assert data["assumptions"][0] == (
        "The vocabulary, the 4 words that most users wrote, is taken from the data and treated as public."
    )
    assert answer["whole stackoverflow"] == [[7, 2], 6]
    assert answer["checksums"] >= 1  # TFF's own loader read the words


@in_tff
def test_tokens_are_numbered_as_in_the_tasks_of_tff(answer) -> None:
    theirs, ours = answer["characters"]
    assert ours == theirs
    for theirs, ours in answer["words"]:
        assert ours == theirs


@in_tff
def test_a_download_is_whole_or_not_there(answer) -> None:
    assert not [path for path in answer["home after offline"] if ".tff" in path]
    assert answer["home after broken downloads"] == []
    assert answer["home after download"] == ["cifar100.sqlite"]
    downloaded, cached = answer["downloaded"]
    assert downloaded == cached


@in_tff
def test_a_silent_network_is_given_up(answer) -> None:
    assert answer["seconds of silence"] < 5  # of half a second
    assert answer["timeout after"] is None


@in_tff
def test_a_round_trip_through_tff_changes_nothing(answer) -> None:
    before, after = answer["round trip"]
    assert after == before
    assert before[1] == [str(k) for k in range(12)]
    assert answer["from database"] == 1247


@in_tff
def test_client_data_works_in_graphs_of_tff(answer) -> None:
    count, found, expected = answer["all in graph"]
    assert (count, found) == (1247, expected)
    assert "there is no client" in answer["nobody"]
    by_datasets, by_ids = answer["models in TFF"]
    assert by_datasets["examples"] == by_ids["examples"] == answer["examples of the cohort"]
    for one, other in zip(by_datasets["weights"], by_ids["weights"], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(by_datasets["weights"][0]).max() > 1e-3


@in_tff
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no client data", ["ClientData", "given a dict", "from_arrays"]),
        ("a pair", ["given a tuple", "test="]),
        ("held out", ["test must be", "tf.data.Dataset", "was a tuple"]),
        ("unknown x", ["'tff' has no feature 'pixel'", "'label', 'x'"]),
        ("unknown y", ["no feature 'labels'", "did you mean 'label'?"]),
        ("unclear y", ["'height' (float64 ()), 'kind' (string ()), 'weight' (int64 ())", "y="]),
        ("unclear x", ["'height' (float64 ()), 'kind' (string ()), 'weight' (int64 ())", "x="]),
        ("twice", ["used twice"]),
        ("text", ["'kind'", "is text"]),
        ("one-hot", ["'y'", "shape (4,)", "one class per example", "tf.argmax"]),
        ("serialised", ["load_and_parse_sql_client_data"]),
        ("nested", ["'x' is a dict", "nested"]),
        ("single", ["pairs (x, y)", "a TensorSpec"]),
        ("ragged", ["same shape", "'tff'"]),
        ("ragged clients", ["shape (1,) and (2,)", "same shape"]),
        ("empty clients", ["2 of the 4 clients", "first 'zoe'", "clients="]),
        ("nothing", ["no example"]),
        ("too many clients", ["clients is 5", "4 clients"]),
        ("unknown client", ["no client 'zo'", "did you mean 'zoe'?"]),
        ("no clients", ["clients is empty", "leave it out"]),
        ("half a client", ["a number of clients or a list", "1.5"]),
        ("feature by number", ["x must be the name", "5"]),
        ("ids twice", ["only 1 different ids"]),
        ("gone", ["could not be read", "No such file"]),
        ("part", ["'train'", "'validation'"]),
        ("offline emnist", ["emnist is not on this machine", "refused", "emnist_all.sqlite", "DPFL_DATA_DIR"]),
        ("offline cifar100", ["refused", "cifar100.sqlite", "cache_dir="]),
        ("offline shakespeare", ["refused", "shakespeare.sqlite"]),
        ("offline stackoverflow", ["refused", "stackoverflow.sqlite"]),
        ("silence", ["no answer within 0.5 seconds"]),
        ("damaged", ["emnist_all.sqlite is not TFF's dataset emnist", "malformed", "delete it"]),
        ("cut short", ["could not download", "malformed"]),
        ("breaks off", ["could not download", "reset by peer"]),
        ("too few words", ["words is 0"]),
        ("length", ["sequence_length is 0"]),
        ("partition", ["'emnist' takes no option 'partition'", "valid are 'clients', 'seed'"]),
        ("too many users", ["clients is 1000", "3 clients"]),
    ],
)
def test_what_is_refused_is_said_in_one_sentence(answer, name, words) -> None:
    sentence = answer["refused"][name]
    for word in words:
        assert word in sentence
    assert re.fullmatch(r"[^\n]*[.?]", sentence), sentence
    assert not re.search(r"[.?!]\s", sentence), f"more than one sentence: {sentence}"
    assert len(sentence) < 500


@in_tff
def test_nothing_else_is_refused(answer) -> None:
    tested = next(
        mark for mark in test_what_is_refused_is_said_in_one_sentence.pytestmark if mark.name == "parametrize"
    )
    assert set(answer["refused"]) == {name for name, _ in tested.args[1]}


@pytest.mark.parametrize("action", ["from", "to", "load"])
def test_a_machine_without_tff_gets_a_sentence(monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_federated", None)
    ask = {
        "from": lambda: dpfl.FederatedData.from_tff({}),
        "to": dpfl.data.digits().to_tff,
        "load": lambda: dpfl.data.load("emnist"),
    }
    with pytest.raises(InputError, match=r"^TensorFlow Federated has no package for this machine"):
        ask[action]()


def test_the_package_of_data_imports_neither_tensorflow_nor_pandas() -> None:
    code = "import sys, dpfl.data; assert not {'tensorflow', 'tensorflow_federated', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
