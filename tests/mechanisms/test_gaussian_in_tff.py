"""The query inside TensorFlow Federated releases what it releases in a plain graph, to the bit.

As in the in-graph engine, that is a loop over the clients in a `tf.function`. Run eagerly, the
noise is the same too, but clipping can differ by one unit in the last place.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,  # Importing TensorFlow Federated alone takes some seconds.
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow_federated") is None,
        reason="TensorFlow Federated has wheels for Linux on x86_64 alone",
    ),
]

SCRIPT = """
import json
import os
import sys

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", GRPC_VERBOSITY="NONE", GRPC_ENABLE_FORK_SUPPORT="0")
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from dpfl.mechanisms import Gaussian
from dpfl.privacy import Privacy
from dpfl.sampling import Poisson

plan = Gaussian(clip_norm=0.7).plan(Privacy(epsilon=1, delta=1e-3), Poisson(cohort=20), 60, 4)
shapes = [(3, 2), (2,), ()]
template = [tf.zeros(shape) for shape in shapes]
draws = np.random.default_rng(0)

def records(count):
    return [[np.asarray(draws.normal(size=shape), np.float32) for shape in shapes] for _ in range(count)]

diverged = [np.full(shape, np.nan, np.float32) for shape in shapes]
cohorts = [records(4), [], [*records(2), diverged, *records(1)]]

factory = tff.aggregators.DifferentiallyPrivateFactory(plan.query(7))
process = factory.create(tff.to_type([tff.TensorType(np.float32, shape) for shape in shapes]))
state, by_tff = process.initialize(), []
for cohort in cohorts:
    output = process.next(state, cohort)
    state = output.state
    by_tff.append([np.asarray(part).tolist() for part in output.result])

query = plan.query(7)

@tf.function
def one_round(state, *cohort):
    params = query.derive_sample_params(state)
    def body(index, total):
        record = query.preprocess_record(params, [part[index] for part in cohort])
        return index + 1, query.accumulate_preprocessed_record(total, record)
    loop = (tf.constant(0), query.initial_sample_state(template))
    _, total = tf.while_loop(lambda index, _: index < tf.shape(cohort[0])[0], body, loop)
    return query.get_noised_result(total, state)[:2]

state, by_loop = query.initial_global_state(), []
for cohort in cohorts:
    stacked = [np.array([record[i] for record in cohort], np.float32).reshape(-1, *shapes[i]) for i in range(3)]
    released, state = one_round(state, *stacked)
    by_loop.append([part.numpy().tolist() for part in released])

with open(sys.argv[1], "w") as file:
    json.dump({"tff": by_tff, "loop": by_loop}, file)
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    """Three rounds, the second with nobody and the third with a diverged client: by TFF and in a loop."""
    folder = tmp_path_factory.mktemp("tff")
    (folder / "script.py").write_text(SCRIPT)
    with (folder / "output").open("w") as output:
        # A group of its own: TFF leaves a child, worker_binary, behind, which would hold pipes open.
        process = subprocess.Popen(
            [sys.executable, str(folder / "script.py"), str(folder / "answer")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=180)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, (folder / "output").read_text()[-3000:]
    return json.loads((folder / "answer").read_text())


def test_three_rounds_are_bit_identical(released):
    assert len(released["tff"]) == 3
    # Doubles hold every float32, and JSON every double, exactly.
    assert released["tff"] == released["loop"]


def test_every_round_has_noise_of_its_own(released):
    first = [released["tff"][number][1] for number in range(3)]
    assert first[0] != first[1] != first[2] != first[0]
    assert all(value != 0 and value == value for value in first[1])
