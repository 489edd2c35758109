"""One launch of every op, dtypes and backend on tensors beyond the caches: what counters.py has ncu look at.

Prints what it launched, in order, as JSON.
"""

import json

import cases
import torch

import fastadv

SIZE = "large"


def main():
    launched = []
    chosen = [c for c in cases.all_cases() if c.size == SIZE]
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
    main()
