"""Programs that tests run in a process of their own, as TensorFlow Federated wants."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path


def answer_of(script: str, folder: Path, *arguments: str, timeout: float = 900) -> tuple[bytes, str]:
    """What a program writes into the file that its first argument names, and what it prints.

    Args:
        script: the program, in Python; it must end well.
        folder: where its files go.
        arguments: that follow the first one.
        timeout: in seconds, after which it has failed.
    """
    (folder / "script.py").write_text(script)
    with (folder / "output").open("w") as output:
        # A group of its own: TFF leaves a child, worker_binary, behind, which would hold pipes open.
        process = subprocess.Popen(
            [sys.executable, str(folder / "script.py"), str(folder / "answer"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    printed = (folder / "output").read_text()
    assert code == 0, printed[-3000:]
    return (folder / "answer").read_bytes(), printed
