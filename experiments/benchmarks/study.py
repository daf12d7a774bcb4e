"""What a study costs beyond training: 1,000 tiny runs, and the tables of 10,000."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

import dpfl
from dpfl.study import Store


def main(
    runs: Annotated[int, typer.Option(min=10, help="Tiny runs to train.")] = 1_000,
    records: Annotated[int, typer.Option(min=10, help="Runs in the folder whose tables are read.")] = 10_000,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
) -> None:
    """Measure the overhead per run, one process by one, and the time of `frame()` and `history()`."""
    configurations = max(1, runs // 20)
    base = dpfl.Experiment(
        data=dpfl.data.digits(clients=40),
        local=dpfl.ClientTraining(learning_rate=0.3, batch_size=5, steps=1),
        mechanism=dpfl.Gaussian(clip_norm=0.5, noise_multiplier=1.0),
        privacy=dpfl.Privacy(epsilon=None, delta=1e-2),
        sampler=dpfl.Poisson(cohort=20),
        rounds=2,
    )
    clips = [round(0.1 + 0.01 * index, 4) for index in range(configurations)]
    # Of the CNN, which trains no two runs side by side.
    for model, name in (("softmax", "side by side"), ("cnn", "one by one")):
        with tempfile.TemporaryDirectory() as scratch:
            study = dpfl.Study(base.replace(model=model), {"mechanism.clip_norm": clips}, seeds=20)
            start = time.perf_counter()
            frame = study.run(scratch, workers=workers, progress=False).frame()
            wall = time.perf_counter() - start
            again = time.perf_counter()
            study.run(scratch, workers=workers, progress=False)
            again = time.perf_counter() - again
            busy = frame["seconds"].sum()
            print(
                f"{len(frame)} runs {name}: {wall:.1f} s on {workers} workers, of which training {busy:.1f} s on one: "
                f"{1000 * (wall * workers - busy) / len(frame):.1f} ms of a worker beyond training for a run, with the "
                f"start of the workers; all kept already: {again:.2f} s"
            )
            if model == "softmax":
                _tables(Path(scratch), records)


def _tables(folder: Path, records: int) -> None:
    """Times the tables of a folder that is filled up with copies of its runs under other names."""
    source = sorted((folder / "records").glob("*.json"))
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(scratch)
        for index in range(records):
            content = json.loads(source[index % len(source)].read_text())
            content["record"] |= {"run_id": f"{index:016x}", "configuration": f"{index:016x}"}
            history = {name: values * 50 for name, values in content["history"].items()}  # 100 rounds
            (Path(scratch) / "records" / f"{index:016x}.json").write_text(json.dumps(content | {"history": history}))
        start = time.perf_counter()
        store.collect()
        print(f"collecting {records:,} runs of 100 rounds from their records: {time.perf_counter() - start:.1f} s")
        for name in ("frame", "history"):
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                rows = len(getattr(Store(scratch), name)())
                seconds.append(time.perf_counter() - start)
            print(f"{name}() of {records:,} runs, {rows:,} rows: {statistics.median(seconds):.2f} s (median of 5)")
        shutil.copytree(scratch, folder / "copy", copy_function=shutil.copy)
        start = time.perf_counter()
        Store(folder / "copy").frame()
        print(f"frame() of a copy with other times of change: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    typer.run(main)
