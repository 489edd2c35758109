#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: builds for it, checks the CUDA and Triton kernels on it, measures them.
#
#   benchmarks/gpu/run.sh DIR [--minutes N] [--to FOLDER] [--part NAME] [--dry-run]
#
# The script is made for a machine that one has for a quarter of an hour. `--minutes 9` runs the parts about which the
# least is known: build, correctness, price. A second call in the same DIR, with `--minutes 3`, goes on with attacks,
# steps and bench, and later ones with the others, then with parts that were cut. A part is cut when its time limit or
# the minutes end, and what it had found is kept.
# Finished parts, tests and figures are not run again. `--part` runs one part alone; some parts run only in this way.
# benchmarks/gpu/plan.py has the table of parts.
#
# DIR is best an ignored folder of the tree, such as gpu-results. Each part leaves DIR/PART.json. After each part all
# results go to FOLDER/results.tar.gz. At the end a table shows the parts that were run, the parts that were not,
# and the seconds that these need. --dry-run runs every part on tiny sizes without a GPU, and one part that hangs, which
# must be cut; its figures mean nothing.
#
# PYTHON names the interpreter (python3), FASTADV_CIFAR10 a folder with CIFAR-10, FASTADV_STUDY a folder with the data
# sets of benchmarks/training/*.yaml, FASTADV_AUTOATTACK a clone of github.com/fra31/auto-attack, FASTADV_COMMIT
# the commit if there is no repository. No network is needed. The exit status is 0 if every part that was started is
# done.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
exec "${PYTHON:-python3}" "$root/benchmarks/gpu/plan.py" "$@"
