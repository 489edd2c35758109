"""The steps of L-inf attacks on tensors: each one pass over memory (contract.md has the exact arithmetic).

Shared by all of them. Images are tensors of any shape (N first, C second where that matters), layout and strides,
in float64, float32, float16, bfloat16 or uint8, which means x/255. eps, alpha, noise and clip are in pixels of
[0, 1]: numbers, or float tensors that are 0-dim or broadcast over the first two dimensions of x, such as
(N, 1, 1, 1) for one per sample. bfloat16 has a spacing of 1/256 near 1: images stored in it cannot hold a small
budget; prefer float32 or uint8 images, the gradient may be bfloat16.

`out=` takes the result without allocating anything; it may be an input to the letter, and no other overlap.
`normalization=` and `z=`, together, have the model's next input written in the same pass: a Normalization, and a float
tensor of x's shape, in any dtype and layout, that overlaps nothing. It has no derivative.
Where grad mode is on and an image requires grad, gradients flow as through torch.clamp; grad itself gets zeros. There
is no forward-mode derivative. Writing into `out` and `z` counts as PyTorch's own in-place operations do: a graph that
saved them refuses to go backward. The replay of a CUDA graph writes without that, as PyTorch's replays do.

Raises, before anything is written: TypeError for a wrong type or dtype; ValueError for a wrong shape, device, value
or an `out` that overlaps an input; RuntimeError for what autograd, vmap or the chosen backend cannot do. The message
names the argument and what it got.
"""

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastadv.ops import checks
from fastadv.ops.autograd import Step, result_like
from fastadv.ops.backends import NATIVE, run, serving
from fastadv.ops.generator import new_seed, sample_seeds
from fastadv.ops.normalization import Normalization
from fastadv.ops.reference import compute_dtype
from fastadv.ops.schemas import increment_versions

__all__ = [
    "Normalization",
    "fgsm_step",
    "fgsm_step_",
    "new_seed",
    "pgd_step",
    "pgd_step_",
    "random_init",
    "sample_seeds",
    "to_float",
]

_BOX = (0.0, 1.0)


def _apply(name, images, parameters, box, out, normalization, z, *flags):
    """Run the op into `out`, or into a new tensor like its first argument."""
    args = (*images, *flags, *_short(parameters, box))
    if forward_ad._current_level >= 0:  # in a dual_level or in torch.func.jvp
        checks.no_tangents(name, args, out, z)
    try:
        if torch.is_grad_enabled():
            for t in images if out is None else (*images, out):
                if t.requires_grad:
                    return _differentiate(name, args, out, normalization, z)
        like = images[0]
        backend, compiling = serving(like.device), is_compiling()
        if backend not in NATIVE or compiling:
            _check(name, args, out, normalization, z)
        result = result_like(like) if out is None else out
        if z is None and normalization is None:
            run(name, backend, (result, *args))
        else:
            _run_with_z(name, backend, result, images, args, normalization, z)
        if (out is not None or z is not None) and not compiling:  # a compiler counts by itself
            increment_versions((out,) if z is None else (result, z))
        return result
    except Exception:
        # The native kernels check for themselves, in nanoseconds, and write nothing where they refuse: here is why.
        _check(name, args, out, normalization, z)
        if not checks.interleaved(args, out, z):
            raise
        return _by_a_copy(name, images, parameters, box, out, normalization, z, *flags)


def _by_a_copy(name, images, parameters, box, out, normalization, z, *flags):
    """`_apply` into views of one buffer that share no element, such as its first and last channels.

    The kernels take these for an overlap. They are rare enough for a copy.
    """
    fresh = [t if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (out, z)]
    result = _apply(name, images, parameters, box, fresh[0], normalization, fresh[1], *flags)
    if z is not None:
        z.copy_(fresh[1])
    return result if out is None else out.copy_(result)


def _run_with_z(name, backend, result, images, args, normalization, z):
    if z.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("z requires grad, and it has no derivative: detach it, or use torch.no_grad()")
    compute = compute_dtype(*images[::2], result)  # grad, the second, has no say
    parameters = normalization.parameters(z.dim(), compute, z.device)
    run(f"{name}_z", backend, (result, z, *parameters, *args))


def _check(name, args, out, normalization, z):
    checks.images(name, args, out, z)
    if normalization is None and z is None:
        return
    if z is None or normalization is None:
        given, missing = ("normalization", "z") if z is None else ("z", "normalization")
        raise ValueError(f"{missing} is missing: the model's next input takes both, got {given} alone")
    if not isinstance(normalization, Normalization):
        raise TypeError(f"normalization must be a fastadv.Normalization, got {type(normalization).__name__}")
    normalization.check(z)


def _short(parameters, box):
    """The ops' form of parameters: numbers, then tensors; what is left at its default at the end is left out."""
    for p in (*parameters, *box):
        if type(p) is not float and type(p) is not int:
            tensors = [p if isinstance(p, torch.Tensor) else None for p in (*parameters, *box)]
            numbers = [p if t is None else 0 for p, t in zip((*parameters, *box), tensors, strict=True)]
            return *numbers, *tensors
    return parameters if box == _BOX else (*parameters, *box)


