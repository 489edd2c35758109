"""torch ops, one file per backend; `schemas.py` says what they are, `backends.py` which one runs."""

from fastadv.ops.backends import backend
from fastadv.ops.generator import new_seed, philox_words, sample_seeds

__all__ = ["backend", "new_seed", "philox_words", "sample_seeds"]
