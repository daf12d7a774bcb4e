"""dpfl's parts under genuine TensorFlow Federated: mechanisms, DP-SGD clients, datasets, evaluation.

Whoever starts with dpfl runs any experiment there by `Experiment(engine="tff")`. Whoever has TFF code already takes the
parts. A mechanism is the `model_aggregator` of FedAvg, FedProx and FedSGD; who takes part is drawn by the plan's
sampler, with a seed that nobody learns, or its guarantee is not true:

    import secrets

    import dpfl  # first, so that TensorFlow keeps its log to itself
    import tensorflow as tf
    import tensorflow_federated as tff

    data = dpfl.data.digits(clients=30)
    clients = data.to_tff()
    datasets = [clients.create_tf_dataset_for_client(name).batch(5) for name in clients.client_ids]
    optimizer = tff.learning.optimizers.build_sgdm(0.5)

    def model_fn():
        keras = tf.keras.Sequential([tf.keras.layers.Flatten(input_shape=(8, 8, 1)), tf.keras.layers.Dense(10)])
        loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return tff.learning.models.from_keras_model(keras, loss, input_spec=datasets[0].element_spec)

    target = dpfl.Privacy(epsilon=8, delta=1e-2)
    plan = dpfl.Gaussian(clip_norm=0.5).plan(target, dpfl.Poisson(cohort=15), population=30, rounds=3)
    aggregator = dpfl.tff.aggregator(plan)
    process = tff.learning.algorithms.build_unweighted_fed_avg(model_fn, optimizer, model_aggregator=aggregator)
    seed, state = secrets.randbits(63), process.initialize()
    for number in range(plan.rounds):
        state = process.next(state, [datasets[k] for k in plan.sampler.clients(seed, number, 30)]).state
    print(plan.guarantee.statement())

Clients that protect their own examples by DP-SGD are `client_work`, which fits
`tff.learning.templates.compose_learning_process`; `build_dp_sgd_fed_avg` is put together already, and takes any
aggregator, the one above among them:

    from dpfl.clients.example_privacy import plan_clients

    training = dpfl.ClientTraining(learning_rate=0.5, batch_size=16, steps=3, example_clip=1.0)
    target = dpfl.Privacy(unit="example", epsilon=8, delta=1e-5)
    plan = plan_clients(training, target, dpfl.Poisson(cohort=15), data.client_sizes, rounds=10)
    spec = datasets[0].element_spec
    process = dpfl.tff.build_dp_sgd_fed_avg("softmax", plan, input_spec=spec, num_classes=10)
    seed, state = secrets.randbits(63), process.initialize()
    for number in range(plan.rounds):
        state = process.next(state, [datasets[k] for k in plan.sampler.clients(seed, number, 30)]).state
    print(plan.guarantee.statement())

There, clip, noise, minibatches and guarantee come from the plan, and from nowhere else. What it promises holds for the
clients that it knows: with a finite epsilon, a client whose number of records is none of the plan's, and a round beyond
the plan's, end `next` with an error. `evaluation_model` is for `tff.learning.algorithms.build_fed_eval`, and
`FunctionalModel.to_keras(process.get_model_weights(state).trainable)` is the trained Keras model.

Updates can be compressed in front of any aggregator, TFF's own among them. The order is the one that keeps a clip:
compressed first, clipped after. With 4 bits for a coordinate:

    inner = tff.aggregators.DifferentiallyPrivateFactory.gaussian_fixed(1.0, clients_per_round=15.0, clip=0.5)
    chain = dpfl.tff.compressed(inner, dpfl.Compression(bits=4, rotation=True))
    averaging = tff.learning.algorithms.build_unweighted_fed_avg(model_fn, optimizer, model_aggregator=chain)
    output = averaging.next(averaging.initialize(), datasets)
    print(output.metrics["aggregator"].message_bytes)  # that each client sends

TensorFlow Federated is imported when one of these functions is called, not before.
"""

from dpfl.tff.aggregation import aggregator
from dpfl.tff.compression import compressed
from dpfl.tff.models import evaluation_model
from dpfl.tff.private_clients import WorkState, build_dp_sgd_fed_avg, client_work

__all__ = ["WorkState", "aggregator", "build_dp_sgd_fed_avg", "client_work", "compressed", "evaluation_model"]
