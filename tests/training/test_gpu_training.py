"""Training on a GPU gives the weights and records that it gives on the CPU."""

from contextlib import contextmanager
from itertools import count
from unittest.mock import patch

import pytest
import timm
import torch
from fitted import drawn, timeless
from gpus import needs_gpu
from torch import nn

from fastadv.attacks import Normalized
from fastadv.training import Trainer
from fastadv.training.batches import Batches
from fastadv.training.fast import FAST

pytestmark = [pytest.mark.filterwarnings(f"ignore:{told}") for told in ("the steps", "the last", "accuracy under")]

COUNT, CLASSES = 23, 3
BATCHED = {"epochs": 4, "batch_size": 8}
SINGLE = ("fgsm", "fgsm-rs", "nfgsm", "zerograd")
OF_ATTACKS = {"free": {"repeats": 3}, "cached": {"method": "linear"}, "pgd": {"steps": 3, "alpha": 4 / 255}}
OPTIONS = {
    "augment": {"augment": True},
    "channels_last": {"channels_last": True},
    "clean_weight": {"clean_weight": 0.5, "label_smoothing": 0.1},
    "ema": {"ema_decay": 0.9, "max_grad_norm": 0.5},
    "parts": {"grad_accum_steps": 2, "optimizer": "sgd"},
    "lp_ft": {"lp_ft": 2, "eps_schedule": "linear"},
    "refresh": {"attack": "stale", "refresh": 2, "augment": True},
    "price": {"attack": "stale", "price": 1.3},
}


@pytest.fixture(params=[pytest.param("cuda", marks=needs_gpu)])
def device(request):
    return request.param


@pytest.fixture
def data():
    return drawn(COUNT, CLASSES, 16)


def conv():
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Tanh()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES))


def vit():
    size = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **size)


NETWORKS = {"conv": conv, "vit": vit}
METHODS = [("conv", "full"), ("conv", "linear"), ("conv", "bias"), ("conv", "norm"), ("conv", "lora")]
METHODS += [("vit", "full"), ("vit", "adapter"), ("vit", "prompt"), ("vit", "ia3"), ("vit", "lora")]


def trained(data, device, network="conv", attack="fgsm", dtype=torch.float64, **changes):
    """(weights and buffers on the CPU, records without times)."""
    torch.manual_seed(0)
    model = Normalized(NETWORKS[network]().to(dtype), 0.5, 0.25)
    images, labels = data
    settings = BATCHED | {"lr": 0.01, "probe": 8, "seed": 5} | changes
    trainer = Trainer(model, 8 / 255, attack=attack, device=device, progress=False, **settings)
    records = trainer.fit((images.to(dtype), labels), (images[:9].to(dtype), labels[:9]))
    return {name: value.cpu() for name, value in model.state_dict().items()}, timeless(records)


@contextmanager
def stopped_at(batch):
    """Ctrl-C when the run loads its batch of this number."""
    numbers, load = count(1), Batches.load

    def stopping(*arguments):
        if next(numbers) == batch:
            raise KeyboardInterrupt
        return load(*arguments)

    with patch.object(Batches, "load", stopping):
        yield


def alike(data, device, **settings):
    expected, records = trained(data, "cpu", **settings)
    weights, found = trained(data, device, **settings)
    torch.testing.assert_close(weights, expected, rtol=1e-7, atol=1e-7)
    flat, known = [torch.utils._pytree.tree_flatten(value) for value in (found, records)]
    assert flat[1] == known[1]
    for value, wanted in zip(flat[0], known[0], strict=True):
        if isinstance(wanted, float):
            assert value == pytest.approx(wanted, rel=1e-5, abs=1e-5, nan_ok=True)
        else:
            assert value == wanted


@pytest.mark.parametrize("attack", [*SINGLE, "pgd", *FAST])
def test_every_attack(data, device, attack):
    alike(data, device, attack=attack, **OF_ATTACKS.get(attack, {}))


@pytest.mark.parametrize(("network", "method"), METHODS)
def test_every_method(data, device, network, method):
    alike(data, device, network=network, method=method)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option(data, device, options):
    alike(data, device, **OPTIONS[options])


@pytest.mark.parametrize("attack", ["fgsm", "stale", "fgsm-pgi"])
def test_bfloat16_moves_the_weights_as_far(data, device, attack):
    """The CPU in float32 beside the device in bfloat16: the updates have one direction."""
    start = trained(data, "cpu", attack=None, epochs=1, lr=0.0, dtype=torch.float32)[0]
    moved = []
    for where, precision in (("cpu", "no"), (device, "bf16")):
        weights, _ = trained(data, where, attack=attack, dtype=torch.float32, precision=precision)
        moved.append(torch.cat([(weights[k] - start[k]).flatten() for k in weights if weights[k].is_floating_point()]))
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.9


def test_a_run_goes_on_on_the_other_device(data, device, tmp_path):
    settings = {"attack": "stale", "refresh": 2, "augment": True}
    expected, _ = trained(data, device, **settings)
    torch.manual_seed(0)
    model = Normalized(conv().double(), 0.5, 0.25)
    options = BATCHED | {"lr": 0.01, "probe": 8, "seed": 5, "progress": False, "folder": tmp_path} | settings
    val = data[0][:9], data[1][:9]

    with pytest.raises(KeyboardInterrupt), stopped_at(batch=8):
        Trainer(model, 8 / 255, device="cpu", checkpoint_s=0.0, **options).fit(data, val)
    torch.manual_seed(0)
    model = Normalized(conv().double(), 0.5, 0.25)
    Trainer(model, 8 / 255, device=device, resume=True, **options).fit(data, val)
    found = {name: value.cpu() for name, value in model.state_dict().items()}
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
