"""The report of a run: its numbers, warnings, classes and pictures."""

import base64
import html
import io
import json
import re
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from fastadv import cli
from fastadv.attacks import FGSM
from fastadv.commands import finetune
from fastadv.evaluation import evaluate
from fastadv.evaluation.confusion import confusions
from fastadv.evaluation.ensemble import curve
from fastadv.evaluation.report import page, write_curves, write_report
from fastadv.evaluation.report.pictures import encoded

EPS, CLASSES = 0.1, ("dark <0.5", "bright")
RECORDS = [
    {"backbone": {"clean_accuracy": 0.81, "robust_accuracy": 0.12, "eps": EPS, "warning": "the backbone is <weak>"}},
    {"stage": 0, "method": "full"},
    {"epoch": 0, "train_accuracy": 0.41, "clean_accuracy": 0.72, "robust_accuracy": 0.31, "probe_pgd": 0.21},
    {"epoch": 1, "train_accuracy": 0.42, "clean_accuracy": 0.73, "robust_accuracy": 0.32, "probe_pgd": 0.22}
    | {"alarm": "overfitting & more", "action": "rollback"},
    {"final": True, "best_epoch": 1, "clean_accuracy": 0.93, "robust_accuracy": 0.34, "pma_accuracy": 0.32}
    | {"chosen_by": "robust_accuracy", "noise": 0.105, "within_noise": [0]},
]


