"""Adversarial attacks: a model and its labels in, images out (`adv = attack(images, labels)`)."""

from fastadv.attacks.base import Attack
from fastadv.attacks.fgsm import FGSM, NFGSM
from fastadv.attacks.pgd import PGD
from fastadv.attacks.presets import PRESETS, by_name

__all__ = ["FGSM", "NFGSM", "PGD", "PRESETS", "Attack", "by_name"]
