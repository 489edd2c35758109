"""Models by name or yours, their structure, and their weights as files."""

from fastadv.models.added import Adapter, Prompt
from fastadv.models.checkpoints import load, load_weights, save
from fastadv.models.export import export
from fastadv.models.model import Model, construct
from fastadv.models.projections import Target, lora_targets
from fastadv.models.sources import CHOICES, Source, source
from fastadv.models.structure import find_blocks, find_head, new_head

__all__ = [
    "CHOICES",
    "Adapter",
    "Model",
    "Prompt",
    "Source",
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
