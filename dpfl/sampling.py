"""Which clients take part in a round."""

from __future__ import annotations

import numpy as np
import pydantic

from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.randomness import Purpose, generator


class Poisson(Config):
    """Every client takes part in a round independently, with the same probability.

    The number of clients in a round varies, may be zero, and is private: sums are divided by the
    expected cohort. This is the sampling that amplification by Poisson subsampling assumes.

    Attributes:
        cohort: the expected number of clients in a round.
    """

    cohort: int = pydantic.Field(gt=0)

    def rate(self, population: int) -> float:
        """The probability with which a client takes part in a round.

        Raises:
            InputError: the expected cohort is larger than the population.
        """
        if self.cohort > population:
            raise InputError(
                f"the expected cohort of {self.cohort} exceeds the {population} clients of the data; "
                f"choose a cohort of at most {population}."
            )
        return self.cohort / population

    def clients(self, seed: int, round_number: int, population: int) -> np.ndarray:
        """Draws the clients of a round.

        Args:
            seed: the run's seed.
            round_number: the round, from 0.
            population: the number of clients in the data.

        Returns:
            Ascending client indices, int32, of varying length. The membership is private: the
            guarantee relies on nobody learning who took part.
        """
        draws = generator(seed, Purpose.SAMPLING, round_number).random(population)
        return np.flatnonzero(draws < self.rate(population)).astype(np.int32)

    def in_words(self, population: int) -> str:
        """The sampling as a clause of the guarantee's statement."""
        return (
            f"on a Poisson sample of the {population} clients at rate {self.rate(population):g} "
            f"(expected cohort {self.cohort})"
        )
