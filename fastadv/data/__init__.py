"""Data sets by name, or yours: arrays, parquet files, folders of pictures."""

from fastadv.data.dataset import Data, to_float
from fastadv.data.loading import load
from fastadv.data.splits import Split
from fastadv.data.trained import TrainedOn

__all__ = ["Data", "Split", "TrainedOn", "load", "to_float"]
