"""The ops work under torch.compile, torch.export and opcheck, which change no bit of the results."""

import random
import warnings

import numpy as np
import oracle
import pytest
import strategies as s
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastadv

SHAPE = (2, 3, 8, 5)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(device, layout="contiguous", shape=SHAPE):
    rng = np.random.default_rng()
    t = {k: s.laid_out(rng.random(shape), torch.float32, layout, rng) for k in ("x", "x_adv")}
    t["grad"] = s.laid_out(rng.normal(size=shape), torch.float32, layout, rng)
    return [s.on(t[k], device) for k in ("x", "x_adv", "grad")]


def every_op(x, x_adv, grad):
    """All three ops with other ops between them, so that a compiler can fuse and change layouts."""
    x = x * 0.5 + 0.25
    start = fastadv.random_init(x, 0.1, seed=5)
    fast = fastadv.fgsm_step(x, grad * 2, 0.1, alpha=0.125, noise=0.2, seed=-7)
    slow = fastadv.pgd_step(x_adv, grad, x, alpha=0.02, eps=0.1, clip=(0.1, 0.9))
    return start, fast, slow, (start + fast) * slow


def out_and_in_place(x, x_adv, grad):
    out = torch.empty_like(x)
    fastadv.fgsm_step(x, grad, 0.1, noise=0.1, seed=3, out=out)
    x_adv = x_adv.clone()
    fastadv.pgd_step_(x_adv, grad, x, alpha=0.05, eps=0.1)
    fastadv.pgd_step(x_adv, grad, x, alpha=0.05, eps=0.1, out=x_adv)
    return out + 0, x_adv


def tensor_arguments(x, x_adv, grad):
    """Parameter tensors and per-sample seeds, some given and some made in the compiled function."""
    eps = x.mean((1, 2, 3), keepdim=True) / 4
    seed = fastadv.sample_seeds(9, torch.arange(x.shape[0], device=x.device), 1)
    start = fastadv.random_init(x, eps, seed=seed)
    return start, fastadv.fgsm_step(x, grad, eps, noise=eps, seed=seed), seed


NORMALIZATION = fastadv.Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def model_input(x, x_adv, grad):
    """z of all three ops, written to new memory and to given tensors."""
    z, start, last = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x), x_adv.clone()
    fastadv.random_init(x, 0.1, seed=5, out=start, normalization=NORMALIZATION, z=z)
    fast = fastadv.fgsm_step(start, grad, 0.1, noise=0.2, seed=-7, normalization=NORMALIZATION, z=last)
    fastadv.pgd_step_(start, grad, x, alpha=0.02, eps=0.1, normalization=fastadv.Normalization(0.5, 0.3), z=x_adv)
    return z * 1, start, fast, last, x_adv


def same_bits(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert g.stride() == w.stride()
        assert torch.equal(g, w)


FUNCTIONS = (every_op, out_and_in_place, tensor_arguments, model_input)


def compiled_equals_eager(name, device, function, layout):
    args = inputs(device, layout)
    copies = [s.on(t, device) for t in args]  # some functions write into what they are given
    with fastadv.backend(name):
        want = function(*args)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        same_bits(compiled(*copies), want)
        before = fastadv.info()["calls"][name]
        again = inputs(device, layout)
        copies = [s.on(t, device) for t in again]
        same_bits(compiled(*again), function(*copies))
        assert fastadv.info()["calls"][name] > before


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_compiled_equals_eager(backend, function):
    compiled_equals_eager(*backend, function, "contiguous")


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_compiled_equals_eager_in_any_layout(native, function, layout):
    """The traced graph depends on the layout, but not on the backend."""
    compiled_equals_eager(*native, function, layout)


def test_dynamic_shapes(backend):
    """One graph for every batch size; the noise follows each size's own positions."""
    name, device = backend
    with fastadv.backend(name):
        compiled = torch.compile(every_op, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in (SHAPE, (5, 3, 8, 5), (3, 2, 7, 4)):
            args = inputs(device, shape=shape)
            same_bits(compiled(*args), every_op(*args))


def test_gradients_through_a_compiled_step(backend):
    name, device = backend
    x, x_adv, grad = inputs(device)

    def step(x, x_adv):
        return fastadv.pgd_step(x_adv * 1.5, grad, x, alpha=0.02, eps=0.2) * 2

    def gradients(f):
        leaves = [v.clone().requires_grad_() for v in (x, x_adv)]
        return torch.autograd.grad(f(*leaves).sum(), leaves)

    with fastadv.backend(name):
        want = gradients(step)
        assert any(g.any() for g in want)
        same_bits(gradients(torch.compile(step, fullgraph=True, backend="aot_eager")), want)


def test_gradients_where_a_tensor_is_passed_twice(native):
    """The first step of PGD starts at the images, and one tensor may be eps, alpha and noise."""
    name, device = native
    x, _, grad = inputs(device)
    eps = torch.full((len(x), 1, 1, 1), 0.1, device=device)

    def steps(x):
        fast = fastadv.fgsm_step(x, grad, eps, noise=eps, seed=3)
        return fast * fastadv.pgd_step(x, grad, x, alpha=0.04, eps=0.1)

    def gradient(f):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf).sum(), leaf)

    with fastadv.backend(name):
        want = gradient(steps)
        assert want[0].any()
        same_bits(gradient(torch.compile(steps, fullgraph=True, backend="aot_eager")), want)


