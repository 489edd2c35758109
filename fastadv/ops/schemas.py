"""The op table: every op's schema, once; every backend gets an overload of it, `fastadv::pgd_step.cpu` and so on.

An op writes into `out` and allocates nothing. A parameter is a number and, last in the list, a tensor that overrides
it, so a number never becomes a device tensor. What most calls leave at its default comes last, because every argument
costs the dispatcher 0.1 to 0.2 microseconds. For the same reason a step that also writes z, the model's next input, is
an op of its own: `pgd_step_z` is `pgd_step` with z, mean and scale (1/std) after `out`; mean and scale are in the
compute type, 0-dim or (1, C, 1, ...). Nothing is checked here: the public functions in `fastadv.functional` do that,
once, for every backend.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.compiler import is_compiling

Arguments = tuple[Any, ...]
"""An op's arguments in its schema's order: tensors, numbers and None."""

BACKENDS = ("cuda", "triton", "cpu", "reference")


def _schemas(name: str, first: str, *parameters: str) -> dict[str, str]:
    """The two forms of a step."""
    # A SymInt: compiled functions serve every seed, instead of being compiled anew for each.
    numbers = [f"{'SymInt' if p == 'seed' else 'float'} {p}" for p in parameters]
    tensors = [f"Tensor? {p}_t=None" for p in (*parameters, "lo", "hi")]
    rest = ", ".join([first, *numbers, "float lo=0.0, float hi=1.0", *tensors])
    return {
        name: f"(Tensor(a!) out, {rest}) -> ()",
        f"{name}_z": f"(Tensor(a!) out, Tensor(b!) z, Tensor mean, Tensor scale, {rest}) -> ()",
    }


SCHEMAS = {
    **_schemas("random_init", "Tensor x", "noise", "seed"),
    **_schemas("fgsm_step", "Tensor x, Tensor grad, bool project", "alpha", "eps", "noise", "seed"),
    **_schemas("pgd_step", "Tensor x_adv, Tensor grad, Tensor x", "alpha", "eps"),
    # The generator itself, int64 [N] each: key = seed, counter = (index low, index high, restart, word3); out [N, 4].
    "philox": "(Tensor(a!) out, Tensor seed, Tensor index, Tensor restart, int word3) -> ()",
}

# A compiler that changed an input's strides would change the element positions, and with them the noise.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

below_autograd = torch._C._AutoDispatchBelowAutograd
increment_versions = torch._C._increment_version  # torch.autograd.graph.increment_version of several, in half the time


def _public(op_name: str) -> str:
    """The public function that calls an op."""
    return f"fastadv.{'sample_seeds' if op_name == 'philox' else op_name.removesuffix('_z')}"


def _refuse_grad(name: str, op: OpOverload) -> Callable[..., None]:
    """The kernel at the Autograd key: the raw ops have no derivative, so they refuse instead of dropping it."""
    public = _public(name.split(".")[0])
    results = sum(a.is_write for a in op._schema.arguments)  # they come first

    def guard(*args: Any) -> None:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(
                f"torch.ops.fastadv.{name} has no derivative and got an input that requires grad: "
                f"call {public}, or wrap the call in torch.no_grad()"
            )
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise RuntimeError(f"torch.ops.fastadv.{name} has no derivative and got a forward-mode tangent")
        with below_autograd():
            op(*args)
        if not is_compiling():
            increment_versions(args[:results])

    return guard


def _fake(*args: Any) -> None:
    """Nothing to infer: the ops return nothing. Meta tensors beside real ones come here too, though."""
    devices = {str(a.device) for a in args if isinstance(a, torch.Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")


def refuse_vmap(name: str) -> Callable[..., NoReturn]:
    """A function of any arguments that raises."""
    instead = "eps, alpha, noise and clip may be tensors of shape (N, 1, 1, 1) and seed one of shape (N,)"
    if name == "philox":
        instead = "index is all its numbers, and seed and restart may be tensors of its shape (N,)"

    def refuse(*args: Any) -> NoReturn:
        raise RuntimeError(f"{_public(name)} does not support torch.vmap: call it on the whole batch; {instead}")

    return refuse


def _refuse_trace(name: str) -> Callable[..., NoReturn]:
    """A function of any arguments that raises.

    TorchScript keeps no overload's name: it would call the first backend's op, whatever was traced.
    """

    def refuse(*args: Any) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.trace cannot record {_public(name)}, for TorchScript would call another backend: use "
            "torch.export or torch.compile, or trace what comes after it"
        )

    return refuse


def _define() -> dict[tuple[str, str], OpOverload]:
    ops = {}
    for op_name, schema in SCHEMAS.items():
        for backend in BACKENDS:
            name = f"{op_name}.{backend}"
            torch.library.define(f"fastadv::{name}", schema, tags=_TAGS)
            op = getattr(getattr(torch.ops.fastadv, op_name), backend)
            torch.library.register_fake(f"fastadv::{name}", _fake)
            torch.library.impl(f"fastadv::{name}", "Autograd", _refuse_grad(name, op))
            torch.library.impl(f"fastadv::{name}", "FuncTorchBatched", refuse_vmap(op_name))
            if backend != BACKENDS[0]:
                torch.library.impl(f"fastadv::{name}", "Tracer", _refuse_trace(op_name))
            ops[op_name, backend] = op
    return ops


OPS = _define()
