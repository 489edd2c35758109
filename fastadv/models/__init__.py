"""Models by name or yours, their structure, and their weights as files."""

from fastadv._renamed import old_names
from fastadv.models.added import Adapter, Prompt
from fastadv.models.checkpoints import load, load_weights, save
from fastadv.models.export import export
from fastadv.models.model import Model, construct
from fastadv.models.projections import Target, lora_targets
from fastadv.models.sources import CHOICES, ModelSource, source
from fastadv.models.structure import find_blocks, find_head, new_head

__all__ = [
    "CHOICES",
    "Adapter",
    "Model",
    "ModelSource",
    "Prompt",
    "Target",
    "construct",
    "export",
    "find_blocks",
    "find_head",
    "load",
    "load_weights",
    "lora_targets",
    "new_head",
    "save",
    "source",
]

__getattr__ = old_names(__name__, {"Source": "fastadv.models.ModelSource"})
