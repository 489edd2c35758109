"""Every error names the argument and its value, and is raised before anything is written."""

import ast
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import strategies as s
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastadv
from fastadv.ops import backends

NAN, INF = float("nan"), float("inf")
N, C, H, W = SHAPE = (2, 3, 4, 5)


def valid(op):
    """Valid arguments; each case below replaces one of them."""
    t = {k: torch.rand(SHAPE) for k in ("x", "grad", "x_adv")}
    out = torch.full(SHAPE, torch.nan)
    if op == "random_init":
        return {"x": t["x"], "noise": 0.1, "seed": 1, "clip": (0, 1), "out": out}
    if op == "fgsm_step":
        more = {
            "eps": 0.1,
            "alpha": 0.1,
            "noise": 0.1,
            "seed": 1,
            "project": True,
            "clip": (0, 1),
            "out": out,
        }
        return {"x": t["x"], "grad": t["grad"], **more}
    return {**t, "alpha": 0.1, "eps": 0.1, "clip": (0, 1), "out": out}


def says(name, got=""):
    """A pattern for a message that has both words in any order and case."""
    return rf"(?is)(?=.*\b{name}\b)(?=.*{got})"


def on_cpu(v):
    return isinstance(v, torch.Tensor) and v.device.type == "cpu"


def refuses(op, error, match, device="cpu", **bad):
    args = {k: v.to(device) if on_cpu(v) else v for k, v in {**valid(op), **bad}.items()}
    written = [v for v in args.values() if isinstance(v, torch.Tensor) and v.device.type == device]
    written = [v for v in written if v.layout == torch.strided]
    before = [s.whole_storage(v.detach()).clone() for v in written]
    with pytest.raises(error, match=match):
        getattr(fastadv, op)(**args)
    for v, b in zip(written, before, strict=True):
        assert torch.equal(s.whole_storage(v.detach()).view(torch.uint8), b.view(torch.uint8)), "something was written"


@pytest.mark.parametrize("op", s.OPS)
def test_the_valid_arguments_are_valid(op):
    args = valid(op)
    assert getattr(fastadv, op)(**args) is args["out"]
    assert not args["out"].isnan().any()


def having(*names):
    """(op, argument) for every op that has the argument."""
    return [pytest.param(op, n, id=f"{op}-{n}") for op in s.OPS for n in names if n in valid(op)]


# ------------------------------------------------------------------------------------------------- tensors

IMAGES = having("x", "grad", "x_adv", "out")


def fake(t):
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


@pytest.mark.parametrize("op", s.OPS)
@pytest.mark.parametrize(
    ("without_memory", "words"),
    [(fake, "FakeTensors"), (lambda t: torch._efficientzerotensor(t.shape), "immutable")],
    ids=["fake", "zeros"],
)
def test_out_without_memory(backend, op, without_memory, words):
    """PyTorch's own error says what the matter is: no pointer is asked of what has none."""
    name, device = backend
    args = {k: v.to(device) if on_cpu(v) else v for k, v in valid(op).items()}
    args["out"] = without_memory(args["out"])
    with fastadv.backend(name), pytest.raises((AssertionError, RuntimeError), match=says(words)):
        getattr(fastadv, op)(**args)


@pytest.mark.parametrize("bad", [0.5, [0.5], np.zeros(SHAPE), "x"], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize(("op", "name"), IMAGES)
def test_not_a_tensor(op, name, bad):
    refuses(op, TypeError, says(name, type(bad).__name__), **{name: bad})


@pytest.mark.parametrize(("op", "name"), having("x", "grad", "x_adv"))
def test_none_is_not_a_tensor(op, name):
    refuses(op, TypeError, says(name, "None"), **{name: None})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("op", "name"), IMAGES)
def test_dtype(op, name, dtype):
    refuses(op, TypeError, says(name, str(dtype).split(".")[1]), **{name: torch.zeros(SHAPE).to(dtype)})


