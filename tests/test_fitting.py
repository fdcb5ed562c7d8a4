"""Every Triton kernel on every GPU: within its shared memory, or refused by name. Nothing is launched."""

import inspect
import itertools

import pytest

from mamba_ops.cold_start import fitting
from mamba_ops.cold_start.targets import TARGETS, target_of
from mamba_ops.registry import ops
from tests.harness import compiled_for_a_gpu

pytest.importorskip("triton")

ALIKE = {"sm_89": "sm_86", "sm_103": "sm_100", "gfx1200": "gfx1100"}
"""GPUs of equal limits for which every kernel takes the same bytes as for another one, or fewer."""
FEWER = {("gfx1200", "mamba_chunk_scan._states")}
"""Where it takes fewer."""
DELTA_RULE, KDA, SSD, MAMBA_3 = "chunk_gated_delta_rule", "chunk_kda", "mamba_chunk_scan", "mamba3_chunk_scan"
BACKWARD = f"{DELTA_RULE}_backward"
REFUSED = {
    # No matrix units that Triton knows: all of what is multiplied lies in shared memory, in float32.
    ("sm_75", DELTA_RULE, "bfloat16"),
    ("sm_75", DELTA_RULE, "float16"),
    ("sm_75", DELTA_RULE, "float32"),
    ("sm_75", BACKWARD, "float32"),
    ("sm_75", f"{SSD}_backward", "float32"),
    ("sm_75", KDA, "float32"),
    ("sm_75", f"{KDA}_backward", "float32"),
    ("sm_75", MAMBA_3, "float16"),
    ("sm_75", MAMBA_3, "float32"),
}
"""GPU, op and dtype that the backend `triton` refuses; then `torch` runs them, or the ops that one is composed of."""
LAUNCHED = sorted(name for name, op in ops().items() if fitting.launches(op))


MULTIPLYING = [DELTA_RULE, BACKWARD, KDA, f"{KDA}_backward", SSD, f"{SSD}_backward", MAMBA_3]
"""Ops whose kernels multiply matrices. In others, numbers of 2 bytes are loaded alike, whatever they mean."""


def refused(rows):
    return {(row.target, row.op, row.dtype) for row in rows if not row.fits}


def of(target, *dtypes):
    return {entry for entry in REFUSED if entry[0] == target and entry[2] in dtypes}


def test_kernels_fit_a_small_gpu():
    """This and the next are a sample of what follows."""
    rows = list(fitting.fits(["sm_86"], ops=[DELTA_RULE], dtypes=["bfloat16"]))
    assert [row.kernel.rpartition(".")[2] for row in rows] == ["_solve", "_scan"]
    assert all(0 < row.shared <= row.limit == 101_376 for row in rows), rows


def test_backward_kernels_compile_for_a_gpu_with_a_compiler_of_its_own():
    """Of the GPUs that are known, those with tensor memory have the passes of Triton's that refuse most."""
    rows = list(fitting.fits(["sm_100"], ops=[BACKWARD, f"{SSD}_backward"], dtypes=["bfloat16"]))
    assert len({row.kernel for row in rows}) > 10
    assert not [str(row) for row in rows if not row.fits]


def test_backward_kernels_fit_where_values_are_one_block():
    """Loops over blocks are none then, and the loops around them would be the ones whose loads are made ahead."""
    rows = list(fitting.fits(["sm_90"], ops=[BACKWARD], dtypes=["bfloat16"], sizes={**fitting.SIZES, "v_dim": 64}))
    assert not [str(row) for row in rows if not row.fits]


def test_narrow_states_are_compiled_too():
    """On a GPU without instructions for 8-bit floats."""
    rows = list(fitting.fits(["sm_75"], ops=["kda_update"], dtypes=["bfloat16"]))
    assert [row.states for row in rows] == ["float32", "int16", "float8_e4m3fn"]
    assert not [str(row) for row in rows if not row.fits]