class Brightness(nn.Module):
    """Predicts "bright" where the mean is above one half; attacks fool images near one half."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(40.0))

    def forward(self, x):
        score = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack((-score, score), 1)


@pytest.fixture
def figures(monkeypatch):
    """A list of the figures that matplotlib draws."""
    found, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (found.append(self), save(self, *a, **k))[1])
    return found


@pytest.fixture
def report(tmp_path):
    """A function that writes a report with `records` and returns (text, images, labels)."""

    def write(records=RECORDS, classes=CLASSES, shape=(3, 4, 4), title="a & b", facts=None):
        levels = torch.tensor([0.05, 0.45, 0.55, 0.95, 0.2, 0.8]).repeat_interleave(2)
        images = (levels[:, None, None, None] + 0.02 * torch.rand(12, *shape)).clamp(0, 1)
        labels = (levels > 0.5).long()
        labels[4] = 1 - labels[4]  # the model misclassifies this image
        facts = {"Settings": {"lr": "<1"}} if facts is None else facts
        write_report(tmp_path / "r.html", title, Brightness(), records, (images, labels), classes, EPS, facts)
        return (tmp_path / "r.html").read_bytes().decode("utf-8"), images, labels

    return write


def facts_of(text):
    """The rows of each table of facts, as a dict."""
    rows = [
        re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", table) for table in re.findall("<table.*?</table>", text)
    ]
    return [dict(table) for table in rows if table]


def plain(cell):
    return html.unescape(re.sub("<[^>]*>", "", cell))


def tables(text):
    """The cells of each table with a head, as text."""
    found = []
    for table in re.findall("<table[^>]*><thead>(.*?)</table>", text, re.DOTALL):
        rows = [
            re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)
            for row in re.findall("<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        found.append([[plain(cell) for cell in row] for row in rows])
    return found


def pixels(cell):
    """The image in a piece of HTML, in [0, 1]."""
    (content,) = re.findall('src="data:image/png;base64,(.*?)"', cell)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) / 255


def test_the_numbers_are_those_of_the_records(report, figures):
    text, *_ = report()
    robust = "Robust accuracy (PGD-10, eps 25.5/255)"
    assert facts_of(text) == [
        {"Clean accuracy": "93.0 %", robust: "34.0 %", "Robust accuracy (PGD-10 and PMA together)": "32.0 %"},
        {"Clean accuracy": "81.0 %", robust: "12.0 %"},
        {"lr": "&lt;1"},
    ]
    assert "<h1>a &amp; b</h1>" in text
    (curves,) = figures
    shown = {line.get_label(): line.get_xydata().tolist() for line in curves.axes[0].lines}
    expected = {
        "clean, validation": "clean_accuracy",
        "PGD-10, validation": "robust_accuracy",
        "training attack, training": "train_accuracy",
        "PGD-5, probe": "probe_pgd",
    }
    assert shown.keys() == expected.keys()
    for label, key in expected.items():
        assert shown[label] == [[1, pytest.approx(100 * RECORDS[2][key])], [2, pytest.approx(100 * RECORDS[3][key])]]


@pytest.mark.parametrize("count", [1, 2, 5, 300])
def test_epochs_are_whole_numbers_and_a_single_one_is_in_the_middle(report, figures, count):
    epochs = [RECORDS[2] | {"epoch": i} for i in range(count)]
    report([*epochs, RECORDS[-1]])
    axis = figures[0].axes[0]
    low, high = axis.get_xlim()
    assert all(line.get_xydata()[:, 0].tolist() == list(range(1, count + 1)) for line in axis.lines)
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)
    assert low < 1
    assert high > count
    if count == 1:
        assert (ticks, (low + high) / 2) == ([1], 1)


def test_the_curve_s_points_are_the_shares_at_their_budgets(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda self, buffer, **_: (seen.append(self), buffer.write(b"png")))
    found = curve("Linf", [(8 / 255, 0.2), (4 / 255, 0.5)], 0.9)
    write_curves(tmp_path / "c.png", [found, curve("L2", [(0.5, 0.4)], 0.8)])
    assert (tmp_path / "c.png").read_bytes() == b"png"
    first, second = ([line.get_xydata().tolist() for line in axis.lines] for axis in seen[0].axes)
    assert first == [[[0, 90], [pytest.approx(4), 50], [pytest.approx(8), 20]]]
    assert second == [[[0, 80], [0.5, 40]]]
    assert "mean 52.5 %" in seen[0].axes[0].get_title()


def test_alarms_and_a_weak_backbone_are_warned_of_and_a_choice_within_noise_is_said(report):
    text, *_ = report()
    assert re.findall('<p class="warning">(.*?)</p>', text) == [
        "the backbone is &lt;weak&gt;",
        "epoch 2: overfitting &amp; more (rollback)",
    ]
    choice, *_ = re.findall("<p>(.*?)</p>", text)
    assert re.search(
        r"epoch 2, chosen by robust accuracy .* two standard errors \(10.5 %\): those of epoch 1\.", choice
    )
    backbone = RECORDS[0]["backbone"] | {"warning": None}
    healthy = [{"backbone": backbone}, RECORDS[2], RECORDS[-1] | {"within_noise": []}]
    text, *_ = report(healthy)
    assert "warning" not in text.partition("</style>")[2]
    assert "noise" not in text


def test_a_run_that_measured_nothing_has_a_report(report):
    text, *_ = report([{"epoch": 0, "train_accuracy": 0.5}, {"final": True, "best_epoch": None}], facts={})
    assert "nothing was measured" in text
    assert facts_of(text) == []


# ---------------------------------------------------------------------- pictures


def test_under_each_picture_is_what_the_model_says_of_it(report):
    text, images, labels = report()
    table = re.search('<table class="pictures">(.*?)</table>', text, re.DOTALL)[1]
    head, *rows = (re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("<tr>")[1:])
    of_class = [[i for i in range(12) if labels[i] == label] for label in (0, 1)]
    chosen = [(of_class[0] + of_class[1])[i * 12 // 8] for i in range(8)]
    fooled = 0
    for i, name, *column in zip(chosen, head, *rows, strict=True):
        assert plain(name) == f"{labels[i]} {CLASSES[labels[i]]}"
        shown = [torch.from_numpy(pixels(cell)).float().permute(2, 0, 1) for cell in column]
        torch.testing.assert_close(shown[0], images[i], rtol=0, atol=0.51 / 255)
        assert (shown[2] - images[i]).abs().max() <= EPS + 0.51 / 255
        torch.testing.assert_close(shown[1], (shown[2] - shown[0]) / (2 * EPS) + 0.5, rtol=0, atol=0.03)
        for x, cell in ((shown[0], column[0]), (shown[2], column[2])):
            says = int(x.mean() > 0.5)
            mark, kind = ("✓", "right") if says == labels[i] else ("✗", "wrong")
            assert plain(cell) == f"{mark} {says} {CLASSES[says]}"
            assert f'class="{kind}"' in cell
        assert plain(column[1]) == ""
        fooled += (shown[0].mean() > 0.5) != (shown[2].mean() > 0.5)
    assert 0 < fooled < 8


@pytest.mark.filterwarnings("ignore:all of the model's outputs")
def test_a_picture_of_which_the_model_says_nothing_says_so(report, monkeypatch):
    monkeypatch.setattr(Brightness, "forward", lambda self, x: self.scale * 0 * x.flatten(1)[:, :2])
    with pytest.warns(UserWarning, match="the gradient is exactly zero"):
        text, *_ = report()
    said = re.findall(r'<div class="(right|wrong)">(.*?)</div>', text)
    assert said == [("wrong", "✗ no prediction")] * 16


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 4), (2, 4, 4), (3, 1, 9), (4, 4, 4), (7, 2, 2)])
def test_images_of_any_channels_and_sizes_are_shown(report, shape):
    text, images, _ = report(shape=shape)
    table = re.search('<table class="pictures">(.*?)</table>', text, re.DOTALL)[1]
    first = pixels(re.findall(r"<td>(.*?)</td>", table, re.DOTALL)[0])
    expected = images[0].permute(1, 2, 0).numpy()[..., :3]
    if shape[0] == 1:
        expected = expected[..., 0]
    elif shape[0] == 2:
        expected = np.concatenate((expected, np.zeros_like(expected[..., :1])), 2)
        assert "two channels are shown as red and green" in text
    np.testing.assert_allclose(first, expected, rtol=0, atol=0.51 / 255)
    assert (f"Of the {shape[0]} channels the first three" in text) == (shape[0] > 3)


@pytest.mark.parametrize(("height", "width"), [(1000, 500), (3, 2000)])
def test_large_images_are_made_smaller_and_keep_their_shape(height, width):
    wide = torch.linspace(0, 1, width).expand(3, height, width)
    found = np.asarray(Image.open(io.BytesIO(encoded(wide)))) / 255
    side = max(height, width)
    assert max(found.shape) == 224
    assert found.shape[:2] == (max(1, round(224 * height / side)), max(1, round(224 * width / side)))
    np.testing.assert_allclose(found[0, :, 0], np.linspace(0, 1, found.shape[1]), atol=0.02)


# ---------------------------------------------------------------------- names


NAMES = {
    "$a_b$": "$a_b$",
    "\\frac{1": "\\frac{1",
    "<script>&": "<script>&",
    "猫": "猫",
    "قطة": "قطة",
    "👩\u200d🚀": "👩\u200d🚀",
    "caf\udce9": "caf\\xe9",
    "\ud800": "\\ud800",
    "a\nb\x00\u202e": "a\\nb\\x00\\u202e",
    "n" * 500: "n" * 79 + "…",
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.encode("unicode_escape").decode()[:20])
def test_any_class_name_is_shown_or_its_bytes_are(report, name):
    confusion = {"clean": [[0, 0, 5], [1, 1, 7]], "attacked": [[0, 1, 5], [1, 1, 7]]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of glyphs that a font lacks
        text, *_ = report([*RECORDS[:-1], RECORDS[-1] | {"confusion": confusion}], (name, "other"), title=name)
    by_class, clean, attacked, pictures = tables(text)
    assert [by_class[1][0], clean[1][0], attacked[1][0]] == [f"0 {NAMES[name]}"] * 3
    assert pictures[0][0] == f"0 {NAMES[name]}"
    if len(name) < 80 and "\n" not in name:
        assert plain(re.search("<h1>(.*?)</h1>", text, re.DOTALL)[1]) == NAMES[name]


# ---------------------------------------------------------------------- classes


@pytest.mark.parametrize("count", [2, 20, 21, 60])
def test_class_by_class_and_what_they_are_taken_for(report, count):
    rng = np.random.default_rng()
    names = [f"name of {i}" for i in range(count)]
    counted, triples = {}, {}
    for part in ("clean", "attacked"):
        matrix = rng.integers(0, 9, (count, count + 1)) * (rng.random((count, count + 1)) < 0.5)
        matrix[0] = 0  # no test images of this class
        if part == "attacked":  # the same images, attacked
            matrix = np.zeros_like(matrix)
            for label, images in enumerate(counted["clean"].sum(1)):
                np.add.at(matrix[label], rng.integers(0, count + 1, images), 1)
        counted[part] = matrix
        triples[part] = [[i, j if j < count else -1, int(n)] for (i, j), n in np.ndenumerate(matrix) if n]
    text, *_ = report([RECORDS[2], RECORDS[-1] | {"confusion": triples}], names)
    wholes = counted["clean"].sum(1)

    def share(part, whole):
        return f"{100 * part / whole:.1f} %" if whole else "-"

    rows = [
        [f"{i} {names[i]}", str(wholes[i]), *(share(counted[part][i, i], wholes[i]) for part in ("clean", "attacked"))]
        for i in range(count)
    ]
    head = ["class", "images", "clean", "robust"]
    *found, _ = tables(text)
    if count <= 20:
        by_class, *matrices = found
        assert by_class == [head, *rows]
        for table, matrix in zip(matrices, counted.values(), strict=True):
            silent = bool(matrix[:, -1].any())
            shown = matrix[:, : count + silent]
            assert [[int(cell or 0) for cell in row[1:]] for row in table[1:]] == shown.tolist()
            assert table[0] == ["class \\ says", *map(str, range(count)), *["none"] * silent]
        return
    worst, whole, *largest = found
    assert whole == [head, *rows]
    shares = [counted["attacked"][i, i] / wholes[i] for i in range(1, count)]
    assert [float(row[3][:-2]) for row in worst[1:]] == [pytest.approx(100 * s, abs=0.06) for s in sorted(shares)[:10]]
    assert all(row in rows for row in worst[1:])
    for table, matrix in zip(largest, counted.values(), strict=True):
        wrong = sorted((n for (i, j), n in np.ndenumerate(matrix[:, :-1]) if i != j), reverse=True)[:20]
        assert [int(row[2].split()[0]) for row in table[1:]] == wrong
        for label, said, often in table[1:]:
            i, j = int(label.split()[0]), int(said.split()[0])
            assert often == f"{matrix[i, j]} of {wholes[i]} images, {share(matrix[i, j], wholes[i])}"


def test_confusions_are_those_of_the_model_without_and_under_the_attack():
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    images, labels = torch.rand(80, 3, 4, 4, generator=generator), torch.randint(4, (80,), generator=generator)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    with torch.no_grad():
        net[1].weight.copy_(2 * torch.randn(4, 48, generator=generator))
    attack = FGSM(net, 0.3)  # fools nearly all images
    found = confusions(labels, evaluate(net, (images, labels), [attack], batch_size=16, progress=False))
    adv = attack(images, labels)
    with torch.no_grad():
        clean, after = (net(x).argmax(1).tolist() for x in (images, adv))
    expected = {"clean": np.zeros((4, 4), int), "attacked": np.zeros((4, 4), int)}
    for label, before, later in zip(labels.tolist(), clean, after, strict=True):
        expected["clean"][label, before] += 1
        expected["attacked"][label, later if before == label else before] += 1
    for part, matrix in expected.items():
        assert found[part] == [[i, j, n] for (i, j), n in np.ndenumerate(matrix) if n]
    assert found["clean"] != found["attacked"]


# ---------------------------------------------------------------------- nothing is lost


def test_a_part_that_fails_is_named_and_the_others_are_there(report, monkeypatch):
    def fail(*_):
        raise RuntimeError("no <font>")

    monkeypatch.setattr(page.pictures, "under_attack", fail)
    with pytest.warns(UserWarning, match=r"the report lacks 'Test images under PGD-10.*RuntimeError: no <font>"):
        text, *_ = report()
    assert "RuntimeError: no &lt;font&gt;" in text
    assert len(facts_of(text)) == 3


def test_a_report_that_cannot_be_written_is_a_warning_after_everything_else(tmp_path, monkeypatch, capsys):
    def fail(*_):
        assert (tmp_path / "model.safetensors").exists()
        assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["final"]
        raise MemoryError

    monkeypatch.setattr(finetune, "write_report", fail)
    options = ("--model", "mlp", "--classes", "0-1", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path))
    with pytest.warns(UserWarning, match="there is no report.html: MemoryError"):
        cli.main(["finetune", "--data", "digits", *options])
    printed = capsys.readouterr().out
    assert "robust accuracy" in printed
    assert "model.safetensors" in printed
    assert "report.html" not in printed
