"""Data sets by name, or yours: arrays, parquet files, folders of pictures."""

from fastadv.data.dataset import Data, to_float
from fastadv.data.loading import load

__all__ = ["Data", "load", "to_float"]
