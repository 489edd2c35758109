"""The steps of L-inf attacks on tensors: each one pass over memory (contract.md has the exact arithmetic).

Images are tensors of any shape (N first, C second where that matters), layout and strides, in float64, float32,
float16, bfloat16 or uint8; uint8 means x/255. bfloat16 has a spacing of 1/256 near 1, and images stored in it cannot
hold a small budget: prefer float32 or uint8 images. The gradient may be bfloat16.

Gradients flow as through torch.clamp where grad mode is on and an image requires grad; the argument grad itself gets
zeros. There is no forward-mode derivative. Writing into `out` and `z` counts as PyTorch's own in-place operations do: a
graph that saved them refuses to go backward. The replay of a CUDA graph writes without that, as PyTorch's replays do.

Every error is raised before anything is written, and names the argument and what it got.
"""

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastadv.ops import checks
from fastadv.ops.autograd import Step, result_like
from fastadv.ops.backends import NATIVE, run, serving
from fastadv.ops.checks import Box, Parameter, Seed
from fastadv.ops.generator import new_seed, sample_seeds
from fastadv.ops.normalization import Normalization
from fastadv.ops.reference import compute_dtype
from fastadv.ops.schemas import Arguments, increment_versions

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


def _apply(
    name: str,
    images: tuple[torch.Tensor, ...],
    parameters: tuple[Parameter, ...],
    box: Box,
    out: torch.Tensor | None,
    normalization: Normalization | None,
    z: torch.Tensor | None,
    *flags: bool,
) -> torch.Tensor:
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
            increment_versions((result,) if z is None else (result, z))
        return result
    except Exception:
        # The native kernels check for themselves, in nanoseconds, and write nothing where they refuse: here is why.
        _check(name, args, out, normalization, z)
        if not checks.needs_a_copy(args, out, z):
            raise
        return _by_a_copy(name, images, parameters, box, out, normalization, z, *flags)


def _by_a_copy(
    name: str,
    images: tuple[torch.Tensor, ...],
    parameters: tuple[Parameter, ...],
    box: Box,
    out: torch.Tensor | None,
    normalization: Normalization | None,
    z: torch.Tensor | None,
    *flags: bool,
) -> torch.Tensor:
    """`_apply` into results of which `checks.needs_a_copy`: they are rare enough for one."""
    new_out, new_z = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (out, z)
    )
    result = _apply(name, images, parameters, box, new_out, normalization, new_z, *flags)
    if z is not None and new_z is not None:
        z.copy_(new_z)
    return result if out is None else out.copy_(result)


def _run_with_z(
    name: str,
    backend: str,
    result: torch.Tensor,
    images: tuple[torch.Tensor, ...],
    args: Arguments,
    normalization: Normalization | None,
    z: torch.Tensor | None,
) -> None:
    if z is None or normalization is None:
        raise ValueError("one of them is missing: `_check` says which")
    if z.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("z requires grad, and it has no derivative: detach it, or use torch.no_grad()")
    compute = compute_dtype(*images[::2], result)  # grad, the second, has no say
    parameters = normalization.parameters(z.dim(), compute, z.device)
    run(f"{name}_z", backend, (result, z, *parameters, *args))


def _check(
    name: str,
    args: Arguments,
    out: torch.Tensor | None,
    normalization: Normalization | None,
    z: torch.Tensor | None,
) -> None:
    checks.images(name, args, out, z)
    if normalization is None and z is None:
        return
    if z is None or normalization is None:
        given, missing = ("normalization", "z") if z is None else ("z", "normalization")
        raise ValueError(f"{missing} is missing: the model's next input takes both, got {given} alone")
    if not isinstance(normalization, Normalization):
        raise TypeError(f"normalization must be a fastadv.Normalization, got {type(normalization).__name__}")
    normalization.check(z)


def _short(parameters: tuple[Parameter, ...], box: Box) -> tuple[Parameter | None, ...]:
    """The parameters as the ops take them: numbers, then tensors, without the defaults at the end."""
    for p in (*parameters, *box):
        if type(p) is not float and type(p) is not int:
            tensors = [p if isinstance(p, torch.Tensor) else None for p in (*parameters, *box)]
            numbers = [p if t is None else 0 for p, t in zip((*parameters, *box), tensors, strict=True)]
            return *numbers, *tensors
    return parameters if box == _BOX else (*parameters, *box)


