"""The worker process of TensorFlow Federated ends with the process that started it, and nothing of it is heard."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dpfl.tff.worker import end_workers_with_this_process

needs_tff = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_federated") is None,
    reason="TensorFlow Federated has wheels for Linux on x86_64 alone",
)
QUIET = ("TF_CPP_MIN_LOG_LEVEL", "GRPC_VERBOSITY", "GRPC_ENABLE_FORK_SUPPORT", "PYTHONWARNINGS")  # set by nobody
PATIENCE = 300  # seconds, for a crowded machine: nothing here takes ten on an idle one, but for the imports

# How a process ends, by itself or by a signal; what becomes of it, as of `subprocess`.
WAYS = {
    "normal": 0,
    "exception": 1,
    "sys.exit": 3,
    "os._exit": 4,
    "SIGINT": -signal.SIGINT,
    "SIGTERM": -signal.SIGTERM,
    "SIGKILL": -signal.SIGKILL,
    "SIGINT ignored": 0,  # as by a shell's `&` without job control
    "notebook": 4,
    "another version": 0,
    "Ctrl-C while computing": -signal.SIGINT,
    "SIGKILL while computing": -signal.SIGKILL,
}

# Each way in a process of its own, forked after the imports, as these take the time, but before TensorFlow has threads;
# TensorFlow Federated is imported before dpfl.
ENDS = """
import builtins
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from tensorflow_federated.python.core.impl.executor_stacks import executor_factory

from dpfl.tff.runtime import tensorflow_federated

