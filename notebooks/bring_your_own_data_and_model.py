# %% [markdown]
# # Bring your own data and model
#
# From a pandas DataFrame with a column that says whose row it is, and a Keras model, to a model under a user-level
# guarantee and a figure of what the guarantee costs. The table is made up here: pupils of 200 schools, and whether they
# passed. Schools are what is protected: all rows of one together.

# %%
import dpfl  # before TensorFlow, which then keeps its log to itself

epsilons, clip_norms = [0.05, 0.1, 0.3, 1], [0.1, 0.5]

# %%
import secrets
import textwrap

import numpy as np
import pandas as pd
import tensorflow as tf

random = np.random.default_rng(0)
rows = 4_000
school = random.integers(200, size=rows)
hours, age = random.gamma(4, 2, rows), random.normal(15, 1, rows)
course = random.choice(["arts", "languages", "science"], rows)
talent = 0.5 * random.normal(size=200)[school] + 0.8 * hours - 2 * (course == "science") * (age - 15)
passed = talent + random.normal(size=rows) > 6
pupils = pd.DataFrame({"school": school, "hours": hours, "age": age, "course": course, "passed": passed})
pupils.head()

# %% [markdown]
# ## 1. Data
#
# Text columns become one feature for each category, numbers are scaled. What that takes from the data without privacy
# becomes a sentence of the guarantee. A label with many values, such as a score, is cut into classes by `label_bins=3`.
# (`from_arrays` takes arrays, `load` a file; see [the README](../README.md#your-own-data).)

# %%
data = dpfl.data.from_dataframe(pupils, client="school", label="passed", standardize=True, name="pupils")
print(data.summary())

# %% [markdown]
# ## 2. Model
#
# A function that returns a Keras model with logits at its end: one for each class, here 2.


# %%
def model():
    return tf.keras.Sequential([tf.keras.layers.Dense(16, "relu"), tf.keras.layers.Dense(data.num_classes)])


# %% [markdown]
# ## 3. Experiment
#
# `delta` has to lie below 1 / clients, since publishing one client at random would satisfy anything larger. Everything
# is checked before anything is trained.

# %%
experiment = dpfl.Experiment(
    data=data,
    model=model,
    local=dpfl.ClientTraining(learning_rate=0.2, batch_size=10, epochs=1),
    mechanism=dpfl.Gaussian(clip_norm=0.5),
    privacy=dpfl.Privacy(unit="user", epsilon=4, delta=1e-3),
    sampler=dpfl.Poisson(cohort=60),
    rounds=40,
)
result = experiment.run(seed=0, progress=False)
print(f"Test accuracy {result.accuracy:.1%}\n")
print(textwrap.fill(result.guarantee.statement(), 110))

# %% [markdown]
# ## 4. What does privacy cost?
#
# A study runs the same over epsilons, clip norms and seeds, with plain federated averaging beside it. Runs are kept in
# the folder and never done again.

# %%
axes = {"privacy.epsilon": epsilons, "mechanism.clip_norm": clip_norms}
study = dpfl.Study(experiment, axes, seeds=3, ceiling=True).run("../runs/pupils", progress=False)
dpfl.charts.epsilon(study.frame())

# %%
dpfl.charts.best_settings(study.frame()).round(3)

# %% [markdown]
# ## 5. The model leaves the house
#
# It is an ordinary Keras model, and may be released under its guarantee, if its seed was a secret.

# %%
released = experiment.run(seed=secrets.randbits(63), progress=False)
released.keras_model().save("../runs/pupils/private.keras")
