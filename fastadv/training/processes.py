"""Of accelerate what a run needs: which of how many processes this is, on which device, in which precision.

Without an `Accelerator`, all of which share one state: it would change the caller's own, such as its gradient
accumulation, and would keep a later one from choosing another precision.
"""

import os
from typing import TYPE_CHECKING

import torch

from fastadv._extras import require

if TYPE_CHECKING:
    from accelerate import PartialState


def processes() -> "PartialState":
    """This process and the others of its run."""
    # Told to choose for itself, accelerate takes processes without an accelerator for as many separate runs.
    asked = require("accelerate.utils").parse_flag_from_env("ACCELERATE_USE_CPU")
    return require("accelerate").PartialState(cpu=asked or not torch.accelerator.is_available())


def precision() -> str:
    """What the caller's own `Accelerator` says, or `accelerate launch`."""
    state = require("accelerate.state")
    if state.is_initialized():
        return state.AcceleratorState().mixed_precision
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
