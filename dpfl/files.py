"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@contextlib.contextmanager
def written_whole(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yields a temporary path beside `path` and moves it there if the block ends well.

    A reader, or a start after a crash, sees the old file or the new one, never a part. The suffix is
    kept, since many writers choose the format by it.

    Args:
        path: where the file shall be; its folder is made if absent.
        mode: who may read and write the file; before it is whole, nobody but its owner.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_parts(path: Path) -> None:
    """Removes what `written_whole(path)` left behind where it was killed; for whoever alone writes that file."""
    for part in path.parent.glob(f".{path.stem}-*{path.suffix}"):
        part.unlink(missing_ok=True)


def read_parquet(path: Path) -> pd.DataFrame:
    """Returns the table in a Parquet file.

    Not by pandas, which hands Arrow's threads a Python file: where the interpreter ends soon after, letting go of it
    aborts the process ("terminate called without an active exception", github.com/apache/arrow/issues/34314).

    Args:
        path: of the file.
    """
    from pyarrow import parquet

    return parquet.read_table(str(path), use_threads=False).to_pandas(use_threads=False)
