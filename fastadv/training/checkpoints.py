"""The checkpoints of a training run, from which a cut run is resumed."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from fastadv._extras import require
from fastadv._renamed import by_new_names
from fastadv._warnings import warn
from fastadv.evaluation.identity import differences, fingerprint
from fastadv.files import FormatError, check_format, write_atomically
from fastadv.training.finite import nonfinite_groups
from fastadv.training.settings import RENAMED

FORMAT, OLDEST = 3, 2  # format 2 has old names of settings
KEPT = 2  # so many checkpoints with different weights are kept

# Only files with names like these are read, replaced or removed.
_MANIFEST = re.compile(r"\d{8,}\.json")
_TENSORS = re.compile(r"[0-9a-f]{64}\.safetensors")

Groups = dict[str, dict[str, torch.Tensor]]
Facts = dict[str, Any]  # for JSON
OF_THE_MODEL = ("the model's weights", "the model")  # parts of a run's fingerprint


class Checkpoints:
    """Groups of tensors, and facts in JSON, in a folder. The last two checkpoints with different weights are kept.

    The tensors of a group are in a safetensors file whose name is its hash. So weights that are the newest, the best
    and the last good ones at the same time are written once. A checkpoint is a JSON file that names these files:

        00000042.json                    "weights": "5e0c....safetensors", "best": "5e0c....safetensors", ...
        5e0c....safetensors

    The JSON file is written last, and gets its name when it is complete. A run that is killed before that still has the
    previous checkpoint. Nothing is pickled.

    Args:
        folder: the folder; it is made by the first `save`.
        run: the `fingerprint` of the run that the checkpoints belong to.
        defaults: the defaults of settings; an older state may lack some of them.
        masks: the names of the tensors that may have infinite numbers or NaN.
    """

    def __init__(
        self, folder: str | Path, run: str, defaults: Mapping[str, object] | None = None, masks: Collection[str] = ()
    ):
        self.folder, self.run, self.defaults, self.masks = Path(folder), run, defaults or {}, masks
        self._number = 0
        self._files: dict[str, str] = {}
        self._damaged: set[str] = set()  # names of files that are removed after the next `save`

    def exist(self) -> bool:
        """Whether there is a checkpoint."""
        return bool(self._manifests())

    def save(self, groups: Mapping[str, Mapping[str, torch.Tensor] | None], facts: Facts) -> None:
        """Write a checkpoint.

        Args:
            groups: {group: {name: tensor}}; {group: None} means that the group is the same as in the last checkpoint.
            facts: everything else that a run needs to resume; JSON must be able to hold it.

        Raises:
            OSError: the checkpoint cannot be written, as on a full disk; earlier ones can still be loaded.
        """
        files = {name: self._files[name] if part is None else self._write(part) for name, part in groups.items()}
        body = json.dumps({"format": FORMAT, "run": self.run, "files": files, "facts": facts})
        content = f"{_hash(body.encode())}\n{body}\n".encode()
        write_atomically(self.folder / f"{self._number + 1:08}.json", content)
        self._number, self._files = self._number + 1, files
        self._clean()

    def load(self) -> tuple[Groups, Facts] | None:
        """The groups and facts of the newest checkpoint that is complete and finite; None where there is no checkpoint.

        A newer checkpoint that is damaged is passed over with a warning.

        Raises:
            FormatError: another version of fastadv wrote the checkpoints.
            OSError: a file cannot be read. It may be sound, so no older checkpoint is taken in its place.
            OtherRunError: the checkpoints belong to another run.
            ValueError: all checkpoints are damaged.
        """
        safetensors = require("safetensors")
        damaged: dict[Path, str] = {}
        for manifest in reversed(self._manifests()):
            self._number = max(self._number, int(manifest.stem))
            try:
                body = self._checked(manifest)
                groups = {name: self._read(file) for name, file in body["files"].items()}
                if found := nonfinite_groups(groups, self.masks):
                    raise ValueError(f"numbers in {', '.join(found[:3])} are not finite")
            except (OtherRunError, FormatError):
                raise
            except (FileNotFoundError, ValueError, safetensors.SafetensorError) as error:
                damaged[manifest] = f"{manifest} is damaged: {error}"
                continue
            if damaged:
                warn(f"{'; '.join(damaged.values())}. Going on from the one before")
            self._files = body["files"]
            self._damaged |= {path.name for path in damaged}
            return groups, body["facts"]
        if damaged:
            raise ValueError(f"no checkpoint can be loaded: {'; '.join(damaged.values())}. To begin again, remove it")
        return None

    def _manifests(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.json") if _MANIFEST.fullmatch(path.name))

    def _write(self, tensors: Mapping[str, torch.Tensor]) -> str:
        if sparse := [name for name, t in tensors.items() if t.layout != torch.strided]:
            raise ValueError(
                f"a checkpoint keeps no sparse tensors, such as {', '.join(sparse)}: make them dense, or train without "
                "a folder"
            )
        # One that shares memory with another is copied: a file has each on its own.
        held: dict[str, torch.Tensor] = {}
        memories: set[int] = set()
        for name, tensor in tensors.items():
            t = tensor.detach().cpu().contiguous()
            memory = t.untyped_storage().data_ptr()
            held[name] = t.clone() if memory in memories else t
            memories.add(memory)
        content = require("safetensors.torch").save(held)
        path = self.folder / f"{_hash(content)}.safetensors"
        if path.name in self._damaged or path.is_symlink() or not path.exists():
            write_atomically(path, content)
            self._damaged.discard(path.name)
        return path.name

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        path = self.folder / name
        content = path.read_bytes()
        if _hash(content) != path.stem:
            self._damaged.add(name)
            raise ValueError(f"{name} has other content than was written")
        tensors: dict[str, torch.Tensor] = require("safetensors.torch").load(content)
        return tensors

    def _checked(self, manifest: Path) -> Facts:
        digest, _, body = manifest.read_text().rstrip("\n").partition("\n")
        if _hash(body.encode()) != digest:
            raise ValueError("it has other content than was written")
        if manifest.is_symlink():
            raise ValueError("it is a link to another place")
        facts = json.loads(body)
        if not isinstance(facts, dict) or "format" not in facts:
            raise ValueError("it is no manifest")
        files = facts.get("files")  # every format has this entry
        for name in files.values() if isinstance(files, dict) else [files]:
            # Otherwise a forged manifest could have any other file read, and later removed.
            if not _TENSORS.fullmatch(str(name)) or (self.folder / str(name)).is_symlink():
                raise ValueError(f"it names {name!r}, which is no file of a state")
        check_format(f"the state in {self.folder}", facts["format"], FORMAT, OLDEST)
        if facts["run"] != self.run:
            self._check_run(json.loads(facts["run"]))
        return facts

    def _check_run(self, there: Mapping[str, str]) -> None:
        """Refuse the fingerprint of another run. A setting that it lacks did not exist yet, and had its default."""
        here, defaults = json.loads(self.run), json.loads(fingerprint(self.defaults))
        there = by_new_names(there, RENAMED, tell=False)
        unknown = [f"{name} ({value} there)" for name, value in there.items() if name not in here | defaults]
        if unknown:
            raise OtherRunError(
                f"{self.folder} holds the state of a newer fastadv, and this one does not know its "
                f"{', '.join(unknown)}: install that one, or choose another folder"
            )
        before = {name: there.get(name, defaults.get(name, "nothing")) for name in here}
        if found := differences(self.run, json.dumps(before)):
            todo = "Choose another folder, or remove it to begin again"
            if {name for name in here if here[name] != before[name]} <= {*OF_THE_MODEL}:
                todo = (
                    "To go on give the model as it was before training, made anew: one that fit() has changed is "
                    "another. Else choose another folder"
                )
            raise OtherRunError(f"{self.folder} holds the state of another run, which differs in {found}. {todo}")

    def _clean(self) -> None:
        """Remove files that no kept checkpoint names, also half-written ones; other files of the folder stay."""
        kept: set[str] = set()
        weights: set[str | None] = set()
        for manifest in reversed(self._manifests()):
            if manifest.name in self._damaged or len(weights) == KEPT:
                continue
            try:
                files = self._checked(manifest)["files"]
            except (FileNotFoundError, ValueError):  # damaged, and older than the one that `load` took
                continue
            if files.get("weights") not in weights:
                weights.add(files.get("weights"))
                kept |= {manifest.name, *files.values()}
        for path in self.folder.iterdir():
            name = path.name.removesuffix(".new")
            if path.name not in kept and (_MANIFEST.fullmatch(name) or _TENSORS.fullmatch(name)):
                path.unlink()
        self._damaged = set()


class OtherRunError(ValueError):
    """The checkpoints belong to another run."""


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
