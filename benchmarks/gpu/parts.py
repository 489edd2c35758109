"""The parts of run.sh: each does its steps, keeps their logs, and writes OUTDIR/PART.json."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import environment
import torch

from fastadv.ops.backends import native

ROOT = environment.ROOT
DRY_RUN = os.environ.get("FASTADV_DRY_RUN") == "1"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


# ------------------------------------------------------------------ steps


def save(path, result):
    """Whole or not at all: a part that is cut off leaves no result."""
    text = json.dumps({**result, "environment": environment.facts()}, indent=1)
    path.with_suffix(".part").write_text(text + "\n")
    path.with_suffix(".part").replace(path)


def succeeded(path):
    return path.exists() and json.loads(path.read_text())["ok"]


def step(path, make):
    """The step's result, from its file where it succeeded before."""
    if not succeeded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, make())
    return json.loads(path.read_text())


def run(log, *command, **env):
    """Exit status and output of a command; the output is kept in `log` too, as it comes."""
    with log.open("w") as file:
        status = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **env}, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    text = log.read_text(errors="replace")
    if status:
        print(f"{' '.join(command[:4])} ... ended with {status}:\n{text[-2000:]}", file=sys.stderr)
    return status, text


# ------------------------------------------------------------------ build

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def resources(log):
    """What ptxas said of every kernel."""
    return [
        {
            "name": m["name"],
            "arch": m["arch"],
            "registers": int(m["registers"]),
            "stack_bytes": int(m["stack"]),
            "spill_bytes": int(m["stores"]) + int(m["loads"]),
        }
        for m in ENTRY.finditer(log)
    ]


def build(out):
    """In place and for this GPU alone. A dry run goes through setup.py and compiles nothing."""
    if DRY_RUN:
        env = {"FASTADV_CPU": "0", "FASTADV_CUDA": "0"}
        place = ["--build-lib", str(out / "lib")]
    else:
        major, minor = torch.cuda.get_device_capability()
        env = {"FASTADV_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
        place = ["--inplace"]
    # A folder of its own: what an earlier build left would keep ptxas from speaking.
    objects = out / "objects"
    shutil.rmtree(objects, ignore_errors=True)
    command = (sys.executable, "setup.py", "build_ext", *place, "--build-temp", str(objects))
    status, log = run(out / "build.log", *command, **env)
    shutil.rmtree(objects, ignore_errors=True)
    return {"ok": status == 0, "flags": env, "ptxas": resources(log)}


# ------------------------------------------------------------------ correctness


def tests_of(out, backend):
    """The backend's cases of the test suite."""
    which = ["tests/test_philox.py"] if DRY_RUN else ["tests"]
    env = {"FASTADV_TEST_EXAMPLES": "2"} if DRY_RUN else {}
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not DRY_RUN else []
    junit = out / f"{backend}.xml"
    junit.unlink(missing_ok=True)
    command = (sys.executable, "-m", "pytest", *which, "-k", backend, *workers, f"--junitxml={junit}")
    status, _ = run(out / f"{backend}.log", *command, **env)
    cases = list(ElementTree.parse(junit).iter("testcase"))
    tests = {what: sum(c.find(what) is not None for c in cases) for what in ("failure", "error", "skipped")}
    names = [f"{c.get('classname')}::{c.get('name')}" for c in cases if len(c) and c.find("skipped") is None]
    return {"ok": status == 0, "tests": {"run": len(cases), **tests}, "failed": names}


def correctness(out):
    backends, folder = ("cpu", "triton") if DRY_RUN else ("cuda", "triton"), out / "correctness"
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda b: step(folder / f"{b}.json", lambda: tests_of(folder, b)), backends)
        steps = dict(zip(backends, made, strict=True))
    total = {what: sum(s["tests"][what] for s in steps.values()) for what in ("run", "failure", "error", "skipped")}
    return {"ok": all(s["ok"] for s in steps.values()), "tests": total, "backends": steps}


# ------------------------------------------------------------------ sanitizer


