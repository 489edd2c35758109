"""Runs the parts of run.sh in order, each within its time limit ("cap"), until the minutes are over.

It imports no package, so that it starts at once: every second of a GPU counts. parts.py has the parts themselves.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# {part: its cap in seconds}. The parts about which the least is known come first. The first three parts fit into nine
# minutes, each three of the others into three minutes, and the last one too.
CAPS = {
    "build": 90,
    "correctness": 120,
    "price": 325,
    "attacks": 70,
    "steps": 60,
    "bench": 40,
    "evaluation": 60,
    "counters": 40,
    "sanitizer": 75,
    "verdicts": 130,
}
# Parts that only --part runs.
MORE = {"study": 580, "strength": 170, "bench-all": 580, "counters-all": 120, "sanitizer-all": 580}
# A part of a dry run that must be cut, while all the other parts are done.
HANGING = {"hanging": 3}

LEAST = 15  # seconds; with less time left no part is started, as importing PyTorch alone takes a third of this
GRACE = 3  # seconds between asking a part to end and killing it
LARGEST = 15 << 20  # bytes of results.tar.gz at most
PACKED = (".json", ".jsonl", ".log", ".csv", ".yaml", ".txt")
STATE = {"train", "machines.json"}  # state of an unfinished cell: useless without its weights, which are not packed


# ------------------------------------------------------------------ results


def read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def write(path, result):
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def lines(path):
    """The whole lines of a file in which the last one may have been cut."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def collect(out, part):
    """Collect in PART.json what a part stored while it ran: runs, cells, outcomes of tests, and their figures."""
    result = read(out / f"{part}.json") | read(out / f"kept/{part}.json")
    if cells := sorted(path.parent.name for path in (out / f"kept/{part}").glob("cells/*/cell.json")):
        result["cells"] = cells
    if result:
        write(out / f"{part}.json", result)
    kept = lines(out / f"kept/{part}.jsonl")
    if not kept:
        return
    tests = {line["test"]: line for line in kept if "test" in line}
    ended = Counter(line["outcome"] for line in tests.values())
    failed = {name: line["why"] for name, line in tests.items() if line["outcome"] == "failed"}
    total = max((line["collected"] for line in kept if "collected" in line), default=len(tests))
    counts = {"of": total, **{outcome: ended[outcome] for outcome in ("passed", "failed", "skipped")}}
    figures = [figure for line in tests.values() for figure in line["figures"]]
    write(out / f"{part}.json", result | {"tests": counts, "failed": failed, "summary": figures})


def pack(out, folder):
    """Pack all results and logs, without weights, into one file; if it is too large, leave the largest logs out."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f for f in out.rglob("*") if f.suffix in PACKED and not STATE & set(f.relative_to(out).parts)]
    files.sort(key=size)
    while sum(map(size, files)) > 4 * LARGEST and files[-1].suffix == ".log":  # text packs to a fifth
        files.pop()
    path = folder / "results.part"
    with tarfile.open(path, "w:gz") as archive:
        for file in files:
            archive.add(file, file.relative_to(out))
    path.replace(folder / "results.tar.gz")


def size(path):
    return path.stat().st_size


# ------------------------------------------------------------------ one part


def supervised(command, cap, log, environment):
    """Run a command, and kill all its processes after `cap` seconds. Return ("done", "failed" or "cut", seconds)."""
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        process.wait(cap)
        outcome = "failed" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        outcome = "cut"
    finally:
        end(process)
    return outcome, round(time.monotonic() - start, 1)


def end(process):
    """End the whole process group, with compilers and test workers."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


def command_of(part, out):
    return [sys.executable, str(ROOT / "benchmarks/gpu/parts.py"), part, str(out)]


