"""What the package knows about modules: their normalisation, modes and flags, and the logits in any output."""

from fastadv.nn.normalized import Normalized

__all__ = ["Normalized"]
