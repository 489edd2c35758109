"""When a model's output counts as a prediction: a rule for each sample, in all places that give a verdict."""

import math
import warnings

import pytest
import torch
from attacked import one_thread as one_thread
from torch import nn

from fastadv.attacks import PGD, create_attack
from fastadv.attacks.verdicts import predicted
from fastadv.evaluation import evaluate

# A missing prediction also gives these warnings, which are not tested here.
TOLD = ("no prediction", "the gradient is zero", ".* losses .*not finite")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{told}") for told in TOLD]

EPS = 8 / 255


def by_rule(row):
    """The class that a row of logits predicts, or None."""
    if any(math.isnan(value) for value in row):
        return None
    row = [0.0, *row] if len(row) == 1 else row  # a single logit is the logit of the second of two classes
    if len(set(row)) == 1:
        return None
    return row.index(max(row))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 100])
def test_rows_of_few_values_name_what_the_rule_says(dtype, classes):
    values = torch.tensor([0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan])
    chances = torch.tensor([4.0, 4, 4, 1, 2, 4 / classes])
    rows = torch.cat(
        (values[:, None].expand(-1, classes), values[chances.multinomial(400 * classes, True)].view(400, -1))
    )
    found = predicted(rows.to(dtype)).tolist()
    assert [None if named == -1 else named for named in found] == [by_rule(row) for row in rows.tolist()]


class Broken(nn.Module):
    """A linear network whose logits `damage` changes, as a function of (images, logits)."""

    def __init__(self, damage):
        super().__init__()
        self.head, self.damage = nn.Linear(12, 3), damage

    def forward(self, x):
        return self.damage(x, self.head(x.flatten(1) - 0.5))


def sample_of(count=10):
    """Images whose first pixel is 0 or 0.5, by which a model recognises the second half without a gradient."""
    images = torch.rand(count, 3, 2, 2)
    images[:, 0, 0, 0] = (torch.arange(count) >= count // 2) * 0.5
    return images


def second_half(x):
    return x.detach()[:, 0, 0, 0] > 0.25


def nan_in_column(column):
    def damage(x, logits):
        here = second_half(x)[:, None] & (torch.arange(3) == column)
        return torch.where(here, torch.nan, logits)

    return damage


def constant(x, logits):
    return torch.where(second_half(x)[:, None], 0 * logits + 0.7, logits)


@pytest.mark.parametrize("damage", [*map(nan_in_column, range(3)), constant], ids=["nan0", "nan1", "nan2", "constant"])
@pytest.mark.parametrize("column", range(3))
def test_no_prediction_is_wrong_for_every_label(damage, column):
    model, images = Broken(damage), sample_of()
    labels = torch.full((10,), column)
    with torch.no_grad():
        rows = model(images).tolist()
    with pytest.warns(UserWarning, match="no prediction for 5 of 10 images under no attack"):
        report = evaluate(model, (images, labels), ["fgsm"], eps=0.0, batch_size=4)
    assert report["clean_correct"] == [by_rule(row) == column for row in rows]
    assert report["no_prediction"] == 5
    assert report["attacks"][0]["no_prediction"] == 0  # a misclassified image is not attacked
    assert report["attacks"][0]["robust_accuracy"] == report["clean_accuracy"]


def own_loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


@pytest.mark.parametrize("broken", [lambda logits: logits * torch.nan, lambda logits: 0 * logits], ids=["nan", "equal"])
@pytest.mark.parametrize(
    "options",
    [{}, {"targeted": "random"}, {"loss": lambda out, y: nn.functional.cross_entropy(out, y, reduction="none")}],
)
def test_an_attack_that_silences_the_model_has_fooled_it(broken, options):
    images = sample_of()
    near = torch.cdist  # the distance to the clean images tells whether an image is under attack

    def damage(x, logits):
        moved = near(x.detach().flatten(1), images.flatten(1), p=math.inf).amin(1) > EPS / 4
        return torch.where((moved & second_half(x))[:, None], broken(logits.detach()), logits * 1e-3 + large)

    large = torch.tensor([2.0, 0.0, 0.0])  # without damage the model predicts class 0 under every attack
    model, labels = Broken(damage), torch.zeros(10, dtype=torch.int64)
    with pytest.warns(UserWarning, match="no prediction for 5 of 10 images under PGD at 8/255"):
        report = evaluate(model, (images, labels), [PGD(model, EPS, EPS / 2, 3, **options)], batch_size=3)
    result = report["attacks"][0]
    assert report["clean_accuracy"] == 1
    assert report["no_prediction"] == 0
    assert result["fooled"] == [False] * 5 + [True] * 5
    assert (result["no_prediction"], result["robust_accuracy"]) == (5, 0.5)


def test_a_target_is_not_reached_where_nothing_is_predicted():
    """Of two restarts the one that reaches the target is kept, not the one without a prediction."""
    images = torch.full((4, 3, 2, 2), 0.5)
    targets = torch.zeros(4, dtype=torch.int64)
    calls = []

    def model(x):
        logits = x.flatten(1)[:, :3] * 1e-3 + torch.tensor([1.0, 0.0, 0.0])
        calls.append(len(calls))
        return logits if len(calls) in (1, 2) else logits * 1e3 * torch.tensor([1.0, torch.nan, 1.0])

    adv = PGD(model, EPS, EPS, 1, targeted=True, restarts=2, loss="margin")(images, targets, seed=3)
    first = PGD(lambda x: x.flatten(1)[:, :3], EPS, EPS, 1, targeted=True, loss="margin")(images, targets, seed=3)
    assert torch.equal(adv, first)


def test_masked_classes_are_evaluated_as_if_they_were_not_there():
    torch.manual_seed(int(torch.randint(2**31, ())))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double()
    images = torch.rand(30, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        model[1].bias -= model(images).mean(0)  # no class is far from the others
    labels = model(images)[:, :3].argmax(1)

    def masked(x):
        return model(x).masked_fill(torch.arange(5) >= 3, -torch.inf)

    reports = []
    for judged in (masked, lambda x: model(x)[:, :3]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            named = [(name, loss) for name in ("fgsm", "pgd") for loss in ("ce", "margin")]
            attacks = [create_attack(name, judged, 0.06, loss=loss) for name, loss in named]
            reports.append(evaluate(judged, (images, labels), attacks, batch_size=8))
    one, other = ([r["fooled"] for r in report["attacks"]] for report in reports)
    assert one == other
    assert sum(one[0]) > 0


def test_where_nothing_is_right_there_is_nothing_to_attack(recwarn):
    model = Broken(lambda x, logits: logits + torch.tensor([9.0, 0.0, 0.0]))
    report = evaluate(model, (sample_of(), torch.ones(10, dtype=torch.int64)), ["fgsm", "pgd"], batch_size=4)
    assert [r["robust_accuracy"] for r in report["attacks"]] == [0, 0]
    assert [r["zero_gradients"] for r in report["attacks"]] == [None, None]
    assert not recwarn.list


def test_masked_classes_hide_no_random_output():
    def model(x):
        return torch.cat((x.flatten(1)[:, :2] + torch.rand(len(x), 2), torch.full((len(x), 1), -torch.inf)), 1)

    with pytest.warns(UserWarning, match="output is random"):
        evaluate(model, (torch.rand(8, 3, 2, 2), torch.zeros(8, dtype=torch.int64)), ["fgsm"], batch_size=8)
