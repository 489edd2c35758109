"""Gradients are torch.clamp's, and ties pass; the sign's argument gets zeros; no call without grad pays for them."""

import copy
import io

import numpy as np
import oracle
import pytest
import strategies as s
import torch
from dispatched import Dispatched
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck

import fastadv

SHAPE = (2, 3, 4, 5)
SMALL = (2, 2, 3)  # finite differences call the op twice for each element


def leaf(array, dtype, device):
    return torch.from_numpy(np.asarray(array)).to(dtype).to(device).requires_grad_()


def on_eighths(rng, low, high):
    """Multiples of 1/8: every sum below is exact, so that many values tie with a bound exactly."""
    return rng.integers(round(8 * low), round(8 * high) + 1, SHAPE) / 8


def backward(result, rng, *leaves):
    """(a random upstream gradient, the gradients of the leaves), as values."""
    up = torch.from_numpy(rng.normal(size=SHAPE)).to(result.dtype).to(result.device)
    got = torch.autograd.grad(result, leaves, up, allow_unused=False)
    for g, v in zip(got, leaves, strict=True):
        assert g.dtype == v.dtype
        assert g.shape == v.shape
    return oracle.values(up), *(oracle.values(g) for g in got)


def inside(t, box):
    return (t >= box[0]) & (t <= box[1])


# --------------------------------------------------------------------------------- the masks, with their ties


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_pgd_step_masks(backend, dtype):
    name, device = backend
    rng, eps, alpha, box = np.random.default_rng(), 0.25, 0.125, (0.0, 1.0)
    x = on_eighths(rng, -0.25, 1.25)
    x_adv, g = x + on_eighths(rng, -0.5, 0.5), rng.choice([-1.0, 0.0, 2.0, np.nan, np.inf], SHAPE)
    leaves = [leaf(v, dtype, device) for v in (x_adv, g, x)]
    with fastadv.backend(name):
        result = fastadv.pgd_step(*leaves, alpha=alpha, eps=eps, clip=box)
    up, d_x_adv, d_g, d_x = backward(result, rng, *leaves)
    d = x_adv + alpha * np.nan_to_num(np.sign(g)) - x
    m, p = np.abs(d) <= eps, inside(x + np.clip(d, -eps, eps), box)
    assert (np.abs(d) == eps).any()
    assert (~m).any()
    assert (~p).any()
    assert np.array_equal(d_x_adv, up * (p & m))
    assert np.array_equal(d_x, up * (p & ~m))
    assert not d_g.any()


def test_pgd_step_masks_of_parameter_tensors(backend):
    name, device = backend
    rng = np.random.default_rng()
    x = on_eighths(rng, 0, 1)
    x_adv, g = x + on_eighths(rng, -0.5, 0.5), rng.choice([-1.0, 1.0], SHAPE)
    eps, alpha = (
        np.array([0.125, 0.375]).reshape(2, 1, 1, 1),
        np.array([0.125, 0.25, -0.125]).reshape(1, 3, 1, 1),
    )
    hi = np.array([0.5, 1.0, 0.75]).reshape(1, 3, 1, 1)
    leaves = [leaf(v, torch.float32, device) for v in (x_adv, g, x)]
    eps_t, alpha_t, hi_t = (torch.from_numpy(v).to(device) for v in (eps, alpha, hi))
    with fastadv.backend(name):
        result = fastadv.pgd_step(*leaves, alpha=alpha_t, eps=eps_t, clip=(0.125, hi_t))
    up, d_x_adv, d_g, d_x = backward(result, rng, *leaves)
    d = x_adv + alpha * g - x
    m, p = np.abs(d) <= eps, inside(x + np.clip(d, -eps, eps), (0.125, hi))
    assert np.array_equal(d_x_adv, up * (p & m))
    assert np.array_equal(d_x, up * (p & ~m))
    assert not d_g.any()


