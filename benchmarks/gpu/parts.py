"""The parts of run.sh; plan.py runs each one as `python benchmarks/gpu/parts.py PART DIR`.

A part writes into DIR/PART.json where it ran, and at its end what it found. The results of tests and benchmarks are
stored one by one (kept.py).
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import environment
import plan
import torch

ROOT = environment.ROOT
DRY_RUN = os.environ.get("FASTADV_DRY_RUN") == "1"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def run(log, *command, **env):
    """Run a command; return its exit status and output. The output also goes to the file `log` while it runs."""
    with log.open("w") as file:
        status = subprocess.run(
            list(map(str, command)), cwd=ROOT, env={**os.environ, **env}, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    text = log.read_text(errors="replace")
    if status:
        print(f"{' '.join(map(str, command[:4]))} ... ended with {status}:\n{text[-2000:]}", file=sys.stderr)
    return status, text


# ------------------------------------------------------------------ build

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def resources(log):
    """What ptxas reported for every kernel."""
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
    """Build in place, for this GPU alone. A dry run goes through setup.py and compiles nothing."""
    if DRY_RUN:
        env = {"FASTADV_CPU": "0", "FASTADV_CUDA": "0"}
        place = ["--build-lib", str(out / "lib")]
    else:
        major, minor = torch.cuda.get_device_capability()
        env = {"FASTADV_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
        place = ["--inplace"]
    # An empty folder: where objects of an earlier build are left, ptxas does not run, and reports nothing.
    objects = out / "objects"
    shutil.rmtree(objects, ignore_errors=True)
    command = (sys.executable, "setup.py", "build_ext", *place, "--build-temp", str(objects))
    status, log = run(out / "build.ptxas.log", *command, **env)
    shutil.rmtree(objects, ignore_errors=True)
    return {"ok": status == 0, "flags": env, "ptxas": resources(log), **loaded(out)}


# Prints registers, spills and occupancy of the kernels that the driver loaded; in a dry run only the CPU build's facts.
LOADED = """
import json, sys
from fastadv.ops.backends import native
module, why = native(sys.argv[1])
found = {"facts": module.facts(), "kernels": module.kernels() if sys.argv[1] == "cuda" else []} if module else {}
print(json.dumps({"why": why, **found}))
"""


def loaded(out):
    """Ask a new process: this one was started before the kernels existed."""
    status, text = run(out / "build.loaded.log", sys.executable, "-c", LOADED, "cpu" if DRY_RUN else "cuda")
    return json.loads(text.splitlines()[-1]) if status == 0 else {"ok": False}


# ------------------------------------------------------------------ tests and benchmarks

# Tests that had never run on a GPU, or had failed there, come first.
GPU_TESTS = [
    "tests/training/test_gpu_training.py",
    *(f"tests/attacks/test_{name}.py" for name in ("gpu_attacks", "cuda_graph")),
    *(
        f"tests/ops/test_{name}.py"
        for name in ("gpu", "contract", "philox", "ball", "compile", "autograd", "out", "errors")
    ),
]


def pytest(out, part, *arguments, **env):
    """Run pytest. It writes into the part's log, and its exit status decides whether the part is ok."""
    kept = ("-p", "kept", "--kept", out / f"kept/{part}.jsonl", "-p", "no:cacheprovider")
    command = (sys.executable, "-m", "pytest", *kept, *arguments)
    status = subprocess.run(list(map(str, command)), cwd=ROOT, env={**os.environ, **env}).returncode
    return {"ok": status in (0, 5)}  # 5: no test was left to run


def correctness(out):
    """Test every op on CUDA and Triton, graphs, streams, and the evaluation on a device."""
    if DRY_RUN:
        return pytest(out, "correctness", "tests/ops/test_philox.py", "-k", "cpu or triton", FASTADV_TEST_EXAMPLES="2")
    # "load" begins with the first tests on all workers, where a cut leaves the last ones out. A thread for each worker:
    # with more than the machine has cores, the CPU's side of a comparison takes most of the time.
    workers = ("-n", str(min(12, os.cpu_count())), "--dist", "load")
    env = {"FASTADV_TEST_EXAMPLES": os.environ.get("FASTADV_TEST_EXAMPLES", "40"), "OMP_NUM_THREADS": "1"}
    return pytest(out, "correctness", *GPU_TESTS, "-k", "cuda or triton", *workers, **env)


