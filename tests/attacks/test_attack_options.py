"""The attacks' options and the models they take."""

import copy
import re
import types

import pytest
import torch
from attacked import ATTACKS, CLASSES, EPS, STEPS, N, Net, batch_of, every_attack
from attacked import batch as batch
from attacked import net as net
from attacked import one_thread as one_thread
from torch import nn

from fastadv.attacks import FGSM, PGD, PGDL2, TPGD
from fastadv.attacks.objective import Objective

# Memory


@every_attack
@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"training_mode": "batch_norm"}, {"compile": True}])
@pytest.mark.parametrize("targeted", [False, "random", "least_likely"])
def test_the_model_never_sees_more_than_a_chunk(batch, name, options, targeted, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    images, labels = batch
    net, seen = Net().double(), []
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    if targeted:
        options = {**options, "targeted": targeted, "loss": "ce"}
    attack = ATTACKS[name](net, chunk=4, **options)
    attack(images, labels)
    attack(images, None)
    assert max(seen) == 4
    seen.clear()
    attack(images[:3], labels[:3])
    assert max(seen) <= 4


@pytest.mark.filterwarnings("ignore:steps =", "ignore:its eps is")
@every_attack
@pytest.mark.parametrize("chunk", [1, 4, 6])
@pytest.mark.parametrize("given", [{}, {"eps": torch.linspace(0.01, 0.3, N).double()}, {"x_init": True}])
def test_chunks_change_nothing_for_seeds_per_sample(net, batch, name, chunk, given):
    images, labels = batch
    given = {**given, "seed": torch.randint(2**62, (N,))}
    if "x_init" in given:
        given["x_init"] = (images + 0.01).clamp(0, 1)
    whole = ATTACKS[name](net)(images, labels, **given)
    parts = ATTACKS[name](net, chunk=chunk)(images, labels, **given)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


def test_chunks_of_one_seed_draw_differently():
    images = torch.full((N, 3, 6, 6), 0.5)
    adv = PGD(lambda x: x.flatten(1)[:, :CLASSES], EPS, 0.0, 1, chunk=2)(images, torch.zeros(N).long(), seed=3)
    assert len({tuple(sample.flatten().tolist()) for sample in adv}) == N


@every_attack
@pytest.mark.parametrize("options", [{}, {"compile": True}])
def test_out_of_memory_names_the_chunk(name, options, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def model(x):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    for chunk, advice in ((None, 3), (4, 2)):
        with pytest.raises(torch.OutOfMemoryError, match=f"chunk={advice}") as caught:
            ATTACKS[name](model, chunk=chunk, **options)(*batch_of(N))
        assert "9 GiB" in str(caught.value.__cause__)


# The model's modes


def test_as_is_dropout_draws_and_eval_does_not():
    images, labels = batch_of(N)
    for mode, draws in (("as_is", True), ("eval", False), ("batch_norm", False)):
        net, outputs = Net().train(), []
        net.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output.detach()))
        attack = PGD(net, EPS, 0.0, 2, False, training_mode=mode)  # alpha=0: twice the same images
        attack(images, labels)
        assert torch.equal(outputs[0], outputs[1]) != draws


@pytest.mark.parametrize("mode", ["eval", "as_is", "batch_norm"])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_takes_the_batchs_statistics_where_asked_to(batch, mode, training):
    images, labels = batch
    net, outputs = Net().double().train(training), []
    net.drop.p = 0.0
    net.norm.running_mean.fill_(0.3)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.norm.register_forward_hook(lambda module, args, output: outputs.append((args[0].detach(), output.detach())))
    FGSM(net, EPS, training_mode=mode)(images, labels)
    ((x, seen),) = outputs
    mean, variance = net.norm.running_mean, net.norm.running_var
    if mode == "batch_norm" or (mode == "as_is" and training):
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    expected = (x - mean[:, None, None]) / (variance[:, None, None] + net.norm.eps).sqrt()
    torch.testing.assert_close(seen, expected)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training == training


# Precision, layout


@every_attack
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_model_in_that_dtype(name, dtype):
    net, seen = Net(), []
    net.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    images, labels = batch_of(N)
    adv = ATTACKS[name](net, autocast=dtype)(images, labels)
    assert set(seen) == {dtype}
    assert adv.dtype == torch.float32
    seen.clear()
    ATTACKS[name](net)(images, labels)
    assert set(seen) == {torch.float32}