@pytest.mark.parametrize(("op", "name"), having("grad", "x_adv", "out"))
def test_uint8_is_for_x_only(op, name):
    refuses(op, TypeError, says(name, "uint8"), **{name: torch.zeros(SHAPE, dtype=torch.uint8)})


@pytest.mark.parametrize("shape", [(N, C, H, W + 1), (1, C, H, W), (N, C, H * W), (1, N, C, H, W), (0,), ()], ids=str)
@pytest.mark.parametrize(("op", "name"), having("grad", "x_adv", "out"))
def test_shape(op, name, shape):
    refuses(op, ValueError, says(name, ", ".join(map(str, shape))), **{name: torch.zeros(shape)})


@pytest.mark.parametrize(("op", "name"), having("grad", "x_adv", "out"))
def test_device(op, name):
    refuses(op, ValueError, says(name, "meta"), **{name: torch.zeros(SHAPE, device="meta")})


@pytest.mark.parametrize("name", ["x", "x_adv", "grad"])
def test_sparse_tensors(name):
    refuses("pgd_step", (TypeError, ValueError), says(name, "sparse"), **{name: torch.zeros(SHAPE).to_sparse()})


# -------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("bad", [-0.1, -1e-300, NAN, -INF], ids=str)
@pytest.mark.parametrize(("op", "name"), having("eps", "noise"))
def test_negative_or_nan(op, name, bad):
    refuses(op, ValueError, says(name, str(bad)), **{name: bad})


@pytest.mark.parametrize("bad", [10**400, -(10**400)], ids=["large", "small"])
@pytest.mark.parametrize(("op", "name"), having("eps", "noise", "alpha"))
def test_number_beyond_every_float(op, name, bad):
    refuses(op, ValueError, says(name), **{name: bad})


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(("op", "name"), having("alpha"))
def test_alpha_is_finite(op, name, bad):
    refuses(op, ValueError, says(name, str(bad)), **{name: bad})


@pytest.mark.parametrize("bad", ["0.1", [0.1], 1j, {}], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize(("op", "name"), having("eps", "noise", "alpha"))
def test_not_a_number(op, name, bad):
    refuses(op, TypeError, says(name, type(bad).__name__), **{name: bad})


@pytest.mark.parametrize(("op", "name"), having("eps", "noise"))
def test_none_is_not_a_number(op, name):
    missing = (op, name) == ("fgsm_step", "noise")  # which may be left out together with the seed
    refuses(op, ValueError if missing else TypeError, says(name, "missing" if missing else "None"), **{name: None})


def test_pgd_step_has_no_default_alpha():
    refuses("pgd_step", TypeError, says("alpha", "None"), alpha=None)


@pytest.mark.parametrize("bad", [(1, 0), (0.5, 0.25), (INF, -INF), (NAN, 1), (0, NAN)], ids=str)
@pytest.mark.parametrize("op", s.OPS)
def test_reversed_box(op, bad):
    refuses(op, ValueError, says("clip", "nan" if NAN in bad else str(bad[0])), clip=bad)


@pytest.mark.parametrize("bad", [0.5, None, (0,), (0, 1, 2), (), "01", ("a", 1), (0, None), (0, 1j)], ids=repr)
@pytest.mark.parametrize("op", s.OPS)
def test_clip_is_a_pair_of_numbers(op, bad):
    refuses(op, (TypeError, ValueError), says("clip"), clip=bad)


@pytest.mark.parametrize("bad", ["no", None, 0.5], ids=repr)
def test_project_is_a_bool(bad):
    refuses("fgsm_step", TypeError, says("project", type(bad).__name__), project=bad)


# ---------------------------------------------------------------------------------------- parameter tensors

PARAMETERS = having("eps", "noise", "alpha") + [
    pytest.param(op, n, id=f"{op}-{n}") for op in s.OPS for n in ("lo", "hi")
]


def parameter(name, p):
    """(the arguments with the parameter, a pattern of its names in a message)."""
    if name in ("lo", "hi"):
        return {"clip": (p, 1.0) if name == "lo" else (0.0, p)}, "clip|lo|hi"
    return {name: p}, name


def refuses_parameter(op, error, name, p, got):
    bad, named = parameter(name, p)
    refuses(op, error, rf"(?s)(?=.*\b({named})\b)(?=.*{got})", **bad)


# A 1-D tensor is refused because it could be N or C; no parameter may vary over H and W.
BAD_SHAPES = ((1,), (C,), (W,), (N, C), (N, 1, 1), (1, 1, H, 1), (1, 1, 1, W), (N, C, H, W))
BAD_SHAPES += ((N + 1, 1, 1, 1), (1, C + 1, 1, 1), (0, 1, 1, 1), (1, N, 1, 1, 1))


@pytest.mark.parametrize("shape", BAD_SHAPES, ids=str)
@pytest.mark.parametrize(("op", "name"), PARAMETERS)
def test_parameter_shape(op, name, shape):
    refuses_parameter(op, ValueError, name, torch.full(shape, 0.1), ", ".join(map(str, shape)))


def test_a_vector_image_has_no_vector_parameters():
    x = torch.rand(3)
    with pytest.raises(ValueError, match=says("eps", "3")):
        fastadv.fgsm_step(x, x, torch.full((3,), 0.1))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool], ids=str)
