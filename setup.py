"""Builds the native extensions with ninja; `pyproject.toml` has everything else.

The variables FASTADV_CPU and FASTADV_CUDA choose what is built. `auto` (the default): build the kernels if the tools
are there, else skip them and say why. `1`: fail if they cannot be built. `0`: skip them. TORCH_CUDA_ARCH_LIST
("7.5;8.0;9.0;10.0+PTX") and MAX_JOBS work as usual. Without any compiler the package still installs: Triton and the
reference need none.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
CSRC = HERE / "csrc"

# Each operation rounds once: no fused multiply-add, no fast-math. Without traps and errno more loops are vectorised.
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *EXACT]
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-t=2"]
DEFAULT_ARCHS = "7.5;8.0;9.0;10.0+PTX"
# One build runs on every later PyTorch.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]

ISAS = {"base": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}


Found = TypeVar("Found")
Argument = str | Path
Flags = Sequence[Argument]
Facts = dict[str, str]  # facts of a build, for `fastadv info`


class Skip(Exception):
    """A part is not built; the message says why."""


def requested(name: str) -> bool:
    """Whether the variable `name` demands a part (`1`), or allows it (`auto`).

    Raises:
        Skip: the variable is `0`.
        SystemExit: it is something else.
    """
    value = os.environ.get(name, "auto").strip().lower()
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name} must be auto, 0 or 1, got {value!r}")
    if value == "0":
        raise Skip(f"{name}=0")
    return value == "1"


def found_or_skip(what: str, found: Found | None) -> Found:
    """`found`, or the exception Skip where nothing was found."""
    if not found:
        raise Skip(f"no {what} found")
    return found


def torch_facts() -> tuple[ModuleType, Path]:
    try:
        import torch
    except ImportError:
        raise Skip("PyTorch is not there at build time") from None
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise Skip(f"the stable ABI in use needs PyTorch 2.10 or newer, found {torch.__version__}")
    return torch, Path(torch.__file__).parent


def compiler() -> str:
    named = os.environ.get("CXX", "")
    return found_or_skip("C++ compiler (set CXX)", shutil.which(named or "c++") or shutil.which(named or "g++"))


def first_line(*command: Argument) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return found_or_skip("nvcc (set CUDA_HOME)", shutil.which(Path(home, "bin", "nvcc") if home else "nvcc"))


def cuda_version(nvcc_path: str) -> tuple[str, str]:
    """(major, minor)."""
    text = subprocess.run([nvcc_path, "--version"], capture_output=True, text=True).stdout
    found = found_or_skip("release in `nvcc --version`", re.search(r"release (\d+)\.(\d+)", text))
    return found[1], found[2]


def gencode(archs: str) -> list[str]:
    """nvcc's flags for a TORCH_CUDA_ARCH_LIST such as `8.0;9.0a;10.0+PTX`."""
    flags = []
    for arch in re.split(r"[;\s]+", archs.strip()):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if not found:
            sys.exit(f"TORCH_CUDA_ARCH_LIST has {arch!r}; write it like '8.0;9.0;10.0+PTX'")
        number = "".join(found.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def include_flags(torch_dir: Path) -> list[str]:
    import pybind11

    # pybind11's own headers come first: the copy in PyTorch 2.11 refuses code for the stable ABI.
    system = [pybind11.get_include(), torch_dir / "include", sysconfig.get_path("include")]
    return [flag for path in system for flag in ("-isystem", str(path))]


def c_string(value: str) -> str:
    """The value of a macro that is a C string, quoted for a compiler's argument in a ninja file."""
    return "'\"" + value.replace("'", "") + "\"'"


class Ninja:
    """A build file of ninja: a rule to compile, a rule to link, and an edge for each output."""

    def __init__(self) -> None:
        self.lines = ["rule run", "  command = $command", "  depfile = $depfile", "  deps = gcc", ""]
        self.lines += ["rule link", "  command = $command", ""]

    def edge(self, rule: str, output: Path, inputs: Iterable[Path], command: Flags) -> None:
        escape = [str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:") for p in (output, *inputs)]
        self.lines += [f"build {escape[0]}: {rule} {' '.join(escape[1:])}"]
        self.lines += [f"  command = {' '.join(map(str, command)).replace('$', '$$')}"]
        self.lines += [f"  depfile = {output}.d"] if rule == "run" else []

    def compile(self, output: Path, source: Path, compiler: str, flags: Flags) -> Path:
        self.edge("run", output, [source], [compiler, *flags, "-MD", "-MF", f"{output}.d", "-c", source, "-o", output])
        return output

    def run(self, folder: Path) -> None:
        (folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        program: Argument
        try:
            import ninja

            program = Path(ninja.BIN_DIR, "ninja")
        except ImportError:
            program = found_or_skip("ninja", shutil.which("ninja"))
        subprocess.run([program, "-C", folder, *jobs], check=True)


def bindings(build: Ninja, folder: Path, backend: str, cxx: str, flags: Flags) -> Path:
    flags = [*flags, f"-DFASTADV_BACKEND={backend}", f"-DFASTADV_KEY={backend.upper()}"]
    return build.compile(folder / "library.o", CSRC / "library.cpp", cxx, flags)


def link(
    build: Ninja,
    target: Path,
    objects: Sequence[Path],
    linker: Flags,
    torch_dir: Path,
    extra: Flags = (),
    after: Sequence[Path] = (),
) -> None:
    # No rpath is needed: torch is imported first, and loads its libraries.
    command = [*linker, "-shared", "-o", target, *objects, f"-L{torch_dir / 'lib'}", "-ltorch_cpu", *extra]
    build.edge("link", target, [*objects, *after], command)


def add_cpu(build: Ninja, folder: Path, target: Path, forced: bool) -> Facts:
    cxx = compiler()
    torch_dir = torch_facts()[1]
    flags = [*CXX_FLAGS, *STABLE_ABI, *include_flags(torch_dir)]
    facts = [
        f"-DFASTADV_COMPILER={c_string(first_line(cxx, '--version'))}",
        f"-DFASTADV_FLAGS={c_string(' '.join(CXX_FLAGS))}",
    ]
    objects = [bindings(build, folder, "cpu", cxx, flags)]
    objects += [build.compile(folder / "ops.o", CSRC / "cpu/ops.cpp", cxx, flags)]
    objects += [build.compile(folder / "isa.o", CSRC / "cpu/isa.cpp", cxx, [*flags, *facts])]
    x86 = sysconfig.get_platform().endswith("x86_64")
    for isa, march in ISAS.items() if x86 else [("base", [])]:
        args = [*CXX_FLAGS, *march, f"-DFASTADV_ISA={isa}"]
        objects.append(build.compile(folder / f"kernels_{isa}.o", CSRC / "cpu/kernels.cpp", cxx, args))
    link(build, target, objects, [cxx], torch_dir)
    return {"compiler": first_line(cxx, "--version")}


def torch_cuda_stub(build: Ninja, folder: Path, cxx: str, torch_dir: Path) -> list[Path]:
    """An empty libtorch_cuda to link with where PyTorch has no CUDA. At run time the real one provides the stream."""
    if (torch_dir / "lib/libtorch_cuda.so").exists():
        return []
    stub, source = folder / "stub/libtorch_cuda.so", folder / "stub/empty.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("")
    build.edge("link", stub, [source], [cxx, "-shared", "-Wl,-soname,libtorch_cuda.so", source, "-o", stub])
    return [stub]


def add_cuda(build: Ninja, folder: Path, target: Path, forced: bool) -> Facts:
    torch, torch_dir = torch_facts()
    if torch.version.cuda is None and not forced:
        raise Skip("this PyTorch has no CUDA (FASTADV_CUDA=1 builds it all the same)")
    cxx, cuda = compiler(), nvcc()
    version = cuda_version(cuda)
    if torch.version.cuda is not None and torch.version.cuda.split(".")[0] != version[0]:
        raise Skip(f"nvcc is CUDA {'.'.join(version)}, PyTorch has {torch.version.cuda}: their majors must agree")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    flags = [*CXX_FLAGS, *STABLE_ABI, *include_flags(torch_dir), "-DFASTADV_CUDA", "-DUSE_CUDA"]
    facts = [f"-DFASTADV_NVCC={c_string('.'.join(version))}", f"-DFASTADV_ARCHS={c_string(archs)}"]
    objects = [bindings(build, folder, "cuda", cxx, flags)]
    objects += [build.compile(folder / "facts.o", CSRC / "cuda/facts.cpp", cxx, [*flags, *facts])]
    objects += [build.compile(folder / "ops.o", CSRC / "cuda/ops.cu", cuda, [*NVCC_FLAGS, *gencode(archs)])]
    stub = torch_cuda_stub(build, folder, cxx, torch_dir)
    extra = ["-Xlinker=--no-as-needed", f"-L{folder / 'stub'}", "-ltorch_cuda"]
    link(build, target, objects, [cuda, "-cudart=static"], torch_dir, extra, after=stub)
    return {"nvcc": ".".join(version), "archs": archs}


PARTS: dict[str, Callable[[Ninja, Path, Path, bool], Facts]] = {"cpu": add_cpu, "cuda": add_cuda}


class BuildNative(build_ext):
    def run(self) -> None:
        if not CSRC.is_dir():
            sys.exit(f"{CSRC} is missing: the sources are incomplete, and the package would have no kernels")
        self.facts: dict[str, dict[str, object]] = {}
        super().run()
        package = HERE if self.inplace or self.editable_mode else Path(self.build_lib)
        path = package / "fastadv" / "_build.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        doc = '"""Written by setup.py: what was built, and why the rest was not."""'
        path.write_text(f"{doc}\n\nFACTS = {self.facts!r}\n")

    def build_extension(self, ext: Extension) -> None:
        backend = ext.name.rsplit("_", 1)[1]
        variable = f"FASTADV_{backend.upper()}"
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        folder = (Path(self.build_temp) / backend).absolute()
        try:
            forced = requested(variable)
            try:
                build = Ninja()
                folder.mkdir(parents=True, exist_ok=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                facts = PARTS[backend](build, folder, target, forced)
                build.run(folder)
            except Skip as why:
                if forced:
                    sys.exit(f"{variable}=1, but {why}")
                raise
            except subprocess.CalledProcessError:
                if forced:
                    raise
                raise Skip("it does not compile here: see the build's output") from None
        except Skip as why:
            target.unlink(missing_ok=True)  # an earlier build may have left it
            self.facts[backend] = {"built": False, "why": str(why)}
            print(f"fastadv: the {backend} kernels are not built: {why}", file=sys.stderr)
            return
        self.facts[backend] = {"built": True, **facts}


if __name__ == "__main__":  # benchmarks/gpu/sass.py reads the flags
    setup(
        ext_modules=[Extension(f"fastadv._{backend}", [], optional=True) for backend in PARTS],
        cmdclass={"build_ext": BuildNative},
    )
