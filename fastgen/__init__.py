"""Fused kernels for post-training and distilling generative models.

>>> from fastgen import ddo_loss, NoiseSchedule
"""

from . import (
    adversarial,
    analytic_dpm,
    diffusion_classifier,
    elbo,
    energy,
    policy,
    sampling,
    schedule,
    score_distillation,
    sequence,
    trajectory,
)
from .adversarial import *
from .analytic_dpm import *
from .core.dispatch import build_info, use_backend
from .diffusion_classifier import *
from .elbo import *
from .energy import *
from .policy import *
from .sampling import *
from .sampling.sampler import *
from .schedule import *
from .score_distillation import *
from .score_distillation.training import *
from .sequence import *
from .trajectory import *

__version__ = "0.2.0"

__all__ = ["build_info", "use_backend"]
__all__ += adversarial.__all__
__all__ += analytic_dpm.__all__
__all__ += diffusion_classifier.__all__
__all__ += elbo.__all__
__all__ += energy.__all__
__all__ += policy.__all__
__all__ += sampling.__all__
__all__ += sampling.sampler.__all__
__all__ += schedule.__all__
__all__ += score_distillation.__all__
__all__ += score_distillation.training.__all__
__all__ += sequence.__all__
__all__ += trajectory.__all__