@pytest.mark.parametrize(("op", "name"), PARAMETERS)
def test_parameter_dtype(op, name, dtype):
    refuses_parameter(op, TypeError, name, torch.tensor(1).to(dtype), str(dtype).split(".")[1])


@pytest.mark.parametrize(("op", "name"), PARAMETERS)
def test_parameter_device(op, name):
    refuses_parameter(op, ValueError, name, torch.full((), 0.1, device="meta"), "meta")


@pytest.mark.parametrize(("op", "name"), PARAMETERS)
def test_parameter_that_requires_grad(op, name):
    refuses_parameter(op, RuntimeError, name, torch.full((), 0.1, requires_grad=True), "grad")


# ---------------------------------------------------------------------------------------------------- seeds

SEEDED = ("random_init", "fgsm_step")


@pytest.mark.parametrize("noise", [0.1, torch.tensor(0.1), torch.tensor(0.0)], ids=repr)
def test_fgsm_step_with_noise_needs_the_seed(noise):
    refuses("fgsm_step", ValueError, says("seed", "noise"), noise=noise, seed=None)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
@pytest.mark.parametrize("op", SEEDED)
def test_seed_out_of_range(op, seed):
    refuses(op, ValueError, says("seed", str(seed)), seed=seed)


@pytest.mark.parametrize("seed", [True, False, 1.0, "1", [1], np.zeros(2)], ids=repr)
@pytest.mark.parametrize("op", SEEDED)
def test_seed_type(op, seed):
    refuses(op, TypeError, says("seed", type(seed).__name__), seed=seed)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.float64, torch.bool], ids=str)
@pytest.mark.parametrize("op", SEEDED)
def test_seed_tensor_dtype(op, dtype):
    refuses(op, TypeError, says("seed", str(dtype).split(".")[1]), seed=torch.ones((), dtype=dtype))


@pytest.mark.parametrize("shape", [(N + 1,), (0,), (N, 1), (N, C), (1, N)], ids=str)
@pytest.mark.parametrize("op", SEEDED)
def test_seed_tensor_shape(op, shape):
    seed = torch.zeros(shape, dtype=torch.int64)
    refuses(op, ValueError, says("seed", ", ".join(map(str, shape))), seed=seed)


@pytest.mark.parametrize("op", SEEDED)
def test_seed_tensor_device(op):
    refuses(op, ValueError, says("seed", "meta"), seed=torch.zeros((), dtype=torch.int64, device="meta"))


