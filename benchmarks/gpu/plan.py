"""What run.sh does and when: the parts in order, each within its cap, until the minutes are over.

Needs no package, so that it costs no second of the GPU's; parts.py has what the parts do.
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

# Part -> its cap in seconds, in the order of what is least known. Nine minutes hold the first six, three the next
# three, and three more the last.
CAPS = {
    "build": 90,
    "correctness": 110,
    "verdicts": 130,
    "attacks": 70,
    "steps": 60,
    "evaluation": 60,
    "bench": 40,
    "counters": 40,
    "sanitizer": 80,
    "study": 170,
}
# By --part alone.
MORE = {"strength": 170, "bench-all": 580, "counters-all": 120, "sanitizer-all": 580}
# Of a dry run: it is to be cut, and the others are to be done all the same.
HANGING = {"hanging": 3}

LEAST = 15  # seconds below which no part is begun: importing PyTorch takes a third of them
GRACE = 3  # seconds between asking a part to end and killing it
LARGEST = 15 << 20  # bytes of results.tar.gz
PACKED = (".json", ".jsonl", ".log", ".csv", ".yaml", ".txt")
STATE = {"train", "machines.json"}  # of a cell that was cut: of no use without its weights, which are not packed


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
    """Puts what a part kept as it went into PART.json: its runs, its cells, how its tests ended, with their figures."""
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
    failed = [name for name, line in tests.items() if line["outcome"] == "failed"]
    total = max((line["collected"] for line in kept if "collected" in line), default=len(tests))
    counts = {"of": total, **{outcome: ended[outcome] for outcome in ("passed", "failed", "skipped")}}
    figures = [figure for line in tests.values() for figure in line["figures"]]
    write(out / f"{part}.json", result | {"tests": counts, "failed": failed, "summary": figures})


def pack(out, folder):
    """All results and logs as one file, without weights; the largest logs stay behind where it would be too large."""
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
    """Runs the command, all its processes killed after `cap` seconds: (done, failed or cut, seconds)."""
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
    """The whole process group, compilers and test workers included."""
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
    """Where the parts find the package: on a GPU in the tree, built in place; in a dry run wherever it is installed."""
    paths = [ROOT / "benchmarks", ROOT / "benchmarks/gpu", *([] if dry_run else [ROOT]), os.environ.get("PYTHONPATH")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths if p), "PYTHONUNBUFFERED": "1"}
    if dry_run:
        found |= {"FASTADV_DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    return found


# ------------------------------------------------------------------ all of them


class Plan:
    """The parts of one call, and what is known of those of the calls before it (DIR/kept/plan.json)."""

    def __init__(self, out, caps, command=command_of, built=lambda: any((ROOT / "fastadv").glob("_cuda*.so"))):
        self.out, self.caps, self.command = out, caps, command
        self.built = built  # on another machine the results may be there, and what was built not
        (out / "kept").mkdir(parents=True, exist_ok=True)
        self.known = read(out / "kept/plan.json")

    def order(self):
        """Those that were never begun, then those that were cut or failed."""
        left = [part for part in self.caps if self.outcome(part) != "done"]
        return sorted(left, key=lambda part: self.outcome(part) is not None)

    def outcome(self, part):
        if part == "build" and not self.built():
            return None
        return self.known.get(part, {}).get("outcome")

    def run(self, seconds, environment, to=None):
        """Whether every part that was begun is done."""
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
                break  # the others have nothing to run
        return all(self.outcome(part) == "done" for part in begun)

    def do(self, part, cap, environment):
        log = self.out / f"{part}.log"
        outcome, seconds = supervised(self.command(part, self.out), cap, log, environment)
        collect(self.out, part)
        before = self.known.get(part, {}).get("seconds", 0)
        self.known[part] = {"outcome": outcome, "seconds": round(before + seconds, 1)}
        write(self.out / "kept/plan.json", self.known)
        print(f"{part}: {outcome}, {seconds} s", flush=True)
        if outcome != "done":
            print(log.read_text(errors="replace")[-1500:], flush=True)

    def left(self, part):
        """Seconds that the part would take still: by the pace of its tests, or up to its cap."""
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
