import stat

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from dpfl import charts
from dpfl.errors import InputError


@pytest.fixture(scope="module")
def figure(make):
    return charts.epsilon(make(epsilons=(1, 2), clips=(0.5,), rounds=(10,)))


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_each_format_is_written_and_the_same_each_time(make, tmp_path, suffix, magic):
    for name in ("one", "two"):
        figure = charts.epsilon(make(epsilons=(1, 2), clips=(0.5,), rounds=(10,)))
        charts.save(figure, tmp_path / "new" / f"{name}.{suffix}")
    charts.save(figure, tmp_path / "new" / f"again.{suffix}")
    again, one, two = (path.read_bytes() for path in sorted((tmp_path / "new").iterdir()))
    assert one.startswith(magic)
    assert one == two == again


def test_the_png_has_the_promised_size_whatever_the_style(figure, tmp_path):
    with mpl.rc_context({"savefig.dpi": 30, "savefig.bbox": "tight"}):
        charts.save(figure, str(tmp_path / "a.PNG"))
    header = (tmp_path / "a.PNG").read_bytes()[16:24]
    assert (int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")) == (1100, 760)


def test_another_suffix_is_refused(figure, tmp_path):
    with pytest.raises(InputError, match=r"must end in .png, .svg or .pdf.$"):
        charts.save(figure, tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file_and_nothing_else(figure, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        charts.save(figure, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_figure_is_as_readable_as_any_new_file(figure, tmp_path):
    charts.save(figure, tmp_path / "a.png")
    (tmp_path / "plain").touch()
    written, plain = ((tmp_path / name).stat().st_mode for name in ("a.png", "plain"))
    assert stat.S_IMODE(written) == stat.S_IMODE(plain)
