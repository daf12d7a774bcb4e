import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpfl.data import FederatedData, load, write_clients
from dpfl.data.alignment import aligned, is_aligned

ARRAYS = ("x", "y", "offsets", "x_validation", "y_validation", "x_test", "y_test")


def _data(examples: int = 6) -> FederatedData:
    """Three clients."""
    rng = np.random.default_rng(0)
    return FederatedData(
        name="tiny",
        x=rng.normal(size=(examples, 2, 3)),
        y=rng.integers(0, 3, examples),
        offsets=[0, 2, 3, examples],
        x_validation=[],
        y_validation=[],
        x_test=rng.normal(size=(2, 2, 3)),
        y_test=[2, 0],
        num_classes=3,
        client_ids=("a", "b", "ü"),
        class_names=("x", "y", "z"),
        assumptions=("Something is public.",),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a dataset was saved."""
    _data().save(tmp_path / "saved")
    return tmp_path / "saved"


def _is_mapped(array: np.ndarray, path: Path) -> bool:
    return isinstance(array.base, np.memmap) and Path(str(array.base.filename)) == path


def test_what_was_saved_is_what_is_opened_and_stays_on_disk(folder: Path) -> None:
    data, again = _data(), FederatedData.open(folder)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name), strict=True)
        assert _is_mapped(getattr(again, name), folder / f"{name}.npy")
        assert not getattr(again, name).flags.writeable
        assert is_aligned(getattr(again, name))
    for name in ("name", "num_classes", "client_ids", "class_names", "assumptions", "fingerprint"):
        assert getattr(again, name) == getattr(data, name)
    del again.__dict__["fingerprint"]
    assert again.fingerprint == data.fingerprint, "that of the content is not the one that was noted"
    assert load(folder).summary() == load(str(folder)).summary() == data.summary()


def test_a_saved_dataset_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    FederatedData.open(folder).save(tmp_path / "deep" / "er")
    assert FederatedData.open(tmp_path / "deep" / "er").fingerprint == _data().fingerprint


def test_pickle_says_where_the_data_is(tmp_path: Path) -> None:
    data = _data(examples=10_000)
    data.save(tmp_path / "saved")
    opened = FederatedData.open(tmp_path / "saved")
    for version in (opened, replace(opened, name="other")):
        pickled = pickle.dumps(version)
        assert len(pickled) < 10_000 < data.x.nbytes < len(pickle.dumps(data))
        again = pickle.loads(pickle.dumps(pickle.loads(pickled)))
        assert _is_mapped(again.x, tmp_path / "saved" / "x.npy")
        assert (again.fingerprint, again.name) == (data.fingerprint, version.name)
        assert not again.x.flags.writeable


def test_arrays_that_differ_from_their_file_are_pickled(folder: Path) -> None:
    opened = FederatedData.open(folder)
    path = folder / "x.npy"
    own = np.load(path, mmap_mode="c")
    own[0] = 7
    part = np.load(path, mmap_mode="r")[1:]
    for x, changes in ((own, {}), (part, {"offsets": [0, 1, 2, 5], "y": opened.y[1:]})):
        again = pickle.loads(pickle.dumps(replace(opened, x=x, **changes)))
        np.testing.assert_array_equal(again.x, x)
        assert not isinstance(again.x.base, np.memmap)


def test_another_process_refuses_data_that_changed_meanwhile(folder: Path, refuses: Any) -> None:
    pickled = pickle.dumps(FederatedData.open(folder))
    os.utime(folder / "x.npy", ns=(0, 0))
    with refuses("x.npy", "another process", "cp -a"):
        pickle.loads(pickled)
    shutil.rmtree(folder)
    with refuses(".npy", "another process", "No such file"):
        pickle.loads(pickled)


def test_the_users_own_memory_maps_stay_on_disk(tmp_path: Path) -> None:
    data = _data()
    np.save(tmp_path / "mine.npy", data.x)
    mapped = replace(data, x=np.load(tmp_path / "mine.npy", mmap_mode="r"))
    assert _is_mapped(mapped.x, tmp_path / "mine.npy")
    assert mapped.fingerprint == data.fingerprint


def test_copies_are_read_once_and_believed_if_they_are_the_same(folder: Path, tmp_path: Path, refuses: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert FederatedData.open(copy).fingerprint == _data().fingerprint
    array = np.load(copy / "y.npy", mmap_mode="r+")
    array[0] = (array[0] + 1) % 3
    array.flush()
    with refuses("y", str(copy), "changed", "fingerprint"):
        FederatedData.open(copy)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)


def _undescribe(folder: Path) -> None:
    (folder / "dataset.json").unlink()


def _cut(folder: Path) -> None:
    with (folder / "x.npy").open("r+b") as file:
        file.truncate(200)


def _lose(folder: Path) -> None:
    (folder / "y_test.npy").unlink()


def _retype(folder: Path) -> None:
    np.save(folder / "y.npy", np.load(folder / "y.npy").astype(np.float32))


def _reshape(folder: Path) -> None:
    np.save(folder / "x.npy", np.load(folder / "x.npy").reshape(6, 3, 2))


def _overwrite(folder: Path) -> None:
    (folder / "x.npy").write_bytes(b"?" * (folder / "x.npy").stat().st_size)


def _describe(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        described = json.loads((folder / "dataset.json").read_text())
        kept = {name: value for name, value in (described | changes).items() if value is not None}
        (folder / "dataset.json").write_text(json.dumps(kept))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove, ["no folder"]),
        (_undescribe, ["dataset.json"]),
        (_cut, ["x.npy", "200 bytes", "272 were saved"]),
        (_lose, ["no file", "y_test.npy"]),
        (_retype, ["y.npy", "float32", "int32"]),
        (_reshape, ["x.npy", "[6, 3, 2]", "[6, 2, 3]"]),
        (_overwrite, ["x.npy", "cannot be read"]),
        (lambda folder: (folder / "dataset.json").write_text("{"), ["dataset.json", "cannot be read"]),
        (_describe(format=2), ["dataset.json", "format 1"]),
        (_describe(fingerprint=None), ["dataset.json", "fingerprint"]),
        (_describe(files={}), ["dataset.json", "x"]),
        (_describe(num_classes=4), ["3 class names", "4 classes"]),
        (_describe(client_ids=["a", "b"]), ["3 clients", "2 different"]),
    ],
)
def test_damaged_folders_are_refused(
    damage: Callable[[Path], None], words: list[str], folder: Path, refuses: Any
) -> None:
    damage(folder)
    with refuses(*words):
        FederatedData.open(folder)


def test_nothing_is_overwritten_and_nothing_left_behind(folder: Path, tmp_path: Path, refuses: Any) -> None:
    before = sorted(folder.iterdir())
    with refuses(str(folder), "already"):
        _data().save(folder)
    (tmp_path / "file").touch()
    with refuses("file", "already"):
        _data().save(tmp_path / "file")
    with refuses("cannot be written"):
        _data().save(tmp_path / "file" / "below")
    assert sorted(folder.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "saved"]


def test_a_folder_takes_no_options(folder: Path, refuses: Any) -> None:
    with refuses(str(folder), "no option 'clients'"):
        load(folder, clients=3)


def _clients(data: FederatedData) -> Iterator[tuple[str, Any, Any]]:
    for k, client in enumerate(data.client_ids):
        x, y = data.client(k)
        yield client, x.astype(np.float64), y.tolist()


def test_writing_client_by_client_is_saving(tmp_path: Path) -> None:
    data = _data(examples=1_200)  # more digits than there are when the header is first written
    written = write_clients(
        tmp_path / "written", _clients(data), num_classes=3, test=(data.x_test, data.y_test), assumptions=["So it is."]
    )
    assert written.fingerprint == data.fingerprint
    assert (written.name, written.client_ids, written.class_names) == ("written", data.client_ids, ("0", "1", "2"))
    assert written.assumptions[0] == "So it is."
    assert "treated as public" in written.assumptions[1]
    assert _is_mapped(written.x, tmp_path / "written" / "x.npy")
    given = {"test": (data.x_test, data.y_test), "validation": (data.x[:4], data.y[:4])}
    named = write_clients(
        tmp_path / "named", _clients(data), num_classes=3, **given, name="n", class_names=data.class_names
    )
    assert (named.name, named.class_names, len(named.y_validation)) == ("n", data.class_names, 4)


@pytest.mark.parametrize(
    ("clients", "words"),
    [
        ([], ["no clients"]),
        ([("a", [[1.0]], [0])], ["1 clients", "at least 2"]),
        ([("a", [[1.0]], [0]), ("a", [[1.0]], [0])], ["1 different client_ids"]),
        ([("a", [[1.0]], [0]), ("b", [[1.0, 2.0]], [0])], ["client 'b'", "(2,)", "(1,)"]),
        ([("a", [[1.0]], [0]), ("b", [[1.0], [np.nan]], [0, 0])], ["example 1", "client 'b'", "nan"]),
        ([("a", [[1.0]], [2])], ["label 2", "client 'a'"]),
        ([("a", [], [])], ["client 'a'", "at least one example"]),
    ],
)
def test_clients_are_checked_as_they_come(clients: list[Any], words: list[str], tmp_path: Path, refuses: Any) -> None:
    with refuses(*words):
        write_clients(tmp_path / "new", clients, num_classes=2, test=([[0.0]], [1]))
    assert not list(tmp_path.iterdir())


def test_errors_of_whoever_brings_the_clients_stay_their_own(tmp_path: Path) -> None:
    def clients() -> Iterator[tuple[str, Any, Any]]:
        yield "a", [[1.0]], [0]
        raise FileNotFoundError("mine")

    with pytest.raises(FileNotFoundError, match="mine"):
        write_clients(tmp_path / "new", clients(), num_classes=2, test=([[0.0]], [1]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("row", [0, 3, 4, 9])
def test_checks_in_blocks_find_the_right_place(row: int, monkeypatch: pytest.MonkeyPatch, refuses: Any) -> None:
    monkeypatch.setattr("dpfl.data.checks._BLOCK", 4 * 24)  # four examples in a block of features, 24 in one of labels
    data = _data(examples=10)
    x, y = data.x.copy(), np.repeat(data.y, 10)
    x[row, 1, 2] = np.inf
    x[9, 1, 1] = np.nan if row < 9 else 0
    with refuses(f"training example {row} ", "inf at feature 1, 2"):
        replace(data, x=x)
    y[row * 10 + 5] = 3
    with refuses("training label 3", f"row {row * 10 + 5} "):
        replace(data, x=np.repeat(data.x, 10, axis=0), y=y, offsets=[0, 1, 2, 100])


def test_memory_maps_are_never_held_as_a_whole(tmp_path: Path) -> None:
    examples = 20_000
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (examples, 1_000))  # 80 MB of zeros
    data = _data()
    few = {"x_test": np.zeros((1, 1_000)), "y_test": [0], "x_validation": [], "y": np.zeros(examples, np.int32)}
    tracemalloc.start()
    try:
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
        mapped = replace(data, x=x, offsets=[0, 1, 2, examples], **few)
        assert len(mapped.fingerprint) == 64
        mapped.save(tmp_path / "saved")
        assert FederatedData.open(tmp_path / "saved").fingerprint == mapped.fingerprint
        _, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert highest < x.nbytes / 2


@pytest.mark.parametrize("offset", [0, 4, 16, 32, 64])
def test_alignment_copies_where_it_must(offset: int) -> None:
    memory = np.arange(400, dtype=np.uint8)
    start = -memory.ctypes.data % 64 + offset
    array = memory[start : start + 80].view(np.float32).reshape(4, 5)
    again = aligned(array, np.float32)
    assert is_aligned(again)
    assert np.shares_memory(again, array) == (offset % 64 == 0)
    np.testing.assert_array_equal(again, array)
    assert is_aligned(aligned(array.T, np.float32))
    assert is_aligned(pickle.loads(pickle.dumps(_data())).x)


def test_a_tensor_shares_memory_with_its_array(folder: Path) -> None:
    import tensorflow as tf

    from dpfl.simulation.data_tensors import resident_tensor

    own = aligned(np.full((50, 3), -1.0), np.float32)
    tensor = resident_tensor(own)
    own[7] = -2  # which nobody should do, and shows whose memory it is
    own.flags.writeable = False
    gather = tf.function(lambda rows: tf.gather(tensor, rows), autograph=False)
    assert gather(tf.constant([7])).numpy().tolist() == [[-2.0, -2.0, -2.0]]
    # No operation takes the memory for its result, also where it is the last to need it.
    assert tf.nn.relu(resident_tensor(own)).numpy().max() == 0
    assert tf.function(lambda x: tf.nn.relu(x) + 1, autograph=False)(resident_tensor(own)).numpy().min() == 1
    assert own.max() == -1

    opened = FederatedData.open(folder)
    for array in (opened.x, opened.y, opened.x_validation, opened.x[1:], opened.x.T):
        assert (resident_tensor(array).numpy() == array).all()


def test_a_run_on_stored_data_is_the_run_in_memory(tmp_path: Path) -> None:
    import dpfl
    from dpfl.simulation import run

    data = dpfl.data.synthetic(clients=30, examples_per_client=7, seed=1)
    data.save(tmp_path / "saved")
    results = []
    for source in (data, dpfl.data.load(tmp_path / "saved")):
        run._ENGINES.clear()  # the content is the same, and so the engine of the first would serve the second
        experiment = dpfl.Experiment(
            data=source,
            local=dpfl.ClientTraining(learning_rate=0.1, epochs=1, batch_size=3),
            privacy=dpfl.Privacy(epsilon=4, delta=1e-2),
            sampler=dpfl.Poisson(cohort=8),
            rounds=3,
        )
        results.append(experiment.run(progress=False))
    first, second = results
    assert first.record["run_id"] == second.record["run_id"]
    for one, other in zip(first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    assert first.history == second.history
