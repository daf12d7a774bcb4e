"""How run.py and the workers that it measures talk: one JSON object a line, over a worker's standard input and output.

A worker is a process that does one workload with one system in one variant. It is started as
`python script.py --workload NAME --variant NAME --threads N`, prepares its work, does it twice to be warm, and says
`{"facts": {...}}`. Then it waits: to `{"steps": k}` it answers with `{"seconds": [k numbers]}`, the time of each step
from its call until its result is there. Where anything fails it says `{"error": "one sentence"}` and ends. It also ends
with its standard input. What libraries print to standard output goes to standard error, so that it cannot be taken for
an answer.

The standard library is all that this module needs: it runs in every system's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

WARM_UP = 2


class Work(NamedTuple):
    """What a worker repeats, prepared.

    Attributes:
        step: does the work once and returns when its result is there.
        facts: what to say about it, such as the system's version and the number of parameters that it trains.
    """

    step: Callable[[], object]
    facts: Mapping[str, Any]


def serve(prepare: Callable[[str, str, int], Work], warm_up: int = WARM_UP) -> None:
    """Prepares the work that the command line asks for, then measures it whenever standard input asks.

    Args:
        prepare: makes the work of a workload and a variant on a number of threads.
        warm_up: how often the work is done before it is said to be ready.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--threads", type=int, required=True)
    asked = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(what: Mapping[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        work = prepare(asked.workload, asked.variant, asked.threads)
        for _ in range(warm_up):
            work.step()
        answer({"facts": dict(work.facts)})
        for line in sys.stdin:
            answer({"seconds": [_seconds(work.step) for _ in range(json.loads(line)["steps"])]})
    except Exception as error:
        traceback.print_exc()
        answer({"error": in_one_line(error)})


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def in_one_line(error: BaseException, letters: int = 160) -> str:
    """Returns the kind of an error and a line of what it says, at most so many letters of it.

    The line is the first, or the last if the first only says where, as TensorFlow's errors from traced code do.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[-1 if lines[0].endswith(":") else 0] if lines else ""
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return text if len(text) <= letters else text[: letters - 3] + "..."


class WorkerError(Exception):
    """A worker could not do its work; the message says why in one line."""


class Worker:
    """A worker's process, as run.py sees it.

    Args:
        command: starts the worker.
        environment: its environment variables.
        log: the file that gets its standard error.
    """

    def __init__(self, command: Sequence[str | Path], *, environment: Mapping[str, str], log: Path) -> None:
        self._log: TextIO = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(environment),
            text=True,
            encoding="utf-8",
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put(None)

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise WorkerError(f"not done after {timeout:.0f} seconds") from None
        if line is None:
            raise WorkerError(f"its process ended with code {self._process.wait()}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise WorkerError(answer["error"])
        return answer

    def facts(self, timeout: float) -> dict[str, Any]:
        """Waits until the worker is ready and returns what it says about its work; once.

        Raises:
            WorkerError: if it cannot do the work, or not within `timeout` seconds.
        """
        facts: dict[str, Any] = self._answer(timeout)["facts"]
        return facts

    def measure(self, steps: int, timeout: float) -> list[float]:
        """Returns the seconds that each of `steps` steps took.

        Raises:
            WorkerError: if a step fails, or if they take more than `timeout` seconds.
        """
        try:
            self._process.stdin.write(json.dumps({"steps": steps}) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # the answer says why
        seconds: list[float] = self._answer(timeout)["seconds"]
        return seconds

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except (BrokenPipeError, ValueError):
                pass
        self._log.close()