folder, *ways = Path(sys.argv[1]), *sys.argv[2:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # Whatever the tests were started with.
running = {}


def wait():
    child, status = os.wait()
    (folder / running.pop(child) / "code").write_text(str(os.waitstatus_to_exitcode(status)))


for way in ways:
    if len(running) == 4:  # for the sake of the memory
        wait()
    child = os.fork()
    if not child:
        break
    running[child] = way
    (folder / way / "pid").write_text(str(child))
else:
    while running:
        wait()
    os._exit(0)

folder = folder / way
if way == "Ctrl-C while computing":
    os.setpgid(0, 0)
output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
os.dup2(output, 1)
os.dup2(output, 2)
if way == "SIGINT ignored":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if way == "notebook":
    builtins.get_ipython = object
if way == "another version":
    executor_factory.subprocess = types.SimpleNamespace(Popen=subprocess.Popen)

assert tensorflow_federated() is tff
tff.backends.native.set_sync_local_cpp_execution_context()  # The imported one's thread is in the parent.


@tff.tensorflow.computation(np.int64)
def count(number):
    return tf.while_loop(lambda i: i < number, lambda i: (i + 1,), [tf.constant(0, tf.int64)])[0]


process = tff.aggregators.SumFactory().create(tff.TensorType(np.float32))  # keeps the worker, in TFF alone
assert process.next(process.initialize(), [1.0, 2.0]).result == 3
(folder / "ready").write_text("yes")
while not (folder / "go").exists():
    time.sleep(0.05)
if "while computing" in way:
    (folder / "computing").write_text("yes")
    count(10**8)
if way == "exception":
    raise ValueError("on purpose")
if way == "sys.exit":
    sys.exit(3)
if way in ("os._exit", "notebook"):
    os._exit(4)
if way.startswith("SIG") and way != "SIGINT ignored":
    signal.pause()
"""

# What a worker lives through before its parent is killed.
LIFE = """
import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

sys.path.insert(0, sys.argv[2])
from test_tff_worker import workers_of

answer = {}


@tff.tensorflow.computation(np.int32)
def increment(number):
    return number + 1


def workers():
    return [worker.pid for worker in workers_of(os.getpid())]


def soon(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


assert increment(1) == 2
started_by_tff = workers()

from dpfl import InputError
from dpfl.tff.runtime import tensorflow_federated

tensorflow_federated()
taken_over = increment(2), workers()
answer["taken over"] = taken_over[0] == 3 and len(taken_over[1]) == 1 and taken_over[1] != started_by_tff

os.kill(workers()[0], signal.SIGKILL)
answer["restarted"] = increment(3) == 4 and len(workers()) == 1 and workers() != taken_over[1]

# The kernel's parent is a thread.
before = workers()
factory = tff.framework.local_cpp_executor_factory()
thread = threading.Thread(target=factory.create_executor, args=({},))
thread.start()
thread.join()
time.sleep(1)
answer["outlives a thread"] = len(workers()) == 2 and increment(4) == 5
del factory, thread
gc.collect()
answer["ends when nothing can use it"] = soon(lambda: workers() == before)


@tff.tensorflow.computation(np.int32)
def refuse(number):
    with tf.control_dependencies([tf.debugging.assert_less(number, 0, message="on purpose")]):
        return tf.identity(number)


try:
    refuse(1)
except Exception as error:
    answer["error"] = str(error)

refusal, writing = os.pipe()
child = os.fork()
if not child:
    try:
        tensorflow_federated()
    except InputError as error:
        os.write(writing, str(error).encode())
    tff.backends.native.set_sync_local_cpp_execution_context()  # What an end would come to: nothing holds the worker.
    gc.collect()
    os._exit(5)
os.close(writing)
with os.fdopen(refusal) as file:
    answer["refusal in a fork"] = file.read()
answer["fork ended with"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
time.sleep(1)
answer["outlives a fork"] = workers() == before and increment(5) == 6 and workers() == before

Path(sys.argv[1], "answer").write_text(json.dumps(answer, default=bool))
Path(sys.argv[1], "ready").write_text("yes")
signal.pause()
"""

# A user's program.
PROGRAM = """
import os

import dpfl

experiment = dpfl.Experiment(
    data=dpfl.data.digits(clients=10),
    model="softmax",
    local=dpfl.ClientTraining(learning_rate=0.5, batch_size=5, steps=1),
    mechanism=dpfl.Gaussian(clip_norm=0.5, noise_multiplier=1.0),
    privacy=dpfl.Privacy(unit="user", epsilon=None, delta=1e-2),
    sampler=dpfl.Poisson(cohort=3),
    rounds=2,
    engine="tff",
)
experiment.run(seed=0, progress=False)
child = os.fork()  # of which gRPC has something to say
if not child:
    os._exit(0)
os.waitpid(child, 0)
"""

# On a machine without TensorFlow Federated.
WITHOUT = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow_federated":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
import dpfl
import dpfl.tff

experiment = dpfl.Experiment(
    data=dpfl.data.digits(clients=10),
    model="softmax",
    local=dpfl.ClientTraining(learning_rate=0.5, batch_size=5, steps=1),
    mechanism=dpfl.Gaussian(clip_norm=0.5, noise_multiplier=1.0),
    privacy=dpfl.Privacy(unit="user", epsilon=None, delta=1e-2),
    sampler=dpfl.Poisson(cohort=3),
    rounds=1,
)
experiment.run(seed=0, progress=False)
try:
    experiment.replace(engine="tff").run(seed=0, progress=False)
except dpfl.InputError as error:
    print(error)
"""


class Process(NamedTuple):
    """A process, and no other that gets its number later."""

    pid: int
    started: str

    def lives(self) -> bool:
        status = _status(self.pid)
        return status is not None and status[19] == self.started and status[0] != "Z"


def _status(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on, which is the third."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def workers_of(parent: int) -> list[Process]:
    """The workers that are children of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        status = _status(int(folder.name))
        if status is None or status[1] != str(parent) or status[0] == "Z":
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"worker_binary" in (folder / "cmdline").read_bytes():
                found.append(Process(int(folder.name), status[19]))
    return found


def holds_in_time(condition: Callable[[], Any], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def started(script: str, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A script that runs in a group of its own, and gets the folder as an argument; it prints to a file there."""
    (folder / "script.py").write_text(script)
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(folder / "script.py"), str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_ENABLE_FORK_SUPPORT": "0"},  # dpfl comes too late
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read(file: Path) -> str:
    """What a file that may not be there yet contains."""
    return file.read_text() if file.exists() else ""


def orphans(workers: list[Process]) -> list[Process]:
    """Those that outlive their parent, which has ended: they are ended here."""
    holds_in_time(lambda: not any(worker.lives() for worker in workers), seconds=5)
    alive = [worker for worker in workers if worker.lives()]
    for worker in alive:
        os.kill(worker.pid, signal.SIGKILL)
    return alive


class End(NamedTuple):
    """How a process ended."""

    code: str  # nothing, if it did not
    workers: list[Process]  # what it had
    streams: set[str]  # where these read and write
    orphans: list[Process]  # what it left


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    folder = tmp_path_factory.mktemp("ends")
    for way in WAYS:
        (folder / way).mkdir()
    found = {}
    with started(ENDS, folder, *WAYS) as parent:
        try:
            for way in WAYS:
                ended = folder / way / "code"
                holds_in_time(lambda way=way, ended=ended: read(folder / way / "ready") or read(ended) or parent.poll())
                assert read(folder / way / "ready"), [read(folder / "output"), read(folder / way / "output")]
                pid = int(read(folder / way / "pid"))
                workers = workers_of(pid)
                files = [Path(f"/proc/{worker.pid}/fd/{stream}") for worker in workers for stream in range(3)]
                found[way] = End("", workers, {str(file.readlink()) for file in files}, [])
                if way == "SIGINT ignored":
                    os.kill(pid, signal.SIGINT)
                (folder / way / "go").touch()
                if "while computing" in way:
                    holds_in_time(lambda way=way: read(folder / way / "computing"))
                    time.sleep(0.5)
                if way == "Ctrl-C while computing":
                    os.killpg(pid, signal.SIGINT)
                elif WAYS[way] < 0:
                    os.kill(pid, -WAYS[way])
            holds_in_time(lambda: all(read(folder / way / "code") for way in WAYS))
            for way, end in found.items():
                if code := read(folder / way / "code"):
                    found[way] = end._replace(code=code, orphans=orphans(end.workers))
        finally:
            for way in WAYS:
                if (child := read(folder / way / "pid")) and not read(folder / way / "code"):
                    os.kill(int(child), signal.SIGKILL)
            for end in found.values():
                orphans(end.workers)
    return found


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("life")
    with started(LIFE, folder, str(Path(__file__).parent)) as process:
        holds_in_time(lambda: read(folder / "ready") or process.poll() is not None)
        assert read(folder / "ready"), read(folder / "output")
        answer = json.loads(read(folder / "answer"))
        workers = workers_of(process.pid)
        process.kill()
        process.wait()
        return answer | {"workers": workers, "orphans": orphans(workers)}


@needs_tff
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_worker_ends_with_its_parent(ends: dict[str, End], way: str) -> None:
    end = ends[way]
    assert end.code == str(WAYS[way])
    assert len(end.workers) == 1
    assert end.orphans == []


@needs_tff
@pytest.mark.slow
def test_a_worker_holds_no_stream_of_its_parent(ends: dict[str, End]) -> None:
    assert [way for way, end in ends.items() if end.streams != {"/dev/null"}] == ["another version"]


@needs_tff
@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["taken over", "restarted", "outlives a thread", "ends when nothing can use it", "outlives a fork"]
)
def test_a_worker_lives_as_long_as_it_is_needed(life: dict[str, Any], what: str) -> None:
    assert life[what] is True


@needs_tff
@pytest.mark.slow
def test_a_worker_that_was_taken_over_or_restarted_ends_with_its_parent(life: dict[str, Any]) -> None:
    assert len(life["workers"]) == 1
    assert life["orphans"] == []


@needs_tff
@pytest.mark.slow
def test_an_error_in_a_worker_is_still_seen(life: dict[str, Any]) -> None:
    assert "on purpose" in life["error"]


@needs_tff
@pytest.mark.slow
def test_a_fork_is_refused_in_a_sentence(life: dict[str, Any]) -> None:
    assert life["fork ended with"] == 5
    assert re.fullmatch(
        r"TensorFlow Federated was imported before this process was forked [^\n]*\.", life["refusal in a fork"]
    )


@needs_tff
@pytest.mark.slow
def test_a_program_in_a_pipe_ends_and_prints_nothing_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name not in QUIET},
    )
    try:
        printed, _ = process.communicate(timeout=PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert printed == b""
    assert process.returncode == 0


def test_a_worker_that_does_not_start_is_an_error() -> None:
    # TensorFlow Federated would wait for it without end.
    executor_factory = types.SimpleNamespace(subprocess=subprocess)
    assert end_workers_with_this_process(executor_factory)
    with pytest.raises(OSError, match=r"did not start: .* No such file"):
        executor_factory.subprocess.Popen(["/nowhere/worker_binary", "--port=1"], stdout=None)


def test_without_tensorflow_federated_a_sentence_comes_when_it_is_asked_for_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(WITHOUT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        r"TensorFlow Federated has no package for this machine [^\n]*in-graph engine[^\n]*\.\n", done.stdout
    )
