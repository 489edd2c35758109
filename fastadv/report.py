"""A training run as one HTML file: accuracies, curves, images under attack, settings, versions."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from torch import nn

from fastadv._extras import require
from fastadv.attacks import by_name
from fastadv.attacks.objective import find_logits
from fastadv.attacks.state import frozen
from fastadv.attacks.verdicts import predicted
from fastadv.data import to_float
from fastadv.evaluation.samples import Batch
from fastadv.files import write_atomically

SHOWN = 8  # images
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
th { font-weight: 600 } img { max-width: 100% } .big { font-size: 1.4rem } .warning { color: #b02a37 }
"""


def write_report(
    path: str | Path,
    title: str,
    model: nn.Module,
    records: Sequence[Mapping],
    test: Batch,
    classes: Sequence[str],
    eps: float,
    facts: Mapping[str, Mapping[str, object]],
) -> None:
    """Write a report that needs no other file and no network.

    Args:
        path: of the HTML file.
        title: its heading.
        model: from images in [0, 1] to logits; it is attacked with PGD-10 for the pictures, and left as found.
        records: what `Trainer.fit` returned.
        test: images (N, C, H, W) and labels; the first ones are shown.
        classes: a name for each label.
        eps: budget in pixels of [0, 1].
        facts: tables by their headings, such as {"Settings": {...}, "Versions": {...}}.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    final = records[-1]
    alarms = [f"epoch {r['epoch']}: {r['alarm']} ({r['action']})" for r in records if r.get("alarm")]
    backbone = next((r["backbone"] for r in records if "backbone" in r), None)
    if backbone is not None and backbone["warning"]:
        alarms.insert(0, backbone["warning"])
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table({"Clean accuracy": _percent(final["clean_accuracy"]), **_robust(final, eps)}, "big"),
        *(f"<p>{escape(words)}</p>" for words in _choice(final)),
        *(f'<p class="warning">{escape(alarm)}</p>' for alarm in alarms),
        "<h2>Over the epochs</h2>",
        _image(_curves(records), "accuracies over the epochs"),
        f"<h2>Test images under PGD-10 at eps {255 * eps:g}/255</h2>",
        _image(_examples(model, test, classes, eps), "test images, perturbations and predictions"),
    ]
    if backbone is not None and backbone["robust_accuracy"] is not None:
        before = {"Clean accuracy": _percent(backbone["clean_accuracy"]), **_robust(backbone, eps)}
        parts += ["<h2>The backbone before training, with a head fitted to clean images</h2>", _table(before)]
    for heading, table in facts.items():
        parts += [f"<h2>{escape(heading)}</h2>", _table(table)]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    write_atomically(path, (head + "\n".join(parts) + "</html>\n").encode())


def write_curves(path: str | Path, curves: Sequence[Mapping]) -> None:
    """Write robust accuracy over the budget as a PNG file: `curves` as `fastadv.evaluation.evaluate` returns them.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = require("matplotlib.figure").Figure(figsize=(4.5 * len(curves), 3.2), layout="constrained")
    for axis, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        scale, unit = (255, " / 255") if curve["norm"] == "Linf" else (1, " in L2")
        eps, robust = ([scale * e for e in curve["eps"]], [100 * share for share in curve["robust_accuracy"]])
        axis.plot(eps, robust, color="#00798c", marker=".")
        axis.fill_between(eps, robust, color="#00798c", alpha=0.15)
        axis.set(xlabel=f"eps{unit}", ylabel="robust accuracy, %", xlim=(0, eps[-1]), ylim=(0, 100))
        axis.set_title(
            f"mean {100 * curve['area']:.1f} %, expected robustness {scale * curve['expected_robustness']:.3g}{unit}",
            fontsize=9,
        )
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def _choice(final: Mapping) -> list[str]:
    """A sentence where chance alone may have told the chosen weights from others."""
    if not final.get("within_noise"):
        return []
    others, by = ", ".join(map(str, final["within_noise"])), final["chosen_by"].replace("_", " ")
    return [
        f"These are the weights of epoch {final['best_epoch']}, chosen by {by} on the validation images. Within noise "
        f"of them, worse by at most two standard errors ({_percent(final['noise'])}): those of epoch {others}."
    ]


def _robust(record: Mapping, eps: float) -> dict[str, str]:
    rows = {f"Robust accuracy (PGD-10, eps {255 * eps:g}/255)": _percent(record["robust_accuracy"])}
    if "pma_accuracy" in record:
        rows["and under PMA, two runs of 20 steps"] = _percent(record["pma_accuracy"])
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(rows: Mapping[str, object], kind: str = "") -> str:
    cells = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items()
    )
    return f'<table class="{kind}">{cells}</table>'


def _image(figure, words: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _curves(records: Sequence[Mapping]):
    figure = require("matplotlib.figure").Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    lines = {
        "clean_accuracy": ("clean, validation", "#6c757d", "-"),
        "robust_accuracy": ("PGD-10, validation", "#00798c", "-"),
        "train_accuracy": ("training attack, training", "#d1495b", "-"),
        "probe_pgd": ("PGD-5, probe", "#00798c", ":"),
    }
    epochs = [r for r in records if "epoch" in r]
    for key, (label, colour, style) in lines.items():
        points = [(r["epoch"] + 1, 100 * r[key]) for r in epochs if key in r]
        if points:
            axis.plot(
                *zip(*points, strict=True), style, color=colour, label=label, marker="." if len(points) < 3 else ""
            )
    axis.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 100))
    axis.grid(axis="y", color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)
    if epochs:
        axis.legend(frameon=False, fontsize=8)
    return figure


def _examples(model: nn.Module, test: Batch, classes: Sequence[str], eps: float):
    """Image, perturbation and adversarial image in columns, with what the model says."""
    device = next(model.parameters()).device
    count = min(SHOWN, len(test[0]))
    spread = torch.arange(count) * len(test[0]) // count  # over all classes
    images, labels = to_float(test[0][spread].to(device)), test[1][spread].to(device)
    x_adv = by_name("pgd-10", model, eps)(images, labels, seed=0)
    with torch.no_grad(), frozen(model):
        says = [predicted(find_logits(model(x), len(x))).tolist() for x in (images, x_adv)]
    figure = require("matplotlib.figure").Figure(figsize=(1.25 * len(images), 4.4), layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False)
    perturbation = (x_adv - images) / (2 * max(eps, 1e-6)) + 0.5
    for row, (pictures, named) in enumerate(((images, says[0]), (perturbation, None), (x_adv, says[1]))):
        for i, axis in enumerate(axes[row]):
            axis.imshow(_pixels(pictures[i]), vmin=0, vmax=1, cmap="gray" if images.shape[1] == 1 else None)
            axis.set_axis_off()
            if named is not None:
                right = named[i] == int(labels[i])
                name = classes[named[i]] if named[i] >= 0 else "no prediction"
                axis.set_title(name, fontsize=8, color="#2e7d32" if right else "#c62828")
    return figure


def _pixels(image: torch.Tensor):
    pixels = image.float().clamp(0, 1).cpu().permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3]
