"""The list of figures that README and docs quote: for each figure its id, its file of results and its place there."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import mean, median, stdev
from typing import Any

from report import figures as rows_of

CPU = "cpu-amd-epyc-2-threads-2026-11-28.json"
RECYCLED = "cpu-amd-epyc-2-threads-recycled-2026-11-28.json"
ONE_THREAD = "cpu-amd-epyc-1-thread-2026-11-28.json"
CPU_ATTACKS = "cpu-amd-epyc-attacks-2026-11-28.json"
STRENGTH = "cpu-amd-epyc-strength-2026-11-22.json"
EVALUATION = "cpu-amd-epyc-evaluation-2026-11-22.json"
VERDICTS_CPU = "cpu-amd-epyc-verdicts-2026-11-26.json"
STEPS_CPU = "training-cpu-amd-epyc-1-thread.json"
TRANSFER_CPU = "transfer-cifar10-cpu-amd-epyc-1-thread.json"
PHOTOGRAPHS = "transfer-photographs-cpu-amd-epyc-1-thread.json"
PACKAGE, OURS = "autoattack/backbone.json", "autoattack/fastadv.json"
OUR_AUTOATTACK = "autoattack/fastadv-autoattack.json"
OWN_TIME = "autoattack/own-time.json"
H100, H200, SECOND = "nvidia-h100-2026-11-22/", "nvidia-h200-2026-11-26/", "nvidia-h200-2026-11-26-second/"
THIRD = "nvidia-h200-2026-11-27/"
DEMO = "demo.json"
STUDY, CELLS, CELLS_CPU = "study/results.json", "study/cells/*/cell.json", "study-cpu/cells/*/cell.json"
CELLS_AGAIN = "study-again/cells/*/cell.json"
PRICED, RIVALS = ("full", "lora"), ("fgsm-5-epochs", "stale")  # of FGSM, for the time of standard fine-tuning
PRICE, PRICE_CELLS = "price/results.json", "price/cells/*/cell.json"
MANY, MANY_CELLS = "price-many/results.json", "price-many/cells/*/cell.json"
ZEROS = "zeros-cpu-amd-epyc-1-thread.json"
RETIMED, STUDY_RETIMED = "price/cells/*/retimed.json", "study/cells/*/retimed.json"
SCRATCH, SLOW = "scratch/fgsm.json", "scratch/fgsm-slow.json"
TUNED, BACKBONE = "scratch/tuned.json", "scratch/backbone.json"
TUNED_FAST, BACKBONE_AGAIN = "scratch/tuned-fast.json", "scratch/backbone-again.json"

# {pattern of files: the command that made them}; the first pattern that matches counts. Other files name their command.
COMMANDS = {
    RECYCLED: "pytest --benchmark benchmarks/bench_ops.py, MALLOC_{MMAP,TRIM}_THRESHOLD_ above the tensors' size",
    "cpu-amd-epyc-*-thread*": "pytest --benchmark benchmarks/bench_ops.py benchmarks/bench_host.py",
    "cpu-amd-epyc-attacks-*": "pytest --benchmark benchmarks/attacks/bench_pgd.py",
    STRENGTH: "benchmarks/attacks/strength.py",
    EVALUATION: "pytest --benchmark benchmarks/attacks/bench_evaluation.py",
    "*verdicts*": "benchmarks/peers/timed.py",
    OWN_TIME: "benchmarks/peers/own_time.py",
    "autoattack/fastadv*": "benchmarks/peers/verdicts.py",
    "autoattack/*": "benchmarks/peers/autoattack.py CHECKOUT",
    "peers/*": "benchmarks/peers/suites.py CHECKOUTS... --mnist FOLDER",
    "nvidia-*": "benchmarks/gpu/run.sh FOLDER",
    STEPS_CPU: "pytest --benchmark benchmarks/training/bench_step.py",
    ZEROS: "benchmarks/training/zeros.py DATA/cifar10 OUT",
    "scratch/*": "benchmarks/training/scratch.py DATA FOLDER",
    "study-cpu/*": "the same study on a CPU, cut",
    "study-again/*": "some of its cells on a CPU by later code",
    STUDY_RETIMED: "fastadv study benchmarks/training/study.yaml --data-folder DATA --out OUT --times 1",
    "study/*": "fastadv study benchmarks/training/study.yaml --data-folder DATA --out benchmarks/results/study",
    RETIMED: "fastadv study benchmarks/training/price.yaml --data-folder DATA --out OUT --times 2, cut",
    "price-many/*": "fastadv study benchmarks/training/price-many.yaml --data-folder DATA --out OUT",
    "price/*": "fastadv study benchmarks/training/price.yaml --data-folder DATA --out benchmarks/results/price",
}

METHODS, ATTACKS = ("linear", "full"), ("fgsm", "pgd")
NETWORKS = {"conv": "three convolutions, batch 128", "resnet18": "ResNet-18, batch 32", "vit": "small ViT, batch 32"}
HALF = ("bf16/bf16", "f16/f16")


@dataclass(frozen=True)
class Figure:
    """A measured value that a text quotes.

    Attributes:
        id: the name that the texts have in braces.
        what: a description in words.
        files: files in benchmarks/results; a name with a star stands for all files that match.
        value: the place of the value, for `at` in the only file; or a function of the contents of the files, in their
            order, with a list of contents for a name with a star.
        form: turns the value into the text that is quoted.
    """

    id: str
    what: str
    files: tuple[str, ...]
    value: str | Callable
    form: Callable[[Any], str]


# ------------------------------------------------------------------ where a value is


def at(found: Mapping, path: str) -> Any:
    """The value at a place such as `key.key[name=value&name=value].key`.

    Brackets choose the row of a list that has these values. The key `figures` stands for the rows of a benchmark,
    wherever its file has them.

    Args:
        found: the content of a file.
        path: the place.

    Raises:
        LookupError: there is no such key; or no row or several rows match.
    """
    for key, facts in re.findall(r"([^.\[]+)(?:\[([^]]*)\])?", path):
        found = rows_of(found) if key == "figures" else found[key]
        if facts:
            found = _one(found, dict(fact.split("=") for fact in facts.split("&")))
    return found


def _one(rows: Iterable[Mapping], facts: Mapping[str, str]) -> Mapping:
    chosen = [row for row in rows if all(f"{row.get(name)}" == value for name, value in facts.items())]
    if len(chosen) != 1:
        raise LookupError(f"{len(chosen)} rows have {facts}, one was asked for")
    return chosen[0]


def extent(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return min(values), max(values)


# ------------------------------------------------------------------ how it is written


def times(ratio: float) -> str:
    """Two or three digits: 0.94, 3.1, 43."""
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def share(ratio: float) -> str:
    return f"{ratio:.2f}"


def tenths(value: float) -> str:
    return f"{value:.1f}"


def hundredths(value: float) -> str:
    return f"{value:.2f}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def points(difference: float) -> str:
    return f"{100 * difference:.1f}"


def spread(found: Mapping[str, float]) -> str:
    return f"{100 * found['mean']:.1f} ± {100 * found['spread']:.1f} %"


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def by_seed(numbers: Iterable[float]) -> str:
    return " / ".join(map(whole, numbers))


def between(form: Callable[[float], str]) -> Callable[[tuple[float, float]], str]:
    return lambda pair: " to ".join(dict.fromkeys(map(form, pair)))


# ------------------------------------------------------------------ the step


def steps_on_cpu() -> Iterator[Figure]:
    large = "size=large&dtype=f32/f32&backend=cpu"
    for op in ("pgd_step", "fgsm_rs_step", "fgsm_step", "random_init"):
        yield from _step(f"cpu.{op}", CPU, f"kind=op&op={op}&{large}")
    for op in ("pgd_step", "fgsm_rs_step"):
        yield from _step(f"cpu.recycled.{op}", RECYCLED, f"kind=op&op={op}&{large}")[:2]
        row = f"figures[kind=op&op={op}&{large}].share_of_copy_rate"
        what = f"{op}: shares of the copy rate in three runs"
        files = (CPU, RECYCLED, ONE_THREAD)
        yield Figure(f"cpu.{op}.copy.range", what, files, partial(_over_files, path=row), between(share))
        call, host = f"{op} on 16 elements", f"figures[kind=host&op={op}]"
        yield Figure(f"cpu.host.{op}.us", f"{call}: us", (CPU,), f"{host}.median_seconds.fastadv", microseconds)
        yield Figure(f"cpu.host.{op}.naive", f"{call}: of the naive step", (CPU,), f"{host}.share_of_naive", share)
    for dtype in HALF:
        name, what = (
            f"cpu.pgd_step.{dtype.split('/')[0]}.compile",
            f"pgd_step, {dtype}: the compiled one's time over it",
        )
        path = f"figures[kind=op&op=pgd_step&size=imagenet&dtype={dtype}].speedup_over_compile"
        yield Figure(name, what, (CPU,), path, share)


def _step(name: str, file: str, facts: str) -> list[Figure]:
    """Figures of a step's speed relative to the naive step, the compiled one and a copy."""
    row, words = f"figures[{facts}]", ", ".join(fact.split("=")[1] for fact in facts.split("&")[1:])
    return [
        Figure(f"{name}.naive", f"{words}: the naive step's time over it", (file,), f"{row}.speedup_over_naive", times),
        Figure(f"{name}.compile", f"{words}: the compiled one's", (file,), f"{row}.speedup_over_compile", times),
        Figure(f"{name}.copy", f"{words}: share of the copy rate", (file,), f"{row}.share_of_copy_rate", share),
    ]


