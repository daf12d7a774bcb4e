"""Arrays that begin where TensorFlow's operations can read them, so that tensors can share their memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BYTES = 64  # Eigen's vector instructions load from such addresses, and NumPy's files put their data there


def is_aligned(array: np.ndarray) -> bool:
    """Whether an array is contiguous and begins at a multiple of 64 bytes."""
    return array.flags.c_contiguous and array.ctypes.data % _BYTES == 0


def aligned(array: npt.ArrayLike, dtype: npt.DTypeLike) -> np.ndarray:
    """Returns an array of a type that is aligned: the same one where it is so already, else a copy."""
    array = np.asarray(array)
    if array.dtype == dtype and is_aligned(array):
        return array
    memory = np.empty(array.size * np.dtype(dtype).itemsize + _BYTES, np.uint8)
    start = -memory.ctypes.data % _BYTES
    copy = memory[start : start + len(memory) - _BYTES].view(dtype).reshape(array.shape)
    copy[...] = array
    return copy
