"""The built package: what the wheel holds, which symbols its libraries need, and a build without a compiler.

FASTADV_TEST_WHEEL names a wheel to test instead of one built here (CI builds one with the CUDA kernels).
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The names of PyTorch's stable ABI. Any other symbol of PyTorch may be gone in its next release.
STABLE = re.compile(r"(aoti_torch_|torch_)\w+$")
PYTORCH = re.compile(r"torch|aten|c10|at::")


COMPILER = """#!/bin/sh
case " $* " in *" -c "*) ;; *) exec {compiler} "$@" ;; esac
for object; do :; done  # setup.py names it last, as cpu/library.o and cuda/library.o
kept={folder}/$(basename "$(dirname "$object")")-$(basename "$object")
if [ -e "$kept" ]; then cp "$kept" "$object"; else {compiler} "$@" && cp "$object" "$kept"; fi
"""


def checkout(folder):
    """The checkout as git would clone it, nothing built."""
    source = folder / "source"
    subprocess.run(["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], check=True,
                   stdout=(folder / "files").open("wb"))  # fmt: skip
    source.mkdir()
    tar = f"tar -C {ROOT} --null -T {folder / 'files'} -c | tar -C {source} -x"
    subprocess.run(tar, shell=True, check=True)
    return source


def build_wheel(source, folder, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "-q", source, "--no-build-isolation", "--no-deps", "-w", folder]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return run, list(folder.glob("*.whl"))


def built_wheel(source, folder, **environment):
    run, wheels = build_wheel(source, folder, **environment)
    assert run.returncode == 0, run.stderr[-3000:]
    (path,) = wheels
    return path


@pytest.fixture(scope="session")
def unpacked_sdist(tmp_path_factory):
    """The content of a source distribution, in a folder without the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=checkout(folder), capture_output=True, check=True)
    (path,) = folder.glob("*.tar.gz")
    (folder / "unpacked").mkdir()
    subprocess.run(["tar", "-xzf", path, "-C", folder / "unpacked"], check=True)
    (source,) = (folder / "unpacked").iterdir()
    return source


@pytest.fixture(scope="session")
def cxx(tmp_path_factory):
    """A C++ compiler that makes no object twice, because all builds here have the same sources."""
    folder = tmp_path_factory.mktemp("objects")
    (folder / "c++").write_text(COMPILER.format(compiler=os.environ.get("CXX", "c++"), folder=folder))
    (folder / "c++").chmod(0o755)
    return str(folder / "c++")


@pytest.fixture(scope="session")
def wheel_file(unpacked_sdist, tmp_path_factory, cxx):
    return built_wheel(unpacked_sdist, tmp_path_factory.mktemp("wheel"), CXX=cxx)


@pytest.fixture(scope="session")
def wheel(request, tmp_path_factory):
    given = os.environ.get("FASTADV_TEST_WHEEL")
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(ROOT / given if given else request.getfixturevalue("wheel_file")).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def bare_wheel(tmp_path_factory):
    """The content of a wheel that was built without a compiler and without nvcc."""
    folder = tmp_path_factory.mktemp("bare")
    path = built_wheel(checkout(folder), folder, CXX="/nonexistent/c++", CUDA_HOME="/nonexistent")
    zipfile.ZipFile(path).extractall(folder / "unpacked")
    return folder / "unpacked"


def libraries(wheel):
    found = sorted(wheel.glob("fastadv/*.so"))
    assert found, "the wheel has no native library"
    return found


def build_facts(wheel):
    text = (wheel / "fastadv/_build.py").read_text()
    return ast.literal_eval(text.split("FACTS = ")[1])


def test_libraries_use_the_stable_abi_only(wheel):
    facts = build_facts(wheel)
    assert {p.name.split(".")[0] for p in libraries(wheel)} == {f"_{b}" for b in facts if facts[b]["built"]}
    for path in libraries(wheel):
        nm = subprocess.run(["nm", "-D", "-C", "--undefined-only", path], capture_output=True, text=True, check=True)
        symbols = [line.split(maxsplit=1)[1] for line in nm.stdout.splitlines()]
        of_torch = [s for s in symbols if PYTORCH.search(s)]
        assert "torch_library_impl" in of_torch
        assert [s for s in of_torch if not STABLE.match(s)] == []


def test_libraries_name_no_path_and_find_torch_already_loaded(wheel):
    for path in libraries(wheel):
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
        needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
        assert "libtorch_cpu.so" in needed
        assert ("libtorch_cuda.so" in needed) == path.name.startswith("_cuda.")
        assert not any(name.startswith(("libc10", "libtorch_python", "libcudart")) for name in needed)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "fastadv"], capture_output=True, text=True, check=True)
    modules = {name for name in listed.stdout.split() if name.endswith(".py")}
    packed = {str(p.relative_to(wheel)) for p in wheel.rglob("*.py")}
    assert packed == modules | {"fastadv/_build.py"}
    (metadata,) = wheel.glob("fastadv-*.dist-info/METADATA")
    assert "License-Expression: MIT" in metadata.read_text()
    (license_file,) = wheel.glob("fastadv-*.dist-info/licenses/LICENSE")
    assert license_file.read_text() == (ROOT / "LICENSE").read_text()


