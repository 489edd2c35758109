"""How robust a model is."""

from fastadv.evaluation.accuracy import robust_accuracy

__all__ = ["robust_accuracy"]