def sanitize(out, tool):
    """exercise.py under a tool of compute-sanitizer, or by itself where `tool` is None."""
    # Without PyTorch's caching allocator every tensor is an allocation of its own, with borders that are watched.
    prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "50"] if tool else []
    command = (*prefix, sys.executable, "benchmarks/gpu/exercise.py")
    status, log = run(out / f"{tool or 'none'}.log", *command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    told = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", log)
    checked = re.search(r"^(\d+) calls, (\d+) mismatches$", log, re.MULTILINE)
    return {
        "ok": status == 0 and bool(checked) and (told is not None or not tool),
        "errors": int(told[1]) if told else None,
        "calls": int(checked[1]) if checked else None,
        "mismatches": int(checked[2]) if checked else None,
    }


def sanitizer(out):
    folder = out / "sanitizer"
    tools = {
        tool or "none": step(folder / f"{tool or 'none'}.json", lambda tool=tool: sanitize(folder, tool))
        for tool in ((None,) if DRY_RUN else TOOLS)
    }
    return {"ok": all(run["ok"] for run in tools.values()), "tools": tools}


# ------------------------------------------------------------------ kernels


def kernels(out):
    """Registers, spills and occupancy as the driver loaded the kernels; the CPU's build facts in a dry run."""
    module, why = native("cpu" if DRY_RUN else "cuda")
    if module is None:
        return {"ok": False, "why": why, "kernels": []}
    return {"ok": True, "facts": module.facts(), "kernels": [] if DRY_RUN else module.kernels()}


# ------------------------------------------------------------------ bench


# part -> its steps: which of the benchmarks, for pytest's -k; an op's hold its host cost.
BENCHMARKS = {
    "bench": {op: op for op in ("pgd_step", "fgsm_step", "fgsm_rs_step", "random_init")},
    "attacks": {network: f"(test_pgd or test_memory) and {network}" for network in ("conv", "resnet18", "vit")},
    "training": {network: f"test_training_step and {network}" for network in ("resnet18", "vit")},
}
DRY_BENCHMARKS = {
    "bench": {"one": "pgd_step-tiny-f32/f32-cpu or host"},
    "attacks": {"one": "test_memory and conv"},
    "training": {"one": "test_training_step"},
}


def benchmarks_of(out, name, which):
    path = out / f"{name}.pytest.json"
    quick = ["--benchmark-min-rounds=1", "--benchmark-max-time=0"] if DRY_RUN else ["--benchmark-max-time=0.2"]
    command = (sys.executable, "-m", "pytest", "--benchmark", "-k", which, f"--benchmark-json={path}", *quick)
    env = {"FASTADV_BENCH_SIZES": "tiny"} if DRY_RUN else {}
    status, _ = run(out / f"{name}.log", *command, **env)
    return {"ok": status == 0, **(json.loads(path.read_text()) if status == 0 else {"benchmarks": []})}


def benchmarks(part, out):
    """A part's benchmarks, one after the other; the result has pytest-benchmark's format."""
    folder, which = out / part, (DRY_BENCHMARKS if DRY_RUN else BENCHMARKS)[part]
    steps = [step(folder / f"{n}.json", lambda n=n, k=k: benchmarks_of(folder, n, k)) for n, k in which.items()]
    return {**steps[0], "ok": all(s["ok"] for s in steps), "benchmarks": [b for s in steps for b in s["benchmarks"]]}


def bench(out):
    return benchmarks("bench", out)


def attacks(out):
    return benchmarks("attacks", out)


# ------------------------------------------------------------------ training


def real_images(out):
    """strength.py: a network trained and attacked on CIFAR-10."""
    path = out / "images.strength.json"
    folder = os.environ.get("FASTADV_CIFAR10")
    if not folder:
        return {"ok": True, "why": "FASTADV_CIFAR10 names no folder with CIFAR-10"}
    status, _ = run(
        out / "images.log", sys.executable, "benchmarks/attacks/strength.py", folder, "--out", str(path),
        PYTHONPATH=f"{os.environ['PYTHONPATH']}:{ROOT / 'benchmarks/attacks'}",
    )  # fmt: skip
    return {"ok": status == 0, **(json.loads(path.read_text()) if status == 0 else {})}


def transfer(out):
    """transfer.py: FGSM and PGD from a robust backbone, on the classes that it was not trained on."""
    path = out / "transfer.runs.json"  # has each finished run: after a timeout the others follow
    folder = os.environ.get("FASTADV_CIFAR10")
    if DRY_RUN:
        chosen = ["--data=digits", "--model=mlp", "--epochs=1", "--device=cpu"]
        chosen += [f"--{part}-limit=32" for part in ("train", "val", "test")]
    elif folder:
        chosen = ["--data=cifar10", f"--data-folder={folder}", "--classes=6-9", "--epochs=10"]
    else:
        return {"ok": True, "why": "FASTADV_CIFAR10 names no folder with CIFAR-10", "summary": []}
    command = (sys.executable, "benchmarks/training/transfer.py", "--seeds=1", *chosen, f"--out={path}")
    status, _ = run(out / "transfer.log", *command)
    return {"ok": status == 0, **(json.loads(path.read_text()) if status == 0 else {"summary": []})}


def training(out):
    folder = out / "training"
    result = benchmarks("training", out)
    images = step(folder / "images.json", lambda: real_images(folder))
    runs = step(folder / "transfer.json", lambda: transfer(folder))
    ok = all(made["ok"] for made in (result, images, runs))
    return {**result, "ok": ok, "real_images": images, "transfer": runs, "summary": runs["summary"]}


# ------------------------------------------------------------------ counters

METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes.sum": "dram_bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "smsp__inst_executed.sum": "warp_instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_slots_percent",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "alu_percent",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active": "fma_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}


