"""The backward pass of chunk_kda: gradients, determinism, packing; and that these tests catch bugs of its decays.

What it shares with the gated delta rule has its bugs planted in that op's tests.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_ops.ops._common.delta_rule import BackwardArguments
from mamba_ops.ops._common.delta_rule_backward import write_gradients
from mamba_ops.ops.chunk_kda import chunk_kda, reference, reference_backward
from tests.ops.chunk_gated_delta_rule.backward_calls import TOKENS
from tests.ops.chunk_kda.backward_calls import call, calls, strong
from tests.test_mutants import changed, load, source_of
from tests.training.backward import (
    Backward,
    assert_gradcheck,
    caught,
    check_halves,
    check_no_tokens,
    check_rows,
    front_of,
    judge,
    mutant_of,
    oracle_by_name,
    packed,
)

SMALL: dict[str, Any] = {"k_heads": 1, "v_heads": 2, "k_dim": 2, "v_dim": 2}
oracle = oracle_by_name(chunk_kda)
run_reference = front_of(reference_backward.chunk_kda_backward, BackwardArguments)


@pytest.fixture
def kernel() -> Backward:
    """The Triton kernels."""
    pytest.importorskip("triton")
    module = importlib.import_module("mamba_ops.ops.chunk_kda.triton")
    return front_of(module.chunk_kda_backward, BackwardArguments)


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_l2norm": False, "scale": 0.3}, {"initial_states": None}],
    ids=["all", "no l2norm", "no initial state"],
)
def test_gradcheck(changes: dict[str, Any]) -> None:
    assert_gradcheck(run_reference, oracle, call(1, 7, **SMALL, **changes))


@pytest.mark.slow
def test_gradcheck_two_chunks_packed() -> None:
    small = {**SMALL, "v_heads": 1, "v_dim": 1}
    assert_gradcheck(run_reference, oracle, call(68, **small, **packed(1, 1, 67)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference(dtype: torch.dtype) -> None:
    for arguments in calls(dtype):
        judge(run_reference, oracle, arguments)


def check_strong_decays(run: Backward, device: torch.device | str = "cpu") -> None:
    """Where a token forgets all, its decay and what came before it have no gradient, not even a rounding's."""
    for at in (5, 21, 66):  # in the first part of a chunk, in its second one, and in the second chunk
        arguments = call(1, 70, k_heads=1, v_heads=1, device=device)
        arguments["g"][0, at] = -1e4
        arguments["grad_output"][0, :at] = 0
        gradients = run(arguments)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        for name in ("q", "k", "v", "beta"):
            assert gradients[name][0, :at].count_nonzero() == 0, name
            assert gradients[name][0, at:].count_nonzero() > 0, name
        assert gradients["g"][0, : at + 1].count_nonzero() == 0
        assert gradients["initial_states"].count_nonzero() == 0


def test_a_channel_that_forgets_leaves_the_others() -> None:
    arguments = call(1, 40)
    arguments["g"][0, 20, :, 3] = -torch.inf
    judge(run_reference, oracle, arguments)
    gradients = run_reference(arguments)
    assert gradients["g"][0, 20, :, 3].count_nonzero() == 0
    assert gradients["g"][0, 20, :, 4].count_nonzero() > 0


def test_strong_decays_of_the_reference() -> None:
    check_strong_decays(run_reference)


def test_rows_of_the_reference() -> None:
    check_rows(run_reference, call(83, **packed(70, 70, 73, 77)), TOKENS)


def test_halves_of_the_reference() -> None:
    check_halves(run_reference, oracle, call(2, 75), TOKENS, 31)


@pytest.mark.parametrize("arguments", [call(2, 0), call(0, **packed(0, 0))], ids=["dense", "packed"])
def test_no_tokens(kernel: Backward, arguments: dict[str, Any]) -> None:
    check_no_tokens(run_reference, arguments, TOKENS)
    check_no_tokens(kernel, arguments, TOKENS)


@pytest.mark.parametrize("make", [call, strong])
def test_kernel_with_a_part_of_a_chunk(kernel: Backward, device: torch.device, make: Any) -> None:
    judge(kernel, oracle, make(1, 37, k_heads=1, v_heads=1, device=device))


