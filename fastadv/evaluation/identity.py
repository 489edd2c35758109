"""The fingerprint of a run, to which a state belongs: each part of the run by name, as its value or as a hash.

The hash of a part reads all that the part computes with: weights, plain attributes, a function's code, the values that
it closes over and the globals that it uses. Left out are counters, which its own code counts up as it runs. A class or
function of an installed package is known by its name.
"""

import contextlib
import copyreg
import dis
import functools
import hashlib
import inspect
import json
import math
import sys
import types
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from fastadv.attacks import FGSM, Attack

KEY = "fastadv_key"  # an attribute that says what an object is, instead of all that it holds
HASH, UNTOLD = "#", "?"  # what a part begins with that is no value; Python's values begin with neither
WHOLE = 2**20  # bytes of a tensor that are hashed with the rest, not by themselves
SHORT = 60  # characters of a value that is shown as it is

_NEW_OBJECT = copyreg.__newobj__  # type: ignore[attr-defined]
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), PurePath, range, np.generic)
_NAMED = (torch.dtype, torch.layout, torch.memory_format)
# Of a module: what says nothing of the function that it computes in eval mode.
_MOVED = {"fastadv.nn.normalized": "fastadv.attacks.normalized"}  # modules by their name in the first states
_ASIDE = {"training", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"}
_ASIDE |= {"_load_state_dict_post_hooks", "_non_persistent_buffers_set", "_is_full_backward_hook"}
_OF_CLASSES = {"__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__firstlineno__", "_abc_impl"}
_OF_CLASSES |= {"__static_attributes__", "__annotate_func__", "__annotations_cache__", "__annotate__"}


def fingerprint(parts: Mapping[str, object]) -> str:
    """JSON, equal where two runs compute the same.

    Args:
        parts: what a run computes with, by name.

    Returns:
        {name of a part: its value where that is short, else a hash}. A part that cannot be told from another one equals
        none, not even itself.
    """
    reader = _Reader()
    return json.dumps({name: _shown(part) or _hashed(reader, part) for name, part in parts.items()})


def differences(here: str, there: str) -> str:
    """What differs between two fingerprints, in words; nothing where they are equal."""
    mine, other = (dict[str, str](json.loads(run)) for run in (here, there))
    found = untold(mine)
    for name in {**mine, **other}:
        old, new = other.get(name, "nothing"), mine.get(name, "nothing")
        if old != new and not new.startswith(UNTOLD):  # these were found above
            hashed = any(each.startswith((HASH, UNTOLD)) for each in (old, new))
            found.append(name if hashed else f"{name} ({old} there, {new} here)")
    return ", ".join(found)


def untold(run: str | Mapping[str, str]) -> list[str]:
    """The parts of a fingerprint that equal no other ones, in words."""
    parts: Mapping[str, str] = json.loads(run) if isinstance(run, str) else run
    return [
        f"{name} (it holds {found.partition(' ')[2]}, which cannot be told from another one: give what holds it a name "
        f"of its own, an attribute {KEY})"
        for name, found in parts.items()
        if found.startswith(UNTOLD)
    ]


class Untold(TypeError):
    """An object cannot be told from another one."""


@dataclass(frozen=True)
class Told:
    """Stands for a part whose hash is known already."""

    hash: bytes


def told(dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[torch.Tensor]) -> Told:
    """What stands for a tensor that is too large to be held as a whole.

    Args:
        dtype: of the tensor.
        shape: of the tensor.
        pieces: the tensor cut along its first dimension, one piece after the other, on the CPU.
    """
    size = dtype.itemsize * math.prod(shape)
    return Told(_digest((b"Tensor", _kind_of(dtype, shape), _content_of(size, pieces))))


def _content_of(size: int, pieces: Iterable[torch.Tensor]) -> bytes:
    """The bytes of a tensor of `size` bytes, which comes in pieces; their hash where they are WHOLE or more."""
    flat = (t.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy() for t in pieces)
    if size < WHOLE:
        return b"".join(piece.tobytes() for piece in flat)
    whole = hashlib.blake2b()
    for piece in flat:
        whole.update(piece.data)
    return whole.digest()


def _kind_of(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    return f"{dtype} {tuple(shape)}".encode()


def _shown(part: object) -> str | None:
    text = repr(part)[: SHORT + 1] if isinstance(part, _PLAIN) else ""
    return text if 0 < len(text) <= SHORT else None


def _hashed(reader: "_Reader", part: object) -> str:
    try:
        return HASH + reader.hash(part).hex()
    except Untold as error:
        return f"{UNTOLD}{uuid.uuid4().hex} {error}"


class _Reader:
    """Hashes of objects, each read once; where it meets itself again its place is all that counts."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[bytes, object]] = {}  # the object too, or its id would be used again

    def hash(self, value: Any) -> bytes:
        if isinstance(value, Told):
            return value.hash
        if isinstance(value, (*_PLAIN, *_NAMED)):
            return _digest((type(value).__qualname__.encode(), repr(value).encode()))
        if id(value) not in self._known:
            self._known[id(value)] = (b"itself", value)
            self._known[id(value)] = (_digest(self._parts(value)), value)
        return self._known[id(value)][0]

    def _parts(self, value: Any) -> Iterator[bytes]:
        kind = type(value)
        key = inspect.getattr_static(value, KEY, None)
        yield kind.__qualname__.encode()
        if isinstance(key, str):
            yield key.encode()
        elif isinstance(value, torch.Tensor):
            yield from self._tensor(value)
        elif isinstance(value, np.ndarray):
            yield f"{value.dtype.str} {value.shape}".encode()
            yield self.hash(value.tolist()) if value.dtype == object else value.tobytes()
        elif isinstance(value, torch.device):
            return  # where something is computed is no part of it
        elif isinstance(value, Mapping):
            yield from map(self.hash, (each for item in value.items() for each in item))
        elif isinstance(value, (list, tuple, deque)):
            yield from map(self.hash, value)
        elif isinstance(value, (set, frozenset)):
            yield from sorted(map(self.hash, value))
        elif isinstance(value, types.ModuleType):
            yield value.__name__.encode()
        elif isinstance(value, type):
            yield from self._class(value)
        elif isinstance(value, (types.FunctionType, types.CodeType, types.CellType)):
            yield from self._function(value)
        elif isinstance(value, types.MethodType):
            yield from map(self.hash, (value.__func__, value.__self__))
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
            owner = getattr(value, "__self__", None)
            yield f"{getattr(value, '__module__', '')}.{value.__qualname__}".encode()
            yield self.hash(owner)
        elif isinstance(value, functools.partial):
            yield from map(self.hash, (value.func, value.args, value.keywords))
        elif isinstance(value, (property, classmethod, staticmethod)):
            names = ("fget", "fset", "__func__")
            yield from (self.hash(getattr(value, name)) for name in names if hasattr(value, name))
        elif isinstance(value, weakref.ref):
            yield self.hash(value())
        elif isinstance(value, torch.Generator):
            yield self.hash(value.get_state())
        elif isinstance(value, nn.Module):
            yield from self._module(value)
        elif isinstance(value, Attack):
            yield from map(self.hash, (kind, settings_of(value)))
        else:
            yield from self._object(value)

    def _tensor(self, value: Any) -> Iterator[bytes]:
        yield _kind_of(value.dtype, value.shape)
        try:
            size = value.numel() * value.element_size()
            # In pieces, for a copy of all images may not fit.
            pieces = [value] if size < WHOLE else value.split(max(1, len(value) * WHOLE // size))
            content = _content_of(size, pieces)
        except (RuntimeError, TypeError, NotImplementedError) as error:  # quantised, sparse, without data
            raise Untold(f"a tensor of {value.dtype} and {value.layout}") from error
        yield content

    def _module(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, nn.parallel.DistributedDataParallel):
            yield self.hash(value.module)
        elif hasattr(value, "_orig_mod"):  # of torch.compile
            yield self.hash(value._orig_mod)
        elif isinstance(value, torch.jit.ScriptModule):
            yield str(value.inlined_graph).encode()
            yield self.hash(dict(value.state_dict()))
        else:
            yield self.hash(type(value))
            attributes = {name: v for name, v in vars(value).items() if name not in _ASIDE}
            # The keys of hooks count how many there were before.
            hooks = {n: list(v.values()) for n, v in attributes.items() if n.endswith("_hooks") and isinstance(v, dict)}
            attributes |= hooks
            if isinstance(value, torch.fx.GraphModule):
                attributes = {name: v for name, v in attributes.items() if name != "_graph"} | {"code": value.code}
            yield from self._attributes(attributes)

    def _class(self, value: Any) -> Iterator[bytes]:
        if _is_installed(value.__module__):
            place = _MOVED.get(value.__module__, value.__module__)
            yield f"{place}.{value.__qualname__}".encode()
        else:
            aside = _OF_CLASSES.union(*map(_counts_of, vars(value).values()))
            yield from map(self.hash, value.__bases__)
            yield from self._attributes({name: v for name, v in vars(value).items() if name not in aside})

    def _function(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, types.CellType):
            with contextlib.suppress(ValueError):  # it is empty
                yield self.hash(value.cell_contents)
        elif isinstance(value, types.CodeType):
            yield from (value.co_code, self.hash(value.co_consts), self.hash(value.co_names))
        else:
            yield from self._attributes(vars(value))
            yield from map(self.hash, (value.__defaults__, value.__kwdefaults__, _constant_cells(value)))
            if _is_installed(value.__module__):
                yield f"{value.__module__}.{value.__qualname__}".encode()
            else:
                yield self.hash(value.__code__)
                known, used = value.__globals__, _globals_of(value.__code__) - _changed(value.__code__, "GLOBAL")
                yield from self._attributes({name: known[name] for name in used if name in known})

    def _object(self, value: Any) -> Iterator[bytes]:
        """The contents of any other object, as a pickle would hold them."""
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:  # whatever a class has to say to it
            raise Untold(f"a {type(value).__qualname__}") from error
        if isinstance(reduced, str):
            yield reduced.encode()
            yield self.hash(getattr(value, "__wrapped__", None))  # of functools.cache
            return
        made, arguments, state, *items = (*reduced, None)[: max(3, len(reduced))]
        yield from map(self.hash, (made if made is not _NEW_OBJECT else None, arguments))
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            yield from self._attributes(part) if isinstance(part, dict) else (self.hash(part),)
        yield from (self.hash(list(each)) for each in items if isinstance(each, Iterable))

    def _attributes(self, values: Mapping[str, object]) -> Iterator[bytes]:
        for name in sorted(values, key=str):
            yield str(name).encode()
            yield self.hash(values[name])


def settings_of(attack: Attack) -> dict[str, object]:
    """The settings of an attack of this package, or of one derived from it; not what it keeps from its calls."""
    made = [name for kind in type(attack).__mro__ if "__init__" in vars(kind) for name in _parameters(kind)]
    kept = {name for name in vars(attack) if name not in vars(_PATTERN) or not name.startswith("_")} - {"objective"}
    return {name: getattr(attack, name) for name in sorted({*made, *kept}) if hasattr(attack, name)}


_PATTERN = FGSM(len)


def _parameters(kind: type) -> Iterable[str]:
    return inspect.signature(vars(kind)["__init__"]).parameters if kind is not object else ()


def _globals_of(code: types.CodeType) -> set[str]:
    """The names of globals that a function, or one inside of it, looks up."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    here = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return here.union(*map(_globals_of, inner))


def _constant_cells(function: types.FunctionType) -> tuple[types.CellType, ...] | None:
    """The cells that a function closes over, but for those that it counts up."""
    counts = _changed(function.__code__, "DEREF")
    names = function.__code__.co_freevars
    return function.__closure__ and tuple(
        cell for name, cell in zip(names, function.__closure__, strict=True) if name not in counts
    )


def _counts_of(value: object) -> set[str]:
    """The attributes of its class that a method, or a static one, counts up."""
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if not isinstance(function, types.FunctionType):
        return set()
    itself = None if isinstance(value, classmethod) else next(iter(function.__code__.co_varnames), None)
    return _changed(function.__code__, "ATTR", itself)


def _changed(code: types.CodeType, kind: str, itself: str | None = None) -> set[str]:
    """The names of a `kind` that a function, or one inside of it, both reads and writes: it does not read the
    attributes of the argument `itself`, its instance."""
    read, written, owner = set(), set(), None
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in ("COPY", "DUP_TOP"):  # of what was loaded before
            continue
        if name == f"LOAD_{kind}" and (itself is None or owner != itself):
            read.add(value)
        elif name == f"STORE_{kind}":
            written.add(value)
        loaded = value if isinstance(value, tuple) else (value,)  # one instruction may load two
        owner = loaded[-1] if name.startswith("LOAD_FAST") else None
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return (read & written).union(*(_changed(each, kind, itself) for each in inner))


def _is_installed(module: str | None) -> bool:
    top = (module or "").partition(".")[0]
    if top == "fastadv" or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _digest(parts: Iterable[bytes]) -> bytes:
    """A hash of parts of any length. Each is hashed first, so that "ab", "c" and "a", "bc" differ."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(hashlib.blake2b(part, digest_size=16).digest())
    return whole.digest()
