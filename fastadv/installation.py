"""What `fastadv info` prints, as a dict."""

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
    """{device: text} as {device type: text}, but for the devices of a type that differ."""
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
    """What setup.py wrote down, and what the extensions know of themselves."""
    written = facts()
    if written is None:
        return {"built": "no: the package runs from a source tree that was never built"}
    return {**written, **{name: module.facts() for name in ("cpu", "cuda") if (module := native(name)[0])}}


def info() -> dict[str, Any]:
    """Tell what runs here: which backend serves which device, and why not the others.

    Returns:
        A dict that JSON can hold. Where GPUs differ in who serves them, each has an entry of its own.

        - `version`: fastadv's.
        - `imported_from`: the package's folder.
        - `torch`: {"version", "cuda"}.
        - `devices`: {name: text}.
        - `backends`: {name: {"available", "why"}}; `why` says why not, per device type.
        - `serves`: {device type: backend}; where the chosen backend cannot serve a device, "none: " and why.
        - `build`: what setup.py wrote down and the extensions know of themselves.
        - `calls`: {backend: kernel calls in this process}.
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
