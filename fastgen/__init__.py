"""Fused kernels for post-training and distilling generative models.

>>> from fastgen import ddo_loss, NoiseSchedule
"""

from ._backend import build_info, use_backend
from .elbo import ddo_loss, diffusion_dpo_loss, elbo_difference, elbo_error
from .schedule import NoiseSchedule, add_noise, prediction_to_x0
from .trajectory import FactoredCost, Trajectory, optimal_trajectory

__version__ = "0.1.0"

__all__ = [
    "FactoredCost",
    "NoiseSchedule",
    "Trajectory",
    "add_noise",
    "build_info",
    "ddo_loss",
    "diffusion_dpo_loss",
    "elbo_difference",
    "elbo_error",
    "optimal_trajectory",
    "prediction_to_x0",
    "use_backend",
]
