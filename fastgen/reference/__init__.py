"""The public functions in plain PyTorch, with the same names and arguments: what the kernels are checked against.

They read like the papers' formulas, take any device and dtype, and are differentiated by autograd. In float64 they are
the oracle of the tests; on a machine without compiled kernels they serve as the CPU implementation.
"""

from ..adversarial.reference import *
from ..analytic_dpm.reference import *
from ..diffusion_classifier.reference import *
from ..elbo.reference import *
from ..energy.reference import *
from ..policy.reference import *
from ..sampling.reference import *
from ..schedule.reference import *
from ..score_distillation.reference import *
from ..score_distillation.training_reference import *
from ..sequence.reference import *
from ..trajectory.reference import *
