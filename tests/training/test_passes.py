"""The passes of a run that are not steps take no more memory than steps: batch parts, precision, layout, copies."""

import collections
import math

import pytest
import torch
from attacked import Net, batch_of, fresh_seed
from attacked import one_thread as one_thread
from dispatched import Allocated
from torch import nn

from fastadv.attacks import FGSM, PMA, Normalized
from fastadv.evaluation import evaluate
from fastadv.evaluation.masking_checks import notes_on_outputs
from fastadv.training import Monitor, Trainer, backbone_robustness, trainable

EPS = 8 / 255
pytestmark = [
    pytest.mark.filterwarnings("ignore:the backbone is not robust"),
    pytest.mark.filterwarnings("ignore:the last .* samples that PMA"),  # may come by chance on an untrained network
]


def small(count, side=8, dtype=torch.uint8):
    images = torch.rand(count, 3, side, side)
    return ((255 * images).to(dtype) if dtype == torch.uint8 else images.to(dtype)), torch.arange(count) % 3


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def fit(model, *parts, **changes):
    settings = {"epochs": 1, "probe": 30, "measure_backbone": True, "progress": False, "device": "cpu", "head": "4"}
    return Trainer(model, changes.pop("eps", EPS), **(settings | changes)).fit(*parts)


def seen_by(model):
    """A list that gets (images, whether under autocast, whether in channels-last) of each later pass."""
    seen = []

    def note(module, args):
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        seen.append((len(args[0]), autocast, args[0].is_contiguous(memory_format=torch.channels_last)))

    model.register_forward_pre_hook(note)
    return seen


def noisy(images, labels):
    return (images + EPS * (2 * torch.rand_like(images) - 1)).clamp(0, 1)


@pytest.mark.parametrize(
    ("batch_size", "grad_accum_steps", "settings"),
    [
        (12, 4, {"method": "linear"}),
        (7, 1, {"method": "full", "attack": "pgd", "ema_decay": 0.9}),
        (9, 2, {"method": "bias", "eval_attack": noisy}),
    ],
)
def test_no_pass_of_a_run_has_more_images_than_a_part_of_a_step(batch_size, grad_accum_steps, settings):
    model = network()
    seen = seen_by(model)
    fit(model, small(40), small(21), small(33), batch_size=batch_size, grad_accum_steps=grad_accum_steps, **settings)
    largest = math.ceil(math.ceil(40 / math.ceil(40 / batch_size)) / grad_accum_steps)
    assert max(count for count, _, _ in seen) == largest


@pytest.mark.filterwarnings("ignore:no prediction")  # two logits in bf16 are sometimes equal
def test_all_passes_of_a_run_are_in_its_precision_and_layout():
    model = network()
    seen = seen_by(model)
    fit(model, small(40), small(21), small(33), batch_size=8, method="bias", precision="bf16", channels_last=True)
    assert {(autocast, layout) for _, autocast, layout in seen} == {(True, True)}


def steady(model, eps):
    return lambda images, labels: (images + eps * (images - 0.5).sign()).clamp(0, 1)


@pytest.mark.parametrize("attack", [None, FGSM, steady])
def test_a_reading_does_not_depend_on_the_parts(attack):
    net, (x, y), seed = Net().double(), batch_of(23, torch.float64), fresh_seed()
    attack = attack and attack(net, EPS)
    readings = [Monitor(net, x, y, attack, EPS, seed=seed, part=part).check() for part in (None, 1, 7, 100)]
    for reading in readings[1:]:
        assert reading.alignment == pytest.approx(readings[0].alignment, rel=1e-9)
        for name in ("probe_pgd", "probe_attack", "abnormal"):
            assert getattr(reading, name) == getattr(readings[0], name)


