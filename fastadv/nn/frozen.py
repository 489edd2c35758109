"""Freezes a model for the time of an attack, and restores its modes, flags and buffers afterwards."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fastadv.nn.inside import as_module
from fastadv.nn.logits import AnyModel

TRAINING_MODES = ("eval", "as_is", "batch_norm")


# ------------------------------------------------------------------ one thread at a time

_owners: dict[int, int] = {}  # id of a module whose flags are changed -> the thread that will restore them
_owners_lock = threading.Lock()


def _forget_owners() -> None:
    """Clear the owners in a child process after a fork: the parent's threads do not run there."""
    global _owners_lock
    _owners.clear()
    _owners_lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_forget_owners)


@contextmanager
def _alone(modules: list[nn.Module]) -> Iterator[None]:
    """Refuse modules whose flags another thread has changed; the same thread may take them again."""
    me = threading.get_ident()
    with _owners_lock:
        if _owners and any(_owners.get(id(module), me) != me for module in modules):
            raise RuntimeError(
                "another thread is attacking or judging this model, and has changed its modes and flags: take turns, "
                "or give each thread a copy (copy.deepcopy(model))"
            )
        mine = [id(module) for module in modules if id(module) not in _owners]
        _owners.update(dict.fromkeys(mine, me))
    try:
        yield
    finally:
        with _owners_lock:
            for key in mine:
                _owners.pop(key, None)


# ------------------------------------------------------------------ modes, flags, buffers


@contextmanager
def flags_kept(model: AnyModel) -> Iterator[None]:
    """Restore every module's `training` and every parameter's `requires_grad` at the end, also after an error.

    The flags of the modules are set one by one. `.eval()` and `.train()` would not do: models override them, for
    example to keep batch-norm frozen, and they cannot restore a model whose modules are in different modes.

    Args:
        model: an `nn.Module`, or any other callable, whose modules `as_module` finds.

    Raises:
        RuntimeError: another thread is attacking or judging the model.
    """
    modules = list(as_module(model).modules())
    with _flags_kept(modules, _parameters(modules)):
        yield


@contextmanager
def _flags_kept(modules: list[nn.Module], parameters: list[nn.Parameter]) -> Iterator[None]:
    with _alone(modules):
        training = [(module, module.training) for module in modules if hasattr(module, "training")]
        requires_grad = [(parameter, parameter.requires_grad) for parameter in parameters]

        def put_back() -> None:
            _set("training", training)
            _set("requires_grad", requires_grad)

        with at_the_end(put_back):
            yield


def _parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    """The parameters of the modules, each once."""
    found = (parameter for module in modules for parameter in module._parameters.values() if parameter is not None)
    return list({id(parameter): parameter for parameter in found}.values())


def _set(name: str, flags: list[tuple[Any, bool]]) -> None:
    """Set the flags that are not so yet: to read one takes a tenth of the time, and few calls have any to set."""
    for owner, flag in flags:
        if getattr(owner, name) is not flag:
            setattr(owner, name, flag)


@contextmanager
def frozen(model: AnyModel, training_mode: str = "eval", *others: object) -> Iterator[list[nn.Parameter]]:
    """Freeze a model until the end: no parameter requires grad, and the modules are in `training_mode`.

    Afterwards flags and buffers, such as running statistics, are as before, and the weights that pre-forward hooks
    have set. All buffers are copied at the beginning: neither a captured graph nor batch-norm tells which buffers it
    has written to. A buffer that is registered in between stays, like a lazy module that has got its shape.

    Args:
        model: an `nn.Module`, or any other callable, whose modules `as_module` finds.
        others: objects whose modules are frozen with it, such as a loss.
        training_mode: "eval": every module in eval mode; "as_is": modes are left alone, so that in train mode dropout
            draws and batch-norm uses the batch; "batch_norm": batch-norm in train mode, the rest in eval mode.

    Yields:
        The parameters, each once.

    Raises:
        RuntimeError: another thread is attacking or judging the model.
    """
    modules = list(as_module(model, *others).modules())
    parameters = _parameters(modules)
    with _flags_kept(modules, parameters), _buffers_kept(modules), _computed_weights_kept(modules):
        if training_mode != "as_is":
            kept = nn.modules.batchnorm._BatchNorm if training_mode == "batch_norm" else ()
            _set("training", [(module, isinstance(module, kept)) for module in modules if hasattr(module, "training")])
        _set("requires_grad", [(parameter, False) for parameter in parameters])
        yield parameters


