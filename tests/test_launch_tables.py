"""Launch configurations: the shipped table is what was measured, own launch_config come first, tuning makes them."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from mamba_ops.cold_start import tuning
from mamba_ops.cold_start.specialization import our_modules
from mamba_ops.ops._triton import _triton, launch_config
from mamba_ops.ops._triton.common import options
from mamba_ops.ops._triton.limits import Limits
from mamba_ops.registry import ops, use_backend
from tests.harness import compiled_for_a_gpu, environment

our_modules()  # so that all rules are known
H100 = Limits(232_448, ("tf32", "ieee"), "parts")
LAUNCHES = launch_config.choosers["gated_delta_rule_update"]


@pytest.fixture(autouse=True)
def _forget():
    yield
    for op in launch_config.rules:
        launch_config.forget(op)


def own_table(folder, launches, op="gated_delta_rule_update", **sizes):
    """A table of one entry, for devices as they are here."""
    sizes = {"v_dim": 24, "k_dim": 16, "itemsize": 4} | sizes
    folder.mkdir(exist_ok=True)
    path = folder / f"{launch_config.family(-1)}.json"
    path.write_text(json.dumps({"kernels": {op: [{"sizes": sizes, "launches": launches}]}}))
    return path


@pytest.mark.parametrize("path", sorted(launch_config.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_table_says_what_was_chosen_when_the_kernels_were_measured(path):
    kernels = launch_config.load(path)["kernels"]
    assert kernels
    for op, entries in kernels.items():
        assert entries
        for entry in entries:
            rule = launch_config.rules[op](H100, *entry["sizes"].values())
            assert entry["launches"].keys() == launch_config.tunable[op].keys()
            for kernel, launch in entry["launches"].items():
                assert launch.items() <= rule[kernel].items()


def test_a_device_of_a_known_family_has_its_launches_from_the_table():
    path, sources = compiled_for_a_gpu(
        "import torch, mamba_ops\n"
        "from mamba_ops.ops._triton import launch_config\n"
        "from mamba_ops.ops.selective_state_update import triton as kernel\n"
        "kernel._launches(-1, 64, 128, False), kernel._launches(-1, 48, 128, False)\n"
        "print(json.dumps([str(launch_config.TABLES / 'cuda-90.json'), [str(c) for c in launch_config.chosen]]))",
        compiles=False,
    )
    told = (
        "selective_state_update on cuda-90, dim {}, dstate 128, full_A False: _kernel BLOCK 8, WIDTH 128, num_warps 1"
    )
    assert sources == [f"{told.format(64)} ({path})", f"{told.format(48)} (rule)"]


def test_an_own_table_comes_before_the_rule_and_is_looked_at_once(tmp_path):
    path = own_table(tmp_path, {"_kernel": {"BLOCK": 4, "num_warps": 2}})
    with environment(MAMBA_OPS_CONFIG_DIR=str(tmp_path)):
        launch_config.forget("gated_delta_rule_update")
        launch = LAUNCHES(-1, 24, 16, 4)
        assert launch == {"_kernel": options(BLOCK=4, WIDTH=16, num_warps=2)}
        path.unlink()
        assert LAUNCHES(-1, 24, 16, 4) is launch
        assert launch_config.chosen[-1].source == str(path)
        (rule,) = launch_config.rules["gated_delta_rule_update"](H100, 24, 16, 2).values()
        assert LAUNCHES(-1, 24, 16, 2) == {"_kernel": options(**rule)}


def test_a_kernel_runs_as_its_table_says(tmp_path, device):
    import mamba_ops

    op = mamba_ops.gated_delta_rule_update
    sample = op.make_samples(device)[0]
    own_table(tmp_path, {"_kernel": {"BLOCK": 4}})
    outputs = []
    with use_backend("triton"), torch.no_grad():
        (tmp_path / "empty").mkdir()
        for folder in (tmp_path / "empty", tmp_path):
            with environment(MAMBA_OPS_CONFIG_DIR=str(folder)):
                launch_config.forget(op.name)
                mine = sample.clone()
                outputs.append(op(*mine.args, **mine.kwargs))
    assert torch.equal(*outputs)  # rows of the state are independent, whatever the block


@pytest.mark.parametrize(
    ("launches", "sentence"),
    [
        ({"_scan": {}}, "got kernel '_scan', expected one of _kernel"),
        ({"_kernel": {"WIDTH": 8}}, "_kernel: got 'WIDTH', expected one of BLOCK, num_warps"),
        ({"_kernel": {"BLOCK": 12}}, "_kernel: BLOCK: got 12, expected a power of two up to 65536"),
        ({"_kernel": {"BLOCK": "8"}}, "_kernel: BLOCK: got '8', expected a power of two up to 65536"),
        ({"_kernel": {"BLOCK": True}}, "_kernel: BLOCK: got True, expected a power of two up to 65536"),
        ({"_kernel": {"num_warps": 1 << 20}}, "_kernel: num_warps: got 1048576, expected a power of two up to 32"),
        ({"_kernel": {"num_warps": None}}, "_kernel: num_warps: got None, expected a power of two up to 32"),
    ],
)
def test_a_table_cannot_make_a_kernel_wrong(launches, sentence, tmp_path):
    path = own_table(tmp_path, launches)
    with environment(MAMBA_OPS_CONFIG_DIR=str(tmp_path)):
        launch_config.forget("gated_delta_rule_update")
        with pytest.raises(ValueError, match="gated_delta_rule_update") as raised:
            LAUNCHES(-1, 24, 16, 4)
    assert str(raised.value) == f"{path}: gated_delta_rule_update: {sentence}"


def test_a_table_cannot_set_what_is_wrong_otherwise(tmp_path):
    """The inverse of Kimi Delta Attention with four warps had wrong numbers on an H200."""
    sizes = {"k_dim": 16, "v_dim": 16, "operand": "float32"}
    table = {"kernels": {"chunk_kda": [{"sizes": sizes, "launches": {"_solve": {"num_warps": 4}}}]}}
    (tmp_path / f"{launch_config.family(-1)}.json").write_text(json.dumps(table))
    with environment(MAMBA_OPS_CONFIG_DIR=str(tmp_path)):
        launch_config.forget("chunk_kda")
        with pytest.raises(ValueError, match="_solve: got 'num_warps', expected nothing: its launch is as it must be"):
            launch_config.choosers["chunk_kda"](-1, *sizes.values())


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "Expecting value"),
        ("[]", "the table is no object"),
        ("{}", "kernels is no object"),
        ('{"kernels": []}', "kernels is no object"),
        ('{"kernels": {"scan": {}}}', "kernels of scan is no list"),
        ('{"kernels": {"scan": [3]}}', "an entry of scan is no object"),
        ('{"kernels": {"scan": [{"launches": {}}]}}', "sizes of scan is no object"),
        ('{"kernels": {"scan": [{"sizes": {}}]}}', "launches of scan is no object"),
        ('{"kernels": {"scan": [{"sizes": {}, "launches": {"_ends": 4}}]}}', "launches of scan, _ends is no object"),
    ],
)
def test_a_broken_table_is_an_error_that_names_it(text, got, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.json: got {got}.*, expected a table"):
        launch_config.load(path)


def test_a_table_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: got .*directory.*, expected a table"):
        launch_config.load(tmp_path)


def test_a_folder_of_tables_that_does_not_exist_is_said(tmp_path):
    with (
        environment(MAMBA_OPS_CONFIG_DIR=str(tmp_path / "none")),
        pytest.warns(RuntimeWarning, match="MAMBA_OPS_CONFIG_DIR: got .*none, expected a folder that exists"),
    ):
        assert len(launch_config.folders()) == 2


def test_a_familys_name_is_a_files_name(monkeypatch):
    """On XPU, Triton describes the device by a mapping of all its properties."""
    target = SimpleNamespace(backend="xpu", arch={"name": "Intel(R) Data Center GPU Max 1550", "is": 1})
    driver = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(_triton, "_find", lambda *_: driver)
    assert _triton.device_family() == "xpu-Intel-R-Data-Center-GPU-Max-1550"


# -- tuning -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tune(tmp_path, monkeypatch, device):
    """Tune one op with a clock that likes blocks of 4 and does not let the op run; return what was found."""
    monkeypatch.setattr(tuning, "UPDATES", ((3, 1),))
    seen, told = [], []

    def clock(call):
        args, op = call.args, "gated_delta_rule_update"
        state = args[0].clone()
        call()
        assert not torch.equal(state, args[0])  # it is mutated, so what the next trial gets has to be a copy
        launch = launch_config.rules[op](H100, 16, 16, 4)["_kernel"] | launch_config.forced[op].get("_kernel", {})
        seen.append((dict(launch), state))
        if launch["num_warps"] > 4:
            raise RuntimeError("out of resource: shared memory")
        return 1 + abs(math.log2(launch["BLOCK"] / 4))

    def run(*, sizes=None):
        return tuning.tune(
            ["gated_delta_rule_update"],
            device,
            tmp_path,
            sizes=sizes or {},
            dtype=torch.float32,
            state_dtype=torch.float32,
            progress=lambda *step: told.append(step),
            clock=clock,
        )

    run.folder, run.seen, run.told = tmp_path, seen, told
    return run


def test_tuning_keeps_what_is_fastest_in_a_table_that_is_then_used(tune, device):
    (tuned,) = tune()
    assert tuned.launches == {"_kernel": {"BLOCK": 4}}
    assert tuned.before_us > tuned.after_us
    assert tune.told[-1][1] == tune.told[-1][2]
    assert all(torch.equal(state, tune.seen[0][1]) for _, state in tune.seen)
    index = -1 if device.index is None else device.index
    table = launch_config.load(tune.folder / f"{launch_config.family(index)}.json")
    assert table["triton"]
    (entry,) = table["kernels"]["gated_delta_rule_update"]
    assert entry["sizes"] == {"v_dim": 16, "k_dim": 16, "itemsize": 4}
    with environment(MAMBA_OPS_CONFIG_DIR=str(tune.folder)):
        launch_config.forget("gated_delta_rule_update")
        assert LAUNCHES(index, 16, 16, 4)["_kernel"]["BLOCK"] == 4


def test_tuning_finds_a_launch_that_runs_where_the_rules_own_does_not(tune, monkeypatch):
    """A launch that the device refuses, before it runs or at the launch, says nothing of others."""
    kernel = ops()["gated_delta_rule_update"].kernels["triton"]
    rule = launch_config.rules["gated_delta_rule_update"](H100, 16, 16, 4)["_kernel"]
    most = rule["BLOCK"] // 4

    def rehearse(function, arguments):
        forced = launch_config.forced.get("gated_delta_rule_update", {}).get("_kernel", {})
        LAUNCHES(-1, 16, 16, 4)
        return "" if {**rule, **forced}["BLOCK"] <= most else "_kernel takes too much"

    monkeypatch.setattr(kernel.backend, "rehearse", rehearse)
    (tuned,) = tune()
    assert tuned.launches["_kernel"]["BLOCK"] <= most
    assert (tuned.before_us, tuned.us[0]) == (math.inf, None)
    assert len({tuple(launch.items()) for launch, _ in tune.seen}) > 1
    entry = json.loads(next(tune.folder.glob("*.json")).read_text())["kernels"]["gated_delta_rule_update"][0]
    assert entry["us"] == [None, tuned.after_us]
    assert kernel.rehearsed == {}  # another table may be read now


def test_tuning_goes_on_where_it_was(tune):
    tune()
    trials = len(tune.seen)
    assert tune() == []
    assert len(tune.seen) == trials
    (tuned,) = tune(sizes={"dim": 32})
    assert tuned.sizes["v_dim"] == 32
    table = json.loads(next(tune.folder.glob("*.json")).read_text())
    assert len(table["kernels"]["gated_delta_rule_update"]) == 2


def others_raise(name, sample):
    """As if launches with blocks of less than 8 did not run with activations of two bytes."""
    if sample.args[1].dtype == torch.bfloat16 and _block(name) < 8:
        raise RuntimeError("out of resource: shared memory")
    return RESULTS(name, sample)


def others_differ(name, sample):
    return [found + 1 if _block(name) < 8 else found for found in RESULTS(name, sample)]


def _block(name):
    rule = launch_config.rules[name](H100, 16, 16, 4)["_kernel"]
    return {**rule, **launch_config.forced.get(name, {}).get("_kernel", {})}["BLOCK"]


RESULTS = tuning._results


@pytest.mark.parametrize("results", [others_raise, others_differ])
def test_a_launch_is_kept_that_runs_with_all_dtypes_that_get_it_and_is_right(results, tune, monkeypatch):
    """By the clock alone, blocks of 4 are fastest."""
    monkeypatch.setattr(tuning, "_results", results)
    (tuned,) = tune()
    assert tuned.launches == {"_kernel": {"BLOCK": 8}}


def test_every_op_with_a_table_is_tuned_for_every_layer_that_has_it(tmp_path, monkeypatch, device):
    """The gated delta rule and KDA too, and the update that Mamba-1 shares with Mamba-2."""
    monkeypatch.setattr(tuning, "UPDATES", ((2, 1),))
    monkeypatch.setattr(tuning, "READS", ((1, 3),))
    known = {name for name, op in ops().items() if op.patterns and "triton" in op.kernels}
    with_rules = {name for name in launch_config.rules if not name.startswith("mutant_")}  # of tests before this one
    assert known == with_rules >= {"chunk_kda", "kda_update", "chunk_gated_delta_rule"}
    options = {"sizes": {}, "dtype": torch.float32, "state_dtype": torch.float32, "progress": lambda *_: None}
    found = tuning.tune(sorted(known), device, tmp_path, clock=lambda call: 1.0, **options)
    assert [tuned.op for tuned in found] == sorted([*known, "selective_state_update"])
    assert all(tuned.launches == {} for tuned in found)  # nothing was faster
    forms = [tuned.sizes["full_A"] for tuned in found if tuned.op == "selective_state_update"]
    assert forms == [False, True]
    (path,) = tmp_path.glob("*.json")
    with environment(MAMBA_OPS_CONFIG_DIR=str(tmp_path)):
        for tuned in found:
            index = -1 if device.index is None else device.index
            launch_config.forget(tuned.op)
            launch_config.choosers[tuned.op](index, *tuned.sizes.values())
    assert launch_config.load(path)["kernels"].keys() == known


TUNED = """
import torch
from pathlib import Path
from mamba_ops.cold_start import fitting, tuning
from mamba_ops.cold_start.specialization import our_modules
from mamba_ops.ops._triton import _triton
import triton