def _over_files(*results: Mapping, path: str) -> tuple[float, float]:
    return extent(at(each, path) for each in results)


def steps_on_gpu() -> Iterator[Figure]:
    file = H100 + "bench.json"
    for name, op, size, dtype in (
        ("pgd_step.f32", "pgd_step", "large", "f32/f32"),
        ("pgd_step.bf16", "pgd_step", "large", "bf16/bf16"),
        ("fgsm_rs_step.f32", "fgsm_rs_step", "large", "f32/f32"),
        ("fgsm_rs_step.bf16", "fgsm_rs_step", "large", "bf16/bf16"),
        ("fgsm_rs_step.u8", "fgsm_rs_step", "large", "u8/f32"),
        ("fgsm_rs_step.z.bf16", "fgsm_rs_step z", "large", "bf16/bf16"),
        ("fgsm_step.f32", "fgsm_step", "large", "f32/f32"),
    ):
        yield from _step(f"h100.{name}", file, f"kind=op&op={op}&size={size}&dtype={dtype}&backend=cuda")
    for name, ops in (("fgsm_rs", ("fgsm_rs_step",)), ("others", ("pgd_step", "fgsm_step"))):
        what = f"{' and '.join(ops)}, a CIFAR batch: the compiled naive step's time over it"
        value = partial(_over_ops, ops=ops, sizes=("cifar",), path="speedup_over_compile")
        yield Figure(f"h100.cifar.{name}.compile", what, (file,), value, between(times))
    value = partial(_over_ops, sizes=("cifar",), path="median_seconds.fastadv")
    yield Figure("h100.cifar.us", "a step on a CIFAR batch: us", (file,), value, between(microseconds))


def triton_on_gpu() -> Iterator[Figure]:
    file = SECOND + "bench.json"
    full = ("f32/f32", "f32/bf16", "u8/f32")
    for name, backend, ops, dtypes in (
        ("triton.steps", "triton", ("pgd_step", "fgsm_step"), (*full, *HALF)),
        ("triton.fgsm_rs", "triton", ("fgsm_rs_step",), full),
        ("triton.fgsm_rs.half", "triton", ("fgsm_rs_step",), HALF),
        ("triton.random_init.half", "triton", ("random_init",), HALF),
        ("cuda.random_init.half", "cuda", ("random_init",), HALF),
    ):
        what = f"{backend}, {' and '.join(ops)}, {', '.join(dtypes)}: shares of the copy rate"
        value = partial(_over_ops, backend=backend, ops=ops, dtypes=dtypes, path="share_of_copy_rate")
        yield Figure(f"h200.{name}", what, (file,), value, between(share))
    what = "the fastest copy of the H200 over that of the H100"
    yield Figure("h200.copy", what, (file, H100 + "bench.json"), _copies, times)


def _over_ops(
    found: Mapping,
    path: str,
    backend: str = "cuda",
    ops: Iterable[str] = (),
    sizes: Iterable[str] = (),
    dtypes: Iterable[str] = (),
) -> tuple[float, float]:
    """The smallest and the largest value over some ops, sizes and dtypes; where none are named, over all.

    An op counts with and without its further outputs, such as the model's input.
    """
    wanted = {"backend": (backend,), "op": ops, "size": sizes, "dtype": dtypes}
    rows = [{**row, "op": row["op"].split()[0]} for row in rows_of(found) if row["kind"] == "op"]
    chosen = [row for row in rows if all(not some or row[name] in some for name, some in wanted.items())]
    return extent(at(row, path) for row in chosen)


