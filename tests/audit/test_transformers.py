"""Stock models of Transformers through the command: small ones are built, and every audit ends in time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs mamba-ops[transformers]")
pytest.importorskip("typer", reason="the command needs mamba-ops[cli]")

from transformers import MambaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mamba_ops.audit import audit
from mamba_ops.audit.report import Report
from mamba_ops.audit.source_locations import Layers
from mamba_ops.commands.audit.models import ModelNameError, build
from mamba_ops.compat.transformers import use_mamba_ops

MODELS = ("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "qwen3_next")
DEVICES = ["cpu", *(name for name in ("cuda", "xpu") if not torch.get_device_module(name).is_available())]
SECONDS = 60.0


def test_models_are_built_small_with_each_kind_of_layer():
    model, inputs = build("qwen3_next")
    assert model.config.num_hidden_layers == 2
    assert sorted(set(model.config.layer_types)) == ["full_attention", "linear_attention"]
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_a_folder_with_a_config_keeps_its_type_and_with_full_its_sizes(tmp_path):
    MambaConfig(hidden_size=96, num_hidden_layers=3, vocab_size=50).save_pretrained(tmp_path)
    small, _ = build(str(tmp_path))
    assert (small.config.hidden_size, small.config.num_hidden_layers) == (64, 2)
    full, _ = build(str(tmp_path), full=True)
    assert (full.config.hidden_size, full.config.num_hidden_layers) == (96, 3)
    assert build(str(tmp_path), layers=5)[0].config.num_hidden_layers == 5


@pytest.mark.parametrize("name", ["falcon_h1", "granitemoehybrid", "llama", "olmo_hybrid", "zamba2"])
def test_other_families_are_made_small_too(name):
    """`build` runs them once."""
    model, _ = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6


def test_an_unknown_model_is_a_sentence():
    with pytest.raises(
        ModelNameError, match=r"^got nosuch, expected a model type of Transformers or a folder: .{,80}$"
    ):
        build("nosuch")


@pytest.mark.parametrize(
    ("name", "mixers"),
    [
        ("lfm2", {"Lfm2ShortConv", "Lfm2Attention"}),
        ("granitemoehybrid", {"GraniteMoeHybridMambaLayer", "GraniteMoeHybridAttention"}),
        ("kimi_linear", {"KimiLinearDeltaAttention", "KimiLinearAttention"}),
        ("zamba", {"ZambaMambaMixer", "ZambaAttention"}),
        ("xlstm", {"xLSTMLayer"}),
    ],
)
def test_a_family_has_one_of_each_kind_of_its_mixers(name, mixers):
    assert set(Layers(build(name)[0]).mixers) == mixers


@pytest.mark.parametrize("name", ["gptj", "codegen", "blt"])
def test_sizes_under_other_names_are_made_small(name):
    model, _ = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6


@pytest.mark.parametrize("name", ["vit", "pvt_v2", "clip_vision_model", "aimv2_text_model"])
def test_what_takes_no_tokens_is_a_sentence(name):
    with pytest.raises(ModelNameError, match=f"^{name}: it (takes pixel_values|is a part of other models)"):
        build(name)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 800 names
def test_every_name_is_built_small_or_is_a_sentence():
    built, said = [], {}
    for name in sorted(CONFIG_MAPPING_NAMES):
        try:
            model, _ = build(name)
        except ModelNameError as error:
            said[name] = str(error)
        else:
            built.append((name, sum(parameter.numel() for parameter in model.parameters())))
    assert len(built) > 250
    assert [name for name, sentence in said.items() if name not in sentence or "\n" in sentence] == []
    assert max(count for _, count in built) <= 50_000_000
    recurrent = (
        "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba"
    )
    recurrent += (
        " mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_next qwen4_exp recurrent_gemma rwkv xlstm zamba zamba2"
    )
    assert not set(recurrent.split()) & set(said)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "kimi_linear"])
def test_use_mamba_ops_is_advised_where_it_binds_the_model(name):
    """Followed, the advice would raise for these."""
    model, inputs = build(name)
    report = audit(model, **inputs)
    paths = [finding for finding in report.findings if finding.cause == "reference-path"]
    with pytest.raises(ValueError, match="expected a model of Transformers 5"):
        use_mamba_ops(model)
    assert not any("use_mamba_ops" in finding.remedy for finding in paths)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_stock_models_are_audited_in_time(name: str, device: str, tmp_path: Path) -> None:
    """Processor time, which other work on the machine does not add to."""
    file = tmp_path / "report.json"
    code = "from mamba_ops.commands.cli import main; main()"
    command = [sys.executable, "-c", code, "audit", f"transformers:{name}", "--device", device, "--json", str(file)]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stdout + done.stderr
    report = Report.from_json(file.read_text())
    assert report.finished
    assert report.absent == (device != "cpu")
    assert len(report.calls) == 4
    assert not any(finding.breaks for finding in report.findings)
    # Each stock mixer says that its kernels are not installed, at a line of its own file.
    fallbacks = [finding for finding in report.findings if finding.cause == "reference-path"]
    assert fallbacks
    for finding in fallbacks:
        assert f"/models/{name}/" in finding.where.file
        assert "use_mamba_ops" in finding.remedy
        assert "mamba_ops.causal_conv1d" in finding.remedy or "scan" in finding.remedy or "delta_rule" in finding.remedy
    used = sum(getattr(after, kind) - getattr(before, kind) for kind in ("children_user", "children_system"))
    assert used < SECONDS


@pytest.mark.slow
def test_on_our_ops_the_slow_paths_are_gone(tmp_path: Path) -> None:
    """And Transformers' files are as they were afterwards."""
    from transformers.models.mamba2 import modeling_mamba2
    from typer.testing import CliRunner

    from mamba_ops.commands.cli import app

    before = dict(vars(modeling_mamba2))
    file = tmp_path / "stock.json"
    options = ["audit", "transformers:mamba2", "--layers", "1", "--shapes", "2x32"]
    stock = CliRunner().invoke(app, [*options, "--json", str(file), "--fail-on", "fallback"])
    assert stock.exit_code == 1, stock.output
    ours = CliRunner().invoke(app, [*options, "--ours", "--compare", str(file), "--fail-on", "fallback"])
    assert ours.exit_code == 0, ours.output
    assert "Nothing to change: 1 graph, no break." in ours.output
    assert ours.output.count("gone: slow paths taken in silence") == 2
    assert "mamba_chunk_scan ran on torch (1)" in ours.output
    assert {name: vars(modeling_mamba2)[name] for name in before} == before
