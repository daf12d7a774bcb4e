"""A program that reads and writes TFF's client data, offline, and tells what it found; and what it should find.

`python client_data_program.py FOLDER` writes answer.json and one NAME.npz for each dataset into the folder. The SQLite
files are in the format of TFF's published ones, so that TFF's own loaders open them.
"""

import bz2
import collections
import io
import json
import lzma
import os
import socket
import sqlite3
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import numpy as np

IDS = ["zoe", "10", "2", "Ann O. Nym"]  # no order but their own
SIZES = [3, 1, 300, 7]  # one more than is read at once


def own_examples():
    """Features, classes and clients of the examples that all kinds of client data hold here."""
    rng = np.random.default_rng(0)
    total = sum(SIZES)
    x = rng.normal(size=(total, 2, 3)).astype(np.float32)
    return x, rng.integers(0, 4, total).astype(np.int32), np.repeat(np.arange(len(IDS)), SIZES)


def emnist(only_digits):
    rng = np.random.default_rng(1)
    classes = 10 if only_digits else 62

    def writer(count):
        return [
            {"pixels": rng.uniform(size=(28, 28)).astype(np.float32), "label": int(rng.integers(classes))}
            for _ in range(count)
        ]

    prefix = "digits_only" if only_digits else "all"
    return {
        f"{prefix}_train": {"f0001_41": writer(3), "f0000_14": writer(5), "f2": writer(2)},
        f"{prefix}_test": {"f0000_14": writer(1), "f0001_41": writer(2), "f2": writer(1)},
    }


def cifar100():
    rng = np.random.default_rng(2)

    def client(count):
        return [
            {
                "coarse_label": int(rng.integers(20)),
                "image": rng.integers(0, 256, (32, 32, 3)),
                "label": int(rng.integers(100)),
            }
            for _ in range(count)
        ]

    return {"train": {"0": client(4), "10": client(3), "2": client(2)}, "test": {"0": client(2), "1": client(3)}}


SHAKESPEARE = {
    "train": {
        "HAMLET": [{"snippets": b"To be,\nor"}, {"snippets": b"A"}],
        "LEAR_FOOL": [{"snippets": b"No\xe9{!"}],
    },
    "test": {"LEAR_FOOL": [{"snippets": b"Nuncle"}], "HAMLET": [{"snippets": b"I"}]},
}
WORDS = {"the": 90, "code": 50, "is": 40, "#": 7, "rare": 1}


def _sentences(*sentences):
    return [
        {
            "creation_date": b"2010-01-08 09:34:05 UTC",
            "score": 3,
            "tags": b"sql|median",
            "title": b"how",
            "tokens": sentence,
            "type": b"answer",
        }
        for sentence in sentences
    ]


STACKOVERFLOW = {
    "train": {
        "77": _sentences(b"the code is the #", b"unseen is code", b"too late the"),
        "8": _sentences(b"code rare is"),
        "9": _sentences(b"is is"),
    },
    "heldout": {"500": _sentences(b"the the the the")},
    "test": {"8": _sentences(b"the is"), "9": _sentences(b"is code"), "12": _sentences(b"# the")},
}


def write_database(path, splits):
    """Writes what TFF's loaders read: a row with a `tf.train.Example` for each example."""
    import tensorflow as tf

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        value = np.asarray(value)
        if value.dtype.kind == "f":
            return tf.train.Feature(float_list=tf.train.FloatList(value=value.ravel()))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=value.ravel()))

    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE examples (split_name TEXT NOT NULL, client_id TEXT NOT NULL,"
        " serialized_example_proto BLOB NOT NULL);"
        "CREATE TABLE client_metadata (client_id TEXT NOT NULL, split_name TEXT NOT NULL,"
        " num_examples INTEGER NOT NULL);"
    )
    for split, clients in splits.items():
        for client, examples in clients.items():
            connection.execute("INSERT INTO client_metadata VALUES (?, ?, ?)", (client, split, len(examples)))
            for example in examples:
                features = tf.train.Features(feature={key: feature(value) for key, value in example.items()})
                row = (split, client, tf.train.Example(features=features).SerializeToString())
                connection.execute("INSERT INTO examples VALUES (?, ?, ?)", row)
    connection.commit()
    connection.close()