def test_a_zero_dim_image_has_no_samples():
    with pytest.raises(ValueError, match=says("seed", "2")):
        fastadv.random_init(torch.rand(()), 0.1, seed=torch.zeros(2, dtype=torch.int64))


INDEX = torch.arange(3)
BAD_SAMPLE_SEEDS = {
    "index list": ((0, [1, 2]), TypeError, "index", "list"),
    "index float": ((0, INDEX.float()), TypeError, "index", "float32"),
    "index int32": ((0, INDEX.int()), TypeError, "index", "int32"),
    "index 2-D": ((0, INDEX[None]), ValueError, "index", "1, 3"),
    "index 0-D": ((0, INDEX[0]), ValueError, "index", ""),
    "seed bool": ((True, INDEX), TypeError, "seed", "bool"),
    "seed float": ((1.0, INDEX), TypeError, "seed", "float"),
    "seed large": ((2**64, INDEX), ValueError, "seed", str(2**64)),
    "restart negative": ((0, INDEX, -1), ValueError, "restart", "-1"),
    "restart NumPy's": ((0, INDEX, np.int64(-1)), ValueError, "restart", "-1"),
    "restart large": ((0, INDEX, 2**32), ValueError, "restart", str(2**32)),
    "restart float": ((0, INDEX, 1.0), TypeError, "restart", "float"),
    "seed of another length": ((torch.arange(2), INDEX), ValueError, "seed", "2,"),
    "seed of another rank": ((INDEX[None], INDEX), ValueError, "seed", "1, 3"),
    "restart of another length": ((0, INDEX, torch.arange(2)), ValueError, "restart", "2,"),
    "restart of another rank": ((0, INDEX, INDEX[:, None]), ValueError, "restart", "3, 1"),
    "seeds for one index": ((INDEX, INDEX[:1]), ValueError, "seed", "3,"),
}


@pytest.mark.parametrize("bad", BAD_SAMPLE_SEEDS)
def test_sample_seeds_refuses(bad):
    args, error, name, got = BAD_SAMPLE_SEEDS[bad]
    with pytest.raises(error, match=says(name, got)):
        fastadv.sample_seeds(*args)


# ---------------------------------------------------------------------------------- in place, grad mode, vmap


def in_place(name, t):
    if name == "fgsm_step_":
        return fastadv.fgsm_step_(t["x"], t["grad"], 0.1)
    return fastadv.pgd_step_(t["x_adv"], t["grad"], t["x"], alpha=0.1, eps=0.1)


@pytest.mark.parametrize(("op", "name"), [("fgsm_step_", "x"), ("pgd_step_", "x_adv")])
def test_in_place_on_uint8(op, name):
    t = {k: torch.rand(SHAPE) for k in ("x", "grad", "x_adv")}
    t[name] = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    before = t[name].clone()
    with pytest.raises(TypeError, match=says(name, "uint8")):
        in_place(op, t)
    assert torch.equal(t[name], before)


@pytest.mark.parametrize("which", ["x", "grad", "x_adv"])
@pytest.mark.parametrize("op", ["fgsm_step_", "pgd_step_"])
def test_in_place_with_an_input_that_requires_grad(op, which):
    if op == "fgsm_step_" and which == "x_adv":
        which = "x"
    t = {k: torch.rand(SHAPE) for k in ("x", "grad", "x_adv")}
    t[which].requires_grad_()
    before = {k: v.detach().clone() for k, v in t.items()}
    with pytest.raises(RuntimeError, match=says(which, "grad")):
        in_place(op, t)
    with torch.no_grad():
        for k, v in before.items():
            assert torch.equal(t[k], v)
        in_place(op, t)  # attacks call it so, without grad mode
        target = "x" if op == "fgsm_step_" else "x_adv"
        assert not torch.equal(t[target], before[target])


@pytest.mark.parametrize(("op", "name"), IMAGES)
def test_out_with_an_input_that_requires_grad(op, name):
    refuses(op, RuntimeError, says(name, "grad"), **{name: torch.rand(SHAPE, requires_grad=True)})