def test_a_draw_in_a_compiled_function_repeats_under_manual_seed(native):
    """The drawn seed may differ from the eager function's. It is reproducible, and new in each call."""
    name, device = native
    x = inputs(device)[0]
    with fastadv.backend(name):
        draw = torch.compile(lambda x: fastadv.random_init(x, 0.1), fullgraph=True, backend="aot_eager")
        draw(x)
        torch.manual_seed(3)
        first, second = draw(x), draw(x)
        torch.manual_seed(3)
        assert torch.equal(draw(x), first)
        assert torch.equal(draw(x), second)
        assert not torch.equal(first, second)


def test_compiled_writes_are_counted(native):
    """There is no backward pass through a tensor that a compiled step has overwritten."""
    name, device = native
    x, x_adv, grad = inputs(device)
    w = torch.ones((), device=device, requires_grad=True)

    def step(x_adv, z):
        fastadv.pgd_step_(x_adv, grad, x, alpha=0.02, eps=0.1, normalization=NORMALIZATION, z=z)

    with fastadv.backend(name):
        compiled, z = torch.compile(step, fullgraph=True, backend="aot_eager"), torch.empty_like(x)
        losses = [(w * x_adv).sum(), (w * z).sum()]
        compiled(x_adv, z)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def seeded(x, seed):
    each = fastadv.sample_seeds(seed, torch.arange(x.shape[0], device=x.device))
    start = fastadv.random_init(x, 0.1, seed=seed)
    return start, fastadv.fgsm_step(x, x - 0.5, 0.1, noise=0.2, seed=seed), fastadv.random_init(x, 0.1, seed=each)


@pytest.mark.parametrize("kind", ["counted", "any", "drawn"])
def test_seeds_compile_once_and_once_for_all(native, kind):
    """From its second value on an int is a symbol of the graph, for every sign and size."""
    name, device = native
    rng = random.Random()
    seeds = {
        "counted": range(12),
        "any": [-1, 2**64 - 1, -(2**63), 2**63, *(rng.randrange(-(2**63), 2**64) for _ in range(8))],
        "drawn": [fastadv.new_seed(device) for _ in range(12)],
    }[kind]
    x, count = inputs(device)[0], CompileCounterWithBackend("aot_eager")
    with fastadv.backend(name):
        compiled = torch.compile(seeded, fullgraph=True, backend=count)
        for seed in seeds:
            same_bits(compiled(x, seed), seeded(x, seed))
    assert count.frame_count <= 2


# Only inductor may change the layouts of tensors. It is slow to start, so it compiles two functions.


def channels_last_inside(x, x_adv, grad):
    """The image becomes channels-last inside the graph: its noise is that of a channels-last image."""
    x = (x + 0.125).contiguous(memory_format=torch.channels_last)
    return fastadv.random_init(x, 0.1, seed=5), fastadv.fgsm_step(x, grad, 0.1, noise=0.2, seed=5)


