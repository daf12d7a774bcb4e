# %% [markdown]
# # Federated learning in five steps
#
# Many clients (phones, hospitals, schools) train one model together, and their data stays where it is: each trains
# on its own examples and sends back only how the weights have changed; a server averages these updates. Here are the
# five steps in plain Keras and NumPy, with nothing hidden, then the same in three lines of
# [dpfl](../README.md): without privacy, with it, and as a TensorFlow Federated process. All of it runs in about a
# minute.

# %%
import dpfl  # before TensorFlow, which then keeps its log to itself

rounds, cohort, local_steps = 20, 60, 5

# %%
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf

# %% [markdown]
# ## 1. Define a model and an optimizer
#
# Any Keras classifier that ends in logits; for clients with a handful of examples, one layer does well. Adam is the
# optimizer of the clients. A larger `epsilon` than Keras' default keeps it from making whole steps of gradients that
# are almost zero, as many of a few examples' are.

# %%
tf.keras.utils.set_random_seed(1)
model = tf.keras.Sequential([tf.keras.layers.Input((8, 8, 1)), tf.keras.layers.Flatten(), tf.keras.layers.Dense(10)])
optimizer = tf.keras.optimizers.Adam(learning_rate=0.3, epsilon=0.005)
loss_function = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer, loss_function, metrics=["accuracy"])

initial_weights = model.get_weights()
print(f"{model.count_params():,} weights in {len(initial_weights)} tensors")

# %% [markdown]
# ## 2. Prepare each client's data
#
# One line, whatever you have: real data that comes with dpfl, data that is simulated, or arrays of your own with the
# client of each example. ([Tables and files](../README.md#your-own-data) work as well.)

# %%
random = np.random.default_rng(0)
x, y, hospitals = random.normal(size=(500, 8)), random.integers(2, size=500), random.integers(20, size=500)

data = dpfl.data.digits(clients=300)
simulated = dpfl.data.synthetic(alpha=1, beta=1, clients=100, max_examples_per_client=200)
own = dpfl.data.from_arrays(x, y, hospitals, name="hospitals")

for each in (data, simulated, own):
    print(each.summary())

# %% [markdown]
# We go on with the digits: 300 clients have four or five images each, too few to learn from alone. This is all that
# clients 0, 1 and 2 have:

# %%
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