@pytest.mark.parametrize("op", s.OPS)
def test_vmap_is_refused(op):
    args = {k: v for k, v in valid(op).items() if k != "out"}
    tensors = [k for k, v in args.items() if isinstance(v, torch.Tensor)]

    def f(*views):
        return getattr(fastadv, op)(**{**args, **dict(zip(tensors, views, strict=True))})

    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(f)(*(args[k] for k in tensors))


@pytest.mark.parametrize("op", s.OPS)
def test_a_result_inside_a_transform_is_refused_as_one_outside(op):
    """The transforms' tensors have no memory of their own, which the checks must not ask for."""
    args = valid(op)

    def f(x):
        return getattr(fastadv, op)(**{**args, "x": x, "out": torch.empty_like(x)}).sum()

    with pytest.raises(RuntimeError, match=says("x", "requires grad")):
        torch.func.grad(f)(args["x"])
    grads = {k: args[k][0] for k in ("grad", "x_adv") if k in args}
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: getattr(fastadv, op)(**{**args, **grads, "x": x, "out": torch.empty_like(x)}))(
            args["x"]
        )


def test_vmap_of_sample_seeds_is_refused_by_its_name():
    with pytest.raises(RuntimeError, match=says("fastadv.sample_seeds", "index")):
        torch.func.vmap(lambda index: fastadv.sample_seeds(1, index))(torch.arange(6).view(2, 3))


# ------------------------------------------------------------------------------------- the model's next input


def refuses_z(op, error, match, **bad):
    refuses(op, error, match, **{"normalization": fastadv.Normalization((0.5,) * C, 0.2), "z": blank(), **bad})


def blank():
    return torch.full(SHAPE, torch.nan)


