#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: builds for it, checks the CUDA and Triton kernels on it, measures them.
#
#   benchmarks/gpu/run.sh OUTDIR [--dry-run] [--part NAME]
#
# Parts, in this order: build correctness kernels bench attacks training counters sanitizer. Each writes
# OUTDIR/NAME.json, takes under ten minutes, and is skipped where that file says it succeeded; within a part, finished
# steps are skipped too, so after a timeout the same command goes on. --dry-run does every part without a GPU, on tiny
# sizes: no figure of it counts. PYTHON names the interpreter (python3), FASTADV_CIFAR10 a folder with CIFAR-10,
# for the runs that train on it. It needs no network. Exit status: 0 if every part asked for is done.
set -euo pipefail

usage() {
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

parts=(build correctness kernels bench attacks training counters sanitizer)
seconds=${FASTADV_PART_SECONDS:-580}
out=""
while (($#)); do
  case $1 in
    --dry-run) export FASTADV_DRY_RUN=1 CUDA_VISIBLE_DEVICES="" TRITON_INTERPRET=1 ;;
    --part)
      [[ " ${parts[*]} " == *" ${2:-} "* ]] || usage
      parts=("$2")
      shift
      ;;
    -*) usage ;;
    *) [[ -z $out ]] && out=$1 || usage ;;
  esac
  shift
done
[[ -n $out ]] || usage

mkdir -p "$out"
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
export PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"

# One process says what is left: each takes seconds to import torch.
left=" $("${PYTHON:-python3}" benchmarks/gpu/parts.py --left "$out" "${parts[@]}") "
failed=()
for part in "${parts[@]}"; do
  [[ $left == *" $part "* ]] || { echo "$part: done already" && continue; }
  # timeout ends the whole process group, compilers and test workers included.
  timeout --kill-after=10 "$seconds" "${PYTHON:-python3}" benchmarks/gpu/parts.py "$part" "$out" || failed+=("$part")
done
if ((${#failed[@]})); then
  echo "not done: ${failed[*]}; the logs are in $out" >&2
  exit 1
fi
