"""Training in loops of one's own: what is left over, what computes its gradient late, and what cannot train."""

import re
import warnings

import pytest
import torch
from torch import nn

from fastadv import fgsm_step, fgsm_step_, random_init
from fastadv.attacks import FGSM, PGDL2
from fastadv.attacks.samplewise import scalar
from fastadv.data.common import common_images
from fastadv.training import Monitor, Trainer, TrainStep, trainable

EPS = 8 / 255


def net(classes=4):
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, classes))


def batch(n=16, classes=4):
    return torch.rand(n, 3, 4, 4), torch.randint(0, classes, (n,))


def test_a_step_does_not_begin_with_gradients_that_are_left_over():
    model, (x, y) = net(), batch()
    head = TrainStep(model, None, torch.optim.SGD(model[3].parameters(), 0.1))
    for _ in range(3):
        head.gradients(x, y)
        head.apply()
    whole = TrainStep(model, None, torch.optim.SGD(model.parameters(), 0.1))
    whole.gradients(x, y)
    wanted = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("attacked", [False, True])
def test_labels_beyond_the_classes_and_a_single_logit_are_refused(attacked):
    x, y = batch(classes=6)
    y[3] = 5
    model = net()
    step = TrainStep(model, FGSM(model, EPS) if attacked else None, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="labels must be below the model's 4 classes, got 5"):
        step.gradients(x, y)
    model = net(1)
    step = TrainStep(model, None, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"returns one logit, \(16, 1\).*torch\.cat"):
        step.gradients(x, y * 0)


def test_several_outputs_are_refused_without_naming_an_option_that_a_step_has_not():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = net(), net()

        def forward(self, x):
            return self.one(x), self.other(x)

    model = Heads()
    step = TrainStep(model, None, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TypeError, match="For other outputs an attack takes loss="):
        step.gradients(*batch())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_step_computes_gradients_wherever_it_is_called(context):
    model, (x, y) = net(), batch()
    step = TrainStep(model, FGSM(model, EPS), torch.optim.SGD(model.parameters(), 0.1))
    with context():
        step.gradients(x, y)
    found = [p.grad.clone() for p in model.parameters()]
    step.forget()
    step.gradients(x, y)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), found, strict=True))


def test_a_frozen_model_is_told_that_there_is_nothing_to_train():
    model, (x, y) = net(), batch()
    step = TrainStep(model, None, torch.optim.SGD(model.parameters(), 0.1))
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no parameter that requires grad, so there is nothing to train"):
        step.gradients(x, y)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_may_compute_the_gradients_within_the_step(named, make):
    pytest.importorskip("peft")
    losses = []
    for closed in (True, False) if make is torch.optim.SGD else (True,):
        model, (x, y) = net(), batch()
        x, y = torch.linspace(0, 1, 768).reshape(16, 3, 4, 4), torch.arange(16) % 4
        torch.manual_seed(0)
        with trainable(model, "lora", head="3", example=x[:2]) as tuning:
            optimizer = make([p for _, p in tuning.parameters], 0.05)

            def closure(model=model, optimizer=optimizer, x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            for _ in range(3):
                if not closed:
                    closure()
                    optimizer.step()
                elif named:
                    optimizer.step(closure=closure)
                else:
                    optimizer.step(closure)
        losses.append(nn.functional.cross_entropy(model(x), y).item())
    assert losses[0] == losses[-1] < nn.functional.cross_entropy(net()(x), y).item()


@pytest.mark.parametrize("step", [fgsm_step, fgsm_step_])
def test_a_seed_without_its_noise_is_refused(step):
    x, grad = torch.rand(4, 3, 4, 4), torch.randn(4, 3, 4, 4)
    with pytest.raises(ValueError, match="noise is missing: with a seed, pass the noise"):
        step(x, grad, EPS, alpha=EPS, seed=5)
    zero = step(x.clone(), grad, EPS, alpha=EPS, noise=0.0, seed=5)  # as a schedule may have it
    assert torch.equal(zero, step(x.clone(), grad, EPS, alpha=EPS))


def test_steps_of_nested_tensors_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their API is a prototype
        nested = torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(2, 4)])
    with pytest.raises(TypeError, match=r"strided \(dense\) tensor, got a nested one"):
        random_init(nested, EPS, seed=1)