def _copies(*results: Mapping) -> float:
    h200, h100 = (_over_ops(each, "copy_bytes_per_second")[1] for each in results)
    return h200 / h100


# ------------------------------------------------------------------ attacks


def attacks_on_cpu() -> Iterator[Figure]:
    for network, words in NETWORKS.items():
        file, name, what = CPU_ATTACKS, f"cpu.pgd10.{network}", f"PGD-10, {words}"
        for peer in ("torchattacks", "foolbox", "ART", "backward"):
            value = partial(_attack, network=network, path=f"speedup_over.{peer}")
            yield Figure(f"{name}.{peer.lower()}", f"{what}: time of {peer} over ours", (file,), value, share)
        for peer in ("torchattacks", "torchattacks compile"):
            value = partial(_attack, network=network, path=f"best_speedup_over.{peer}", compiled=True)
            fastest = f"{name}.fastest{peer.removeprefix('torchattacks').replace(' ', '.')}"
            yield Figure(fastest, f"{what}: time of {peer} over our fastest", (file,), value, times)
        memory = f"figures[kind=memory&network={network}].held_bytes"
        yield Figure(f"{name}.memory", f"{what}: memory of torchattacks'", (file,), memory, _memory)
    what = "PGD-10, eager: interquartile ranges of ours and of torchattacks"
    value = partial(_of_all_networks, paths=("relative_iqr.fastadv", "relative_iqr.torchattacks"))
    yield Figure("cpu.pgd10.spread", what, (CPU_ATTACKS,), value, between(percent))


def _memory(held: Mapping) -> str:
    return share(held["fastadv"]["with_weights"] / held["torchattacks"]["with_weights"])


def attacks_on_gpu() -> Iterator[Figure]:
    peers = ("torchattacks", "torchattacks bf16", "foolbox", "ART", "backward")
    for network, words in NETWORKS.items():
        for run, file, some in (
            ("h200", H200 + "attacks.json", peers),
            ("h200.second", SECOND + "attacks.json", peers[:1]),
            ("h200.third", THIRD + "attacks.json", peers[:1]),
        ):
            name, what = f"{run}.pgd10.{network}", f"PGD-10, {words}"
            eager = partial(_attack, network=network, path="speedup_over.torchattacks")
            yield Figure(f"{name}.eager", f"{what}: time of torchattacks over ours, eager", (file,), eager, share)
            for peer in some:
                value = partial(_attack, network=network, path=f"best_speedup_over.{peer}")
                what_peer = f"{what}: time of {peer} over ours in bf16, captured"
                yield Figure(f"{name}.graph.{peer.replace(' ', '-').lower()}", what_peer, (file,), value, times)
    for network, peer in product(("conv", "resnet18"), ("torchattacks", "torchattacks compile")):
        what = f"PGD-10, {NETWORKS[network]}: time of {peer} over ours in bf16, captured and compiled"
        value = partial(_attack, network=network, path=f"best_speedup_over.{peer}", compiled=True)
        name = f"h200.pgd10.{network}.compiled.{peer.replace(' ', '-')}"
        yield Figure(name, what, (H200 + "attacks.json",), value, times)
    files = tuple(run + "attacks.json" for run in (H200, SECOND, THIRD))
    for name, path, form in (("eager", "speedup_over", share), ("graph", "best_speedup_over", times)):
        what = f"PGD-10 on three networks in three runs, {name}: time of torchattacks over ours"
        value = partial(_of_all_networks, paths=(f"{path}.torchattacks",))
        yield Figure(f"h200.runs.pgd10.{name}", what, files, value, between(form))
    what = "PGD-10, eager: interquartile ranges of ours and of torchattacks in three runs"
    paths = tuple(f"relative_iqr.{contender}" for contender in ("fastadv", "torchattacks"))
    yield Figure("h200.pgd10.eager.spread", what, files, partial(_of_all_networks, paths=paths), between(percent))


def _attack(found: Mapping, network: str, path: str, compiled: bool = False) -> Any:
    rows = [row for row in rows_of(found) if (row["kind"], row["network"]) == ("attack", network)]
    (row,) = (each for each in rows if any("compile" in name for name in each["median_seconds"]) is compiled)
    return at(row, path)


def _of_all_networks(*results: Mapping, paths: Iterable[str]) -> tuple[float, float]:
    """The smallest and the largest of some values over all networks."""
    return extent(_attack(*each) for each in product(results, NETWORKS, paths))


def strength() -> Iterator[Figure]:
    yield Figure("strength.clean", "the network judged: clean accuracy", (STRENGTH,), "clean", percent)
    for attack, who in product(("PGD-10", "PGD-20", "PGD-50", "PGD-10-5"), ("fastadv", "torchattacks")):
        path = f"attacks[attack={attack}].{who}"
        yield Figure(f"strength.{attack.lower()}.{who}", f"what {attack} of {who} leaves", (STRENGTH,), path, percent)
    for options in ("as it is", "bf16", "compile", "bf16 compile", "channels last"):
        name, path = f"strength.faster.{options.replace(' ', '-')}", f"faster[options={options}].fastadv"
        yield Figure(name, f"what PGD-20 leaves, {options}", (STRENGTH,), path, percent)


def evaluation() -> Iterator[Figure]:
    row, what = "figures[kind=evaluation]", "PGD-50 with ten restarts"
    for name, path, form in (
        ("images", "images", whole),
        ("clean", "clean_accuracy", percent),
        ("robust", "robust_accuracy.fastadv", percent),
        ("gradients", "gradients.fastadv", whole),
    ):
        yield Figure(f"evaluation.{name}", f"{what}, evaluate: {name}", (EVALUATION,), f"{row}.{path}", form)
    for name, peer in (("torchattacks", "torchattacks"), ("loop", "nothing dropped")):
        path = f"{row}.gradients.{peer}"
        yield Figure(f"evaluation.{name}.gradients", f"{what}, {peer}: gradients", (EVALUATION,), path, whole)
        path = f"{row}.speedup_over.{peer}"
        yield Figure(f"evaluation.{name}.time", f"{what}, {peer}: time over evaluate's", (EVALUATION,), path, times)


# ------------------------------------------------------------------ AutoAttack

