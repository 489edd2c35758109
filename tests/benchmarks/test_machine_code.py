"""The machine code of the GPU kernels: the program that reads it, and limits for every kernel. No GPU is needed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "benchmarks/gpu"
sys.path.append(str(GPU))

import machine_code  # noqa: E402
import sass  # noqa: E402

# A thread beyond the end exits. A thread with a whole pack takes the wide accesses, and waits for one of them at 0x70.
# The other threads go through a loop. A routine is called, and a move is written as a multiply-add.
LISTING = """
	.section	.text.kernel,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=12"
kernel:
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, UR4, PT ;
        /*0020*/               @P0 EXIT ;
.L_x_3:
        /*0030*/                   HFMA2.MMA R3, -RZ, RZ, 0, 0 ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/                   LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0060*/                   LDG.E.64.CONSTANT R8, desc[UR8][R2.64+0x10] ;
        /*0070*/               @P2 FFMA R4, R7, R7, R5 ;
        /*0080*/                   CALL.REL.NOINC `($__internal_0_$divide) ;
        /*0090*/                   STG.E.128 desc[UR8][R10.64], R4 ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*00b0*/                   LDG.E R4, desc[UR8][R2.64] ;
        /*00c0*/                   STG.E desc[UR8][R10.64], R4 ;
        /*00d0*/               @P3 BRA `(.L_x_1) ;
.L_x_2:
        /*00e0*/                   BRA.U UP0, `(.L_x_3) ;
        /*00f0*/                   EXIT ;
        .type           $__internal_0_$divide,@function
$__internal_0_$divide:
        /*0100*/                   MUFU.RCP R9, R8 ;
        /*0110*/                   RET.REL.NODEC R20 `(kernel) ;
