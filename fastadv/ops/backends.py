"""Which backend serves which device, and why not the others."""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.compiler import is_compiling

from fastadv._warnings import warn
from fastadv.names import instead
from fastadv.ops import reference
from fastadv.ops.schemas import BACKENDS, OPS, SCHEMAS, Arguments, below_autograd

NATIVE = frozenset({"cpu", "cuda"})
PACKAGE = Path(__file__).resolve().parents[1]

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "fastadv_backend", default=os.environ.get("FASTADV_BACKEND") or None
)
_calls = dict.fromkeys(("triton", "reference"), 0)  # the native libraries count their own


def _register_python(backend: str, implementations: Mapping[str, Callable[..., None]]) -> None:
    """Make plain Python functions the kernels of a backend, on every device."""

    def counted(kernel: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            _calls[backend] += 1
            kernel(*args)

        return run

    for name in SCHEMAS:
        kernel = counted(implementations[name])
        torch.library.impl(f"fastadv::{name}.{backend}", "CompositeExplicitAutograd", kernel)


def _has(module: str) -> bool:
    """Whether this package has a module that the build makes, and not another one that is installed editable."""
    spec = importlib.util.find_spec(f"fastadv.{module}")
    return (
        spec is not None
        and spec.origin is not None
        and Path(spec.origin).resolve().parent in (PACKAGE, Path(__file__).parents[1])
    )


def facts() -> dict[str, Any] | None:
    """What setup.py wrote down of the build; None in a source tree that was never built."""
    found: dict[str, Any] | None = importlib.import_module("fastadv._build").FACTS if _has("_build") else None
    return found


def _warn_of_the_reference(what: str, how: str) -> None:
    warn(
        f"fastadv was imported from {PACKAGE}, and {what}: plain PyTorch serves them, some 40 times slower than the "
        f"CPU kernels. To change that, {how}."
    )


def _warn_of_a_source_tree() -> None:
    """The folder that Python starts in comes first on its path, also where it holds these sources."""
    places = (Path(entry, "fastadv") for entry in sys.path)
    other = next((place for place in places if (place / "_build.py").exists()), None)
    how = f"start Python with -P or in another folder: a built one is in {other}" if other else ""
    how = how or f"build it there (pip install -e {PACKAGE.parent}), or install it and start Python in another folder"
    _warn_of_the_reference("this source tree was not built, so it has no kernels for CPU tensors", how)


@functools.cache
def native(backend: str) -> tuple[ModuleType | None, str]:
    """Import `fastadv._cpu` or `fastadv._cuda`, which registers its kernels: (module or None, why it is None)."""
    if not _has(f"_{backend}"):
        return None, "the extension was not built: see fastadv.info()['build']"
    if backend == "cuda" and torch.version.cuda is None:
        return None, "this PyTorch was built without CUDA"
    try:
        return importlib.import_module(f"fastadv._{backend}"), ""
    except ImportError as error:
        return None, f"the extension does not load: {error}"


@functools.cache
def triton() -> tuple[ModuleType | None, str]:
    """(the module of the Triton kernels or None, why it is None). Importing triton takes a while: only when needed."""
    if importlib.util.find_spec("triton") is None:
        return None, "the triton package is not installed"
    try:
        return importlib.import_module("fastadv.ops.triton_kernels"), ""
    except Exception as error:  # triton fails in many ways where its driver does not fit
        return None, f"triton does not load: {error}"


def _triton_kernel(name: str) -> Callable[..., None]:
    def run(*args: Any) -> None:
        module, why = triton()
        if module is None:
            raise RuntimeError(why)
        module.IMPLEMENTATIONS[name](*args)

    return run


_register_python("reference", reference.IMPLEMENTATIONS)
_register_python("triton", {name: _triton_kernel(name) for name in SCHEMAS})
for _backend in NATIVE:
    native(_backend)
if facts() is None:
    _warn_of_a_source_tree()


def _runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for a list such as `8.0;9.0a;10.0+PTX` run on a device of that compute capability.

    Machine code for 8.0 runs on 8.0, 8.6 and 8.9, PTX for 8.0 on every later device, and code for 9.0a on 9.0 alone.
    """
    for major, minor, kind, ptx in re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", archs):
        built = int(major), int(minor)
        later = built <= capability if ptx and not kind else built[0] == capability[0] and built[1] <= capability[1]
        if built == capability or (later and kind != "a"):
            return True
    return False


def _lacks_code(module: ModuleType, device: torch.device) -> str:
    """'' where the CUDA kernels were built for the device, else the reason."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    archs, (major, minor) = module.facts()["archs"], torch.cuda.get_device_capability(device)
    if _runs_on(archs, (major, minor)):
        return ""
    return f"it was built for {archs} (TORCH_CUDA_ARCH_LIST), and the GPU has compute capability {major}.{minor}"


def why_not(backend: str, device: torch.device | str) -> str:
    """'' where the backend serves the device (a torch.device, or its name), else the reason."""
    device = torch.device(device)
    if backend == "reference":
        return ""
    if backend in NATIVE:
        if device.type != backend:
            return f"it serves {backend} tensors only"
        module, why = native(backend)
        return why if module is None or backend == "cpu" else _lacks_code(module, device)
    module, why = triton()
    if module is None:
        return why
    if device.type == "cpu" and not module.INTERPRETED:
        return "on the CPU it needs Triton's interpreter: set TRITON_INTERPRET=1 before fastadv is used"
    if device.type not in ("cpu", "cuda"):
        return "it serves cuda tensors only"
    return "" if device.type == "cpu" or torch.cuda.is_available() else "there is no GPU"


# Where nobody chose a backend: the first of these that can. Triton's interpreter is for tests, never a default.
_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        where = "(from fastadv.backend or FASTADV_BACKEND)"
        raise RuntimeError(f"unknown backend {name!r} {where}{instead(name, BACKENDS)}")


def chosen() -> str | None:
    """The backend that `backend` or FASTADV_BACKEND names; None where nobody chose one."""
    return _chosen.get()


def resolve(name: str | None, device: torch.device | str) -> str:
    """The name of the backend that serves the device.

    Args:
        name: the backend that was chosen; None: the best that there is.
        device: a torch.device, or its name.

    Returns:
        `name`, or the best backend's name.

    Raises:
        RuntimeError: the name is unknown, or the named backend cannot serve the device.
    """
    if name is None:
        order = _ORDER.get(torch.device(device).type, ("reference",))
        return next(b for b in order if not why_not(b, device))
    _check_name(name)
    why = why_not(name, device)
    if why:
        raise RuntimeError(f"backend {name!r} cannot serve {torch.device(device).type} tensors: {why}")
    return name


@functools.cache
def _resolve_device(name: str | None, device: torch.device) -> str:
    found, built = resolve(name, device), facts()
    if name is None and found == "reference" and device.type in NATIVE and built is not None:
        why = built[device.type].get("why") or why_not(device.type, device)
        _warn_of_the_reference(
            f"it has no kernels for {device.type} tensors ({why})",
            "mend that and install it again (`fastadv info` says more)",
        )
    return found


def serving(device: torch.device) -> str:
    """The name of the backend in use for the device. A compiled function keeps the one it was traced with."""
    return _resolve_device(_chosen.get(), device)


# What torch.compiler.assume_constant_result does. It would load the compiler, and each import would take twice as long.
serving._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(op_name: str, backend_name: str, args: Arguments) -> None:
    """Run a backend's op, whether or not an input requires grad."""
    op = OPS[op_name, backend_name]
    if is_compiling():
        op(*args)
        return
    guard = below_autograd()  # straight to the kernel, past the refusal at the Autograd key
    try:
        op._op(*args)  # what calling `op` comes to
    finally:
        del guard  # an exception that somebody keeps would keep it, and autograd off


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use the named backend within the `with` block, in this thread or task.

    It never falls back: an op on a device that the backend cannot serve raises RuntimeError. The environment
    variable FASTADV_BACKEND, read when fastadv is imported, chooses for a whole process.

    Args:
        name: "cuda", "triton", "cpu" or "reference".

    Raises:
        RuntimeError: the name is unknown.
    """
    _check_name(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def calls() -> dict[str, int]:
    """Kernel calls per backend in this process."""
    counts = {b: module.calls() if (module := native(b)[0]) else 0 for b in ("cuda", "cpu")}
    return {b: {**counts, **_calls}[b] for b in BACKENDS}
