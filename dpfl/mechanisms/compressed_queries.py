"""The query of compressed updates: any mechanism's query, of records that come through a codec.

The order keeps the sensitivity. An update becomes a record (its coordinates in the round's subspace), the record a
message, the message a record again, and this one is clipped: whatever quantisation did to its norm, the mechanism sums
nothing but records within its clip norm. To clip before quantisation would not do: of 1 bit, a record clipped to 1 can
have a norm of 3 when it is decoded. Where clients noise their own records (local mechanisms) the message is made of
the noised record, which is private already: post-processing. Noise lies in the subspace alone, since what the mechanism
sums and noises are records; the released update is the one that has the noised record for its coordinates.
"""

from __future__ import annotations

import collections
from typing import Any

import tensorflow as tf
from tensorflow_privacy.privacy.dp_query.dp_query import SumAggregationDPQuery

from dpfl.compression import Compression
from dpfl.compression.codec import Codec
from dpfl.compression.subspace import Subspaces
from dpfl.mechanisms.client_noise import ClientParams, with_seed_of_its_own
from dpfl.mechanisms.queries import MeanQuery, clip_scale, global_norm
from dpfl.mechanisms.weighted_queries import WeightedMeanQuery
from dpfl.noise import round_seed
from dpfl.randomness import Purpose, stateless_seed

GlobalState = collections.namedtuple(
    "GlobalState", ["inner", "masks", "subspace_seed", "rotation_seed", "rounding_seed", "round"]
)
SampleParams = collections.namedtuple("SampleParams", ["inner", "subspace", "signs_seed", "seed"])