class Attending(nn.Module):
    """A model in which every pixel attends to the others, by the function `attention`."""

    def __init__(self, attention, tokens):
        super().__init__()
        self.attention, self.lift, self.head = attention, nn.Linear(3, 48), nn.Linear(16, CLASSES)
        self.mask = torch.randn(tokens, tokens)

    def forward(self, x):
        q, k, v = self.lift(x.flatten(2).transpose(1, 2))[:, None].chunk(3, -1)
        return self.head(self.attention(q, k, v, self.mask)[:, 0].mean(1))


def named(q, k, v, mask):
    return nn.functional.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask.to(q.dtype))


def positional(q, k, v, mask):
    return nn.functional.scaled_dot_product_attention(q, k, v, mask > 0, 0.0, scale=0.3)


def in_float32(attention):
    def attend(q, k, v, mask):
        mask = mask.to(q.dtype).float()
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask).to(q.dtype)

    return attend


@pytest.mark.parametrize("side", [8, 17])
@pytest.mark.parametrize("attention", [named, positional])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_few_tokens_is_in_float32_under_autocast(side, attention, dtype):
    net = Attending(attention, side**2)
    by_hand = copy.deepcopy(net)
    if side**2 <= 256:
        by_hand.attention = in_float32(attention)
    images, labels = torch.rand(N, 3, side, side), torch.randint(0, CLASSES, (N,))
    found = Objective(net, "ce", autocast=dtype).gradient(images, labels)
    with torch.autocast("cpu", dtype):
        expected = by_hand(images.requires_grad_())
    losses = nn.functional.cross_entropy(expected.float(), labels, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), images)
    for mine, other in zip(found, (grad, losses, expected.float()), strict=True):
        assert torch.equal(mine, other)


@every_attack
def test_memory_format_is_what_the_model_sees(net, batch, name):
    images, labels = batch
    seen = []
    attack = ATTACKS[name](net, memory_format=torch.channels_last, restarts=2)
    hook = net.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    attack(images, labels)
    attack(images, labels, x_init=images)
    hook.remove()
    assert seen
    assert all(seen)
    start = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    ours = ATTACKS[name](net, memory_format=torch.channels_last)(images, labels, x_init=start)
    torch.testing.assert_close(ours, ATTACKS[name](net)(images, labels, x_init=start), rtol=0, atol=1e-9)


# compile


@pytest.mark.parametrize(
    ("attack_on", "compiler"),
    [
        (lambda m, **o: PGD(m, EPS, EPS / 3, 3, **o), "inductor"),
        (lambda m, **o: PGD(m, EPS, EPS / 2, 2, restarts=2, chunk=4, **o), "eager"),
        (lambda m, **o: TPGD(m, EPS, EPS / 2, 2, **o), "eager"),
        (lambda m, **o: FGSM(m, EPS, targeted="random", **o), "eager"),
        (lambda m, **o: PGDL2(m, 0.5, 0.25, 2, memory_format=torch.channels_last, **o), "eager"),
    ],
    ids=["PGD", "restarts, chunks", "TPGD", "random target", "L2, channels last"],
)
def test_nothing_is_compiled_twice(net, batch, attack_on, compiler, monkeypatch):
    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=compiler, **options))
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def update(images, labels):
        optimizer.zero_grad()
        torch.manual_seed(0)
        nn.functional.cross_entropy(net(images), labels).backward()
        return [p.grad.clone() for p in net.parameters()]

    attack, eager = attack_on(net, compile=True), attack_on(net)
    images, labels = batch
    for i in range(6):
        x, y = (images, labels) if i < 5 else (images[:2], labels[:2])
        seeds = torch.randint(2**62, (len(x),))
        state = {key: value.clone() for key, value in net.state_dict().items()}
        alone = update(x, y)
        net.load_state_dict(state)
        buffers = [b.clone() for b in net.buffers()]
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            adv = attack(x, y, seed=seeds)
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))
        expected = eager(x, y, seed=seeds)
        assert all(torch.equal(a, b) for a, b in zip(alone, update(x, y), strict=True))
        torch.testing.assert_close(adv, expected, rtol=0, atol=1e-7)
        optimizer.step()


