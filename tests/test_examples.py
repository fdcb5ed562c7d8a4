"""Every example runs by itself, as a user would run it; the decode step is one graph on a device that is not here."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mamba_ops.audit import absent
from tests import fresh

TRAINING = "train_bytes.py"  # trains for two minutes, as it is
EXAMPLES = [e for e in sorted((Path(__file__).parents[1] / "examples").glob("*.py")) if e.name != TRAINING]
NEEDS = {"transformers": "transformers", "accelerate": "finetune"}  # what an example names, and the extra with it
BRIEFLY = {
    "finetune_transformers.py": ("--steps", "2", "--window", "32"),
    "continuous_batching.py": ("--requests", "24"),
}
COMPILING = ("continuous_batching.py", "decode_step.py", "shared_prefixes.py")
SLOW = ("finetune_transformers.py",)  # imports much; tests/test_finetune_transformers.py has what is quick
WHOLE = ("continuous_batching.py",)  # as they are, too, but not every day


@pytest.mark.parametrize(
    ("example", "options"),
    [
        *(
            pytest.param(e, BRIEFLY.get(e.name, ()), id=e.name, marks=[pytest.mark.slow] if e.name in SLOW else ())
            for e in EXAMPLES
        ),
        *(pytest.param(e, (), id=f"{e.name}, whole", marks=pytest.mark.slow) for e in EXAMPLES if e.name in WHOLE),
    ],
)
def test_an_example_runs(example: Path, options: tuple[str, ...], tmp_path: Path):
    for package, extra in NEEDS.items():
        if package in example.read_text():
            pytest.importorskip(package, reason=f"the example needs mamba-ops[{extra}]")
    # A RuntimeWarning is one of ours; torch has its own, that depend on the machine.
    done = fresh.run([*fresh.STRICT, example, *options], cwd=tmp_path, is_warm=example.name in COMPILING)
    assert done.returncode == 0, done.stdout + done.stderr
    if example.name == "continuous_batching.py":
        requests = options[1] if options else "64"
        assert f"OK: {requests} of {requests} requests equal, token for token, to themselves alone" in done.stdout
        [mixed] = re.findall(r"decodes beside prompts: \d+ \((\d+)%\)", done.stdout)
        assert int(mixed) >= 30
        assert "9 and 9 in 2 graphs (2 x 4 layers + 1 = 9)" in done.stdout
    if example.name == "shared_prefixes.py":
        assert "OK: 24 of 24 requests equal to themselves alone" in done.stdout
        [known] = re.findall(r"(\d+) were not read", done.stdout)
        [(guessed, kept)] = re.findall(r"of (\d+) guesses (\d+) were right; 1 graphs", done.stdout)
        assert int(known) > 400
        assert int(kept) > int(guessed) / 4
    if example.name == "port_from_mamba_ssm.py":
        [(first, last)] = re.findall(r"loss ([\d.]+) before, ([\d.]+) after", done.stdout)
        assert float(last) < float(first) - 2
    if example.name == "transformers_generate.py":
        assert "modeling_mamba2.mamba2_chunk_scan runs on mamba_ops" in done.stderr
        assert "32 tokens, " in done.stderr
        assert done.stdout.strip()
    if example.name == "decode_step.py":
        assert "torch: mamba_ops::causal_conv1d_update on torch" in done.stdout
        assert "graphs compiled for all of this: 1\n" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "mamba", "gdn"])
def test_training_on_bytes_learns(family: str, tmp_path: Path):
    options = ("--size", "tiny", "--steps", "60", "--rate", "0.01", "--length", "20", "--family", family)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 20)
    command = (*fresh.STRICT, EXAMPLES[0].parent / TRAINING, text, *options)
    done = fresh.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = torch.load(tmp_path / "train_bytes.pt")["losses"]
    assert len(losses) == 60
    assert losses[0] > 5
    assert losses[-1] < 1.5
    if find_spec("matplotlib"):
        assert (tmp_path / "train_bytes.png").stat().st_size > 0
    else:
        assert "no plot: it needs mamba-ops[plot]" in done.stdout


@pytest.mark.slow
def test_the_engine_in_bfloat16_is_as_exact_as_each_request_alone(tmp_path: Path):
    command = (EXAMPLES[0].parent / "continuous_batching.py", "--dtype", "bfloat16", "--requests", "12")
    done = fresh.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK: logits off by " in done.stdout


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shared_prefixes.py", ("--drafts", "0")),
        pytest.param("continuous_batching.py", ("--backends", "torch"), marks=pytest.mark.slow),
    ],
)
def test_an_engine_without_drafts_or_a_second_backend_serves(name: str, options: tuple[str, ...], tmp_path: Path):
    done = fresh.run((EXAMPLES[0].parent / name, "--requests", "2", *options), cwd=tmp_path, is_warm=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK: 2 of 2 requests equal" in done.stdout


def child_decode(*, device: str) -> absent.Trace:
    from examples.decode_step import Mixer

    mixer = Mixer(hidden=128, heads=4, dim=64, dstate=32, groups=1, width=4, slots=16)
    tracer = absent.Tracer(mixer, device=device, dynamic=True)
    for rows in (4, 6, 3):
        tracer(torch.randn(rows, 128), torch.arange(rows))
    return tracer.trace


@pytest.mark.skipif(torch.xpu.is_available(), reason="here it runs")
def test_the_decode_step_is_one_graph_on_xpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trace = absent.run("tests.test_examples:child_decode", device="xpu")
    [graph] = trace["graphs"]
    assert trace["breaks"] == trace["recompiles"] == []
    assert trace["stopped"] is None
    assert [op for op in graph["ops"] if op.startswith("mamba_ops")] == [
        "mamba_ops.causal_conv1d_update.default",
        "mamba_ops.selective_state_update.default",
    ]
