"""Asks accelerate about the processes of a run: their number, this one's rank, its device and its precision.

No `Accelerator` is made: all of them share one state. A new one would change the caller's own, such as its gradient
accumulation, and a later one could not choose another precision.
"""

import atexit
import gc
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed

from fastadv._extras import require
from fastadv._warnings import warn
from fastadv.locks import held
from fastadv.team import Team

if TYPE_CHECKING:
    from accelerate import PartialState

Made = TypeVar("Made")

# Ways to train of accelerate that a run does not support: (environment variable, DistributedType, name).
SHARDED = (
    ("ACCELERATE_USE_FSDP", "FSDP", "FSDP"),
    ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED", "DeepSpeed"),
    ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM", "Megatron-LM"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", None, "accelerate's parallelism_config"),
)


def processes() -> "PartialState":
    """This process and the others of its run.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: accelerate is set to something that a run does not support: FSDP, DeepSpeed, Megatron-LM, a
            parallelism_config, a dynamo backend, or gradient accumulation.
    """
    _check_settings()
    # If accelerate chooses the device itself, several processes without a GPU become as many separate runs.
    asked = require("accelerate.utils").parse_flag_from_env("ACCELERATE_USE_CPU")
    here = require("accelerate").PartialState(cpu=asked or not torch.accelerator.is_available())
    if not (distributed.is_available() and distributed.is_initialized()):
        return here
    atexit.unregister(_end)  # it runs once, before all functions that were registered earlier
    atexit.register(_end)
    if here.num_processes < distributed.get_world_size():
        warn(
            f"there is a process group of {distributed.get_world_size()}, and this process trains alone: accelerate "
            "knows of it by the variables RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, which torchrun and "
            "accelerate launch set"
        )
    return here


def team_of(here: "PartialState") -> Team:
    """The processes of the run as a `Team`, which passes values between them."""
    return Team(here.process_index, here.num_processes)


@contextmanager
def one_run(folder: Path, team: Team) -> Iterator[None]:
    """Lock the first process's `folder` against other runs. At the end all processes wait for each other.

    Args:
        folder: the folder of the run.
        team: the processes of the run; all of them enter and leave together.

    Raises:
        InUseError: another run has the folder; all processes raise it.
    """
    with ExitStack() as stack:
        lock = held(folder / "run", f"the run in {folder}")
        team.from_first(lambda: stack.enter_context(lock))
        yield
        team.wait()


def of_first(team: Team, make: Callable[[], Made]) -> Made:
    """The object that `make` returns in the first process, in all processes.

    So the files that `make` reads need not be on the other machines' disks. An object that cannot be pickled, such as a
    model whose class is inside a function, is made in each process.

    Args:
        team: the processes of the run; all of them call this together.
        make: makes the object.
    """
    made = None

    def sent() -> bytes | None:
        nonlocal made
        made = make()
        try:
            return None if team.alone else pickle.dumps(made)
        except Exception:  # a class may raise anything when it is pickled
            return None

    content = team.from_first(sent)
    if content is None:
        return team.by_all(lambda: make() if made is None else made)
    return made if made is not None else pickle.loads(content)


def precision() -> str:
    """The mixed precision of the caller's own `Accelerator`, or of `accelerate launch`: "no", "bf16", "fp16", ..."""
    state = require("accelerate.state")
    if state.is_initialized():
        said: str = state.AcceleratorState().mixed_precision
        return said
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def _check_settings() -> None:
    is_set = require("accelerate.utils").parse_flag_from_env
    kind = require("accelerate.state").PartialState._shared_state.get("distributed_type")
    for variable, called, name in SHARDED:
        if is_set(variable) or (called and getattr(kind, "value", None) == called):
            raise ValueError(
                f"accelerate is set to {name} ({variable}), and fastadv trains with a whole model in each process: "
                "take a configuration without it, such as accelerate launch --multi_gpu, or torchrun"
            )
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        raise ValueError(
            f"accelerate is set to the dynamo backend {dynamo.lower()} (ACCELERATE_DYNAMO_BACKEND), which fastadv does "
            "not read: take it out, and ask for compile (--compile)"
        )
    parts = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if parts not in ("1", "auto"):
        raise ValueError(
            f"accelerate is set to {parts} steps of gradient accumulation (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), "
            "which fastadv does not read: take it out, and ask for grad_accum_steps (--grad-accum-steps), parts of a "
            "batch"
        )


def _end() -> None:
    """End the process group before the interpreter ends. Its threads would else abort a run that has finished.

    In a run without errors all processes have waited for each other by now. After an error, NCCL would wait here for
    processes that do not come, so then the group is left alone.
    """
    failed = hasattr(sys, "last_value")
    if distributed.is_initialized() and not (failed and "nccl" in distributed.get_backend()):
        gc.collect()  # frees a DistributedDataParallel in a reference cycle, which keeps the group's threads alive
        distributed.destroy_process_group()