@pytest.mark.parametrize("mode", ["as_is", "batch_norm"])
def test_compile_takes_the_batchs_statistics_as_eager_does(net, batch, mode, monkeypatch):
    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    net.train()
    net.drop.p = 0.0
    options = {"training_mode": mode, "random_start": False, "alpha": 4 / 255, "steps": 2}
    compiled, eager = (PGD(net, compile=compile, **options) for compile in (True, False))
    plain = PGD(net, alpha=4 / 255, random_start=False, steps=2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for n in (N, 4):  # a smaller batch is not filled up, because this would change its statistics
        images, labels = batch[0][:n], batch[1][:n]
        adv = compiled(images, labels)
        torch.testing.assert_close(adv, eager(images, labels), rtol=0, atol=1e-9)
        assert not torch.equal(adv, plain(images, labels))
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_compiled_attack_really_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(options) or f)
    PGD(Net(), compile=True)
    PGD(Net())
    assert compiled == [{"dynamic": False}]


@pytest.mark.filterwarnings("ignore:steps =", "ignore:its eps is")
@every_attack
@pytest.mark.parametrize("given", [{}, {"eps": torch.tensor([0.1, 0.2]).double()}, {"x_init": True}, {"seed": 4}])
def test_a_filled_up_batch_gives_what_it_gives_alone(net, batch, name, given, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    images, labels = batch
    given = {"seed": torch.tensor([8, 9]), **given}
    if "x_init" in given:
        given["x_init"] = (images[:2] + 0.01).clamp(0, 1)
    attack, seen = ATTACKS[name](net, compile=True, restarts=2), []
    attack(images, labels)
    hook = net.head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    adv = attack(images[:2], labels[:2], **given)
    hook.remove()
    assert seen[-1] == N
    assert adv.shape == (2, 3, 6, 6)
    expected = ATTACKS[name](net, restarts=2)(images[:2], labels[:2], **given)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-9)
    if "x_init" not in given:  # noise takes the images' layout
        last = [images[:2].contiguous(memory_format=torch.channels_last), labels[:2]]
        expected = ATTACKS[name](net, restarts=2)(*last, **given)
        torch.testing.assert_close(attack(*last, **given), expected, rtol=0, atol=1e-9)


def test_graph_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(RuntimeError, match="there is no GPU here: use compile=True"):
        PGD(Net(), graph=True)


# Models

OUTPUTS = {
    "tensor": lambda z: z,
    "tuple": lambda z: (z, None, "more"),
    "list": lambda z: [z],
    "dict": lambda z: {"loss": None, "logits": z},
    "dict without logits": lambda z: {"out": z, "aux": z * 2},
    "object": lambda z: types.SimpleNamespace(logits=z, hidden=z * 3),
}


@every_attack
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("module", [False, True])
def test_logits_are_found_in_what_models_return(net, batch, name, output, module):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return OUTPUTS[output](self.net(x))

    model = Wrapped() if module else (lambda x: OUTPUTS[output](net(x)))
    options = {"restarts": 2, "targeted": "least_likely", "loss": "ce"}
    for o in ({}, options):
        expected = ATTACKS[name](net, **o)(*batch, seed=1)
        assert torch.equal(ATTACKS[name](model, **o)(*batch, seed=1), expected)


AMBIGUOUS = {
    "features first": lambda features, z: (features, z),
    "logits first": lambda features, z: [z, features],
    "as many features": lambda features, z: (z * 2, z),
    "dict": lambda features, z: {"features": features, "prediction": z},
}
CLEAR = {
    "tokens": lambda features, z: (features[:, None], z),
    "labels": lambda features, z: (z.argmax(1), z),
    "dict": lambda features, z: {"features": features, "logits": z},
    "dict of one matrix": lambda features, z: {"loss": z.sum(), "prediction": z},
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_features_beside_logits_are_not_attacked(net, batch, case):
    attack = PGD(lambda x: AMBIGUOUS[case](x.flatten(1), net(x)))
    with pytest.raises(TypeError, match=r"key `logits`; it returned .* may be the logits or features"):
        attack(*batch)


@pytest.mark.parametrize("case", CLEAR)
def test_logits_beside_other_things_are_found(net, batch, case):
    attack = PGD(lambda x: CLEAR[case](x.flatten(1), net(x)))
    assert torch.equal(attack(*batch, seed=1), PGD(net)(*batch, seed=1))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: (x, x), "a tuple of length 2"),
        (lambda x: {"logits": x}, r"a dict with the keys \['logits'\]"),
        (lambda x: x.mean(dim=(1, 2, 3)), r"a float32 tensor of shape \(6,\)"),
        (lambda x: x.flatten(1)[:3], r"a float32 tensor of shape \(3, 108\)"),
        (lambda x: x.flatten(1).argmax(dim=1, keepdim=True), r"a int64 tensor of shape \(6, 1\)"),
        (lambda x: None, "a NoneType"),
    ],
)
def test_output_that_is_not_logits_is_refused_by_what_it_is(output, message):
    with pytest.raises(TypeError, match=message):
        FGSM(output, EPS)(*batch_of(N))