SMALL_NETWORKS = (
    *("fgsm-rs", "pgd", "collapsed", "clean"),
    *("two-classes", "three-classes", "six-classes", "hundred-classes"),
)


def autoattack() -> Iterator[Figure]:
    for model in ("backbone", *SMALL_NETWORKS):
        name, row = f"autoattack.{model}", f"models[model={model}]"
        yield Figure(f"{name}.theirs", f"{model}: AutoAttack leaves, by seed", (OURS,), f"{row}.autoattack", by_seed)
        yield Figure(f"{name}.ours", f"{model}: evaluate leaves, by seed", (OURS,), f"{row}.fastadv", _left)
        yield Figure(f"{name}.gradients", f"{model}: gradients of evaluate", (OURS,), f"{row}.fastadv", _mean_gradients)
        apgd = f"{row}.gradients of autoattack's apgd"
        yield Figure(f"{name}.apgd", f"{model}: gradients of AutoAttack's APGD", (OURS,), apgd, _mean)
    for model in SMALL_NETWORKS:
        what, path = f"{model}: our AutoAttack leaves, by seed", f"models[model={model}].fastadv"
        yield Figure(f"autoattack.{model}.all-of-ours", what, (OUR_AUTOATTACK,), path, _left)
    for name in ("images", "clean"):
        path = f"models[model=backbone].{name}"
        yield Figure(f"autoattack.backbone.{name}", f"the backbone: {name}", (OURS,), path, whole)
    for name, path in (("clean", "clean"), ("robust", "runs[seed=0].robust")):
        what, value = f"the backbone: share of images, {name}", partial(_share_of_images, path=path)
        yield Figure(f"backbone.{name}", what, (PACKAGE,), value, percent)
    what = "images that evaluate leaves beyond the lower of AutoAttack's counts, at most"
    yield Figure("autoattack.beyond", what, (OURS,), _most_beyond, whole)
    what = "passes of AutoAttack's package on the backbone, a gradient being two, millions"
    yield Figure("autoattack.passes.package", what, (PACKAGE,), lambda found: _package_passes(found) / 1e6, share)
    yield Figure("autoattack.passes.ours", "the same of evaluate", (OURS,), _our_passes, whole)
    what = "the package's passes over those of evaluate"
    yield Figure("autoattack.passes.ratio", what, (PACKAGE, OURS), _passes_ratio, times)


def _left(runs: Iterable[Mapping]) -> str:
    return by_seed(run["robust"] for run in runs)


def _gradients(run: Mapping) -> int:
    return sum(run["gradients"].values())


def _mean_gradients(runs: Iterable[Mapping]) -> str:
    return whole(mean(map(_gradients, runs)))


def _mean(numbers: Iterable[float]) -> str:
    return whole(mean(numbers))


def _share_of_images(found: Mapping, path: str) -> float:
    return at(found, path) / len(at(found, "runs[seed=0].verdicts"))


def _most_beyond(found: Mapping) -> int:
    return max(run["robust"] - min(row["autoattack"]) for row in found["models"] for run in row["fastadv"])


def _package_passes(found: Mapping) -> int:
    run = at(found, "runs[seed=0]")
    return sum(run["forwards"].values()) + 2 * _gradients(run)


def _our_passes(found: Mapping) -> float:
    return 2 * mean(map(_gradients, at(found, "models[model=backbone].fastadv")))


def _passes_ratio(package: Mapping, ours: Mapping) -> float:
    return _package_passes(package) / _our_passes(ours)


BY_PACKAGE = "package, 250 a batch"
CONTENDERS = {
    "package": BY_PACKAGE,
    "package-512": "package, 512 a batch",
    "autoattack": "autoattack",
    "autoattack-graph": "autoattack, graph",
    "default": "default",
    "default-graph": "default, graph",
}


def verdicts() -> Iterator[Figure]:
    file = SECOND + "verdicts.json"
    for name, contender in CONTENDERS.items():
        path = f"rows[contender={contender}].seconds"
        yield Figure(f"verdicts.{name}.s", f"512 images on a GPU, {contender}: s", (file,), path, seconds)
        if not name.startswith("package"):
            what = f"512 images on a GPU: the package's time over that of {contender}"
            yield Figure(f"verdicts.{name}.ratio", what, (file,), partial(_time_ratio, contender=contender), times)
        if name in ("package", "autoattack", "default"):
            what = f"64 images on a CPU, {contender}: s"
            yield Figure(f"verdicts.cpu.{name}.s", what, (VERDICTS_CPU,), path, seconds)
    yield Figure("verdicts.robust", "images that every contender leaves", (file,), _same_robust, whole)
    what = "gradients of our APGD parts"
    yield Figure("verdicts.apgd.ours", what, (file,), "rows[contender=autoattack].attacks", _apgd_passes)
    what, path = "gradients of the package's APGD parts", f"rows[contender={BY_PACKAGE}].parts.gradients"
    yield Figure("verdicts.apgd.package", what, (file,), path, _apgd_gradients)
    for part, attack in (("apgd", "APGD"), ("fab", "FAB"), ("square", "Square")):
        what, value = f"{attack} on a CPU: the package's time over ours", partial(_part_ratio, part=part, attack=attack)
        yield Figure(f"verdicts.cpu.{part}", what, (VERDICTS_CPU,), value, times)


def _time_ratio(found: Mapping, contender: str) -> float:
    package, ours = (at(found, f"rows[contender={each}].seconds") for each in (BY_PACKAGE, contender))
    return package / ours


def _same_robust(found: Mapping) -> int:
    """The robust result of the contenders, which must be the same for all of them."""
    (left,) = {at(found, f"rows[contender={contender}].robust") for contender in CONTENDERS.values()}
    return left


def _apgd_passes(attacks: Iterable[Mapping]) -> str:
    return whole(sum(each["passes"] for each in attacks if each["attack"] == "APGD"))


def _apgd_gradients(gradients: Mapping[str, int]) -> str:
    return whole(gradients["apgd-ce"] + gradients["apgd-t"])


def _part_ratio(found: Mapping, part: str, attack: str) -> float:
    package = at(found, f"rows[contender={BY_PACKAGE}].parts.seconds")
    ours = at(found, "rows[contender=autoattack].attacks")
    theirs = sum(value for name, value in package.items() if name.startswith(part))
    return theirs / sum(each["seconds"] for each in ours if each["attack"] == attack)


