"""The example that evaluates a checkpoint, on a small one with random weights."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="it runs models of Transformers")

from examples.evaluate_checkpoint import evaluate, main
from mamba_ops.commands.targets import transformers_model

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return transformers_model("mamba2", CPU, layers=1, width=32)


def test_a_checkpoint_is_evaluated_side_by_side(model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    text = tmp_path / "text"
    text.write_bytes(bytes(range(200)))
    assert main([str(tmp_path / "checkpoint"), str(text), "--window", "64", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "text, 200 tokens in windows of 64, on cpu" in printed
    stock, ours = (float(number) for number in re.findall(r"perplexity ([\d.]+)", printed))
    expected, _ = evaluate(model, list(range(200)), 64, CPU)
    assert stock == pytest.approx(expected)
    assert ours == pytest.approx(expected)


def test_the_perplexity_of_a_model_that_knows_nothing(model) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    for window in (1, 7, 100):
        assert evaluate(model, list(range(20)), window, CPU)[0] == pytest.approx(256)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "got nowhere, expected mamba2, or a folder with a checkpoint"),
        (["mamba2", "no text"], "No such file or directory: 'no text'"),
    ],
)
def test_wrong_usage(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
