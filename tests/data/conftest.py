import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from dpfl.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@contextmanager
def _refuses(*words: str) -> Iterator[None]:
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]*[.?]", message), message
    assert not re.search(r"[.?!]\s", message), f"more than one sentence: {message}"
    assert len(message) < 400, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


@pytest.fixture(scope="session")
def refuses() -> Callable[..., AbstractContextManager[None]]:
    """A context in which an InputError of one sentence with all these words must be raised."""
    return _refuses


@pytest.fixture(scope="session")
def shared_file() -> Callable[[str], Path]:
    """The path of a real data file, or a skip where it is missing."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.is_file():
            pytest.skip(f"the real data file {path} is not there")
        return path

    return find
