"""What all tests share."""

import atexit
import os
import shutil
import tempfile

# Before dpfl and TensorFlow are imported: answers of the accountant are kept for this test session
# only, and every process keeps to one thread, so that results do not depend on the machine.
_cache = tempfile.mkdtemp(prefix="dpfl-test-cache-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _cache
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
