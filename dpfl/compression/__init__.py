"""Compression: what an update looks like on the wire, and how the model becomes smaller.

`Compression` says what is wanted. The codec, the subspaces and the pruning are pure functions beneath the mechanisms,
whose queries use them; see `dpfl.mechanisms.compressed_queries` for the order that keeps the guarantee. `to_lite` turns
a trained model into a file of TensorFlow Lite.
"""

from dpfl.compression.config import Compression
from dpfl.compression.lite import compressed_size, lite_accuracy, lite_logits, to_lite

__all__ = ["Compression", "compressed_size", "lite_accuracy", "lite_logits", "to_lite"]