def _differentiate(
    name: str,
    args: Arguments,
    out: torch.Tensor | None,
    normalization: Normalization | None,
    z: torch.Tensor | None,
) -> torch.Tensor:
    _check(name, args, out, normalization, z)
    if out is not None or z is not None:
        named = [*checks.image_arguments(name, args).items(), ("out", out)]
        which = next(n for n, t in named if t is not None and t.requires_grad)
        how = "z=" if z is not None else "out= or in place"
        raise RuntimeError(
            f"{which} requires grad, and a step with {how} has no derivative: detach it, "
            f"use torch.no_grad(), or leave {how.split()[0]} away"
        )
    result: torch.Tensor = Step.apply(name, *(_each_once(args) if is_compiling() else args))  # type: ignore[no-untyped-call]
    return result


def _each_once(args: Arguments) -> Arguments:
    """The arguments with a view of a tensor where it is passed again, as eps and alpha may be one.

    A compiler does not trace an autograd function that gets a tensor twice.
    """
    return tuple(
        a.view_as(a) if isinstance(a, torch.Tensor) and any(a is b for b in args[:i]) else a for i, a in enumerate(args)
    )


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Convert images to what a model takes.

    Args:
        images: pixels, uint8 or float.

    Returns:
        float32 images / 255 for uint8; float images as they are.

    Raises:
        TypeError: images are of another dtype or no tensor.
    """
    checks.image("images", images)
    # The ops' own conversion: a division by 255 is not rounded correctly on every device.
    return random_init(images, 0.0, seed=0) if images.dtype == torch.uint8 else images


def random_init(
    x: torch.Tensor,
    noise: Parameter,
    *,
    seed: Seed | None = None,
    clip: Box = _BOX,
    out: torch.Tensor | None = None,
    normalization: Normalization | None = None,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw a random start: x plus uniform noise in [-noise, noise], in the box.

    Args:
        x: images of any shape, float or uint8.
        noise: half-width of the noise, finite and at least 0, in the images' units, [0, 1]: a number, or a float tensor
            that is 0-dim or broadcasts over the first two dimensions of x, such as (N, 1, 1, 1) with one per sample.
        seed: an int in [-2^63, 2^64), or an int64 tensor with one element; one of shape (N,) draws every sample as a
            tensor of its own (`sample_seeds` makes them). None draws a `new_seed`.
        clip: (lo, hi), the box, in pixels: numbers, or tensors as noise.
        out: takes the result, so that nothing is allocated: a float tensor of x's shape, x itself or one that does not
            overlap it.
        normalization: with z, what the model does to its input first.
        z: takes the model's next input, `normalization` of the result, in the same pass: a float tensor of x's shape,
            in any dtype and layout, that overlaps nothing. It has no derivative.

    Returns:
        `out`, or a new tensor like x, float32 for uint8.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a wrong shape, device or value, an overlap, or z without normalization or the reverse.
        RuntimeError: autograd, vmap or the chosen backend cannot do it.

    Source:
        Wong et al. 2020, "Fast is better than free", algorithm 3 (FGSM-RS); Madry et al. 2018, "Towards deep learning
        models resistant to adversarial attacks", for PGD's start.
    """
    if seed is None:
        checks.image("x", x)
        seed = new_seed(x.device)
    seed = checks.seed(seed, x)
    noise = checks.radius("noise", noise, x, finite=True)
    return _apply("random_init", (x,), (noise, seed), checks.box(clip, x), out, normalization, z)


