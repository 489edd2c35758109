"""out= and in-place: aliasing, refusals, one op, no allocation, the same bits with any number of threads."""

import numpy as np
import oracle
import pytest
import strategies as s
import torch
from dispatched import Dispatched

import fastadv

EPS, ALPHA = 8 / 255, 3 / 255
NORMALIZATION = fastadv.Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
ALIASED = (
    ("pgd_step", "x_adv"),
    ("pgd_step", "x"),
    ("pgd_step", "grad"),
    ("fgsm_step", "x"),
    ("fgsm_step", "grad"),
)
ALIASED += (("random_init", "x"),)


def tensors(shape=(2, 3, 5, 7), dtype=torch.float32, layout="contiguous", rng=None):
    rng = rng or np.random.default_rng()
    made = {k: s.laid_out(rng.random(shape), dtype, layout, rng) for k in ("x", "x_adv")}
    return {**made, "grad": s.laid_out(rng.normal(size=shape), dtype, layout, rng)}


def run(op, t, **out):
    if op == "random_init":
        return fastadv.random_init(t["x"], EPS, seed=5, **out)
    if op == "fgsm_step":
        return fastadv.fgsm_step(t["x"], t["grad"], EPS, alpha=ALPHA, noise=EPS, seed=5, **out)
    return fastadv.pgd_step(t["x_adv"], t["grad"], t["x"], alpha=ALPHA, eps=EPS, **out)


def expected(op, t):
    """The oracle's result for copies without aliases, in the same layout, which determines the noise."""
    t = {k: s.on(v, "cpu") for k, v in t.items()}
    if op == "random_init":
        return oracle.random_init(t["x"], EPS, seed=5)
    if op == "fgsm_step":
        return oracle.fgsm_step(t["x"], t["grad"], EPS, alpha=ALPHA, noise=EPS, seed=5)
    return oracle.pgd_step(t["x_adv"], t["grad"], t["x"], alpha=ALPHA, eps=EPS)


def on(t, device):
    return {k: s.on(v, device) for k, v in t.items()}


# ------------------------------------------------------------------------------------------------- aliases


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned", "sliced", "padded_rows"])
@pytest.mark.parametrize(("op", "name"), ALIASED, ids=lambda v: v)
def test_out_may_be_an_input(backend, op, name, layout):
    which, device = backend
    for dtype in (torch.float32, torch.bfloat16):
        t = tensors(dtype=dtype, layout=layout)
        want, t = expected(op, t), on(t, device)
        others = {k: v.clone() for k, v in t.items() if k != name}
        with fastadv.backend(which):
            assert run(op, t, out=t[name]) is t[name]
        got = oracle.values(t[name])
        assert oracle.same(got, want), oracle.mismatch(got, want)
        for k, v in others.items():
            assert torch.equal(t[k], v), k


@pytest.mark.parametrize("dtype", s.FLOATS, ids=str)
def test_in_place_forms(backend, dtype):
    name, device = backend
    t = tensors(dtype=dtype)
    want, t = {op: expected(op, t) for op in ("pgd_step", "fgsm_step")}, on(t, device)
    with fastadv.backend(name):
        result = fastadv.pgd_step_(t["x_adv"], t["grad"], t["x"], alpha=ALPHA, eps=EPS)
        assert result is t["x_adv"]
        assert oracle.same(oracle.values(result), want["pgd_step"])
        result = fastadv.fgsm_step_(t["x"], t["grad"], EPS, alpha=ALPHA, noise=EPS, seed=5)
        assert result is t["x"]
        assert oracle.same(oracle.values(result), want["fgsm_step"])


