"""The CPU kernels are compiled once for each instruction set, and all give the same bits."""

import pytest
import strategies as s
import torch
from hypothesis import given

import fastadv
from fastadv import _cpu

SETS = _cpu.facts()["instruction_sets"]


@pytest.fixture(autouse=True)
def _put_back():
    yield
    _cpu.use_isa(SETS[0])


def test_the_best_instruction_set_is_in_use_and_others_are_there():
    assert _cpu.facts()["instruction_set"] == SETS[0]
    assert SETS[-1] == "base"
    with pytest.raises(ValueError, match="v9"):
        _cpu.use_isa("v9")


@pytest.mark.parametrize("name", SETS[1:])
@pytest.mark.parametrize("op", s.OPS)
def test_same_bits_from_every_instruction_set(op, name):
    @given(s.cases(op), s.model_inputs())
    def prop(case, model_input):
        call = case.call()
        normalization, z = model_input.made(case)
        results = []
        for isa in (SETS[0], name):
            _cpu.use_isa(isa)
            out = torch.full_like(call.out, torch.nan)
            with fastadv.backend("cpu"):
                call.run(fastadv, out=out, normalization=normalization, z=z)
            results.append([torch.nan_to_num(t.double(), nan=7e77) for t in (out, z)])
        assert all(map(torch.equal, *results))

    prop()


def test_every_pixel_code_is_divided_correctly():
    x = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        want = x.to(dtype) / torch.tensor(255, dtype=dtype)
        for isa in SETS:
            _cpu.use_isa(isa)
            with fastadv.backend("cpu"):
                got = fastadv.random_init(x, 0.0, seed=0, out=torch.empty(256, dtype=dtype))
            assert torch.equal(got, want)
