"""Tables and a plot of benchmark results.

    python benchmarks/report.py RESULT.json|FOLDER ... [--markdown report.md] [--plot report.png [--only REGEX]]

Reads what `pytest --benchmark --benchmark-json=FILE` and `benchmarks/gpu/run.sh FOLDER` wrote.

Results are checked. No op can move its bytes faster than the fastest copy of the same run. So on a GPU a result that is
faster by more than `NOISE` is refused: the time or the number of bytes is wrong. On a CPU it is a warning. There a
store first reads the cache line, which is not counted: a copy moves 3 bytes for 2 that are counted, `pgd_step` 5 for 4.
Besides, small tensors are in the caches.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import median

NOISE = 1.25


class Impossible(ValueError):
    """A result is faster than the memory."""


# ------------------------------------------------------------------ reading


def load(paths):
    """The files of results as dicts, each with its path; a folder stands for the files in it."""
    files = [f for path in map(Path, paths) for f in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    found = [{**json.loads(file.read_text()), "file": file.name} for file in files]
    strangers = [result["file"] for result in found if "environment" not in result]
    if strangers:
        raise ValueError(f"{', '.join(strangers)}: not a result of these benchmarks, `environment` is missing")
    return found


def figures(result):
    launches = [{"kind": "counter", **launch} for launch in result.get("launches", [])]
    return [b["extra_info"] for b in result.get("benchmarks", [])] + launches + result.get("summary", [])


def check_roofline(rows):
    """Raise Impossible for a GPU's result that is faster than a copy; return such results of a CPU as warnings."""
    warnings = []
    ops = [r for r in rows if r["kind"] == "op"]
    for row in ops:
        roofline = max(r["copy_bytes_per_second"] for r in ops if r["device"] == row["device"])
        excess = row["bytes_per_second"] / roofline
        if excess <= NOISE:
            continue
        text = (
            f"{row['op']} {row['size']} {row['dtype']} {row['backend']} on {row['device']}: "
            f"{row['bytes_per_second'] / 1e9:.0f} GB/s is {excess:.2f} times the fastest measured copy"
        )
        if row["device_type"] == "cuda":
            raise Impossible(f"{text}, more than noise ({NOISE}) explains: no table is made of it")
        warnings.append(text)
    return warnings


# ------------------------------------------------------------------ tables

OP_HEADER = (
    "op",
    "size",
    "image/grad",
    "backend",
    "µs",
    "naive µs",
    "x naive",
    "x compile",
    "of copy",
    "GB/s",
    "± IQR",
)
HOST_HEADER = ("op", "backend", "µs out=", "µs", "naive µs", "of naive")


def op_row(r):
    us = {name: f"{seconds * 1e6:,.1f}" for name, seconds in r["median_seconds"].items()}
    return (
        r["op"],
        r["size"],
        r["dtype"],
        r["backend"],
        us["fastadv"],
        us["naive"],
        f"{r['speedup_over_naive']:.2f}",
        ratio(r, "speedup_over_compile"),
        f"{r['share_of_copy_rate']:.2f}",
        f"{r['bytes_per_second'] / 1e9:.1f}",
        f"{r['relative_iqr']['fastadv']:.0%}" if r["relative_iqr"] else "-",
    )


def host_row(r):
    us = {name: f"{seconds * 1e6:.2f}" for name, seconds in r["median_seconds"].items()}
    return (r["op"], r["backend"], us["fastadv"], us["allocating"], us["naive"], f"{r['share_of_naive']:.2f}")


PEERS = ("torchattacks", "foolbox", "ART", "backward")
FASTEST_OVER = ("torchattacks", "torchattacks bf16", "torchattacks compile")
ATTACK_HEADER = (
    *("attack", "network", "batch", "ms"),
    *(f"x {peer}" for peer in PEERS),
    *("fastest", *(f"x {peer}" for peer in FASTEST_OVER)),
)


def ratio(found, name):
    return f"{found[name]:.2f}" if name in found else "-"


def attack_row(r):
    ms = f"{r['median_seconds']['fastadv'] * 1e3:,.1f}"
    best = r["best"].removeprefix("fastadv").strip() or "as it is"
    ratios = [ratio(r["speedup_over"], peer) for peer in PEERS]
    fastest = [ratio(r["best_speedup_over"], peer) for peer in FASTEST_OVER]
    return (r["attack"], r["network"], str(r["batch"]), ms, *ratios, best, *fastest)