@pytest.mark.parametrize("function", [every_op, channels_last_inside], ids=lambda f: f.__name__)
def test_inductor_equals_eager(native, function):
    name, device = native
    args = inputs(device, "channels_last" if function is every_op else "contiguous")
    with fastadv.backend(name):
        want = function(*args)
        got = torch.compile(function, fullgraph=True)(*args)
        for g, w in zip(got[:2], want[:2], strict=True):
            assert torch.equal(g, w)
        if function is channels_last_inside:
            x = (args[0] + 0.125).cpu().contiguous(memory_format=torch.channels_last)
            assert oracle.same(oracle.values(got[0]), oracle.random_init(x, 0.1, seed=5))


class Attack(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, x_adv, grad):
        return self.function(x, x_adv, grad)


@pytest.mark.parametrize(("function", "suffix"), [(every_op, ""), (model_input, "_z")], ids=["alone", "with_z"])
def test_export(backend, function, suffix):
    name, device = backend
    args = inputs(device)
    with fastadv.backend(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Attack(function), tuple(args))
        targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        used = " ".join(targets)
        assert all(f"{op}{suffix}.{name}" in used for op in s.OPS), targets
        args = inputs(device)
        again = [t.clone() for t in args]
        same_bits(program.module()(*args), function(*again))


def raw_calls(device, tensors):
    """Arguments of the raw ops: parameters all numbers, or all tensors with seeds per sample."""
    x, x_adv, grad = inputs(device)
    out = torch.full_like(x, torch.nan)
    p = torch.full((SHAPE[0], 1, 1, 1), 0.1, device=device)
    box = (torch.full((1, SHAPE[1], 1, 1), 0.1, device=device), torch.tensor(0.9, device=device))
    seed = torch.arange(SHAPE[0], device=device)
    return {
        "random_init": (out, x, 0.1, 3, *((0.0, 1.0, p, seed, *box) if tensors else ())),
        "fgsm_step": (out, x, grad, True, 0.1, 0.1, 0.2, 3, *((0.0, 1.0, p, p, p, seed, *box) if tensors else (0.1,))),
        "pgd_step": (out, x_adv, grad, x, 0.05, 0.1, 0.0, 1.0, *((p, p, *box) if tensors else ())),
    }


@pytest.mark.parametrize("tensors", [False, True], ids=("numbers", "tensors"))
@pytest.mark.parametrize("with_z", [False, True], ids=("alone", "with_z"))
@pytest.mark.parametrize("op", s.OPS)
def test_opcheck(backend, op, with_z, tensors):
    name, device = backend
    raw = getattr(getattr(torch.ops.fastadv, f"{op}_z" if with_z else op), name)
    assert torch.Tag.needs_exact_strides in raw.tags
    out, *args = raw_calls(device, tensors)[op]
    if with_z:
        z = torch.full_like(out, torch.nan, dtype=torch.float16)
        args = [z, *NORMALIZATION.parameters(out.dim(), out.dtype, out.device), *args]
    result = torch.library.opcheck(raw, (out, *args))
    assert set(result.values()) == {"SUCCESS"}, result


# ------------------------------------------------------------------------------------- torch.jit.trace

pytestmark_trace = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytestmark_trace
@pytest.mark.parametrize("function", [every_op, tensor_arguments], ids=lambda f: f.__name__)
def test_a_trace_of_a_step_is_refused(function):
    """TorchScript would call the op of the first backend: cuda, also for tensors on the CPU."""
    with fastadv.backend("cpu"), pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record fastadv\.\w+"):
        torch.jit.trace(lambda *t: function(*t)[0], tuple(inputs("cpu")))


@pytestmark_trace
def test_a_normalisation_is_traced_the_same_each_time():
    """PyTorch traces a second time and compares; what the first trace made must not serve the second."""
    normalization = fastadv.Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    x, more = torch.rand(SHAPE), torch.rand(5, *SHAPE[1:])
    for _ in range(2):
        assert torch.equal(torch.jit.trace(normalization.__call__, (x,))(more), normalization(more))
