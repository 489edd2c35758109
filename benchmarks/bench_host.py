"""Measures the host's time of one call: on 16 elements the arithmetic takes no time."""

import time

import pytest
import timing
import torch
from cases import DEVICE, OPS, Case, contenders

pytestmark = pytest.mark.benchmark(timer=timing.clock)

CALLS = 100  # with nine launches each at most: a GPU queues about a thousand launches before the host has to wait


def reading(call):
    def read():
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        seconds = time.perf_counter() - start
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return seconds / CALLS

    return read


@pytest.mark.parametrize("op", OPS)
def test_host_cost(op, measure):
    case = Case(op, "16", "f32/f32", DEVICE.type)
    inputs, out = case.inputs(), case.output()
    made = contenders(case, quick=True)
    calls = {name: made[name](inputs, out) for name in ("fastadv", "naive")}
    calls["allocating"] = lambda: OPS[op].fused(*inputs)
    with torch.no_grad():
        for call in calls.values():
            call()
        seconds = measure({name: reading(call) for name, call in calls.items()}, first="fastadv")
    median = timing.medians(seconds)
    measure.record(
        kind="host",
        op=op,
        size="16",
        dtype=case.pair,
        backend=DEVICE.type,
        median_seconds=median,
        relative_iqr=timing.spreads(seconds),
        share_of_naive=median["fastadv"] / median["naive"],
    )