def write_cache(folder):
    """Writes the four databases and the word counts to where TFF looks for them."""
    (folder / "datasets").mkdir(parents=True)
    write_database(folder / "emnist_all.sqlite", emnist(True) | emnist(False))
    write_database(folder / "cifar100.sqlite", cifar100())
    write_database(folder / "shakespeare.sqlite", SHAKESPEARE)
    write_database(folder / "stackoverflow.sqlite", STACKOVERFLOW)
    text = "".join(f"{word} {count}\n" for word, count in WORDS.items()).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tarfile.TarInfo("stackoverflow.word_count")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    (folder / "datasets" / "stackoverflow.word_count.tar.bz2").write_bytes(bz2.compress(archive.getvalue()))


class Sentences:
    """Collects what is refused."""

    def __init__(self):
        self.refused = {}

    def of(self, name, action):
        from dpfl import InputError

        try:
            action()
        except InputError as error:
            self.refused[name] = str(error)


def keep(folder, name, data):
    np.savez(
        folder / f"{name}.npz",
        x=data.x,
        y=data.y,
        offsets=data.offsets,
        x_test=data.x_test,
        y_test=data.y_test,
        x_validation=data.x_validation,
        y_validation=data.y_validation,
        client_ids=np.array(data.client_ids),
        class_names=np.array(data.class_names),
        assumptions=np.array(data.assumptions),
        name=data.name,
    )


def own_client_data(folder, tff, tf):
    """The same examples in every kind of client data that TFF has."""
    datasets = tff.simulation.datasets
    x, y, owners = own_examples()
    of = {name: (x[owners == k], y[owners == k]) for k, name in enumerate(IDS)}
    Element = collections.namedtuple("Element", ["label", "value"])

    def named(client):
        return tf.data.Dataset.from_tensor_slices(collections.OrderedDict(label=of[client][1], x=of[client][0]))

    slices = datasets.TestClientData({name: tuple(pair) for name, pair in of.items()})

    def by_function(client):
        number = tf.argmax(tf.cast(tf.equal(client, IDS), tf.int32))
        mine = tf.boolean_mask(np.arange(len(x)), tf.equal(owners, number))
        return tf.data.Dataset.from_tensor_slices(mine).map(lambda row: (tf.gather(x, row), tf.gather(y, row)))

    function = datasets.ClientData.from_clients_and_tf_fn(IDS, by_function)
    (folder / "files").mkdir()
    for number, client in enumerate(IDS):
        rows = np.column_stack([of[client][0].reshape(-1, 6), of[client][1]])
        np.savetxt(folder / "files" / f"{number}.csv", rows, delimiter=",", fmt="%.9g")

    def read_csv(path):
        rows = tf.data.experimental.CsvDataset(path, [tf.float32] * 6 + [tf.int32])
        return rows.map(lambda *row: collections.OrderedDict(label=row[6], value=tf.reshape(tf.stack(row[:6]), [2, 3])))

    files = datasets.FilePerUserClientData(
        {client: str(folder / "files" / f"{number}.csv") for number, client in enumerate(IDS)}, read_csv
    )
    database = str(folder / "own.sqlite")
    datasets.save_to_sql_client_data(IDS, named, database)
    sql = datasets.load_and_parse_sql_client_data(database, named(IDS[0]).element_spec)
    return {
        "slices": slices,
        "function": function,
        "batches": slices.preprocess(lambda dataset: dataset.batch(2)),
        "named tuples": function.preprocess(lambda dataset: dataset.map(lambda x, y: Element(y, x))),
        "files": files,  # sorted ids
        "sql": sql,  # sorted ids
    }