@pytest.mark.parametrize("project", [True, False], ids=("project", "no_project"))
@pytest.mark.parametrize("alpha", [None, 0.125, 0.5])
def test_fgsm_step_masks_without_noise(backend, alpha, project):
    """Without noise the ball's clamp does not depend on x, so only the box masks the gradient."""
    name, device = backend
    rng, eps, box = np.random.default_rng(), 0.25, (0.0, 0.75)
    x, g = on_eighths(rng, -0.25, 1.25), rng.choice([-1.0, 0.0, 1.0, np.nan], SHAPE)
    leaves = [leaf(v, torch.float32, device) for v in (x, g)]
    with fastadv.backend(name):
        result = fastadv.fgsm_step(*leaves, eps, alpha=alpha, project=project, clip=box)
    up, d_x, d_g = backward(result, rng, *leaves)
    d = (eps if alpha is None else alpha) * np.nan_to_num(np.sign(g))
    p = inside(x + (np.clip(d, -eps, eps) if project else d), box)
    assert p.any()
    assert (~p).any()
    assert np.array_equal(d_x, up * p)
    assert not d_g.any()


def noise_of(x, noise, seed):
    """The noise n in float64, from the oracle: random_init with an open box is x + n, rounded once."""
    h = oracle.halves(x, seed)
    return (noise * 2.0**-16) * (2 * h - 65535)


@pytest.mark.parametrize("project", [True, False], ids=("project", "no_project"))
def test_fgsm_step_masks_with_noise(backend, project):
    name, device = backend
    rng, eps, alpha, noise, box = np.random.default_rng(), 0.25, 0.125, 0.3, (0.0, 1.0)
    x, g, seed = rng.uniform(-0.2, 1.2, SHAPE), rng.choice([-1.0, 0.0, 1.0], SHAPE), int(rng.integers(2**62))
    leaves = [leaf(v, torch.float64, device) for v in (x, g)]
    with fastadv.backend(name):
        result = fastadv.fgsm_step(*leaves, eps, alpha=alpha, noise=noise, seed=seed, project=project, clip=box)
    up, d_x, d_g = backward(result, rng, *leaves)
    cpu = torch.from_numpy(x)
    i = inside(x + noise_of(cpu, noise, seed), box)
    x0 = oracle.random_init(cpu, noise, seed=seed, clip=box)
    d = x0 + alpha * g - x
    m = np.abs(d) <= eps
    want = inside(x + np.clip(d, -eps, eps), box) & (~m | i) if project else inside(x0 + alpha * g, box) & i
    assert (~i).any()
    assert i.any()
    assert want.any()
    assert (~want).any()
    assert np.array_equal(d_x, up * want)
    assert not d_g.any()


def test_random_init_mask(backend):
    name, device = backend
    rng = np.random.default_rng()
    x, seed = rng.uniform(-0.2, 1.2, SHAPE), int(rng.integers(2**62))
    x_leaf = leaf(x, torch.float64, device)
    with fastadv.backend(name):
        result = fastadv.random_init(x_leaf, 0.3, seed=seed)
    up, d_x = backward(result, rng, x_leaf)
    i = inside(x + noise_of(torch.from_numpy(x), 0.3, seed), (0.0, 1.0))
    assert (~i).any()
    assert np.array_equal(d_x, up * i)


# --------------------------------------------------------------------------------------------- numerically


def away_from(values, *borders, margin=1e-3):
    """Move values away from the borders, so that finite differences see one branch."""
    for border in borders:
        values = np.where(np.abs(values - border) < margin, border + 2 * margin, values)
    return values


def test_gradcheck_pgd_step(backend):
    name, device = backend
    rng, eps, alpha = np.random.default_rng(), 0.2, 0.1
    x = away_from(rng.uniform(0.05, 0.95, SMALL), 0.2, 0.8)  # so x +- eps is away from 0 and 1
    g = rng.choice([-1.0, 1.0], SMALL)
    d = away_from(rng.uniform(-0.4, 0.4, SMALL), -eps, eps)
    d = np.where(np.abs(x + d) < 2e-3, d + 5e-3, np.where(np.abs(x + d - 1) < 2e-3, d - 5e-3, d))
    leaves = [leaf(v, torch.float64, device) for v in (x + d - alpha * g, g, x)]
    with fastadv.backend(name):
        assert gradcheck(lambda *t: fastadv.pgd_step(*t, alpha=alpha, eps=eps), leaves)


