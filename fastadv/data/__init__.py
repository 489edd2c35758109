"""Data sets by name, or yours: arrays, parquet files, folders of pictures."""

from fastadv._renamed import old_names
from fastadv.data.dataset import Data
from fastadv.data.judged import HeldOut, held_out
from fastadv.data.loading import load
from fastadv.data.splits import Split
from fastadv.data.trained import TrainedOn

__all__ = ["Data", "HeldOut", "Split", "TrainedOn", "held_out", "load"]

__getattr__ = old_names(__name__, {"to_float": "fastadv.to_float"})