def read_own(folder, tff, tf, answer, refused):
    import dpfl

    kinds = own_client_data(folder, tff, tf)
    read = dpfl.FederatedData.from_tff
    answer["fingerprints"] = {}
    for name, client_data in kinds.items():
        data = read(client_data, num_classes=4, split="clients", test_fraction=0.25, validation_fraction=0, seed=3)
        answer["fingerprints"][name] = data.fingerprint
        answer.setdefault("ids", {})[name] = data.client_ids
    answer["assumptions"] = data.assumptions
    sql, slices, function = (kinds[name] for name in ("sql", "slices", "function"))

    # A given test set, of clients or of nobody; some clients; what is scaled, strung together and named.
    test = function.create_tf_dataset_for_client("2").take(5)
    keep(folder, "tested", read(slices, test=test, validation=sql, clients=["10", "zoe"], num_classes=4, name="tested"))
    answer["drawn"] = [
        read(function, test=test, clients=2, validation_fraction=0, seed=seed, progress=False).client_ids
        for seed in range(8)
    ]
    columns = datasets_of_columns(tff)
    keep(folder, "columns", read(columns, x=["height", "weight"], y="kind", test=columns, validation_fraction=0))
    images = columns.preprocess(
        lambda dataset: dataset.map(lambda row: (tf.fill([2, 2], tf.cast(row["weight"], tf.uint8)), [row["weight"]]))
    )
    keep(folder, "images", read(images, test=images, validation_fraction=0))

    def mapped(function):
        return slices.preprocess(lambda dataset: dataset.map(function))

    cases = {
        "no client data": lambda: read({"a": 1}),
        "a pair": lambda: read((slices, slices)),
        "held out": lambda: read(slices, test=([[1.0]], [1])),
        "unknown x": lambda: read(sql, x="pixel"),
        "unknown y": lambda: read(sql, y="labels"),
        "unclear y": lambda: read(columns),
        "unclear x": lambda: read(columns, y="kind"),
        "twice": lambda: read(sql, x="label", y="label"),
        "text": lambda: read(columns, x="kind", y="weight"),
        "one-hot": lambda: read(mapped(lambda x, y: (x, tf.one_hot(y, 4)))),
        "serialised": lambda: read(tff.simulation.datasets.SqlClientData(str(folder / "own.sqlite"))),
        "nested": lambda: read(mapped(lambda x, y: ({"a": x}, y))),
        "single": lambda: read(mapped(lambda x, y: x)),
        "ragged": lambda: read(mapped(lambda x, y: (tf.fill([y + 1], 0.0), y))),
        "ragged clients": lambda: read(
            tff.simulation.datasets.TestClientData({str(n): (np.ones((2, n)), np.ones(2, int)) for n in (1, 2)})
        ),
        "empty clients": lambda: read(function.preprocess(lambda dataset: dataset.skip(3))),
        "nothing": lambda: read(function.preprocess(lambda dataset: dataset.take(0))),
        "too many clients": lambda: read(slices, clients=5),
        "unknown client": lambda: read(slices, clients=["zo"]),
        "no clients": lambda: read(slices, clients=[]),
        "half a client": lambda: read(slices, clients=1.5),
        "feature by number": lambda: read(slices, x=5),
        "ids twice": lambda: read(function.from_clients_and_tf_fn(["2", "2"], function.serializable_dataset_fn)),
        "gone": lambda: read(kinds["files"].preprocess(lambda dataset: dataset)),
        "part": lambda: dpfl.data.digits().held_out("train"),
    }
    for name, case in cases.items():
        if name == "gone":
            (folder / "files" / "1.csv").unlink()
        refused.of(name, case)


def datasets_of_columns(tff):
    """A table: one feature for each column, the class a word."""
    clients = {
        "a": collections.OrderedDict(height=np.array([1.5, 2.5]), kind=[b"cat", b"dog"], weight=np.array([51, 102])),
        "b": collections.OrderedDict(height=np.array([3.5]), kind=[b"cat"], weight=np.array([255])),
    }
    return tff.simulation.datasets.TestClientData(clients)