_, panels = plt.subplots(1, 15, figsize=(7.4, 0.75))
for client in range(3):
    images, labels = data.client(client)
    for place in range(5):
        panel = panels[5 * client + place]
        panel.axis("off")
        if place < len(labels):
            panel.imshow(images[place, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
            panel.set_title(labels[place], fontsize=8)

# %% [markdown]
# ## 3. Train locally
#
# A client starts from the global weights, takes a few steps of Adam on its own examples, and sends its *update*: the
# weights after minus the weights before. Adam's moments start at zero in every round and never leave the client.


# %%
@tf.function(reduce_retracing=True)
def local_step(x, y):
    with tf.GradientTape() as tape:
        loss = loss_function(y, model(x, training=True))
    optimizer.minimize(loss, model.trainable_variables, tape)
    return loss


def train_locally(global_weights, x, y):
    model.set_weights(global_weights)
    for variable in optimizer.variables:
        variable.assign(tf.zeros_like(variable))
    losses = [float(local_step(x, y)) for _ in range(local_steps)]
    return [after - before for after, before in zip(model.get_weights(), global_weights, strict=True)], losses


optimizer.build(model.trainable_variables)
update, losses = train_locally(initial_weights, *data.client(0))
print("Loss of client 0 before each of its steps:", *(f"{loss:.2f}" for loss in losses))

# %% [markdown]
# ## 4. Aggregate
#
# The server adds the mean of the updates to the global weights: a client counts as much as it has examples
# (federated averaging, [McMahan et al. 2017](https://arxiv.org/abs/1602.05629)).


# %%
def aggregate(global_weights, updates, examples):
    mean_update = [np.average(tensors, axis=0, weights=examples) for tensors in zip(*updates, strict=True)]
    return [weight + change for weight, change in zip(global_weights, mean_update, strict=True)]


# %% [markdown]
# ## 5. Evaluate loss and accuracy on held-out data
#
# No client has seen the 300 test images.


# %%
def evaluate(weights):
    model.set_weights(weights)
    loss, accuracy = model.evaluate(data.x_test, data.y_test, verbose=0)
    return {"loss": loss, "accuracy": accuracy}


print("Before training: loss {loss:.2f}, accuracy {accuracy:.1%}".format(**evaluate(initial_weights)))

# %% [markdown]
# ## The rounds
#
# One round is steps 3 to 5. In each, every client takes part with the same probability, so that 60 of the 300 are
# expected.

# %%
sampler = dpfl.Poisson(cohort=cohort)
weights, history = initial_weights, []
for round_number in range(rounds):
    updates, examples = [], []
    for client in sampler.clients(seed=0, round_number=round_number, population=data.num_clients):
        x, y = data.client(client)
        update, _ = train_locally(weights, x, y)
        updates.append(update)
        examples.append(len(y))
    weights = aggregate(weights, updates, examples)
    history.append({"round": round_number + 1, **evaluate(weights)})

print("After {round} rounds: loss {loss:.2f}, accuracy {accuracy:.1%}".format(**history[-1]))


# %%
def chart(runs):
    """Accuracy and loss over the rounds: the mean of the runs under each label, and a band around all of them."""
    _, panels = plt.subplots(1, 2, figsize=(7.4, 2.7), layout="constrained")
    looks = zip(("#0072B2", "#D55E00"), ("-", "--"), strict=True)
    for (label, histories), (color, line) in zip(runs.items(), looks, strict=False):
        frames = [pd.DataFrame(history).set_index("round") for history in histories]
        for panel, column, unit in zip(panels, ("accuracy", "loss"), (100, 1), strict=True):
            values = unit * pd.concat([frame[column] for frame in frames], axis=1)
            panel.fill_between(
                values.index, values.min(axis=1), values.max(axis=1), color=color, alpha=0.15, linewidth=0
            )
            panel.plot(values.mean(axis=1), color=color, linestyle=line, linewidth=2, label=label)
    panels[0].set(xlabel="Round", ylabel="Test accuracy (%)", ylim=(0, 100))
    panels[1].set(xlabel="Round", ylabel="Test loss (nats)", ylim=(0, None))
    for panel in panels:
        panel.set_xticks(range(0, rounds + 1, 5))
        panel.grid(color="0.9")
    panels[0].legend(loc="lower right", frameon=False)


chart({"Five steps by hand": [history]})

# %% [markdown]
# ## The same in three lines
#
# An `Experiment` says all of the above: data, model, what a client does in a round, how updates are aggregated, who
# takes part, and for how many rounds. The model, its initial weights and the cohorts are those of the loop, and
# `batch_size=None` takes all of a client's examples in each step, as the loop does, so that no shuffling can differ.
# `adaptivity` is Adam's epsilon, by a name that leaves the word to privacy. The weights come out the same, up to the
# rounding of float32.

# %%
model.set_weights(initial_weights)
experiment = dpfl.Experiment(
    data=data,
    model=model,
    local=dpfl.ClientTraining(
        optimizer="adam", learning_rate=0.3, adaptivity=0.005, batch_size=None, steps=local_steps
    ),
    mechanism=dpfl.NoMechanism(weighting="examples"),
    privacy=dpfl.Privacy(epsilon=None),
    sampler=sampler,
    rounds=rounds,
    evaluate_every=1,
)
result = experiment.run(seed=0, progress=False)
print(f"Loss {result.loss:.2f}, accuracy {result.accuracy:.1%}")
print("By hand: loss {loss:.2f}, accuracy {accuracy:.1%}".format(**history[-1]))


def largest_difference(weights, others):
    return max(np.abs(one - other).max() for one, other in zip(weights, others, strict=True))


assert largest_difference(weights, result.weights) < 1e-4
print(f"No weight differs by more than {largest_difference(weights, result.weights):.0e}")

# %% [markdown]
# ## The same with privacy
#
# Two arguments change. The mechanism clips each update, all tensors together, to an L2 norm of 3, adds Gaussian noise
# to the sum, and divides by the expected cohort; every client counts the same. The noise is calibrated to the target:
# epsilon 4 at delta 1/1000, which is well below 1 / clients.

# %%
private = experiment.replace(
    mechanism=dpfl.Gaussian(clip_norm=3.0), privacy=dpfl.Privacy(unit="user", epsilon=4, delta=1e-3)
)
private_result = private.run(seed=0, progress=False)
print(textwrap.fill(private_result.guarantee.statement(), 110))
print(f"\nLoss {private_result.loss:.2f}, accuracy {private_result.accuracy:.1%}")

# %% [markdown]
# The statement says nothing of Adam, and needs not: what one client can change is bounded by the clipping of its
# update, however the update came about. The clients' optimizer, its learning rate and its number of steps cost no
# privacy.
#
# On 300 test images a single run says little, so here are five of each: their mean, and a band around all five.

# %%
seeds = range(5)
runs = {
    "without privacy": [experiment.run(seed, progress=False) for seed in seeds],
    "epsilon 4, delta 0.001": [private.run(seed, progress=False) for seed in seeds],
}
chart({label: [run.history for run in some] for label, some in runs.items()})
for label, some in runs.items():
    accuracies = [run.accuracy for run in some]
    print(f"{label}: mean accuracy {np.mean(accuracies):.1%}, from {min(accuracies):.1%} to {max(accuracies):.1%}")

# %% [markdown]
# ## The same as a TensorFlow Federated process
#
# Another word, another engine: `tff.learning.algorithms` with dpfl's clients and mechanism inside (on Linux, for which
# TensorFlow Federated has packages). Cohorts and noise are the same, and so are the weights, up to the rounding of
# float32. dpfl's own engine is many times faster, which is why it is the default.

# %%
tff_result = private.replace(engine="tff").run(seed=0, progress=False)
assert largest_difference(tff_result.weights, private_result.weights) < 1e-5
print(f"Loss {tff_result.loss:.2f}, accuracy {tff_result.accuracy:.1%}")
print(f"No weight differs by more than {largest_difference(tff_result.weights, private_result.weights):.0e}")

# %% [markdown]
# ## Where to go from here
#
# - Which epsilon, clip norm and number of rounds buy the most accuracy: `uv run dpfl tradeoff`, and the
#   [results on these digits](../experiments/README.md).
# - What the guarantee rests on, and how to protect examples instead of clients: the [README](../README.md).
# - `private_result.keras_model()` is the trained model, an ordinary Keras one.