@pytest.mark.parametrize(
    ("bad", "error", "got"),
    [
        (0.5, TypeError, "float"),
        (torch.zeros(SHAPE, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(SHAPE, dtype=torch.int32), TypeError, "int32"),
        (torch.zeros(SHAPE).to_sparse(), TypeError, "sparse"),
        (torch.zeros(N, C, H), ValueError, f"{N}, {C}, {H}"),
        (torch.zeros(N, C, H, 1), ValueError, f"{N}, {C}, {H}, 1"),
        (torch.zeros(SHAPE, device="meta"), ValueError, "meta"),
        (torch.zeros(SHAPE, requires_grad=True), RuntimeError, "grad"),
    ],
    ids=lambda v: str(v)[:20].split("(")[0],
)
@pytest.mark.parametrize("op", s.OPS)
def test_z(backend, op, bad, error, got):
    name, device = backend
    with fastadv.backend(name):
        refuses_z(op, error, says("z", got), device=device, **{"z": bad})


@pytest.mark.parametrize("op", s.OPS)
def test_z_and_normalization_belong_together(backend, op):
    name, device = backend
    with fastadv.backend(name):
        refuses_z(op, ValueError, says("normalization", "missing"), device=device, normalization=None)
        refuses_z(op, ValueError, says("z", "missing"), device=device, z=None)


@pytest.mark.parametrize("op", s.OPS)
def test_normalization_type_and_channels(backend, op):
    name, device = backend
    with fastadv.backend(name):
        refuses_z(op, TypeError, says("normalization", "tuple"), device=device, normalization=(0.5, 0.2))
        for channels in (1, C + 1):
            bad = fastadv.Normalization(0, (1,) * channels)
            refuses_z(op, ValueError, says("normalization", str(channels)), device=device, normalization=bad)


@pytest.mark.parametrize(("op", "name"), having("x", "grad", "x_adv", "out"))
def test_z_with_an_input_that_requires_grad(op, name):
    refuses_z(op, RuntimeError, says(name, "grad"), **{name: torch.rand(SHAPE, requires_grad=True)})
    x = torch.rand(SHAPE, requires_grad=True)
    with pytest.raises(RuntimeError, match=says("x", "z=")):
        fastadv.fgsm_step(x, torch.rand(SHAPE), 0.1, normalization=fastadv.Normalization(0, 1), z=blank())


BAD_NORMALIZATIONS = {
    "std 0": ((0, 0), ValueError, "std", "0"),
    "std negative": (((0, 0), (1, -1)), ValueError, "std", "-1"),
    "std inf": ((0, INF), ValueError, "std", "inf"),
    "std nan": ((0, (1, NAN)), ValueError, "std", "nan"),
    "mean inf": ((-INF, 1), ValueError, "mean", "inf"),
    "mean nan": (((NAN, 0), 1), ValueError, "mean", "nan"),
    "lengths": (((0, 1), (1, 1, 1)), ValueError, "mean", "2 and 3"),
    "empty": (((), 1), ValueError, "mean", "none"),
    "text": (("0.5", 1), TypeError, "mean", "str"),
    "bool": ((0, True), TypeError, "std", "bool"),
    "none": ((None, 1), TypeError, "mean", "None"),
    "nested": ((((0,), (1,)), 1), TypeError, "mean", "tuple"),
    "set": (({0.5, 0.25}, 1), TypeError, "mean", "set"),
    "dict": ((0, {0.5: 0.25}), TypeError, "std", "dict"),
    "matrix": ((torch.zeros(2, 3), 1), ValueError, "mean", "2, 3"),
    "large": ((0, 10**400), ValueError, "std", "float"),
}


@pytest.mark.parametrize("bad", BAD_NORMALIZATIONS)
def test_normalization_refuses(bad):
    args, error, name, got = BAD_NORMALIZATIONS[bad]
    with pytest.raises(error, match=says(name, got)):
        fastadv.Normalization(*args)


@pytest.mark.parametrize("array", [torch.tensor, np.array])
def test_normalization_of_arrays_and_tensors(array):
    numbers, x = [0.25, 0.5, 0.75], torch.rand(SHAPE)
    want = fastadv.Normalization(numbers, 0.5)(x)
    for shape in ((C,), (C, 1, 1), (1, C, 1, 1)):
        got = fastadv.Normalization(array(numbers).reshape(shape), array(0.5))
        assert (got.mean, got.std, got.channels) == (tuple(numbers), 0.5, C)
        assert torch.equal(got(x), want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.complex64, "float16"], ids=str)
def test_normalized_images_are_floats(dtype):
    with pytest.raises(TypeError, match=says("dtype", str(dtype))):
        fastadv.Normalization(0.5, 0.2)(torch.rand(SHAPE), dtype)


def test_normalization_is_for_float_images_of_its_channels():
    normalization = fastadv.Normalization((0.5,) * C, 0.2)
    with pytest.raises(TypeError, match=says("w", "uint8")):
        normalization(torch.zeros(SHAPE, dtype=torch.uint8))
    with pytest.raises(ValueError, match=says("normalization", str(C))):
        normalization(torch.zeros(N, C + 1))


# ------------------------------------------------------------------------------------------------- NumPy's numbers


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64], ids=lambda k: k.__name__)
def test_numpy_numbers_are_numbers(kind):
    """A NumPy number is used like the Python number of its value."""
    t = {k: torch.rand(SHAPE) for k in ("x", "grad", "x_adv")}
    eps, alpha, lo, hi, seed = (kind(v) for v in (0.75, 0.3, 0.125, 1, 3))
    seed = np.int64(seed)

    def results(eps, alpha, clip, seed):
        yield fastadv.pgd_step(t["x_adv"], t["grad"], t["x"], alpha=alpha, eps=eps, clip=clip)
        yield fastadv.fgsm_step(t["x"], t["grad"], eps, alpha=alpha, noise=eps, seed=seed, clip=clip)
        yield fastadv.random_init(t["x"], eps, seed=seed, clip=clip)

    want = results(float(eps), float(alpha), (float(lo), float(hi)), int(seed))
    assert all(torch.equal(a, b) for a, b in zip(results(eps, alpha, (lo, hi), seed), want, strict=True))
    with pytest.raises(ValueError, match=says("eps", "-")):
        fastadv.fgsm_step(t["x"], t["grad"], kind(-1))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.uint64], ids=lambda k: k.__name__)
