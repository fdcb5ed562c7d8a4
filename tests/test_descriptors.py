"""Matrix units read what lies in shared memory, and nothing else: see `tests.descriptors`."""

import json
import os
import subprocess
import sys

import pytest

from tests.descriptors import wrong
from tests.pages import ROOT

RIGHT = """
        /*0000*/                   S2UR UR5, SR_CgaCtaId ;
        /*0010*/                   ULEA UR6, UR5, UR6, 0x18 ;
        /*0020*/                   USHF.R.U32.HI UR8, URZ, 0x4, UR6 ;
        /*0030*/                   UIADD3.64 UR10, UR8, 0x20, URZ ;
        /*0040*/                   IMAD.U32 R12, RZ, RZ, UR10 ;
        /*0050*/                   STL [R1+0x8], R12 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   LDG.E.128 R12, desc[UR4][R2.64] ;
.L_x_1:
        /*0080*/                   LDL R12, [R1+0x8] ;
        /*0090*/                   R2UR UR14, R12 ;
        /*00a0*/                   HGMMA.64x16x16.F32.BF16 R32, R28, gdesc[UR12].tnspB, R32 ;
        /*00b0*/                   HGMMA.64x16x16.F32.BF16 R32, gdesc[UR8].tnspB, R32, gsb0 ;
        /*00c0*/                   EXIT ;
"""


def test_where_products_read() -> None:
    assert wrong(RIGHT) == (3, [])
    of_argument = RIGHT.replace("ULEA UR6, UR5, UR6", "ULEA UR6, UR5, c[0x0][0x210]")
    assert wrong(of_argument) == (3, ["00a0", "00b0", "00b0"])
    assert wrong(RIGHT.replace("LDL R12, [R1+0x8]", "LDL R12, [R1+0xc]")) == (3, ["00a0"])
    assert wrong(RIGHT.replace("LDL R12, [R1+0x8]", "NOP")) == (3, ["00a0"])  # on one of two paths
    # A group of warps has rows of its own: which one it is, threads tell each other.
    group = "R2UR UR6, R4 ;\n        /*0018*/                   ULEA UR6, UR5, UR6, 0x18"
    of_groups = RIGHT.replace(
        "ULEA UR6, UR5, UR6, 0x18", f"SHFL.IDX PT, R4, R3, RZ, 0x1f ;\n        /*0014*/   {group}"
    )
    assert wrong(of_groups.replace("S2UR UR5", "S2R R3, SR_TID.X ;\n        /*0004*/   S2UR UR5")) == (3, [])
    loaded = of_groups.replace("S2UR UR5", "LDG.E R3, desc[UR4][R2.64] ;\n        /*0004*/   S2UR UR5")
    assert wrong(loaded) == (3, ["00a0", "00b0", "00b0"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [{}, {"k_dim": 16, "v_dim": 64, "dim": 16, "dstate": 16}], ids=["large", "small"])
def test_products_read_shared_memory(dtype: str, sizes: dict[str, int]) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.descriptors", dtype, json.dumps(sizes)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 7
    assert [line for line in found if line[2]] == []
