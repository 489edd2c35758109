"""Measures how robust a model is."""

from fastadv.evaluation.autoattack import AutoAttack
from fastadv.evaluation.robustness import evaluate, robust_accuracy

__all__ = ["AutoAttack", "evaluate", "robust_accuracy"]
