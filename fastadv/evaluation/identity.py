"""The fingerprint of a run, which says whether a saved state belongs to this run.

A fingerprint has each part of the run by its name, as its value or as a hash: {"eps": "0.03", "model": "#5e0c..."}. The
hash of a part covers everything that the part computes with: weights, plain attributes, the code of a function, the
values in its closure and the globals that it uses. Counters, which the part's own code increases as it runs, are left
out. A class or function of an installed package counts by its name.
"""

import contextlib
import copyreg
import dis
import functools
import hashlib
import inspect
import json
import math
import re
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
from fastadv.nn.inside import globals_of, is_installed
from fastadv.nn.kinship import bare
from fastadv.nn.logits import AnyModel

KEY = "fastadv_key"  # an attribute that identifies an object, in place of its contents
HASH, UNKNOWN = "#", "?"  # the first character of a part that is no value; no value of Python's begins with one
WHOLE = 2**20  # bytes: a smaller tensor is hashed with the rest, a larger one by itself
SHORT = 60  # characters: a longer value is hashed

_NEW_OBJECT = copyreg.__newobj__  # type: ignore[attr-defined]
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), PurePath, range, np.generic)
_NAMED = (torch.dtype, torch.layout, torch.memory_format)
_MOVED = {"fastadv.nn.normalized": "fastadv.attacks.normalized"}  # {name of a module now: its name in older states}
# Attributes of an nn.Module that do not change what it computes in eval mode.
_ASIDE = {"training", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"}
_ASIDE |= {"_load_state_dict_post_hooks", "_non_persistent_buffers_set", "_is_full_backward_hook"}
_ASIDE |= {"_compiled_call_impl", "_is_torch_compile"}  # of a module that was compiled
_OF_CLASSES = {"__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__firstlineno__", "_abc_impl"}
_OF_CLASSES |= {"__static_attributes__", "__annotate_func__", "__annotations_cache__", "__annotate__"}


def fingerprint(parts: Mapping[str, object]) -> str:
    """The fingerprint of a run. Two runs that compute the same have equal ones.

    Args:
        parts: everything that the run computes with, by name.

    Returns:
        JSON: {name of a part: its value if that is short, else a hash}. A part that cannot be identified, such as an
        open file, gets a random text, and so never equals anything.
    """
    reader = _Reader()
    return json.dumps({name: _shown(part) or _hashed(reader, part) for name, part in parts.items()})


def are_equal(model: AnyModel, other: AnyModel) -> bool:
    """Whether two models compute the same, as a copy and its original: equal weights, attributes, hooks and code.

    It is False where that cannot be told, as of sparse buffers. What leaves outputs as they are is looked through.
    """
    return fingerprint({"": bare(model)}) == fingerprint({"": bare(other)})


def differences(here: str, there: str) -> str:
    """The parts in which two fingerprints differ, in words; "" where they are equal.

    Args:
        here: the fingerprint of this run.
        there: the fingerprint of the other run.
    """
    mine, other = (dict[str, str](json.loads(run)) for run in (here, there))
    found = unidentifiable(mine)
    for name in {**mine, **other}:
        old, new = other.get(name, "nothing"), mine.get(name, "nothing")
        if old != new and not new.startswith(UNKNOWN):  # a part that cannot be identified is listed already
            hashed = any(each.startswith((HASH, UNKNOWN)) for each in (old, new))
            called = "batch_size" if name == "slots" else name  # as the user gives it
            found.append(called if hashed else f"{called} ({old} there, {new} here)")
    return ", ".join(found)


def unidentifiable(run: str | Mapping[str, str]) -> list[str]:
    """The parts of a fingerprint that cannot be identified, in words; with one of them a run cannot be resumed.

    Args:
        run: a fingerprint, or the dict in its JSON.
    """
    parts: Mapping[str, str] = json.loads(run) if isinstance(run, str) else run
    return [
        f"{name} (it holds {found.partition(' ')[2]}, which cannot be told apart from another: give the object that "
        f"holds it an attribute {KEY}, a text that identifies it)"
        for name, found in parts.items()
        if found.startswith(UNKNOWN)
    ]


class Unidentifiable(TypeError):
    """An object cannot be identified: it cannot be told apart from another of its kind."""


@dataclass(frozen=True)
class KnownHash:
    """Takes the place of a part whose hash was computed before.

    Attributes:
        hash: 16 bytes.
    """

    hash: bytes


def known_hash(dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[torch.Tensor]) -> KnownHash:
    """The hash of a tensor that comes in pieces, such as images that do not fit into memory at once.

    Args:
        dtype: the dtype of the tensor.
        shape: the shape of the tensor.
        pieces: the tensor cut along its first dimension, one piece after the other, on the CPU.
    """
    size = dtype.itemsize * math.prod(shape)
    return KnownHash(_digest((b"Tensor", _kind_of(dtype, shape), _content_of(size, pieces))))


def _content_of(size: int, pieces: Iterable[torch.Tensor]) -> bytes:
    """The bytes of a tensor that comes in pieces; if `size`, their number, is WHOLE or more, the hash of the bytes."""
    # A copy: PyTorch forbids ever to resize the memory that NumPy has seen, as a buffer that grows is resized.
    flat = (t.detach().contiguous().reshape(-1).view(torch.uint8).cpu().clone().numpy() for t in pieces)
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
    except Unidentifiable as error:
        return f"{UNKNOWN}{uuid.uuid4().hex} {error}"


class Contents:
    """Tells whether what an object holds has changed.

    Args:
        aside: objects that do not count, wherever they are held.
    """

    def __init__(self, aside: Iterable[object]) -> None:
        self._reader = _Reader(aside)

    def of(self, value: object) -> tuple[object, bytes | None]:
        """(None, a hash of the contents); (the object, None) where they cannot be read."""
        try:
            return None, self._reader.hash(value)
        except Unidentifiable:
            return value, None


class _Reader:
    """Hashes objects, each one once. An object that contains itself has the bytes "itself" at that place."""

    def __init__(self, aside: Iterable[object] = ()) -> None:
        # The object is kept alive: another one could get its id.
        self._known: dict[int, tuple[bytes, object]] = {id(each): (b"aside", each) for each in aside}

    def hash(self, value: Any) -> bytes:
        if isinstance(value, KnownHash):
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
            return  # the device does not count: a run may go on at another one
        elif isinstance(value, Mapping):
            yield from map(self.hash, (each for item in value.items() for each in item))
        elif isinstance(value, (list, tuple, deque)):
            yield from map(self.hash, value)
        elif isinstance(value, (set, frozenset)):
            yield from sorted(map(self.hash, value))
        elif isinstance(value, types.ModuleType):
            yield value.__name__.encode()
            if not is_installed(value.__name__):  # a helper of the user's
                yield from self._own_module(value)
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
        elif isinstance(value, re.Pattern):  # transformers' models hold some
            yield from map(self.hash, (value.pattern, value.flags))
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
        try:
            yield _kind_of(value.dtype, value.shape)
            size = value.numel() * value.element_size()
            # In pieces: a second copy of all images may not fit into memory.
            pieces = [value] if size < WHOLE else value.split(max(1, len(value) * WHOLE // size))
            content = _content_of(size, pieces)
        except (RuntimeError, TypeError, NotImplementedError) as error:  # quantised, sparse, without data or lazy
            raise Unidentifiable(f"a tensor of {value.dtype} and {value.layout}") from error
        yield content

    def _module(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, nn.parallel.DistributedDataParallel):
            yield self.hash(value.module)
        elif hasattr(value, "_orig_mod"):  # a module under torch.compile
            yield self.hash(value._orig_mod)
        elif isinstance(value, torch.jit.ScriptModule):
            yield str(value.inlined_graph).encode()
            yield self.hash(dict(value.state_dict()))
        else:
            yield self.hash(type(value))
            attributes = {name: v for name, v in vars(value).items() if name not in _ASIDE}
            # The keys of hooks are running numbers, and depend on hooks that were removed.
            hooks = {n: list(v.values()) for n, v in attributes.items() if n.endswith("_hooks") and isinstance(v, dict)}
            attributes |= hooks
            if isinstance(value, torch.fx.GraphModule):
                attributes = {name: v for name, v in attributes.items() if name != "_graph"} | {"code": value.code}
            yield from self._attributes(attributes)

    def _own_module(self, value: types.ModuleType) -> Iterator[bytes]:
        """The file of a module, and the numbers, texts and tensors in it."""
        file = getattr(value, "__file__", None)
        yield Path(file).read_bytes() if file and Path(file).is_file() else b""
        kinds = (bool, int, float, str, torch.Tensor, np.ndarray)
        values = {name: v for name, v in vars(value).items() if isinstance(v, kinds) and not name.startswith("__")}
        yield from self._attributes(values)

    def _class(self, value: Any) -> Iterator[bytes]:
        if is_installed(value.__module__):
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
            if is_installed(value.__module__):
                yield f"{value.__module__}.{value.__qualname__}".encode()
            else:
                yield self.hash(value.__code__)
                known, used = value.__globals__, globals_of(value.__code__) - _changed(value.__code__, "GLOBAL")
                yield from self._attributes({name: known[name] for name in used if name in known})

    def _object(self, value: Any) -> Iterator[bytes]:
        """The contents of any other object, as a pickle would hold them."""
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:  # a class may raise anything
            raise Unidentifiable(f"a {type(value).__qualname__}") from error
        if isinstance(reduced, str):
            yield reduced.encode()
            yield self.hash(getattr(value, "__wrapped__", None))  # a function under functools.cache
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
    """The settings of an attack of this package, or of a class derived from one; nothing that its calls leave in it."""
    made = [name for kind in type(attack).__mro__ if "__init__" in vars(kind) for name in _parameters(kind)]
    kept = {name for name in vars(attack) if name not in vars(_PATTERN) or not name.startswith("_")} - {"objective"}
    return {name: getattr(attack, name) for name in sorted({*made, *kept}) if hasattr(attack, name)}


_PATTERN = FGSM(len)


def _parameters(kind: type) -> Iterable[str]:
    return inspect.signature(vars(kind)["__init__"]).parameters if kind is not object else ()


def _constant_cells(function: types.FunctionType) -> tuple[types.CellType, ...] | None:
    """The cells in a function's closure, without those that it both reads and writes, such as a counter."""
    counts = _changed(function.__code__, "DEREF")
    names = function.__code__.co_freevars
    return function.__closure__ and tuple(
        cell for name, cell in zip(names, function.__closure__, strict=True) if name not in counts
    )


def _counts_of(value: object) -> set[str]:
    """The attributes of its class that a method both reads and writes, such as a counter."""
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if not isinstance(function, types.FunctionType):
        return set()
    itself = None if isinstance(value, classmethod) else next(iter(function.__code__.co_varnames), None)
    return _changed(function.__code__, "ATTR", itself)


def _changed(code: types.CodeType, kind: str, itself: str | None = None) -> set[str]:
    """The names that a function, or a function inside it, both reads and writes.

    Args:
        code: the function's code.
        kind: "GLOBAL", "DEREF" (closures) or "ATTR" (attributes), as in the names of Python's instructions.
        itself: the name of the argument that is the instance, whose attributes are not looked at; None: there is none.
    """
    read, written, owner = set(), set(), None
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in ("COPY", "DUP_TOP"):  # it repeats what was loaded before
            continue
        if name == f"LOAD_{kind}" and (itself is None or owner != itself):
            read.add(value)
        elif name == f"STORE_{kind}":
            written.add(value)
        loaded = value if isinstance(value, tuple) else (value,)  # one instruction may load two
        owner = loaded[-1] if name.startswith("LOAD_FAST") else None
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return (read & written).union(*(_changed(each, kind, itself) for each in inner))


def _digest(parts: Iterable[bytes]) -> bytes:
    """A hash of several parts. Each part is hashed first, so that "ab", "c" and "a", "bc" have different hashes."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(hashlib.blake2b(part, digest_size=16).digest())
    return whole.digest()
