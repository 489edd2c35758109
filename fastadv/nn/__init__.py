"""Tools for any nn.Module: normalisation, train and eval modes, and the logits in a model's output."""

from fastadv.nn.normalized import Normalized

__all__ = ["Normalized"]