@pytest.mark.parametrize("project", [True, False], ids=("project", "no_project"))
def test_gradcheck_fgsm_step_and_random_init(backend, project):
    """The images are inside the box, so that none ties with it; the ball is met on both sides."""
    name, device = backend
    rng = np.random.default_rng()
    x, g = rng.uniform(0.35, 0.65, SMALL), rng.choice([-1.0, 1.0], SMALL)
    leaves = [leaf(v, torch.float64, device) for v in (x, g)]
    # d = n +- 0.1 is within 1e-5 of eps only where n is within 1e-5 of 0.05: take a seed without such a place.
    for seed in range(1000):
        n = noise_of(torch.from_numpy(x), 0.2, seed)
        if np.abs(np.abs(n + 0.1 * g) - 0.15).min() > 1e-5:
            break
    args = {"alpha": 0.1, "noise": 0.2, "seed": seed, "project": project}
    with fastadv.backend(name):
        assert gradcheck(lambda *t: fastadv.fgsm_step(*t, 0.15, **args), leaves)
        assert gradcheck(lambda t: fastadv.random_init(t, 0.2, seed=seed), leaves[:1])


# ------------------------------------------------------------------------------- only with grad mode


def steps(t):
    return (
        fastadv.random_init(t["x"], 0.1, seed=3),
        fastadv.fgsm_step(t["x"], t["grad"], 0.1, noise=0.2, seed=3),
        fastadv.pgd_step(t["x_adv"], t["grad"], t["x"], alpha=0.05, eps=0.1),
    )


def inputs(device):
    return {k: torch.randn(SHAPE, device=device) for k in ("x", "x_adv", "grad")}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_without_grad_mode_attacks_pay_nothing(backend, mode):
    """The dispatched ops are the ops of inputs that never required grad, and nothing is recorded."""
    name, device = backend
    t = inputs(device)
    with fastadv.backend(name), mode():
        with Dispatched() as plain:
            want = steps(t)
        t = {k: v.clone().requires_grad_() if mode is torch.no_grad else v for k, v in t.items()}
        with Dispatched() as seen:
            got = steps(t)
    assert seen.names == plain.names
    assert len(seen.names) == 6
    for a, b in zip(got, want, strict=True):
        assert not a.requires_grad
        assert torch.equal(a, b)


def test_the_differentiable_way_has_the_same_bits(backend):
    name, device = backend
    t = inputs(device)
    with fastadv.backend(name):
        want = steps(t)
        for which in ("x", "x_adv", "grad"):
            got = steps({k: v.clone().requires_grad_(k == which) for k, v in t.items()})
            used = (which == "x", which in ("x", "grad"), True)
            for a, b, needs in zip(got, want, used, strict=True):
                assert torch.equal(a, b)
                assert a.requires_grad == needs


def test_tensors_made_in_inference_mode_can_be_used_outside(backend):
    name, device = backend
    with torch.inference_mode():
        t = inputs(device)
    with fastadv.backend(name):
        for result in steps(t):
            assert not result.requires_grad
            assert result.isfinite().all()


def raw_calls(t, out):
    """Arguments of the raw ops, numbers only."""
    return {
        "random_init": (out, t["x"], 0.1, 3),
        "fgsm_step": (out, t["x"], t["grad"], True, 0.1, 0.1, 0.2, 3, 0.1, 0.9),
        "pgd_step": (out, t["x_adv"], t["grad"], t["x"], 0.05, 0.1, 0.0, 1.0),
    }


