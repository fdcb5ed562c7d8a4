"""What `python -m compile_tests --models` says: "yes", or why not; and that docs/models.md tells of all models."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from compile_tests import models
from mamba_ops.audit import absent
from tests.transformers_models import EVERY_MODEL

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def test_the_page_tells_of_every_model() -> None:
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        assert re.findall(r"^\| (\w+) \|", section, flags=re.MULTILINE) == ["model", *EVERY_MODEL]
        columns = tuple(models.CHECKS) if section.startswith("On a CPU") else models.TRACES
        assert f"| model | {' | '.join(columns)} |" in section


def test_a_check_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: object) -> None:
        torch.testing.assert_close(torch.zeros(2), torch.ones(2))

    monkeypatch.setattr(models, "CHECKS", {"wrong": wrong, "right": lambda _: None})
    assert models.check("mamba2") == {"wrong": "AssertionError: Tensor-likes are not close!", "right": "yes"}
    monkeypatch.setattr(models, "ALL_MODELS", ("mamba2",))
    said = models.section("cpu")
    assert "| mamba2 | no (1) | yes |" in said
    assert said.endswith("1. AssertionError: Tensor-likes are not close!\n")


def test_generating_other_tokens_is_noticed() -> None:
    subject = models._Subject("mamba2")
    subject.model.generate = lambda tokens, **options: torch.randint(60, tokens.shape)
    assert models._said(lambda: models._generate(subject)) == "AssertionError: other tokens"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba2", "qwen3_5"])
def test_what_the_page_says_of_a_model_is_so(name: str) -> None:
    assert set(models.check(name).values()) == {"yes"}
    found = absent.run("compile_tests.models:traced", name, device="xpu", timeout=3600)
    assert set(found.values()) == {"yes"}