.L_x_4:
        /*0120*/                   BRA `(.L_x_4);
        /*0130*/                   NOP;
	.section	.nv.constant0.kernel,"a",@progbits
"""


@pytest.fixture(scope="module")
def read():
    ((name, lines),) = machine_code.functions(LISTING).items()
    assert name == "kernel"
    return machine_code.blocks(lines)


def walk(made, way):
    return [i for block in way for i in made[block].instructions]


def test_the_way_of_a_whole_pack(read):
    way = machine_code.ways_through(read, 24)[16]
    assert machine_code.cost(read, way) == 3 + 2 + 6 + 2 + 2  # the last two are in the called routine
    assert machine_code.accesses(walk(read, way)) == {"LDG.128": 1, "LDG.64": 1, "STG.128": 1}
    assert machine_code.in_flight(walk(read, way)) == 24
    assert machine_code.mix(walk(read, way)) == {"half": 1, "slow": 1, "wide": 0}


def test_other_ways(read):
    ways = machine_code.ways_through(read, 0)
    assert {stored: machine_code.cost(read, way) for stored, way in ways.items()} == {0: 3, 4: 10, 16: 15}
    assert machine_code.ways_through(read, 25) == {}


def test_a_loop_counts_once_and_is_found(read):
    way = machine_code.ways_through(read, 4)[4]
    assert machine_code.cost(read, machine_code.loop_around(read, way)) == 3


def test_fused_operations_are_told_from_moves(read):
    assert [i.opcode for block in read for i in block.instructions if i.fused] == ["FFMA"]


def test_chips():
    h100 = sass.CHIPS[90]
    assert h100.resident(256, 32, 0) == 2048
    assert h100.resident(256, 33, 0) == 1536  # 33 registers take 40, so six blocks fit
    assert h100.resident(128, 32, 32 << 10) == 6 * 128
    # Memory gives an element of 16 bytes each 4.8 ps; its 16 instructions are issued at 29.7 a ps.
    assert h100.issue_share(16, 16) == pytest.approx(3.35e12 / (132 * 4 * 32 * 1.755e9))


# ------------------------------------------------------------------ the kernels

# The CUDA kernels are tested wherever there is nvcc; Triton's package brings its own compiler.
BACKENDS = ["triton", *(["cuda"] if shutil.which("nvcc") else [])]
RECORD = sass.read(sass.RECORD)


def output(*command):
    """The output of a separate process, because this process has Triton's interpreter switched on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def compiled(folder, *options):
    """The rows that sass.py writes."""
    output(GPU / "sass.py", *options, "--json", folder / "rows.json")
    return sass.read(folder / "rows.json")


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    # Without kernels that differ from others only in Triton's last conversion.
    kernels = r"--kernels=^(?!.*\b(f32|f16|u8)/\S+ z bf16)"
    return compiled(tmp_path_factory.mktemp("sm_90"), kernels, *(f"--backend={b}" for b in BACKENDS))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Triton's main kernels for other GPUs; setup.py's log has the spills of the CUDA kernels."""
    options = ("--backend=triton", "--arch=80", "--arch=100", r"--kernels=\b(f32/f32|f16/f16|bf16/bf16|u8/f32)$")
    return compiled(tmp_path_factory.mktemp("others"), *options)


def bad(row):
    return row["local"] or row["stack"] or row["fused"]


@pytest.mark.parametrize("made_by", BACKENDS)
def test_nothing_spills_and_nothing_is_fused(hopper, made_by):
    rows = [row for row in hopper["rows"] if row["backend"] == made_by]
    assert len({row["kernel"] for row in rows}) == len(rows) >= 40
    assert {row["layout"] for row in rows} == {"flat", "any"}
    assert [row["kernel"] for row in rows if bad(row)] == []


def test_nothing_spills_and_nothing_is_fused_elsewhere(others):
    assert len(others["rows"]) >= 2 * 12
    assert [(row["kernel"], row["arch"]) for row in others["rows"] if bad(row)] == []


def test_every_form_compiles_for_the_oldest_gpu():
    """Turing has no instruction for bfloat16, and no minimum that keeps NaN, so other instructions must be used."""
    forms = output(GPU / "triton_aot.py", "75").splitlines()
    assert len(set(forms)) == len(forms) >= 50
    assert {"flat", "any"} <= {word for form in forms for word in form.split()}
    assert sum("bf16" in form for form in forms) >= 10


def test_packs_move_128_bits_at_a_time(hopper):
    """Exceptions: eight uint8 and a seed are 64 bits, and a channel's mean and scale are single numbers."""
    for row in hopper["rows"]:
        if row["layout"] == "flat":
            seeds = {"LDG.64"} if re.match(r"random_init|fgsm_step noise", row["op"]) else set()
            narrow = set(row["accesses"]) - {"LDG.128", "STG.128"} - seeds
            narrow -= {"LDG.64"} if row["x"] == "u8" else set()
            narrow -= {"LDG.32"} if row["z"] else set()
            assert not narrow, row


def compilers(result):
    return tuple(result["environment"][name] for name in ("nvcc", "triton"))


def test_no_kernel_takes_more_instructions(hopper):
    """`python benchmarks/gpu/sass.py --record` writes new limits. Another version of a compiler needs new ones."""
    margin = 1.03 if compilers(hopper) == compilers(RECORD) else 1.15
    limits = {(row["backend"], row["kernel"], row["arch"]): row for row in RECORD["rows"]}
    grown = {}
    for row in hopper["rows"]:
        known = limits[row["backend"], row["kernel"], row["arch"]]
        for what in ("per_element", "most", "registers"):
            if row[what] > margin * known[what] + (what == "registers") * 2:
                grown[row["backend"], row["kernel"], what] = (known[what], row[what])
    assert grown == {}


def test_the_page_has_the_record_s_numbers(capsys):
    sass.main(["--page"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("| pgd_step f32/f32 | cuda |"))
    found = [cell.strip() for cell in line.split("|")[3:6]]
    of = {row["arch"]: row for row in RECORD["rows"] if (row["kernel"], row["backend"]) == ("pgd_step f32/f32", "cuda")}
    for arch, cell in zip(("sm_80", "sm_90", "sm_100"), found, strict=True):
        instructions, registers, slots = cell.split("; ")
        assert int(registers) == of[arch]["registers"]
        assert instructions.startswith(f"{of[arch]['per_element']:.1f}")
        assert slots == f"{100 * of[arch]['issue_share']:.0f}%"
