"""The accountant's memory: right in the next process, and never in the way."""

import contextlib
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dp_accounting
import pytest

from dpfl.privacy import memory, noise_multiplier, poisson_gaussian
from dpfl.privacy.calibration import _calibrate

NEEDS_XDG = pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME moves the cache folder on Linux alone")
QUESTION = '2.0, 1e-5, sampling_rate=1.0, steps=4, accountant="rdp"'
ANSWER = noise_multiplier(2.0, 1e-5, sampling_rate=1.0, steps=4, accountant="rdp")
# Finds the answer without the accountant, and says so if that is impossible.
FROM_MEMORY = """
import dpfl.privacy.calibration as calibration
def gone(*arguments, **settings):
    raise RuntimeError("the accountant was asked")
calibration.epsilon = gone
"""


def ask(cache: Path, *, before: str = "", prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Calibrates in a new process that keeps its answers under `cache`."""
    code = f"{before}\nfrom dpfl.privacy import noise_multiplier\nprint(noise_multiplier({QUESTION}))"
    return subprocess.run(
        [*prefix, sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which another process has left its answer."""
    folder = tmp_path_factory.mktemp("filled")
    answered = ask(folder)
    assert float(answered.stdout) == ANSWER, answered.stderr
    return folder


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[tuple[str, ...]]:
    """Takes away the right to write; yields what a root's command must begin with to lack it too."""
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and setpriv is not there to take that from it")
        powers = "-dac_override,-dac_read_search"
        prefix = ("setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}")
    everything = [folder, *folder.rglob("*")]
    for path in everything:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        yield prefix
    finally:
        for path in everything:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which `memory.remembered` keeps answers in this test."""
    monkeypatch.setattr(memory.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    return tmp_path / "dpfl"


class Doubling:
    """A function that counts how often it is asked, and is as forgetful as a new process."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def new_process(self) -> Callable[[int], float]:
        def double(value: int) -> float:
            self.asked.append(value)
            if value < 0:
                raise ValueError("no")
            return 2.0 * value

        return memory.remembered(double)


class TestRemembered:
    def test_a_kept_answer_is_a_fresh_one(self):
        arguments = (poisson_gaussian(1.0, 1.0, 4), 2.0, 1e-5, "add_or_remove_one", "rdp")
        assert _calibrate(*arguments) == _calibrate(*arguments) == _calibrate.__wrapped__(*arguments) == ANSWER

    @pytest.mark.usefixtures("cache")
    def test_is_computed_once(self):
        doubling = Doubling()
        for _ in range(2):
            double = doubling.new_process()
            assert [double(3), double(3), double(4), double(3)] == [6, 6, 8, 6]
        assert doubling.asked == [3, 4]

    @pytest.mark.usefixtures("cache")
    def test_keeps_nothing_for_a_refusal(self):
        doubling = Doubling()
        double = doubling.new_process()
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                double(-3)
        assert doubling.asked == [-3, -3]

    @pytest.mark.parametrize("damaged", ["", '["3", 6', '["3", "6"]', "[6.0]", "6.0", "\x00\xff"])
    def test_a_damaged_answer_is_computed_again(self, cache, damaged):
        doubling = Doubling()
        assert doubling.new_process()(3) == 6
        (file,) = cache.rglob("double.jsonl")
        file.write_text(damaged, encoding="latin-1")
        assert doubling.new_process()(3) == 6
        assert doubling.asked == [3, 3]
        # And what is written after it can be read.
        assert doubling.new_process()(3) == 6
        assert doubling.asked == [3, 3]

    def test_other_processes_answers_are_not_lost(self, cache):
        doubling = Doubling()
        first, second = doubling.new_process(), doubling.new_process()
        for value in range(50):
            (first if value % 2 else second)(value)
        third = doubling.new_process()
        assert [third(value) for value in range(50)] == [2 * value for value in range(50)]
        assert len(doubling.asked) == 50

    @pytest.mark.usefixtures("cache")
    def test_infinity_and_every_digit_are_kept(self):
        asked = []

        def identity(value: float) -> float:
            asked.append(value)
            return value

        values = [0.1 + 0.2, 1 / 3, 1e-300, math.inf]
        for _ in range(2):
            kept = memory.remembered(identity)
            assert [kept(value) for value in values] == values
        assert asked == values

    @pytest.mark.usefixtures("cache")
    def test_events_are_told_apart_by_all_that_is_in_them(self):
        asked = []

        def count(event: dp_accounting.DpEvent) -> float:
            asked.append(event)
            return float(len(asked))

        events = [poisson_gaussian(1.0, 0.5, 4), poisson_gaussian(1.0, 0.5, 5), poisson_gaussian(1.0, 0.25, 4)]
        # A list makes an event unhashable.
        events += [dp_accounting.ComposedDpEvent(events[:2]), dp_accounting.ComposedDpEvent(events[1:])]
        for _ in range(2):
            kept = memory.remembered(count)
            assert [kept(event) for event in events] == [1, 2, 3, 4, 5]

    def test_a_folder_that_cannot_be_made_is_no_obstacle(self, cache, recwarn):
        cache.write_text("in the way")
        doubling = Doubling()
        double = doubling.new_process()
        assert [double(3), double(3)] == [6, 6]
        assert doubling.asked == [3]
        assert not list(recwarn)

    @pytest.mark.usefixtures("cache")
    def test_another_version_of_the_library_is_asked_anew(self, monkeypatch):
        doubling = Doubling()
        doubling.new_process()(3)
        monkeypatch.setattr(memory.importlib.metadata, "version", lambda name: "99.9")
        doubling.new_process()(3)
        assert doubling.asked == [3, 3]

    @pytest.mark.usefixtures("cache")
    def test_other_sources_of_the_accounting_are_asked_anew(self, monkeypatch, tmp_path):
        doubling = Doubling()
        sources = tmp_path / "privacy"
        sources.mkdir()
        monkeypatch.setattr(memory, "__file__", str(sources / "memory.py"))
        for text in ("steps", "steps", "2 * steps"):
            (sources / "calibration.py").write_text(text)
            doubling.new_process()(3)
        assert doubling.asked == [3, 3]


@NEEDS_XDG
class TestAcrossProcesses:
    def test_an_answer_outlives_its_process(self, filled):
        answered = ask(filled, before=FROM_MEMORY)
        assert float(answered.stdout) == ANSWER, answered.stderr

    def test_without_that_answer_the_accountant_is_needed(self, tmp_path):
        # Otherwise the test above shows nothing.
        assert "the accountant was asked" in ask(tmp_path, before=FROM_MEMORY).stderr

    def test_answers_are_in_dpfls_own_folder(self, filled):
        assert [path.name for path in filled.iterdir()] == ["dpfl"]

    def test_a_filled_read_only_folder_is_read(self, filled):
        with read_only(filled) as prefix:
            answered = ask(filled, before=FROM_MEMORY, prefix=prefix)
        assert float(answered.stdout) == ANSWER, answered.stderr

    def test_an_empty_read_only_folder_is_no_obstacle(self, tmp_path):
        with read_only(tmp_path) as prefix:
            answered = ask(tmp_path, prefix=prefix)
        assert float(answered.stdout) == ANSWER, answered.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_is_no_obstacle(self, tmp_path):
        # No file may grow beyond zero bytes: every write fails as it would on a full disk.
        full = "import dpfl.privacy, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
        answered = ask(tmp_path, before=full)
        assert answered.stdout.strip() == str(ANSWER), answered.stderr

    def test_what_is_kept_says_what_it_answers(self, filled):
        (file,) = (filled / "dpfl").rglob("_calibrate.jsonl")
        ((question, answer),) = [json.loads(line) for line in file.read_text().splitlines() if line]
        assert question == f"{poisson_gaussian(1.0, 1.0, 4)!r}, 2.0, 1e-05, 'add_or_remove_one', 'rdp'"
        assert answer == ANSWER
