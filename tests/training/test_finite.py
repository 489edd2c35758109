"""NaN and infinity are neither learnt nor saved: the run ends with its last finite weights and can be resumed."""

import subprocess
import sys
from unittest.mock import patch

import poisoned_run
import pytest
import safetensors.torch
import torch
from fitted import copied, same
from poisoned_run import poisoned
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.models import Model, save
from fastadv.training import Trainer, TrainStep
from fastadv.training.checkpoints import Checkpoints
from fastadv.training.ema import EMA
from fastadv.training.finite import largest, nonfinite

INF, NAN = float("inf"), float("nan")


def train(folder=None, model=None, **changes):
    """(the model of a run with three epochs of four batches, its weights before each step)."""
    model, states = poisoned_run.network() if model is None else model, []
    apply = TrainStep.apply

    def noted(step):
        states.append(copied(model))
        apply(step)

    with patch.object(TrainStep, "apply", noted):
        poisoned_run.train(model, folder, **changes)
    return model, states


def assert_finite(folder):
    """Everything in a checkpoint is finite."""
    files = list((folder / "state").glob("*.safetensors"))
    assert files
    for path in files:
        assert all(t.isfinite().all() for t in safetensors.torch.load_file(path).values() if t.is_floating_point())


@pytest.mark.parametrize(
    ("step", "value", "settings"),
    [
        (0, NAN, {"optimizer": "sgd"}),
        (0, INF, {"optimizer": "adamw", "ema_decay": 0.9}),
        (6, NAN, {"optimizer": "sgd", "ema_decay": 0.9, "max_grad_norm": 1.0}),
        (6, -INF, {"optimizer": "adamw", "max_grad_norm": 1.0, "grad_accum_steps": 2}),
        (7, NAN, {"optimizer": "adamw", "method": "linear", "checkpoint_s": 1e9}),
    ],
)
def test_a_gradient_that_is_not_finite_is_not_learnt_and_the_run_goes_on_to_the_same_bits(
    step, value, settings, tmp_path
):
    whole, states = train(tmp_path / "whole", **settings)
    model = poisoned_run.network()
    parts = settings.get("grad_accum_steps", 1)
    place = f"epoch {step // 4 + 1}, batch {step % 4 + 1}"
    words = rf"gradient is not finite \(its norm is .*the loss is \d.*{place}; the batch"
    with poisoned(step * parts, "gradient", value), pytest.raises(FloatingPointError, match=words):
        train(tmp_path / "cut", model, **settings)
    # `states` has batch-norm's statistics after the forward pass of the step.
    before = {name: t for name, t in states[step].items() if "running" not in name and "batches" not in name}
    assert same({name: t for name, t in model.state_dict().items() if name in before}, before)
    assert int(model[1].num_batches_tracked) == (0 if "method" in settings else step * parts)
    assert all(p.grad is None for p in model.parameters())
    assert_finite(tmp_path / "cut")
    kept = safetensors.torch.load_file(tmp_path / "cut" / "nonfinite.safetensors")
    assert kept["images"].isfinite().all()
    assert len(kept["images"]) == len(kept["labels"]) == len(kept["index"]) == 6
    resumed, _ = train(tmp_path / "cut", resume=True, **settings)
    assert same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("value", [NAN, INF])
def test_statistics_that_are_not_finite_are_not_kept(value, tmp_path):
    whole, states = train(tmp_path / "whole")
    model = poisoned_run.network()
    with poisoned(5, "statistics", value), pytest.raises(FloatingPointError, match=r"statistics, reached .* batch 2;"):
        train(tmp_path / "cut", model)
    assert same({"0.weight": model[0].weight.data}, {"0.weight": states[5]["0.weight"]})
    assert model[1].running_var.isfinite().all()
    assert_finite(tmp_path / "cut")
    assert same(train(tmp_path / "cut", resume=True)[0].state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("batch_size", "words"),
    [(12, "the loss is nan at epoch 1, batch 2"), (24, "weights 0.weight is not finite before")],
)
@pytest.mark.parametrize("with_folder", [True, False])
def test_a_finite_gradient_whose_step_is_too_large_leaves_the_weights_before(batch_size, words, with_folder, tmp_path):
    """With two batches in an epoch the loss of the second is NaN; with one, the checkpoint finds the weights."""
    model, before = poisoned_run.network(), poisoned_run.network().state_dict()
    folder, step = tmp_path if with_folder else None, torch.optim.SGD.step

    def too_large(optimizer):
        step(optimizer)
        model[0].weight.data[1] *= INF

    with (
        patch.object(torch.optim.SGD, "step", too_large),
        pytest.raises(FloatingPointError, match=f"{words}.*the model has the last ones that were kept"),
    ):
        train(folder, model, optimizer="sgd", batch_size=batch_size, attack=None, checkpoint_s=1e9)
    assert same(model.state_dict(), before)
    if with_folder:
        assert_finite(tmp_path)