def test_a_backbone_s_robustness_does_not_depend_on_the_parts():
    net, (x, _), seed = Net().double(), batch_of(90, torch.float64), fresh_seed()
    y = (5 * x.mean((1, 2, 3)).argsort().argsort() / 90).long()
    first, *others = (backbone_robustness(net, x, y, EPS, seed=seed, part=part) for part in (128, 72, 5, 1))
    assert all(other == first for other in others)


# ---------------------------------------------------------------------- copies


def test_measuring_a_backbone_copies_the_images_that_it_looks_at_alone():
    images, labels = small(4000, 16)
    with Allocated() as allocated:
        backbone_robustness(Net0(), images, labels, EPS, fit=100, judge=20, part=10)
    assert 120 * 3 * 256 <= allocated.most < images.nbytes / 10


@pytest.mark.filterwarnings("ignore:epoch 0")  # robust accuracy is 0 at such an eps
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_evaluations_of_a_run_copy_no_whole_part_of_the_data(dtype):
    val, test = small(180, 16, dtype), small(200, 16, dtype)
    with Allocated() as allocated:
        fit(Net0(), small(12, 16, dtype), val, test, batch_size=2, eps=0.5, probe=12, head="2")
    assert allocated.most < test[0].nbytes / 4


class Net0(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(12, 3))


def test_a_copy_of_the_weights_is_no_view_of_them():
    model = network()
    with trainable(model, "full") as tuning:
        before = tuning.state()
        expected = {name: tensor.detach().clone() for name, tensor in tuning.tensors.items()}
        with torch.no_grad():
            for tensor in tuning.tensors.values():
                tensor += 1
    assert before.keys() == expected.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in expected.items())


# ---------------------------------------------------------------------- compilation


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_model_is_compiled_for_the_sizes_of_the_steps_alone(wrapped, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.extend(x.shape[0] for x in inputs if x.ndim == 4 and x.shape[-1] == 8)
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    torch._dynamo.reset()
    model = Normalized(network(), (0.5,) * 3, (0.25,) * 3) if wrapped else network()
    head = "model.4" if wrapped else "4"
    fit(model, small(100), small(70), batch_size=16, probe=40, epochs=2, compile=True, head=head)
    sizes = collections.Counter(compiled)
    assert set(sizes) == {15, 14}  # 100 images in batches of 15 and 14
    assert sizes[14] == 1  # the update only, because attacks fill their batches up
    assert sizes[15] <= 5  # update, attack on cross-entropy, PMA, the backbone's attack, a pass without gradient


# ---------------------------------------------------------------------- evaluate


def test_an_evaluation_s_precision_and_layout_are_those_of_all_its_passes():
    model = network().eval()
    seen = seen_by(model)
    data, options = small(30), {"autocast": torch.bfloat16, "memory_format": torch.channels_last}
    report = evaluate(model, data, ["fgsm", noisy, "apgd-ce"], batch_size=8, progress=False, **options)
    assert {(autocast, layout) for _, autocast, layout in seen} == {(True, True)}
    assert report["settings"]["autocast"] == "torch.bfloat16"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        right = model(data[0].float() / 255).argmax(1) == data[1]
    assert report["clean_correct"] == right.tolist()
    seen.clear()
    evaluate(model, data, ["fgsm", PMA(model, EPS, autocast=torch.bfloat16)], batch_size=8, progress=False)
    assert {autocast for _, autocast, _ in seen} == {False, True}


@pytest.mark.parametrize(
    ("change", "autocast", "told"), [(0.01, None, 1), (0.01, torch.bfloat16, 0), (0.3, torch.bfloat16, 1)]
)
def test_what_bf16_rounds_is_not_taken_for_chance(change, autocast, told):
    outputs, calls = torch.tensor([[1.0, -2.0], [0.5, 0.25]]), []

    def logits(images):
        calls.append(images)
        return outputs + change * (len(calls) % 2)

    warned = list(notes_on_outputs(logits, torch.rand(2, 3, 4, 4), 1, autocast))
    assert sum("random" in words for words in warned) == told