def test_a_seed_of_numpy_is_a_number():
    """A captured graph turns a number into a tensor that each call fills anew; what is no int would stay in it."""
    np = pytest.importorskip("numpy")
    assert type(scalar(np.int64(7))) is int
    assert scalar(np.int64(7)) == 7


def told(known, dtype=torch.uint8):
    """What a fit says, as (images again, images of the part, part, earlier part), of `known` images from elsewhere.

    Args:
        known: {(part, earlier part): how many of its 40 images the part has from the earlier one}.
        dtype: of the parts other than the training images, which are uint8.
    """
    parts = {name: torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8) for name in ("train", "val", "test")}
    for (name, earlier), count in known.items():
        parts[name][torch.randperm(40)[:count]] = parts[earlier][torch.randperm(40)[:count]]
    held = [parts[name] if dtype == torch.uint8 else parts[name].to(dtype) / 255 for name in ("val", "test")]
    labels = torch.arange(40) % 4
    trainer = Trainer(net(), EPS, epochs=1, probe=0, measure_backbone=False, progress=False, device="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit((parts["train"], labels), *((images, labels) for images in held))
    found = [
        re.match(r"(\d+) of the (\d+) images of (\w+) are images of (\w+) as well", str(w.message)) for w in caught
    ]
    return [match.groups() for match in found if match]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_training_tells_which_images_judge_that_it_knows(dtype):
    assert told({}, dtype) == []
    assert told({("val", "train"): 7}, dtype) == [("7", "40", "val", "train")]
    assert told({("test", "train"): 1, ("val", "train"): 0}, dtype) == [("1", "40", "test", "train")]
    assert told({("test", "val"): 40}, dtype) == [("40", "40", "test", "val")]


def test_that_the_validation_images_are_the_test_images_where_there_are_no_others_is_no_repetition():
    (x, y), (held, labels) = batch(), batch()
    trainer = Trainer(net(), EPS, epochs=1, probe=0, measure_backbone=False, progress=False, device="cpu")
    trainer.fit((x, y), (held, labels))  # warnings are errors here


@pytest.mark.parametrize("kind", ["trainer", "monitor", "step"])
def test_a_name_that_would_act_on_nothing_is_refused(kind):
    model, (x, y) = net(), batch()
    made = {
        "trainer": lambda: Trainer(model, EPS, device="cpu"),
        "monitor": lambda: Monitor(model, x, y, None, EPS),
        "step": lambda: TrainStep(model, None, torch.optim.SGD(model.parameters(), 0.1)),
    }[kind]()
    for name in ("epochs", "lr", "batch_size"):
        with pytest.raises(AttributeError, match=name):
            setattr(made, name, 3)
    if kind == "monitor":
        for name in ("eps", "steps", "model"):
            with pytest.raises(AttributeError, match=name):
                setattr(made, name, getattr(made, name))


def test_an_attack_that_is_assigned_to_a_monitor_is_any_that_it_takes():
    model, (x, y) = net(), batch()
    monitor = Monitor(model, x, y, None, EPS)
    shift = torch.rand_like(x) * EPS
    monitor.attack = lambda images, labels: (images + shift).clamp(0, 1)
    reading = monitor.check()
    assert reading.probe_attack == (model((x + shift).clamp(0, 1)).argmax(1) == y).float().mean().item()
    with pytest.raises(TypeError, match="attack must be"):
        monitor.attack = "fgsm"
    with pytest.raises(ValueError, match="L2"):
        monitor.attack = PGDL2(model, 0.5)


def test_a_monitor_warns_of_an_attack_of_another_budget():
    model, (x, y) = net(), batch()
    with pytest.warns(UserWarning, match=r"the attack has eps 0\.0627451, and the monitor's PGD 0\.0313725"):
        Monitor(model, x, y, FGSM(model, 2 * EPS), EPS)
    Monitor(model, x, y, FGSM(model, EPS), EPS)


@pytest.mark.parametrize(("count", "is_told"), [(100, True), (101, False)])
def test_a_known_image_matters_from_a_hundredth_on(count, is_told):
    train, val = (torch.rand(n, 3, 4, 4) for n in (60, count))
    val[torch.randint(count, ())] = train[torch.randint(60, ())]
    labels = torch.zeros(count, dtype=torch.int64)
    found = common_images({"train": (train, labels), "val": (val, labels)}, torch.device("cpu"))
    assert [sentence.partition(" are images")[0] for sentence in found] == [f"1 of the {count} images of val"] * is_told
