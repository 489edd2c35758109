"""A training run as one HTML file: accuracies, curves, classes, images under attack, settings, versions."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from fastadv._warnings import warn
from fastadv.data.share import Samples
from fastadv.evaluation.report import classes as class_tables
from fastadv.evaluation.report import curves, html, pictures
from fastadv.evaluation.report.curves import Record
from fastadv.files import write_atomically

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
th { font-weight: 600 } td, th, pre { overflow-wrap: anywhere; white-space: pre-wrap } img { max-width: 100% }
[class=""] th, .big th { overflow-wrap: normal }
.big { font-size: 1.4rem } .warning, .wrong { color: #b02a37 } .right { color: #2e7d32 } .wide { overflow-x: auto }
.numbers td:nth-last-child(-n+3), .numbers th:nth-last-child(-n+3) { text-align: right; white-space: nowrap }
.matrix td { text-align: right; padding: 0 }
.matrix td div { padding: .2rem .4rem; min-width: 1.5rem }
.matrix td:first-child { text-align: left; padding: .2rem .8rem .2rem 0 }
.matrix th:nth-child(n+2) { text-align: right; padding: .2rem .4rem; overflow-wrap: normal }
.pictures { table-layout: fixed } .pictures td, .pictures th { width: 6.6rem; padding: .2rem; font-size: .8rem }
.pictures img { width: 6.5rem; max-height: 13rem; object-fit: contain; image-rendering: pixelated }
"""


def write_report(
    path: str | Path,
    title: str,
    model: nn.Module,
    records: Sequence[Record],
    test: Samples,
    classes: Sequence[str],
    eps: float,
    facts: Mapping[str, Mapping[str, object]],
) -> None:
    """Write a report as one HTML file that needs no other file and no network.

    Where a part cannot be made, the report says so in its place, and there is a warning. Epochs count from 1.

    Args:
        path: the HTML file.
        title: the heading of the report.
        model: from images in [0, 1] to logits; it is attacked with PGD-10 for the pictures, and is not changed.
        records: the records that `Trainer.fit` returned.
        test: images (N, C, H, W) and labels; a few images are shown.
        classes: a name for each label.
        eps: the radius of the ball, in the images' units, [0, 1].
        facts: {heading: table}, such as {"Settings": {...}, "Versions": {...}}.

    Raises:
        OSError: the file cannot be written.
    """
    parts = [f"<h1>{html.text(title)}</h1>"]
    builders: dict[str, Callable[[], str]] = {
        "": lambda: _result(records, eps),
        "Over the epochs": lambda: _over_epochs(records),
        "Class by class": lambda: _classes(records[-1], classes),
        f"Test images under PGD-10 at eps {255 * eps:g}/255": lambda: _pictures(model, test, classes, eps),
        "The backbone before training, with a head fitted to clean images": lambda: _backbone(records, eps),
        **{heading: partial(html.facts, table) for heading, table in facts.items()},
    }
    for heading, build in builders.items():
        parts += _part(heading, build)
    style = f"<style>{STYLE}</style>"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.text(title)}</title>{style}'
    write_atomically(path, (head + "\n".join(parts) + "</html>\n").encode())


def _part(heading: str, build: Callable[[], str]) -> list[str]:
    """A part with its heading; nothing where it is empty. Where it fails, a sentence in its place says why."""
    try:
        content = build()
    except Exception as error:
        what = heading or "its first part"
        warn(f"the report lacks {what!r}: {type(error).__name__}: {error}")
        content = html.paragraph(f"This part could not be made: {type(error).__name__}: {error}", "warning")
    return [f"<h2>{html.text(heading)}</h2>" if heading else "", content] if content else []


def _result(records: Sequence[Record], eps: float) -> str:
    final, backbone = records[-1], _measured(records)
    alarms = [f"epoch {r['epoch'] + 1}: {r['alarm']} ({r['action']})" for r in records if r.get("alarm")]
    if backbone is not None and backbone["warning"]:
        alarms.insert(0, backbone["warning"])
    if final.get("clean_accuracy") is None:
        result = html.paragraph("There were no test and no validation images: nothing was measured.")
    else:
        result = html.facts({"Clean accuracy": _percent(final["clean_accuracy"]), **_robust(final, eps)}, "big")
    sentences = [html.paragraph(words) for words in _choice(final)]
    return "\n".join([result, *sentences, *(html.paragraph(alarm, "warning") for alarm in alarms)])


def _over_epochs(records: Sequence[Record]) -> str:
    if not any("epoch" in record for record in records):
        return ""
    return html.image(curves.over_epochs(records), "accuracies over the epochs")


def _classes(final: Record, names: Sequence[str]) -> str:
    found = final.get("confusion")
    if found is None:
        return ""
    clean, attacked = (class_tables.matrix_of(found[name], len(names)) for name in ("clean", "attacked"))
    return "\n".join(
        [
            html.paragraph(
                "Of the test images of each class, those that are classified right, and that still are under attack."
            ),
            class_tables.by_class(clean, attacked, names),
            "<h3>What they are taken for</h3>",
            class_tables.confusion_table(clean, names),
            "<h3>What they are taken for under attack</h3>",
            class_tables.confusion_table(attacked, names),
        ]
    )


def _pictures(model: nn.Module, test: Samples, classes: Sequence[str], eps: float) -> str:
    return pictures.under_attack(model, test, classes, eps) if len(test[0]) else ""


def _backbone(records: Sequence[Record], eps: float) -> str:
    measured = _measured(records)
    if measured is None or measured["robust_accuracy"] is None:
        return ""
    return html.facts({"Clean accuracy": _percent(measured["clean_accuracy"]), **_robust(measured, eps)})


def _measured(records: Sequence[Record]) -> Record | None:
    return next((record["backbone"] for record in records if "backbone" in record), None)


def _choice(final: Record) -> list[str]:
    """A sentence where chance alone may have made the choice among the weights."""
    if not final.get("within_noise"):
        return []
    others = ", ".join(str(epoch + 1) for epoch in final["within_noise"])
    by = final["chosen_by"].replace("_", " ")
    return [
        f"These are the weights of epoch {final['best_epoch'] + 1}, chosen by {by} on the validation images. Within "
        f"noise of them, worse by at most two standard errors ({_percent(final['noise'])}): those of epoch {others}."
    ]


def _robust(record: Record, eps: float) -> dict[str, str]:
    rows = {f"Robust accuracy (PGD-10, eps {255 * eps:g}/255)": _percent(record["robust_accuracy"])}
    if "pma_accuracy" in record:
        rows["Robust accuracy (PGD-10 and PMA together)"] = _percent(record["pma_accuracy"])
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
