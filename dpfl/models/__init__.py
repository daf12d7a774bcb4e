"""Models: the small ones that have a name. `dpfl.models.functional` makes any Keras model ready for simulation."""

from dpfl.models.named import cnn, mlp, softmax

__all__ = ["cnn", "mlp", "softmax"]