MEMORY_HEADER = ("network", "batch", "MB with weights", "of torchattacks", "bf16: activations, MB", "of torchattacks")


def memory_row(r):
    held, row = r["held_bytes"], [r["network"], str(r["batch"])]
    for name, what in (("fastadv", "with_weights"), ("fastadv bf16", "activations")):
        shares = {peer: held[name][what] / held[peer][what] for peer in held}
        row += [f"{held[name][what] / 1e6:.1f}", ratio(shares, "torchattacks")]
    return tuple(row)


STEP_ATTACKS = ("fgsm", "fgsm-rs", "pgd")
TRAINING_HEADER = (
    *("network", "method", "batch", "F + Bx, ms", "F + B, ms", "optimiser, ms", "FGSM step, ms"),
    *(f"{attack} / its parts" for attack in STEP_ATTACKS),
    *("FGSM / standard", "PGD-7 / FGSM"),
)


def training_row(r):
    seconds = (r["quartile_seconds"][name] for name in ("F + Bx", "F + B", "optimiser", "fgsm"))
    ratios = (*(r["over_parts"][attack] for attack in STEP_ATTACKS), r["fgsm_over_standard"], r["pgd_over_fgsm"])
    return (
        *(r["network"], r["method"], str(r["batch"])),
        *(f"{1e3 * value:,.1f}" for value in seconds),
        *(f"{value:.2f}" for value in ratios),
    )


# The table of runs that were measured before `fastadv study` existed.
TRANSFER_HEADER = (
    *("method", "attack", "seeds", "parameters that train", "clean", "PGD-10", "PMA"),
    *("images", "PMA there", "AutoAttack there", "s of training", "time / FGSM", "alarms"),
)


def accuracy(found):
    if found is None:
        return "-"
    return f"{100 * found['mean']:.1f} ± {100 * found['spread']:.1f} %"


def transfer_row(r):
    few = r.get("judged") or {}
    return (
        *(r["method"], r["attack"], str(r["seeds"]), f"{r['trainable']:,}"),
        *(accuracy(r.get(name)) for name in ("clean_accuracy", "robust_accuracy", "pma_accuracy")),
        str(few.get("images", "-")),
        *(accuracy(few.get(name)) for name in ("PMA", "AutoAttack")),
        *(f"{r['train_s']:,.1f}", f"{r['time_over_fgsm']:.2f}", str(r["alarms"])),
    )


COUNTER_HEADER = (
    *("op", "image/grad", "backend", "µs", "GB/s"),
    *("of DRAM's peak", "instructions an element", "issue slots"),
)


def counter_row(r):
    seconds = r["nanoseconds"] * 1e-9
    return (
        r["op"],
        r["dtype"],
        r["backend"],
        f"{seconds * 1e6:.1f}",
        f"{r['bytes'] / seconds / 1e9:.0f}",
        f"{r['dram_percent']:.0f}%",
        f"{32 * r['warp_instructions'] / r['elements']:.1f}",
        f"{r['issue_slots_percent']:.0f}%",
    )


EVALUATION_HEADER = (
    *("attack", "data", "images", "clean", "robust", "torchattacks' robust", "s"),
    *("x torchattacks", "x nothing dropped", "gradients", "torchattacks' gradients"),
)


def evaluation_row(r):
    gradients, robust = r["gradients"], r["robust_accuracy"]
    accuracies = (r["clean_accuracy"], robust["fastadv"], robust.get("torchattacks"))
    return (
        *(r["attack"], r["data"], str(r["images"])),
        *("-" if accuracy is None else f"{accuracy:.1%}" for accuracy in accuracies),
        f"{r['median_seconds']['fastadv']:.1f}",
        *(ratio(r["speedup_over"], peer) for peer in ("torchattacks", "nothing dropped")),
        *(f"{gradients[name]:,}" if name in gradients else "-" for name in ("fastadv", "torchattacks")),
    )


KINDS = (
    ("counter", "what ncu counted in one launch, 28.9 million elements", COUNTER_HEADER, counter_row),
    ("op", "ops, medians", OP_HEADER, op_row),
    ("host", "one call on 16 elements", HOST_HEADER, host_row),
    ("attack", "attacks, medians", ATTACK_HEADER, attack_row),
    ("training cost", "a step of adversarial training, lower quartiles", TRAINING_HEADER, training_row),
    ("transfer", "robust transfer, mean and standard deviation over seeds", TRANSFER_HEADER, transfer_row),
    ("evaluation", "restarts on a trained network", EVALUATION_HEADER, evaluation_row),
    ("memory", "memory held for the backward pass", MEMORY_HEADER, memory_row),
)


