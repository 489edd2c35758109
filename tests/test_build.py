"""The package as it is built: what is in the wheel, what its libraries ask of others, and building without tools.

FASTADV_TEST_WHEEL names a wheel to look at instead of one built here (CI builds one with the CUDA kernels).
"""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# PyTorch's stable ABI, and Python's own. Anything else of PyTorch's would break at its next release.
STABLE = re.compile(r"(aoti_torch_|torch_)\w+$")
PYTORCH = re.compile(r"torch|aten|c10|at::")


def build_wheel(folder, **environment):
    source = folder / "source"
    subprocess.run(["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], check=True,
                   stdout=(folder / "files").open("wb"))  # fmt: skip
    source.mkdir()
    tar = f"tar -C {ROOT} --null -T {folder / 'files'} -c | tar -C {source} -x"
    subprocess.run(tar, shell=True, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", source, "--no-build-isolation", "--no-deps", "-w", folder]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return run, list(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    given = os.environ.get("FASTADV_TEST_WHEEL")
    folder = tmp_path_factory.mktemp("wheel")
    if given:
        path = ROOT / given
    else:
        run, wheels = build_wheel(folder)
        assert run.returncode == 0, run.stderr[-3000:]
        (path,) = wheels
    zipfile.ZipFile(path).extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="session")
def bare_wheel(tmp_path_factory):
    """Built where there is no compiler and no nvcc."""
    folder = tmp_path_factory.mktemp("bare")
    run, wheels = build_wheel(folder, CXX="/nonexistent/c++", CUDA_HOME="/nonexistent")
    assert run.returncode == 0, run.stderr[-3000:]
    (path,) = wheels
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
    assert calls["reference"] == 1
    assert not cpu["available"]
    assert "not built" in cpu["why"]


def test_a_part_that_was_demanded_and_cannot_be_built_is_an_error(tmp_path):
    run, wheels = build_wheel(tmp_path, FASTADV_CPU="1", FASTADV_CUDA="0", CXX="/nonexistent/c++")
    assert run.returncode != 0
    assert not wheels
    assert "FASTADV_CPU=1, but no C++ compiler" in run.stdout + run.stderr