def leave(folder, tff, tf, answer):
    """Out of dpfl: a round trip, TFF's graph, TFF's database, and a round of TFF's own federated averaging."""
    import dpfl

    data = dpfl.data.digits(clients=12)
    client_data = data.to_tff()
    back = dpfl.FederatedData.from_tff(
        client_data, test=data.held_out(), validation=data.held_out("validation"), num_classes=10, name="digits"
    )
    answer["round trip"] = [
        [round_trip.fingerprint, list(round_trip.client_ids), round_trip.name] for round_trip in (data, back)
    ]
    database = str(folder / "digits.sqlite")
    tff.simulation.datasets.save_to_sql_client_data(
        client_data.client_ids, client_data.create_tf_dataset_for_client, database
    )
    spec = client_data.element_type_structure
    from_database = dpfl.FederatedData.from_tff(
        tff.simulation.datasets.load_and_parse_sql_client_data(database, spec), test=data.held_out(), num_classes=10
    )
    answer["from database"] = from_database.num_examples + len(from_database.x_validation)
    rows = list(client_data.create_tf_dataset_from_all_clients(seed=0).as_numpy_iterator())
    answer["all in graph"] = [len(rows), float(sum(row["x"].sum() for row in rows)), float(data.x.sum())]
    try:
        list(tf.data.Dataset.from_tensors("nobody").flat_map(client_data.serializable_dataset_fn))
    except tf.errors.InvalidArgumentError as error:
        answer["nobody"] = str(error)

    batched = client_data.preprocess(lambda dataset: dataset.batch(20))
    computation = batched.dataset_computation
    spec = batched.element_type_structure

    def model():
        layers = [tf.keras.layers.Flatten(input_shape=(8, 8, 1)), tf.keras.layers.Dense(10, kernel_initializer="zeros")]
        return tff.learning.models.from_keras_model(
            tf.keras.Sequential(layers), loss=tf.keras.losses.SparseCategoricalCrossentropy(True), input_spec=spec
        )

    process = tff.learning.algorithms.build_unweighted_fed_avg(
        model, client_optimizer_fn=tff.learning.optimizers.build_sgdm(0.1)
    )
    by_id = tff.simulation.compose_dataset_computation_with_learning_process(computation, process)
    cohorts = ((process, [batched.create_tf_dataset_for_client(name) for name in ("3", "11")]), (by_id, ["3", "11"]))
    outputs = [one.next(one.initialize(), cohort) for one, cohort in cohorts]
    answer["models in TFF"] = [
        {
            "examples": int(output.metrics["client_work"]["train"]["num_examples"]),
            "weights": [part.ravel().tolist() for part in one.get_model_weights(output.state).trainable],
        }
        for (one, _), output in zip(cohorts, outputs, strict=True)
    ]
    answer["examples of the cohort"] = int(data.client_sizes[[3, 11]].sum())


class Download:
    """Stands for the network: answers TFF with this, until it breaks off."""

    def __init__(self, content, breaks_off=False):
        self.stream, self.breaks_off = io.BytesIO(content), breaks_off
        self.headers = {"content-length": str(len(content))}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def read(self, size):
        part = self.stream.read(size)
        if self.breaks_off and not part:
            raise ConnectionResetError("reset by peer. Sorry")
        return part