def _differentiate(name, args, out, normalization, z):
    _check(name, args, out, normalization, z)
    if out is not None or z is not None:
        named = {**checks.image_arguments(name, args), "out": out}
        which = next(n for n, t in named.items() if t.requires_grad)
        how = "z=" if z is not None else "out= or in place"
        raise RuntimeError(
            f"{which} requires grad, and a step with {how} has no derivative: detach it, "
            f"use torch.no_grad(), or leave {how.split()[0]} away"
        )
    return Step.apply(name, *args)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Images as a model takes them: uint8 becomes float32 images / 255, floats stay as they are."""
    # The ops' own conversion: a division by 255 is not rounded correctly on every device.
    return random_init(images, 0.0, seed=0) if images.dtype == torch.uint8 else images


def random_init(x, noise, *, seed=None, clip=_BOX, out=None, normalization=None, z=None):
    """Random start: x plus uniform noise in [-noise, noise], in the box.

    x: image tensor of any shape; noise: number or tensor, in pixels; seed: int in [-2^63, 2^64), int64 tensor with one
    element, or of shape (N,) to draw every sample as a tensor of its own (`sample_seeds` makes them); None draws a
    `new_seed`. clip: (lo, hi). Returns a tensor like x, float32 for uint8.

    Source: Wong et al. 2020, "Fast is better than free", algorithm 3 (FGSM-RS); Madry et al. 2018 for PGD's start.
    """
    if seed is None:
        checks.image("x", x)
        seed = new_seed(x.device)
    seed = checks.seed(seed, x)
    noise = checks.radius("noise", noise, x, finite=True)
    return _apply("random_init", (x,), (noise, seed), checks.box(clip, x), out, normalization, z)


def fgsm_step(
    x, grad, eps, *, alpha=None, noise=0.0, seed=None, project=True, clip=_BOX, out=None, normalization=None, z=None
):
    """FGSM, FGSM-RS and N-FGSM: random start (recomputed from the seed), sign-gradient step, projection, box.

    x: clean images; grad: gradient of the loss at `random_init(x, noise, seed=seed, clip=clip)`, or at x where noise
    is 0, of x's shape in any float dtype; eps: budget in pixels; alpha: step size, eps where None; noise and seed: the
    random start's, and a seed is needed with noise, because another start than the gradient's would be a silent bug;
    project: whether the result is projected onto the eps-ball around x. Returns a tensor like x, float32 for uint8.

    FGSM (Goodfellow et al. 2015): the defaults. FGSM-RS (Wong et al. 2020): noise=eps, alpha=1.25*eps. N-FGSM
    (de Jorge et al. 2022): noise=2*eps, alpha=eps, project=False.
    """
    eps = checks.radius("eps", eps, x)
    alpha = checks.step_size(alpha, eps, x)
    noise = checks.radius("noise", noise, x, finite=True)
    if seed is None and (isinstance(noise, torch.Tensor) or noise != 0.0):
        raise ValueError("seed is missing: with noise, pass the seed that random_init got for the gradient's start")
    seed = checks.seed(0 if seed is None else seed, x)
    box = checks.box(clip, x)
    if not isinstance(project, bool):
        raise TypeError(f"project must be a bool, got {type(project).__name__} {project!r}")
    return _apply("fgsm_step", (x, grad), (alpha, eps, noise, seed), box, out, normalization, z, project)


def pgd_step(x_adv, grad, x, *, alpha, eps, clip=_BOX, out=None, normalization=None, z=None):
    """One PGD step: sign-gradient step from x_adv, projection onto the eps-ball around x, box.

    x_adv: the iterate; grad: the loss's gradient there, both of x's shape in any float dtype; x: clean images; alpha:
    step size and eps: budget, in pixels. Returns a tensor like x_adv.

    Source: Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks", section 2.1.
    """
    alpha = checks.step_size(alpha, None, x)
    eps = checks.radius("eps", eps, x)
    return _apply("pgd_step", (x_adv, grad, x), (alpha, eps), checks.box(clip, x), out, normalization, z)


def fgsm_step_(x, grad, eps, *, alpha=None, noise=0.0, seed=None, project=True, clip=_BOX, normalization=None, z=None):
    """`fgsm_step` in place: writes into x and returns it. x must not be uint8."""
    checks.image("x", x, checks.FLOATS)
    return fgsm_step(
        x, grad, eps, alpha=alpha, noise=noise, seed=seed, project=project, clip=clip, out=x,
        normalization=normalization, z=z,
    )  # fmt: skip


def pgd_step_(x_adv, grad, x, *, alpha, eps, clip=_BOX, normalization=None, z=None):
    """`pgd_step` in place: writes into x_adv and returns it."""
    checks.image("x_adv", x_adv, checks.FLOATS)
    return pgd_step(x_adv, grad, x, alpha=alpha, eps=eps, clip=clip, out=x_adv, normalization=normalization, z=z)
