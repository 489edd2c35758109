"""What `fastadv info` prints, as a dict."""

import platform

import torch

from fastadv.ops.backends import BACKENDS, PACKAGE, calls, facts, native, resolve, why_not
from fastadv.version import __version__


def _devices():
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    return found


def _build():
    """What setup.py wrote down, and what the extensions know of themselves."""
    if facts() is None:
        return {"built": "no: the package runs from a source tree that was never built"}
    return {**facts(), **{name: module.facts() for name in ("cpu", "cuda") if (module := native(name)[0])}}


def info():
    """Version, PyTorch, devices, which backend serves which device and why not the others, build facts, kernel calls.

    A dict: `version`, `imported_from` (a folder), `torch` {version, cuda}, `devices` {name: text}, `backends` {name:
    {available, why}} (`why` says why not, per device type), `serves` {device type: backend}, `build` {...}, `calls`
    {backend: kernel calls in this process}.
    """
    types = sorted({name.split(":")[0] for name in _devices()})
    reasons = {b: {t: why_not(b, t) for t in types} for b in BACKENDS}
    return {
        "version": __version__,
        "imported_from": str(PACKAGE),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "devices": _devices(),
        "backends": {
            b: {"available": not all(why.values()), "why": "; ".join(f"{t}: {w}" for t, w in why.items() if w)}
            for b, why in reasons.items()
        },
        "serves": {t: resolve(None, t) for t in types},
        "build": _build(),
        "calls": calls(),
    }