@pytest.mark.parametrize("op", s.OPS)
def test_raw_op_refuses_inputs_that_require_grad(backend, op):
    """An op that writes to out has no derivative; without an error the gradient would be wrong."""
    name, device = backend
    raw = getattr(getattr(torch.ops.fastadv, op), name)
    for which in ("x", "x_adv", "grad", "out"):
        t = inputs(device)
        out = torch.full(SHAPE, torch.nan, device=device)
        every = {**t, "out": out}
        used = [v for v in raw_calls(t, out)[op] if isinstance(v, torch.Tensor)]
        if not any(every[which] is v for v in used):
            continue
        every[which].requires_grad_()
        with pytest.raises(RuntimeError, match="grad"):
            raw(*raw_calls(t, out)[op])
        assert out.isnan().all()
        with torch.no_grad():
            raw(*raw_calls(t, out)[op])
        assert not out.isnan().any()


def failing_calls(t):
    """Calls that are refused at every depth: arguments, shapes, memory, gradients."""
    base = t["x"].flatten()
    leaf = t["x"].clone().requires_grad_()
    return (
        lambda: fastadv.fgsm_step(t["x"], t["grad"], -1.0),
        lambda: fastadv.fgsm_step(t["x"], t["grad"], 0.1, out=t["x"][:1]),
        lambda: fastadv.fgsm_step(t["x"], t["grad"], 0.1, seed=torch.zeros(7, dtype=torch.int64)),
        lambda: fastadv.fgsm_step(base[1:], base[1:].clone(), 0.1, out=base[:-1]),
        lambda: fastadv.fgsm_step(t["x"], t["grad"], t["x"][0, 0, 0, 0], out=t["x"]),
        lambda: fastadv.fgsm_step(leaf, t["grad"], 0.1, out=torch.empty_like(t["x"])),
        lambda: fastadv.fgsm_step(leaf, t["grad"][:1], 0.1),
        lambda: torch.ops.fastadv.fgsm_step.cpu(leaf),
    )


@pytest.mark.parametrize("call", range(8))
def test_an_error_that_somebody_keeps_leaves_autograd_on(backend, call):
    """Interactive shells and test runners keep a traceback, and so all objects in its frames."""
    name, device = backend
    t, kept = inputs(device), None
    with fastadv.backend(name):
        try:
            failing_calls(t)[call]()
        except (TypeError, ValueError, RuntimeError) as e:
            kept = e
    assert kept is not None
    x = torch.ones(3, requires_grad=True)
    try:
        assert (x * 2).requires_grad
        assert torch.is_grad_enabled()
        with fastadv.backend(name):
            assert fastadv.random_init(x.to(device), 0.1, seed=1).requires_grad
    finally:
        del kept  # else the tests after this one could fail too


# -------------------------------------------------------------------------------- torch.func, forward-mode, constants


def squared(t):
    """{op: a function of x that sums the squares of the op's result}."""
    return {
        "random_init": lambda x: (fastadv.random_init(x, 0.1, seed=3) ** 2).sum(),
        "fgsm_step": lambda x: (fastadv.fgsm_step(x, t["grad"], 0.1, noise=0.2, seed=3) ** 2).sum(),
        "pgd_step": lambda x: (fastadv.pgd_step(t["x_adv"], t["grad"], x, alpha=0.05, eps=0.1) ** 2).sum(),
    }


@pytest.mark.parametrize("op", s.OPS)
def test_torch_func_takes_the_same_gradient(backend, op):
    name, device = backend
    t = inputs(device)
    f, x = squared(t)[op], t["x"].clone().requires_grad_()
    with fastadv.backend(name):
        (want,) = torch.autograd.grad(f(x), x)
        assert want.any()
        assert torch.equal(torch.func.grad(f)(t["x"]), want)
        assert torch.equal(torch.func.vjp(f, t["x"])[1](torch.ones((), device=device))[0], want)
        assert torch.equal(torch.func.jacrev(f)(t["x"]), want)
        second = torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(t["x"])
        assert torch.equal(second, 2.0 * (want != 0))  # a step is piecewise linear, and its square has 2 or 0


