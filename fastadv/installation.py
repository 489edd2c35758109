"""The facts about this installation that `fastadv info` prints, as a dict."""

import platform
from collections.abc import Mapping
from typing import Any

import torch

from fastadv.ops.backends import PACKAGE, calls, chosen, facts, native, resolve, why_not
from fastadv.ops.schemas import BACKENDS
from fastadv.version import __version__


def _devices() -> dict[str, str]:
    count = torch.get_num_threads()
    found = {"cpu": f"{platform.machine()}, {count} thread{'s' * (count > 1)}"}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    return found


def _by_device(found: Mapping[str, str]) -> dict[str, str]:
    """{device: text} with one entry for each device type, such as "cuda", where its devices have the same text."""
    of_type: dict[str, set[str]] = {}
    for device, text in found.items():
        of_type.setdefault(device.split(":")[0], set()).add(text)
    alone = {t for t, texts in of_type.items() if len(texts) == 1}
    return {t if (t := device.split(":")[0]) in alone else device: text for device, text in found.items()}


def _serving(device: str) -> str:
    try:
        return resolve(chosen(), device)
    except RuntimeError as error:
        return f"none: {error}"


def _build() -> dict[str, Any]:
    """The facts that setup.py wrote when it built the extensions, and the facts that the extensions report."""
    written = facts()
    if written is None:
        return {"built": "no: the package runs from a source tree that was never built"}
    return {**written, **{name: module.facts() for name in ("cpu", "cuda") if (module := native(name)[0])}}


def info() -> dict[str, Any]:
    """Tell which backend runs on which device here, and why the others do not.

    Returns:
        A dict that JSON can hold. A device type such as "cuda" has one entry; where its GPUs have different backends,
        each GPU has its own.

        - `version`: the version of fastadv.
        - `imported_from`: the package's folder.
        - `torch`: {"version", "cuda"}.
        - `devices`: {name: text}.
        - `backends`: {name: {"available", "why"}}; `why` says for each device type why the backend does not run there.
        - `serves`: {device type: backend}; where the chosen backend cannot run on a device, "none: " and the reason.
        - `build`: the facts that setup.py wrote, and those that the extensions report.
        - `calls`: {backend: the number of its kernel calls in this process}.
    """
    devices = _devices()
    reasons = {b: _by_device({d: why_not(b, d) for d in devices}) for b in BACKENDS}
    return {
        "version": __version__,
        "imported_from": str(PACKAGE),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "devices": devices,
        "backends": {
            b: {"available": not all(why.values()), "why": "; ".join(f"{t}: {w}" for t, w in why.items() if w)}
            for b, why in reasons.items()
        },
        "serves": _by_device({d: _serving(d) for d in devices}),
        "build": _build(),
        "calls": calls(),
    }
