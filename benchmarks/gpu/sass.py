"""What the compilers made of the GPU kernels, read from the machine code: no GPU, no clock.

    python benchmarks/gpu/sass.py [--arch 90] [--kernels REGEX] [--source csrc/cuda/ops.cu]

Counted is the path of a thread that has all its elements: through the blocks that load and store whole packs, the
cheapest such path, each loop once, both sides of a predicate. An instruction that is predicated off takes its issue
slot all the same.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from report import aligned  # noqa: E402

from setup import NVCC_FLAGS, gencode, nvcc  # noqa: E402


@dataclass(frozen=True)
class Chip:
    """Vendor data sheets; the clock is one that the chip holds under load, where it is below the boost clock."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    shared: int  # bytes an SM

    def issue_share(self, instructions, moved):
        """Share of the issue slots: four schedulers an SM, each issues one instruction for 32 threads a clock."""
        return self.bandwidth / moved * instructions / (self.multiprocessors * 4 * 32 * self.clock)


CHIPS = {
    80: Chip("A100 SXM 80 GB", 108, 1.41e9, 2.039e12, 164 << 10),
    90: Chip("H100 SXM", 132, 1.755e9, 3.35e12, 228 << 10),
    100: Chip("B200", 148, 1.85e9, 8.0e12, 228 << 10),
}


# ------------------------------------------------------------------ listing


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str = ""
    predicate: str = ""

    @property
    def name(self):
        return self.opcode.split(".")[0]

    @property
    def bytes(self):
        """Bytes that a thread's access moves."""
        found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", self.opcode)
        return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4

    @property
    def loaded(self):
        return self.bytes if self.name == "LDG" else 0

    @property
    def stored(self):
        return self.bytes if self.name == "STG" else 0

    @property
    def targets(self):
        return re.findall(r"[.$]\w+", self.operands) if self.name in ("BRA", "BRX") else []

    @property
    def ends(self):
        """Whether nothing goes on behind it. A branch that asks for a predicate may have it among its operands."""
        if self.predicate or self.name not in ("BRA", "BRX", "EXIT", "RET"):
            return False
        return self.name != "BRA" or re.fullmatch(r"`\(\S+\)", self.operands) is not None