class Masked(nn.Module):
    """A model with numbers that are not finite: in a buffer, and in a parameter that does not train."""

    def __init__(self):
        super().__init__()
        self.inner = poisoned_run.network()
        self.register_buffer("mask", torch.tensor([0, 0, -1e4]), persistent=False)
        self.register_buffer("far", torch.tensor([INF, -INF]))
        self.none = nn.Parameter(torch.full((2,), NAN), requires_grad=False)

    def forward(self, x):
        return self.inner(x) + self.mask


def test_numbers_that_the_model_came_with_are_no_fault(tmp_path):
    assert len(train(tmp_path, Masked(), ema_decay=0.9)[1]) == 12
    assert len(train(tmp_path, Masked(), ema_decay=0.9, resume=True)[1]) == 0


def test_weights_that_the_model_came_with_are_named_where_nothing_can_be_learnt():
    model = poisoned_run.network()
    model[4].weight.data[1, 2] = NAN
    words = "the loss is nan at epoch 1, batch 1; .* The model came with numbers that are not finite in 4.weight$"
    with pytest.raises(FloatingPointError, match=words), pytest.warns(UserWarning, match="losses were not finite"):
        train(model=model)


def test_of_complex_and_sparse_tensors_too_it_is_known_which_are_not_finite():
    for make in (lambda t: torch.complex(torch.ones_like(t), t), lambda t: t.to_sparse(), lambda t: t.half()):
        tensors = {str(value): make(torch.tensor([[0.5, 0.0, value]])) for value in (1.0, NAN, -INF)}
        assert nonfinite(tensors) == ["nan", "-inf"]
        assert nonfinite(tensors, known=["nan"]) == ["-inf"]
        found = [float(largest([tensor], torch.device("cpu"))) for tensor in tensors.values()]
        assert found[0] == pytest.approx(abs(complex(1, 1)) if tensors["1.0"].is_complex() else 1)
        assert found[1] != found[1]
        assert found[2] == INF


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_in_8_bits_are_looked_at_kept_and_not_averaged(dtype, tmp_path):
    tensors = {str(value): torch.tensor([[0.5, value]]).to(dtype) for value in (1.0, NAN)}
    assert nonfinite(tensors) == ["nan"]
    model = poisoned_run.network()
    model.register_buffer("scales", torch.randn(3, 4).to(dtype))
    before = model.scales.clone()
    train(tmp_path, model, ema_decay=0.9)
    assert torch.equal(model.scales.float(), before.float())
    file, given = tmp_path / "m.safetensors", {"kind": "own", "name": "mlp", "shape": [3, 8, 8], "options": {}}
    save(Model(model, None, given, ("a", "b", "c"), pretrained=False), file, dtype=torch.bfloat16)
    kept = safetensors.torch.load_file(file)["scales"]
    assert kept.dtype == dtype
    assert torch.equal(kept.float(), before.float())


