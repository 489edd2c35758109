"""The CUDA kernels and their launcher, compiled for the CPU, equal the reference bit for bit on whole random calls.

This tests every index, access, table row and formula, but no instruction of a GPU. test_contract.py runs the same cases
on a GPU.
"""

import ctypes
import importlib.util
import itertools
import subprocess
import sys
import sysconfig
from pathlib import Path

import oracle
import pybind11
import pytest
import strategies as s
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastadv
from fastadv.ops import backends

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-w", "-fvisibility=hidden"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
BACKEND = ["-DFASTADV_BACKEND=cuda", "-DFASTADV_KEY=CPU", '-DFASTADV_NVCC="none"', '-DFASTADV_ARCHS="emulated"']


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    """The CUDA library as an extension for CPU tensors; in this module it is the backend `cuda`."""
    folder = tmp_path_factory.mktemp("emulated")
    torch_dir = Path(torch.__file__).parent
    include = [
        pybind11.get_include(),
        torch_dir / "include",
        sysconfig.get_path("include"),
        ROOT / "tests/ops/emulated_cuda",
    ]
    flags = [*FLAGS, *STABLE_ABI, *BACKEND, *(f"-I{path}" for path in include)]
    sources = ["library.cpp", "cuda/facts.cpp", "cuda/ops.cu"]
    jobs = [
        subprocess.Popen(["c++", *flags, "-x", "c++", "-c", ROOT / "csrc" / source, "-o", folder / f"{i}.o"])
        for i, source in enumerate(sources)
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    objects = [folder / f"{i}.o" for i in range(len(sources))]
    library = folder / "_cuda.so"
    subprocess.run(["c++", "-shared", "-o", library, *objects, f"-L{torch_dir / 'lib'}", "-ltorch_cpu"], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    why_not = backends.why_not
    backends.why_not = lambda name, device: "" if name == "cuda" else why_not(name, device)
    yield module
    backends.why_not = why_not
    backends._resolve_device.cache_clear()
    sys.modules.pop("_cuda", None)


def check(case, emulated, model_input=None):
    call, more = case.call(), {}
    if model_input is not None:
        more["normalization"], more["z"] = model_input.made(case)
    written = [call.out, more["z"]] if more else [call.out]
    with fastadv.backend("reference"):
        call.run(fastadv, out=call.out, **more)
    wanted, before = [oracle.values(t) for t in written], emulated.calls()
    for t in written:
        t.fill_(torch.nan)
    with fastadv.backend("cuda"):
        call.run(fastadv, out=call.out, **more)
    for t, want in zip(written, wanted, strict=True):
        got = oracle.values(t)
        assert oracle.same(got, want), oracle.mismatch(got, want)
    assert emulated.calls() == before + 1


@pytest.mark.parametrize("model_input", [st.none(), s.model_inputs()], ids=["alone", "with_z"])
@pytest.mark.parametrize("op", s.OPS)
def test_any_call(op, model_input, emulated):
    @given(s.cases(op), model_input)
    def prop(case, model_input):
        check(case, emulated, model_input)

    prop()


FLAT = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32), (torch.uint8, torch.float16)]  # fmt: skip