@contextmanager
def frozen_for_callable(model: AnyModel) -> Iterator[None]:
    """As `frozen(model, "as_is")` with autograd, for code of others, such as an attack that is a function.

    Such code may set modes, as `model.train()` does, and it may clear gradients, as `model.zero_grad()` does. The
    gradients that the parameters have are out of its reach, and back at the end.

    Args:
        model: an `nn.Module`, or any other callable, whose modules `as_module` finds.

    Raises:
        RuntimeError: another thread is attacking or judging the model.
    """
    with frozen(model, "as_is") as parameters, torch.enable_grad():
        gradients = [parameter.grad for parameter in parameters]
        _put_gradients(parameters, [None] * len(parameters))
        with at_the_end(lambda: _put_gradients(parameters, gradients)):
            yield


def _put_gradients(parameters: list[nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is not gradient:
            parameter.grad = gradient


@contextmanager
def buffers_kept(model: AnyModel) -> Iterator[None]:
    """Restore the model's buffers at the end: the same tensors with the same values.

    Args:
        model: an `nn.Module`, or any other callable, whose modules `as_module` finds.
    """
    with _buffers_kept(list(as_module(model).modules())):
        yield


@contextmanager
def _buffers_kept(modules: list[nn.Module]) -> Iterator[None]:
    named = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    writable = [buffer for _, _, buffer in named if buffer is not None and is_writable(buffer)]
    # .data hides the write from autograd, so that a graph that was built before can still run backward.
    memory = [buffer.data for buffer in writable]
    before = _Copies(memory)

    def put_back() -> None:
        for mine, data in zip(writable, memory, strict=True):
            plain = type(data) is torch.Tensor and data.layout == torch.strided
            if plain and not mine.is_set_to(data):  # after set_, resize_ or an assignment to .data
                mine.data = data
        before.put_back()
        for module, name, buffer in named:  # the model may have assigned another tensor; TorchScript cannot
            if not isinstance(module, torch.jit.ScriptModule) and module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer

    with at_the_end(put_back):
        yield


@contextmanager
def _computed_weights_kept(modules: list[nn.Module]) -> Iterator[None]:
    """Restore at the end what was computed from the parameters, and keep in no cache what is from frozen ones.

    The hooks of `weight_norm`, `spectral_norm` and pruning set a plain attribute, the weight. Parametrizations that
    are `cached` are kept by PyTorch until the caller's cache ends.
    """
    hooked = [vars(module) for module in modules if vars(module).get("_forward_pre_hooks")]
    weights = [{k: v for k, v in known.items() if isinstance(v, torch.Tensor)} for known in hooked]
    cache, parametrize._cache = parametrize._cache, {}

    def put_back() -> None:
        parametrize._cache = cache
        for known, before in zip(hooked, weights, strict=True):
            known.update(before)

    with at_the_end(put_back):
        yield


@contextmanager
def at_the_end(put_back: Callable[[], None]) -> Iterator[None]:
    """Call `put_back` at the end, also after an error. An error of `put_back` never hides that earlier error."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            put_back()
        raise
    put_back()


class _Copies:
    """Copies of tensors, made with one kernel launch for all tensors of a dtype.

    A small network has about as many buffers as an attack has launches: one launch for each buffer would cost time.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._kinds: dict[tuple[torch.device, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for t in tensors:
            # The same memory without what PyTorch has yet to do to its values, which it cannot write through.
            t = t.conj() if t.is_conj() else t
            t = torch._neg_view(t) if t.is_neg() else t
            mine, copies = self._kinds.setdefault((t.device, t.dtype), ([], []))
            mine.append(t)
            copies.append(torch.empty_like(t))
        for mine, copies in self._kinds.values():
            torch._foreach_copy_(copies, mine)

    def put_back(self) -> None:
        for mine, copies in self._kinds.values():
            torch._foreach_copy_(mine, copies)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` CUDA's current device: streams, events and captures belong to that one. On a CPU do nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def as_normal(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without its graph. An inference tensor is copied: autograd refuses to save one for backward."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether PyTorch can write to a tensor in place, and to many in one call.

    It cannot where elements share memory, as after `expand`, nor where there are none, as of meta tensors.
    """
    if is_lazy(tensor) or tensor.is_inference() or tensor.is_meta or tensor._is_zerotensor():
        return False
    if tensor.is_quantized or tensor.is_nested or tensor.is_mkldnn:
        return False
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return True
    return all(size <= 1 or stride != 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