def fgsm_step(
    x: torch.Tensor,
    grad: torch.Tensor,
    eps: Parameter,
    *,
    alpha: Parameter | None = None,
    noise: Parameter | None = None,
    seed: Seed | None = None,
    project: bool = True,
    clip: Box = _BOX,
    out: torch.Tensor | None = None,
    normalization: Normalization | None = None,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take FGSM's step: from the random start along the gradient's sign, then into the eps-ball around x and the box.

    The defaults are FGSM. FGSM-RS has noise=eps and alpha=1.25*eps; N-FGSM has noise=2*eps, alpha=eps and
    project=False. The random start is not read from memory: it is drawn again from its seed.

    Args:
        x: clean images of any shape, float or uint8.
        grad: the loss's gradient at `random_init(x, noise, seed=seed, clip=clip)`, at x where noise is 0; of x's shape,
            in any float dtype.
        eps: radius of the ball, at least 0, in the images' units, [0, 1]: a number, or a float tensor that is 0-dim or
            broadcasts over the first two dimensions of x, such as (N, 1, 1, 1) with one per sample.
        alpha: step size, finite, in the same unit and form; None: eps.
        noise: half-width of the random start, finite and at least 0, in the same unit and form; None: 0.
        seed: the random start's, as in `random_init`. Both are given, or neither: another start than the gradient's
            would be a silent bug.
        project: whether the result is projected onto the ball.
        clip: (lo, hi), the box, in pixels: numbers, or tensors as eps.
        out: takes the result, so that nothing is allocated: a float tensor of x's shape, an input itself or one that
            overlaps none.
        normalization: with z, what the model does to its input first.
        z: takes the model's next input, `normalization` of the result, in the same pass: a float tensor of x's shape,
            in any dtype and layout, that overlaps nothing. It has no derivative.

    Returns:
        `out`, or a new tensor like x, float32 for uint8.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a wrong shape, device or value, an overlap, or one of noise and seed, or of z and normalization,
            without the other.
        RuntimeError: autograd, vmap or the chosen backend cannot do it.

    Source:
        Goodfellow et al. 2015, "Explaining and harnessing adversarial examples", section 4 (FGSM); Wong et al. 2020,
        "Fast is better than free", algorithm 3 (FGSM-RS); de Jorge et al. 2022, "Make some noise" (N-FGSM).
    """
    eps = checks.radius("eps", eps, x)
    alpha = checks.step_size(alpha, eps, x)
    if noise is None and seed is not None:
        raise ValueError("noise is missing: with a seed, pass the noise that random_init got for the gradient's start")
    noise = checks.radius("noise", 0.0 if noise is None else noise, x, finite=True)
    if seed is None and (isinstance(noise, torch.Tensor) or noise != 0.0):
        raise ValueError("seed is missing: with noise, pass the seed that random_init got for the gradient's start")
    seed = checks.seed(0 if seed is None else seed, x)
    box = checks.box(clip, x)
    if not isinstance(project, bool):
        raise TypeError(f"project must be a bool, got {type(project).__name__} {project!r}")
    return _apply("fgsm_step", (x, grad), (alpha, eps, noise, seed), box, out, normalization, z, project)


def pgd_step(
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    *,
    alpha: Parameter,
    eps: Parameter,
    clip: Box = _BOX,
    out: torch.Tensor | None = None,
    normalization: Normalization | None = None,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take one step of PGD: from x_adv along the gradient's sign, then into the eps-ball around x and the box.

    Args:
        x_adv: the iterate, of x's shape, float.
        grad: the loss's gradient there, of x's shape, in any float dtype.
        x: clean images of any shape, float or uint8.
        alpha: step size, finite, in the images' units, [0, 1]: a number, or a float tensor that is 0-dim or broadcasts
            over the first two dimensions of x, such as (N, 1, 1, 1) with one per sample.
        eps: radius of the ball, at least 0, in the same unit and form.
        clip: (lo, hi), the box, in pixels: numbers, or tensors as eps.
        out: takes the result, so that nothing is allocated: a float tensor of x's shape, an input itself or one that
            overlaps none.
        normalization: with z, what the model does to its input first.
        z: takes the model's next input, `normalization` of the result, in the same pass: a float tensor of x's shape,
            in any dtype and layout, that overlaps nothing. It has no derivative.

    Returns:
        `out`, or a new tensor like x_adv.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a wrong shape, device or value, an overlap, or z without normalization or the reverse.
        RuntimeError: autograd, vmap or the chosen backend cannot do it.

    Source:
        Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks", section 2.1.
    """
    alpha = checks.step_size(alpha, None, x)
    eps = checks.radius("eps", eps, x)
    return _apply("pgd_step", (x_adv, grad, x), (alpha, eps), checks.box(clip, x), out, normalization, z)


def fgsm_step_(
    x: torch.Tensor,
    grad: torch.Tensor,
    eps: Parameter,
    *,
    alpha: Parameter | None = None,
    noise: Parameter | None = None,
    seed: Seed | None = None,
    project: bool = True,
    clip: Box = _BOX,
    normalization: Normalization | None = None,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take FGSM's step in place: `fgsm_step` that writes into x.

    The defaults are FGSM. FGSM-RS has noise=eps and alpha=1.25*eps; N-FGSM has noise=2*eps, alpha=eps and
    project=False.

    Args:
        x: clean images of any shape, float, not uint8; the result replaces them.
        grad: the loss's gradient at `random_init(x, noise, seed=seed, clip=clip)`, at x where noise is 0; of x's shape,
            in any float dtype.
        eps: radius of the ball, at least 0, in the images' units, [0, 1]: a number, or a float tensor that is 0-dim or
            broadcasts over the first two dimensions of x, such as (N, 1, 1, 1) with one per sample.
        alpha: step size, finite, in the same unit and form; None: eps.
        noise: half-width of the random start, finite and at least 0, in the same unit and form; None: 0.
        seed: the random start's, as in `random_init`. Both are given, or neither: another start than the gradient's
            would be a silent bug.
        project: whether the result is projected onto the ball.
        clip: (lo, hi), the box, in pixels: numbers, or tensors as eps.
        normalization: with z, what the model does to its input first.
        z: takes the model's next input, `normalization` of the result, in the same pass: a float tensor of x's shape,
            in any dtype and layout, that overlaps nothing. It has no derivative.

    Returns:
        x.

    Raises:
        TypeError: x is uint8, or an argument is of a wrong type or dtype.
        ValueError: a wrong shape, device or value, an overlap, or one of noise and seed, or of z and normalization,
            without the other.
        RuntimeError: an image requires grad while grad mode is on, or vmap or the chosen backend cannot do it.

    Source:
        Goodfellow et al. 2015, "Explaining and harnessing adversarial examples", section 4 (FGSM); Wong et al. 2020,
        "Fast is better than free", algorithm 3 (FGSM-RS); de Jorge et al. 2022, "Make some noise" (N-FGSM).
    """
    checks.image("x", x, checks.FLOATS)
    return fgsm_step(
        x, grad, eps, alpha=alpha, noise=noise, seed=seed, project=project, clip=clip, out=x,
        normalization=normalization, z=z,
    )  # fmt: skip


def pgd_step_(
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    *,
    alpha: Parameter,
    eps: Parameter,
    clip: Box = _BOX,
    normalization: Normalization | None = None,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take one step of PGD in place: `pgd_step` that writes into x_adv.

    Args:
        x_adv: the iterate, of x's shape, float; the result replaces it.
        grad: the loss's gradient there, of x's shape, in any float dtype.
        x: clean images of any shape, float or uint8.
        alpha: step size, finite, in the images' units, [0, 1]: a number, or a float tensor that is 0-dim or broadcasts
            over the first two dimensions of x, such as (N, 1, 1, 1) with one per sample.
        eps: radius of the ball, at least 0, in the same unit and form.
        clip: (lo, hi), the box, in pixels: numbers, or tensors as eps.
        normalization: with z, what the model does to its input first.
        z: takes the model's next input, `normalization` of the result, in the same pass: a float tensor of x's shape,
            in any dtype and layout, that overlaps nothing. It has no derivative.

    Returns:
        x_adv.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a wrong shape, device or value, an overlap, or z without normalization or the reverse.
        RuntimeError: an image requires grad while grad mode is on, or vmap or the chosen backend cannot do it.

    Source:
        Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks", section 2.1.
    """
    checks.image("x_adv", x_adv, checks.FLOATS)
    return pgd_step(x_adv, grad, x, alpha=alpha, eps=eps, clip=clip, out=x_adv, normalization=normalization, z=z)
