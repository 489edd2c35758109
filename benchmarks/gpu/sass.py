"""Counts what the GPU kernels cost, in their machine code. It needs no GPU, and measures no time.

    python benchmarks/gpu/sass.py [--arch 90] [--backend cuda] [--kernels REGEX] [--source csrc/cuda/ops.cu]
    python benchmarks/gpu/sass.py --record     # all kernels, into results/sass.json
    python benchmarks/gpu/sass.py --page       # the main kernels of results/sass.json, one column per architecture

It needs nvcc for the CUDA kernels, and nvdisasm and cuobjdump from the CUDA toolkit or from the Triton package.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import environment  # noqa: E402
import machine_code  # noqa: E402
from report import aligned, markdown_table  # noqa: E402

from setup import NVCC_FLAGS, cuda_version, gencode, nvcc  # noqa: E402

SOURCE = ROOT / "csrc/cuda/ops.cu"
RECORD = ROOT / "benchmarks/results/sass.json"


# ------------------------------------------------------------------ chips


@dataclass(frozen=True)
class Chip:
    """A GPU by its data sheet, but the clock is what it holds under load (boost clock of H100 and B200: 1.98 GHz)."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    shared: int  # bytes per SM

    def issue_share(self, instructions, moved):
        """The share of the issue slots that is taken at full bandwidth.

        An SM has four schedulers; each of them issues one instruction for 32 threads per clock.
        """
        return self.bandwidth / moved * instructions / (self.multiprocessors * 4 * 32 * self.clock)

    def resident(self, threads, registers, shared):
        """The threads that an SM holds at once, in blocks of `threads`, by the limits in the CUDA programming guide."""
        warps = 4 * (16384 // (32 * -(-registers // 8) * 8))
        return threads * min(32 * warps // threads, 2048 // threads, 32, self.shared // (shared + 1024))


CHIPS = {
    80: Chip("A100 SXM 80 GB", 108, 1.41e9, 2.039e12, 164 << 10),
    90: Chip("H100 SXM", 132, 1.755e9, 3.35e12, 228 << 10),
    100: Chip("B200", 148, 1.85e9, 8.0e12, 228 << 10),
}


# ------------------------------------------------------------------ kernels

SIZES = {"": 0, "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "u8": 1}
TYPES = {"double": "f64", "float": "f32", "fastadv::Half": "f16", "fastadv::BFloat16": "bf16", "unsigned char": "u8"}
KINDS = ("random_init", "fgsm_step", "fgsm_step noise", "pgd_step")  # enum class Kind
GROUP, THREADS = 8, 128  # kGroup, kThreads


@dataclass(frozen=True)
class Case:
    """What a kernel computes; this gives the bytes that it must move."""

    op: str
    layout: str  # flat or any
    x: str
    grad: str
    z: str  # type of the model's next input

    @property
    def name(self):
        types = f"{self.x}/{self.grad}" if self.grad else self.x
        return " ".join([self.op, *["any"] * (self.layout == "any"), types, *[f"z {self.z}"] * bool(self.z)])

    @property
    def result(self):
        return "f32" if self.x == "u8" else self.x

    @property
    def loaded(self):
        """Bytes per element."""
        return SIZES[self.x] + SIZES[self.grad] + (SIZES[self.result] if self.op == "pgd_step" else 0)

    @property
    def stored(self):
        return SIZES[self.result] + SIZES[self.z]


def native_case(signature):
    """The case of a demangled name; None for a kernel that is no step. z may have any type; here it is the result's."""
    found = re.match(r"void fastadv::(vectorised|strided)_kernel<\(fastadv::Kind\)(\d), (.*)>\(", signature)
    if not found:
        return None
    layout = {"vectorised": "flat", "strided": "any"}[found[1]]
    op, rest = KINDS[int(found[2])], found[3].split(", ")
    free = " free" if layout == "flat" and rest[0] == "false" and op.startswith("fgsm") else ""
    types = [TYPES[t] for t in rest if t in TYPES]
    plain = Case(op + free, layout, types[0], "" if op == "random_init" else types[-1], "")
    return Case(plain.op, layout, plain.x, plain.grad, plain.result) if "WithZ" in found[3] else plain


def whole_packs(made, case, choose=min):
    """(elements, blocks) of the path of a thread that has all its elements; where it has a seed, it loads the seed."""
    seed = 8 if case.op.startswith(("random_init", "fgsm_step noise")) else 0
    for elements in (8, 16, 32, 4):
        way = machine_code.ways_through(made, elements * case.loaded + seed, choose).get(elements * case.stored)
        if way:
            return elements, way
    raise ValueError(f"{case.name}: no way through it stores {case.stored} and loads {case.loaded} bytes an element")


def one_by_one(made, case, choose=min):
    """The same for a loop over a thread's elements, which may have stores of several types, under predicates."""
    ways = machine_code.ways_through(made, case.loaded, choose)
    return 1, ways[min(stored for stored in ways if stored >= case.stored)]


def analyse(lines, case, arch, threads, resources, loop=False):
    """The row of results of a kernel."""
    made = machine_code.blocks(lines)
    find = one_by_one if loop else whole_packs
    elements, way = find(made, case)
    walked = [i for block in way for i in made[block].instructions]
    cost = machine_code.cost(made, way)
    each = cost / elements
    if loop:
        repeated = machine_code.cost(made, machine_code.loop_around(made, way))
        each = repeated + (cost - repeated) / GROUP
    everything = [i for block in made for i in block.instructions]
    chip, in_flight = CHIPS[arch], machine_code.in_flight(walked)
    resident = chip.resident(threads, resources["registers"], resources["shared"])
    return {
        "kernel": case.name,
        "arch": f"sm_{arch}",
        **asdict(case),
        "elements": elements,
        "instructions": cost,
        "most": machine_code.cost(made, find(made, case, max)[1]),
        "per_element": round(each, 2),
        "issue_share": round(chip.issue_share(each, case.loaded + case.stored), 3),
        **machine_code.mix(walked),
        "calls": sum(i.called is not None for i in walked),
        "accesses": machine_code.accesses(walked),
        **resources,
        "local": sum(i.name in ("LDL", "STL") for i in everything),
        "fused": sum(i.fused for i in everything),
        "threads": resident,
        "in_flight": resident * in_flight,
        "code": len(everything),
    }


# ------------------------------------------------------------------ compiling


def tool(name):
    """The path of a program of the CUDA toolkit; the Triton package has some of them, too."""
    if found := shutil.which(name):
        return found
    import triton

    return getattr(triton.knobs.nvidia, name).path


def output(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def last_line(program):
    """The last line that a program prints about its version."""
    return output(program, "--version").split("\n")[-2]


def disassembled(cubin):
    """{name: (lines, resources)} of the kernels in a file."""
    text = output(tool("cuobjdump"), "-res-usage", cubin)
    used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    code = machine_code.functions(output(tool("nvdisasm"), "-c", cubin))
    return {name: (code[name], {"registers": int(r), "stack": int(s), "shared": int(m)}) for name, r, s, m in used}


def cuda(arch, wanted, source=SOURCE):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "ops.cubin")
        output(nvcc(), *NVCC_FLAGS, *gencode(f"{arch // 10}.{arch % 10}"), "-cubin", source, "-o", cubin)
        kernels = disassembled(cubin)
    signatures = output("c++filt", *kernels).splitlines()
    for signature, (lines, resources) in zip(signatures, kernels.values(), strict=True):
        case = native_case(signature)
        if case and wanted.search(case.name):
            yield analyse(lines, case, arch, THREADS, resources, loop=case.layout == "any")


def triton_row(facts, kernel, arch):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        ((lines, resources),) = disassembled(cubin.name).values()
    resources["shared"] = kernel.metadata.shared
    return analyse(lines, Case(*facts), arch, 32 * kernel.metadata.num_warps, resources)


def triton(arch, wanted):
    import triton_aot

    # The disassembler takes 0.4 s to start, as long as a kernel takes to compile.
    with ThreadPoolExecutor() as pool:
        launches = triton_aot.compiled(arch, lambda facts: wanted.search(Case(*facts).name))
        rows = [pool.submit(triton_row, facts, kernel, arch) for facts, kernel in launches]
    return [row.result() for row in rows]


def collect(backends, archs, wanted, source=SOURCE):
    """The rows. Each backend has one thread, not one per architecture, because all threads share Triton's driver."""
    makers = {"cuda": lambda arch: cuda(arch, wanted, source), "triton": lambda arch: triton(arch, wanted)}

    def rows(backend):
        return [{"backend": backend, **row} for arch in archs for row in makers[backend](arch)]

    with ThreadPoolExecutor() as pool:
        found = [row for some in pool.map(rows, backends) for row in some]
    return sorted(found, key=lambda row: (row["backend"], row["layout"], row["z"] != "", row["kernel"]))


# ------------------------------------------------------------------ results


def document(rows):
    """The rows, with the machine and the programs that made them."""
    facts = {**environment.facts(), "nvcc": ".".join(cuda_version(nvcc())), "nvdisasm": last_line(tool("nvdisasm"))}
    facts["ptxas_of_triton"] = last_line(tool("ptxas"))
    return {"part": "sass", "ok": True, "environment": facts, "columns": list(rows[0]), "rows": rows}


def save(path, result):
    """Write a file with one line per row."""
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(list(row.values())) for row in result["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


def read(path):
    result = json.loads(Path(path).read_text())
    return {**result, "rows": [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]}


COLUMNS = (
    "backend", "kernel", "arch", "elements", "instructions", "most", "per_element", "issue_share", "half", "slow",
    "wide", "registers", "stack", "shared", "threads", "in_flight", "local", "fused", "calls", "code", "accesses",
)  # fmt: skip


def cell(value):
    return " ".join(f"{n}x{k}" for k, n in value.items()) if isinstance(value, dict) else str(value)


def table(rows):
    return "\n".join(aligned(COLUMNS, [tuple(cell(row[c]) for c in COLUMNS) for row in rows]))


MAIN = re.compile(
    r"(?!.* (any|free) )\S+( noise)? (f32|f16|bf16|u8|f32/f32|f32/bf16|f16/f16|bf16/bf16|u8/f32)( z f32)?$"
)

PAGE_HEAD = """# Machine code of the GPU kernels

Counts from the machine code of the kernels, by `benchmarks/gpu/sass.py --record`. It uses no GPU and measures no time:
the counts say what the code asks for, not how fast it is.

- **Instructions per element**: all that a thread issues from the entry to the exit when it has all its elements. Each
  loop counts once; predicated-off instructions and called routines count. Branches may depend on the values (small
  float16 numbers) or on the layout (channels): then the shortest and the longest such path are given.
- **Registers** per thread.
- **Issue slots**: the share of the chip's slots that is taken when the tensors move at its full bandwidth. From 100 %
  on the kernel is bound by its instructions, not by memory.
{chips}
- **In flight**: the bytes that the threads of an SM have requested before the first of them waits, on sm_90.

`benchmarks/results/sass.json` also has the `free` kernels (no projection), other types, `any` layouts, access widths,
occupancy and the mix of instructions. No kernel spills, and none fuses a multiply with an add:
`tests/benchmarks/test_machine_code.py` tests this.

{made}

"""


def measured(row):
    shortest, longest = f"{row['per_element']:.1f}", f"{row['most'] / row['elements']:.1f}"
    each = shortest if longest == shortest else f"{shortest} to {longest}"
    return f"{each}; {row['registers']}; {row['issue_share']:.0%}"


def page(result):
    """A Markdown page of the main kernels, with one column per architecture."""
    groups = {}
    for row in result["rows"]:
        if MAIN.match(row["kernel"]):
            groups.setdefault((row["kernel"], row["backend"]), {})[row["arch"]] = row
    header = ["kernel", "backend", *(f"sm_{arch}" for arch in CHIPS), "in flight, KB"]
    rows = [
        [*names, *(measured(of[f"sm_{arch}"]) for arch in CHIPS), f"{of['sm_90']['in_flight'] / 1024:.0f}"]
        for names, of in sorted(groups.items())
    ]
    chips = "\n".join(
        f"  - sm_{arch}: {c.name}, {c.multiprocessors} SMs, {c.bandwidth / 1e12:.2f} TB/s, {c.clock / 1e9:.2f} GHz"
        for arch, c in CHIPS.items()
    )
    facts = result["environment"]
    made = (
        f"nvcc {facts['nvcc']}, Triton {facts['triton']}, {facts['date'][:10]}. Cells: instructions; registers; slots."
    )
    return PAGE_HEAD.format(chips=chips, made=made) + "\n".join(markdown_table(header, rows)) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, choices=CHIPS, action="append", help="one or more; default: 90")
    parser.add_argument("--backend", choices=("cuda", "triton"), action="append", help="one or more; default: cuda")
    parser.add_argument("--kernels", type=re.compile, default=re.compile(""), metavar="REGEX", help="which kernels")
    parser.add_argument("--source", type=Path, default=SOURCE, help="instead of csrc/cuda/ops.cu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there instead of a table")
    parser.add_argument("--record", action="store_true", help="all kernels, into benchmarks/results")
    parser.add_argument("--page", action="store_true", help="print a page of the stored results")
    args = parser.parse_args(argv)
    if args.record:
        save(RECORD, document(collect(("cuda", "triton"), CHIPS, args.kernels)))
        return
    if args.page:
        print(page(read(RECORD)), end="")
        return
    rows = collect(args.backend or ["cuda"], args.arch or [90], args.kernels, args.source)
    if args.json:
        save(args.json, document(rows))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
