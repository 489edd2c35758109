"""Every op x size x dtypes x backend against the naive step, the compiled naive step, and a plain copy."""

import pytest
import timing
import torch
from cases import DEVICE, OPS, SIZES, all_cases, contenders

import fastadv

CHECKED = 2  # samples that are compared with the reference, which takes seconds for a large batch

pytestmark = pytest.mark.benchmark(timer=timing.clock)


def check(case, inputs, out):
    """Check a result before the timing: all of it is written, and the first samples equal the reference's bits."""
    assert out.isfinite().all()
    with fastadv.backend("reference"):
        want = OPS[case.op].fused(*(t[:CHECKED].cpu() for t in inputs))
    assert torch.equal(out[:CHECKED].cpu(), want)


def figures(nbytes, median):
    """Ratios of the medians: to the naive step, the compiled naive step and a copy, which reads and writes a tensor."""
    rate = nbytes["fastadv"] / median["fastadv"]
    copy_rate = nbytes["copy"] / median["copy"]
    found = {
        **{f"speedup_over_{name}": median[name] / median["fastadv"] for name in ("naive", "compile") if name in median},
        "share_of_copy_rate": rate / copy_rate,
        "bytes_per_second": rate,
        "copy_bytes_per_second": copy_rate,
    }
    if "empty" in median:
        found["times_an_empty_kernel"] = median["fastadv"] / median["empty"]
    return found


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in all_cases()])
def test_op(case, measure):
    inputs, out = case.inputs(), case.output()
    nbytes = {"fastadv": case.bytes(inputs, out), "copy": 2 * out.nbytes}
    with fastadv.backend(case.backend), torch.no_grad():
        OPS[case.op].fused(*inputs, out=out)
        check(case, inputs, out)
        more = [(case.inputs(), case.output()) for _ in range(timing.input_sets(DEVICE, nbytes["fastadv"]) - 1)]
        sets = [(inputs, out), *more]
        readings = {
            name: timing.READINGS[DEVICE.type]([make(*each) for each in sets])
            for name, make in contenders(case, quick=measure.quick).items()
        }
        seconds = measure(readings, first="fastadv")
    median = timing.medians(seconds)
    measure.record(
        kind="op",
        op=case.name,
        size=case.size,
        shape=SIZES[case.size],
        dtype=case.pair,
        backend=case.backend,
        bytes=nbytes,
        median_seconds=median,
        relative_iqr=timing.spreads(seconds),
        **figures(nbytes, median),
    )
