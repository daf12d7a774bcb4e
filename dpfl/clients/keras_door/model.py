"""A Keras model whose `fit` is DP-SGD."""

from __future__ import annotations

import dataclasses
import math
import secrets
from typing import Any, NoReturn

import dp_accounting
import numpy as np
import tensorflow as tf
from typing_extensions import override

from dpfl.clients.dp_sgd import noisy_mean, with_penalties
from dpfl.clients.keras_door import releases
from dpfl.clients.keras_door.batches import Batches, Marks, PoissonBatches, ShuffledBatches, with_class_weights
from dpfl.clients.keras_door.checks import check_training
from dpfl.clients.keras_door.ledger import TrainingLedger
from dpfl.clients.keras_door.losses import per_example_loss
from dpfl.clients.keras_door.optimizers import DPOptimizer
from dpfl.clients.keras_door.releases import Entry, Release
from dpfl.clients.per_example import clipped_gradients
from dpfl.errors import InputError
from dpfl.noise import round_seed
from dpfl.privacy import Accountant, Guarantee, Relation, largest_count
from dpfl.privacy.example_level import ExampleSampling
from dpfl.randomness import Purpose, check_seed, stateless_seed

_DEFAULT_BATCH_SIZE = 32  # Keras'


class _Fit:
    """What the steps of a call of fit depend on, outside of the model's weights.

    Nothing here is a weight, on purpose: weights are released. With the seed of the noise, the noise could be taken
    off; the mean loss is that of the examples, without noise, and it counts how many were drawn.

    Attributes:
        key: the seed of the noise, int32, (2,). Secret.
        settings: what the ledger notes for each step, float64.
        expected_batch_size: float32.
        release: what each step releases; None before the first call.
        steps_per_charge: how many steps in a row use each example at most once together.
        checked: what has been found to be trainable privately.
        loss_mean: the training's mean loss, for display. Private.
        compiled: the optimizer and the model of the last call of compile, which the compiled step uses.
    """

    def __init__(self) -> None:
        self.key = tf.Variable(tf.zeros([2], tf.int32), trainable=False)
        self.settings = tf.Variable(tf.zeros([Release.columns()], tf.float64), trainable=False)
        self.expected_batch_size = tf.Variable(1.0, trainable=False)
        self.release: Release | None = None
        self.steps_per_charge = 1
        self.checked: Any = None
        self.loss_mean = tf.keras.metrics.Mean(name="loss")
        self.compiled: tuple[Any, Any] | None = None