def own_time() -> Iterator[Figure]:
    for part, batch in (("apgd", 250), ("fab", 250), ("apgd", 64)):
        what = f"processor time of {part} outside of the model, {batch} images, over that of the package"
        value = partial(_own_time, part=part, batch=batch)
        yield Figure(f"own-time.{part}.{batch}", what, (OWN_TIME,), value, between(share))
    for norm, who in product(("Linf", "L2"), ("call", "evaluation")):
        what, path = f"the same of square, {norm}, {who}", f"rows[part=square&norm={norm}&batch=250].{who}"
        yield Figure(f"own-time.square.{norm.lower()}.{who}", what, (OWN_TIME,), path, share)


def _own_time(found: Mapping, part: str, batch: int) -> tuple[float, float]:
    rows = [row for row in found["rows"] if row["part"].startswith(part) and row["batch"] == batch]
    return extent(row[who] for row, who in product(rows, ("call", "evaluation")))


def suites() -> Iterator[Figure]:
    files = {peer: f"peers/{peer}.json" for peer in ("adv_lib", "foolbox", "art", "torchattacks")}
    for peer, file in files.items():
        yield Figure(f"suites.{peer}.passed", f"own tests of {peer}: passed", (file,), "counts.passed", whole)
        yield Figure(f"suites.{peer}.of", f"own tests of {peer}", (file,), "counts", _all_counts)
    yield Figure("suites.passed", "own tests of these: passed", tuple(files.values()), _passed, whole)
    yield Figure("suites.of", "own tests of these", tuple(files.values()), _tests, whole)


def _all_counts(counts: Mapping[str, int]) -> str:
    return whole(sum(counts.values()))


def _passed(*results: Mapping) -> int:
    return sum(each["counts"]["passed"] for each in results)


def _tests(*results: Mapping) -> int:
    return sum(sum(each["counts"].values()) for each in results)


# ------------------------------------------------------------------ checks on GPUs


def checks_on_gpu() -> Iterator[Figure]:
    counted = {
        "h200": (H200, ("passed", "of")),
        "h200.second": (SECOND, ("passed", "of", "failed")),
        "h200.third": (THIRD, ("passed", "of", "failed")),
    }
    for run, (folder, names) in counted.items():
        for name in names:
            file = folder + "correctness.json"
            yield Figure(f"{run}.tests.{name}", f"tests on the device: {name}", (file,), f"tests.{name}", whole)
    cuda, triton = H100 + "sanitizer.json", H200 + "sanitizer.json"
    yield Figure("sanitizer.cuda", "calls watched, of each tool", (cuda,), "tools", _calls)
    yield Figure("sanitizer.triton", "the same of Triton's kernels", (triton,), "tools", _calls)
    yield Figure("sanitizer.errors", "errors found", (cuda, triton), _errors, whole)


def _calls(tools: Mapping[str, Mapping]) -> str:
    return between(whole)(extent(each["calls"] for each in tools.values()))


def _errors(*results: Mapping) -> int:
    return sum(tool["errors"] for each in results for tool in each["tools"].values())


# ------------------------------------------------------------------ training


def training_steps() -> Iterator[Figure]:
    for name, file in (("h200", SECOND + "steps.json"), ("cpu", STEPS_CPU)):
        what = "a step with FGSM, FGSM-RS or PGD-7 over the sum of its parts"
        yield Figure(f"{name}.training.parts", what, (file,), _over_parts, between(share))
    for key, method in product(("fgsm_over_standard", "pgd_over_fgsm"), METHODS):
        what, value = f"a step, {method}: {key.replace('_', ' ')}", partial(_over_networks, key=key, method=method)
        yield Figure(f"cpu.training.{key.replace('_', '-')}.{method}", what, (STEPS_CPU,), value, between(tenths))


def _over_parts(found: Mapping) -> tuple[float, float]:
    return extent(row["over_parts"][attack] for row in rows_of(found) for attack in ("fgsm", "fgsm-rs", "pgd"))


def _over_networks(found: Mapping, key: str, method: str) -> tuple[float, float]:
    return extent(row[key] for row in rows_of(found) if row["method"] == method)


def transfer() -> Iterator[Figure]:
    file, alone = SECOND + "transfer.json", H200 + "transfer.json"
    for method, attack in product(METHODS, ATTACKS):
        name, row, what = f"transfer.{method}.{attack}", _summary(method, attack), f"{method} with {attack}"
        for column, path in (
            ("clean", "clean_accuracy"),
            ("pgd-10", "robust_accuracy"),
            ("pma", "pma_accuracy"),
            ("judged.pma", "judged.PMA"),
            ("judged.autoattack", "judged.AutoAttack"),
        ):
            yield Figure(f"{name}.{column}", f"{what}: {column}, mean and spread", (file,), f"{row}.{path}", spread)
        yield Figure(f"{name}.s", f"{what}: training, s", (alone,), f"{row}.train_s", seconds)
        what = f"photographs, {what}: PGD-10, mean and spread"
        yield Figure(f"photographs.{method}.{attack}", what, (PHOTOGRAPHS,), f"{row}.robust_accuracy", spread)
    for method in METHODS:
        for name, judged, judge, timed in (
            ("transfer", file, "pma_accuracy", alone),
            ("transfer.cpu", TRANSFER_CPU, "robust_accuracy", TRANSFER_CPU),
        ):
            what, value = f"{method}: points that FGSM lacks, {judge}", partial(_lacks, method=method, judge=judge)
            yield Figure(f"{name}.{method}.lacks", what, (judged,), value, points)
            what, value = f"{method}: training time with FGSM over that with PGD-7", partial(_time, method=method)
            yield Figure(f"{name}.{method}.time", what, (timed,), value, share)
    what = "linear with FGSM: points that PGD-10 leaves beyond PMA"
    yield Figure("transfer.linear.flattered", what, (file,), _summary("linear", "fgsm"), _flattered)
    for name, what, value in (
        ("runs", "runs judged by PMA and by AutoAttack", lambda found: len(found["rows"])),
        ("differ", "of them, those in which the two differ", lambda found: len(_apart(found))),
        ("differ.images", "by so many images at most", lambda found: max(_apart(found), default=0)),
    ):
        yield Figure(f"transfer.{name}", what, (file,), value, whole)


def _summary(method: str, attack: str) -> str:
    return f"summary[kind=transfer&method={method}&attack={attack}]"


def _lacks(found: Mapping, method: str, judge: str) -> float:
    fgsm, pgd = (at(found, f"{_summary(method, attack)}.{judge}.mean") for attack in ATTACKS)
    return pgd - fgsm


