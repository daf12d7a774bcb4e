"""What happens on a client."""

from dpfl.clients.local_training import LocalTraining

__all__ = ["LocalTraining"]
