"""The random bits: Random123's published vectors, the generator of every backend, and the bits in the noise."""

import numpy as np
import oracle
import pytest
import torch

import fastadv
from fastadv import ops

# Random123, tests/kat_vectors, the lines "philox4x32 10": counter, key, result.
PUBLISHED = (
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
)
SEEDS = (0, 1, -1, 2**63, -(2**63), 0x299F31D0A4093822, 2**64 - 1)


def halves_of(start):
    """h from random_init(zeros, 1.0) in float64 with an open box, where the noise is exactly (2h - 65535) / 65536."""
    k = oracle.values(start) * 65536
    assert np.array_equal(k, np.rint(k))
    assert np.all(k % 2 == 1)
    return ((k + 65535) / 2).astype(np.int64)


def drawn(backend, x, seed):
    name, device = backend
    if isinstance(seed, torch.Tensor):
        seed = seed.to(device)
    with fastadv.backend(name):
        return halves_of(fastadv.random_init(x.to(device), 1.0, seed=seed, clip=(-np.inf, np.inf)))


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize("line", PUBLISHED, ids=("zeros", "ones", "pi"))
def test_oracle_has_the_published_vectors(line):
    w = [int(word, 16) for word in line.split()]
    assert [int(v) for v in oracle.philox4x32(w[:4], w[4:6])] == w[6:]


def test_backend_has_the_published_vector(backend):
    """Only the published vector of zeros has a counter that can be a noise group."""
    name, device = backend
    want = [int(word, 16) for word in PUBLISHED[0].split()[6:]]
    with fastadv.backend(name):
        assert ops.philox_words(name, 0, 0, 1, device).tolist() == [want]
    low_high = [h for w in want for h in (w & 0xFFFF, w >> 16)]
    assert drawn(backend, zeros(8), 0).tolist() == low_high


@pytest.mark.parametrize("first", [0, 1, 2**32 - 3, 2**32, 2**40, 2**61 - 8], ids=lambda g: f"group{g:#x}")
def test_backend_generator_at_any_group(backend, first):
    name, device = backend
    rng = np.random.default_rng()
    for seed in (*SEEDS, int(rng.integers(-(2**63), 2**63))):
        got = ops.philox_words(name, seed, first, 7, device)
        want = oracle.philox_groups(seed, first + np.arange(7))
        assert got.dtype == torch.int64
        assert np.array_equal(got.cpu().numpy(), want), f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_backend_draws_the_oracle_bits(backend, seed):
    x = zeros(1021)
    assert np.array_equal(drawn(backend, x, seed), oracle.halves(x, seed))


def test_seed_forms_agree(backend):
    """An int, the int plus 2^64, a 0-dim tensor and a one-element tensor are the same seed."""
    x, seed = zeros(5, 3), int(np.random.default_rng().integers(-(2**63), 0))
    forms = (seed, seed + 2**64, torch.tensor(seed), torch.tensor([seed]))
    first, *others = (drawn(backend, x, form) for form in forms)
    assert np.array_equal(first, oracle.halves(x, seed))
    for other in others:
        assert np.array_equal(first, other)


def test_noise_follows_the_position_not_the_layout_of_out(backend):
    """Channels-last has its own order; the layouts of out, grad and x_adv do not matter."""
    name, device = backend
    x = zeros(2, 3, 5, 4).to(memory_format=torch.channels_last)
    order = drawn(backend, zeros(2 * 3 * 5 * 4), 11).reshape(2, 5, 4, 3).transpose(0, 3, 1, 2)
    assert np.array_equal(drawn(backend, x, 11), order)
    out = zeros(2, 3, 5, 4).to(device)
    with fastadv.backend(name):
        fastadv.random_init(x.to(device), 1.0, seed=11, clip=(-np.inf, np.inf), out=out)
    assert out.is_contiguous()
    assert np.array_equal(halves_of(out), order)


