"""Keeps the accountant's memory of these tests away from the user's cache folder, and from earlier runs."""

import os
import tempfile

_PREFIX = "dpfl-tests-"

if _PREFIX not in os.environ.get("XDG_CACHE_HOME", ""):
    _folder = tempfile.TemporaryDirectory(prefix=_PREFIX)  # Lives as long as this module, then removes itself.
    os.environ["XDG_CACHE_HOME"] = _folder.name
