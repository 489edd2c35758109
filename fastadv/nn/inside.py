"""Finds the modules inside a callable, such as `lambda x: net(x)`, and those that a module holds unregistered."""

import dis
import gc
import logging
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastadv.nn.logits import AnyModel

# Objects that hold no module, or far too much to look through: all images, all loggers.
_OF_MUCH = (torch.utils.data.Dataset, logging.Logger)
_LEAVES = (torch.Tensor, np.ndarray, np.generic, types.ModuleType, types.CodeType, *_OF_MUCH)
_PLAIN = {type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device, torch.Size}
_CONTAINERS = {list, tuple, set, dict, OrderedDict}
# What every module has: what is registered is found without a search, and of the rest only these hooks run in a call.
_REGISTERED = vars(nn.Module()).keys() - {"_forward_pre_hooks", "_forward_hooks"}


def as_module(model: AnyModel, *others: object) -> nn.Module:
    """The model itself if all that it reaches is registered in it; else an `nn.ModuleList` of the modules reached.

    Reached are a function's closure, defaults and the globals that it uses, a method's object, what a partial or any
    other object holds, and so on from there; of installed packages no globals and no classes. Of a module these are
    the modules registered in it, its class and hooks, and what its other attributes hold that are callables, lists,
    tuples, sets, dicts or objects of your own classes and Python's, such as a deque. Nothing is remembered: a closure
    may hold another network at the next call.

    Args:
        model: an `nn.Module` or any other callable.
        others: what is searched with it.
    """
    found = _modules_in((model, *others))
    return found[0] if len(found) == 1 and found[0] is model else nn.ModuleList(found)


def _modules_in(values: tuple[object, ...]) -> list[nn.Module]:
    found: list[nn.Module] = []
    todo: list[Any] = [values]
    seen: dict[int, Any] = {}  # it keeps the objects alive: another one could get the id
    while todo:
        value = todo.pop()
        if issubclass(type(value), nn.Module):
            found.append(value)
            inside = list(value.modules())
            seen.update((id(module), module) for module in inside)
            held: Iterable[Any] = [each for module in inside for each in _beside(module)]
        else:
            held = _held_by(value)
        for each in held:
            if type(each) not in _PLAIN and id(each) not in seen:
                seen[id(each)] = each
                todo.append(each)
    return found


def _beside(module: nn.Module) -> Iterable[Any]:
    """What a module's call may use beside what is registered in it."""
    known = vars(module)
    for name in known.keys() - _REGISTERED:
        value = known[name]
        kind = type(value)
        if kind in _PLAIN or (kind in _CONTAINERS and not value):  # most modules' hooks are empty
            continue
        if callable(value) or issubclass(kind, (list, tuple, set, dict)) or not _is_packaged(kind.__module__):
            yield value
    yield type(module)


def _held_by(value: Any) -> Iterable[Any]:
    """The objects that an object holds: its attributes, its slots, its entries, its class and so on."""
    kind = type(value)  # a proxy may have a __class__ that says otherwise
    if issubclass(kind, _LEAVES) or (issubclass(kind, type) and is_installed(value.__module__)):
        return ()
    if issubclass(kind, types.FunctionType):
        installed = is_installed(value.__module__)
        known = {} if installed else value.__globals__
        used = [known[name] for name in globals_of(value.__code__) if name in known]
        used += gc.get_referents(*(value.__closure__ or ()))
        imports = () if installed else _imports_in(value.__code__)
        used += [sys.modules[name] for name in imports if name in sys.modules]
        _add_of_imports(used, _names_in(value.__code__))
        return (*used, value.__defaults__, value.__kwdefaults__, vars(value))
    return (value(),) if issubclass(kind, weakref.ref) else gc.get_referents(value)


@lru_cache(maxsize=1024)
def globals_of(code: types.CodeType) -> frozenset[str]:
    """The names of the globals that a function, or a function inside it, looks up."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    here = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(here.union(*map(globals_of, inner)))


def _add_of_imports(used: list[Any], names: frozenset[str]) -> None:
    """Add what a function reads from the Python modules that it uses, `helpers.net`; nothing of installed packages."""
    for each in used:  # it grows: `package.helpers.net`
        if issubclass(type(each), types.ModuleType) and not is_installed(each.__name__):
            held = [vars(each)[name] for name in names & vars(each).keys()]
            used += [value for value in held if all(value is not other for other in used)]


@lru_cache(maxsize=1024)
def _names_in(code: types.CodeType) -> frozenset[str]:
    """The names of the globals and attributes that a function, or a function inside it, uses."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(code.co_names).union(*map(_names_in, inner))


@lru_cache(maxsize=1024)
def _imports_in(code: types.CodeType) -> frozenset[str]:
    """The names of the modules that a function, or a function inside it, imports."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    here = {i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"}
    return frozenset(here.union(*map(_imports_in, inner)))


def is_installed(module: str | None) -> bool:
    """Whether a module, by its name, belongs to an installed package, the standard library or this package."""
    top = (module or "").partition(".")[0]
    return (top in sys.stdlib_module_names and top != "__main__") or _is_packaged(module)


def _is_packaged(module: str | None) -> bool:
    """Whether a module, by its name, belongs to an installed package or this one."""
    if (module or "").partition(".")[0] == "fastadv":
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and _is_of_packages(file)


@lru_cache(maxsize=1024)
def _is_of_packages(file: str) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
