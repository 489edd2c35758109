"""The state file of an evaluation, from which a cut run is resumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastadv._extras import require
from fastadv.evaluation.identity import differences
from fastadv.files import check_format, write_atomically

FORMAT = 5
_KEY = "fastadv"  # a single key, because safetensors writes several in random order


class StateFile:
    """Tensors and facts in a safetensors file. It is replaced as a whole, and is never half written.

    Args:
        path: the file.
        run: the `fingerprint` of the run that the state belongs to.
    """

    def __init__(self, path: str | Path, run: str):
        self.path, self.run = Path(path), run

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The tensors and facts that were saved last; None where there is no file.

        Raises:
            FormatError: another version of fastadv wrote the file.
            ImportError: safetensors is not installed.
            ValueError: the file is no state of an evaluation, or the state of another run.
        """
        if not self.path.exists():
            return None
        safetensors = require("safetensors")
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:  # a folder is an OSError
            raise ValueError(f"{self.path} is no state file of an evaluation: {error}") from error
        if not isinstance(facts, dict) or "format" not in facts:
            raise ValueError(f"{self.path} is no state file of an evaluation: give another path")
        check_format(f"the state {self.path}", facts["format"], FORMAT)
        if not isinstance(facts.get("run"), str):
            raise ValueError(f"{self.path} is a damaged state of an evaluation: remove it to begin again")
        if facts["run"] != self.run:
            raise ValueError(
                f"{self.path} is the state of another run, which differs in {differences(self.run, facts['run'])}. "
                "Choose another path, or remove it to begin again"
            )
        return tensors, facts

    def save(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the file.

        Args:
            tensors: {name: tensor}, on any device.
            facts: everything else; JSON must be able to hold it.

        Raises:
            OSError: the file cannot be written; the old one stays.
        """
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        metadata = {_KEY: json.dumps({"format": FORMAT, "run": self.run, **facts})}
        write_atomically(self.path, require("safetensors.torch").save(tensors, metadata))
