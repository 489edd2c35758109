"""Lists stored results that are older than their code, with the commit at which they were measured.

    python benchmarks/stale.py [--write]

A file in benchmarks/results names the commit of its code. git says whether that code differs from the present one.
With --write the lists in README.md, docs/figures.md and benchmarks/results/README.md are updated; a test fails where
they are not up to date.
"""

import argparse
import json
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import figures

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- stale figures: make figures -->", "<!-- end -->"

OPS = ("fastadv/functional.py", "fastadv/ops", ":!fastadv/ops/triton_kernels.py", "csrc")
CPU_OPS, CUDA_OPS = (*OPS, ":!csrc/cuda"), (*OPS, ":!csrc/cpu")
TRITON_OPS = ("fastadv/functional.py", "fastadv/ops", "csrc/philox.h")
ATTACKS = ("fastadv/attacks",)
EVALUATION = (*ATTACKS, "fastadv/evaluation")
TRAINING = (*EVALUATION, "fastadv/training")

# {kind of result, by the rows of the benchmark or the part that made the file: the files of code that it depends on}
DEPENDS = {
    "op": OPS,
    "host": OPS,
    "attack": ATTACKS,
    "memory": ATTACKS,
    "evaluation": EVALUATION,
    "strength": ATTACKS,
    "suites": ATTACKS,
    "verdicts": EVALUATION,
    "own time": EVALUATION,
    "training": (*ATTACKS, "fastadv/training/step.py"),  # from the first run on a GPU
    "training cost": (*ATTACKS, "fastadv/training/step.py", "fastadv/training/methods.py"),
    # From runs that were measured before `fastadv study` existed.
    "transfer": (*TRAINING, "fastadv/data", "fastadv/models/robust-resnet.safetensors"),
    "demo": (*TRAINING, "fastadv/data", "fastadv/models/robust-resnet.safetensors", "examples/demo.py"),
    "study": (
        *(*TRAINING, "fastadv/data", "fastadv/models/robust-resnet.safetensors"),
        *(f"fastadv/study/{name}.py" for name in ("cells", "images", "verdicts")),
    ),
    "scratch": (*TRAINING, "fastadv/data", "fastadv/models/networks.py"),
    "zeros": (*TRAINING, "fastadv/data", "fastadv/models/robust-resnet.safetensors"),
    "build": ("csrc/cuda", "csrc/attack_math.h", "csrc/philox.h"),
    "kernels": ("csrc/cuda", "csrc/attack_math.h", "csrc/philox.h"),
    "sass": ("csrc/cuda", "csrc/attack_math.h", "csrc/philox.h", "fastadv/ops/triton_kernels.py"),
    "correctness": OPS,
    "counter": OPS,
    "sanitizer": OPS,
}
OF_BACKEND = {"cpu": CPU_OPS, "reference": CPU_OPS, "cuda": CUDA_OPS, "triton": TRITON_OPS}


def kinds(result):
    """(kind, backend or None) for all rows of a result."""
    rows = [b["extra_info"] for b in result.get("benchmarks", [])] + result.get("summary", [])
    rows += [{"kind": "counter", **launch} for launch in result.get("launches", [])]
    found = {(row["kind"], row.get("backend")) for row in rows if "kind" in row}
    return found or {(result["part"], None)}


def depends(result):
    """The paths of the code that a result depends on, as git's pathspecs."""
    found = set()
    for kind, backend in kinds(result):
        ops = kind in ("op", "host", "counter")
        found.add(OF_BACKEND[backend] if ops and backend else DEPENDS[kind])
    return sorted(found)


def git(root, *command):
    run = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
    return run.stdout.split("\n")[:-1] if run.returncode == 0 else None


def changed(root, result):
    """The files of code that have changed since a commit; None where git does not know the commit."""
    commit = result["environment"]["commit"].rstrip("+")
    found = set()
    for paths in depends(result):
        for command in (("diff", "--name-only", commit, "--"), ("ls-files", "--others", "--exclude-standard", "--")):
            names = git(root, *command, *paths)
            if names is None:
                return None
            found.update(name for name in names if name.endswith((".py", ".h", ".cuh", ".cu", ".cpp", ".safetensors")))
    return sorted(found)


def results(root):
    """The files of results that depend on our code.

    Files without an environment have results of other libraries' attacks. They depend on models and images, whose
    digests the files have.
    """
    folder = root / "benchmarks/results"
    found = {str(path.relative_to(folder)): json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}
    return {name: result for name, result in found.items() if "environment" in result} | studied(found)


def studied(found):
    """The files, but of a study's cells only the first one of each commit, in place of the others."""
    first = {}
    for name, result in found.items():
        if "cell" in result:
            first.setdefault((Path(name).parents[2], result.get("commit", "unknown")), name)
    return {name: {"part": "study", "environment": {"commit": commit}} for (_, commit), name in first.items()}


def stale(root):
    """{file of results: (its commit, the code that has changed since, or None where git does not know the commit)}."""
    found = {}
    for name, result in results(root).items():
        names = changed(root, result)
        if names != []:
            found[name] = names and (result["environment"]["commit"][:7], names)
    return found


# ------------------------------------------------------------------ what the pages say of them


def in_readme(found):
    """How many of the results that README quotes are old; of a study the cells of one commit count as one."""
    quoted = figures.files_of(ROOT / "README.md")
    names = {name for name in results(ROOT) if any(fnmatch(name, each) for each in quoted)}
    old = len(names & found.keys())
    return [f"Of the {len(names)} results quoted here {old or 'none'} were measured before their code changed."]


def in_figures(found):
    """A list with a line for each commit."""
    commits = {}
    for name, (commit, _) in found.items():
        commits.setdefault(commit, []).append(f"`{Path(name).with_suffix('')}`")
    return [f"- {commit}: {', '.join(names)}" for commit, names in commits.items()] or ["None."]


def in_results(found):
    """A list with a line for each file of results, and where code has changed."""
    return [
        f"- [{name}]({name}), measured at {commit}; changed since: {', '.join(by_folder(paths))}"
        for name, (commit, paths) in found.items()
    ] or ["None."]


def by_folder(paths):
    """The folders of some files, each with the number of these, or with its one file's name."""
    folders = {}
    for path in paths:
        folders.setdefault(Path(path).parent, []).append(path)
    return [f"`{of[0]}`" if len(of) == 1 else f"`{folder}` ({len(of)} files)" for folder, of in folders.items()]


PLACES = {"README.md": in_readme, "docs/figures.md": in_figures, "benchmarks/results/README.md": in_results}


def filled(text, told):
    """The text with new lines between its two marks."""
    before, rest = text.split(BEGIN)
    told = "\n".join(told)
    return f"{before}{BEGIN}\n{told}\n{END}{rest.split(END)[1]}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="bring the lists up to date")
    args = parser.parse_args(argv)
    found = stale(ROOT)
    known = {name: facts for name, facts in found.items() if facts}
    print(*in_results(known), *(f"git does not know the commit of {name}" for name in found.keys() - known), sep="\n")
    for place, lines in PLACES.items() if args.write else ():
        path = ROOT / place
        path.write_text(filled(path.read_text(), lines(known)))


if __name__ == "__main__":
    main()
