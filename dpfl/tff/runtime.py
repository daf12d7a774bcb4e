"""TensorFlow Federated, imported here and nowhere else, when it is asked for."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import sys
import warnings
from typing import Any

from dpfl.errors import InputError
from dpfl.tff.worker import end_workers_with_this_process


def tensorflow_federated() -> Any:
    """Imports TensorFlow Federated, silently, and sees to it that its worker process ends with this one.

    Who has set `GRPC_VERBOSITY`, `GRPC_ENABLE_FORK_SUPPORT` or Python's filters of warnings (`python -W`) keeps them.

    Returns:
        The module `tensorflow_federated`.

    Raises:
        InputError: it has no package for this machine, or this process is a fork of one that has imported it.
    """
    process = _prepare()
    if process != os.getpid():
        raise InputError(
            "TensorFlow Federated was imported before this process was forked and would wait for ever for threads that "
            'a fork does not have: start processes with multiprocessing.get_context("spawn").'
        )
    return _import()


def _import() -> Any:
    try:
        import tensorflow_federated as tff
    except ModuleNotFoundError as error:
        if error.name != "tensorflow_federated":
            raise
        raise InputError(
            "TensorFlow Federated has no package for this machine (it has them for Linux on x86_64 alone): use the "
            'in-graph engine, which is what dpfl.Experiment(engine="graph") runs.'
        ) from None
    return tff


@functools.cache
def _prepare() -> int:
    """Imports TensorFlow Federated for the first time.

    Returns:
        The id of the process that did.
    """
    # gRPC reads them at the first connection. It would report every later fork and each worker that ended, and, half
    # prepared for forks as it is by default, crash many a fork at its end.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    if not {"no_grpc_proxy", "no_proxy", "NO_PROXY"} & set(os.environ):
        # The worker is on this machine, which no proxy reaches.
        os.environ["no_grpc_proxy"] = "localhost,127.0.0.1"  # noqa: SIM112
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        tff = _import()
    try:
        from tensorflow_federated.python.core.impl.executor_stacks import executor_factory
    except ImportError:
        executor_factory = None
    if not end_workers_with_this_process(executor_factory):
        atexit.register(_end_worker, tff)
    return os.getpid()


def _end_worker(tff: Any) -> None:
    """What the public interface offers, in another version than 0.87: a worker ends with the context that uses it."""
    tff.backends.native.set_sync_local_cpp_execution_context()
    gc.collect()
