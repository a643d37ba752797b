"""The public functions in plain PyTorch, with the same names and arguments: what the kernels are checked against.

They read like the papers' formulas, take any device and dtype, and are differentiated by autograd. In float64 they are
the oracle of the tests; on a machine without compiled kernels they serve as the CPU implementation.
"""

from .analytic_dpm import mean_square
from .diffusion_classifier import classify
from .elbo import ddo_loss, diffusion_dpo_loss, elbo_difference, elbo_error
from .energy import joint_energy_loss
from .sampling import StepCoefficients, guidance, langevin_step, posterior_sample, reverse_step, step_coefficients
from .schedule import add_noise, prediction_to_x0
from .score_distillation import (
    DistillationStats,
    ScorePair,
    decoupled_dmd_loss,
    dmd_loss,
    fake_score_loss,
    sds_loss,
    vsd_loss,
)
from .sequence import (
    generalized_jsd_loss,
    linear_generalized_jsd_loss,
    linear_token_logprob,
    sequence_ddo_loss,
    token_logprob,
)
from .trajectory import optimal_trajectory

__all__ = [
    "DistillationStats",
    "ScorePair",
    "StepCoefficients",
    "add_noise",
    "classify",
    "ddo_loss",
    "decoupled_dmd_loss",
    "diffusion_dpo_loss",
    "dmd_loss",
    "elbo_difference",
    "elbo_error",
    "fake_score_loss",
    "generalized_jsd_loss",
    "guidance",
    "joint_energy_loss",
    "langevin_step",
    "linear_generalized_jsd_loss",
    "linear_token_logprob",
    "mean_square",
    "optimal_trajectory",
    "posterior_sample",
    "prediction_to_x0",
    "reverse_step",
    "sds_loss",
    "sequence_ddo_loss",
    "step_coefficients",
    "token_logprob",
    "vsd_loss",
]
