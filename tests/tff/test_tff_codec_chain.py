"""`dpfl.tff.compressed`, in a process of its own: TFF's quantiser fails where other tests ran before."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_federated") is None,
    reason="TensorFlow Federated has wheels for Linux on x86_64 alone",
)
def test_the_codec_in_front_of_aggregators(tmp_path: Path) -> None:
    program = Path(__file__).with_name("codec_chain_program.py")
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-rf", str(program)]
    with (tmp_path / "output").open("w") as output:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=900)
    printed = (tmp_path / "output").read_text()
    assert ended.returncode == 0, printed[-3000:]
    assert " passed" in printed
    assert "skipped" not in printed
