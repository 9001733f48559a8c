"""The audit of the compiled kernels: it finds known faults, and none in ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import kernels as bench_kernels
from bench.__main__ import main
from engine.settings.errors import UserError
from kernels.compiled import audit
from kernels.compiled.machine_code import Access, read_ptx, read_sass

ROOT = Path(__file__).parents[3]


def python(*words: str) -> subprocess.CompletedProcess:
    """A program with our packages and without the interpreter."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def probes():
    answer = python("tests/kernels/compiled/audit_probe.py")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


# Every configuration for one architecture, one of each kernel for the others: the whole takes
# minutes, and `python -m bench kernels` is there for it.
@pytest.mark.slow
@pytest.mark.parametrize("words", ["--arch sm_90", "--arch sm_80 sm_100 --quick"])
def test_every_kernel_is_clean(words, tmp_path):
    page = tmp_path / "kernels.md"
    shape = "--models Janus-Pro-1B --dtypes bf16 --rows 64 --groups 8 --threads 1"
    words = ["--json", *words.split(), *shape.split(), "--write", str(page)]
    answer = python("-m", "bench", "kernels", *words)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert report["correct"] and report["failures"] == []
    assert report["ratios"]["max_spilled_bytes"] == report["ratios"]["narrow_accesses"] == 0
    assert 1 <= report["ratios"]["traffic_over_least"] <= 1.05
    providers = {row["provider"] for row in report["rows"]}
    assert {"rms_norm", "swiglu", "kv_append", "decode_attention"} <= providers
    assert "grpo_loss image" in providers
    text = page.read_text()
    for row in report["rows"]:
        assert f"| {row['provider']} | bf16 | {row['arch']} |" in text
    for row in report["configurations"]:
        wide = [key for key in row["global"] if int(key.split()[1]) >= 128]
        assert wide and row["registers"] > 0, row


def test_interpreter_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="^TRITON_INTERPRET is set.*unset it$"):
        main(["kernels", "--json"])
    with pytest.raises(RuntimeError, match="^TRITON_INTERPRET is set"):
        audit.find_modules()


def test_spill_is_seen_by_both_readings(probes):
    for found in probes["spills"].values():
        assert found["stack_bytes"] > 0 and found["local_bytes"] > 0
    assert probes["fits"]["sm_90"]["stack_bytes"] == probes["fits"]["sm_90"]["local_bytes"] == 0


def test_narrow_access_is_seen_and_named(probes):
    wide = probes["wide"]["sm_90"]
    assert wide["narrow"] == [] and wide["exempt"] == ["count_ptr"]
    assert wide["narrow_without_exemption"] == ["32-bit atomic of count_ptr"]
    assert wide["global"] == {"load 128": 1, "store 128": 1}
    gathered = probes["gathered"]["sm_90"]
    assert gathered["narrow"] == ["16-bit load of x_ptr"]
    assert gathered["global"] == {"load 16": 8, "store 128": 1}
    store = probes["misaligned store"]["sm_90"]
    assert store["narrow"] == ["16-bit store of out_ptr"]
    assert store["global"] == {"load 128": 1, "store 16": 8}


def test_tensor_cores_and_pipelined_copies_are_seen(probes):
    found = probes["product"]
    assert [found[arch]["tensor_cores"] for arch in audit.ARCHS] == [
        ["HMMA"],
        ["HGMMA"],
        ["UTCHMMA"],
    ]
    for arch in audit.ARCHS:
        assert found[arch]["narrow"] == [] and found[arch]["global"]["copy 128"] > 0
    assert probes["fits"]["sm_90"]["tensor_cores"] == []


SASS = """
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64+0x2] ;
        /*0030*/               @P1 LDG.E.LTC128B.64 R8, desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0050*/             @!UP0 STG.E R8, desc[UR4][R2.64] ;
        /*0060*/                   STL.64 [R1+0x8], R2 ;
        /*0070*/                   LDL.LU R2, [R1+0x8] ;
        /*0080*/                   LDS.128 R4, [R3] ;
        /*0090*/                   RED.E.ADD.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*00b0*/                   EXIT ;
"""


def test_sass_instructions_are_counted_by_width():
    code = read_sass(SASS)
    assert code.global_widths == {
        ("load", 128): 1,
        ("load", 16): 1,
        ("load", 64): 1,
        ("copy", 128): 1,
        ("store", 32): 1,
    }
    assert code.local_bytes == code.spilled_bytes == 8
    assert code.atomics == 1 and code.tensor_cores == {"HGMMA": 1}
    with pytest.raises(RuntimeError, match="no SASS"):
        read_sass("nothing")


PTX = """
.visible .entry k(
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u64 k_param_1,
    .param .u64 .ptr .global .align 1 k_param_2,
    .param .u64 .ptr .global .align 1 k_param_3
)
{
    ld.param.b64 %rd1, [k_param_0];   // a pointer
    ld.param.b64 %rd2, [k_param_1];
    ld.param.b64 %rd3, [k_param_2];
    mad.wide.u32 %rd5, %r1, 2, %rd1;
    mov.b64 %rd6, %rd5;
$L__BB0_1:
    add.s64 %rd6, %rd6, %rd2;
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd6 + 0 ];
    ld.global.b64 %rd7, [%rd3];
    add.s64 %rd8, %rd3, %rd7;
    selp.b64 %rd9, %rd8, %rd5, %p1;
    @!%p2 st.global.v2.b16 [%rd9+8], {%rs1, %rs2};
    cp.async.cg.shared.global [ %r9 + 0 ], [ %rd8 + 0 ], 0x10, %r5;
    cp.async.commit_group;
    st.shared.b32 [%r1], %r2;
    st.global.b8 [%rd7], %rs1;
    atom.global.gpu.acq_rel.add.u32 %r4, [%rd3], 1;
    @%p1 bra $L__BB0_1;
}
"""


def test_ptx_addresses_are_followed_to_their_arguments():
    arguments = [("a", "*bf16"), ("stride", "i64"), ("b", "*i64")]
    assert read_ptx(PTX, arguments) == [
        Access("load", 128, ("a",)),
        Access("load", 64, ("b",)),
        Access("store", 32, ("a", "b")),
        Access("copy", 128, ("b",)),
        Access("store", 8, ("?",)),
        Access("atomic", 32, ("b",)),
    ]
    with pytest.raises(ValueError, match="argument stride"):
        read_ptx(PTX, [("a", "*bf16"), ("stride", "*i64"), ("b", "*i64")])


def test_shapes_cover_models_and_leave_out_groups_of_more_than_half():
    shapes = audit.shapes(audit.MODELS, audit.DTYPES, (16, 128), (1, 8, 16))
    assert {s.head_dim for s in shapes} == {64, 96, 128}
    assert {s.heads // s.kv_heads for s in shapes} == {1, 4}
    assert {(s.rows, s.group) for s in shapes} == {(16, 1), (16, 8), (128, 1), (128, 8), (128, 16)}


def test_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match=r"--models: unknown 'Janus-Pro-2B'.*Janus-Pro-"):
        bench_kernels.run(bench_kernels.Config(models=["Janus-Pro-2B"]))
    with pytest.raises(UserError, match=r"--arch.*sm_90"):
        main(["kernels", "--arch", "sm_91"])
