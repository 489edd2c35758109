"""The derivatives: torch.clamp's, ties pass; the sign contributes zero and rounding passes straight through.

Taken only where grad mode is on and an image requires grad, so attacks never pay for it.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastadv.ops import reference
from fastadv.ops.backends import run, serving
from fastadv.ops.schemas import refuse_vmap


def result_like(x: Tensor) -> Tensor:
    """A new tensor for a step's result: `empty_like`, float32 for uint8."""
    return torch.empty_like(x, dtype=torch.float32) if x.dtype == torch.uint8 else torch.empty_like(x)


Masks = dict[int, Tensor]  # of an image, by its place among the op's arguments: the elements that a gradient reaches


def _passes(t: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    return (lo <= t) & (t <= hi)


def _random_init_masks(
    x: Tensor, noise: float, seed: int, lo: float = 0.0, hi: float = 1.0,
    noise_t: Tensor | None = None, seed_t: Tensor | None = None, lo_t: Tensor | None = None, hi_t: Tensor | None = None,
) -> Masks:  # fmt: skip
    c = reference.compute_dtype(x)
    radius, low, high = (reference.parameter(*p, x, c) for p in ((noise, noise_t), (lo, lo_t), (hi, hi_t)))
    t = reference.to_compute(x, c) + reference.draw_noise(x, radius, reference.seed_tensor(seed, seed_t, x), c)
    return {0: _passes(t, low, high)}


def _project_masks(
    x0: Tensor, grad: Tensor, x: Tensor, c: torch.dtype, alpha: Tensor, eps: Tensor, lo: Tensor, hi: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """P and M of contract.md, and t without the projection."""
    x0, x = reference.to_compute(x0, c), reference.to_compute(x, c)
    free = x0 + alpha * reference.sign(grad, c)
    d = free - x
    t = x + torch.minimum(torch.maximum(d, -eps), eps)
    return _passes(t, lo, hi), _passes(d, -eps, eps), free


def _pgd_step_masks(
    x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, lo: float = 0.0, hi: float = 1.0,
    alpha_t: Tensor | None = None, eps_t: Tensor | None = None, lo_t: Tensor | None = None, hi_t: Tensor | None = None,
) -> Masks:  # fmt: skip
    c = reference.compute_dtype(x_adv, x)
    pairs = ((alpha, alpha_t), (eps, eps_t), (lo, lo_t), (hi, hi_t))
    p, m, _ = _project_masks(x_adv, grad, x, c, *(reference.parameter(*pair, x, c) for pair in pairs))
    return {0: p & m, 2: p & ~m}


def _fgsm_step_masks(
    x: Tensor, grad: Tensor, project: bool, alpha: float, eps: float, noise: float, seed: int,
    lo: float = 0.0, hi: float = 1.0,
    alpha_t: Tensor | None = None, eps_t: Tensor | None = None, noise_t: Tensor | None = None,
    seed_t: Tensor | None = None, lo_t: Tensor | None = None, hi_t: Tensor | None = None,
) -> Masks:  # fmt: skip
    c = reference.compute_dtype(x)
    x0, inside = x, torch.ones_like(x, dtype=torch.bool)
    if noise_t is not None or noise != 0:
        x0 = result_like(x)
        reference.random_init(x0, x, noise, seed, lo, hi, noise_t, seed_t, lo_t, hi_t)
        inside = _random_init_masks(x, noise, seed, lo, hi, noise_t, seed_t, lo_t, hi_t)[0]
    pairs = ((alpha, alpha_t), (eps, eps_t), (lo, lo_t), (hi, hi_t))
    size, radius, low, high = (reference.parameter(*pair, x, c) for pair in pairs)
    p, m, free = _project_masks(x0, grad, x, c, size, radius, low, high)
    return {0: p & (~m | inside) if project else _passes(free, low, high) & inside}


_MASKS: dict[str, Callable[..., Masks]] = {
    "random_init": _random_init_masks,
    "fgsm_step": _fgsm_step_masks,
    "pgd_step": _pgd_step_masks,
}


class Step(torch.autograd.Function):
    """`Step.apply(op name, *the op's arguments but out)`; the result is like the first argument.

    In this form, with a context that is set up apart, torch.func.grad and vjp take it, too.
    """

    @staticmethod
    def forward(name: str, *args: Any) -> Tensor:
        out = result_like(args[0])
        run(name, serving(out.device), (out, *args))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, *args = inputs
        ctx.args = [None if isinstance(a, torch.Tensor) else a for a in args]
        ctx.save_for_backward(*(a if isinstance(a, torch.Tensor) else None for a in args))

    @staticmethod
    def vmap(info: object, in_dims: object, name: str, *args: Any) -> NoReturn:
        refuse_vmap(name)()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        args = [number if t is None else t for number, t in zip(ctx.args, ctx.saved_tensors, strict=True)]
        with torch.no_grad():
            masks = _MASKS[ctx.name](*args)
        grads: list[Tensor | None] = [None] * len(args)
        for i, mask in masks.items():
            if ctx.needs_input_grad[i + 1]:
                grads[i] = (grad_out * mask).to(args[i].dtype)
        if ctx.name != "random_init" and ctx.needs_input_grad[2]:
            grads[1] = torch.zeros_like(args[1])  # the sign's derivative
        return None, *grads