class CompressedMeanQuery(SumAggregationDPQuery):
    """A mechanism's mean of updates that are compressed before they are clipped.

    Args:
        inner: the mechanism's query, of records.
        compression: of updates.
        template: the structure of an update, as tensors, arrays or `tf.TensorSpec`s.
        rounds: of the whole run.
        seed: the run's seed.
        after_noise: whether clients noise their records themselves, and quantise what comes out.

    Raises:
        InputError: the weights cannot be compressed so.
    """

    only_clips = False  # See `SumQuery.only_clips`.

    def __init__(
        self,
        inner: MeanQuery | WeightedMeanQuery,
        compression: Compression,
        template: Any,
        rounds: int,
        seed: int,
        *,
        after_noise: bool,
    ) -> None:
        self.subspaces = Subspaces(compression, [part.shape for part in tf.nest.flatten(template)], rounds)
        self.codec = Codec(compression.bits, compression.rotation)
        self._inner = inner
        self._seed = seed
        self._after_noise = after_noise
        self._structure = tf.nest.map_structure(lambda part: tf.TensorSpec(part.shape, tf.float32), template)

    def initial_global_state(self) -> GlobalState:
        """The mechanism's state; masks of a model that is not pruned; seeds (int32, 2) and round 0 (int32).

        Subspaces and rotations are public, and so is their seed. That of roundings is the clients'.
        """
        purposes = (Purpose.SUBSPACE, Purpose.ROTATION, Purpose.ROUNDING)
        subspace, rotation, rounding = (tf.constant(stateless_seed(self._seed, purpose)) for purpose in purposes)
        state, masks = self._inner.initial_global_state(), self.subspaces.all_masks()
        return GlobalState(state, masks, subspace, rotation, rounding, tf.constant(0, tf.int32))

    def derive_sample_params(self, global_state: GlobalState) -> SampleParams:
        """What clients need of the round: the mechanism's own, the subspace, and seeds of rotation and rounding."""
        state = global_state
        return SampleParams(
            self._inner.derive_sample_params(state.inner),
            self._subspace(state),
            round_seed(state.rotation_seed, state.round),
            round_seed(state.rounding_seed, state.round),
        )

    def client_params(self, params: SampleParams, client: tf.Tensor, examples: tf.Tensor | None = None) -> ClientParams:
        """The sample params as one client uses them: see `SumQuery.client_params`."""
        inner = self._inner.client_params(params.inner, client, examples)
        return ClientParams(params._replace(inner=inner, seed=round_seed(params.seed, client)))

    def clip_norm(self, params: Any) -> tf.Tensor:
        """See `SumQuery.clip_norm`: of records."""
        params = params.of_client if isinstance(params, ClientParams) else params
        return self._inner.clip_norm(params.inner)

    def initial_sample_state(self, template: Any = None) -> Any:
        """The mechanism's own sum of no records."""
        return self._inner.initial_sample_state([tf.zeros(shape) for shape in self.subspaces.record_shapes])

    def preprocess_record(self, params: Any, record: Any) -> Any:
        """What a client's message comes to in the sum.

        Args:
            params: from `client_params`, or from `derive_sample_params` where nobody says which client it is;
                roundings then cannot be repeated.
            record: an update, a structure of float32 tensors. Private, before and after.
        """
        return self.sent_and_norm(params, record)[0]

    def sent_and_norm(self, params: Any, record: Any) -> tuple[Any, tf.Tensor]:
        """See `MeanQuery.sent_and_norm`: the norm is that of the record which the mechanism clips."""
        own = self._own(params)
        coordinates = self.subspaces.records(own.subspace, tf.nest.flatten(record))
        if self._after_noise:
            noised, norm = self._inner.sent_and_norm(own.inner, coordinates)
            return self._through_codec(own, noised), norm
        return self._inner.sent_and_norm(own.inner, self._through_codec(own, coordinates))

    @property
    def clips_many(self) -> bool:
        """Whether `sums` can be asked for: where the mechanism only clips what it decodes."""
        return isinstance(self._inner, MeanQuery) and self._inner.only_clips

    def sums(self, params: SampleParams, clients: tf.Tensor, updates: list[tf.Tensor]) -> tuple[Any, tf.Tensor]:
        """What many clients send, summed, and the norms of their records; as `sent_and_norm` of each. Private.

        Args:
            params: from `derive_sample_params`.
            clients: their indices, int32 (clients,).
            updates: tensors (clients, *shape).
        """
        assert isinstance(self._inner, MeanQuery)
        record = self.subspaces.records(params.subspace, updates)
        if self.codec.bits is not None:
            length = self.subspaces.sent_count(params.subspace)
            draws = tf.map_fn(
                lambda client: self.codec.draws(length, round_seed(params.seed, client)),
                clients,
                fn_output_signature=tf.TensorSpec([None], tf.float32),
            )
            message = self.codec.encode_by(self.subspaces.sent(params.subspace, record), params.signs_seed, draws)
            decoded = self.codec.decode(message, length, params.signs_seed)
            record = self.subspaces.received(params.subspace, decoded)
        squares = [tf.reduce_sum(tf.square(part), axis=list(range(1, len(part.shape)))) for part in record]
        norms = tf.sqrt(tf.add_n(squares))
        scales = clip_scale(norms, self._inner.clip_norm(params.inner))
        clipped = [
            tf.math.multiply_no_nan(part, tf.reshape(scales, [-1] + [1] * (len(part.shape) - 1))) for part in record
        ]
        return self._inner.sent(params.inner, [tf.reduce_sum(part, axis=0) for part in clipped], norms), norms

    def message(self, params: Any, record: Any) -> tf.Tensor:
        """The very bytes that a client sends, uint8 (bytes,): for measuring them. Private.

        Args:
            params: from `client_params`.
            record: an update, a structure of float32 tensors.
        """
        own = self._own(params)
        sent = self.subspaces.records(own.subspace, tf.nest.flatten(record))
        return self._message(own, self._inner.preprocess_record(own.inner, sent) if self._after_noise else sent)

    def get_noised_result(self, sample_state: Any, global_state: GlobalState) -> tuple[Any, GlobalState, Any]:
        """The mechanism's noised mean of records, as an update.

        Args:
            sample_state: the sum of what clients sent. Private.
            global_state: the state of this round.

        Returns:
            The update, which may be released under the plan's guarantee; the next round's state; the mechanism's event.
        """
        result, inner, event = self._inner.get_noised_result(sample_state, global_state.inner)
        state = global_state._replace(inner=inner, round=global_state.round + 1)
        return self._as_update(global_state, result), state, event

    def exact_result(self, sample_state: Any, global_state: GlobalState) -> Any:
        """See `MeanQuery.exact_result`."""
        exact = self._inner.exact_result(sample_state, global_state.inner)
        return None if exact is None else self._as_update(global_state, exact)

    def after_release(self, global_state: Any, weights: Any) -> Any:
        """See `MeanQuery.after_release`: the masks that pruning leaves of the released model."""
        return global_state._replace(masks=self.subspaces.masks(tf.nest.flatten(weights), global_state.round))

    def record_norm(self, global_state: GlobalState, update: Any) -> tf.Tensor:
        """See `MeanQuery.record_norm`."""
        return global_norm(self.subspaces.records(self._subspace(global_state), tf.nest.flatten(update)))

    def rounds_done(self, global_state: GlobalState) -> tf.Tensor:
        """See `MeanQuery.rounds_done`."""
        return global_state.round

    def onto(self, params: SampleParams, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """See `MeanQuery.onto`."""
        return self.subspaces.onto(params.subspace, gradients)

    def _subspace(self, state: GlobalState) -> Any:
        return self.subspaces.of_round(state.subspace_seed, state.round, state.masks)

    def _as_update(self, state: GlobalState, record: Any) -> Any:
        update = self.subspaces.updates(self._subspace(state), tf.nest.flatten(record))
        return tf.nest.pack_sequence_as(self._structure, update)

    def _own(self, params: Any) -> SampleParams:
        """The sample params of one client, with a seed that no other has where roundings need one."""
        if isinstance(params, SampleParams) and self.codec.bits is None:
            return params
        return with_seed_of_its_own(params)

    def _through_codec(self, params: SampleParams, record: Any) -> Any:
        """What the server reads in the message of a record."""
        if self.codec.bits is None:  # float32 comes out as it went in
            return record
        length = self.subspaces.sent_count(params.subspace)
        vector = self.codec.decode(self._message(params, record), length, params.signs_seed)
        return self.subspaces.received(params.subspace, vector)

    def _message(self, params: SampleParams, record: Any) -> tf.Tensor:
        vector = self.subspaces.sent(params.subspace, tf.nest.flatten(record))
        return self.codec.encode(vector, params.signs_seed, params.seed)
