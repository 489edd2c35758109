"""Adversarial attacks: a model and its labels in, images out (`adv = attack(images, labels)`)."""

from fastadv._renamed import old_names
from fastadv.attacks.apgd import APGD, APGDL2
from fastadv.attacks.base import Attack
from fastadv.attacks.ensembles import ENSEMBLES, Ensemble
from fastadv.attacks.fab import FAB, FABL2
from fastadv.attacks.fgsm import FFGSM, FGSM, NFGSM
from fastadv.attacks.l2 import PGDL2
from fastadv.attacks.losses import LOSSES
from fastadv.attacks.pgd import BIM, MIFGSM, PGD, TPGD
from fastadv.attacks.pma import PMA, PMAL2
from fastadv.attacks.presets import PRESETS, create_attack
from fastadv.attacks.square import Square
from fastadv.attacks.square_l2 import SquareL2
from fastadv.attacks.zerograd import ZeroGrad
from fastadv.nn import Normalized

__all__ = [
    "APGD",
    "APGDL2",
    "BIM",
    "ENSEMBLES",
    "FAB",
    "FABL2",
    "FFGSM",
    "FGSM",
    "LOSSES",
    "MIFGSM",
    "NFGSM",
    "PGD",
    "PGDL2",
    "PMA",
    "PMAL2",
    "PRESETS",
    "TPGD",
    "Attack",
    "Ensemble",
    "Normalized",
    "Square",
    "SquareL2",
    "ZeroGrad",
    "create_attack",
]

__getattr__ = old_names(__name__, {"by_name": "fastadv.attacks.create_attack"})
