"""What the Triton launchers compile for a GPU, read from the machine code: no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHS = (80, 90, 100)


@pytest.fixture(scope="module")
def compiled():
    """One process for all: this one has Triton's interpreter switched on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "aot_triton.py"
    run = subprocess.run([sys.executable, script, *map(str, ARCHS)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_launch_compiles_without_spills_and_fused_operations(compiled, arch):
    kernels = [k for k in compiled if k["arch"] == f"sm_{arch}"]
    assert len({k["case"] for k in kernels}) == len(kernels) >= 55
    assert {k["kernel"] for k in kernels} == {"flat_kernel", "any_kernel"}
    assert [k for k in kernels if k["spilled_bytes"] or k["fused"]] == []


def test_flat_kernels_move_128_bits_at_a_time(compiled):
    for k in compiled:
        if k["kernel"] != "flat_kernel":
            continue
        # A seed is one number; eight uint8 are 64 bits, and so many belong to eight of anything else.
        narrow = set(k["narrow"]) - {"ld.global.b64"} - ({"ld.global.v2.b32"} if "uint8" in k["case"] else set())
        if " z " in k["case"]:
            narrow -= {"ld.global.b32"}  # the mean and scale of an element's channel
        assert not narrow, k
        assert k["wide_accesses"] >= 2, k
