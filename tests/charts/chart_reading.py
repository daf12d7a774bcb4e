"""What a figure shows, read back from it."""

import numpy as np


def drawn(figure, place=0):
    """Return {label: (x, y)} of all lines in one of the axes."""
    lines = {line.get_label(): line for line in figure.axes[place].lines}
    return {name: (np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for name, line in lines.items()}


def legend(figure):
    """Return the legend's entries."""
    return [text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]


def caption(figure):
    """Return the caption in one line."""
    text = next(text for text in figure.texts if "Guarantee" in text.get_text() or "No run" in text.get_text())
    return " ".join(text.get_text().replace("\u00a0", " ").split())


def ticks(axis):
    """Return the labels of an axis."""
    return [label.get_text() for label in axis.get_ticklabels()]


def mean(frame, column="accuracy", **where):
    """Return the mean over the finished runs with those values, None standing for NaN."""
    for name, value in where.items():
        frame = frame[frame[name].isna() if value is None else frame[name] == value]
    assert len(frame)
    return frame.loc[frame["status"] == "finished", column].mean()


def best_setting(frame, **where):
    """Return the clip norm and number of rounds with the best mean validation accuracy, by brute force."""
    frame = frame[frame["mechanism"] != "none"]
    for name, value in where.items():
        frame = frame[frame[name].isna() if value is None else frame[name] == value]
    settings = sorted(set(zip(frame["clip_norm"], frame["rounds"], strict=True)))
    clip, rounds = max(settings, key=lambda s: mean(frame, "validation_accuracy", clip_norm=s[0], rounds=s[1]))
    return {"clip_norm": clip, "rounds": rounds, "mechanism": "gaussian", **where}


def check_layout(figure):
    """Nothing is cut, nothing covers anything else."""
    figure.draw_without_rendering()
    (text,) = [t for t in figure.texts if t.get_text()]
    parts = {"caption": text.get_window_extent()}
    for place, axes in enumerate(figure.axes):
        parts[f"axes {place}"] = axes.get_window_extent()
        if axes.get_legend():
            parts["legend"] = axes.get_legend().get_window_extent()
        for axis in (axes.xaxis, axes.yaxis):
            if axis.label.get_text():
                parts[f"label {axis.label.get_text()} {place}"] = axis.label.get_window_extent()
            shown = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
            assert not overlapping(shown)
    for name, box in parts.items():
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= figure.bbox.x1, name
        assert box.y1 <= figure.bbox.y1, name
    assert not overlapping(list(parts.values()))


def overlapping(boxes):
    """Return the pairs of boxes that overlap."""
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]
