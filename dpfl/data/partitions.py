"""Partitions: who owns which example, for data that comes without clients.

Every partition is a pure function of (labels, number of clients, seed). It returns, for each example, the
index of the one client that owns it, and leaves no client without an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dpfl.errors import InputError
from dpfl.randomness import Purpose, generator

Partition = Callable[[npt.ArrayLike, int, int], np.ndarray]
"""A function (labels, clients, seed) -> int64 (examples,) of client indices."""

FORMS = "'iid', 'dirichlet:ALPHA' (such as 'dirichlet:0.3') or 'shards:PER_CLIENT' (such as 'shards:2')"

_SMALLEST_CONCENTRATION = 1e-6  # below it a draw is one class anyway, and NumPy's time grows as 1 / alpha


def iid(labels: npt.ArrayLike, clients: int, seed: int) -> np.ndarray:
    """Deals examples at random: client sizes differ by at most one.

    Args:
        labels: (examples,) class of each example; only their number matters here.
        clients: Number of clients.
        seed: Seed of the draw.

    Returns:
        int64 (examples,), client index of each example.

    Raises:
        InputError: There are more clients than examples, or none.
    """
    examples = len(_checked(labels, clients))
    return generator(seed, Purpose.PARTITION).permutation(np.arange(examples, dtype=np.int64) % clients)


def dirichlet(labels: npt.ArrayLike, clients: int, alpha: float, seed: int) -> np.ndarray:
    """Label skew of Hsu et al. 2019 (arXiv 1909.06335): class mixtures from a Dirichlet distribution.

    Each client draws its class mixture q ~ Dirichlet(alpha p), p the class frequencies of the data, and then
    its examples without replacement by q, renormalised to the classes that have examples left. (Renormalised
    parts of a Dirichlet draw are Dirichlet again and independent of the rest: where q has no mass on these
    classes, being too small for a float, a new draw over them stands in exactly.) Small alpha: nearly one
    class per client; large alpha: IID.

    As in that paper all clients get the same number of examples, up to one. That is also why no client is
    empty. Yurochkin et al. 2019 (1905.12022) share out each class instead, which leaves clients empty and is
    usually repaired by drawing again until none is, with no bound on the time for many clients.

    Args:
        labels: (examples,) class of each example.
        clients: Number of clients.
        alpha: Concentration, above 0.
        seed: Seed of the draw.

    Returns:
        int64 (examples,), client index of each example.

    Raises:
        InputError: There are more clients than examples, or none, or alpha is not a positive number.
    """
    labels = _checked(labels, clients)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"the dirichlet alpha is {alpha}, but a number above 0 is needed, such as 0.3.")
    rng = generator(seed, Purpose.PARTITION)
    _, class_of, left = np.unique(labels, return_inverse=True, return_counts=True)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(class_of[shuffled], kind="stable")]
    taken = np.cumsum(left) - left  # position in by_class of the next example of each class
    concentration = np.maximum(alpha * left / len(labels), _SMALLEST_CONCENTRATION)
    mixtures = rng.dirichlet(concentration, size=clients)

    owner = np.empty(len(labels), np.int64)
    for client, mixture in enumerate(mixtures):
        wanted = (len(labels) + client) // clients  # the sizes add up to the number of examples
        while wanted:
            available = left > 0
            weights = np.where(available, mixture, 0.0)
            if not weights.sum():
                weights[available] = rng.dirichlet(concentration[available])
            counts = np.minimum(rng.multinomial(wanted, weights / weights.sum()), left)
            for label in np.flatnonzero(counts):
                owner[by_class[taken[label] : taken[label] + counts[label]]] = client
            taken += counts
            left -= counts
            wanted -= counts.sum()
    return owner


def shards(labels: npt.ArrayLike, clients: int, shards_per_client: int, seed: int) -> np.ndarray:
    """The pathological non-IID partition of McMahan et al. 2017 (arXiv 1602.05629, section 3).

    Examples sorted by label are cut into clients * shards_per_client shards of equal size (up to one), and
    every client gets shards_per_client of them at random, so that most clients see that many classes.

    Args:
        labels: (examples,) class of each example.
        clients: Number of clients.
        shards_per_client: Shards that each client gets, at least 1.
        seed: Seed of the draw.

    Returns:
        int64 (examples,), client index of each example.

    Raises:
        InputError: There are more shards than examples, or no clients or shards.
    """
    labels = _checked(labels, clients)
    if shards_per_client < 1:
        raise InputError(f"shards_per_client is {shards_per_client}, but at least 1 is needed.")
    if clients * shards_per_client > len(labels):
        raise InputError(
            f"{clients} clients with {shards_per_client} shards each need "
            f"{clients * shards_per_client} examples, but there are {len(labels)}: "
            "ask for fewer clients or shards."
        )
    rng = generator(seed, Purpose.PARTITION)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owner_of_shard = rng.permutation(np.repeat(np.arange(clients, dtype=np.int64), shards_per_client))
    owner = np.empty(len(labels), np.int64)
    for client, shard in zip(owner_of_shard, np.array_split(by_class, len(owner_of_shard)), strict=True):
        owner[shard] = client
    return owner


def parse(text: str) -> Partition:
    """Returns the partition that a string names: "iid", "dirichlet:0.3", "shards:2".

    Raises:
        InputError: The string names no partition or its number is wrong.
    """
    name, _, number = str(text).partition(":")
    try:
        if text == "iid":
            return iid
        if name == "dirichlet" and 0 < (alpha := float(number)) < math.inf:
            return lambda labels, clients, seed: dirichlet(labels, clients, alpha, seed)
        if name == "shards" and (per_client := int(number)) > 0:
            return lambda labels, clients, seed: shards(labels, clients, per_client, seed)
    except ValueError:
        pass
    raise InputError(f"there is no partition {text!r}: use {FORMS}.")


def _checked(labels: npt.ArrayLike, clients: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise InputError(f"labels have shape {labels.shape}, but one class per example is needed.")
    if clients < 1:
        raise InputError(f"the number of clients is {clients}, but at least 1 is needed.")
    if clients > len(labels):
        raise InputError(
            f"{clients} clients cannot share {len(labels)} examples, one at least for each: "
            f"ask for at most {len(labels)} clients."
        )
    return labels
