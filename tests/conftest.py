"""Where the tests run: on the CPU, or with FASTGEN_TEST_DEVICE=cuda on a GPU.

On a CPU the Triton kernels run under Triton's interpreter, which has to be chosen before Triton is first imported.
"""

import os
import sys

DEVICE = os.environ.get("FASTGEN_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

from fastgen.core import dispatch

# Workers that share the cores would spend their time in each other's OpenMP barriers.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

if DEVICE == "cpu" and dispatch.missing("elbo_error", "triton", DEVICE) is None:
    import interpreter

    interpreter.correct()

# The first interpreted kernel of a process takes seconds, and machines that run tests are busy: no deadlines.
settings.register_profile(
    "fastgen", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("fastgen")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of one class run in one worker, as what they share takes minutes to make; all others anywhere."""
    from xdist.scheduler import LoadScopeScheduling

    class Classes(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            scope = nodeid.partition("[")[0].rpartition("::")[0]
            return scope if "::" in scope else nodeid

    return Classes(config, log)


def backends() -> list[str]:
    return [b for b in ("native", "triton", "reference") if dispatch.missing("elbo_error", b, DEVICE) is None]


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=backends())
def backend(request):
    """Every backend that this machine has, in turn."""
    with dispatch.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[b for b in backends() if b != "reference"])
def kernel_backend(request):
    """Every backend of our own kernels."""
    with dispatch.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _healthy_gpu():
    """After an illegal access every later call of the process fails: the worker ends, and another takes its place."""
    yield
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