def tables(rows):
    """(title, header, rows) for each kind of benchmark in the results."""
    for kind, title, header, make in KINDS:
        made = [make(r) for r in rows if r["kind"] == kind]
        if made:
            yield title, header, made


def aligned(header, rows):
    """The lines of a table in plain text."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        yield "  ".join(
            text.ljust(width) if rows[0][i][0].isalpha() else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()


def markdown_table(header, rows):
    rule = ["---" if cell[0].isalpha() else "---:" for cell in rows[0]]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def heading(environment):
    """One line with the machine and the versions of a result."""
    e = environment
    told = [e["device"], f"threads {e['threads']}", *(["recycled memory"] if e["recycled_memory"] else [])]
    told += [f"{name} {e[name]}" for name in ("driver", "cuda", "torch", "triton", "python") if e[name]]
    told += [f"commit {e['commit'][:12]}", e["date"][:10]]
    return ", ".join(told) + (" (**dry run: no measurement**)" if e["dry_run"] else "")


# {part of gpu/run.sh: its result in one line}
PARTS = {
    "build": lambda r: f"{len(r['ptxas'])} kernels, {sum(k['spill_bytes'] > 0 for k in r['ptxas'])} of them spill",
    "correctness": lambda r: ", ".join(f"{n} {what}" for what, n in r["tests"].items()),
    "sanitizer": lambda r: ", ".join(
        f"{tool}: {run['calls']} calls, {run['mismatches']} mismatches, {run['errors']} errors"
        for tool, run in r["tools"].items()
    ),
    **dict.fromkeys(
        ("study", "price"), lambda r: f"{len(r.get('cells', ()))} finished cells; their report is fastadv study's"
    ),
    "kernels": lambda r: (
        f"{len(r['kernels'])} kernels, {sum(k['local_bytes'] > 0 for k in r['kernels'])} of them spill"
    ),
    "sass": lambda r: f"{len(r['rows'])} kernels; gpu/sass.py --page",
}


def section(result):
    lines = ["", f"## {result['file']}", "", heading(result["environment"]), ""]
    if result["part"] in PARTS:
        verdict = "ok" if result["ok"] else "**failed**"
        return [*lines, f"{result['part']}: {verdict}; {PARTS[result['part']](result)}"]
    for title, header, rows in tables(figures(result)):
        lines += [f"{title[0].upper()}{title[1:]}:", "", *markdown_table(header, rows), ""]
    return lines


def markdown(results, warnings):
    notes = [f"- warning: {text}" for text in warnings]
    lines = ["# Benchmark results", "", *notes, *(line for result in results for line in section(result))]
    return "\n".join(lines).rstrip() + "\n"


# ------------------------------------------------------------------ plot

INK, GRID = "#222222", "#dddddd"
# title, scale, its ticks, and the bars: key, label, colour.
PANELS = (
    (
        "speed-up",
        "log",
        (0.25, 0.5, 1, 2, 4, 8, 16, 32),
        (("speedup_over_naive", "over eager", "#2a6f97"), ("speedup_over_compile", "over torch.compile", "#e09f3e")),
    ),
    ("share of the copy rate", "linear", (0, 0.25, 0.5, 0.75, 1), (("share_of_copy_rate", "", "#52796f"),)),
)


def bars(axis, rows, scale, ticks, series):
    """Draw bars. Bars of speed-ups begin at 1, where a slower contender goes to the left; bars of shares begin at 0."""
    height, start = 0.8 / len(series), 1 if scale == "log" else 0
    axis.set_xscale(scale)
    for i, (key, label, color) in enumerate(series):
        known = [(y, r[key]) for y, r in enumerate(rows) if key in r]
        values = [value for _, value in known]
        places = [y + (i - (len(series) - 1) / 2) * height for y, _ in known]
        axis.barh(places, [v - start for v in values], height * 0.9, left=start, color=color, label=label)
        for place, value in zip(places, values, strict=True):
            beside = {"xytext": (3, 0), "textcoords": "offset points", "va": "center_baseline", "fontsize": 7}
            axis.annotate(f"{value:.{2 - start}f}", (max(value, start), place), color=INK, **beside)
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axis.set_xticks([], minor=True)
    axis.grid(axis="x", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8, colors=INK)
    axis.spines[:].set_visible(False)


def plot(results, path, only=""):
    """Plot speed-ups and shares of the copy rate: a group for each op, a bar for each case. Leave the reference out.

    Args:
        results: the files of results.
        path: the PNG file.
        only: a regular expression; only cases whose "op size image/grad backend" matches are shown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for result in results for r in figures(result) if r["kind"] == "op" and r["backend"] != "reference"]
    rows = [r for r in rows if re.search(only, " ".join((r["op"], r["size"], r["dtype"], r["backend"])))]
    if not rows:
        raise ValueError("there is no op benchmark to plot")
    groups = {op: [r for r in rows if r["op"] == op] for op in dict.fromkeys(r["op"] for r in rows)}
    figure, axes = pyplot.subplots(
        len(groups),
        len(PANELS),
        figsize=(11, 1 + 0.35 * len(groups) + 0.25 * len(rows)),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
        height_ratios=[len(group) for group in groups.values()],
    )
    for (op, group), line in zip(groups.items(), axes, strict=True):
        for axis, (_, scale, ticks, series) in zip(line, PANELS, strict=True):
            bars(axis, group, scale, ticks, series)
        line[0].set_yticks(range(len(group)), [f"{r['size']}  {r['dtype']}  {r['backend']}" for r in group])
        line[0].set_ylim(len(group) - 0.4, -0.6)
        line[0].set_title(op, loc="left", fontsize=10, fontweight="bold", color=INK)
    for axis, (title, *_) in zip(axes[-1], PANELS, strict=True):
        axis.set_xlabel(title, fontsize=9, color=INK)
    axes[0][0].legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    where = {f"{r['device']}, threads: {r['threads']}" if r["device_type"] == "cpu" else r["device"] for r in rows}
    figure.suptitle("fastadv: " + "; ".join(sorted(where)), fontsize=11, color=INK)
    figure.savefig(path, dpi=100)