@every_attack
def test_a_data_parallel_model_is_attacked_through_its_module(net, batch, name, one_process, monkeypatch):
    parallel = nn.parallel.DistributedDataParallel(net.train())
    frozen = []
    net.register_forward_pre_hook(lambda *a: frozen.append(any(p.requires_grad for p in parallel.parameters())))
    with monkeypatch.context() as patch:  # the wrapper's hooks would wait for other processes
        patch.setattr(parallel, "forward", lambda *args: pytest.fail("called through the wrapper"))
        adv = ATTACKS[name](parallel)(*batch, seed=1)
    assert frozen
    assert not any(frozen)
    assert parallel.training
    assert net.norm.training
    assert all(p.requires_grad for p in parallel.parameters())
    assert torch.equal(adv, ATTACKS[name](net)(*batch, seed=1))
    nn.functional.cross_entropy(parallel(adv), batch[1]).backward()  # the update goes through the wrapper
    assert all(p.grad.any() for p in net.head.parameters())


@every_attack
def test_another_device_is_a_clear_error(net, batch, name):
    images, labels = batch
    attack = ATTACKS[name](net)
    with pytest.raises(ValueError, match="images are on meta and the model is on cpu"):
        attack(images.to("meta"), labels.to("meta"))
    with pytest.raises(ValueError, match="labels must be on the images' device cpu, got meta"):
        attack(images, labels.to("meta"))
    with pytest.raises(ValueError, match=r"x_init must be .* cpu"):
        attack(images, labels, x_init=images.to("meta"))


@every_attack
@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"chunk": 2}, {"targeted": "random", "loss": "ce"}])
def test_an_empty_batch_comes_back_empty(net, batch, name, options):
    images, labels = batch
    assert ATTACKS[name](net, **options)(images[:0], labels[:0]).shape == (0, 3, 6, 6)


@every_attack
def test_uint8_images_mean_images_over_255(name):
    net, (images, labels) = Net(), batch_of(N)
    codes = (images * 255).round().to(torch.uint8)
    before = codes.clone()
    adv = ATTACKS[name](net)(codes, labels, seed=1)
    assert adv.dtype == torch.float32
    assert torch.equal(adv, ATTACKS[name](net)(codes.float() / 255, labels, seed=1))
    assert torch.equal(codes, before)


@pytest.mark.parametrize("images", [torch.zeros(6, 3, dtype=torch.int64), [0.0] * 6])
def test_images_of_another_type_are_refused(net, batch, images):
    with pytest.raises(TypeError, match="images must be a float or uint8 tensor"):
        FGSM(net, EPS)(images, batch[1])


def test_images_without_pixels_are_refused(net, batch):
    with pytest.raises(ValueError, match=r"must be a batch .* got a tensor of shape .6,"):
        FGSM(net, EPS)(torch.zeros(6), batch[1])


WRONG_SEEDS = ["abc", 1.5, True, 2**64, torch.arange(20), torch.zeros(6)]


@pytest.mark.parametrize("options", [{"random_start": False}, {"chunk": 4}, {"targeted": "random"}], ids=str)
@pytest.mark.parametrize("seed", WRONG_SEEDS, ids=str)
def test_a_wrong_seed_is_refused_also_where_nothing_is_drawn(net, batch, options, seed):
    with pytest.raises((TypeError, ValueError), match="seed must"):
        PGD(net, EPS, **options)(*batch, seed=seed)


@pytest.mark.parametrize("targeted", ["random", "least_likely"])
def test_several_labels_have_no_other_class(net, targeted):
    with pytest.raises(ValueError, match="the labels of the loss bce name none"):
        PGD(net, EPS, loss="bce", targeted=targeted)


@pytest.mark.filterwarnings("ignore:.*losses were not finite")
def test_a_start_that_is_nan_is_refused_first_and_counted_later(net, batch):
    start = batch[0].clone()
    start[1, 0, 2, 3] = torch.nan
    attack = PGD(net, EPS)
    with pytest.raises(ValueError, match="some of x_init are NaN"):
        attack(*batch, x_init=start)
    attack(*batch, x_init=batch[0])
    with pytest.warns(UserWarning, match="some of x_init are NaN"):
        attack(*batch, x_init=start)


