"""`mamba-ops doctor`: one screen that says what there is, what works and why the rest does not."""

import sys

import pytest
import torch

pytest.importorskip("typer", reason="the command needs mamba-ops[cli]")

from typer.testing import CliRunner

from mamba_ops.commands.cli import app
from mamba_ops.commands.doctor import facts
from mamba_ops.registry import backends


def doctor(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["doctor", *arguments])


def test_it_fits_a_screen_and_names_every_backend():
    result = doctor()
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) <= 50
    assert not [line for line in lines if len(line) > 80 and "/" not in line]  # but for a long path
    words = {line.split()[0] for line in lines if line.strip()}
    assert words >= {"Versions", "torch", "Devices", "cpu", "Backends", "Caches", "Launches", "Known", "What"}
    assert words >= {backend.name for backend in backends()}


def test_a_fact_that_cannot_be_found_out_is_said(monkeypatch):
    def fails(device):
        raise RuntimeError("the driver is broken")

    monkeypatch.setattr(facts, "described", fails)
    result = doctor()
    assert result.exit_code == 0
    assert "not known: RuntimeError: the driver is broken" in result.output


@pytest.mark.parametrize(
    ("installed", "platform", "sentence"),
    [
        ({"triton": "3.7.1", "triton-xpu": "3.3.0"}, "linux", "triton and triton-xpu are both installed"),
        ({"triton": "3.10.0"}, "linux", "Triton 3.10.0 has not been tried"),
        ({"triton": "3.6.0", "numpy": "2.4.6"}, "linux", "the interpreter of Triton 3.6.0 does not run with NumPy 2.4"),
        ({}, "win32", "there is no Triton for Windows on PyPI"),
        ({}, "darwin", "on a Mac ops run on torch"),
    ],
)
def test_known_faults_are_said(installed, platform, sentence, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert [fault for fault in facts.faults(installed) if fault.startswith(sentence)]


def test_good_versions_have_no_fault(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    assert list(facts.faults({"triton": "3.7.1", "transformers": "5.24.0"})) == []


def test_a_torch_that_is_too_old_is_a_fault(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert "older than 2.11" in next(facts.faults({}))


def test_an_unknown_gpu_is_answered_with_those_that_are_known():
    result = doctor("--target", "sm_12")
    assert result.exit_code == 2
    assert "unknown GPU 'sm_12'; valid: " in result.output
    assert "sm_120" in result.output


def test_a_size_that_is_none_is_wrong_usage():
    result = doctor("--target", "sm_86", "--size", "k_dim")
    assert result.exit_code == 2
    assert "expected a name and a number" in result.output


@pytest.mark.slow
def test_what_fits_a_gpu_is_shown_for_a_users_sizes():
    pytest.importorskip("triton")
    result = doctor("--target", "sm_75", "--size", "k_dim=64", "--size", "v_dim=64")
    assert result.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.strip()}
    assert set(rows["causal_conv1d"]) != {"torch"}
    assert len(rows["chunk_gated_delta_rule"]) == 3