def negating(t):
    """A view of new memory that holds t's values negated, as the imaginary part of a conjugate is one."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


@pytest.mark.parametrize(("op", "name"), ALIASED, ids=lambda v: v)
def test_results_may_be_views_that_negate_their_memory(backend, op, name):
    which, device = backend
    t = tensors()
    want, t = expected(op, t), on(t, device)
    t[name], z = negating(t[name]), negating(torch.zeros_like(t["x"]))
    assert t[name].is_neg()
    with fastadv.backend(which):
        assert run(op, t, out=t[name], normalization=NORMALIZATION, z=z) is t[name]
    assert oracle.same(oracle.values(t[name].resolve_neg()), want)
    want = oracle.model_input(want, NORMALIZATION.mean, NORMALIZATION.std, np.float32, z.dtype)
    assert oracle.same(oracle.values(z.resolve_neg()), want)


def test_interleaved_views_of_one_buffer(backend):
    """Views that share a storage but no element are accepted, and no other element is touched."""
    name, device = backend
    rng = np.random.default_rng()
    for views in (
        (np.s_[0::4], np.s_[1::4], np.s_[2::4], np.s_[3::4]),
        [np.s_[:, k : k + 3] for k in (0, 3, 6, 9)],
    ):
        base = torch.from_numpy(rng.random((12, 12), np.float32)).to(device)
        x, x_adv, grad, out = (base[v] for v in views)
        t = {"x": x, "x_adv": x_adv, "grad": grad}
        want, before = expected("pgd_step", on(t, "cpu")), {k: v.clone() for k, v in t.items()}
        with fastadv.backend(name):
            run("pgd_step", t, out=out)
        assert oracle.same(oracle.values(out), want)
        for k, v in before.items():
            assert torch.equal(t[k], v), k


# --------------------------------------------------------------------------------------------- autograd's counter


def writes(t):
    """{name: (a call, the tensors that it writes)}."""
    z, fresh = torch.empty_like(t["x"]), torch.empty_like(t["x"])
    z_args = {"normalization": NORMALIZATION, "z": z}
    base = torch.rand(2, 12, 5, 7, device=fresh.device)
    x, out = base[:, 0:3], base[:, 3:6]
    return {
        "out": (lambda: run("pgd_step", t, out=fresh), (fresh,)),
        "z": (lambda: run("fgsm_step", t, **z_args), (z,)),
        "out and z": (lambda: run("random_init", t, out=fresh, **z_args), (fresh, z)),
        "in place": (lambda: fastadv.pgd_step_(t["x_adv"], t["grad"], t["x"], alpha=ALPHA, eps=EPS), (t["x_adv"],)),
        "in a gap": (lambda: fastadv.random_init(x, EPS, seed=1, out=out), (out,)),
    }


@pytest.mark.parametrize("call", ["out", "z", "out and z", "in place", "in a gap"])
def test_what_was_written_cannot_be_backpropagated_through(backend, call):
    """A graph that saved the old values would give a wrong gradient, so autograd must see the write."""
    name, device = backend
    t = on(tensors(), device)
    write, written = writes(t)[call]
    others = [v for v in t.values() if all(v is not w for w in written)]
    w = torch.ones((), device=device, requires_grad=True)
    losses, unchanged = [(w * v).sum() for v in written], [v._version for v in others]
    with fastadv.backend(name):
        write()
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert [v._version for v in others] == unchanged


@pytest.mark.parametrize("op", s.OPS)
def test_raw_ops_count_their_writes(backend, op):
    name, device = backend
    t = on(tensors(), device)
    out, z = torch.empty_like(t["x"]), torch.empty_like(t["x"])
    args = {
        "random_init": (t["x"], EPS, 5),
        "fgsm_step": (t["x"], t["grad"], True, ALPHA, EPS, EPS, 5),
        "pgd_step": (t["x_adv"], t["grad"], t["x"], ALPHA, EPS),
    }[op]
    constants = NORMALIZATION.parameters(4, torch.float32, t["x"].device)
    inputs = [v._version for v in t.values()]
    before = out._version
    getattr(getattr(torch.ops.fastadv, op), name)(out, *args)
    assert out._version > before
    before = out._version, z._version
    getattr(getattr(torch.ops.fastadv, f"{op}_z"), name)(out, z, *constants, *args)
    assert out._version > before[0]
    assert z._version > before[1]
    assert [v._version for v in t.values()] == inputs


# ------------------------------------------------------------------------------------- the model's next input


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(("op", "name"), ALIASED, ids=lambda v: v)
def test_z_beside_an_out_that_is_an_input(backend, op, name, layout):
    which, device = backend
    t = tensors(layout=layout)
    want, t = expected(op, t), on(t, device)
    z = torch.full_like(t["x"], torch.nan, dtype=torch.float16)
    with fastadv.backend(which):
        assert run(op, t, out=t[name], normalization=NORMALIZATION, z=z) is t[name]
    assert oracle.same(oracle.values(t[name]), want)
    want = oracle.model_input(want, NORMALIZATION.mean, NORMALIZATION.std, np.float32, z.dtype)
    assert oracle.same(oracle.values(z), want)


@pytest.mark.parametrize("given_out", [False, True], ids=["new", "out"])
def test_z_between_the_other_tensors_of_one_buffer(backend, given_out):
    name, device = backend
    base = torch.rand(2, 15, 5, 7, device=device)
    x, x_adv, grad, out, z = (base[:, k : k + 3] for k in range(0, 15, 3))
    t = {"x": x, "x_adv": x_adv, "grad": grad}
    want, before = expected("pgd_step", on(t, "cpu")), {k: v.clone() for k, v in t.items()}
    with fastadv.backend(name):
        result = run("pgd_step", t, normalization=NORMALIZATION, z=z, **({"out": out} if given_out else {}))
    assert oracle.same(oracle.values(result), want)
    assert torch.equal(z, NORMALIZATION(result))
    for k, v in before.items():
        assert torch.equal(t[k], v), k


@pytest.mark.parametrize("which", ["x_adv", "grad", "x", "out"])
@pytest.mark.parametrize("shift", [0, 1], ids=["same", "shifted"])
def test_z_that_overlaps_anything_is_refused(backend, which, shift):
    name, device = backend
    base = torch.rand(2 * 3 * 5 * 7 + 1, device=device)
    t = {k: torch.rand(2, 3, 5, 7, device=device) for k in ("x", "x_adv", "grad", "out")}
    t[which], z = base[:-1].view(2, 3, 5, 7), base[shift : shift + 210].view(2, 3, 5, 7)
    before = {k: v.clone() for k, v in t.items()}
    out = t.pop("out")
    with fastadv.backend(name), pytest.raises(ValueError, match=rf"\bz\b.*\b{which}\b"):
        run("pgd_step", t, out=out, normalization=NORMALIZATION, z=z)
    for k, v in {**t, "out": out}.items():
        assert torch.equal(v, before[k]), k


def test_z_that_overlaps_itself_or_a_parameter_is_refused(backend):
    name, device = backend
    x = torch.rand(2, 3, 5, 7, device=device)
    z = torch.zeros_like(x)
    for bad, eps in ((torch.zeros(1, 3, 5, 7, device=device).expand(2, 3, 5, 7), 0.1), (z, z[:, :1, :1, :1])):
        with fastadv.backend(name), pytest.raises(ValueError, match=r"\bz\b.*memory"):
            fastadv.fgsm_step(x, x, eps, normalization=NORMALIZATION, z=bad)
        assert not bad.any()


# ------------------------------------------------------------------------------------------------ refusals


def shifted():
    base = torch.rand(71)
    return base, base[:70], base[1:]


def transposed():
    base = torch.rand(8, 8)
    return base, base, base.t()


def other_steps():
    base = torch.rand(60)
    return base, base[::3][:20], base[::2][:20]


def narrower():
    base = torch.rand(16)
    return base, base, base.view(torch.bfloat16)[:16]


def half_of_another_kind():
    base = torch.rand(16).half()
    return base, base, base.view(torch.bfloat16)


def rows_that_meet():
    base = torch.rand(40)
    return base, base.as_strided((4, 5), (10, 1)), base.as_strided((4, 5), (10, 1), 3)


OVERLAPS = (shifted, transposed, other_steps, narrower, half_of_another_kind, rows_that_meet)


@pytest.mark.parametrize("which", ["x_adv", "grad", "x"])
@pytest.mark.parametrize("overlap", OVERLAPS, ids=lambda f: f.__name__)
def test_any_other_overlap_is_refused(backend, overlap, which):
    name, device = backend
    base, view, out = overlap()
    flat = s.whole_storage(base).to(device)
    view = flat.as_strided(view.shape, view.stride(), view.storage_offset())
    out = flat.view(out.dtype).as_strided(out.shape, out.stride(), out.storage_offset())
    t = {k: torch.rand(view.shape, device=device) for k in ("x", "x_adv", "grad")} | {which: view}
    before = flat.clone()
    with fastadv.backend(name), pytest.raises(ValueError, match=rf"(?s)\bout\b.*\b{which}\b"):
        run("pgd_step", t, out=out)
    assert torch.equal(flat, before)


def test_overlap_with_a_parameter_is_refused(backend):
    name, device = backend
    x, out = torch.rand(4, 3, device=device), torch.rand(4, 3, device=device)
    before = out.clone()
    for eps in (out[0, 0], out[:, :1], out[1:2]):
        with fastadv.backend(name), pytest.raises(ValueError, match=r"(?s)\bout\b.*\b(eps|parameter)\b"):
            fastadv.fgsm_step(x, x, eps, out=out)
        assert torch.equal(out, before)


def bad_outs(device):
    def nan(*shape, **kw):
        return torch.full(shape, 7, device=device, **kw)

    return {
        "expanded": (nan(2, 3, 1, 7, dtype=torch.float32).expand(2, 3, 5, 7), ValueError),
        "self-overlapping": (
            nan(300, dtype=torch.float32).as_strided((2, 3, 5, 7), (35, 20, 5, 1)),
            ValueError,
        ),
        "broadcastable": (nan(1, 3, 5, 7, dtype=torch.float32), ValueError),
        "other rank": (nan(1, 2, 3, 5, 7, dtype=torch.float32), ValueError),
        "as many elements": (nan(2, 3, 35, dtype=torch.float32), ValueError),
        "empty": (nan(0, dtype=torch.float32), ValueError),
        "uint8": (nan(2, 3, 5, 7, dtype=torch.uint8), TypeError),
        "int32": (nan(2, 3, 5, 7, dtype=torch.int32), TypeError),
        "bool": (nan(2, 3, 5, 7, dtype=torch.bool), TypeError),
        "complex": (nan(2, 3, 5, 7, dtype=torch.complex64), TypeError),
    }


@pytest.mark.parametrize("op", s.OPS)
@pytest.mark.parametrize("bad", bad_outs("meta"))
def test_bad_out_is_refused_before_anything_is_written(backend, op, bad):
    name, device = backend
    t = on(tensors(), device)
    out, error = bad_outs(device)[bad]
    got = str(out.dtype).split(".")[1] if error is TypeError else ", ".join(map(str, out.shape))
    if bad in ("expanded", "self-overlapping"):
        got = "overlap|expand|stride"
    before = s.whole_storage(out).clone()
    with fastadv.backend(name), pytest.raises(error, match=rf"(?s)\bout\b.*({got})"):
        run(op, t, out=out)
    assert torch.equal(s.whole_storage(out), before)


# ---------------------------------------------------------------------------------- one op, no allocation


@pytest.mark.parametrize("op", s.OPS)
def test_one_op_is_dispatched(backend, op):
    name, device = backend
    t = on(tensors(), device)
    with fastadv.backend(name):
        for out in (torch.empty_like(t["x"]), t["x"]):
            with Dispatched() as seen:
                run(op, t, out=out)
            assert seen.names == [f"fastadv.{op}.{name}"]
        with Dispatched() as seen:
            run(op, t)
        assert len(seen.names) == 2
        assert seen.names[1] == f"fastadv.{op}.{name}"
        z = torch.empty_like(t["x"])
        run(op, t, normalization=NORMALIZATION, z=z)  # the first call makes the normalisation's tensors
        with Dispatched() as seen:
            run(op, t, out=t["x"], normalization=NORMALIZATION, z=z)
        assert seen.names == [f"fastadv.{op}_z.{name}"]


def allocated(device, call):
    """Bytes that the call allocated, freed or not."""
    if device == "cuda":
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        call()
        return torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    return sum(max(0, e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("op", s.OPS)
def test_nothing_is_allocated(native, op, layout):
    name, device = native
    t = on(tensors((4, 3, 33, 35), layout=layout), device)
    out = torch.empty_like(t["x"])
    with fastadv.backend(name):
        for more in ({}, {"normalization": NORMALIZATION, "z": torch.empty_like(out, dtype=torch.bfloat16)}):
            run(op, t, out=out, **more)  # the first call allocates tables that later calls use
            assert allocated(device, lambda more=more: run(op, t, out=out, **more)) == 0
        size = out.numel() * out.element_size()
        assert allocated(device, lambda: run(op, t)) >= size, "the measurement sees nothing"


# ------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("op", s.OPS)
def test_same_bits_for_every_number_of_threads(backend, op):
    name, device = backend
    n = 4001 if name == "triton" and device == "cpu" else 300_001
    t = tensors((n,))
    want, t = expected(op, t), on(t, device)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            with fastadv.backend(name):
                got = oracle.values(run(op, t))
            assert oracle.same(got, want), f"{count} threads: {oracle.mismatch(got, want)}"
    finally:
        torch.set_num_threads(threads)
