"""What happens on a client."""

from dpfl.clients.training import ClientTraining

__all__ = ["ClientTraining"]
