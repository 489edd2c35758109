"""The ops with streams, graphs, a second device and tensors beyond 2^31 elements, which need a GPU."""

import pytest
import torch
from gpus import needs_gpu

import fastadv
from fastadv.ops import philox_words
from fastadv.training import trainable

pytestmark = needs_gpu

EPS = 8 / 255
gpu_backend = pytest.mark.parametrize("name", ["cuda", "triton"])


def images(*shape, device="cuda", dtype=torch.float32):
    return torch.rand(shape, device=device).to(dtype)


def calls(x, grad, x_adv, seed):
    """name -> a call of every op that returns its result; the seed is a tensor."""
    normalization = fastadv.Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    z = torch.empty_like(x)

    def fgsm_z(out):
        fastadv.fgsm_step(x, grad, EPS, noise=EPS, seed=seed, normalization=normalization, z=z, out=out)
        return z.clone()

    return {
        "random_init": lambda out: fastadv.random_init(x, EPS, seed=seed, out=out),
        "fgsm_step": lambda out: fastadv.fgsm_step(x, grad, EPS, out=out),
        "fgsm_rs": lambda out: fastadv.fgsm_step(x, grad, EPS, noise=EPS, seed=seed, out=out),
        "fgsm_z": fgsm_z,
        "pgd_step": lambda out: fastadv.pgd_step(x_adv, grad, x, alpha=EPS / 4, eps=EPS, out=out),
    }


def tensors(shape=(5, 3, 40, 41), dtype=torch.float32, device="cuda"):
    x = images(*shape, dtype=dtype, device=device)
    return x, torch.randn_like(x), (x + EPS / 2).clamp(0, 1)


@gpu_backend
@pytest.mark.parametrize("op", ["random_init", "fgsm_step", "fgsm_rs", "fgsm_z", "pgd_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["one_seed", "seeds"])
def test_a_captured_op_follows_its_inputs_and_its_seed(name, op, dtype, per_sample):
    x, grad, x_adv = tensors(dtype=dtype)
    seed = torch.arange(5 if per_sample else 1, device="cuda")
    with fastadv.backend(name):
        call, out = calls(x, grad, x_adv, seed)[op], torch.empty_like(x)
        call(out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(out)
        for _ in range(3):
            seed.random_()
            x.copy_(torch.rand_like(x))
            grad.copy_(torch.randn_like(x))
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(result, call(torch.empty_like(x)))
            with fastadv.backend("reference"):
                assert torch.equal(result, call(torch.empty_like(x)))


@gpu_backend
def test_concurrent_streams(name):
    """The calls of each stream wait for the results of this stream only."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    made = [tensors() for _ in streams]
    seeds = [torch.tensor([i], device="cuda") for i in range(len(streams))]
    torch.cuda.synchronize()
    results = []
    with fastadv.backend(name):
        for _ in range(5):
            for stream, (x, grad, x_adv), seed in zip(streams, made, seeds, strict=True):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(100_000)  # the inputs of the stream come late
                    late = [t.clone() for t in (x, grad, x_adv)]
                    results.append([call(torch.empty_like(x)) for call in calls(*late, seed).values()])
    torch.cuda.synchronize()
    with fastadv.backend("reference"):
        for i, got in enumerate(results):
            x, grad, x_adv = made[i % len(streams)]
            want = [call(torch.empty_like(x)) for call in calls(x, grad, x_adv, seeds[i % len(streams)]).values()]
            assert all(map(torch.equal, got, want))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs an NVIDIA GPU beside the first one")
@gpu_backend
def test_another_device_than_the_current_one(name):
    x, grad, x_adv = tensors(device="cuda:1")
    seed = torch.tensor([3], device="cuda:1")
    for call in calls(x, grad, x_adv, seed).values():
        with fastadv.backend(name):
            got = call(torch.empty_like(x))
        with fastadv.backend("reference"):
            assert torch.equal(got, call(torch.empty_like(x)))
    assert torch.cuda.current_device() == 0


BEYOND = 2**31 + 8 * 1001 + 3


@gpu_backend
def test_steps_beyond_2_to_the_31_elements(name):
    """The first elements, the last, and the elements around 2^31, against the reference on these slices."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs an NVIDIA GPU with 20 GiB free")
    x = torch.rand(BEYOND, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(BEYOND, device="cuda", dtype=torch.bfloat16)
    with fastadv.backend(name):
        out = fastadv.fgsm_step(x, grad, EPS)
        again = fastadv.pgd_step(out, grad, x, alpha=EPS, eps=EPS / 2)
    for part in (slice(0, 4096), slice(2**31 - 4096, 2**31 + 4096), slice(BEYOND - 4096, BEYOND)):
        with fastadv.backend("reference"):
            assert torch.equal(out[part], fastadv.fgsm_step(x[part], grad[part], EPS))
            assert torch.equal(again[part], fastadv.pgd_step(out[part], grad[part], x[part], alpha=EPS, eps=EPS / 2))


@gpu_backend
def test_noise_beyond_2_to_the_31_elements(name):
    """Around 0.5 the noise of the last whole groups is exactly the generator's."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs an NVIDIA GPU with 20 GiB free")
    x = torch.full((BEYOND,), 0.5, device="cuda")
    with fastadv.backend(name):
        out = fastadv.random_init(x, 2.0**-7, seed=99)
    assert out.isfinite().all()
    first = BEYOND // 8 - 100
    words = philox_words("reference", 99, first, 100)
    h = torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)
    assert torch.equal(out[8 * first : 8 * first + 800].double().cpu(), 0.5 + (2 * h - 65535).double() * 2.0**-23)


def test_copies_of_weights_lie_on_the_host():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 12), torch.nn.BatchNorm1d(12)).cuda()
    with trainable(model, "full") as tuning:
        before = torch.cuda.memory_allocated()
        state = tuning.state()
        assert torch.cuda.memory_allocated() == before
        assert {t.device.type for t in state.values()} == {"cpu"}
        expected = {name: t.detach().cpu() for name, t in tuning.tensors.items()}
        with torch.no_grad():
            for t in tuning.tensors.values():
                t += 1
        tuning.load(state)
        assert all(torch.equal(t.detach().cpu(), expected[name]) for name, t in tuning.tensors.items())