def benchmarks(out, part, files, which="", seconds=1.0, rounds=5, **env):
    """Run the benchmarks of some files; each case is timed for `seconds` seconds, and for at least `rounds` rounds."""
    seconds, rounds = (0, 1) if DRY_RUN else (seconds, rounds)
    how = ("--benchmark-quiet", f"--benchmark-min-rounds={rounds}", f"--benchmark-max-time={seconds}")
    return pytest(out, part, "--benchmark", *(f"benchmarks/{file}" for file in files), "-k", which, *how, **env)


def attacks(out):
    """Time attacks, eager, captured and compiled, beside every peer that is installed."""
    which = "test_pgd and conv and not compiled" if DRY_RUN else "not memory"
    return benchmarks(out, "attacks", ["attacks/bench_pgd.py"], which, seconds=3)


def steps(out):
    """Time the training step beside its parts, for every method and attack."""
    return benchmarks(out, "steps", ["training/bench_step.py"], seconds=2)


def evaluation(out):
    """Time PGD-50 with ten restarts on a trained network."""
    return benchmarks(out, "evaluation", ["attacks/bench_evaluation.py"], rounds=1)


# What changed after it was last measured on a GPU, which is Triton's kernels; and random_init, which never was timed.
CHANGED = "triton or random_init"


def bench(out, which=CHANGED, sizes="large", contenders="fastadv,naive,copy", part="bench"):
    """Time the ops, without the compiled step: to compile it takes longer than to time all others."""
    if DRY_RUN:
        which, sizes = "pgd_step-tiny-f32/f32-cpu or host", "tiny"
    env = {"FASTADV_BENCH_SIZES": sizes, "FASTADV_BENCH_CONTENDERS": contenders}
    return benchmarks(out, part, ["bench_ops.py", "bench_host.py"], which, 0.1, **env)


def bench_all(out):
    return bench(out, "", "cifar,large,huge", "", "bench-all")


# ------------------------------------------------------------------ runs on real images


def images():
    return os.environ.get("FASTADV_CIFAR10")


def verdicts(out):
    """Run timed.py: fastadv and the authors' AutoAttack, on a robust backbone, then on digits."""
    path = out / "kept/verdicts.json"  # keeps each finished row: after a cut the other rows follow
    if DRY_RUN:
        chosen = ["--device=cpu", "--models", "clean", "--images=32", "--quick"]
    elif checkout := os.environ.get("FASTADV_AUTOATTACK"):
        chosen = ["--autoattack", checkout]
    else:
        chosen = []
    status, _ = run(out / "verdicts.rows.log", sys.executable, "benchmarks/peers/timed.py", *chosen, "--out", path)
    return {"ok": status == 0, "why": "" if len(chosen) == 2 else "FASTADV_AUTOATTACK names no clone of its package"}


def study(out, grid="study"):
    """Run fastadv study: GRID.yaml, many cells at a time; the times of cells that share a GPU mean little."""
    folder = out / f"kept/{grid}"  # keeps each finished cell: after a cut the other cells follow
    data, count = os.environ.get("FASTADV_STUDY"), min(12, os.cpu_count())
    if DRY_RUN:
        chosen = ["--data=digits", "--model=conv", "--methods=full", "--seeds=1", "--epochs=1", "--device=cpu"]
        chosen += [f"--{part}-limit=32" for part in ("train", "val", "test")]
    elif data:
        chosen = [f"benchmarks/training/{grid}.yaml", f"--data-folder={data}", "--device=cuda", f"--processes={count}"]
    else:
        return {"ok": True, "why": f"FASTADV_STUDY names no folder with the data sets of {grid}.yaml"}
    command = (sys.executable, "-m", "fastadv", "study", *chosen, "--out", folder)
    with sharing(out) as (shared, env):
        status, _ = run(out / f"{grid}.cells.log", *command, FASTADV_COMMIT=environment.commit(), **env)
    return {"ok": status == 0, "processes": 1 if DRY_RUN else count, "mps": shared}


def price(out):
    """Run the study of price.yaml."""
    return study(out, "price")


@contextmanager
def sharing(out):
    """Let the kernels of several processes run at the same time on a GPU, by CUDA's Multi-Process Service.

    Without it processes take turns with the GPU, and a small network leaves most of it idle.

    Yields:
        (whether the service runs; the environment of the processes).
    """
    folder = Path(tempfile.gettempdir(), "fastadv-mps")  # the path of a socket must be short
    folder.mkdir(exist_ok=True)
    env = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    control = None if DRY_RUN else shutil.which("nvidia-cuda-mps-control")
    shared = False
    if control:
        subprocess.run([control, "-d"], env=os.environ | env, timeout=20)  # it runs on where this part is cut
        status, _ = run(out / "mps.log", sys.executable, "-c", "import torch; torch.ones(1).cuda()", **env)
        shared = status == 0
    try:
        yield shared, env if shared else {}
    finally:
        if control:
            subprocess.run([control], input="quit\n", text=True, env=os.environ | env, timeout=20)


