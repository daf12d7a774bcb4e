"""Datasets that need no download: scikit-learn's digits and Synthetic(alpha, beta)."""

from __future__ import annotations

import math

import numpy as np

from dpfl.data.arrays import from_arrays
from dpfl.data.federated_data import FederatedData
from dpfl.errors import InputError
from dpfl.randomness import Purpose, generator

_DIGITS_TEST, _DIGITS_VALIDATION = 300, 250
_FEATURES, _CLASSES = 60, 10


def digits(clients: int = 300, partition: str = "iid", seed: int = 0) -> FederatedData:
    """Handwritten digits of scikit-learn, dealt to simulated clients: small, real, and always there.

    1,797 images of shape (8, 8, 1) with pixels in [0, 1]: 1,247 to train, 250 to validate and 300 to test,
    each with the same share of every class. The split depends on the seed alone.

    Args:
        clients: Number of clients, at most 1,247.
        partition: "iid", "dirichlet:ALPHA" or "shards:PER_CLIENT".
        seed: Seed of the split and the partition.

    Raises:
        InputError: An option is not valid.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, y = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    random = int(generator(seed, Purpose.HOLDING_OUT).integers(2**32))
    x, x_test, y, y_test = train_test_split(x, y, test_size=_DIGITS_TEST, stratify=y, random_state=random)
    x, x_validation, y, y_validation = train_test_split(
        x, y, test_size=_DIGITS_VALIDATION, stratify=y, random_state=random
    )
    return from_arrays(
        x,
        y,
        name="digits",
        clients=clients,
        partition=partition,
        num_classes=10,
        test=(x_test, y_test),
        validation=(x_validation, y_validation),
        seed=seed,
    )


def synthetic(
    alpha: float = 1.0,
    beta: float = 1.0,
    clients: int = 100,
    seed: int = 0,
    iid: bool = False,
    *,
    examples_per_client: int | None = None,
    max_examples_per_client: int | None = None,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.1,
) -> FederatedData:
    """Synthetic(alpha, beta) of Li et al. 2020 (FedProx, arXiv 1812.06127, section 5.1).

    Client k draws u_k ~ N(0, alpha) and B_k ~ N(0, beta), then a softmax model W_k (60 x 10), b_k (10) ~
    N(u_k, 1) and a mean v_k (60) ~ N(B_k, 1). Its examples are x ~ N(v_k, Sigma) with Sigma diagonal,
    Sigma_jj = j^-1.2, and y = argmax softmax(x W_k + b_k). The paper leaves open whether alpha and beta are
    variances; its code (litian96/FedProx, generate_synthetic.py) uses them as STANDARD DEVIATIONS, and so
    does this.

    Note that alpha changes no label: u_k is added to all entries of W_k and b_k, hence the same number to the
    logits of all classes, which argmax does not see. Clients differ by W_k and b_k, drawn anew for each, and
    by beta. The parameter is kept because the literature names datasets by it.

    Args:
        alpha: Standard deviation of u_k over clients.
        beta: Standard deviation of B_k over clients.
        clients: Number of clients; the paper has 30.
        seed: Seed.
        iid: Synthetic-IID of the paper: one W, b ~ N(0, 1) for all and v = 0; alpha and beta have no effect.
        examples_per_client: Training examples of each client; by default floor(lognormal(4, 2)) + 50 as in
            the paper's code, a heavy tail: half of the clients have more than 104, one in a hundred more than
            5,700.
        max_examples_per_client: Cuts that tail.
        test_fraction: Test examples, drawn from the clients in proportion to their sizes, as a fraction of
            the training examples and in addition to them; one at least.
        validation_fraction: The same for validation; may give none.

    Raises:
        InputError: A number is out of range.
    """
    deviations = (alpha, beta, test_fraction, validation_fraction)
    counts = (clients, examples_per_client, max_examples_per_client)
    if not all(math.isfinite(value) and value >= 0 for value in deviations):
        raise InputError(
            f"alpha is {alpha}, beta {beta}, test_fraction {test_fraction} and validation_fraction "
            f"{validation_fraction}, but finite numbers of at least 0 are needed."
        )
    if not all(value is None or value >= 1 for value in counts):
        raise InputError(
            f"clients is {clients}, examples_per_client {examples_per_client} and max_examples_per_client "
            f"{max_examples_per_client}, but numbers of at least 1 are needed."
        )
    if examples_per_client is not None and max_examples_per_client is not None:
        raise InputError("examples_per_client fixes all sizes: leave it or max_examples_per_client out.")
    rng = generator(seed, Purpose.SYNTHESIS)
    if examples_per_client is not None:
        sizes = np.full(clients, examples_per_client)
    else:
        sizes = (rng.lognormal(4, 2, clients).astype(np.int64) + 50).clip(1, max_examples_per_client)
    tests = max(1, round(test_fraction * sizes.sum()))
    validations = round(validation_fraction * sizes.sum())
    drawn = sizes + rng.multinomial(tests + validations, sizes / sizes.sum())
    starts = np.cumsum(drawn) - drawn

    x = rng.standard_normal((drawn.sum(), _FEATURES), dtype=np.float32)
    x *= np.arange(1, _FEATURES + 1, dtype=np.float32) ** np.float32(-0.6)  # the square root of Sigma_jj
    y = np.empty(len(x), np.int32)
    shape = (_FEATURES + 1, _CLASSES)  # the last row is b
    shared = rng.standard_normal(shape, dtype=np.float32)
    u = rng.normal(0, alpha, clients).astype(np.float32)
    center = rng.normal(0, beta, clients).astype(np.float32)
    for k in range(clients):
        own = slice(starts[k], starts[k] + drawn[k])
        weights = shared
        if not iid:
            weights = u[k] + rng.standard_normal(shape, dtype=np.float32)
            x[own] += center[k] + rng.standard_normal(_FEATURES, dtype=np.float32)
        y[own] = (x[own] @ weights[:-1] + weights[-1]).argmax(axis=1)

    training = np.arange(len(x)) < np.repeat(starts + sizes, drawn)  # the first examples of each client
    rest = rng.permutation(np.flatnonzero(~training))
    test, validation = rest[:tests], rest[tests:]
    return FederatedData(
        name="synthetic-iid" if iid else f"synthetic({alpha:g},{beta:g})",
        x=x[training],
        y=y[training],
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        x_validation=x[validation],
        y_validation=y[validation],
        x_test=x[test],
        y_test=y[test],
        num_classes=_CLASSES,
        client_ids=tuple(map(str, range(clients))),
        class_names=tuple(map(str, range(_CLASSES))),
        assumptions=("Clients and examples are synthetic, drawn at random.",),
    )