def test_complex_weights_are_averaged_as_their_parts_are_and_sparse_ones_copied():
    steps = [torch.randn(5, dtype=torch.complex128) for _ in range(6)]
    sparse = [torch.randn(3, 3).to_sparse() for _ in steps]
    average = EMA({"w": steps[0], "s": sparse[0]}, 0.3)
    expected = torch.view_as_real(steps[0]).clone()
    for step, (value, other) in enumerate(zip(steps[1:], sparse[1:], strict=True)):
        average.update({"w": value, "s": other}, step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * torch.view_as_real(value)
    torch.testing.assert_close(torch.view_as_real(average.state["w"]), expected)
    assert torch.equal(average.state["s"].to_dense(), sparse[-1].to_dense())


def test_a_mask_is_no_part_of_the_ema():
    """-inf and -inf have no mean, and NaN in a mask is no error."""

    class Impossible(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = poisoned_run.network()
            self.register_buffer("mask", torch.tensor([0, 0, 0, -INF]))

        def forward(self, x):
            return nn.functional.pad(self.inner(x), (0, 1)) + self.mask

    model, _ = train(model=Impossible(), ema_decay=0.9)
    assert torch.equal(model.mask, torch.tensor([0, 0, 0, -INF]))
    without, _ = train(ema_decay=0.9)  # an impossible class changes no weight
    assert same(model.inner.state_dict(), without.state_dict())


@pytest.mark.parametrize("ours", [nn.Identity, lambda: nn.BatchNorm2d(3)], ids=["plain", "batch norm"])
def test_a_step_of_a_loop_of_one_s_own_is_refused_too(ours):
    torch.manual_seed(0)
    model = nn.Sequential(ours(), nn.Flatten(), nn.Linear(192, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = TrainStep(model, None, torch.optim.AdamW(model.parameters(), 0.1))
    images, labels = poisoned_run.images(6)
    step.gradients(images, labels)
    model[2].bias.grad[1] = NAN
    with pytest.raises(FloatingPointError, match="norm of the gradient is nan: no step was taken"):
        step.apply()
    assert same({name: p.detach() for name, p in model.named_parameters()}, before)
    assert not step.optimizer.state
    step.gradients(images, labels)
    step.apply()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model[2].bias, before["2.bias"])


class Reads(TorchDispatchMode):
    """Counts the ops that wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_who_has_read_the_norm_waits_no_second_time(max_grad_norm):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    step = TrainStep(model, None, torch.optim.SGD(model.parameters(), 0.1), max_grad_norm=max_grad_norm)
    for asked in (True, False):
        step.gradients(*poisoned_run.images(6))
        expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm().item()
        with Reads() as reads:
            norm = step.norm() if asked else None
            step.apply()
        assert reads.count == (0 if asked else 1)
        if asked:
            assert norm.item() == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_that_is_not_finite_gives_way_to_the_one_before(tmp_path):
    files = Checkpoints(tmp_path, "{}", masks={"mask"})
    good = {"w": torch.ones(3), "mask": torch.tensor([-INF])}
    files.save({"weights": good, "optimizer": {}}, {"number": 1})
    later = good | {"w": torch.zeros(3)}
    files.save({"weights": later, "optimizer": {"0.exp_avg_sq": torch.tensor([INF])}}, {"number": 2})
    with pytest.warns(UserWarning, match=r"2.json is damaged: numbers in optimizer 0.exp_avg_sq are not finite"):
        groups, facts = Checkpoints(tmp_path, "{}", masks={"mask"}).load()
    assert facts == {"number": 1}
    assert torch.equal(groups["weights"]["w"], good["w"])
    with pytest.raises(ValueError, match=r"no checkpoint can be loaded.*numbers in weights mask are not finite"):
        Checkpoints(tmp_path, "{}").load()


def test_a_full_disk_does_not_hide_what_is_wrong(tmp_path):
    def full(path, content):
        raise OSError("no space left")

    model = poisoned_run.network()
    with (
        poisoned(1, "gradient", NAN),
        patch("fastadv.training.updates.write_atomically", full),
        patch("fastadv.training.run.Run._open", lambda run: None),
        pytest.raises(FloatingPointError, match=r"batch 2 \(the batch could not be written: no space left\); its step"),
    ):
        train(tmp_path, model)


def test_two_processes_end_alike_where_one_of_them_sees_it(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, poisoned_run.__file__, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, stderr=subprocess.DEVNULL)
    for kind in poisoned_run.KINDS:
        first, second = (torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert first["where"] == second["where"] == "epoch 2, batch 2"
        trained = [name for name in first["weights"] if "running" not in name]
        assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in trained)
        assert all(t.isfinite().all() for each in (first, second) for t in each["weights"].values())
        assert_finite(tmp_path / kind)
        assert (tmp_path / kind / "nonfinite.safetensors").exists()


def test_a_loss_without_a_derivative_is_named_as_such():
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = poisoned_run.network()

        def forward(self, x):
            out = self.inner(x)
            return out + (out - out).sqrt()

    with pytest.raises(FloatingPointError, match="no derivative, as a square root has none at 0"):
        Trainer(Rooted(), 8 / 255, attack=None, epochs=1, probe=0, progress=False, device="cpu").fit(
            poisoned_run.images(24)
        )