def _time(found: Mapping, method: str) -> float:
    fgsm, pgd = (at(found, f"{_summary(method, attack)}.train_s") for attack in ATTACKS)
    return fgsm / pgd


def _flattered(row: Mapping) -> str:
    return points(row["robust_accuracy"]["mean"] - row["pma_accuracy"]["mean"])


def _apart(found: Mapping) -> list[float]:
    """The numbers of images by which PMA and AutoAttack differ, of the runs where they differ."""
    images = at(found, f"{_summary('linear', 'fgsm')}.judged.images")
    judged = [row["judged"]["accuracy"] for row in found["rows"]]
    return [images * abs(each["PMA"] - each["AutoAttack"]) for each in judged if each["PMA"] != each["AutoAttack"]]


def demo() -> Iterator[Figure]:
    for setting, attack in product(("from scratch", "full fine-tuning", "linear probing"), ("FGSM", "PGD-7")):
        for name, key in (("clean", "clean_accuracy"), ("pgd-10", "robust_accuracy"), ("pma", "pma_accuracy")):
            path = f"table[setting={setting}&attack={attack}].{key}"
            label = f"demo.{setting.split()[0]}.{attack.split('-')[0].lower()}.{name}"
            yield Figure(label, f"{setting} with {attack}: {name}", (DEMO,), path, percent)


# ------------------------------------------------------------------ the study


def study() -> Iterator[Figure]:
    yield Figure("study.cells", "how many of the cells are finished", (STUDY, CELLS), _cells, str)
    for name, what, path, form in (
        ("headline", "the answer to the question of the title in a few words", "answer.headline", str),
        ("answer", "the answer in sentences", "answer.sentences", _items),
        ("table", "FGSM beside PGD and the paper", "paper_table", str),
        ("attacks", "all fast attacks side by side", "attack_table", str),
    ):
        files = (STUDY, CELLS, STUDY_RETIMED) if path.endswith("_table") else (STUDY, CELLS)  # tables have times
        yield Figure(f"study.{name}", what, files, partial(_of_study, path=path), form)
    for name, what, of in (
        ("partly", "that overfitted partly", {"how": "partly", "shows": True}),
        ("weak", "that are weak", {"how": "weak", "shows": True}),
        ("hidden", "where PGD's model is not robust", {"shows": False}),
        ("fgsm.32", "with FGSM at eps 32", {"attack": "fgsm", "eps": 32, "shows": True}),
        ("fgsm.32.collapsed", "with FGSM at eps 32 that collapsed", {"attack": "fgsm", "eps": 32, "how": "collapsed"}),
    ):
        what = f"runs of transfer learning with fast attacks {what}"
        yield Figure(f"study.runs.{name}", what, (STUDY, CELLS), partial(_runs, of=of), whole)
    for eps, (name, words, value, form) in product(
        (16, 32), (("mean", "the mean in points", _mean_points, tenths), ("pairs", "how many pairs", len, whole))
    ):
        what = f"FGSM's accuracy under PMA less PGD's at eps {eps}, where PGD's model is robust: {words}"
        found = partial(_where_robust, eps=eps, value=value)
        yield Figure(f"study.robust.{eps}.{name}", what, (STUDY, CELLS), found, form)
    for data in ("cifar10", "eurosat"):
        what = f"linear probing with PGD at eps 32 on {data}: what PMA leaves"
        path = f"rows[data={data}&method=linear&attack=pgd&eps=32.0&seed=0].pma"
        yield Figure(f"study.{data}.linear.pgd.32", what, (STUDY, CELLS), partial(_of_study, path=path), percent)
    for name, what, value, form in (
        ("devices.cpu", "cells that were run on a CPU", _on_cpu, whole),
        ("devices.crossed", "those of them whose partner with PGD was run on a GPU", _crossed, whole),
        (
            "judges.apgd",
            "PMA's accuracy less APGD's, in points, on the cells that both judged",
            _above_apgd,
            hundredths,
        ),
        ("time.validated", "FGSM's time with validation over PGD's, full fine-tuning on a CPU", _validated, hundredths),
    ):
        yield Figure(f"study.{name}", what, (CELLS,), value, form)
    for name, data in (("all", None), ("eurosat", "eurosat")):
        what = "full fine-tuning at eps 8: deviation between seeds of FGSM's accuracy under PMA less PGD's, in points, "
        yield Figure(f"study.seeds.{name}", what + name, (CELLS,), partial(_between_seeds, data=data), tenths)
    for eps, place in product((16, 32), ("best", "last")):
        what = f"full fine-tuning at eps {eps}: FGSM's PGD-10 on validation images less PGD's, {place} epoch, in points"
        value = partial(_in_epoch, eps=eps, last=place == "last")
        yield Figure(f"study.epoch.{place}.{eps}", what, (CELLS,), value, tenths)
    what = "robust accuracy under PMA of the same cells on a GPU, less that on a CPU, in points"
    for name, value, form in (
        ("count", len, whole),
        ("mean", mean, hundredths),
        ("deviation", stdev, hundredths),
        ("most", lambda differences: max(map(abs, differences)), tenths),
    ):
        found = partial(_gpu_less_cpu, value=value)
        yield Figure(f"study.devices.{name}", f"{what}: {name}", (CELLS, CELLS_CPU), found, form)
    for name, value in (
        ("cells", len),
        ("verdicts", lambda found: sum(map(len, found))),
        ("differ", lambda found: sum(map(sum, found))),
    ):
        what = f"the verdicts of cells that were run on a CPU again, by later code: {name}"
        yield Figure(f"study.again.{name}", what, (CELLS_CPU, CELLS_AGAIN), partial(_again, value=value), "{:,}".format)


