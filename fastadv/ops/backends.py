"""Which backend serves which device, and why not the others."""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os

import torch
from torch.compiler import is_compiling

from fastadv.ops import reference
from fastadv.ops.schemas import BACKENDS, OPS, SCHEMAS, below_autograd

NATIVE = frozenset({"cpu", "cuda"})

_chosen = contextvars.ContextVar("fastadv_backend", default=os.environ.get("FASTADV_BACKEND") or None)
_calls = dict.fromkeys(("triton", "reference"), 0)  # the native libraries count their own


def _register_python(backend, implementations):
    """Make plain Python functions the kernels of a backend, on every device."""

    def counted(kernel):
        def run(*args):
            _calls[backend] += 1
            kernel(*args)

        return run

    for name in SCHEMAS:
        kernel = counted(implementations[name])
        torch.library.impl(f"fastadv::{name}.{backend}", "CompositeExplicitAutograd", kernel)


@functools.cache
def native(backend):
    """`fastadv._cpu` or `fastadv._cuda`, whose import registers its kernels: (module or None, why it is None)."""
    if importlib.util.find_spec(f"fastadv._{backend}") is None:
        return None, "the extension was not built: see fastadv.info()['build']"
    if backend == "cuda" and torch.version.cuda is None:
        return None, "this PyTorch was built without CUDA"
    try:
        return importlib.import_module(f"fastadv._{backend}"), ""
    except ImportError as error:
        return None, f"the extension does not load: {error}"


@functools.cache
def triton():
    """(the module of the Triton kernels or None, why it is None). Importing triton takes a while: only when needed."""
    if importlib.util.find_spec("triton") is None:
        return None, "the triton package is not installed"
    try:
        return importlib.import_module("fastadv.ops.triton_kernels"), ""
    except Exception as error:  # triton fails in many ways where its driver does not fit
        return None, f"triton does not load: {error}"


def _triton_kernel(name):
    return lambda *args: triton()[0].IMPLEMENTATIONS[name](*args)


_register_python("reference", reference.IMPLEMENTATIONS)
_register_python("triton", {name: _triton_kernel(name) for name in SCHEMAS})
for _backend in NATIVE:
    native(_backend)


def why_not(backend, device_type):
    """'' where the backend serves the device, else the reason."""
    if backend == "reference":
        return ""
    if backend in NATIVE:
        if device_type != backend:
            return f"it serves {backend} tensors only"
        return native(backend)[1]
    module, why = triton()
    if module is None:
        return why
    if device_type == "cpu" and not module.INTERPRETED:
        return "on the CPU it needs Triton's interpreter: set TRITON_INTERPRET=1 before fastadv is used"
    if device_type not in ("cpu", "cuda"):
        return "it serves cuda tensors only"
    return "" if device_type == "cpu" or torch.cuda.is_available() else "there is no GPU"


# What serves a device when nobody chose: the first that can. Triton's interpreter is for tests, never a default.
_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


def _check_name(name):
    if name not in BACKENDS:
        choice = ", ".join(BACKENDS)
        raise RuntimeError(
            f"unknown backend {name!r} (from fastadv.backend or FASTADV_BACKEND): choose one of {choice}"
        )


def resolve(name, device_type):
    """The name of the backend that serves `device_type`: `name`, or the best there is where it is None.

    Raises:
        RuntimeError: the name is unknown, or the named backend cannot serve the device.
    """
    if name is None:
        return next(b for b in _ORDER.get(device_type, ("reference",)) if not why_not(b, device_type))
    _check_name(name)
    why = why_not(name, device_type)
    if why:
        raise RuntimeError(f"backend {name!r} cannot serve {device_type} tensors: {why}")
    return name


@functools.cache
def _resolve_device(name, device):
    return resolve(name, device.type)


@torch.compiler.assume_constant_result
def serving(device):
    """The name of the backend in use for the device. A compiled function keeps the one it was traced with."""
    return _resolve_device(_chosen.get(), device)


def run(op_name, backend_name, args):
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
def backend(name):
    """Use the named backend within the `with` block, in this thread or task: `cuda`, `triton`, `cpu`, `reference`.

    It never falls back: an op on a device that the backend cannot serve raises RuntimeError. The environment
    variable FASTADV_BACKEND, read when fastadv is imported, chooses for a whole process.

    Raises:
        RuntimeError: the name is unknown.
    """
    _check_name(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def calls():
    """Kernel calls per backend in this process."""
    counts = {b: module.calls() if (module := native(b)[0]) else 0 for b in ("cuda", "cpu")}
    return {b: {**counts, **_calls}[b] for b in BACKENDS}
