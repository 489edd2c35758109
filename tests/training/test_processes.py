"""A run follows accelerate's settings, or refuses them by name."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastadv.team import Team
from fastadv.training import Trainer
from fastadv.training.processes import processes
from fastadv.training.replicas import share_weights


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP .*whole model in each process"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "DeepSpeed .*whole model in each process"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM .*whole model in each process"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config .*whole model in each process"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo backend inductor .*ask for compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "4 steps of gradient accumulation .*ask for grad_accum_steps"),
    ],
)
def test_what_a_run_would_not_heed_is_refused_by_name(monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    before = network[1].weight.clone()
    with pytest.raises(ValueError, match=f"accelerate is set to .*{words}"):
        Trainer(network, 8 / 255, epochs=1, batch_size=4).fit((torch.rand(12, 3, 4, 4), torch.arange(12) % 3))
    assert torch.equal(network[1].weight, before)
    monkeypatch.setenv(variable, {"INDUCTOR": "no", "4": "1"}.get(value, "false"))  # the value of `accelerate launch`
    assert processes().num_processes == 1


def test_fsdp_of_the_callers_own_accelerator_is_refused(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    processes()
    monkeypatch.setitem(accelerate.PartialState._shared_state, "distributed_type", accelerate.DistributedType.FSDP)
    with pytest.raises(ValueError, match="accelerate is set to FSDP"):
        processes()


def test_a_process_that_trains_alone_in_a_group_is_told_and_its_group_ends_with_it():
    """accelerate does not know the group, as after torch.multiprocessing.spawn without torchrun's variables."""
    program = """
import sys, torch, warnings
from torch import nn, distributed
from fastadv.training import Trainer
store = distributed.HashStore()
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
distributed.get_world_size = lambda: 2
model, images = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), torch.rand(12, 3, 4, 4)
data = (images, torch.arange(12) % 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    Trainer(model, 8 / 255, epochs=1, batch_size=4, probe=0, progress=False, device="cpu").fit(data)
print(*(each.message for each in caught))
destroy = distributed.destroy_process_group
distributed.destroy_process_group = lambda: (destroy(), print("ended"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warning, end = done.stdout.splitlines()
    assert warning.startswith("there is a process group of 2, and this process trains alone")
    assert end == "ended"


class OneOfMany(Team):
    """A process that takes its group of one for a larger one."""

    alone = False


@pytest.mark.parametrize("dtype", [torch.int16, torch.float8_e4m3fn], ids=str)
def test_a_buffer_that_cannot_be_sent_is_named(one_process, dtype):
    model = nn.Linear(2, 2)
    share_weights(model, OneOfMany())
    model.register_buffer("table", torch.ones(3).to(dtype))
    with pytest.raises(ValueError, match=rf"table \({dtype}, .*cannot be copied from one process to another"):
        share_weights(model, OneOfMany())


def test_a_sharded_model_is_refused(one_process):
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ValueError, match=r"weight is a DTensor, .*before it is sharded"):
        share_weights(fully_shard(nn.Linear(2, 2), mesh=mesh), OneOfMany())
