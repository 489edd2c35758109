"""A study as one HTML page that needs no other file."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fastadv.evaluation.report import html
from fastadv.evaluation.report.page import STYLE
from fastadv.study import answer as say
from fastadv.study import price_words
from fastadv.study.drawings import Drawing, first_screen
from fastadv.study.files import Record
from fastadv.study.grid import Cell
from fastadv.study.overfitting import DEFINITION, DETECTORS, Score
from fastadv.study.paper_table import PAPER_SETUP
from fastadv.study.reading import Study
from fastadv.study.results import HEADLINE_JUDGE, Result, Row, attack_words, grouped, judge_words, method_words, row_of
from fastadv.study.statistics import DRAWS, Average, Difference
from fastadv.study.timing import Time
from fastadv.study.words import points

_ALARM = "catastrophic overfitting: "  # the monitor's warnings begin so
_HOW = ("collapsed", "partly", "weak")
_SHOWN = 12  # a longer list is folded

_STYLE = """
body { max-width: 70rem } h1 { font-size: 1.5rem; line-height: 1.25 } h2 { margin-top: 2.2rem }
.answer { font-size: 1.7rem; font-weight: 700; margin: .6rem 0; padding-left: .8rem; border-left: .5rem solid #888 }
.stable { border-color: #0072b2 } .mixed { border-color: #e69f00 } .unstable { border-color: #d55e00 }
.lead { max-width: 52rem; margin: .55rem 0 }
.side { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: flex-start }
.side svg { max-width: 100%; height: auto } .side .wide { max-width: 100% } .side .wide svg { max-width: none }
figure { margin: 0 }
figcaption { font-size: .85rem; overflow-wrap: anywhere }
.cells th, .cells td { white-space: nowrap; overflow-wrap: normal; padding-right: 1.1rem }
.cells td { font-variant-numeric: tabular-nums } .note { color: #555; max-width: 46rem }
.cells tbody tr:nth-child(odd) { background: #f6f6f6 }
summary { cursor: pointer; margin: .6rem 0 } @media print { details > * { display: block } }
"""


def page(study: Study, drawn: Mapping[str, Drawing]) -> str:
    """The page as HTML.

    Args:
        study: the results.
        drawn: the figures, by their names.
    """
    first = first_screen(drawn)
    parts = [f"<h1>{html.text(say.TITLE)}</h1>", _answer(study), _side(drawn, first)]
    for heading, content in {
        "Beside the paper": _paper(study),
        "Catastrophic overfitting": _overfitting(study, drawn, first),
        "Accuracy under the training attack and under PGD, over the epochs": _curves(drawn),
        "The difference to training with PGD": _differences(study, drawn, first),
        "Fast attacks side by side": _attacks(study),
        "The price of robustness": _prices(study, drawn),
        "Time": _times(study.times),
        "All accuracies": _accuracies(study.results),
        "What is missing": _missing(study),
        "Warnings of the runs": _warnings(study.results),
        "How it was made": _made(study.results),
    }.items():
        parts += [f"<h2>{html.text(heading)}</h2>", content] if content else []
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.text(say.TITLE)}</title>'
    head += f'<meta name="viewport" content="width=device-width"><style>{STYLE}{_STYLE}</style>'
    return head + "\n".join(parts) + "</html>\n"


def _answer(study: Study) -> str:
    found = study.answer
    done = f"{len(study.results)} finished cells"
    if study.asked is not None:
        done = f"{len(study.asked) - len(study.absent)} of {len(study.asked)} cells are finished"
        extra = sum(each.cell.id not in set(study.asked) for each in study.results)
        done += f", and {extra} that this grid does not ask for" if extra else ""
    see = "." if study.complete else "; what is missing stands at the end."
    return "\n".join(
        [
            f'<p class="answer {found.kind}">{html.text(found.headline)}</p>',
            *(html.paragraph(words, "lead") for words in found.sentences),
            html.paragraph(done + see, "lead note" if study.complete else "lead warning"),
            *(html.paragraph(words, "lead warning") for words in _constant(study.results)),
            *(html.paragraph(words, "lead warning") for words in _unlike(study)),
        ]
    )


def _constant(results: Sequence[Result]) -> list[str]:
    """A warning of models that predict one class for all images; no attack can change that."""
    found = [each.cell.id for each in results if each.constant]
    if not found:
        return []
    shown = ", ".join(found[:_SHOWN]) + (", ..." if found[_SHOWN:] else "")
    return [
        f"{len(found)} of {len(results)} models predict one class for all images, and no attack fools them where it is "
        f"right: their robust accuracy is that class's share, and differences to them mean nothing ({shown})."
    ]


def _unlike(study: Study) -> list[str]:
    """Warnings of pairs that differ in more than the training attack."""
    of_prices = {
        (each.row, each.shared, each.attack): {k: v for k, v in each.difference.unlike.items() if k != "epochs"}
        for each in study.prices  # prices are of attacks with epochs of their own
        if each.difference is not None
    }
    of_pgd = {(each.row, each.attack): each.unlike for each in study.differences}
    found = (("PGD", list(of_pgd.values())), ("FGSM, of which prices are,", list(of_prices.values())))
    return [_unlike_words(name, rows) for name, rows in found if any(rows)]


def _unlike_words(name: str, rows: Sequence[Mapping[str, str]]) -> str:
    counts = Counter(f"{what} ({values})" for unlike in rows for what, values in unlike.items())
    what = ", ".join(f"{words} in {count}" for words, count in counts.most_common(_SHOWN))
    return (
        f"{sum(map(bool, rows))} of {len(rows)} differences to {name} are of models that differ in more than the "
        f"training attack: {what}."
    )


def _side(drawn: Mapping[str, Drawing], names: Iterable[str]) -> str:
    shown = [_figure(drawn[name]) for name in names]
    return f'<div class="side">{"".join(shown)}</div>' if shown else ""


def _figure(drawing: Drawing, heading: str = "") -> str:
    caption = f"<figcaption>{html.text(drawing.caption)}</figcaption>" if drawing.caption else ""
    return f"<figure>{heading}{drawing.svg}{caption}</figure>"


def _paper(study: Study) -> str:
    words = "Points of robust accuracy, with 95 % intervals."
    return html.paragraph(words, "note") + _escaped(*study.paper) + html.paragraph(PAPER_SETUP, "note")


def _overfitting(study: Study, drawn: Mapping[str, Drawing], first: Sequence[str]) -> str:
    untold = sum(each.attack != "none" for each in study.results) - len(study.courses)
    parts = [html.paragraph(DEFINITION, "note")]
    if untold:
        words = "runs have no record of a validation and a probe: whether they collapsed is not known."
        parts.append(html.paragraph(f"{untold} {words}", "warning"))
    if not study.courses:
        return "\n".join([*parts, html.paragraph("Not measured yet.")])
    parts.append(_side(drawn, [name for name in drawn if name.startswith("map-") and name not in first]))
    parts += [
        "<h3>Runs that overfitted or are weak</h3>",
        _overfitted(study),
        "<h3>Detectors</h3>",
        _detectors(study.scores),
    ]
    return "\n".join(parts)


def _overfitted(study: Study) -> str:
    failed = sorted((each for each in study.courses if each.how), key=lambda each: _HOW.index(str(each.how)))
    if not failed:
        sound = sum(each.sound for each in study.courses)
        return html.paragraph(f"None of {sound} runs where it would show, those trained with PGD among them.")
    rows = []
    for each in failed:
        cell, epochs = each.result.cell, {e["epoch"]: e for e in each.result.epochs}
        when = next(n for n in (each.collapse, each.partly, max(epochs)) if n is not None)
        before = [e["robust_accuracy"] for n, e in epochs.items() if n < when and _has_validation(e)]
        kept = each.result.record["records"][-1].get("best_epoch")
        rows.append(
            [
                *_names(cell),
                f"{cell.eps:g}",
                str(cell.seed),
                str(each.how),
                str(when + 1),
                _percent(max(before)) if before else "-",
                _percent(epochs[when]["robust_accuracy"]),
                "-" if kept is None else str(kept + 1),
                _percent(each.result.accuracies.get("pgd-10")),
            ]
        )
    head = [
        "data",
        "method",
        "attack",
        "eps",
        "seed",
        "how",
        "epoch",
        "PGD-10 before",
        "then",
        "epoch kept",
        "its PGD-10",
    ]
    return _folded(f"all {len(rows)} runs that overfitted or are weak", head, rows)


def _detectors(found: Sequence[Score]) -> str:
    rows = []
    for each in found:
        lead = "-" if each.lead is None else f"{each.lead:g} ({min(each.leads)} to {max(each.leads)})"
        false = f"{each.false} of {each.sound}"
        seen = f"{each.found} of {each.collapsed}" if each.collapsed else "-"
        rows.append([html.text(each.name), html.text(each.rule), seen, lead, false])
    absent = [name for name in DETECTORS if name not in {each.name for each in found}]
    note = f"Not in these records: {', '.join(absent)}. " if absent else ""
    note += "Epochs before the collapse: the median, least and most; below 0 it was late. False alarms: runs that "
    note += "neither overfitted nor are weak, where that would show, in which it fired. The "
    note += "gap and the monitor's alarm read the probe by which a collapse is defined."
    head = ["detector", "fires at", "collapses seen", "epochs before", "false alarms"]
    return _table(head, rows) + html.paragraph(note, "note")


def _curves(drawn: Mapping[str, Drawing]) -> str:
    names = [name for name in drawn if name.startswith("curves-")]
    if not names:
        return ""
    words = "Images of the monitor's probe. Thin: run by run; heavy: their mean; a cross: a collapse."
    shown = "".join(map(_curve, (drawn[name] for name in names[:_SHOWN])))
    more = "".join(map(_curve, (drawn[name] for name in names[_SHOWN:])))
    parts = [html.paragraph(words, "note"), f'<div class="side">{shown}</div>']
    return "\n".join([*parts, html.folded("more", f'<div class="side">{more}</div>') if more else ""])


def _curve(drawing: Drawing) -> str:
    heading = f"<h3>{html.text(drawing.words.partition(':')[0])}</h3>"
    return f'<div class="wide">{_figure(drawing, heading)}</div>'


def _differences(study: Study, drawn: Mapping[str, Drawing], first: Sequence[str]) -> str:
    if not study.differences:
        return html.paragraph(f"Not measured yet: {study.no_pgd}.")
    how = (
        "Verdict minus verdict on the same image, under the same judge, with the same seed, in points. Over data sets: "
        "the mean, with Student's 95 % interval of the sets' means. Of one row (or one data "
        f"set): a 95 % interval from {DRAWS:,} draws of the images, each image being one unit over the seeds, to each "
        "of which a term of Student's t is added for the seeds; with one seed there is none, and the interval says "
        "nothing of other seeds. One in twenty such intervals errs: of many some leave out 0 by chance. Where an "
        "interval leaves a figure, its bounds are in the tables."
    )
    over = [
        [
            html.text(each.model),
            html.text(attack_words(each.attack)),
            html.text(" + ".join(map(method_words, each.methods))),
            f"{each.eps:g}",
            html.text(judge_words(each.judge)),
            str(each.data_sets),
            *_interval(each),
        ]
        for each in study.averages
    ]
    rows = [
        [
            _data(each.row),
            html.text(each.row.model),
            html.text(method_words(each.row.method)),
            html.text(attack_words(each.attack)),
            f"{each.row.eps:g}",
            html.text(judge_words(each.judge)),
            f"{len(each.seeds)} x {each.verdicts.shape[1]}",
            *_interval(each),
        ]
        for each in study.differences
    ]
    interval = ["points", "from", "to"]
    head = ["model", "attack", "methods", "eps", "judge", "data sets", *interval]
    return "\n".join(
        [
            html.paragraph(how, "note"),
            _side(drawn, [name for name in drawn if name.startswith("difference-") and name not in first]),
            _folded(f"over data sets: {len(over)} rows", head, over),
            _folded(
                f"each data set: {len(rows)} rows",
                ["data", "model", "method", "attack", "eps", "judge", "seeds x images", *interval],
                rows,
            ),
        ]
    )


def _times(found: Sequence[Time]) -> str:
    rows = [
        [
            html.text(each.model),
            html.text(method_words(each.method)),
            html.text(attack_words(each.attack)),
            *map(_ratio, (each.to_pgd, each.predicted_to_pgd, each.to_none, each.predicted_to_none)),
            str(each.pairs),
        ]
        for each in found
    ]
    head = ["model", "method", "attack", "to PGD", "foretold", "to no attack", "foretold", "pairs"]
    words = (
        "Training without evaluations: the median ratio to the cells that differ in the training attack and its "
        "epochs alone, made on the same machine; processor time on a CPU, and on a GPU of cells that had it "
        "alone. Foretold: by the cost model, in passes through the network."
    )
    return html.paragraph(words + _retimed(found), "note") + _table(head, rows) if rows else ""


def _retimed(found: Iterable[Time]) -> str:
    """Which times are of cells that were trained again; empty where none is."""
    words = ""
    for place, timed in grouped((each for each in found if each.retimed), lambda each: each.retimed):
        attacks = ", ".join(dict.fromkeys(attack_words(each.attack) for each in timed))
        words += f" Of {attacks}: of cells that were trained again on {place}, with nothing else there."
    return words


def _attacks(study: Study) -> str:
    found = study.attacks
    if found is None:
        return ""
    words = (
        f"{method_words(found.method)} of {found.model}. In points, with 95 % intervals; failed: runs that "
        "collapsed, overfitted partly, or are weak. For an eps the attacks have the same data sets and seeds, so"
        " that there may be fewer than in the other tables."
    )
    return html.paragraph(words[0].upper() + words[1:], "note") + _escaped(found.head, found.rows)


def _prices(study: Study, drawn: Mapping[str, Drawing]) -> str:
    if not study.prices:
        return ""
    rows = [
        [
            _data(each.row),
            html.text(each.row.model),
            html.text(method_words(each.row.method)),
            f"{each.row.eps:g}",
            html.text(each.attack),
            str(each.epochs),
            str(len(each.seeds)),
            *map(_ratio, (each.time, each.predicted)),
            *map(_percent, (each.clean, each.robust)),
            *(["-"] * 3 if each.difference is None else _interval(each.difference)),
        ]
        for each in study.prices
    ]
    judge = judge_words(HEADLINE_JUDGE)
    head = ["data", "model", "method", "eps", "attack", "epochs", "seeds", "time", "foretold", "clean", judge]
    words = (
        "Time of training without evaluations, as a multiple of that without an attack; foretold: by the cost "
        f"model. Minus FGSM's: accuracy under {judge} minus that of FGSM in as many epochs as without an attack, "
        "in points, with a 95 % interval, as in the differences to PGD. Attacks by their names in the grid. The "
        "first table has means over eps."
    )
    if retimed := _retimed(study.times):
        words += f"{retimed} Such a time stands for every data set and eps."
    shown = [name for name in drawn if name.startswith("price-")]
    table = _folded(f"all {len(rows)} of them", [*head, "minus FGSM", "from", "to"], rows)
    over = _escaped(*price_words.rows(study.summaries))
    return "\n".join([html.paragraph(words, "note"), over, _side(drawn, shown), table])


def _accuracies(results: Sequence[Result]) -> str:
    judges = say.judges_of(judge for each in results for judge in each.verdicts)
    parts = []
    for names, group in grouped(results, lambda each: (each.cell.data, each.cell.classes, each.cell.model)):
        rows = []
        for (row, attack), cells in grouped(group, lambda each: (row_of(each), each.cell.attack)):
            shares = [[each.accuracies[judge] for each in cells if judge in each.verdicts] for judge in judges]
            about = [html.text(method_words(row.method)), html.text(attack_words(attack)), f"{row.eps:g}"]
            rows.append([*about, str(len(cells)), *map(_mean, shares)])
        head = ["method", "attack", "eps", "seeds", *(html.text(judge_words(judge)) for judge in judges)]
        title = f"{names[0]}{f' ({names[1]})' if names[1] else ''}, {names[2]}: {len(rows)} rows"
        parts.append(html.folded(title, _table(head, rows)))
    if not parts:
        return ""
    words = (
        "Per cent of the test images; with several seeds their mean ± standard deviation. Each judge attacks alone, "
    )
    words += "but the parts of APGD and of AutoAttack each what is left."
    return html.paragraph(words, "note") + "\n".join(parts)


def _missing(study: Study) -> str:
    parts = [html.paragraph(words, "warning") for words in study.problems]
    if study.absent:
        failed = sum(bool(reason) for reason in study.absent.values())
        words = f"{len(study.absent)} cells are not finished" + (f"; {failed} of them failed." if failed else ".")
        rows = [[html.text(id), html.text(reason or "not run yet")] for id, reason in study.absent.items()]
        parts += [html.paragraph(words), _folded(f"all {len(rows)} of them", ["cell", "why"], rows)]
    if study.unjudged:
        counts = Counter(judge for missed in study.unjudged.values() for judge in missed)
        words = ", ".join(f"{judge_words(judge)} in {count}" for judge, count in counts.items())
        parts.append(html.paragraph(f"Of finished cells, judges are missing: {words}."))
    return "\n".join(parts)


def _warnings(results: Sequence[Result]) -> str:
    """The warnings of training and judging. The monitor's alarms are left out: they have a table of their own."""
    counts = Counter(words for each in results for words in set(each.record.get("warnings", ())) if _ALARM not in words)
    rows = [[html.text(words), str(count)] for words, count in counts.most_common()]
    return _folded(f"all {len(rows)} of them", ["warning", "cells"], rows) if rows else ""


def _made(results: Sequence[Result]) -> str:
    if not results:
        return ""
    facts = {}
    for kind in ("settings", "machine"):
        names = dict.fromkeys(name for each in results for name in each.record[kind])
        for name in names:
            values = Counter(json.dumps(each.record[kind].get(name), ensure_ascii=False) for each in results)
            shown = [value.strip('"') for value, _ in values.most_common(4)]
            facts[name] = ", ".join(shown) + (f" and {len(values) - 4} more" if len(values) > 4 else "")
    return html.folded("settings and machines of the cells", html.facts(facts))


# ---------------------------------------------------------------------- cells of tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return html.table(head, rows, "cells")


def _escaped(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return _table([html.text(cell) for cell in head], [[html.text(cell) for cell in row] for row in rows])


def _folded(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a long one is folded, and only its title is shown."""
    table = _table(head, rows)
    return table if len(rows) <= _SHOWN else html.folded(title, table)


def _names(cell: Cell) -> list[str]:
    return [_data(cell), html.text(method_words(cell.method)), html.text(attack_words(cell.attack))]


def _data(named: Cell | Row) -> str:
    return f"<bdi>{html.text(named.data)}</bdi>" + (f" {html.text(named.classes)}" if named.classes else "")


def _interval(each: Average | Difference) -> list[str]:
    return [points(value) for value in (each.mean, each.low, each.high)]


def _mean(shares: Sequence[float]) -> str:
    if not shares:
        return "-"
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{spread}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _has_validation(epoch: Record) -> bool:
    return epoch.get("robust_accuracy") is not None
