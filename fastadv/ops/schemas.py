"""The op table: every op's schema, once; every backend gets an overload of it, `fastadv::pgd_step.cpu` and so on.

An op writes into `out` and allocates nothing. A parameter comes as a pair: a number, and a tensor that overrides it
(None where it is a number), so a number never becomes a device tensor. Nothing is checked here: the public functions
in `fastadv.functional` do that, once, for every backend.
"""

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")

_BOX = "float lo, Tensor? lo_t, float hi, Tensor? hi_t, Tensor(a!) out"
_SEED = "int seed, Tensor? seed_t"

SCHEMAS = {
    "random_init": f"(Tensor x, float noise, Tensor? noise_t, {_SEED}, {_BOX}) -> ()",
    "fgsm_step": "(Tensor x, Tensor grad, float eps, Tensor? eps_t, float alpha, Tensor? alpha_t, "
    f"float noise, Tensor? noise_t, {_SEED}, bool project, {_BOX}) -> ()",
    "pgd_step": "(Tensor x_adv, Tensor grad, Tensor x, float alpha, Tensor? alpha_t, float eps, Tensor? eps_t, "
    f"{_BOX}) -> ()",
    # The generator itself, int64 [N] each: key = seed, counter = (index low, index high, restart, word3); out [N, 4].
    "philox": "(Tensor seed, Tensor index, Tensor restart, int word3, Tensor(a!) out) -> ()",
}

# A compiler that changed an input's strides would change the element positions, and with them the noise.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

below_autograd = torch._C._AutoDispatchBelowAutograd


def _refuse_grad(name, op):
    """The kernel at the Autograd key: the raw ops have no derivative, so they refuse instead of dropping it."""

    def guard(*args):
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"torch.ops.fastadv.{name} has no derivative and got an input that requires grad: "
                f"call fastadv.{name.split('.')[0]}, or wrap the call in torch.no_grad()"
            )
        with below_autograd():
            op(*args)

    return guard


def _fake(*args):
    """Nothing to infer: the ops return nothing. Meta tensors beside real ones come here too, though."""
    devices = {str(a.device) for a in args if isinstance(a, torch.Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")


def _refuse_vmap(name):
    def refuse(*args):
        raise RuntimeError(
            f"fastadv.{name} does not support torch.vmap: call it on the whole batch; eps, alpha, noise and clip "
            "may be tensors of shape (N, 1, 1, 1) and seed one of shape (N,)"
        )

    return refuse


def _define():
    ops = {}
    for op_name, schema in SCHEMAS.items():
        for backend in BACKENDS:
            name = f"{op_name}.{backend}"
            torch.library.define(f"fastadv::{name}", schema, tags=_TAGS)
            op = getattr(getattr(torch.ops.fastadv, op_name), backend)
            torch.library.register_fake(f"fastadv::{name}", _fake)
            torch.library.impl(f"fastadv::{name}", "Autograd", _refuse_grad(name, op))
            torch.library.impl(f"fastadv::{name}", "FuncTorchBatched", _refuse_vmap(op_name))
            ops[op_name, backend] = op
    return ops


OPS = _define()
