"""Adversarial fine-tuning, and its parts for a loop of your own."""

from fastadv._renamed import old_names
from fastadv.training.augment import Augment
from fastadv.training.backbone import backbone_robustness
from fastadv.training.methods import trainable
from fastadv.training.monitor import Monitor
from fastadv.training.settings import Settings
from fastadv.training.signs import pack_signs, unpack_signs
from fastadv.training.step import TrainStep
from fastadv.training.trainer import Trainer

__all__ = [
    "Augment",
    "Monitor",
    "Settings",
    "TrainStep",
    "Trainer",
    "backbone_robustness",
    "pack_signs",
    "trainable",
    "unpack_signs",
]

__getattr__ = old_names(__name__, {"Step": "fastadv.training.TrainStep"})