class DPModel(tf.keras.Model):
    """A Keras model that trains under example-level differential privacy (DP-SGD; Abadi et al. 2016, 1607.00133).

    Wraps any Keras classifier or regressor with one output::

        model = dpfl.DPModel(keras_model)
        model.compile(
            optimizer=dpfl.DPKerasSGDOptimizer(l2_norm_clip=1.0, noise_multiplier=1.1, learning_rate=0.5),
            loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        model.fit(x, y, batch_size=256, epochs=15, callbacks=[dpfl.EpsilonCallback(delta=1e-5)])
        print(model.guarantee(delta=1e-5).statement())
        model.model.save("private.keras")

    Each step draws a minibatch, clips every example's gradient, adds Gaussian noise to their sum, divides by the
    expected batch size, and hands the result to the optimizer. The gradients of the model's weight regularisation,
    which depend on no data, are added after the noise. What may be released under the guarantee are the weights
    (`model`), after every step. Metrics and losses, which Keras shows, are computed on the examples without noise and
    are not covered.

    The ledger of all steps is a part of the DPModel's weights: `save_weights` and `load_weights` of the DPModel keep
    it, and restoring earlier weights makes it forget nothing. It belongs to the Keras model: a second DPModel of the
    same one goes on with it. Layers that several Keras models share are trained behind each other's back; what that
    costs is for the user to add up. Noise is a function of (seed, number of the step). The seed is not in the weights,
    which may be released.

    Args:
        model: the Keras model. Layers that mix examples (BatchNormalization) are refused before the first step.
        seed: a whole number below 2 ** 64 from which noise and minibatches follow, to repeat a run; it must stay
            secret, and another training must not use it. None draws a secret one anew in every call of fit.

    Attributes:
        model: the Keras model, trained in place.

    Raises:
        InputError: the model is no Keras model, or the seed none.
    """

    def __init__(self, model: tf.keras.Model, seed: int | None = None) -> None:
        super().__init__(name=f"private_{getattr(model, 'name', 'model')}")
        if not isinstance(model, tf.keras.Model) or isinstance(model, DPModel):
            raise InputError(f"DPModel wraps a Keras model, but it was given a {type(model).__name__}.")
        self.model = model
        self._seed = None if seed is None else check_seed(seed)
        self._ledger = TrainingLedger(
            model,
            lambda name, shape, dtype: self.add_weight(
                name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False, experimental_autocast=False
            ),
        )
        self._fit = _Fit()
        self._loss_of: Any = None  # from outputs and labels to each example's loss
        self.built = model.built

    @override
    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.model(inputs, training=training)

    def compile(
        self,
        optimizer: DPOptimizer,
        loss: Any = None,
        metrics: Any = None,
        loss_weights: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool | None = None,
        steps_per_execution: int | None = None,
        jit_compile: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Configures the training, as `tf.keras.Model.compile` does.

        Args:
            optimizer: `dpfl.DPKerasSGDOptimizer` or another of dpfl's.
            loss: a Keras loss, its name, or a function of labels and outputs that has a value for each example. Its
                reduction does not matter: gradients are summed and divided by the expected batch size.
            metrics: as in Keras; not private.
            loss_weights: refused, as there is one output.
            weighted_metrics: as in Keras; not private.
            run_eagerly: as in Keras.
            steps_per_execution: as in Keras; 1 where a callback has an epsilon budget.
            jit_compile: refused, since XLA would compile each size of a minibatch anew.
            **kwargs: as in Keras.

        Raises:
            InputError: a setting that cannot be private.
        """
        if not isinstance(optimizer, DPOptimizer):
            raise InputError(
                "the optimizer must be one of dpfl's (DPKerasSGDOptimizer, DPKerasAdamOptimizer, "
                f"DPKerasAdagradOptimizer), but it was {optimizer!r}: others know no clip norm and no noise."
            )
        if jit_compile:
            raise InputError(
                "jit_compile cannot be used with minibatches whose size varies: compile without it, which is faster."
            )
        if loss_weights is not None:
            raise InputError("loss_weights are for several outputs: leave it out, or scale the loss.")
        if steps_per_execution == "auto":
            raise InputError("steps_per_execution must be a number: 'auto' is not supported.")
        if self.distribute_strategy.num_replicas_in_sync > 1 or self.dtype_policy.compute_dtype != "float32":
            raise InputError(
                "DPModel trains in float32 on one device: make it without distribution strategies and mixed precision."
            )
        self._loss_of = per_example_loss(loss)
        self._fit.checked = None
        super().compile(
            optimizer=optimizer,
            loss=loss,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            **kwargs,
        )
        self._fit.compiled = (optimizer, self.model)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: Any = 1,
        max_queue_size: int = 10,
        workers: int = 1,
        use_multiprocessing: bool = False,
        *,
        sampling: ExampleSampling = "poisson",
        max_batch_size: int | None = None,
    ) -> tf.keras.callbacks.History:
        """Trains privately; the arguments of `tf.keras.Model.fit`, of which these differ.

        Args:
            x: the training examples, arrays or tensors or a nest of them, or `PoissonBatches` of examples and labels.
                Datasets, generators and sequences are refused, since nothing is known of how they sample.
            y: the labels.
            batch_size: the expected number of examples in a minibatch; 32 by default.
            epochs: as in Keras.
            verbose: as in Keras.
            callbacks: as in Keras; `dpfl.EpsilonCallback` shows epsilon.
            validation_split: as in Keras: this last part of the arrays is not trained on.
            validation_data: as in Keras.
            shuffle: True.
            class_weight: multiplies the examples' losses before clipping.
            sample_weight: multiplies the examples' losses before clipping, (examples,).
            initial_epoch: as in Keras.
            steps_per_epoch: how many minibatches make an epoch; None for ceil(examples / batch_size).
            validation_steps: as in Keras.
            validation_batch_size: as in Keras.
            validation_freq: as in Keras.
            max_queue_size: as in Keras, for validation.
            workers: as in Keras, for validation.
            use_multiprocessing: as in Keras, for validation.
            sampling: "poisson" draws each example on its own in every step, which amplifies privacy; "shuffled" goes
                through a shuffle in each pass, which is charged without amplification and has no guarantee under
                the relation add_or_remove_one.
            max_batch_size: the largest Poisson minibatch; see `PoissonBatches`.

        Raises:
            InputError: what cannot be private, before any training.
        """
        if not isinstance(self.optimizer, DPOptimizer):
            raise InputError("the model must be compiled before fit: call model.compile with one of dpfl's optimizers.")
        if not shuffle:
            raise InputError("shuffle=False has no private form: leave it out, minibatches are drawn at random.")
        if isinstance(x, Batches):
            given = (y, batch_size, class_weight, sample_weight, steps_per_epoch, max_batch_size)
            if any(value is not None for value in given) or validation_split:
                raise InputError(
                    "labels, weights, sizes and splits belong to PoissonBatches: give fit nothing of it a second time."
                )
            batches: Batches = x
        else:
            if validation_split and validation_data is None:
                x, y, sample_weight, validation_data = _split(x, y, sample_weight, validation_split)
            batches = self._batches(
                x, y, batch_size, steps_per_epoch, class_weight, sample_weight, sampling, max_batch_size
            )
        self._begin(batches)
        return super().fit(
            # A callback may restore a ledger before the first step (tf.keras.callbacks.BackupAndRestore).
            batches.dataset(lambda: int(self._ledger.steps())),
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_data=validation_data,
            initial_epoch=initial_epoch,
            steps_per_epoch=batches.steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size or batches.batch_size,
            validation_freq=validation_freq,
            max_queue_size=max_queue_size,
            workers=workers,
            use_multiprocessing=use_multiprocessing,
        )

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """A step of DP-SGD on a minibatch of `Batches`; Keras calls it.

        Args:
            data: x, y and `Marks`. Private.

        Returns:
            The metrics so far. Private.
        """
        if not (isinstance(data, tuple) and len(data) == 3 and isinstance(data[2], Marks)):
            raise InputError("DPModel trains on minibatches that fit draws: call fit with arrays or PoissonBatches.")
        if self._fit.release is None:
            raise InputError("no noise was drawn for this step: call fit, which counts what it releases.")
        x, y, marks = data
        optimizer, weights = self.optimizer, self.model.trainable_weights
        # Noted first: the noise, and all that follows from it, waits until the step is in the ledger.
        self._ledger.note(self._fit.settings, marks.charge)
        seed = round_seed(self._fit.key, tf.cast(self._ledger.steps() - 1, tf.int32))
        clipped = clipped_gradients(
            lambda microbatch: self.model,
            weights,
            self._loss_of,
            x,
            y,
            marks.weights,
            clip_norm=optimizer.l2_norm_clip,
            clipping=optimizer.clipping,
            microbatch_size=optimizer.microbatch_size,
        )
        gradients = noisy_mean(
            clipped.sums,
            clip_norm=optimizer.l2_norm_clip,
            noise_multiplier=optimizer.noise_multiplier,
            expected_batch_size=self._fit.expected_batch_size,
            seed=seed,
        )
        optimizer.apply_noisy_gradients(with_penalties(gradients, clipped.penalties), weights)
        # Rows that stand for nobody are the last ones.
        losses, example_weights, y, outputs = (
            part[: marks.count] for part in (clipped.losses, marks.weights, y, clipped.outputs)
        )
        self._fit.loss_mean.update_state(losses * example_weights + self._penalty())
        return self.compute_metrics(x, y, outputs, example_weights)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None
    ) -> tf.Tensor | None:
        """The mean loss in `evaluate`, with the penalties of the weights' regularisation; see `tf.keras.Model`."""
        if y is None or self._loss_of is None:
            return None
        losses = self._loss_of(y_pred, y)
        if sample_weight is not None:
            losses *= tf.reshape(tf.cast(sample_weight, tf.float32), [-1])
        losses += self._penalty()
        self._fit.loss_mean.update_state(losses)
        return tf.reduce_mean(losses)

    def _penalty(self) -> tf.Tensor:
        return tf.add_n([tf.cast(loss, tf.float32) for loss in self.model.losses] or [tf.constant(0.0)])

    @property
    def metrics(self) -> list[tf.keras.metrics.Metric]:
        """The mean loss and the metrics given to `compile`; not private."""
        if self.compiled_metrics is None:
            return [self._fit.loss_mean]
        return [self._fit.loss_mean, *self.compiled_metrics.metrics]

    # What the training costs.

    @property
    def steps(self) -> int:
        """How many steps the weights have been trained, in all calls of fit; may be released."""
        return sum(entry.steps for entry in self._ledger.entries())

    def epsilon(self, delta: float, relation: Relation = "add_or_remove_one", accountant: Accountant = "pld") -> float:
        """The epsilon of all steps so far: 0 before the first, infinity if one had no noise.

        Args:
            delta: the probability mass outside the bound, in (0, 1).
            relation: the neighbouring relation.
            accountant: "pld" or "rdp".

        Raises:
            InputError: there is no analysis under this relation, or a value is out of range.
        """
        entries = self._ledger.entries()
        if entries:
            releases.check_analysable(entries, delta, relation, accountant, allow_weak_delta=True)
        return releases.spent(entries, delta, relation, accountant)

    def guarantee(
        self,
        delta: float,
        relation: Relation = "add_or_remove_one",
        accountant: Accountant = "pld",
        steps: int | None = None,
        *,
        allow_weak_delta: bool = False,
    ) -> Guarantee:
        """The example-level guarantee of the weights, from what was really done.

        Args:
            delta: the probability mass outside the bound; below 1 / examples.
            relation: the neighbouring relation, between training sets that differ in one example.
            accountant: "pld" or "rdp".
            steps: the guarantee after so many steps in all, further ones with the settings of the last call of fit;
                None for the steps done so far.
            allow_weak_delta: accepts a delta of 1 / examples and more.

        Returns:
            The guarantee, of unit "example"; its epsilon is infinity if a step had no noise.

        Raises:
            InputError: nothing was trained, there is no analysis under this relation, or a value is out of range.
        """
        entries = self._ledger.entries()
        if steps is not None:
            more = steps - self.steps
            if more < 0 or self._fit.release is None:
                raise InputError(
                    f"the guarantee after {steps} steps can be told after a call of fit, and of no fewer than the "
                    f"{self.steps} steps done: leave steps out."
                )
            entries = _with_more(entries, self._fit.release, math.ceil(more / self._fit.steps_per_charge), more)
        if not entries:
            raise InputError("nothing was trained so far: call fit before asking for its guarantee.")
        releases.check_analysable(entries, delta, relation, accountant, allow_weak_delta)
        return releases.guarantee_of(entries, delta, relation, accountant)

    def affordable_steps(
        self,
        planned: int,
        budget: float | None,
        delta: float,
        relation: Relation = "add_or_remove_one",
        accountant: Accountant = "pld",
        allow_weak_delta: bool = False,
    ) -> float:
        """How many more steps, with the settings of the current call of fit, an epsilon budget pays for.

        Args:
            planned: how many steps fit is about to make.
            budget: the epsilon that all training of the model together may not exceed; None for no limit.
            delta: the probability mass outside the bound.
            relation: the neighbouring relation.
            accountant: "pld" or "rdp".
            allow_weak_delta: accepts a delta of 1 / examples and more.

        Returns:
            The number of steps; infinity if all that are planned are paid for.

        Raises:
            InputError: not even one step is paid for, or what fit does has no analysis.
        """
        release, entries = self._fit.release, self._ledger.entries()
        if release is None:
            raise InputError("a budget is for a call of fit: give EpsilonCallback to fit.")
        after_one = _with_more(entries, release, 1, 1)
        releases.check_analysable(after_one, delta, relation, accountant, allow_weak_delta)
        first = releases.spent(after_one, delta, relation, accountant)
        charges = math.ceil(planned / self._fit.steps_per_charge)
        if budget is None:
            # What has no answer at the end is refused at the start.
            releases.spent(_with_more(entries, release, charges, planned), delta, relation, accountant)
            return math.inf
        if first > budget:
            raise InputError(
                f"the epsilon budget of {budget:g} at delta {delta:g} does not pay for another step, after which "
                f"epsilon would be {first:.4g}: train with more noise or give a larger budget."
            )
        if int(self._steps_per_execution) > 1:
            raise InputError("an epsilon budget is kept step by step: compile with steps_per_execution=1.")

        def event_after(more: int) -> dp_accounting.DpEvent:
            return releases.event_of(_with_more(entries, release, more, more))

        paid = largest_count(event_after, budget, delta, largest=charges, relation=relation, accountant=accountant)
        return math.inf if paid == charges else paid * self._fit.steps_per_charge

    # What Keras does with weights.

    @override
    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        status = super().load_weights(*args, **kwargs)
        self._ledger.reconcile()
        return status

    @override
    def set_weights(self, weights: Any) -> None:
        super().set_weights(weights)
        self._ledger.reconcile()

    def save_weights(self, *args: Any, **kwargs: Any) -> None:
        """Saves the weights and the ledger, but not what metrics counted, which Keras' newest format would keep."""
        counted = [(variable, variable.numpy()) for metric in self.metrics for variable in metric.variables]
        self.reset_metrics()
        try:
            super().save_weights(*args, **kwargs)
        finally:
            for variable, value in counted:
                variable.assign(value)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Saves the trained Keras model, `model`, without the ledger, which is in `save_weights` of the DPModel.

        Who trains what is loaded from there further has to add up both guarantees.
        """
        self.model.save(*args, **kwargs)

    def get_config(self) -> NoReturn:
        """Refused, and with it copies: they would have no ledger, or one that does not know of this one's steps."""
        raise InputError(
            "a DPModel is not copied, pickled or saved as a whole, so that its ledger stays one: save the Keras model "
            "(model.model.save), or the weights with the ledger (model.save_weights)."
        )

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """The summary of the Keras model."""
        self.model.summary(*args, **kwargs)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: nothing is known of how the batch was drawn."""
        raise InputError("train_on_batch is refused, since nothing is known of how the batch was drawn: call fit.")

    # What fit needs.

    def _batches(
        self,
        x: Any,
        y: Any,
        batch_size: int | None,
        steps_per_epoch: int | None,
        class_weight: dict[int, float] | None,
        sample_weight: Any,
        sampling: ExampleSampling,
        max_batch_size: int | None,
    ) -> Batches:
        """The minibatches of arrays."""
        if isinstance(x, tf.data.Dataset | tf.keras.utils.Sequence) or hasattr(x, "__next__") or callable(x):
            raise InputError(
                f"fit takes arrays or PoissonBatches, but it was given a {type(x).__name__}, of which nothing is known "
                "of how it samples: give the examples and labels as arrays."
            )
        if class_weight is not None:
            sample_weight = with_class_weights(y, class_weight, sample_weight)
        size = _DEFAULT_BATCH_SIZE if batch_size is None else batch_size
        if sampling == "poisson":
            return PoissonBatches(x, y, size, self._seed, max_batch_size, steps_per_epoch, sample_weight)
        if sampling != "shuffled":
            raise InputError(f"there is no sampling {sampling!r}: choose poisson or shuffled.")
        if max_batch_size is not None:
            raise InputError("max_batch_size is for Poisson minibatches: leave it out, shuffled ones are never larger.")
        return ShuffledBatches(x, y, size, self._seed, steps_per_epoch, sample_weight)

    def _begin(self, batches: Batches) -> None:
        """Prepares the steps of a call of fit."""
        optimizer: Any = self.optimizer
        if self._fit.compiled is None or any(
            now is not then for now, then in zip((optimizer, self.model), self._fit.compiled, strict=True)
        ):
            raise InputError(
                "the optimizer or the Keras model was exchanged after compile, which what is compiled does not see: "
                "call compile again."
            )
        if optimizer.num_microbatches not in (None, batches.batch_size):
            raise InputError(
                f"num_microbatches must be None or the batch size, {batches.batch_size}, but it was "
                f"{optimizer.num_microbatches}: every example is clipped on its own; microbatch_size bounds the memory."
            )
        if not self.model.built or self._fit.checked != _subject(self.model, batches):
            outputs, y = check_training(self.model, self._loss_of, *batches.specs(None))
            self._fit.checked = _subject(self.model, batches)
            self.built = True
            # Variables that exist before the step is traced spare a second trace.
            optimizer.build(self.model.trainable_weights)
            if not self.compiled_metrics.built:
                self.compiled_metrics.build(outputs, y)
        release = Release(
            sampling="shuffled" if isinstance(batches, ShuffledBatches) else "poisson",
            examples=batches.examples,
            batch_size=batches.batch_size,
            max_batch_size=batches.max_batch_size,
            noise_multiplier=optimizer.noise_multiplier,
            clip_norm=optimizer.l2_norm_clip,
            clipping=optimizer.clipping,
        )
        self._ledger.reconcile()
        self._ledger.check_room(release)
        self._fit.settings.assign(release.row())
        self._fit.release = release
        self._fit.steps_per_charge = batches.steps_per_charge
        self._fit.expected_batch_size.assign(float(batches.batch_size))
        if self._seed is None:
            self._fit.key.assign(np.frombuffer(secrets.token_bytes(8), np.int32))
        else:
            self._fit.key.assign(stateless_seed(self._seed, Purpose.NOISE))


def _subject(model: tf.keras.Model, batches: Batches) -> tuple[Any, ...]:
    """What a check for private training holds for, as long as the loss is the same."""
    return (str(batches.specs(None)), *(id(weight) for weight in model.trainable_weights))


def _with_more(entries: list[Entry], release: Release, charges: int, steps: int) -> list[Entry]:
    """The entries after further steps of a release."""
    if not steps:
        return entries
    known = next((entry for entry in entries if entry.release == release), Entry(release, 0, 0))
    grown = dataclasses.replace(known, charges=known.charges + charges, steps=known.steps + steps)
    return [grown if entry is known else entry for entry in entries] + [grown] * (known not in entries)


def _split(x: Any, y: Any, sample_weight: Any, share: float) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """Training arrays, and the validation data that are their last part, as Keras splits them."""
    arrays = [part for part in tf.nest.flatten((x, y, sample_weight)) if part is not None]
    if not 0 < share < 1 or not all(hasattr(part, "shape") for part in arrays):
        raise InputError(f"validation_split must lie between 0 and 1, and needs arrays, but it was {share!r}.")
    first = math.floor(len(arrays[0]) * (1 - share))

    def part_of(nest: Any, part: slice) -> Any:
        return tf.nest.map_structure(lambda array: None if array is None else array[part], nest)

    kept, held_out = (
        [part_of(nest, part) for nest in (x, y, sample_weight)] for part in (slice(first), slice(first, None))
    )
    return (*kept, tuple(part for part in held_out if part is not None))