def strength(out):
    """Run strength.py, which trains and attacks a network on CIFAR-10."""
    path = out / "kept/strength.json"
    if DRY_RUN or not images():
        return {"ok": True, "why": "FASTADV_CIFAR10 names no folder with CIFAR-10"}
    command = (sys.executable, "benchmarks/attacks/strength.py", images(), "--out", path)
    paths = os.pathsep.join((os.environ["PYTHONPATH"], str(ROOT / "benchmarks/attacks")))
    status, _ = run(out / "strength.runs.log", *command, PYTHONPATH=paths)
    return {"ok": status == 0}


# ------------------------------------------------------------------ sanitizer


def sanitize(out, tool, backends, seconds):
    """Run exercise.py under a tool of compute-sanitizer, or alone if `tool` is None."""
    # Without PyTorch's caching allocator every tensor has a separate allocation, whose bounds the tools watch.
    prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "50"] if tool else []
    command = (*prefix, sys.executable, "benchmarks/gpu/exercise.py", *backends, *seconds)
    status, log = run(out / f"sanitizer.{tool or 'none'}.log", *command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    told = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", log)
    checked = re.search(r"^(\d+) calls, (\d+) mismatches$", log, re.MULTILINE)
    return {
        "ok": status == 0 and bool(checked) and (told is not None or not tool),
        "backends": backends,
        "errors": int(told[1]) if told else None,
        "calls": int(checked[1]) if checked else None,
        "mismatches": int(checked[2]) if checked else None,
    }


def sanitizer(out, backends=("triton",), seconds=("--seconds", "2" if DRY_RUN else "12"), part="sanitizer"):
    """Run calls for some seconds without a tool, so that Triton compiles its kernels, then under each tool.

    A tool that is done is not run again.
    """
    path, tools = out / f"kept/{part}.json", {}
    for tool in (None,) if DRY_RUN else (None, *TOOLS):
        tools = plan.read(path).get("tools", {})
        if not tools.get(tool or "none", {}).get("ok"):
            tools[tool or "none"] = sanitize(out, tool, () if DRY_RUN else backends, seconds)
            plan.write(path, {"tools": tools})
    return {"ok": all(tool["ok"] for tool in tools.values())}


def sanitizer_all(out):
    return sanitizer(out, ("cuda", "triton"), (), "sanitizer-all")


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
    """The rows of ncu's CSV, with the names of METRICS. Its second line has units, and its numbers have commas."""
    rows = list(csv.DictReader(line for line in table.splitlines() if line.startswith('"')))[1:]
    return [{name: float(row[metric].replace(",", "")) for metric, name in METRICS.items()} for row in rows]


def counters(out, which=CHANGED):
    """Count with ncu, in one launch of each op: achieved bandwidth, issue slots, pipes."""
    if DRY_RUN:
        return {"ok": True, "why": "a dry run has no counters", "launches": []}
    table = out / "ncu.csv"
    status, log = run(
        out / "ncu.log", "ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base",
        "--log-file", str(table), "--kernel-name", "regex:^(vectorised|strided)_kernel$",
        "--metrics", ",".join(METRICS),
        sys.executable, "benchmarks/gpu/launches.py", which, FASTADV_BENCH_SIZES="large",
    )  # fmt: skip
    if status:
        return {"ok": False, "why": log[-500:], "launches": []}
    launched = json.loads(next(line for line in log.splitlines() if line.startswith("[{")))
    rows = counted(table.read_text())
    return {"ok": len(rows) == len(launched), "launches": [{**a, **b} for a, b in zip(launched, rows, strict=False)]}


def counters_all(out):
    return counters(out, "")


def hanging(out):
    """A part of a dry run that never ends, with a child process that does not end either: plan.py has to cut it."""
    subprocess.run(["sleep", "1000"], check=True)


PARTS = (build, correctness, verdicts, attacks, steps, evaluation, bench, counters, sanitizer, price)
PARTS += (study, strength, bench_all, counters_all, sanitizer_all, hanging)


def main(name, out):
    out = Path(out)
    if not DRY_RUN and not torch.cuda.is_available():
        sys.exit("there is no GPU; --dry-run does without")
    path = out / f"{name}.json"
    ran = {"part": name, "ok": False, "environment": environment.facts()}
    plan.write(path, ran)  # a part that is cut has written where it ran
    result = {part.__name__.replace("_", "-"): part for part in PARTS}[name](out)
    plan.write(path, ran | result)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