def price() -> Iterator[Figure]:
    what = "the price of robustness: "
    for name, words, value, form in (
        ("cells", "how many of the cells are finished", _cells, str),
        ("answer", "the cheapest and the best beside FGSM", partial(_of_study, path="price_sentences"), _items),
        ("table", "time and accuracy of each training attack", partial(_of_study, path="price_table"), str),
        ("seeds", "seeds of FGSM and its rivals on a data set", _seeds_compared, _counted_seeds),
    ):
        yield Figure(f"price.{name}", what + words, (PRICE, PRICE_CELLS), value, form)
    yield Figure("price.zeros", "stored signs: the share of gradients that are 0", (ZEROS,), _zeros, percent)
    words = "the longest time of a training alone over that of its repetition, the most of all"
    yield Figure("price.noise", what + words, (RETIMED,), _repeated, hundredths)
    for method, attack in product(PRICED, ("fgsm", *RIVALS, "stale-price-1.25")):
        value = partial(_of_study, path=f"price_summaries[data=cifar10&method={method}&attack={attack}].time")
        words = f"{what}{method} fine-tuning with {attack}: time over training without an attack, each alone"
        yield Figure(f"price.{method}.{attack}.time", words, (PRICE, RETIMED), value, hundredths)
    for data, method in product(("cifar10", "eurosat"), PRICED):
        for attack, name, words, form in (
            ("fgsm", "robust", "what PMA leaves", percent),
            *((attack, "to_fgsm", "what PMA leaves less FGSM's, in points", _beside_fgsm) for attack in RIVALS),
        ):
            place = f"price_summaries[data={data}&method={method}&attack={attack}]"
            value = partial(_of_study, path=place if name == "to_fgsm" else f"{place}.{name}")
            words = f"{what}{method} fine-tuning with {attack} on {data}: {words}"
            yield Figure(f"price.{data}.{method}.{attack}.{name}", words, (PRICE, PRICE_CELLS), value, form)
    for method, attack in product(PRICED, RIVALS):
        words = f"{what}{method} fine-tuning with {attack}: PGD-10 on validation images in the last epoch less FGSM's"
        value = partial(_last_beside_fgsm, method=method, attack=attack)
        yield Figure(f"price.{method}.{attack}.last", words, (PRICE_CELLS,), value, tenths)
    value = partial(_of_study, path="price_table")
    yield Figure("many.table", what + "each training attack with 12,000 images", (MANY, MANY_CELLS), value, str)
    for attack in (*RIVALS, "stale-4"):
        words = f"{what}full fine-tuning with {attack} on cifar10 at eps 8: what PMA leaves less FGSM's, in points"
        value = partial(_of_study, path=f"price_summaries[data=cifar10&method=full&attack={attack}]")
        for name, files, form in (("few", (PRICE, PRICE_CELLS), _at_eps_8), ("many", (MANY, MANY_CELLS), _alone)):
            yield Figure(f"{name}.{attack}", f"{words}, {name} images", files, value, form)


def _last_beside_fgsm(cells: list[Mapping], method: str, attack: str) -> float:
    """In points, the mean over data sets, eps and seeds: no choice of an epoch is in it."""
    pairs = [pair for pair in _partners(cells, attack, of="fgsm") if pair[0]["cell"]["method"] == method]
    last = ([_epochs(each)[-1]["robust_accuracy"] for each in pair] for pair in pairs)
    return 100 * mean(mine - fgsm for mine, fgsm in last)


def _epochs(cell: Mapping) -> list[Mapping]:
    return [record for record in cell["records"] if "epoch" in record]


def _seeds_compared(report: Mapping, cells: list[Mapping]) -> tuple[float, float]:
    """The fewest and the most seeds of FGSM and its rivals that each eps has."""
    compared = set(product(PRICED, ("fgsm", *RIVALS)))
    rows = [row for row in report["price_summaries"] if (row["method"], row["attack"]) in compared]
    return extent(row["runs"] / len(row["budgets"]) for row in rows)


def _counted_seeds(found: tuple[float, float]) -> str:
    least, most = found
    if least == most:
        return f"{most:.0f} seed{'s' if most > 1 else ''}"
    return f"{least:.0f} to {most:.0f} seeds"


def _beside_fgsm(summary: Mapping) -> str:
    """A difference in points with its interval, and the difference at each eps."""
    each = " and ".join(map(_tenths, summary["by_eps"]))
    return f"{_alone(summary)}: {each}" + (", 1 seed" if summary["runs"] == len(summary["budgets"]) else "")


def _at_eps_8(summary: Mapping) -> str:
    return _tenths(dict(zip(summary["budgets"], summary["by_eps"], strict=True))[8])


def _alone(summary: Mapping) -> str:
    return "{} ({} to {})".format(*map(_tenths, summary["to_fgsm"]))


def _tenths(share: float) -> str:
    return f"{round(100 * share, 1) or 0.0:+.1f}"


def _zeros(found: Mapping) -> float:
    return max(row["zeros"] for row in found["rules"])


def _repeated(cells: list[Mapping]) -> float:
    return max(max(each["train_cpu_s"]) / min(each["train_cpu_s"]) for each in cells)


def _on_cpu(cells: list[Mapping]) -> int:
    return sum(each["machine"]["device"] == "cpu" for each in cells)


def _partners(cells: list[Mapping], attack: str | None = None, of: str = "pgd") -> Iterator[tuple[Mapping, Mapping]]:
    """(a cell with this attack or any other, the same with the attack `of`), for each that there is."""
    partners = {json.dumps(each["cell"] | {"attack": ""}): each for each in cells if each["cell"]["attack"] == of}
    for each in cells:
        partner = partners.get(json.dumps(each["cell"] | {"attack": ""}))
        name = each["cell"]["attack"]
        if partner is not None and (name == attack if attack else name != of):
            yield each, partner


def _crossed(cells: list[Mapping]) -> int:
    return sum(a["machine"]["device"] == "cpu" != b["machine"]["device"] for a, b in _partners(cells))


def _above_apgd(cells: list[Mapping]) -> float:
    both = [each["verdicts"] for each in cells if "apgd" in each["verdicts"]]
    return mean(100 * (said["pma"].count("1") - said["apgd"].count("1")) / len(said["pma"]) for said in both)


def _validated(cells: list[Mapping]) -> float:
    """The median ratio of the times of training and validation, the monitor left out."""
    ratios = []
    for pair in _partners(cells, "fgsm"):
        if pair[0]["cell"]["method"] == "full" and {each["machine"]["device"] for each in pair} == {"cpu"}:
            fgsm, pgd = (sum(e["train_s"] + e.get("eval_s", 0.0) for e in _epochs(each)) for each in pair)
            ratios.append(fgsm / pgd)
    return median(ratios)


def _between_seeds(cells: list[Mapping], data: str | None) -> float:
    """The standard deviation between seeds, its root mean square over the data sets."""
    found: dict[str, list[float]] = {}
    for pair in _partners(cells, "fgsm"):
        cell = pair[0]["cell"]
        if (cell["method"], cell["eps"]) == ("full", 8) and data in (None, cell["data"]):
            found.setdefault(cell["data"], []).append(100 * (_share(pair[0]) - _share(pair[1])))
    return mean(stdev(of_set) ** 2 for of_set in found.values()) ** 0.5


