"""Adversarial fine-tuning."""

from fastadv.training.trainer import Trainer

__all__ = ["Trainer"]