def load_named(folder, tff, answer, refused):
    import dpfl
    from dpfl.tff import downloads

    home = Path(os.environ["HOME"])
    for name in ("emnist", "cifar100", "shakespeare", "stackoverflow"):
        refused.of(f"offline {name}", lambda name=name: dpfl.data.load(name))
    answer["home after offline"] = sorted(map(str, home.rglob("*")))

    # A proxy that takes the call and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        before, downloads._SECONDS_TO_ANSWER = downloads._SECONDS_TO_ANSWER, 0.5
        closed, os.environ["https_proxy"] = os.environ["https_proxy"], f"http://127.0.0.1:{silent.getsockname()[1]}"
        urllib.request.install_opener(None)
        start = time.monotonic()
        refused.of("silence", dpfl.data.emnist)
        answer["seconds of silence"] = time.monotonic() - start
        downloads._SECONDS_TO_ANSWER, os.environ["https_proxy"] = before, closed
        urllib.request.install_opener(None)
    answer["timeout after"] = socket.getdefaulttimeout()

    cache = folder / "cache"
    write_cache(cache)
    load = dpfl.data.load
    keep(folder, "emnist", load("emnist", validation_fraction=0, cache_dir=cache))
    os.environ["DPFL_DATA_DIR"] = str(cache)
    keep(folder, "emnist62", load("emnist", only_digits=False, validation_fraction=0.2, clients=2, seed=5))
    keep(folder, "cifar100", load("cifar100", validation_fraction=0))
    keep(folder, "shakespeare", load("shakespeare", validation_fraction=0, sequence_length=4))
    from_tff = dpfl.FederatedData.from_tff(
        tff.simulation.datasets.emnist.load_data(cache_dir=str(cache))[0], split="clients", seed=1, num_classes=10
    )
    answer["emnist from TFF"] = [float(from_tff.x_test[0, 0, 0]), *from_tff.client_ids]

    # The published file of word counts has a checksum that no other file has.
    from keras.src.utils import data_utils

    checked = []
    data_utils.validate_file = lambda path, checksum, **_: bool(checked.append(checksum)) or True
    options = {"words": 4, "sequence_length": 4, "max_sentences_per_client": 2, "test_clients": 2}
    keep(folder, "stackoverflow", load("stackoverflow", clients=3, validation_fraction=0, **options))
    answer["checksums"] = len(checked)
    whole = load(
        "stackoverflow", clients=["77", "8"], words=4, sequence_length=4, test_clients=3, validation_fraction=0
    )
    answer["whole stackoverflow"] = [whole.client_sizes.tolist(), len(whole.x_test)]
    refused.of("too few words", lambda: load("stackoverflow", words=0))
    refused.of("length", lambda: load("shakespeare", sequence_length=0))
    refused.of("partition", lambda: load("emnist", partition="iid"))
    refused.of("too many users", lambda: load("stackoverflow"))

    # As TFF numbers characters and words in its own tasks.
    from tensorflow_federated.python.simulation.baselines.shakespeare import char_prediction_preprocessing as characters
    from tensorflow_federated.python.simulation.baselines.stackoverflow import word_prediction_preprocessing as words

    from dpfl.data.text import SHAKESPEARE_CHARACTERS, Vocabulary

    text = b"To be,\nor\xe9{ "
    padded = characters._build_tokenize_fn(1)({"snippets": text}).numpy()
    ours = Vocabulary(tuple(SHAKESPEARE_CHARACTERS)).sequences([text.decode("latin-1")])[0]
    answer["characters"] = [padded.tolist(), ours.tolist()]
    answer["words"] = []
    for sentence in ("the code  is unseen", "is is is the", "the", "", "a b c d e"):
        theirs = words.build_to_ids_fn(list(WORDS)[:4], 4)({"tokens": sentence}).numpy()
        ours = Vocabulary(tuple(WORDS)[:4]).sequences([sentence.split(" ")], 4)[0]
        answer["words"].append([theirs.tolist(), ours.tolist()])

    # Downloads: one that is cut short unnoticed, one that breaks off, a whole one.
    del os.environ["DPFL_DATA_DIR"]
    packed = lzma.compress((cache / "cifar100.sqlite").read_bytes())
    real = urllib.request.urlopen

    def network(content, **options):
        def urlopen(asked, **_):
            return Download(b"") if isinstance(asked, urllib.request.Request) else Download(content, **options)

        urllib.request.urlopen = urlopen

    (cache / "emnist_all.sqlite").write_bytes((cache / "emnist_all.sqlite").read_bytes()[:9000])
    refused.of("damaged", lambda: load("emnist", cache_dir=cache))
    network(packed[: len(packed) // 2])
    refused.of("cut short", lambda: load("cifar100"))
    network(packed[: len(packed) // 2], breaks_off=True)
    refused.of("breaks off", lambda: load("cifar100"))
    answer["home after broken downloads"] = sorted(path.name for path in (home / ".tff").iterdir())
    network(packed)
    answer["downloaded"] = [load("cifar100").fingerprint, load("cifar100", cache_dir=cache).fingerprint]
    answer["home after download"] = sorted(path.name for path in (home / ".tff").iterdir())
    urllib.request.urlopen = real


def main(folder):
    import tensorflow as tf

    from dpfl.tff.runtime import tensorflow_federated

    tff = tensorflow_federated()
    answer, refused = {}, Sentences()
    read_own(folder, tff, tf, answer, refused)
    load_named(folder, tff, answer, refused)
    leave(folder, tff, tf, answer)
    answer["refused"] = refused.refused
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