@pytest.mark.slow  # interpreted, a call takes half a minute
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel(kernel: Backward, device: torch.device, dtype: torch.dtype) -> None:
    for arguments in calls(dtype, device):
        judge(kernel, oracle, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_with_tiles_as_in_models(kernel: Backward, device: torch.device, dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"k_dim": 128, "v_dim": 128, "dtype": dtype, "device": device}
    judge(kernel, oracle, call(1, 150, **sizes))
    judge(kernel, oracle, strong(1, 150, **sizes))


@pytest.mark.slow
def test_strong_decays_of_the_kernel(kernel: Backward, device: torch.device) -> None:
    check_strong_decays(kernel, device)


@pytest.mark.slow
def test_rows_of_the_kernel(kernel: Backward, device: torch.device) -> None:
    check_rows(kernel, call(83, **packed(70, 70, 73, 77, device=device), device=device), TOKENS)


BUGS = {
    "pairs of two parts dropped": ("grad_keys[:, :, :part] += given", "pass"),
    "rows not decayed": ("(own @ earlier) * self.opening[:, :, part]", "own @ earlier"),
    "parts between dropped": ("+ spanned.unsqueeze(3)", ""),
    "decays before rows dropped": ("_from((grad_rows * both).sum(0), 3) + spanned", "spanned"),
    "decays after keys dropped": ("given.cumsum(3)[:, :, :, :-1]", "0 * given[:, :, :, :-1]"),
    "decays of a part's pairs": ("torch.where(place > j, _from(read * key, 3), 0)", "_from(read * key, 3)"),
    "keys of a part's pairs": ("grad_keys[:, :, :, j] += read.sum(3)", "pass"),
    "rows of keys dropped": ("grad_keys = grad_keys + grad_rows[0]", "pass"),
    "part not decayed until the next": ("given = until * (own.mT", "given = (own.mT"),
    "exponent without the last token": ("exponents + self.parts[:, :, :, j + 1 : j + 2]", "exponents"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str) -> None:
    decays = mutant_of(reference, BUGS[bug])["ChannelDecays"]
    mutant = front_of(lambda call: write_gradients(call, decays), BackwardArguments)
    assert caught(mutant, oracle, (call(1, 70), strong(1, 70)))


KERNEL_BUGS = {
    "chunks not joined": ("grad_s * decay[None, :]", "grad_s * 0"),
    "heads not summed": (
        "range(k_head * PER_KEY, (k_head + 1) * PER_KEY)",
        "range(k_head * PER_KEY, k_head * PER_KEY + 1)",
    ),
    "final gradient dropped": ("    if grad_final_states is not None:", "    if False:"),
    "what is left after a chunk": ("known + left)", "known)"),
    "strength of the system dropped": ("given += tl.sum(grad_system", "given += 0 * tl.sum(grad_system"),
    "what is known counts nothing": ("given - knows, t < high", "given, t < high"),
    "decay of the chunk dropped": ("(whole * met)[None, :]", "0 * met[None, :]"),
    "decays between parts dropped": (" + spanned[None, :]", ""),
    "part after it not read": ("given += total * decay", "given += 0 * total"),
    "rows not decayed": ("    by_query *= opening", "    by_query *= 1"),
    "keys of a part's pairs": ("tl.sum(pairs, axis=0)[None, :], 0.0)", "0.0, 0.0)"),
    "decays of a part's pairs": ("tl.where(i[:, None] > j, pairs, 0.0)", "pairs"),
    "norm not differentiated": ("return (grad - x *", "return (grad - 0 * x *"),
}


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=pytest.mark.slow if number else ()) for number, bug in enumerate(KERNEL_BUGS)]
)
def test_bug_planted_in_the_kernel_is_caught(bug: str, device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    module = load(tmp_path / "mutant_chunk_kda.py", changed(source_of(chunk_kda), KERNEL_BUGS[bug]))
    mutant = front_of(module.chunk_kda_backward, BackwardArguments)
    assert caught(mutant, oracle, (call(1, 70, k_heads=1, v_heads=2, device=device),))
