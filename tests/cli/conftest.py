"""The command line in this process."""

import sys
from collections.abc import Callable

import pytest

from dpfl import cli


@pytest.fixture
def dpfl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command, given in one text or word by word: exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpfl", *" ".join(map(str, words)).split()])
        code: object = 0
        try:
            cli.main()
        except SystemExit as left:
            code = left.code
        captured = capsys.readouterr()
        return int(str(code or 0)), captured.out, captured.err

    return run
