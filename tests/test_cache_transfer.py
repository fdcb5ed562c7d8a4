"""Caches of compiled kernels are carried to identical machines, and to no others."""

import json
import sys

import pytest
import torch

pytest.importorskip("typer", reason="the command needs mamba-ops[cli]")

from typer.testing import CliRunner

from mamba_ops.cold_start import transfer
from mamba_ops.commands import cli
from tests.harness import compiled_for_a_gpu

CPU = torch.device("cpu")

EXPORTED = """
from pathlib import Path
import torch, mamba_ops
from mamba_ops.cold_start import transfer

report = mamba_ops.warm_up("gated_delta_rule_update", device="cpu")
print(json.dumps([report.compiled, transfer.export(Path(sys.argv[1]), torch.device("cpu"))]))
"""
BROUGHT = """
from pathlib import Path
import torch, mamba_ops
from mamba_ops.cold_start import transfer

count, again = (transfer.bring(Path(sys.argv[1]), torch.device("cpu")) for _ in range(2))
report = mamba_ops.warm_up("gated_delta_rule_update", device="cpu")
print(json.dumps([count, again, report.compiled, report.loaded]))
"""


@pytest.mark.slow
def test_with_another_machines_caches_nothing_compiles(tmp_path):
    def run(code, machine):
        caches = {f"{name}_CACHE_DIR": str(tmp_path / machine / name) for name in ("TRITON", "TORCHINDUCTOR")}
        return compiled_for_a_gpu(code, tmp_path / "exported", **caches)

    compiled, files = run(EXPORTED, "one")
    (tmp_path / "one").rename(tmp_path / "gone")  # no file may be found by its old place
    count, again, recompiled, loaded = run(BROUGHT, "two")
    assert (recompiled, loaded) == (0, compiled)
    assert count == files > 5 * compiled
    assert again == 0


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """A machine with a cache of one file, and an export of it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    (tmp_path / "triton" / "abc").mkdir(parents=True)
    (tmp_path / "triton" / "abc" / "kernel.cubin").write_bytes(b"machine code")
    assert transfer.export(tmp_path / "exported", CPU) == 1
    return tmp_path


@pytest.mark.parametrize("fact", ["torch", "triton", "python", "gpu", "driver"])
def test_caches_of_another_machine_are_refused_with_the_reason(fact, caches):
    manifest = caches / "exported" / transfer.MANIFEST
    facts = json.loads(manifest.read_text())
    here = facts.get(fact, "nothing")
    manifest.write_text(json.dumps(facts | {fact: "another"}))
    expected = f"not for this machine: {fact} is {here} here and another there"
    with pytest.raises(transfer.CachesError, match=expected.replace("+", r"\+")):
        transfer.bring(caches / "exported", CPU)
    with pytest.raises(transfer.CachesError, match="has the caches of something else"):
        transfer.export(caches / "exported", CPU)


def test_what_is_no_export_is_refused(caches, monkeypatch):
    with pytest.raises(transfer.CachesError, match="there is no mamba_ops_caches"):
        transfer.bring(caches, CPU)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(caches / "none"))
    with pytest.raises(transfer.CachesError, match="there are no caches in"):
        transfer.export(caches / "more", CPU)


@pytest.mark.parametrize(
    "manifest", ["", "[]", '"facts"', "7", "null", '{"torch": 2}', '{"torch"', "[" * 100_000, "\xff"]
)
def test_a_manifest_that_is_none_is_refused(manifest, caches):
    path = caches / "exported" / transfer.MANIFEST
    path.write_bytes(manifest.encode("latin-1"))
    for call in (transfer.bring, transfer.export):
        with pytest.raises(transfer.CachesError, match=r"mamba_ops_caches.json: .*expected what --export wrote"):
            call(caches / "exported", CPU)


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("which", [".", transfer.MANIFEST, "triton/abc", "triton/abc/kernel.cubin"])
def test_what_others_may_write_is_not_brought(which, mode, caches):
    path = caches / "exported" / which
    (caches / "triton" / "abc" / "kernel.cubin").unlink()
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(
        transfer.CachesError, match=r"may be written by others \([-dwrx]+\), expected by its owner alone"
    ):
        transfer.bring(caches / "exported", CPU)
    assert not (caches / "triton" / "abc" / "kernel.cubin").exists()


def test_what_another_user_owns_is_not_brought(caches, monkeypatch):
    owner = (caches / "exported").stat().st_uid
    monkeypatch.setattr(transfer.os, "getuid", lambda: owner + 1)
    if owner == 0:
        assert transfer.bring(caches / "exported", CPU) == 0  # root's are trusted
    else:
        with pytest.raises(transfer.CachesError, match=f"belongs to user {owner}, expected you or root"):
            transfer.bring(caches / "exported", CPU)


@pytest.mark.parametrize("which", [".", transfer.MANIFEST, "triton", "triton/abc/kernel.cubin"])
def test_symbolic_links_are_not_followed(which, caches):
    path = caches / "exported" / which
    elsewhere = path.rename(caches / "elsewhere")
    (caches / "exported" / which).symlink_to(elsewhere)
    with pytest.raises(transfer.CachesError, match="is a symbolic link, expected caches as files"):
        transfer.bring(caches / "exported", CPU)


def test_only_locks_are_left_behind(caches):
    """Kernels with "lock" in their names are carried, as block_scan."""
    folder = caches / "triton" / "abc"
    for name in ("block_scan.cubin", "clock.json", "lock", "locks.py", "kernel.lock"):
        (folder / name).write_bytes(b"1")
    assert transfer.export(caches / "exported", CPU) == 3
    found = {path.name for path in (caches / "exported" / "triton" / "abc").iterdir()}
    assert found == {"kernel.cubin", "block_scan.cubin", "clock.json", "locks.py"}


@pytest.mark.parametrize("text", ["[]", "{}", '{"child_paths": 1}', '{"child_paths": {"a": 1}}', "no json"])
def test_a_list_of_files_that_is_none_is_refused(text, caches):
    path = caches / "exported" / "triton" / "abc" / "__grp__kernel.json"
    path.write_text(text)
    path.chmod(0o644)
    with pytest.raises(
        transfer.CachesError, match=r"__grp__kernel.json: got no list of files .* expected one that Triton"
    ):
        transfer.bring(caches / "exported", CPU)


# -- the commands -----------------------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_the_command_exports_and_imports(caches):
    (caches / "triton" / "abc" / "kernel.cubin").unlink()
    done = command("warm-up", "--device", "cpu", "--import", caches / "exported", "--export", caches / "exported")
    assert done.exit_code == 0, done.output
    told, *counts = done.output.splitlines()
    assert told.startswith("Caches are code, which processes that load them run")
    assert counts == [f"1 files from {caches / 'exported'}", f"0 files to {caches / 'exported'}"]
    assert (caches / "triton" / "abc" / "kernel.cubin").read_bytes() == b"machine code"


def test_the_command_warms_up_an_op_and_a_model(tmp_path):
    done = command("warm-up", "causal_conv1d", "--device", "cpu", "--size", "dim=16", "--rows", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "mamba_ops::causal_conv1d" in done.output
    assert "variants of 1 ops in" in done.output
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom mamba_ops.layers import Mamba\n"
        "def make():\n    return Mamba(16, dstate=4), torch.ones(1, 2, 16)\n"
    )
    done = command("warm-up", f"{tmp_path / 'mine.py'}:make", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "variants of 5 ops in" in done.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["warm-up"], "got nothing to warm up, expected a model or the name of an op"),
        (["warm-up", "causal_conv1d", "--size", "dim"], "--size: got 'dim', expected a name and a number"),
        (["warm-up", "causal_conv1d", "--dtype", "int4"], "--dtype: got 'int4', expected one of"),
        (["warm-up", "causal_conv1d", "--backend", "cutlass"], "unknown backend 'cutlass'"),
        (["warm-up", "--import", "/nowhere"], "there is no mamba_ops_caches.json in /nowhere"),
        (["warm-up", "causal_conv1d", "--size", "dstate=16"], "unknown size 'dstate'; valid: dim, length, width"),
        (
            ["tune", "causal_conv1d", "--out", "/nowhere", "--device", "cpu"],
            "got cpu, expected a GPU with Triton",
        ),
        (["tune", "no_such_op", "--out", "/nowhere", "--device", "cpu"], "unknown op 'no_such_op'"),
        (["tune", "mamba2_mixing", "--out", "/nowhere", "--device", "cpu"], "mamba2_mixing has no launches of its own"),
    ],
)
def test_the_commands_end_with_a_sentence_for_what_is_wrong(arguments, sentence):
    done = command(*arguments)
    assert done.exit_code == 2
    assert sentence in done.output


@pytest.mark.parametrize("is_set", [True, False])
def test_inductors_cache_is_found_in_a_torch_that_does_not_say_where_it_is(is_set, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # put back afterwards: cache_dir() sets it
    if not is_set:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch._inductor.runtime.cache_dir_utils", None)
        found = transfer._inductor_cache()
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert str(found) == cache_dir()
