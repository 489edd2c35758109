"""What went wrong with a command, in words that say what to do."""

import argparse
import errno
import re
from pathlib import Path

import torch

from fastadv.study.files import GRID

# Errors that say what was wrong with the request. Others are faults of the program: their traceback is shown.
EXPECTED = (ArithmeticError, ImportError, OSError, TypeError, ValueError, torch.AcceleratorError)
FULL = (errno.ENOSPC, errno.EDQUOT)
MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")  # PyTorch's words


def words_of(error: BaseException, arguments: argparse.Namespace) -> str | None:
    """The text to print about an error of a command; None where only a traceback helps.

    Args:
        error: of the command.
        arguments: of the command.
    """
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted: {how_to_go_on(arguments) or 'nothing is kept of it'}"
    if is_out_of_memory(error):
        return f"out of memory{lighter(arguments)}. {_first_line(error)}"
    if not isinstance(error, EXPECTED):
        return None
    words = re.sub(r"^\[Errno \d+\] ", "", str(error)) or type(error).__name__
    if isinstance(error, OSError) and error.errno in FULL:
        on = how_to_go_on(arguments)
        words += ": make room" + (f", then {on}" if on else " and begin again")
    return words


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is lacking, on the host or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MEMORY)


def lighter(arguments: argparse.Namespace) -> str:
    """How much goes through the model at once, and how to make it less."""
    if hasattr(arguments, "grad_accum_steps"):
        parts = arguments.grad_accum_steps
        return (
            f" with --batch-size {arguments.batch_size} in {parts} part{'s' * (parts > 1)}: take a smaller "
            f"--batch-size, or --grad-accum-steps {2 * parts}, which learns the same from smaller parts (but "
            "for batch-norm), and another --out; on a GPU --precision bf16 too"
        )
    if getattr(arguments, "batch_size", None):
        return f" with --batch-size {arguments.batch_size}: take a smaller --batch-size"
    return ": take fewer or smaller pictures, or a machine with more of it"


def how_to_go_on(arguments: argparse.Namespace) -> str | None:
    """How to go on from the state on the disk; None where there is none."""
    out: Path | None = getattr(arguments, "out", None)
    if out is None:
        return None
    if hasattr(arguments, "grid") and Path(out, GRID).exists():
        return f"go on with the same command, from {out}"
    if hasattr(arguments, "resume") and any(Path(out, "state").glob("*.json")):
        again = "" if arguments.resume else " and --resume"
        return f"go on with the same command{again}, from the state in {Path(out, 'state')}"
    if hasattr(arguments, "iterate") and Path(out, "state.safetensors").exists():
        return f"go on with the same command, from {Path(out, 'state.safetensors')}"
    return None


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return line.partition("DefaultCPUAllocator: ")[2] or line
