"""The public functions in plain PyTorch, with the same names and arguments: what the kernels are checked against.

They read like the papers' formulas, take any device and dtype, and are differentiated by autograd. In float64 they are
the oracle of the tests; on a machine without compiled kernels they serve as the CPU implementation.
"""

from .elbo import ddo_loss, diffusion_dpo_loss, elbo_difference, elbo_error
from .schedule import add_noise, prediction_to_x0
from .trajectory import optimal_trajectory

__all__ = [
    "add_noise",
    "ddo_loss",
    "diffusion_dpo_loss",
    "elbo_difference",
    "elbo_error",
    "optimal_trajectory",
    "prediction_to_x0",
]