LABEL = re.compile(r"([.$\w]+):")
LINE = re.compile(r"\s*(?:/\*[0-9a-f]{4,}\*/)\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


@dataclass
class Block:
    instructions: list
    successors: list

    def __len__(self):
        return len(self.instructions)

    @property
    def last(self):
        return self.instructions[-1] if self.instructions else Instruction("NOP")

    @property
    def loaded(self):
        return sum(i.loaded for i in self.instructions)

    @property
    def stored(self):
        return sum(i.stored for i in self.instructions)


def functions(listing):
    """name -> lines, of an nvdisasm listing."""
    found = {}
    for line in listing.splitlines():
        if line.startswith("\t.section"):
            section = re.match(r"\t\.section\t\.text\.([^,]+),", line)
            lines = found.setdefault(section[1], []) if section else []
        elif found:
            lines.append(line)
    return found


def blocks(lines):
    """The basic blocks of a function, the entry first."""
    made, at = [Block([], [])], {}
    for line in lines:
        if label := LABEL.match(line):
            if made[-1].instructions:
                made.append(Block([], []))
            at[label[1]] = len(made) - 1
        elif found := LINE.match(line):
            made[-1].instructions.append(Instruction(found[2], found[3], found[1] or ""))
            if made[-1].last.name in ("BRA", "BRX", "EXIT", "RET"):
                made.append(Block([], []))
    for i, block in enumerate(made):
        onward = [i + 1] if not block.last.ends and i + 1 < len(made) else []
        block.successors = onward + [at[t] for t in block.last.targets]
    return made


# ------------------------------------------------------------------ path


def in_order(made):
    """The blocks that are reached, each before its successors but for those that close a loop."""
    seen, done, open_ = {0}, [], [(0, iter(made[0].successors))]
    while open_:
        block, rest = open_[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            done.append(block)
            open_.pop()
        else:
            seen.add(following)
            open_.append((following, iter(made[following].successors)))
    return done[::-1]


def ways_through(made, loaded, choose=min):
    """Bytes stored -> the blocks of the shortest (choose=max: longest) way that stores them and loads so many at least.

    A way goes through each loop once, to the exit; where a loop is left at its head alone, to the loop's end.
    """
    order = in_order(made)
    place = {block: i for i, block in enumerate(order)}
    # block -> (bytes stored, loaded) on the way to it -> (instructions, the way: its last block and the way before)
    ways, exits, repeats = {block: {} for block in order}, {}, {}
    ways[0][0, 0] = 0, None
    for number in order:
        block = made[number]
        onward = [ways[s] for s in block.successors if place[s] > place[number]]
        onward += [repeats] if len(onward) < len(block.successors) else []
        onward += [exits] if block.last.name in ("EXIT", "RET") else []
        for state, (count, way) in ways[number].items():
            moved = state[0] + block.stored, min(state[1] + block.loaded, loaded)
            for known in onward:
                longer = count + len(block), (number, way)
                known[moved] = choose(known.get(moved, longer), longer, key=lambda w: w[0])
    return {stored: unrolled(way) for (stored, l), (_, way) in (repeats | exits).items() if l == loaded}


def unrolled(way):
    found = []
    while way:
        block, way = way
        found.append(block)
    return found[::-1]


def loop_around(made, way):
    """The part of the way that the innermost loop around its last store repeats; all of it where there is none."""
    last = max(i for i, block in enumerate(way) if made[block].stored)
    loops = [
        way[first : i + 1]
        for i in range(last, len(way))
        for s in made[way[i]].successors
        if s in way[: last + 1] and (first := way.index(s)) <= last
    ]
    return min(loops, key=len, default=way)


# ------------------------------------------------------------------ kernels

SIZES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "u8": 1}
TYPES = {"double": "f64", "float": "f32", "fastadv::Half": "f16", "fastadv::BFloat16": "bf16", "unsigned char": "u8"}
KINDS = ("random_init", "fgsm_step", "fgsm_step noise", "pgd_step")  # enum class Kind
GROUP = 8  # elements that a thread of any_kernel takes, one by one


@dataclass(frozen=True)
class Case:
    """A kernel: what it is for, and so the bytes it must move."""

    op: str
    layout: str  # flat or any
    x: str
    grad: str = ""
    z: bool = False

    @property
    def name(self):
        types = f"{self.x}/{self.grad}" if self.grad else self.x
        return " ".join([self.op, *(["any"] if self.layout == "any" else []), types, *(["z"] if self.z else [])])

    @property
    def result(self):
        return "f32" if self.x == "u8" else self.x

    @property
    def loaded(self):
        """Bytes an element."""
        x0 = SIZES[self.result] if self.op == "pgd_step" else 0
        return SIZES[self.x] + x0 + (SIZES[self.grad] if self.grad else 0)

    @property
    def stored(self):
        """Bytes an element; z as the result's type."""
        return SIZES[self.result] * (2 if self.z else 1)


def native_case(signature):
    """The case of a demangled kernel name; None for those that are no step."""
    found = re.match(r"void fastadv::(flat|any)_kernel<\(fastadv::Kind\)(\d), (.*)>\(", signature)
    if not found:
        return None
    layout, kind, rest = found[1], KINDS[int(found[2])], found[3].split(", ")
    free = " free" if layout == "flat" and rest[0] == "false" and kind.startswith("fgsm") else ""
    types = [TYPES[t] for t in rest if t in TYPES]
    grad = "" if kind == "random_init" else types[-1]  # any_kernel: as the rest
    return Case(kind + free, layout, types[0], grad, "WithZ" in found[3])


def fused(instruction):
    """A multiply-add that rounds once. With a factor of zero it is a move, which some units do that way."""
    factors = instruction.operands.split(", ")[1:3]
    return instruction.name in ("FFMA", "DFMA", "HFMA2", "FFMA2") and not any(f.lstrip("-") == "RZ" for f in factors)


def hot_path(made, case, choose=min):
    """(elements a thread, blocks) of the way that takes whole packs; an element at a time for any_kernel.

    There, stores of several types may stand under predicates side by side: no more of them than need be.
    """
    if case.layout == "any":
        ways = ways_through(made, case.loaded, choose)
        return 1, ways[min(stored for stored in ways if stored >= case.stored)]
    for elements in (32, 16, 8, 4):
        ways = ways_through(made, elements * case.loaded, choose)
        if elements * case.stored in ways:
            return elements, ways[elements * case.stored]
    raise ValueError(f"{case.name}: no way through it stores {case.stored} and loads {case.loaded} bytes an element")


# Instructions by what limits them; "slow" run at a quarter rate or less, "half" at half on sm_80 and sm_90 (Nsight
# Compute's manual: pipe ALU), "wide" are 64-bit multiplications.
MIX = {
    "half": re.compile(
        r"LOP3|IADD3|SHF|FMNMX|FSETP|FSEL|SEL|ISETP|PLOP3|PRMT|LEA|VIADD|VIMNMX|F2FP|I2FP|IABS|SGXT|BMSK"
    ),
    "slow": re.compile(r"F2F\b|I2F\b|F2I|MUFU|FRND|D(ADD|MUL|FMA|SETP)|POPC|FLO|BREV|S2U?R"),
    "wide": re.compile(r"IMAD\.(WIDE|HI)"),
}


def analyse(lines, case, arch):
    made = blocks(lines)
    elements, way = hot_path(made, case)
    walked = [i for block in way for i in made[block].instructions]
    repeated = sum(len(made[block]) for block in loop_around(made, way)) if case.layout == "any" else 0
    each = repeated + (len(walked) - repeated) / GROUP if repeated else len(walked) / elements
    accesses = Counter(f"{i.name}.{8 * i.bytes}" for i in walked if i.name in ("LDG", "STG"))
    everything = [i for block in made for i in block.instructions]
    return {
        "kernel": case.name,
        "arch": f"sm_{arch}",
        "elements": elements,
        "instructions": len(walked),
        "most": sum(len(made[block]) for block in hot_path(made, case, max)[1]),
        "per_element": round(each, 2),
        "issue_share": round(CHIPS[arch].issue_share(each, case.loaded + case.stored), 3),
        **{name: sum(bool(kind.match(i.opcode)) for i in walked) for name, kind in MIX.items()},
        "calls": sum(i.name == "CALL" for i in walked),
        "accesses": dict(sorted(accesses.items())),
        "local": sum(i.name in ("LDL", "STL") for i in everything),
        "fused": sum(map(fused, everything)),
        "code": len(everything),
    }


# ------------------------------------------------------------------ compiling


def tool(name):
    """A program of the CUDA toolkit, or of the Triton package, which has some of them."""
    if found := shutil.which(name):
        return found
    import triton

    return getattr(triton.knobs.nvidia, name).path


def output(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def registers_of(cubin):
    """name -> registers and bytes of shared memory."""
    text = output(tool("cuobjdump"), "-res-usage", cubin)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {name: {"registers": int(r), "stack": int(s), "shared": int(m)} for name, r, s, m in found}


def native(arch, source, wanted):
    """The rows of the CUDA kernels."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "ops.cubin")
        output(nvcc(), *NVCC_FLAGS, *gencode(f"{arch // 10}.{arch % 10}"), "-cubin", source, "-o", cubin)
        resources, code = registers_of(cubin), functions(output(tool("nvdisasm"), "-c", cubin))
    names = output("c++filt", *code).splitlines()
    cases = {name: case for name, signature in zip(code, names, strict=True) if (case := native_case(signature))}
    for name, case in sorted(cases.items(), key=lambda c: c[1].name):
        if wanted.search(case.name):
            yield analyse(code[name], case, arch) | resources[name]


# ------------------------------------------------------------------ tables

COLUMNS = (
    "kernel",
    "arch",
    "elements",
    "instructions",
    "most",
    "per_element",
    "issue_share",
    *MIX,
    "registers",
    "stack",
    "fused",
    "calls",
    "code",
    "accesses",
)


def cell(value):
    return " ".join(f"{n}x{k}" for k, n in value.items()) if isinstance(value, dict) else str(value)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, choices=CHIPS, action="append", help="80, 90, 100 (default: 90)")
    parser.add_argument("--kernels", type=re.compile, default=re.compile(""), metavar="REGEX", help="those alone")
    parser.add_argument("--source", type=Path, default=ROOT / "csrc/cuda/ops.cu", help="instead of csrc/cuda/ops.cu")
    args = parser.parse_args(argv)
    rows = [row for arch in args.arch or [90] for row in native(arch, args.source, args.kernels)]
    print("\n".join(aligned(COLUMNS, [tuple(cell(row[c]) for c in COLUMNS) for row in rows])))


if __name__ == "__main__":
    main()
