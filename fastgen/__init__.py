"""Fused kernels for post-training and distilling generative models.

>>> from fastgen import ddo_loss, NoiseSchedule
"""

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
from .analytic_dpm import (
    ScoreMoments,
    VariationalBound,
    analytic_trajectory,
    pixel_reverse_variance,
    regularize_moments,
    reverse_variance,
    trajectory_cost,
    variational_bound,
)
from .core.dispatch import build_info, use_backend
from .diffusion_classifier import ClassifierStatistics, DiffusionClassifier
from .elbo import ddo_loss, diffusion_dpo_loss, elbo_difference, elbo_error
from .energy import ReplayBuffer, classifier_guidance, joint_energy_loss, langevin_sample
from .sampling import (
    StepCoefficients,
    guidance,
    langevin_step,
    langevin_step_,
    posterior_sample,
    reverse_step,
    reverse_step_,
    step_coefficients,
)
from .sampling.sampler import sample
from .schedule import NoiseSchedule, add_noise, diffuse_pair, prediction_to_x0
from .score_distillation import DistillationStats, ScorePair, decoupled_dmd_loss, dmd_loss, sds_loss, vsd_loss
from .score_distillation.training import backward_simulation, fake_score_loss, renoise_times
from .sequence import (
    generalized_jsd_loss,
    linear_generalized_jsd_loss,
    linear_token_logprob,
    sequence_ddo_loss,
    token_logprob,
)
from .trajectory import FactoredCost, Trajectory, optimal_trajectory

__version__ = "0.1.0"

__all__ = [
    "ClassifierStatistics",
    "DiffusionClassifier",
    "DistillationStats",
    "FactoredCost",
    "NoiseSchedule",
    "ReplayBuffer",
    "ScoreMoments",
    "ScorePair",
    "StepCoefficients",
    "Trajectory",
    "VariationalBound",
    "add_noise",
    "analytic_trajectory",
    "approximate_r1_penalty",
    "backward_simulation",
    "build_info",
    "classifier_guidance",
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
    "generalized_jsd_loss",
    "generator_loss",
    "gradient_penalty",
    "guidance",
    "joint_energy_loss",
    "langevin_sample",
    "langevin_step",
    "langevin_step_",
    "linear_generalized_jsd_loss",
    "linear_token_logprob",
    "optimal_trajectory",
    "pix2pix_loss",
    "pixel_reverse_variance",
    "posterior_sample",
    "prediction_to_x0",
    "r1_penalty",
    "regularize_moments",
    "renoise_times",
    "reverse_step",
    "reverse_step_",
    "reverse_variance",
    "sample",
    "sds_loss",
    "sequence_ddo_loss",
    "step_coefficients",
    "token_logprob",
    "trajectory_cost",
    "use_backend",
    "variational_bound",
    "vsd_loss",
]
