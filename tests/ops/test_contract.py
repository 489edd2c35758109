"""The ops against the numeric contract, on whole random calls: every backend and the reference equal, bit for bit, an
oracle that shares no code with them."""

import itertools
import time
from dataclasses import replace

import numpy as np
import oracle
import pytest
import strategies as s
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import fastadv
from fastadv.ops import backends


def settings_for(name):
    """Triton's interpreter takes 20 ms or more for a call: it gets fewer examples, and failures are not shrunk."""
    if name != "triton" or torch.cuda.is_available():
        return settings()
    return settings(phases=[Phase.generate], max_examples=max(1, 2 * settings().max_examples // 3))


def calls():
    return dict(fastadv.info()["calls"])


def bits(call):
    """Every byte of every tensor that the call reads, with the gaps in memory."""
    return torch.cat([s.whole_storage(s.on(t, "cpu")).view(torch.uint8) for t in call.everything()])


def check(call, backend, device, want, want_z=None, **model_input):
    """Run the call with out= on the backend and check everything that it may have touched."""
    call = call.on(device)
    inputs, before = bits(call), calls()
    with fastadv.backend(backend):
        result = call.run(fastadv, out=call.out, **model_input)
    after = calls()
    assert result is call.out
    assert torch.equal(bits(call), inputs), "an input was changed"
    for written, expected in ((result, want), (model_input.get("z"), want_z)):
        if written is None:
            continue
        got = oracle.values(written)
        assert oracle.same(got, expected), oracle.mismatch(got, expected)
        outside = s.on(written, "cpu")
        outside.fill_(torch.nan)
        assert s.whole_storage(outside).isnan().all(), "written outside of it"
    if result.numel():
        rose = {name for name in after if after[name] != before.get(name, 0)}
        assert rose == {backend}


@pytest.mark.parametrize("op", s.OPS)
def test_every_backend_equals_the_oracle(backend, op):
    """With z the image is the same, and z is the model input for its stored values."""
    name, device = backend

    @settings_for(name)
    @given(s.cases(op), st.none() | s.model_inputs())
    def prop(case, model_input):
        call = case.call()
        want = call.run(oracle, dtype=case.out)
        if model_input is None:
            check(call, name, device, want)
            return
        normalization, z = model_input.made(case)
        want_z = oracle.model_input(want, normalization.mean, normalization.std, call.compute_type(), z.dtype)
        check(call, name, device, want, want_z, normalization=normalization, z=s.on(z, device))

    prop()


@pytest.mark.parametrize("op", s.OPS)
def test_allocated_result_equals_the_oracle(native, op):
    """Without out= the op chooses the dtype, and the strides of `empty_like`; native backends share this code."""
    name, device = native

    @given(s.cases(op).map(s.without_out))
    def prop(case):
        call = case.call()
        want = call.run(oracle)
        call = call.on(device)
        with fastadv.backend(name):
            result = call.run(fastadv)
        assert result.dtype == case.out
        assert result.stride() == torch.empty_like(call.tensors["x_adv" if op == "pgd_step" else "x"]).stride()
        got = oracle.values(result)
        assert oracle.same(got, want), oracle.mismatch(got, want)

    prop()


def test_fgsm_starts_from_what_random_init_returned(backend):
    """For every dtype of x and out the step starts from exactly the image that the model saw."""
    name, device = backend

    @settings_for(name)
    @given(s.cases("fgsm_step"), st.sampled_from((8 / 255, 0.25, 3.0)))
    def prop(case, noise):
        if case.params["noise"][0] == 0:
            case = replace(case, params={**case.params, "noise": (noise, "number")})
        case = replace(case, project=True)
        call = case.call()
        a, t = call.arguments, call.tensors
        # The scale of a case may round the noise to the number 0; then the step starts from x, even outside the box.
        assume(torch.is_tensor(a["noise"]) or a["noise"] != 0)
        eps, alpha = a["eps"], a["eps"] if a["alpha"] is None else a["alpha"]
        with fastadv.backend("reference"):
            start = fastadv.random_init(t["x"], a["noise"], seed=a["seed"], clip=a["clip"])
            two = torch.empty_like(call.out)
            fastadv.pgd_step(start, t["grad"], t["x"], alpha=alpha, eps=eps, clip=a["clip"], out=two)
        call = call.on(device)
        with fastadv.backend(name):
            call.run(fastadv, out=call.out)
        got, want = oracle.values(call.out), oracle.values(two)
        assert oracle.same(got, want), oracle.mismatch(got, want)

    prop()


@pytest.mark.parametrize("seeds", ["one", "each"])
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 128, 96), (3, 2, 48, 64)], ids=str)
def test_images_of_whole_blocks(kernel, shape, seeds):
    """Channels of 4096 and 12288 elements are whole blocks, also of the widest block; with 3072 only images are."""
    name, device = kernel
    x, grad = torch.rand(shape), torch.randn(shape)
    seed = 5 if seeds == "one" else torch.arange(shape[0]) - 1
    normalization = fastadv.Normalization((0.4, 0.5, 0.6)[: shape[1]], (0.2, 0.25, 0.3)[: shape[1]])

    def call(device):
        options = {"seed": seed if seeds == "one" else seed.to(device), "normalization": normalization}
        z, image = torch.empty(shape, device=device), x.to(device)
        return fastadv.fgsm_step(image, grad.to(device), 8 / 255, alpha=0.02, noise=8 / 255, z=z, **options), z

    with fastadv.backend("reference"):
        want = call("cpu")
    with fastadv.backend(name):
        got = call(device)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


