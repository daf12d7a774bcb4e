# %% [markdown]
# # Explore a trade-off
#
# A finished study lies in a folder. Here sliders move along it: choose epsilon, the clip norm and the number of rounds,
# and the figure, the accuracy and the guarantee follow. Nothing is trained for that.
#
# Without a study of your own, the next cell makes a small one (42 runs on scikit-learn's digits, a few seconds), and
# keeps it. `uv run dpfl tradeoff` makes a larger one; write its folder here.

# %%
from pathlib import Path

import dpfl

folder = Path("../runs/explored")

if not (folder / "records").exists():
    experiment = dpfl.Experiment(
        data="digits",
        local=dpfl.ClientTraining(learning_rate=0.5, batch_size=5, steps=3),
        mechanism=dpfl.Gaussian(clip_norm=0.5),
        privacy=dpfl.Privacy(epsilon=4, delta=1e-3),
        sampler=dpfl.Poisson(cohort=90),
        rounds=30,
        evaluate_every=5,
    )
    axes = {
        "privacy.epsilon": [1, 4, None],
        "mechanism.clip_norm": [0.25, 1],
        **dpfl.study.round_frequency([10, 30], local_work=90),
    }
    dpfl.Study(experiment, axes, seeds=3, ceiling=True).run(folder, progress=False)

store = dpfl.study.Store(folder)
frame, history = store.frame(), store.history()
print(f"{len(frame)} runs, {len(history):,} rounds")

# %% [markdown]
# ## Sliders
#
# (They need a running notebook: in a page that was only saved, the figure below them stands still.) The ring is the
# chosen setting; on the right is the way of its runs, with a 95 % interval over the seeds; the dashed line is federated
# averaging without clip and noise over as many rounds.

# %%
dpfl.explore.tradeoffs(store)

# %% [markdown]
# ## The same without sliders
#
# The figure and the sentences are functions of the study's table:

# %%
setting = {"epsilon": 4, "clip_norm": 1, "rounds": 30}
dpfl.explore.figure(frame, history, **setting)

# %%
import textwrap

print(textwrap.fill(dpfl.explore.in_words(store, frame, **setting), 110))

# %% [markdown]
# ## Is the difference real?
#
# All settings were run with the same seeds, so they can be compared pair by pair:

# %%
more, fewer = ({"epsilon": 4, "clip_norm": 1, "rounds": rounds} for rounds in (30, 10))
print(textwrap.fill(dpfl.statistics.compare(frame, more, fewer).statement(), 110))

# %% [markdown]
# ## Figures for the paper
#
# Each chart is a function of the table, and its caption states the guarantee. `dpfl chart FOLDER` draws them all.

# %%
dpfl.charts.round_frequency(frame)

# %%
dpfl.charts.best_settings(frame).round(3)