def test_without_a_compiler_the_package_installs_and_says_why(bare_wheel):
    assert not list(bare_wheel.glob("fastadv/*.so"))
    facts = build_facts(bare_wheel)
    assert not facts["cpu"]["built"]
    assert "compiler" in facts["cpu"]["why"]
    assert not facts["cuda"]["built"]


def test_without_a_compiler_the_ops_work(bare_wheel):
    code = (
        "import sys\n"  # an editable install would find its own native library
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "import torch, fastadv, json\n"
        "x = torch.rand(2, 3, 5, 5)\n"
        "y = fastadv.fgsm_step(x, torch.ones_like(x), 0.5)\n"
        "fastadv.random_init(x, 0.5)\n"
        "info = fastadv.info()\n"
        "print(json.dumps([fastadv.__file__, info['serves']['cpu'], info['calls'], info['backends']['cpu'],\n"
        "                  bool(((y - x).abs() <= 0.5).all() and y.max() <= 1 and y.max() > x.max())]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(bare_wheel)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    file, serves, calls, cpu, right = json.loads(run.stdout)
    assert file.startswith(str(bare_wheel))
    assert (serves, right) == ("reference", True)
    assert calls["reference"] == 2
    assert not cpu["available"]
    assert "not built" in cpu["why"]
    (told,) = re.findall(r"UserWarning: (.*)", run.stderr)  # once
    assert f"imported from {bare_wheel / 'fastadv'}" in told
    assert "C++ compiler" in told
    assert "40 times slower" in told


def test_a_part_that_was_demanded_and_cannot_be_built_is_an_error(tmp_path):
    run, wheels = build_wheel(checkout(tmp_path), tmp_path, FASTADV_CPU="1", FASTADV_CUDA="0", CXX="/nonexistent/c++")
    assert run.returncode != 0
    assert not wheels
    assert "FASTADV_CPU=1, but no C++ compiler" in run.stdout + run.stderr


def test_an_sdist_is_enough_to_build_the_kernels(wheel_file):
    names = zipfile.ZipFile(wheel_file).namelist()
    assert any(name.startswith("fastadv/_cpu.") and name.endswith(".so") for name in names)


def test_sources_without_those_of_the_kernels_are_refused(tmp_path):
    source = checkout(tmp_path)
    shutil.rmtree(source / "csrc")
    run, wheels = build_wheel(source, tmp_path)
    assert run.returncode != 0
    assert not wheels
    assert "csrc is missing" in run.stdout + run.stderr


# The installed package is the one that runs


@pytest.fixture
def python(tmp_path):
    """The interpreter of an empty environment, with what fastadv needs, but no fastadv."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    # A .pth file puts the folder on the path, but not the editable installs in it.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv/bin/python"


def in_checkout(source, *command):
    ours = ("PYTHON", "PYTEST", "FASTADV")  # the variables of this test run
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment["FASTADV_BENCH_CONTENDERS"] = "fastadv,naive,copy"  # compiling is slow
    return subprocess.run(list(map(str, command)), cwd=source, env=environment, capture_output=True, text=True)


def install(python, *what, **environment):
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--ignore-installed"]
    environment = {**os.environ, **environment}
    subprocess.run([*command, "--no-build-isolation", *what], env=environment, check=True, capture_output=True)


BENCHMARK = ("--benchmark", "-k", "pgd_step-cifar-f32/f32-cpu", "--benchmark-min-rounds=1", "--benchmark-max-time=0")


@pytest.mark.parametrize("editable", [False, True], ids=["installed", "editable"])
def test_in_the_checkout_the_kernels_that_were_built_serve(python, tmp_path, wheel_file, cxx, editable):
    source = checkout(tmp_path)
    install(python, *(("-e", source) if editable else (wheel_file,)), CXX=cxx)
    benchmark = in_checkout(source, python, "-m", "pytest", "-W", "error::UserWarning", *BENCHMARK)
    assert benchmark.returncode == 0, benchmark.stdout + benchmark.stderr
    assert re.search(r"^pgd_step +cifar +f32/f32 +cpu ", benchmark.stdout, re.MULTILINE)
    # Like the command `pytest`, which does not put the present folder on the path.
    pytest_itself = (python, "-c", "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main())")
    tests = in_checkout(source, *pytest_itself, "-W", "error::UserWarning", "tests/ops/test_philox.py", "-k", "cpu")
    assert tests.returncode == 0, tests.stdout
    info = json.loads(in_checkout(tmp_path, python, "-m", "fastadv", "info", "--json").stdout)
    where = source if editable else next((python.parent.parent / "lib").glob("python*/site-packages"))
    assert (info["imported_from"], info["serves"]["cpu"]) == (str(where / "fastadv"), "cpu")


def test_a_source_tree_that_was_not_built_says_so(python, tmp_path, wheel_file):
    """Both where nothing else is installed, and where the source tree hides an installed fastadv."""
    source = checkout(tmp_path)
    code = "import torch, fastadv; x = torch.rand(3); fastadv.fgsm_step(x, x, 0.1); fastadv.random_init(x, 0.1)"
    for installed in (False, True):
        if installed:
            install(python, wheel_file)
        run = in_checkout(source, python, "-c", code)
        assert run.returncode == 0, run.stderr
        (told,) = re.findall(r"UserWarning: (.*)", run.stderr)  # once
        assert f"imported from {source / 'fastadv'}" in told
        assert "40 times slower" in told
        (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
        assert (f"a built one is in {site / 'fastadv'}" if installed else f"pip install -e {source}") in told