def test_numpy_integers_are_ints(kind):
    seed = 2**64 - 3 if kind is np.uint64 else 7
    x = torch.rand(SHAPE)
    assert torch.equal(fastadv.random_init(x, 0.1, seed=kind(seed)), fastadv.random_init(x, 0.1, seed=seed))
    assert torch.equal(fastadv.sample_seeds(kind(seed), INDEX, kind(2)), fastadv.sample_seeds(seed, INDEX, 2))


# ------------------------------------------------------------------------------------------------- backends


def one_step():
    x = torch.rand(SHAPE)
    return fastadv.fgsm_step(x, x - 0.5, 0.1)


def rose(call):
    before = dict(fastadv.info()["calls"])
    call()
    return {k for k, v in fastadv.info()["calls"].items() if v != before[k]}


@pytest.mark.parametrize("name", ["cudnn", "", "CPU", "ref"])
def test_unknown_backend(name):
    with pytest.raises((ValueError, RuntimeError), match=rf"(?s)(?=.*{name})(?=.*reference)(?=.*triton)"):  # noqa: SIM117
        with fastadv.backend(name):
            one_step()


@pytest.mark.parametrize("name", [None, 1])
def test_backend_that_is_no_name(name):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=str(name)):  # noqa: SIM117
        with fastadv.backend(name):
            one_step()


