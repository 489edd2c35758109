"""How robust a model is."""

from fastadv.evaluation.robustness import evaluate, robust_accuracy

__all__ = ["evaluate", "robust_accuracy"]
