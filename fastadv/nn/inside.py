"""Finds the modules inside a callable that is no module, such as `lambda x: net(x)` or `functools.partial(net)`."""

import dis
import gc
import logging
import sys
import types
import weakref
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


def as_module(model: AnyModel) -> nn.Module:
    """The model itself if it is an `nn.Module`; else an `nn.ModuleList` of the modules that the callable reaches.

    Reached are a function's closure, defaults and the globals that it uses, a method's object, what a partial or any
    other object holds, and so on from there; of installed packages no globals and no classes. Nothing is remembered: a
    closure may hold another network at the next call.

    Args:
        model: an `nn.Module` or any other callable.
    """
    return model if isinstance(model, nn.Module) else nn.ModuleList(_modules_in(model))


def _modules_in(model: AnyModel) -> list[nn.Module]:
    found: list[nn.Module] = []
    todo: list[Any] = [model]
    seen: dict[int, Any] = {id(model): model}  # it keeps the objects alive: another one could get the id
    while todo:
        value = todo.pop()
        if issubclass(type(value), nn.Module):
            found.append(value)
            continue
        for each in _held_by(value):
            if type(each) not in _PLAIN and id(each) not in seen:
                seen[id(each)] = each
                todo.append(each)
    return found


def _held_by(value: Any) -> Iterable[Any]:
    """The objects that an object holds: its attributes, its slots, its entries, its class and so on."""
    kind = type(value)  # a proxy may have a __class__ that says otherwise
    if issubclass(kind, _LEAVES) or (issubclass(kind, type) and is_installed(value.__module__)):
        return ()
    if issubclass(kind, types.FunctionType):
        known = {} if is_installed(value.__module__) else value.__globals__
        used = [known[name] for name in globals_of(value.__code__) if name in known]
        return (*used, value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value))
    return (value(),) if issubclass(kind, weakref.ref) else gc.get_referents(value)


@lru_cache(maxsize=1024)
def globals_of(code: types.CodeType) -> frozenset[str]:
    """The names of the globals that a function, or a function inside it, looks up."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    here = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(here.union(*map(globals_of, inner)))


def is_installed(module: str | None) -> bool:
    """Whether a module, by its name, belongs to an installed package, the standard library or this package."""
    top = (module or "").partition(".")[0]
    if top == "fastadv" or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
