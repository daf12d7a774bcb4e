"""Users' models on their way to other processes."""

from __future__ import annotations

import copyreg
import importlib
import sys


def make_lazy_modules_picklable() -> None:
    """Lets a user's function that mentions `keras`, which TensorFlow loads lazily, travel to the workers."""
    if "tensorflow" in sys.modules:
        from tensorflow.python.util.lazy_loader import LazyLoader

        copyreg.pickle(LazyLoader, lambda module: (importlib.import_module, (module.__name__,)))
