"""Runs what is under torch.compile as it is, without loading the compiler where nothing can be compiled."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def eager() -> AbstractContextManager[object]:
    """Until the end no model runs as compiled code, such as one that is looked at by hooks.

    torch.compile loads the compiler, which takes as long as all of PyTorch; where nobody has, nothing is compiled.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
