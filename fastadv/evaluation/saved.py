"""The state of a run as a file, from which it goes on where it was cut."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fastadv._extras import require
from fastadv.files import write_atomically

FORMAT = 2
_KEY = "fastadv"  # one key: safetensors writes several in random order


class StateFile:
    """Tensors and facts in a safetensors file, replaced as a whole; whatever happens, it is the old one or the new.

    Args:
        path: of the file.
        run: fingerprint of the run that it belongs to.
    """

    def __init__(self, path: str | Path, run: str):
        self.path, self.run = Path(path), run

    def load(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """What was saved last; None where there is no file.

        Raises:
            ValueError: it is no such file, or one of another run.
        """
        if not self.path.exists():
            return None
        safetensors = require("safetensors")
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path} is no state file of an evaluation: {error}") from error
        if (facts.get("format"), facts.get("run")) != (FORMAT, self.run):
            raise ValueError(
                f"{self.path} is the state of another run: other settings, data or weights. Choose another path, or "
                "remove it to begin again"
            )
        return tensors, facts

    def save(self, tensors: Mapping[str, torch.Tensor], facts: Mapping) -> None:
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        metadata = {_KEY: json.dumps({"format": FORMAT, "run": self.run, **facts})}
        write_atomically(self.path, require("safetensors.torch").save(tensors, metadata))


def fingerprint(settings: Mapping, data: Sequence[torch.Tensor], model: Callable) -> str:
    """A hash of what an evaluation's result depends on. Of a model that is not an nn.Module only the type is known."""
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    weights = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    known = {
        "settings": settings,
        "model": repr(model) if isinstance(model, nn.Module) else type(model).__qualname__,
        "tensors": [(name, str(t.dtype), list(t.shape)) for name, t in [*enumerate(data), *weights.items()]],
    }
    digest = hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16)
    for t in (*data, *weights.values()):
        digest.update(t.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
