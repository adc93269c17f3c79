"""The kernels of encode, compiled: no spills, matrix units, wide accesses.

Compilation happens in separate processes, so that it does not matter whether this one was
started with TRITON_INTERPRET, and nothing needs a GPU.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from bench.__main__ import main
from bench.static import compile as compile_report
from bench.static.launches import EncodeShape, encode_calls
from bench.static.resources import LIMITS, accesses, blocks_per_sm, local_memory, widths
from tests.support.compiled import Row, compiled, faults, needs_triton, run_apart, select


@pytest.fixture(scope="session")
def planted() -> dict[str, Any]:
    run = run_apart("tests/bench/static/planted_kernels.py")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


each_call = pytest.mark.parametrize("direction", ["forward", "backward"])


def of_calls(rows: list[Row], direction: str) -> list[Row]:
    return select(rows, "encode", direction, "bfloat16", "float32")


@needs_triton
@pytest.mark.slow
@each_call
def test_defaults_fit_and_do_not_spill(rows, direction) -> None:
    assert not faults(of_calls(rows, direction))


@needs_triton
@pytest.mark.slow
@pytest.mark.verify
def test_no_network_of_the_paper_has_a_default_that_spills_on_any_architecture(
    tmp_path_factory,
) -> None:
    """`rows` has all shapes for sm_90 only; stage 3 has 1024 channels."""
    arguments = ("--op", "encode", "--dtype", "bfloat16", "--arch", "80", "89", "100", "120")
    assert not faults(compiled(tmp_path_factory, *arguments))


@needs_triton
@pytest.mark.slow
@each_call
def test_products_use_matrix_units(rows, direction) -> None:
    products = [row for row in of_calls(rows, direction) if row["dots"]]
    assert products
    assert not [row["config"] for row in products if not row["mma"]]


@needs_triton
@pytest.mark.slow
@each_call
def test_pixels_are_read_and_written_16_bytes_wide(rows, direction) -> None:
    """But 8, where 8 warps read 16 pixels ahead."""
    narrow = {
        (row["config"], name): counted
        for row in of_calls(rows, direction)
        for name, counted in row["accesses"].items()
        if name in ("X", "dX")
        and min(map(int, counted)) < (8 if re.search(r" n16 .* s2$", row["config"]) else 16)
    }
    assert not narrow


@needs_triton
@pytest.mark.slow
@each_call
def test_two_blocks_or_eight_warps_share_an_h100_processor(rows, direction) -> None:
    few = {
        row["config"]: (row["blocks_per_sm"], row["num_warps"])
        for row in of_calls(rows, direction)
        if row["arch"] == 90 and row["blocks_per_sm"] < (1 if row["num_warps"] >= 8 else 2)
    }
    assert not few, "blocks and warps per block"


@needs_triton
def test_what_is_only_measured_can_be_compiled_too() -> None:
    """Behind what the launcher may choose from."""
    found = encode_calls([90], ["bfloat16"], [EncodeShape(512, 32)], True, candidates=True)
    forward = [call for call in found if call.direction == "forward"]
    own = replace(forward[0], candidates=False).configs()
    assert forward[0].configs()[: len(own)] == own
    boxed = [call for call in forward if call.configs()[call.config].form == "boxed"]
    assert [call.launches()[0].num_stages for call in boxed] == [3, 4]
    assert forward[0].launches()[0].num_stages == 1


@needs_triton
@pytest.mark.slow
def test_a_planted_spill_is_reported(planted) -> None:
    assert planted["reports"]["spill"]["spill_bytes"] > 0
    assert planted["reports"]["spill"]["stack_bytes"] > 0
    assert compile_report.bad(planted["reports"]["spill"])


def test_a_stack_is_bad_without_a_spill_too() -> None:
    log = """ptxas info    : Function properties for backward_input_kernel
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for slow_division
    24 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