def roofline(results, path):
    """Plot every launch that ncu measured, with its two bounds: DRAM's peak bandwidth, and the issue slots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    launches = [launch for result in results for launch in result.get("launches", [])]
    if not launches:
        raise ValueError("there are no counters for a roofline: benchmarks/gpu/run.sh OUTDIR --part counters")
    rates, slots = [], []
    for r in launches:
        seconds = r["nanoseconds"] * 1e-9
        rates.append(r["dram_bytes"] / seconds / r["dram_percent"] * 100)
        slots.append(32 * r["warp_instructions"] / seconds / r["issue_slots_percent"] * 100)
    peak, issue = median(rates), median(slots)
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for backend, color in (("cuda", "#2a6f97"), ("triton", "#e09f3e")):
        mine = [r for r in launches if r["backend"] == backend]
        x = [32 * r["warp_instructions"] / r["bytes"] for r in mine]
        axis.scatter(x, [r["bytes"] / r["nanoseconds"] for r in mine], 14, color, label=backend)
    x = [1, issue / peak, 64]
    axis.plot(x, [min(peak, issue / v) / 1e9 for v in x], color=INK, linewidth=0.8)
    axis.annotate("DRAM's peak", (1.1, peak / 1e9), (0, 4), textcoords="offset points", fontsize=8, color=INK)
    axis.annotate("issue slots", (40, issue / 40e9), (6, 0), textcoords="offset points", fontsize=8, color=INK)
    axis.set(xscale="log", yscale="log", xlabel="instructions a byte", ylabel="GB/s of the bytes that must be moved")
    axis.grid(color=GRID, linewidth=0.6, which="both")
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=100)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables and a plot of benchmark results.")
    parser.add_argument("results", nargs="+", help="JSON files, or folders of them")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there (default: print them)")
    parser.add_argument("--plot", metavar="FILE", help="write the plot there, as PNG, SVG or PDF")
    parser.add_argument("--only", metavar="REGEX", default="", help="which cases the plot shows")
    parser.add_argument("--roofline", metavar="FILE", help="write a plot of ncu's counts there, with the chip's limits")
    args = parser.parse_args(argv)
    try:
        results = load(args.results)
        warnings = check_roofline([r for result in results for r in figures(result)])
        if args.plot:
            plot(results, args.plot, args.only)
        if args.roofline:
            roofline(results, args.roofline)
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    for text in warnings:
        print(f"report.py: warning: {text}", file=sys.stderr)
    text = markdown(results, warnings)
    if args.markdown:
        Path(args.markdown).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