def environment_of(dry_run):
    """A part's environment. On a GPU it finds the package that is built in place, in a dry run the installed one."""
    paths = [ROOT / "benchmarks", ROOT / "benchmarks/gpu", *([] if dry_run else [ROOT]), os.environ.get("PYTHONPATH")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths if p), "PYTHONUNBUFFERED": "1"}
    if dry_run:
        found |= {"FASTADV_DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    return found


# ------------------------------------------------------------------ all of them


class Plan:
    """The parts of one call, and the outcomes of the parts in earlier calls (DIR/kept/plan.json)."""

    def __init__(self, out, caps, command=command_of, built=lambda: any((ROOT / "fastadv").glob("_cuda*.so"))):
        self.out, self.caps, self.command = out, caps, command
        self.built = built  # whether kernels are there: on another machine the results may be without them
        (out / "kept").mkdir(parents=True, exist_ok=True)
        self.known = read(out / "kept/plan.json")

    def order(self):
        """The parts that are not done: first parts that were never started, then parts that were cut or failed."""
        left = [part for part in self.caps if self.outcome(part) != "done"]
        return sorted(left, key=lambda part: self.outcome(part) is not None)

    def outcome(self, part):
        if part == "build" and not self.built():
            return None
        return self.known.get(part, {}).get("outcome")

    def run(self, seconds, environment, to=None):
        """Run parts for `seconds` seconds. Return whether every part that was started is done."""
        end_at, begun = time.monotonic() + seconds, []
        for part in self.order():
            left = end_at - time.monotonic() - GRACE
            if left < min(LEAST, self.caps[part]):
                break
            begun.append(part)
            self.do(part, min(left, self.caps[part]), environment)
            if to:
                pack(self.out, to)
            if part == "build" and self.outcome(part) != "done":
                break  # without kernels the other parts cannot run
        return all(self.outcome(part) == "done" for part in begun)

    def do(self, part, cap, environment):
        log = self.out / f"{part}.log"
        outcome, seconds = supervised(self.command(part, self.out), cap, log, environment)
        collect(self.out, part)
        total = round(self.known.get(part, {}).get("seconds", 0) + seconds, 1)
        self.known[part] = {"outcome": outcome, "seconds": total}
        write(self.out / "kept/plan.json", self.known)
        if result := read(self.out / f"{part}.json"):
            write(self.out / f"{part}.json", result | {"seconds": total})
        print(f"{part}: {outcome}, {seconds} s", flush=True)
        if outcome != "done":
            print(log.read_text(errors="replace")[-1500:], flush=True)

    def left(self, part):
        """The seconds that a part still needs, by the pace of its tests; its cap if none has passed yet."""
        found, tests = self.known.get(part, {}), read(self.out / f"{part}.json").get("tests")
        if found.get("outcome") == "done":
            return 0
        if not found or not tests or not tests["passed"]:
            return self.caps[part]
        ended = tests["passed"] + tests["skipped"]
        return round(found["seconds"] * (tests["of"] - ended) / ended)

    def table(self):
        rows = [("part", "outcome", "seconds", "tests", "would take, s")]
        for part in self.caps:
            found, tests = self.known.get(part, {}), read(self.out / f"{part}.json").get("tests")
            told = f"{tests['passed']} of {tests['of']}, {tests['failed']} failed" if tests else "-"
            rows.append((part, found.get("outcome", "unmeasured"), str(found.get("seconds", "-")), told))
            rows[-1] += (str(self.left(part)),)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def parser():
    made = argparse.ArgumentParser(prog="run.sh", description="Checks and measures on an NVIDIA GPU: see run.sh.")
    made.add_argument("dir", type=Path, help="for the results")
    made.add_argument("--minutes", type=float, default=float("inf"), help="in all (as long as the caps allow)")
    made.add_argument("--to", type=Path, metavar="FOLDER", help="where results.tar.gz goes")
    made.add_argument("--part", choices=(*CAPS, *MORE), metavar="NAME", help=f"one of {', '.join((*CAPS, *MORE))}")
    made.add_argument("--dry-run", action="store_true", help="tiny, without a GPU")
    return made


def main(argv=None):
    arguments = parser().parse_args(argv)
    out = arguments.dir.resolve()
    dry_run = arguments.dry_run
    caps = {arguments.part: (CAPS | MORE)[arguments.part]} if arguments.part else CAPS
    if dry_run and not arguments.part:
        caps = {"build": CAPS["build"], **HANGING, **CAPS}
    plan = Plan(out, caps, built=lambda: True) if dry_run else Plan(out, caps)
    done = plan.run(60 * arguments.minutes, environment_of(dry_run), arguments.to)
    if dry_run and not arguments.part:
        done = plan.outcome("hanging") == "cut" and all(plan.outcome(part) == "done" for part in CAPS)
    print("", *plan.table(), f"\nthe logs are in {out}", sep="\n")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
