"""Score distillation: SDS, VSD, DMD, DMD2 and Decoupled DMD.

Every method is a gradient field G on the generator's output x. Here G is computed in float32 from the networks' raw
outputs and handed to autograd as x's gradient. The usual pseudo-target ``½ MSE(x, (x - G).detach())`` has the same
gradient in exact arithmetic, but in bfloat16 ``x - (x - G)`` loses a quarter of a G that is 0.003 of x. The operators
are in ``operators.py``.
"""

from .decoupled_dmd import decoupled_dmd_loss
from .dmd import dmd_loss
from .reference import DistillationStats, ScorePair
from .sds import sds_loss, vsd_loss

__all__ = ["DistillationStats", "ScorePair", "decoupled_dmd_loss", "dmd_loss", "sds_loss", "vsd_loss"]
