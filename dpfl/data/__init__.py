"""Federated datasets: training examples grouped by client, with central held-out examples.

One class, `FederatedData`, and the ways to get it: datasets that need no download (`digits`, `synthetic`),
the usual images (`mnist`, `fashion_mnist`, `cifar10`, and `femnist` with its writers), those of TensorFlow Federated
with its clients (`emnist`, `cifar100`, `shakespeare`, `stackoverflow`), your own (`from_arrays`, `from_dataframe`,
`from_file`, `FederatedData.from_tff`), and `load`, which finds any of these by name or path. `FederatedData.save` and
`FederatedData.open` keep one in a folder, and `write_clients` writes one there that is larger than memory. Data without
clients is dealt to simulated ones by `partitions`. What the privacy guarantee does not cover (statistics, categories,
accuracies on held-out examples) travels with the data as `FederatedData.assumptions`. Importing this package imports
NumPy and neither TensorFlow nor pandas.
"""

from dpfl.data import partitions
from dpfl.data.arrays import from_arrays
from dpfl.data.embedded import digits, synthetic
from dpfl.data.federated_data import FederatedData
from dpfl.data.files import from_file
from dpfl.data.images import cifar10, fashion_mnist, femnist, mnist
from dpfl.data.loading import load
from dpfl.data.stored import write_clients
from dpfl.data.tables import from_dataframe
from dpfl.data.tff_datasets import cifar100, emnist, shakespeare, stackoverflow

__all__ = [
    "FederatedData",
    "cifar10",
    "cifar100",
    "digits",
    "emnist",
    "fashion_mnist",
    "femnist",
    "from_arrays",
    "from_dataframe",
    "from_file",
    "load",
    "mnist",
    "partitions",
    "shakespeare",
    "stackoverflow",
    "synthetic",
    "write_clients",
]
