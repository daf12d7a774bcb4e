"""What all tests share."""

import os
import tempfile

# Before dpfl and TensorFlow are imported: answers of the accountant are kept for this test session
# only, and every process keeps to one thread, so that results do not depend on the machine.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dpfl-test-cache-")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
