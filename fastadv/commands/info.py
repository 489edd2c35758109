"""fastadv info: what runs on which device here, and why."""

import argparse
import json
from typing import Any

import fastadv


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="the same for programs, as fastadv.info() returns it")


def run(arguments: argparse.Namespace) -> None:
    facts = fastadv.info()
    print(json.dumps(facts, indent=1) if arguments.json else in_words(facts))


def in_words(facts: dict[str, Any]) -> str:
    """The facts that `fastadv.info` returns, for people."""
    torch = facts["torch"]
    cuda = f"with CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA"
    parts = {
        "Devices": facts["devices"],
        "Kernels run": {device: _serving(backend) for device, backend in facts["serves"].items()},
        "Backends": {name: _usable(each) for name, each in facts["backends"].items()},
        "Built": {name: _built(each) for name, each in facts["build"].items()},
    }
    lines = [f"fastadv {facts['version']} in {facts['imported_from']}", f"PyTorch {torch['version']}, {cuda}"]
    for heading, rows in parts.items():
        lines += ["", heading, *(f"  {name:<10} {words}" for name, words in rows.items())]
    return "\n".join(lines)


def _serving(backend: str) -> str:
    return backend if backend.startswith("none: ") else f"by the backend {backend}"


def _usable(backend: dict[str, Any]) -> str:
    if not backend["available"]:
        return f"not used here. {backend['why']}"
    return "ready" + (f", but not everywhere. {backend['why']}" if backend["why"] else "")


def _built(facts: dict[str, Any] | str) -> str:
    """The facts of an extension; those of one that was not built have "built" and "why"."""
    if not isinstance(facts, dict):
        return str(facts)
    if facts.get("built") is False:
        return f"no: {facts['why']}"
    known = {name: value for name, value in facts.items() if value is not None}
    return "; ".join(f"{name.replace('_', ' ')}: {_listed(value)}" for name, value in known.items())


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