def test_a_gradient_for_each_sample_is_refused(backend):
    name, device = backend
    f = squared(inputs(device))["random_init"]
    with fastadv.backend(name), pytest.raises(RuntimeError, match=r"does not support torch\.vmap"):
        torch.func.vmap(torch.func.grad(f))(torch.rand(SHAPE, device=device))


@pytest.mark.parametrize("which", ["x", "x_adv", "grad", "eps", "out"])
def test_forward_mode_is_refused_and_not_dropped(backend, which):
    name, device = backend
    every = {
        **inputs(device),
        "eps": torch.tensor(0.1, device=device),
        "out": torch.full(SHAPE, torch.nan, device=device),
    }

    def step(v):
        t = {**every, which: v}
        return fastadv.pgd_step(t["x_adv"], t["grad"], t["x"], alpha=0.05, eps=t["eps"], out=t["out"])

    tangent = torch.ones_like(every[which])
    with fastadv.backend(name):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(every[which], tangent)
            with pytest.raises(RuntimeError, match="parameter" if which == "eps" else which):
                step(dual)
            raw = getattr(torch.ops.fastadv.pgd_step, name)
            with pytest.raises(RuntimeError, match="forward-mode"):
                raw(every["out"], dual.expand(SHAPE), every["grad"], every["x"], 0.05, 0.1)
            assert every["out"].isnan().all()
            assert not step(every[which]).isnan().any()  # a tensor without a tangent is no problem
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(step, (every[which],), (tangent,))


def first_uses(normalization, x):
    """First calls that may fill a cache of constants with tensors that later calls cannot use."""
    with torch.inference_mode():
        yield normalization(x.clone())
    with FakeTensorMode() as mode:
        yield normalization(torch.rand(x.shape, device=x.device))
        yield normalization(mode.from_tensor(x))
    yield torch.func.grad(lambda x: normalization(x).sum())(x)
    yield normalization(x.double())
    yield normalization(x.half())


@pytest.mark.parametrize("use", range(6))
@pytest.mark.parametrize("constants", [(0.3, 0.7), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))], ids=["one", "each"])
def test_constants_are_kept_for_every_later_call(backend, constants, use):
    name, device = backend
    x = torch.rand(SHAPE, device=device)
    mean, std = (torch.tensor(v, dtype=torch.float64, device=device).view(-1, 1, 1) for v in constants)
    normalization = fastadv.Normalization(*constants)
    assert list(first_uses(normalization, x))[use] is not None
    with fastadv.backend(name):
        for _ in range(2):
            leaf, z = x.clone().requires_grad_(), torch.empty_like(x)
            result = normalization(leaf)
            result.sum().backward()
            want = (x.double() - mean) / std
            assert result.dtype == torch.float32
            torch.testing.assert_close(result.double(), want, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(normalization(x.double()), want, rtol=1e-15, atol=1e-15)
            torch.testing.assert_close(leaf.grad.double(), (1 / std).expand(SHAPE), rtol=1e-6, atol=0)
            fastadv.random_init(x, 0.0, seed=1, normalization=normalization, z=z)
            assert torch.equal(z, result)
            list(first_uses(normalization, x))


def test_constants_do_not_go_stale():
    """A normalisation is saved with its model and may be loaded onto another device. Its numbers cannot be changed."""
    normalization, x = fastadv.Normalization((0.1, 0.2, 0.3), 0.5), torch.rand(SHAPE)
    want, file = normalization(x), io.BytesIO()
    torch.save(normalization, file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=False)
    for other in (loaded, copy.deepcopy(normalization)):
        assert torch.equal(other(x), want)
        assert (other.mean, other.std) == (normalization.mean, normalization.std)
    for name in ("mean", "std"):
        with pytest.raises(AttributeError, match=name):
            setattr(normalization, name, 0.25)
    assert torch.equal(normalization(x), want)