@every_attack
def test_images_without_channels(batch, name):
    x, labels = batch[0].flatten(1)[:, :7], batch[1] % 2
    weight = torch.randn(7, 2, dtype=torch.float64)
    for images in (x, x[:, None], x[:, :, None, None, None]):
        adv = ATTACKS[name](lambda z: z.flatten(1) @ weight, restarts=2, chunk=4)(images, labels)
        assert adv.shape == images.shape
        assert not torch.equal(adv, images)


# repr

SETTINGS = {
    "targeted": ("least_likely", "targeted='least_likely'"),
    "loss": ("dlr", "loss='dlr'"),
    "restarts": (3, "restarts=3"),
    "training_mode": ("batch_norm", "training_mode='batch_norm'"),
    "autocast": (torch.bfloat16, "autocast=torch.bfloat16"),
    "memory_format": (torch.channels_last, "memory_format=torch.channels_last"),
    "compile": (True, "compile=True"),
    "graph": (False, "graph=False"),
    "chunk": (17, "chunk=17"),
}
OWN = {
    "FGSM": ("eps=8/255", "alpha=None", "noise=0.0"),
    "FFGSM": ("eps=8/255", "alpha=10/255"),
    "NFGSM": ("eps=8/255", "alpha=None", "noise=None"),
    "ZeroGrad": ("eps=8/255", "alpha=None", "quantile=0.35"),
    "PGD": ("eps=8/255", "alpha=4/255", f"steps={STEPS}", "random_start=True"),
    "BIM": ("eps=8/255", "alpha=4/255", f"steps={STEPS}"),
    "MIFGSM": ("eps=8/255", "alpha=4/255", f"steps={STEPS}", "decay=1.0"),
    "TPGD": ("eps=8/255", "alpha=4/255", f"steps={STEPS}"),
    "PGDL2": ("eps=0.5", "alpha=0.25", f"steps={STEPS}", "random_start=True", "eps_for_division=1e-10"),
    "APGD": ("eps=8/255", f"steps={STEPS}", "rho=0.75", "best_iterate=True"),
    "APGDL2": ("eps=0.5", f"steps={STEPS}", "rho=0.75", "best_iterate=True"),
}


@every_attack
def test_repr_shows_every_setting(name):
    shown = repr(ATTACKS[name](Net(), **{key: value for key, (value, _) in SETTINGS.items()}))
    assert shown.startswith(f"{name}(Net, ")
    for text in (*OWN[name], *(text for _, text in SETTINGS.values())):
        assert len(re.findall(rf"[ (]{re.escape(text)}[,)]", shown)) == 1, (text, shown)


def test_repr_shows_lengths_of_an_l2_attack_as_they_are():
    shown = repr(PGDL2(Net(), 8 / 255, 2 / 255))
    assert f"eps={8 / 255!r}, " in shown
    assert f"alpha={2 / 255!r}, " in shown


def test_repr_names_a_loss_of_ones_own():
    def hinge(outputs, targets):
        return outputs.sum(1)

    assert "loss=hinge" in repr(PGD(Net(), loss=hinge))


# ---------------------------------------------------------------------- names and values that would be no setting


@every_attack
@pytest.mark.parametrize("name_of_it", ["iters", "epsilon", "norm", "step_size", "by_gradient", "perturbation"])
def test_a_name_that_is_no_setting_is_refused(net, batch, name, name_of_it):
    images, labels = batch
    attack = ATTACKS[name](net)
    before = attack(images, labels, seed=3)
    with pytest.raises(
        AttributeError, match=rf"{type(attack).__name__} has no setting '{name_of_it}'; there are eps, "
    ):
        setattr(attack, name_of_it, 5)
    assert torch.equal(attack(images, labels, seed=3), before)


def test_a_single_step_has_no_number_of_steps(net):
    with pytest.raises(AttributeError, match="FGSM has no setting 'steps'"):
        FGSM(net, EPS).steps = 10


def test_an_attack_of_ones_own_may_have_any_attribute(net, batch):
    class Mine(PGD):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.iters = 7

    attack = Mine(net, EPS)
    attack.count = 3
    attack(*batch)
    assert (attack.iters, attack.count) == (7, 3)


@pytest.mark.parametrize("attack", [PGD, FGSM])
def test_a_step_down_the_loss_is_refused(net, batch, attack):
    with pytest.raises(ValueError, match=r"alpha must be at least 0, got -0\.01: a negative step goes down the loss"):
        attack(net, EPS, alpha=-0.01)
    made = attack(net, EPS)
    made.alpha = torch.full((N,), 0.01)
    made.alpha[2] = -0.01
    with pytest.raises(ValueError, match="alpha must be finite and at least 0, and some of it is not"):
        made(*batch)
