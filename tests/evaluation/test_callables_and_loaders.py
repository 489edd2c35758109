"""Functions of others as attacks, which may leave the model in another state, and loaders that repeat their samples."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fastadv.attacks import FGSM, PGDL2
from fastadv.evaluation import AutoAttack, evaluate
from fastadv.nn import Normalized
from fastadv.training import Monitor, TrainStep

EPS = 64 / 255


@pytest.fixture
def judged():
    """(a network whose modes differ much, images, its own labels)."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 4)
    )
    model(3 * torch.rand(64, 3, 4, 4))
    x = torch.rand(40, 3, 4, 4)
    return model, x, model.eval()(x).argmax(1)


def restless(model):
    """FGSM as a tutorial has it: it sets modes, and clears gradients in either way."""

    def attack(images, labels):
        model.eval()
        leaf = images.clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(leaf), labels)
        model.zero_grad(set_to_none=len(labels) % 2 == 0)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        (grad,) = torch.autograd.grad(loss, leaf)
        model.train()
        return (images + EPS * grad.sign()).clamp(0, 1)

    return attack


def test_an_attack_that_ends_in_train_mode_is_judged_in_eval_mode(judged):
    model, x, y = judged
    grads = [torch.rand_like(p) for p in model.parameters()]
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad.clone()
    report = evaluate(model, (x, y), [restless(model), "fgsm"], eps=EPS, ensemble=False, batch_size=16, progress=False)
    theirs, ours = report["attacks"]
    assert 0 < theirs["robust_accuracy"] == ours["robust_accuracy"] < 1
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))


def test_an_attack_that_clears_gradients_keeps_those_of_the_parts_before(judged):
    model, x, y = judged
    model[4].p = 0.0
    steps = [
        TrainStep(model, attack, torch.optim.SGD(model.parameters(), 0.1))
        for attack in (FGSM(model, EPS), restless(model))
    ]
    found = []
    for step in steps:
        for part in (slice(0, 20), slice(20, 40)):
            step.gradients(x[part], y[part], scale=1 / 40, more=part.start == 0)
        found.append([p.grad.clone() for p in model.parameters()])
        step.forget()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours)


class Rows:
    """A data set of rows that is no Dataset of torch's, as of Hugging Face."""

    def __init__(self, x, y, moving=False):
        self.x, self.y, self.moving = x, y, moving

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        image = self.x[row]
        return {"image": image * torch.rand(()) if self.moving else image, "label": self.y[row]}


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


class SharedOut(Stream):
    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        return iter(list(super().__iter__())[worker.id :: worker.num_workers])


LOADERS = {
    "repeats in a list": (lambda x, y: DataLoader(TensorDataset(x, y), sampler=[0, 1, 2, 2]), "with replacement"),
    "in batches": (
        lambda x, y: DataLoader(
            TensorDataset(x, y), batch_sampler=BatchSampler(RandomSampler(x, replacement=True), 8, False)
        ),
        "with replacement",
    ),
    "weighted": (
        lambda x, y: DataLoader(TensorDataset(x, y), 16, sampler=WeightedRandomSampler(x.mean((1, 2, 3)), len(x))),
        "with replacement",
    ),
    "weighted, each once": (
        lambda x, y: DataLoader(
            TensorDataset(x, y), 16, sampler=WeightedRandomSampler(x.mean((1, 2, 3)), len(x), replacement=False)
        ),
        None,
    ),
    "rows, drop_last": (lambda x, y: DataLoader(Rows(x, y), 16, drop_last=True), "gave 32 of the 40"),
    "moving rows": (lambda x, y: DataLoader(Rows(x, y, True), 16), "draws its images anew"),
    "moving rows of a part": (
        lambda x, y: DataLoader(Rows(x, y, True), 16, sampler=SubsetRandomSampler(range(5, 40))),
        "draws its images anew",
    ),
    "a stream read twice": (lambda x, y: DataLoader(Stream(x, y), 8, num_workers=2), "2 workers"),
    "rows": (lambda x, y: DataLoader(Rows(x, y), 16), None),
    "a stream that is shared out": (lambda x, y: DataLoader(SharedOut(x, y), 8, num_workers=2), None),
    "a stream": (lambda x, y: DataLoader(Stream(x, y), 8), None),
}


@pytest.mark.filterwarnings("ignore:the model is right for", "ignore:some of the")
@pytest.mark.parametrize("kind", LOADERS)
def test_what_a_loader_does_to_its_samples_is_told(judged, kind, recwarn):
    model, x, y = judged
    make, message = LOADERS[kind]
    report = evaluate(model, make(x, y), "fgsm", eps=EPS, progress=False)
    assert any(message in note for note in report["warnings"]) if message else not report["warnings"]


def test_samples_without_batches_are_refused_in_words(judged):
    model, x, y = judged
    with pytest.raises(TypeError, match="as of one sample: a DataLoader makes batches"):
        evaluate(model, list(zip(x, y, strict=True)), "fgsm", eps=EPS)


def test_counts_may_be_numpy_s(judged):
    model, x, y = judged
    given = {"batch_size": np.int64(16), "pool": np.int64(32), "seed": np.int64(3)}
    report = evaluate(model, (x, y), "pgd-10", eps=EPS, progress=False, **given)
    plain = evaluate(model, (x, y), "pgd-10", eps=EPS, progress=False, **{name: int(n) for name, n in given.items()})
    assert json.loads(json.dumps(report))["attacks"][0]["fooled"] == plain["attacks"][0]["fooled"]
    attack = AutoAttack(model, eps=EPS, version="custom", attacks_to_run=["apgd-ce"], seed=np.int64(1), verbose=False)
    attack.run_standard_evaluation(x, y, bs=np.int64(16))


@pytest.mark.parametrize(("eps", "message"), [(128.0, "128, of no image"), (8 / 255, "8/255, a length for L-inf")])
def test_lengths_of_l2_in_another_unit_are_told(judged, eps, message):
    model, x, y = judged
    with pytest.warns(UserWarning, match=message):
        PGDL2(model, eps, eps, 1)(x, y)
    with pytest.warns(UserWarning, match=message):
        evaluate(model, (x, y), PGDL2(model, eps, eps, 1), progress=False)


def test_two_normalisations_and_those_of_255_are_told():
    with pytest.warns(UserWarning, match="seems to normalise its input already, in a Normalized"):
        Normalized(Normalized(nn.Flatten(), 0.5, 0.2), 0.5, 0.2)
    with pytest.raises(ValueError, match=r"std is 58, for pixels of \[0, 255\]"):
        Normalized(nn.Flatten(), 0, 58)


def test_lazy_buffers_are_filled_by_an_attack():
    model = nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d(), nn.LazyLinear(4)).eval()
    x, y = torch.rand(8, 3, 4, 4), torch.randint(0, 4, (8,))
    adv = FGSM(model, EPS)(x, y)
    assert 0 < (adv - x).abs().max() <= EPS + 1e-6
    assert model[1].running_mean.shape == (48,)


@pytest.mark.filterwarnings("ignore:the model is right for")
def test_a_monitor_s_probe_is_its_own(judged):
    model, x, y = judged
    monitor = Monitor(model, x, y, FGSM(model, EPS), EPS)
    first = monitor.check()
    x.zero_(), y.zero_()
    assert monitor.check() == first
    with pytest.raises(ValueError, match="training with an L2 attack"):
        Monitor(model, x, y, PGDL2(model, 1.0), EPS)
