"""The worker process in which TensorFlow Federated computes: one that ends with the process that started it.

TensorFlow Federated 0.87 starts `worker_binary`, which inherits standard output and outlives its parent in most ways
that a parent can end in; who waits for the end of the output then waits for ever. Here the kernel ends it instead: the
worker asks for a signal at its parent's death (`prctl(PR_SET_PDEATHSIG)`), which comes however the parent went.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

# Asks for the signal, and then becomes the worker. A program of its own rather than a `preexec_fn`, as the latter runs
# in a fork of a process that is full of TensorFlow's and gRPC's threads, and locks. What it has to report it writes to
# a copy of standard error that the worker does not inherit: so its end, with nothing in it, says that the worker runs.
_LAUNCHER = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
report = os.dup(2)
os.dup2(1, 2)
try:
    PR_SET_PDEATHSIG = 1
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != int(parent):
        raise ProcessLookupError("the parent ended first")
    os.execv(command[0], command)
except OSError as error:
    os.write(report, str(error).encode())
"""


def end_workers_with_this_process(executor_factory: Any) -> bool:
    """Makes TensorFlow Federated start its workers by `_Worker` from now on.

    A worker that it has started already is ended: it starts another one at its next call, and repeats what was being
    computed.

    Args:
        executor_factory: the module `tensorflow_federated.python.core.impl.executor_stacks.executor_factory`.

    Returns:
        Whether the module starts its workers as that of version 0.87 does, so that there was something to replace.
    """
    if getattr(executor_factory, "subprocess", None) is not subprocess:
        return False
    executor_factory.subprocess = types.SimpleNamespace(Popen=_WorkerPopen)
    for known in gc.get_objects():
        if type(known) is subprocess.Popen and _is_worker(getattr(known, "args", None)):
            # Neither another process's, where this one is a fork, nor reaped: TensorFlow Federated does that.
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                os.waitid(os.P_PID, known.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                os.kill(known.pid, signal.SIGKILL)
    return True


def _is_worker(command: Any) -> bool:
    return isinstance(command, list) and bool(command) and str(command[0]).endswith("/worker_binary")


class _WorkerPopen:
    """What TensorFlow Federated calls as `subprocess.Popen`.

    Nothing is an instance of it: so its `ServiceManager.__del__`, which would signal a process that may be that of the
    parent of a fork, and wait for it without end, leaves all to `_Worker`.
    """

    __class_getitem__: Any = classmethod(types.GenericAlias)  # for an annotation, which is evaluated

    def __new__(cls, command: Sequence[str], **_: Any) -> Any:  # The streams are never the parent's.
        return _Worker(command)


class _Worker:
    """A worker process.

    It ends with this process, when nobody holds this object any more, and when somebody waits for its end.

    Attributes:
        pid: of the process.
    """

    def __init__(self, command: Sequence[str]) -> None:
        started: Future[subprocess.Popen[bytes]] = Future()
        threading.Thread(target=_keep, args=(command, started), name="tff-worker", daemon=True).start()
        process = started.result()
        self.pid = process.pid
        self._end = weakref.finalize(self, _end, process)
        # At exit values that are computed there are released first, and threads may be at work: the kernel is later.
        self._end.atexit = False

    def wait(self) -> None:
        """Ends the process: TensorFlow Federated waits for one that does not answer, to start another one."""
        self._end()


def _keep(command: Sequence[str], started: Future[subprocess.Popen[bytes]]) -> None:
    """Starts a worker and lives as long: to the kernel, the parent is the thread that started a process."""
    try:
        process = _launch(command)
    except BaseException as error:
        started.set_exception(error)
        return
    started.set_result(process)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def _launch(command: Sequence[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for the parent: a worker that it ended would be started anew.
    )
    assert process.stderr is not None
    with process.stderr as report:
        problem = report.read().decode()
    if problem:
        process.wait()
        raise OSError(f"The worker of TensorFlow Federated did not start: {problem}")
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    # In a fork, whose child the worker is not, neither does anything.
    process.kill()
    process.wait()