def counted(table):
    """The rows of ncu's CSV, by METRICS' names; its second line has the units, and its numbers have commas."""
    rows = list(csv.DictReader(line for line in table.splitlines() if line.startswith('"')))[1:]
    return [{name: float(row[metric].replace(",", "")) for metric, name in METRICS.items()} for row in rows]


def counters(out):
    """What ncu counts in one launch of every op, by itself: achieved bandwidth, issue slots, pipes."""
    folder = out / "counters"
    folder.mkdir(exist_ok=True)
    if DRY_RUN:
        return {"ok": True, "why": "a dry run has no counters", "launches": []}
    table = folder / "ncu.csv"
    status, log = run(
        folder / "ncu.log", "ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base",
        "--log-file", str(table), "--kernel-name", "regex:^(flat|any)_kernel$", "--metrics", ",".join(METRICS),
        sys.executable, "benchmarks/gpu/launches.py", FASTADV_BENCH_SIZES="large",
    )  # fmt: skip
    if status:
        return {"ok": False, "why": log[-500:], "launches": []}
    launched = json.loads(next(line for line in log.splitlines() if line.startswith("[{")))
    rows = counted(table.read_text())
    return {"ok": len(rows) == len(launched), "launches": [{**a, **b} for a, b in zip(launched, rows, strict=False)]}


PARTS = {part.__name__: part for part in (build, correctness, kernels, bench, attacks, training, counters, sanitizer)}


def done(part, path):
    """What was built may be gone where the results are not: another machine builds, and goes on with them."""
    gone = part == "build" and not DRY_RUN and importlib.util.find_spec("fastadv._cuda") is None
    return succeeded(path) and not gone


def left(out, *parts):
    """Prints those that are to be done."""
    print(*(part for part in parts if not done(part, Path(out) / f"{part}.json")))


def main(part, out):
    out = Path(out)
    path = out / f"{part}.json"
    if not DRY_RUN and not torch.cuda.is_available():
        sys.exit("there is no GPU; --dry-run does without")
    start = time.monotonic()
    result = PARTS[part](out)
    result |= {"part": part, "seconds": round(time.monotonic() - start, 1)}
    save(path, result)
    print(f"{part}: {'ok' if result['ok'] else 'FAILED'}, {result['seconds']} s")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(left(*sys.argv[2:]) if sys.argv[1] == "--left" else main(*sys.argv[1:]))
