"""A population larger than the simulated one."""

from __future__ import annotations

import pydantic

from dpfl.config import Config
from dpfl.errors import InputError
from dpfl.sampling import BaseSampler


class Deployment(Config):
    """The population and cohort that a simulation stands for.

    A simulation with few clients gets as much noise on its mean update as the deployment's much
    larger cohort would have. What it then states for the deployment is an extrapolation, and is
    labelled so: the simulated clients themselves are protected far less, and both numbers are kept.

    Attributes:
        clients: the number of clients of the deployment.
        cohort: the expected number of clients in a round of the deployment; None for samplers in
            which everyone takes part.
    """

    clients: int = pydantic.Field(gt=0)
    cohort: int | None = pydantic.Field(default=None, gt=0)

    def sampler(self, simulated: BaseSampler) -> BaseSampler:
        """The simulated sampler with the deployment's cohort.

        Raises:
            InputError: the cohort does not fit the kind of sampler.
        """
        if "cohort" not in type(simulated).model_fields:
            if self.cohort is not None:
                raise InputError(f"the sampler {simulated.name} takes everyone: leave the deployment's cohort out.")
            return simulated
        if self.cohort is None:
            raise InputError(
                f"the sampler {simulated.name} needs the deployment's cohort: give it a number of clients."
            )
        cap = getattr(simulated, "cap", None)
        if cap is not None:
            raise InputError(
                f"the cap of {cap} is for the simulated cohort: leave the cap out, so that simulation and deployment "
                "each get one of their own."
            )
        return simulated.replace(cohort=self.cohort)
