"""Reads nvdisasm's listings: basic blocks, the paths ("ways") through them, and the cost of a path.

The path is that of a thread that has all its elements. It runs each loop once. Both sides of a predicate count, because
an instruction that is predicated off takes its issue slot all the same.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
JUMPS = ("BRA", "BRX", "EXIT", "RET", "CALL")

# Instructions by their cost. half: the ALU pipe of sm_80 and sm_90, which has half rate by Nsight Compute's manual;
# slow: a quarter of the rate or less; wide: multiplications with a product of 64 bits.
MIX = {
    "half": re.compile(r"U?LOP3|U?IADD3|U?SHF|[FIV]+MNMX|FSETP|F?SEL|ISETP|PLOP3|PRMT|LEA|VIADD|F2FP|I2FP|SGXT|BMSK"),
    "slow": re.compile(r"F2F\b|I2F\b|F2I|MUFU|FRND|D(ADD|MUL|FMA|SETP)|POPC|FLO|BREV|S2U?R"),
    "wide": re.compile(r"IMAD\.(WIDE|HI)"),
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
        """The bytes that an access to memory moves."""
        return next((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), 4)

    @property
    def loaded(self):
        return self.bytes if self.name == "LDG" else 0

    @property
    def stored(self):
        return self.bytes if self.name == "STG" else 0

    @property
    def registers(self):
        """The numbers of the registers that it names; of a pair or more, the first one."""
        return {int(n) for n in re.findall(r"\bR(\d+)\b", self.operands)}

    @property
    def result(self):
        """The numbers of the registers that a load fills."""
        first = int(re.match(r"R(\d+)", self.operands)[1])
        return set(range(first, first + -(-self.bytes // 4)))

    @property
    def targets(self):
        """The labels that it may jump to. A call to a label is a jump, so that threads meet; a $function returns."""
        return re.findall(r"\.L\w+", self.operands) if self.name in JUMPS else []

    @property
    def called(self):
        found = re.search(r"\$[\w$]+", self.operands) if self.name == "CALL" else None
        return found and found[0]

    @property
    def ends(self):
        """Whether it never goes on to the next instruction. A branch may have its predicate among its operands."""
        if self.predicate or self.name not in JUMPS or self.name == "CALL":
            return False
        return self.name != "BRA" or self.operands.startswith("`")

    @property
    def fused(self):
        """Whether it is a multiply-add that rounds once. With a factor of zero it is a move, as some units do it."""
        factors = self.operands.split(", ")[1:3]
        return self.name in ("FFMA", "FFMA2", "DFMA", "HFMA2") and not any(f.lstrip("-") == "RZ" for f in factors)


@dataclass
class Block:
    instructions: list = field(default_factory=list)
    successors: list = field(default_factory=list)
    cost: int = 0  # instructions, with those of the functions that it calls

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
    """{name of a function: its lines} in the output of `nvdisasm -c`."""
    found, lines = {}, []
    for line in listing.splitlines():
        if line.startswith("\t.section\t"):
            section = re.match(r"\t\.section\t\.text\.([^,]+),", line)
            lines = found.setdefault(section[1], []) if section else []
        else:
            lines.append(line)
    return found


LABEL = re.compile(r"([.$\w]+):")
LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def blocks(lines):
    """The basic blocks of a function, the entry first."""
    made, at = [Block()], {}
    for line in lines:
        label, found = LABEL.match(line), LINE.match(line)
        if made[-1].last.name in JUMPS or (label and made[-1].instructions):
            made.append(Block())
        if label:
            at[label[1]] = len(made) - 1
        elif found:
            made[-1].instructions.append(Instruction(found[2], found[3], found[1] or ""))
    for i, block in enumerate(made):
        onward = [i + 1] if not block.last.ends and i + 1 < len(made) else []
        block.successors = onward + [at[t] for t in block.last.targets]
        block.cost = len(block.instructions) + (length(made, at[block.last.called]) if block.last.called else 0)
    return made


def length(made, entry):
    """The number of instructions in a called function: all of them, because these functions have no branches."""
    returns = next(i for i in range(entry, len(made)) if made[i].last.name == "RET")
    return sum(len(block.instructions) for block in made[entry : returns + 1])


# ------------------------------------------------------------------ paths


def in_order(made):
    """The blocks that can be reached, each before its successors; an edge back to the head of a loop does not count."""
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
    """{bytes: the blocks of the shortest path that stores this many bytes, and loads at least `loaded` bytes}.

    With choose=max it is the longest one. A path runs each loop once, to the exit. If a loop can be left only at its
    head, the path ends at the end of the loop.
    """
    order = in_order(made)
    place = {block: i for i, block in enumerate(order)}
    # {block: {bytes (stored, loaded) before it: (instructions, the way: its last block, and the way before that)}}
    ways, exits, repeats = {block: {} for block in order}, {}, {}
    ways[0][0, 0] = 0, None
    for number in order:
        block = made[number]
        onward = [ways[s] for s in block.successors if place[s] > place[number]]
        onward += [repeats] if len(onward) < len(block.successors) else []
        onward += [exits] if block.last.name in ("EXIT", "RET") else []
        for state, (count, way) in ways[number].items():
            moved = state[0] + block.stored, min(state[1] + block.loaded, loaded)
            longer = count + block.cost, (number, way)
            for known in onward:
                known[moved] = choose(known.get(moved, longer), longer, key=lambda w: w[0])
    return {stored: unrolled(way) for (stored, had), (_, way) in (repeats | exits).items() if had == loaded}


def unrolled(way):
    found = []
    while way:
        block, way = way
        found.append(block)
    return found[::-1]


def loop_around(made, way):
    """The part of a path that the innermost loop around its last store repeats; without a loop, the whole path."""
    order = in_order(made)
    place = {block: i for i, block in enumerate(order)}
    store = max(i for i, block in enumerate(way) if made[block].stored)
    parts = []
    for head in way[: store + 1]:
        ends = {b for b in order if head in made[b].successors and place[b] >= place[head]}
        for block in order[::-1]:  # and the blocks that lead there
            if any(s in ends and place[s] > place[block] for s in made[block].successors):
                ends.add(block)
        inside = [i for i, block in enumerate(way) if block in ends and i >= store]
        parts += [way[way.index(head) : inside[-1] + 1]] if inside else []
    return min(parts, key=len, default=way)


# ------------------------------------------------------------------ the cost of a path


def cost(made, way):
    return sum(made[block].cost for block in way)


def in_flight(walked):
    """The largest number of bytes that a thread has requested and not yet waited for."""
    waited_for, most = {}, 0  # {place of a load: the registers that it fills}
    for place, instruction in enumerate(walked):
        waited_for = {load: filled for load, filled in waited_for.items() if not filled & instruction.registers}
        if instruction.loaded:
            waited_for[place] = instruction.result
        most = max(most, sum(walked[load].bytes for load in waited_for))
    return most


def accesses(walked):
    """{access with its width in bits, such as "LDG.128": their number}."""
    return dict(sorted(Counter(f"{i.name}.{8 * i.bytes}" for i in walked if i.name in ("LDG", "STG")).items()))


def mix(walked):
    return {name: sum(kind.match(i.opcode) is not None for i in walked) for name, kind in MIX.items()}
