"""The compiler is loaded where something is compiled, and nowhere else."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fastadv.nn.eager import eager
from fastadv.ops import backends

LOADED = "import sys; print('torch._dynamo' in sys.modules)"


@pytest.mark.parametrize(
    "module", ["fastadv", "fastadv.attacks", "fastadv.evaluation", "fastadv.training", "fastadv.cli"]
)
def test_an_import_does_not_load_the_compiler(module):
    """It takes as long as the import of all of PyTorch."""
    found = subprocess.run(
        [sys.executable, "-c", f"import {module}; {LOADED}"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


def test_a_head_is_found_without_the_compiler():
    code = "import torch; from fastadv.models import find_head; layers = torch.nn.Flatten(), torch.nn.Linear(12, 3)"
    code += "; print(find_head(torch.nn.Sequential(*layers), None, torch.rand(1, 3, 2, 2))[0]); "
    found = subprocess.run([sys.executable, "-c", code + LOADED], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "False"]


def test_what_the_compiler_reads_is_what_its_own_decorator_sets():
    marked = torch.compiler.assume_constant_result(lambda device: "cpu")
    assert vars(marked) == vars(backends.serving)


def test_compiled_code_runs_as_it_is():
    torch._dynamo.reset()  # it compiles a layer a few times, and then no more
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    model = torch.compile(nn.Linear(3, 2), backend=backend)
    with eager():
        model(torch.rand(4, 3))
    assert not made
    model(torch.rand(4, 3))
    assert made