def budgets(shape, kind, rng):
    """eps as a tensor, of which one entry is NaN if it has more than two."""
    size = {"0d": (), "N": shape[:1], "NC": shape[:2]}[kind]
    eps = rng.uniform(0.01, 0.1, size)
    if size and eps.size > 2:
        eps.flat[1] = np.nan
    return torch.from_numpy(eps.reshape(size + (1,) * (len(shape) - len(size)) if size else size)).float()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("kind", ["0d", "N", "NC"])
@pytest.mark.parametrize("shape", [(5, 3, 17, 19), (3, 2, 33, 31), (40, 65), (9, 7), (3, 4, 16, 16)], ids=str)
def test_budgets_change_wherever_they_do(native, shape, kind, layout):
    """eps changes within a tile, at its end or beyond it; the kernel reads one value for a stretch, or an array."""
    name, device = native
    rng = np.random.default_rng()
    t = {k: s.laid_out(rng.random(shape), torch.float32, layout, rng) for k in ("x", "x_adv", "grad")}
    eps, seeds = budgets(shape, kind, rng), torch.from_numpy(rng.integers(-(2**63), 2**63, shape[0]))
    normalization = fastadv.Normalization(rng.random(shape[1]).tolist(), 0.3)

    def results(device):
        x, x_adv, grad = (s.on(v, device) for v in t.values())
        e, seed, z = eps.to(device), seeds.to(device), torch.empty(shape, device=device)
        yield fastadv.pgd_step(x_adv, grad, x, alpha=0.03, eps=e, normalization=normalization, z=z)
        yield z
        yield fastadv.fgsm_step(x, grad, 0.1, alpha=e, noise=e, seed=7, project=False)
        yield fastadv.random_init(x, e, seed=seed, clip=(e.nan_to_num(0), 0.9))

    with fastadv.backend("reference"):
        want = list(results("cpu"))
    with fastadv.backend(name):
        got = list(results(device))
    for a, b in zip(got, want, strict=True):
        assert oracle.same(oracle.values(a), oracle.values(b)), oracle.mismatch(oracle.values(a), oracle.values(b))


@pytest.mark.parametrize("eps", ["number", "each"])
def test_triton_takes_more_samples_than_a_grid_has_rows(monkeypatch, eps):
    """It needs several launches. The limit is 3 samples here, because the interpreter takes minutes for 65,536."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, grad, seed = torch.rand(7, 2, 5), torch.randn(7, 2, 5), torch.arange(7) * 2**40
    eps = 0.1 if eps == "number" else torch.rand(7, 1, 1) / 10
    normalization = fastadv.Normalization((0.4, 0.5), 0.3)

    def results(device):
        image, e = x.to(device), eps.to(device) if torch.is_tensor(eps) else eps
        options = {"seed": seed.to(device), "normalization": normalization, "z": torch.empty_like(image)}
        return fastadv.fgsm_step(image, grad.to(device), e, noise=e, **options), options["z"]

    with fastadv.backend("reference"):
        want = results("cpu")
    with fastadv.backend("triton"):
        monkeypatch.setattr(backends.triton()[0], "MOST_SAMPLES", 3)
        got = results(device)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("op", s.OPS)
def test_a_budget_for_each_sample_costs_what_one_costs(op):
    """The bytes are the same, so the time on the CPU is at most twice. (Arrays of parameters take eight times.)"""
    x, grad, out = torch.rand(128, 3, 32, 32), torch.randn(128, 3, 32, 32), torch.empty(128, 3, 32, 32)
    call = {
        "random_init": lambda eps: fastadv.random_init(x, eps, seed=1, out=out),
        "fgsm_step": lambda eps: fastadv.fgsm_step(x, grad, eps, out=out),
        "pgd_step": lambda eps: fastadv.pgd_step(x, grad, x, alpha=0.01, eps=eps, out=out),
    }[op]
    budgets = {"number": 0.03, "0-dim": torch.tensor(0.03), "each": torch.full((128, 1, 1, 1), 0.03)}
    least, threads = dict.fromkeys(budgets, float("inf")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(40):
            for name, eps in budgets.items():
                begin = time.thread_time()
                call(eps)
                least[name] = min(least[name], time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    assert max(least.values()) < 2 * least["number"], least


@given(s.cases("random_init"), s.model_inputs())
def test_normalization_equals_the_oracle(case, model_input):
    """A normalisation that is called on an image gives what the steps write to z."""
    normalization, z = model_input.made(case)
    w = case.call().out.zero_()
    w += torch.randn(w.shape).to(w)
    c = oracle.compute_type(w.dtype)
    want = oracle.model_input(oracle.values(w), normalization.mean, normalization.std, c, z.dtype)
    got = normalization(w, z.dtype)
    assert got.dtype == z.dtype
    assert normalization(w).dtype == w.dtype
    assert oracle.same(oracle.values(got), want), oracle.mismatch(oracle.values(got), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_of_16_bits(kernel, dtype):
    """In Triton's interpreter, which is slow, every third call is run: they have each op and each radius."""
    name, device = kernel
    step = 3 if name == "triton" and device == "cpu" else 1
    for call in itertools.islice(s.calls_on_every_16_bit_value(dtype, device), 0, None, step):
        with fastadv.backend("reference"):
            want = call()
        with fastadv.backend(name):
            assert torch.equal(call(), want), call
