#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: builds for it, checks the CUDA and Triton kernels on it, measures them.
#
#   benchmarks/gpu/run.sh DIR [--minutes N] [--to FOLDER] [--part NAME] [--dry-run]
#
# For a machine that is at hand for a quarter of an hour. `--minutes 9` does what is least known first: build, correctness,
# verdicts, attacks, steps, evaluation. A second call in the same DIR, `--minutes 3`, goes on: bench, counters and
# sanitizer of what has changed; a third does the study, then what was cut. A part is killed at its cap in seconds (or
# where the minutes end) and what it had is kept; finished parts, tests and figures are not done again. `--part` does
# one part alone, those among them that no call includes: benchmarks/gpu/plan.py has the table.
#
# DIR is best an ignored folder of the tree, such as gpu-results. Each part leaves DIR/PART.json; all of them go to
# FOLDER/results.tar.gz after each part, and a table of what was done, what is unmeasured and how long that would take
# is printed last. --dry-run does every part without a GPU, on tiny sizes, and one that hangs, to be cut: no figure of
# it counts. PYTHON names the interpreter (python3), FASTADV_CIFAR10 a folder with CIFAR-10, FASTADV_AUTOATTACK a clone
# of github.com/fra31/auto-attack, FASTADV_COMMIT the commit where there is no repository. No network is needed. Exit
# status: 0 if every part that was begun is done.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
exec "${PYTHON:-python3}" "$root/benchmarks/gpu/plan.py" "$@"