limit, taken, asked = 232_448, {}, []
modules = our_modules()
kernels = [f for m in modules for f in vars(m).values() if isinstance(f, triton.JITFunction)]

def note(*_, key, fn, compile, **__):
    if (fn.name, key) not in taken:
        taken[fn.name, key] = _triton.shared_memory(fn.jit_function, compile)
    asked.append(taken[fn.name, key])
    return True

def clock(call):
    asked.clear()
    call()
    if max(asked) > limit:
        raise RuntimeError("out of resource: shared memory")
    return 1e9 / (1 + sum(asked))

def results(name, sample):
    asked.clear()
    tuning._run(name, sample)()
    if max(asked) > limit:
        raise RuntimeError("out of resource: shared memory")
    return []

tuning._results, tuning._facts = results, lambda _: {}
tuning.READS, tuning.UPDATES = ((2, 70),), ((2, 1),)
name, folder, sizes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
options = {"sizes": sizes, "dtype": torch.bfloat16, "state_dtype": torch.float32, "progress": lambda *_: None}
with _triton.hook(_triton.BEFORE_LOAD, note, "-"), _triton.unloaded(kernels):
    found = tuning.tune([name], torch.device("cpu"), folder, clock=clock, **options)
print(json.dumps([[dict(t.sizes), t.launches] for t in found]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("chunk_kda", {"dim": 128}),
        ("chunk_gated_delta_rule", {"dim": 128}),
        ("mamba_chunk_scan", {"dim": 64, "dstate": 128, "chunk_size": 256}),
        ("kda_update", {"dim": 128}),
        ("gated_delta_rule_update", {"dim": 128}),
    ],
)
def test_what_tuning_writes_fits(name, sizes, tmp_path):
    """With a clock that likes shared memory: what is written takes much of it, in two bytes and in four."""
    from mamba_ops.cold_start import fitting

    found = compiled_for_a_gpu(TUNED, name, tmp_path, json.dumps(sizes), compiles=False)
    assert any(launches for _, launches in found), found
    [path] = tmp_path.glob("*.json")
    assert path.stem == "cuda-90"
    dims = {"k_dim": 128, "v_dim": 128} if sizes == {"dim": 128} else sizes
    with environment(MAMBA_OPS_CONFIG_DIR=str(tmp_path)):
        rows = list(fitting.fits(["sm_90"], ops=[name], dtypes=["bfloat16", "float32"], sizes=dims))
    assert rows
    assert not [str(row) for row in rows if not row.fits]
    told = " ".join(row.launch for row in rows if row.dtype == "bfloat16")
    for _, launches in found:
        for launch in launches.values():
            for number, value in launch.items():
                assert f"{number.removeprefix('num_')} {value}" in told
