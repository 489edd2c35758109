"""What many tests share: the helpers' folders, the ops' backends and their devices, hypothesis' examples, fixtures."""

import gc
import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent))

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before the first import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from gpus import needs_gpu

# The tests, and the processes that they start, import the helpers beside the tests.
FOLDERS = [Path(__file__).resolve().parent, *sorted(p for p in Path(__file__).resolve().parent.iterdir() if p.is_dir())]
sys.path += map(str, FOLDERS[1:])
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (os.environ.get("PYTHONPATH"), *FOLDERS))))

EXAMPLES = max(1, int(os.environ.get("FASTADV_TEST_EXAMPLES", "100")))

# Every backend and its device. Only a GPU may be missing: the tests of a backend that was not built fail.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", DEVICE), id="triton"),
    pytest.param(("cuda", "cuda"), id="cuda", marks=needs_gpu),
]
NATIVE = [p for p in BACKENDS if p.id in ("cpu", "cuda")]
KERNELS = [p for p in BACKENDS if p.id != "reference"]


def pytest_generate_tests(metafunc):
    """A test that takes `backend`, `kernel` or `native` runs once for each of them."""
    for name, params in (("backend", BACKENDS), ("kernel", KERNELS), ("native", NATIVE)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, params)


def pytest_collection_finish():
    """What collecting made stays to the end: to go through it again in every collection took 15 s of each worker."""
    gc.freeze()


def pytest_configure(config):
    """Examples are fresh on every run; hypothesis prints the failing one with the seed of its numbers."""
    if config.getoption("benchmark"):
        return  # benchmarks load this file too, and need no hypothesis
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "fastadv",
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        report_multiple_bugs=False,
    )
    settings.load_profile("fastadv")


@pytest.fixture
def one_process():
    """A process group with this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
