"""Arrays that are memory maps of files, and how they travel to other processes: by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpfl.errors import InputError


class MappedFile(NamedTuple):
    """A file, as it was when its array was mapped into memory.

    Attributes:
        path: absolute.
        dtype: of the array.
        shape: of the array.
        start: bytes in front of it.
        size: of the file in bytes.
        modified: when the file was changed last, in nanoseconds.
        address: of the array in the process that made this.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    size: int
    modified: int
    address: int

    def holds(self, array: np.ndarray) -> bool:
        """Whether an array is the one that was mapped, and no copy of it."""
        return (self.address, self.dtype, self.shape) == (array.ctypes.data, array.dtype, array.shape)

    def open(self) -> np.ndarray:
        """Maps the array again, in this process.

        Raises:
            InputError: the file is gone or was changed.
        """
        try:
            now = self.path.stat()
        except OSError as error:
            raise InputError(
                f"{self.path}, from which another process reads its data, cannot be found here: {error.strerror}."
            ) from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified):
            raise InputError(
                f"{self.path} is not as it was when another process began to read it: leave the data alone while it "
                "is in use, and copy it to other machines with its times (cp -a, rsync -a)."
            )
        return np.asarray(np.memmap(self.path, self.dtype, "r", self.start, self.shape))


def mapped_file(array: Any) -> MappedFile | None:
    """The file whose memory map an array is; None where it is none, part of one, or may differ from the file.

    Args:
        array: anything.
    """
    whole = array
    while isinstance(whole, np.ndarray) and isinstance(whole.base, np.ndarray):
        whole = whole.base
    if not isinstance(whole, np.memmap) or whole.filename is None or whole.mode == "c":
        return None
    path = Path(whole.filename).absolute()
    try:
        now = path.stat()
    except OSError:  # deleted, and there as long as it is mapped
        return None
    file = MappedFile(path, whole.dtype, whole.shape, whole.offset, now.st_size, now.st_mtime_ns, whole.ctypes.data)
    return file if file.holds(array) and array.flags.c_contiguous else None