def _in_epoch(cells: list[Mapping], eps: float, last: bool) -> float:
    """The mean over data sets of the mean over seeds."""
    found: dict[str, list[float]] = {}
    for pair in _partners(cells, "fgsm"):
        cell = pair[0]["cell"]
        if cell["method"] == "full" and cell["eps"] == eps:
            of = [[epoch["robust_accuracy"] for epoch in _epochs(each)] for each in pair]
            fgsm, pgd = (said[-1] if last else max(said) for said in of)
            found.setdefault(f"{cell['data']} {cell['classes']}", []).append(100 * (fgsm - pgd))
    return mean(map(mean, found.values()))


def _again(cells: list[Mapping], again: list[Mapping], value: Callable) -> int:
    """`value` of a list for each cell that is in both: whether each of its verdicts differs."""
    pairs = [(one["verdicts"], other["verdicts"]) for one, other in _in_both(cells, again)]
    return value(
        [[a != b for judge in one for a, b in zip(one[judge], other[judge], strict=True)] for one, other in pairs]
    )


def _gpu_less_cpu(cells: list[Mapping], on_cpu: list[Mapping], value: Callable) -> float:
    """A statistic of the differences between the cells that were run on a GPU and again on a CPU."""
    on_gpu = [each for each in cells if each["machine"]["device"] != "cpu"]
    return value([100 * (_share(gpu) - _share(cpu)) for gpu, cpu in _in_both(on_gpu, on_cpu)])


def _in_both(some: list[Mapping], others: list[Mapping]) -> list[tuple[Mapping, Mapping]]:
    """The pairs of records of the same cell."""
    found = {json.dumps(each["cell"]): each for each in some}
    return [(found[name], each) for each in others if (name := json.dumps(each["cell"])) in found]


def _share(cell: Mapping) -> float:
    """The share of the test images that PMA leaves."""
    return cell["verdicts"]["pma"].count("1") / len(cell["verdicts"]["pma"])


def _of_study(report: Mapping, *cells: list[Mapping], path: str) -> Any:
    """The value at a place in a study's report. The report has no environment, so the figure also needs the cells."""
    return at(report, path)


def _cells(report: Mapping, cells: list[Mapping]) -> str:
    done, missing = len(report["rows"]), len(report["missing"]["cells"])
    if not missing:
        return f"All {done} cells are measured."
    return f"{done} of {done + missing} cells are measured; what is missing is left out."


def _items(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _runs(report: Mapping, cells: list[Mapping], of: Mapping) -> int:
    """How many runs of transfer learning with fast attacks have these facts."""
    runs = [run for run in report["overfitting"]["runs"] if run["method"] != "scratch" and run["attack"] != "pgd"]
    return sum(all(run[name] == value for name, value in of.items()) for run in runs)


def _where_robust(report: Mapping, cells: list[Mapping], eps: int, value: Callable[[list[float]], float]) -> float:
    """A value of the differences between FGSM and PGD under PMA where PGD's model is robust."""
    wanted = ("fgsm", "pma", eps, True)
    rows = report["differences"]
    return value([e["mean"] for e in rows if (e["attack"], e["judge"], e["eps"], e["robust"]) == wanted])


def _mean_points(shares: list[float]) -> float:
    return 100 * mean(shares)


def scratch() -> Iterator[Figure]:
    last = "the robust accuracy under PGD-5 on the monitor's images in the last epoch"
    for run, words, file in (
        ("fgsm", "FGSM from scratch", SCRATCH),
        ("slow", "FGSM from scratch with a tenth of the learning rate", SLOW),
        ("tuned", "the same network, fine-tuned", TUNED),
        ("tuned-fast", "the same network, fine-tuned with the higher learning rate", TUNED_FAST),
    ):
        for name, what, value, form in (
            ("best", "the best robust accuracy under PGD-5 on the monitor's images", _highest, percent),
            ("last", last, lambda run: _monitored(run)[-1], percent),
            ("clean", "test images, clean", "clean_accuracy", percent),
            ("fgsm", "test images under FGSM", "attacks[attack=fgsm].robust_accuracy", percent),
            ("pma", "test images under PMA", "attacks[attack=pma].robust_accuracy", percent),
        ):
            yield Figure(f"scratch.{run}.{name}", f"{words}: {what}", (file,), value, form)
    for name, what, value in (
        ("epochs", "epochs", "settings.epochs"),
        ("best.epoch", "the epoch in which PGD-5 leaves most, from 1", lambda run: 1 + _best(run)),
        ("fall.epoch", "the first epoch after it with less than half of that", _fall),
    ):
        yield Figure(f"scratch.fgsm.{name}", f"FGSM from scratch: {what}", (SCRATCH,), value, str)
        if name != "epochs":
            words = f"fine-tuned with the higher rate: {what}"
            yield Figure(f"scratch.tuned-fast.{name}", words, (TUNED_FAST,), value, str)
    for name, path in (("clean", "clean_accuracy"), ("pma", "attacks[attack=pma].robust_accuracy")):
        for run, file in (("backbone", BACKBONE), ("backbone-again", BACKBONE_AGAIN)):
            yield Figure(f"scratch.{run}.{name}", f"the {run}: {name}", (file,), path, percent)


def _highest(run: Mapping) -> float:
    return max(_monitored(run))


def _monitored(run: Mapping) -> list[float]:
    """The robust accuracy under PGD-5 on the monitor's images, after each epoch."""
    return [record["probe_pgd"] for record in run["records"] if "probe_pgd" in record]


def _best(run: Mapping) -> int:
    left = _monitored(run)
    return left.index(max(left))


def _fall(run: Mapping) -> int:
    left, best = _monitored(run), _best(run)
    return next(epoch + 1 for epoch in range(best, len(left)) if left[epoch] < left[best] / 2)


FIGURES = [
    *steps_on_cpu(),
    *steps_on_gpu(),
    *triton_on_gpu(),
    *attacks_on_cpu(),
    *attacks_on_gpu(),
    *strength(),
    *evaluation(),
    *autoattack(),
    *verdicts(),
    *own_time(),
    *suites(),
    *checks_on_gpu(),
    *training_steps(),
    *transfer(),
    *demo(),
    *study(),
    *price(),
    *scratch(),
]
