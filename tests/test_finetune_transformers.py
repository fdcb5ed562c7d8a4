"""The example that fine-tunes a model of Transformers with Trainer."""

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="it trains models of Transformers")

from examples.finetune_transformers import Windows, main
from mamba_ops.commands.targets import transformers_model
from mamba_ops.registry import record_selections
from tests.transformers_models import new_model


def test_windows_are_pieces_of_the_text() -> None:
    windows = Windows(list(range(11)), 4)
    assert [row["input_ids"].tolist() for row in windows] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(windows[1]["labels"], windows[1]["input_ids"])


def losses(printed: str) -> tuple[float, float]:
    [(before, after)] = re.findall(r"held out: ([\d.]+) bits a token before, ([\d.]+) after", printed)
    return float(before), float(after)


@pytest.mark.slow
def test_it_learns_and_saves_what_it_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs it")
    text = tmp_path / "text"
    text.write_bytes(b"to be or not to be, " * 100)
    options = ["--steps", "60", "--window", "40", "--batch", "4", "--device", "cpu", "--out", str(tmp_path / "saved")]
    with record_selections() as record:
        assert main(["mamba2", str(text), *options]) == 0
    ops = {selection.op.partition("::")[2] for selection in record}
    assert {"mamba_chunk_scan_backward", "causal_conv1d_backward", "selective_state_update"} <= ops
    printed = capsys.readouterr().out
    before, after = losses(printed)
    assert before > 7
    assert after < 0.5
    assert "to be or not to be" in printed
    saved = transformers_model(str(tmp_path / "saved"), torch.device("cpu"))
    loss = saved(**{name: row[None] for name, row in Windows(list(text.read_bytes()), 40)[0].items()}).loss
    assert float(loss.detach()) < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "qwen3_5"])
def test_a_checkpoint_of_another_family(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs it")
    new_model(name, "cpu", vocab_size=256).save_pretrained(tmp_path / "checkpoint")
    text = tmp_path / "text"
    text.write_bytes(b"to be or not to be, " * 50)
    options = ["--steps", "30", "--window", "20", "--batch", "4", "--device", "cpu"]
    assert main([str(tmp_path / "checkpoint"), str(text), *options]) == 0
    before, after = losses(capsys.readouterr().out)
    assert after < before - 2


def test_a_text_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs it")
    (tmp_path / "text").write_bytes(b"short")
    with pytest.raises(SystemExit):
        main(["mamba2", str(tmp_path / "text"), "--device", "cpu"])
    assert "got a text of 5 tokens, expected at least 256: two windows" in capsys.readouterr().err


def test_without_accelerate_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit):
        main([])
    assert "pip install 'mamba-ops[finetune]'" in capsys.readouterr().err
