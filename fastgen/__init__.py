"""Fused kernels for post-training and distilling generative models.

>>> from fastgen import ddo_loss, NoiseSchedule
"""

from ._backend import build_info, use_backend
from .adversarial import (
    approximate_r1_penalty,
    clip_weights_,
    discriminator_loss,
    feature_distance,
    generator_loss,
    gradient_penalty,
    pix2pix_loss,
    r1_penalty,
)
from .distillation_training import backward_simulation, fake_score_loss, renoise_times
from .elbo import ddo_loss, diffusion_dpo_loss, elbo_difference, elbo_error
from .sampling import langevin_step, posterior_sample
from .schedule import NoiseSchedule, add_noise, diffuse_pair, prediction_to_x0
from .score_distillation import (
    DistillationStats,
    ScorePair,
    decoupled_dmd_loss,
    dmd_loss,
    sds_loss,
    vsd_loss,
)
from .trajectory import FactoredCost, Trajectory, optimal_trajectory

__version__ = "0.1.0"

__all__ = [
    "DistillationStats",
    "FactoredCost",
    "NoiseSchedule",
    "ScorePair",
    "Trajectory",
    "add_noise",
    "approximate_r1_penalty",
    "backward_simulation",
    "build_info",
    "clip_weights_",
    "ddo_loss",
    "decoupled_dmd_loss",
    "diffuse_pair",
    "diffusion_dpo_loss",
    "discriminator_loss",
    "dmd_loss",
    "elbo_difference",
    "elbo_error",
    "fake_score_loss",
    "feature_distance",
    "generator_loss",
    "gradient_penalty",
    "langevin_step",
    "optimal_trajectory",
    "pix2pix_loss",
    "posterior_sample",
    "prediction_to_x0",
    "r1_penalty",
    "renoise_times",
    "sds_loss",
    "use_backend",
    "vsd_loss",
]