@pytest.mark.parametrize(("x_type", "grad_type"), FLAT, ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (5, 1001), (3, 2, 8)], ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["one_seed", "seeds"])
def test_the_fast_path(x_type, grad_type, shape, per_sample):
    """Dense, aligned tensors and parameters that are numbers, the usual call; with whole and partial groups."""
    x = (torch.rand(shape) * 256).to(torch.uint8) if x_type == torch.uint8 else torch.rand(shape).to(x_type)
    grad = torch.randn(shape).to(grad_type)
    grad.view(-1)[::7] = 0
    grad.view(-1)[3] = torch.nan
    seed = torch.randint(-(2**63), 2**63 - 1, (shape[0],)) if per_sample else 2**63 + 5
    noise = {"noise": 8 / 255, "seed": seed}
    x_adv = fastadv.random_init(x, 0.02, seed=1)
    runs = {
        "init": lambda **z: fastadv.random_init(x, 8 / 255, seed=seed, **z),
        "fgsm": lambda **z: fastadv.fgsm_step(x, grad, 8 / 255, **z),
        "free": lambda **z: fastadv.fgsm_step(x, grad, 8 / 255, project=False, **z),
        "rs": lambda **z: fastadv.fgsm_step(x, grad, 8 / 255, alpha=10 / 255, **noise, **z),
        "nfgsm": lambda **z: fastadv.fgsm_step(x, grad, 8 / 255, project=False, **noise, **z),
        "pgd": lambda **z: fastadv.pgd_step(x_adv, grad, x, alpha=2 / 255, eps=4 / 255, clip=(0.1, 0.9), **z),
    }
    one = fastadv.Normalization(0.5, 0.25)
    each = fastadv.Normalization(torch.rand(shape[1]).tolist(), torch.rand(shape[1]).add(0.1).tolist())
    for name, run in runs.items():
        with fastadv.backend("reference"):
            want = run()
        with fastadv.backend("cuda"):
            got = run()
            assert torch.equal(torch.nan_to_num(got, nan=9), torch.nan_to_num(want, nan=9)), name
            for normalization, z_type in itertools.product((one, each), s.FLOATS):
                z = torch.full(shape, torch.nan, dtype=z_type)
                assert torch.equal(run(normalization=normalization, z=z), got)
                assert torch.equal(z, normalization(got, z_type)), (name, normalization, z_type)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_of_16_bits(dtype, emulated):
    for call in s.calls_on_every_16_bit_value(dtype):
        with fastadv.backend("reference"):
            want = call()
        with fastadv.backend("cuda"):
            assert torch.equal(call(), want), call


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 5, 5), (3, 11, 3, 3), (2, 1, 4, 4), (1, 40, 3, 1)], ids=str)
def test_the_channels_of_the_fast_path(shape):
    """A channel may begin and end anywhere in a group of eight; in both layouts, with one seed and with one each."""
    normalization = fastadv.Normalization(torch.rand(shape[1]).tolist(), torch.rand(shape[1]).add(0.1).tolist())
    for memory_format, seed in itertools.product(
        (torch.contiguous_format, torch.channels_last), (1, torch.arange(shape[0]))
    ):
        x = torch.rand(shape).contiguous(memory_format=memory_format)
        z = torch.full_like(x, torch.nan)
        with fastadv.backend("cuda"):
            w = fastadv.random_init(x, 0.1, seed=seed, normalization=normalization, z=z)
        assert torch.equal(z, normalization(w))


def test_the_generator():
    for first in (0, 2**32 - 3, 2**40, 2**61):
        words = [fastadv.ops.philox_words(name, 12345, first, 9) for name in ("reference", "cuda")]
        assert torch.equal(*words)


def test_more_samples_than_the_grid_has_rows():
    """The second dimension of a grid has at most 65,535 blocks, so the kernels loop over samples."""
    x = torch.rand(65_600, 3)
    seeds = fastadv.sample_seeds(1, torch.arange(len(x)))
    with fastadv.backend("cpu"):
        want = fastadv.random_init(x, 0.1, seed=seeds)
    with fastadv.backend("cuda"):
        assert torch.equal(fastadv.random_init(x, 0.1, seed=seeds), want)


def left_by_c(name):
    """An environment variable that the emulated runtime has set: Python's os.environ does not see it."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return getenv(name)


def test_only_kernels_that_wait_are_launched_before_their_predecessor_has_ended(monkeypatch):
    """The architecture of the code decides, 8.0 on the first device and 9.0 on the second, not the device's."""
    monkeypatch.setenv("FASTADV_EMULATED_PTX", "80,90")
    x, found = torch.rand(2, 3, 8, 8), []
    calls = {
        "flat": lambda: fastadv.random_init(x, 0.1, seed=1),
        "any": lambda: fastadv.random_init(x[..., 1:], 0.1, seed=1),  # this kernel never waits
    }
    for name, device in itertools.product(calls, "01"):
        monkeypatch.setenv("FASTADV_EMULATED_DEVICE", device)
        with fastadv.backend("cuda"):
            calls[name]()
        found.append((name, device, left_by_c(b"FASTADV_EMULATED_ATTRIBUTES")))
    assert found == [("flat", "0", b"0"), ("flat", "1", b"1"), ("any", "0", b"0"), ("any", "1", b"0")]


def test_a_failed_launch_raises_and_leaves_no_error_behind(monkeypatch):
    monkeypatch.setenv("FASTADV_EMULATED_ERROR", "209")
    with fastadv.backend("cuda"), pytest.raises(RuntimeError, match="fastadv: launch"):
        fastadv.random_init(torch.rand(2, 3, 8, 8), 0.1, seed=1)
    assert left_by_c(b"FASTADV_EMULATED_LAST") == b"0"
