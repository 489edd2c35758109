"""Launches every op once, with all dtypes and backends, on tensors larger than the caches; parts.py runs it under ncu.

    python benchmarks/gpu/launches.py ["triton or random_init"]

Only cases with one of the words in their id are launched. Prints the launches, in order, as JSON.
"""

import json
import sys

import cases
import torch

import fastadv

SIZE = "large"


def main(words=""):
    launched = []
    chosen = [c for c in cases.all_cases() if c.size == SIZE and any(word in c.id for word in words.split(" or "))]
    for case in chosen:
        inputs, out = case.inputs(), case.output()
        with fastadv.backend(case.backend), torch.no_grad():
            cases.OPS[case.op].fused(*inputs, out=out, **case.model_input(out))
        launched.append(
            {"op": case.name, "dtype": case.pair, "backend": case.backend, "bytes": case.bytes(inputs, out)}
            | {"elements": out.numel()}
        )
    torch.cuda.synchronize()
    print(json.dumps(launched))


if __name__ == "__main__":
    main(*sys.argv[1:])