def in_a_process(backend, code):
    """Run code in a new process, because the variable is read once in each process."""
    step = "import torch, fastadv; x = torch.ones(4); step = lambda: fastadv.fgsm_step(x, x, 0.1)"
    env = {**os.environ, "FASTADV_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", f"{step}\n{code}"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_info_says_what_the_chosen_backend_serves():
    with fastadv.backend("reference"):
        assert fastadv.info()["serves"]["cpu"] == "reference"
    with fastadv.backend("cuda"):
        assert fastadv.info()["serves"]["cpu"].startswith("none: backend 'cuda' cannot serve cpu tensors")
    said = in_a_process("quick", "from fastadv import cli; cli.main(['info'])")
    assert "none: unknown backend 'quick' (from fastadv.backend or FASTADV_BACKEND)" in said


def test_unknown_environment_variable():
    said = in_a_process("quick", "try: step()\nexcept RuntimeError as e: print(e)")
    assert "FASTADV_BACKEND" in said
    assert "quick" in said
    assert "reference" in said


def test_the_environment_variable_chooses_and_the_context_wins():
    code = "step()\nwith fastadv.backend('reference'): step(); step()\nprint(fastadv.info()['calls'])"
    calls = ast.literal_eval(in_a_process("cpu", code))
    assert {k: v for k, v in calls.items() if v} == {"cpu": 1, "reference": 2}


def test_a_named_backend_never_falls_back():
    """The backend cuda is an error on CPU tensors, whether it was built or not."""
    x = torch.rand(SHAPE)
    out = torch.full_like(x, torch.nan)
    with pytest.raises(RuntimeError, match=r"(?s)(?=.*cuda)(?=.*cpu)"), fastadv.backend("cuda"):
        fastadv.fgsm_step(x, x, 0.1, out=out)
    assert out.isnan().all()


@pytest.fixture
def gpus(monkeypatch):
    """A function that feigns CUDA kernels for a list of architectures, Triton, and GPUs of these capabilities."""

    def there_are(archs, *capabilities):
        def capability(device=None):
            return capabilities[device if isinstance(device, int) else torch.device(device or "cuda").index or 0]

        module = SimpleNamespace(facts=lambda: {"archs": archs}, calls=lambda: 0)
        found = {"cuda": (module, ""), "cpu": backends.native("cpu")}
        monkeypatch.setattr(backends, "native", found.get)
        monkeypatch.setattr(backends, "triton", lambda: (SimpleNamespace(INTERPRETED=False), ""))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")

    backends._resolve_device.cache_clear()
    yield there_are
    backends._resolve_device.cache_clear()


SERVED = [
    ("8.0;9.0;10.0+PTX", (7, 5), False),
    ("7.5;8.0;9.0;10.0+PTX", (7, 5), True),
    ("8.0", (8, 6), True),  # machine code serves later minor numbers
    ("8.6", (8, 0), False),
    ("8.0 8.6", (8, 9), True),
    ("8.0;9.0", (10, 0), False),
    ("8.0+PTX", (9, 0), True),  # PTX serves all later architectures
    ("9.0+PTX", (8, 9), False),
    ("9.0a", (9, 0), True),  # "a" serves only this architecture
    ("9.0a+PTX", (10, 0), False),
    ("10.0a+PTX", (10, 3), False),
    ("10.0f", (10, 3), True),  # "f" serves its family
    ("10.0f+PTX", (12, 0), False),
]


@pytest.mark.parametrize(("archs", "capability", "served"), SERVED, ids=str)
def test_a_gpu_without_machine_code_goes_to_triton(gpus, archs, capability, served):
    gpus(archs, capability)
    assert backends.serving(torch.device("cuda", 0)) == ("cuda" if served else "triton")
    with fastadv.backend("triton"):
        assert backends.serving(torch.device("cuda", 0)) == "triton"
    with fastadv.backend("cuda"):
        if served:
            assert backends.serving(torch.device("cuda", 0)) == "cuda"
        else:
            with pytest.raises(RuntimeError, match=rf"built for .*compute capability {capability[0]}\.{capability[1]}"):
                backends.serving(torch.device("cuda", 0))


def test_info_says_which_gpu_is_served_by_what(gpus):
    gpus("8.0;9.0", (9, 0), (7, 5))
    info = fastadv.info()
    assert info["serves"] == {"cpu": "cpu", "cuda:0": "cuda", "cuda:1": "triton"}
    assert info["backends"]["cuda"]["available"]
    assert "cuda:1: it was built for 8.0;9.0" in info["backends"]["cuda"]["why"]
    gpus("8.0;9.0", (9, 0), (8, 6))
    assert fastadv.info()["serves"] == {"cpu": "cpu", "cuda": "cuda"}


def test_a_gpu_that_only_the_reference_can_serve_is_warned_of(gpus, monkeypatch):
    gpus("8.0", (7, 5))
    monkeypatch.setattr(backends, "triton", lambda: (None, "the triton package is not installed"))
    monkeypatch.setattr(backends, "facts", lambda: {"cuda": {"built": True}})
    with pytest.warns(UserWarning, match=r"plain PyTorch.*") as warned:
        assert backends.serving(torch.device("cuda", 0)) == "reference"
    assert "compute capability 7.5" in str(warned[0].message)


def test_backend_is_undone_also_by_an_exception():
    with fastadv.backend("reference"):
        with pytest.raises(ZeroDivisionError), fastadv.backend("cpu"):
            1 / 0  # noqa: B018
        assert rose(one_step) == {"reference"}


def test_backend_is_a_context_variable():
    """The backend of one thread does not affect another thread."""
    inside, done = threading.Event(), threading.Event()

    def hold():
        with fastadv.backend("reference"):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(10)
        with fastadv.backend("cpu"):
            assert rose(one_step) == {"cpu"}
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("images", [torch.zeros(SHAPE, dtype=torch.int64), torch.zeros(SHAPE) > 0, np.zeros(4)])
def test_what_is_no_image_is_not_converted_to_one(images):
    with pytest.raises(TypeError, match="images must be"):
        fastadv.to_float(images)
