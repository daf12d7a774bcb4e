"""What all tests share."""

import atexit
import os
import shutil
import tempfile

import pytest

# Before dpfl and TensorFlow are imported: answers of the accountant are kept for this test session
# only, and every process keeps to one thread, so that results do not depend on the machine.
_cache = tempfile.mkdtemp(prefix="dpfl-test-cache-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _cache
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks notebooks, which cannot do it themselves, as slow."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.slow)
