"""The public functions in plain PyTorch, with the same names and arguments: what the kernels are checked against.

They read like the papers' formulas, take any device and dtype, and are differentiated by autograd. In float64 they are
the oracle of the tests; on a machine without compiled kernels they serve as the CPU implementation.
"""

from ..adversarial.reference import (
    approximate_r1_penalty,
    clip_weights_,
    discriminator_loss,
    feature_distance,
    generator_loss,
    gradient_penalty,
    input_gradient,
    pix2pix_loss,
    r1_penalty,
)
from ..analytic_dpm.reference import mean_square
from ..diffusion_classifier.reference import classify
from ..elbo.reference import ddo_loss, diffusion_dpo_loss, elbo_difference, elbo_error
from ..energy.reference import joint_energy_loss
from ..sampling.reference import (
    StepCoefficients,
    guidance,
    langevin_step,
    posterior_sample,
    reverse_step,
    step_coefficients,
)
from ..schedule.reference import add_noise, diffuse_pair, noise_pair, prediction_to_x0
from ..score_distillation.reference import (
    DistillationStats,
    ScorePair,
    decoupled_dmd_loss,
    dmd_loss,
    sds_loss,
    vsd_loss,
)
from ..score_distillation.training_reference import fake_score_loss
from ..sequence.reference import (
    generalized_jsd_loss,
    linear_generalized_jsd_loss,
    linear_token_logprob,
    sequence_ddo_loss,
    token_logprob,
)
from ..trajectory.reference import optimal_trajectory

__all__ = [
    "DistillationStats",
    "ScorePair",
    "StepCoefficients",
    "add_noise",
    "approximate_r1_penalty",
    "classify",
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
    "input_gradient",
    "joint_energy_loss",
    "langevin_step",
    "linear_generalized_jsd_loss",
    "linear_token_logprob",
    "mean_square",
    "noise_pair",
    "optimal_trajectory",
    "pix2pix_loss",
    "posterior_sample",
    "prediction_to_x0",
    "r1_penalty",
    "reverse_step",
    "sds_loss",
    "sequence_ddo_loss",
    "step_coefficients",
    "token_logprob",
    "vsd_loss",
]