def test_a_sample_does_not_know_its_neighbours(backend):
    """With per-sample seeds a sample has the same noise alone and in any batch, in any layout."""
    name, device = backend
    rng = np.random.default_rng()
    for shape, layout in (
        ((5, 3, 7, 3), "contiguous"),
        ((4, 3, 5, 5), "channels_last"),
        ((3, 11), "sliced"),
        ((6,), ""),
    ):
        x = torch.rand(shape, dtype=torch.float32)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        elif layout == "sliced":
            x = torch.rand(6, 33)[::2, 1::3]
        seed = torch.from_numpy(rng.integers(-(2**63), 2**63, shape[0]))
        if shape[0] > 2:
            seed[2] = seed[0]  # two samples with one seed
        x, seed = x.to(device), seed.to(device)
        with fastadv.backend(name):
            whole = fastadv.random_init(x, 0.2, seed=seed)
            for n in range(shape[0]):
                one = fastadv.random_init(x[n : n + 1], 0.2, seed=seed[n])
                assert oracle.same(oracle.values(whole[n : n + 1]), oracle.values(one)), (shape, layout, n)
        assert oracle.same(oracle.values(whole), oracle.random_init(x.cpu(), 0.2, seed=seed.cpu()))


def test_all_65536_levels_uniformly(kernel):
    """A chi-square test over every level, with 2^21 draws; in the interpreter 2^14 draws over 256 bins."""
    slow = kernel == ("triton", "cpu")
    seed = int(np.random.default_rng().integers(2**62))
    h = drawn(kernel, zeros(1 << 14 if slow else 1 << 21), seed)
    assert h.min() >= 0
    assert h.max() <= 65535
    for values, bins in ((h >> 8, 256), (h & 255, 256)) + (() if slow else ((h, 65536),)):
        count = np.bincount(values, minlength=bins)
        expected = h.size / bins
        chi2 = ((count - expected) ** 2 / expected).sum()
        # A deviation of six standard deviations comes by chance about once in a million runs.
        assert abs(chi2 - (bins - 1)) < 6 * np.sqrt(2 * (bins - 1)), f"seed {seed}, {bins} bins: {chi2}"
    if not slow:
        assert np.count_nonzero(np.bincount(h, minlength=65536)) == 65536, f"seed {seed}"


def test_noise_is_symmetric_and_independent(backend):
    slow = backend == ("triton", "cpu")
    n = 1 << 13 if slow else 1 << 17
    seed = int(np.random.default_rng().integers(2**62))
    k = 2 * drawn(backend, zeros(n), seed) - 65535
    u = k / 65536
    assert abs(u.mean()) < 6 * np.sqrt(1 / 3 / n), seed
    assert abs((u**2).mean() - 1 / 3) < 6 * np.sqrt(4 / 45 / n), seed
    other = (2 * drawn(backend, zeros(n), seed + 1) - 65535) / 65536
    for v in (np.roll(u, 1), np.roll(u, 8), other):  # neighbours, neighbouring groups, neighbouring seeds
        assert abs((u * v).mean()) < 6 / 3 / np.sqrt(n), seed


@pytest.mark.parametrize("seed", SEEDS)
def test_sample_seeds_are_the_oracles(seed):
    rng = np.random.default_rng()
    index = np.concatenate([[0, 1, -1, 2**32 - 1, 2**32, 2**63 - 1], rng.integers(-(2**63), 2**63, 50)])
    for restart in (0, 1, 3, 2**32 - 1, int(rng.integers(2**31))):
        got = fastadv.sample_seeds(seed, torch.from_numpy(index), restart)
        assert got.dtype == torch.int64
        assert got.shape == index.shape
        assert np.array_equal(got.numpy(), oracle.sample_seeds(seed, index, restart)), restart


def test_sample_seeds_have_a_published_relative():
    """The seed of counter (0, 0, 0, 1) has the words of an independent scalar Philox, in the stated order."""
    w = oracle.philox4x32((0, 0, 0, 1), (0, 0))
    got = int(fastadv.sample_seeds(0, torch.tensor([0]))[0]) & oracle.M64
    assert got == int(w[0]) | int(w[1]) << 32


def test_restarts_and_indices_have_different_seeds():
    index = torch.arange(4096)
    seeds = torch.cat([fastadv.sample_seeds(7, index, restart) for restart in range(4)])
    assert seeds.unique().numel() == seeds.numel()


def test_manual_seed_reproduces_the_seeds_that_are_drawn():
    x = torch.rand(3, 5)

    def draw():
        return fastadv.random_init(x, 0.5), fastadv.random_init(x, 0.5), fastadv.new_seed("cpu")

    torch.manual_seed(4)
    first, second, seed = draw()
    torch.manual_seed(4)
    for a, b in zip((first, second, seed), draw(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first, second)
    assert seed.dtype == torch.int64
    assert seed.numel() == 1
    assert torch.equal(fastadv.random_init(x, 0.5, seed=seed), fastadv.random_init(x, 0.5, seed=int(seed)))