"""
    assert local_memory(log) == (24, 16)
    assert local_memory("".join(log.splitlines(keepends=True)[:2])) == (8, 0)
    good = {"stack_bytes": 0, "spill_bytes": 0, "fits": True}
    assert not compile_report.bad(good)
    assert compile_report.bad(good | {"stack_bytes": 8})


@needs_triton
@pytest.mark.slow
def test_a_copy_is_wide_where_its_address_allows(planted) -> None:
    found = planted["reports"]
    for name in ("copy", "aligned view"):
        assert not compile_report.bad(found[name])
        assert found[name]["accesses"] == {"X": {"16": 2}, "Y": {"16": 2}}
        assert found[name]["load_widths"] == {"LDG.16": 2}
        assert found[name]["store_widths"] == {"STG.16": 2}
        assert found[name]["mma"] == {} and found[name]["dots"] == 0
    assert found["unaligned"]["accesses"] == {"X": {"4": 8}, "Y": {"16": 2}}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("nothing", "an empty program"),
        ("refused", "does not compile: CompileTimeAssertionFailure: planted"),
        ("too large", "does not fit on a multiprocessor"),
        ("hasty", "an atomic releases before the other threads' stores"),
    ],
)
def test_what_cannot_be_launched_is_reported(planted, name: str, note: str) -> None:
    assert not planted["reports"][name]["fits"]
    assert planted["reports"][name]["note"].startswith(note)
    assert compile_report.bad(planted["reports"][name])


@needs_triton
@pytest.mark.slow
def test_an_atomic_behind_a_barrier_is_well(planted) -> None:
    assert not compile_report.bad(planted["reports"]["patient"])


@needs_triton
@pytest.mark.slow
def test_sizes_are_specialised_as_in_a_launch(planted) -> None:
    programs = planted["programs"]
    assert programs["3600"] == programs["7200"]  # both multiples of 16
    assert programs["3601"] == programs["3602"]
    others = {programs[n] for n in ("1", "3600", "3601", str(1 << 40))}
    assert len(others) == 4


@needs_triton
def test_an_interpreting_process_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["static", "compile", "--arch", "90"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: TRITON_INTERPRET is set, so Triton compiles nothing here; unset it"
    ]


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "blocks"),
    [
        (90, 4, 32, 0, 16),  # by warps
        (80, 4, 255, 0, 2),  # by registers
        (80, 8, 255, 0, 1),
        (90, 8, 168, 64 << 10, 1),  # by registers: 168 * 256 threads is two thirds
        (90, 4, 128, 64 << 10, 3),  # by shared memory
        (120, 4, 128, 99 << 10, 1),
        (120, 4, 128, (99 << 10) + 1, 0),
        (80, 1, 16, 0, 32),  # by blocks
        (90, 16, 255, 0, 0),  # 16 warps leave 128 registers per thread
    ],
)
def test_blocks_per_sm(arch: int, warps: int, registers: int, shared: int, blocks: int) -> None:
    assert blocks_per_sm(arch, warps, registers, shared) == blocks


def test_tensor_memory_limits_blocks() -> None:
    assert blocks_per_sm(100, 4, 64, 0, columns=256) == 2


def test_widths_of_disassembled_accesses() -> None:
    program = [
        "LDG.E.128",
        "LDG.E.128.CONSTANT",
        "LDG.E.U16",
        "LDG.E",
        "LDGSTS.E.BYPASS.LTC128B.128",
    ]
    program += ["UTMALDG.2D", "LDS.128", "LDG.E.ENL2.256"]
    assert widths(program, ("LDG", "LDGSTS", "UTMALDG")) == {
        "LDG.16": 2,
        "LDG.2": 1,
        "LDG.4": 1,
        "LDGSTS.16": 1,
        "UTMALDG": 1,
        "LDG.32": 1,
    }


def test_accesses_are_traced_to_their_argument() -> None:
    ptx = """
        ld.param.b64 %rd1, [kernel_param_0];
        ld.param.b64 %rd2, [kernel_param_2];
        mov.b64 %rd9, %rd1;
    $L1:
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd9 + 0 ];
        cp.async.cg.shared.global [ %r9 + 0 ], [ %rd9 + 64 ], 0x10, %r8;
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r7];
        mad.wide.s32 %rd5, %r3, 2, %rd2;
        ld.global.L1::evict_last.L2::cache_hint.b16 { %rs1 }, [ %rd5 + 0 ], %rd7;
        @%p3 st.global.v2.b32 [ %rd5 + 8 ], { %r1, %r2 };
        add.s64 %rd11, %rd9, 128;
        mov.b64 %rd9, %rd11;
    """
    assert accesses(ptx, {0: "X", 2: "P"}) == {"X": {16: 2}, "P": {2: 1, 8: 1}}


def test_limits_cover_what_is_reported() -> None:
    assert compile_report.ARCHS == (80, 89, 90, 100, 120)
    assert all(limits.shared_bytes > limits.shared_bytes_a_block for limits in LIMITS.values())