def test_an_op_that_is_composed_of_others_asks_for_variants_of_its_own():
    """Of its own kernels. MIMO gives Mamba-2's a float32 x; B and C then come in float32 as well, or kernels spill
    kilobytes.
    """
    rows = list(fitting.fits(["sm_86"], ops=[SSD, MAMBA_3], dtypes=["bfloat16", "float32"]))
    assert not [str(row) for row in rows if not row.fits]

    def found(op, dtype, kernels):
        return {
            (row.kernel, row.launch, row.shared)
            for row in rows
            if (row.op, row.dtype) == (op, dtype) and row.kernel.startswith(kernels)
        }

    assert len(found(MAMBA_3, "bfloat16", MAMBA_3)) == 5
    assert len(found(MAMBA_3, "bfloat16", SSD)) == 3
    assert found(MAMBA_3, "bfloat16", SSD) == found(MAMBA_3, "float32", SSD)
    assert found(MAMBA_3, "bfloat16", SSD) != found(SSD, "bfloat16", SSD)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_every_kernel_fits_or_is_refused_by_name(backend):
    targets = sorted(name for name, target in TARGETS.items() if target.backend == backend and name not in ALIKE)
    rows = list(fitting.fits(targets, dtypes=["bfloat16", "float32"]))  # in one child: it takes seconds to begin
    print(f"{len(rows)} variants of {len({row.kernel for row in rows})} kernels")  # noqa: T201
    assert {(row.target, row.op) for row in rows} == set(itertools.product(targets, LAUNCHED))
    assert {row.dtype for row in rows} == {"bfloat16", "float32"}
    assert not [str(row) for row in rows if row.problem]
    assert refused(rows) == set().union(*(of(target, "bfloat16", "float32") for target in targets))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_products_of_float16_fit_or_are_refused_by_name():
    targets = sorted(set(TARGETS) - set(ALIKE))
    rows = list(fitting.fits(targets, ops=MULTIPLYING, dtypes=["float16"]))
    assert {(row.target, row.op) for row in rows} == set(itertools.product(targets, MULTIPLYING))
    assert not [str(row) for row in rows if row.problem]
    assert refused(rows) == set().union(*(of(target, "float16") for target in targets))


@pytest.mark.slow
def test_other_kernels_take_of_float16_what_they_take_of_bfloat16():
    others = sorted(set(LAUNCHED) - set(MULTIPLYING))
    rows = list(fitting.fits(["sm_90"], ops=others, dtypes=["bfloat16", "float16"]))
    found = {dtype: [row._replace(dtype="") for row in rows if row.dtype == dtype] for dtype in fitting.DTYPES}
    assert found["bfloat16"] == found["float16"] != []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), ALIKE.items())
def test_gpus_that_are_taken_to_be_alike_are(name, other):
    assert target_of(name).shared_memory == target_of(other).shared_memory
    rows = list(fitting.fits([name, other], ops=[DELTA_RULE, SSD], dtypes=["bfloat16"]))
    both = [[row._replace(target="") for row in found] for _, found in itertools.groupby(rows, lambda row: row.target)]
    assert len(both) == 2
    for one, another in zip(*both, strict=True):
        if (name, one.kernel) in FEWER:
            assert one.shared < another.shared
            one = one._replace(shared=another.shared)
        assert one == another


TABLES = """
from mamba_ops.ops._triton import launch_config
print(json.dumps([[path.stem, launch_config.load(path)["kernels"]] for path in launch_config.TABLES.glob("*.json")]))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_tables_say_fits_the_gpus_that_they_are_for():
    tables = compiled_for_a_gpu(TABLES, compiles=False)
    assert tables
    for family, kernels in tables:
        target = target_of(family.removeprefix("hip-"))
        for op, entries in kernels.items():
            known = inspect.signature(ops()[op].sampler).parameters  # others, such as itemsize, are no sizes of samples
            sizes = {tuple((n, v) for n, v in e["sizes"].items() if n in known) for e in entries}
            for each in sizes:
                rows = list(fitting.fits([target], ops=[op], dtypes=["bfloat16", "float32"], sizes=dict(each)))
                assert rows
                assert not [str(row) for row in rows if not row.fits]


def test_gpus_are_known_by_their_usual_names():
    assert [target_of(name).name for name in ("8.6", "86", "sm_86", "cuda-86", "SM86", "gfx942")] == [
        *["sm_86"] * 5,
        "gfx942",
    ]
    with pytest.raises(ValueError, match="unknown GPU 'gfx7'; valid: gfx1100"):
        target_of("gfx7")
