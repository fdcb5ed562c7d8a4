"""The backward pass of chunk_gated_delta_rule: gradients, determinism, packing; and that these tests catch bugs."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_ops.ops._common import delta_rule_backward
from mamba_ops.ops.chunk_gated_delta_rule import chunk_gated_delta_rule, reference, reference_backward
from mamba_ops.ops.chunk_gated_delta_rule.training import BackwardArguments
from tests.ops.chunk_gated_delta_rule.backward_calls import TOKENS, call, calls, strong
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

DTYPES = [torch.float32, torch.bfloat16]
SMALL: dict[str, Any] = {"k_heads": 1, "v_heads": 2, "k_dim": 2, "v_dim": 2}
oracle = oracle_by_name(chunk_gated_delta_rule)
run_reference = front_of(reference_backward.chunk_gated_delta_rule_backward, BackwardArguments)


@pytest.fixture
def kernel() -> Backward:
    """The Triton kernels."""
    pytest.importorskip("triton")
    module = importlib.import_module("mamba_ops.ops.chunk_gated_delta_rule.triton")
    return front_of(module.chunk_gated_delta_rule_backward, BackwardArguments)


def judge_all(run: Backward, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    for arguments in calls(dtype, device):
        judge(run, oracle, arguments)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype: torch.dtype) -> None:
    judge_all(run_reference, dtype)


def check_strong_decays(run: Backward, device: torch.device | str = "cpu") -> None:
    """Where a token forgets all, its decay and what came before it have no gradient, not even a rounding's."""
    arguments = call(1, 70, k_heads=1, v_heads=1, device=device)
    at = 66
    arguments["g"][0, at] = -1e4
    arguments["grad_output"][0, :at] = 0
    gradients = run(arguments)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for name in ("q", "k", "v", "beta"):
        assert gradients[name][0, :at].count_nonzero() == 0, name
        assert gradients[name][0, at:].count_nonzero() > 0, name
    assert gradients["g"][0, : at + 1].count_nonzero() == 0
    assert gradients["initial_states"].count_nonzero() == 0


def rows_call(device: torch.device | str = "cpu") -> dict[str, Any]:
    return call(83, device=device, **packed(70, 70, 73, 77, device=device))


def test_strong_decays_of_the_reference() -> None:
    check_strong_decays(run_reference)


def test_rows_of_the_reference() -> None:
    check_rows(run_reference, rows_call(), TOKENS)


def test_halves_of_the_reference() -> None:
    check_halves(run_reference, oracle, call(2, 75), TOKENS, 31)


@pytest.mark.parametrize("arguments", [call(2, 0), call(0, **packed(0, 0))], ids=["dense", "packed"])
def test_no_tokens(kernel: Backward, arguments: dict[str, Any]) -> None:
    check_no_tokens(run_reference, arguments, TOKENS)
    check_no_tokens(kernel, arguments, TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_kernel(kernel: Backward, device: torch.device, dtype: torch.dtype) -> None:
    judge_all(kernel, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_with_tiles_as_in_models(kernel: Backward, device: torch.device, dtype: torch.dtype) -> None:
    """Products of 64 x 128 tiles: Triton 3.4 to 3.7.0 were seen to compile such a backward pass wrongly for Hopper."""
    sizes: dict[str, Any] = {"k_dim": 128, "v_dim": 128, "dtype": dtype, "device": device}
    judge(kernel, oracle, call(1, 150, **sizes))
    judge(kernel, oracle, strong(1, 150, **sizes))


def test_every_form(kernel: Backward, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs run whose matrix units read shared memory."""
    launch = importlib.import_module("mamba_ops.ops.chunk_gated_delta_rule.triton.backward_launch")
    rule = launch._backward_launches
    forms = {"_systems": "SQUARES", "_replay": "TURNS", "_adjoints": "TURNS"}

    def changed(*sizes: Any) -> dict[str, dict[str, Any]]:
        return {
            name: {**chosen, **({forms[name]: True} if name in forms else {})} for name, chosen in rule(*sizes).items()
        }

    monkeypatch.setattr(launch, "_backward_launches", changed)
    judge_all(kernel, torch.float32, device)
    judge(kernel, oracle, call(1, 70, v_dim=36, device=device))


def test_strong_decays_of_the_kernel(kernel: Backward, device: torch.device) -> None:
    check_strong_decays(kernel, device)


@pytest.mark.slow
def test_rows_of_the_kernel(kernel: Backward, device: torch.device) -> None:
    check_rows(kernel, rows_call(device), TOKENS)


BUGS = {
    "final gradient dropped": ("grad_state = call.grad_final_states.to(compute)", "pass"),
    "gradient of the state dropped": ("store_rows(grad_ended, piece, grad_state, exists)", "pass"),
    "gradient not decayed": ("before = whole[piece] * grad_state", "before = grad_state"),
    "heads not summed": (".unflatten(1, (k_heads, -1)).sum(2)", ".unflatten(1, (k_heads, -1))[:, :, 0]"),
    "system without strength": ("grad_system * strength, grad", "grad_system, grad"),
    "strength of the system dropped": (" + (grad_system * key_products).sum(3)", ""),
    "decays within a chunk": ("grad_decay + of_decays(read_q", "grad_decay - of_decays(read_q"),
    "decay of the chunk dropped": ("of_decays((whole * grad_ended", "of_decays((0 * grad_ended"),
    "scale dropped": ("of_keys(grad_queries) * scale", "of_keys(grad_queries)"),
    "norm not differentiated": ("(grad - unit * (unit * grad).sum(-1, keepdim=True))", "grad"),
}
BUGS_OF_DECAYS = {
    "keys of the system once": ("(by_keys + by_keys.mT) @ keys", "by_keys @ keys"),
    "keys of the system not decayed": ("grad_of_keys * self.between", "grad_of_keys"),
    "pairs of keys dropped": (" + grad_of_keys * key_products", ""),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str) -> None:
    write = mutant_of(delta_rule_backward, BUGS[bug])["write_gradients"]
    mutant = front_of(lambda call: write(call, reference.HeadDecays), BackwardArguments)
    assert caught(mutant, oracle, calls(torch.float32))


@pytest.mark.parametrize("bug", BUGS_OF_DECAYS)
def test_planted_bug_of_decays_is_caught(bug: str) -> None:
    decays = mutant_of(reference, BUGS_OF_DECAYS[bug])["HeadDecays"]
    mutant = front_of(lambda call: delta_rule_backward.write_gradients(call, decays), BackwardArguments)
    assert caught(mutant, oracle, calls(torch.float32))


KERNEL_BUGS = {
    "chunks not joined": ("grad_s * whole", "grad_s * 0"),
    "heads not summed": (
        "range(k_head * PER_KEY, (k_head + 1) * PER_KEY)",
        "range(k_head * PER_KEY, k_head * PER_KEY + 1)",
    ),
    "final gradient dropped": ("    if grad_final_states is not None:", "    if False:"),
    "what is left after a chunk": ("total += leaving", "total += 0 * leaving"),
    "keys of the system once": ("grad_system + tl.trans(grad_system)", "grad_system"),
    "strength of the system dropped": ("tl.sum(by_strength, axis=1)", "0 * tl.sum(by_strength, axis=1)"),
    "decay of the chunk dropped": ("whole * tl.load(met + number", "0 * tl.load(met + number"),
    "what is known counts once": ("reads = tl.load(numbers + 2 * CHUNK, in_head, other=0.0) -", "reads = 0 *"),
    "decays by tokens before": ("tl.cumsum(reads, 0, reverse=True)", "tl.cumsum(reads, 0)"),
    "one block of values": ("for start in range(0, V_PADDED, BLOCK):", "for start in range(0, 16, BLOCK):"),
    "norm not differentiated": ("return (grad - x *", "return (grad - 0 * x *"),
    "weights not turned": ("tl.dot(tl.trans(weight), ", "tl.dot(weight, "),
}


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=pytest.mark.slow if number else ()) for number, bug in enumerate(KERNEL_BUGS)]
)
def test_bug_planted_in_the_kernel_is_caught(bug: str, device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    text = changed(source_of(chunk_gated_delta_rule), KERNEL_BUGS[bug])
    module = load(tmp_path / "mutant_chunk_gated_delta_rule.py", text)
    mutant = front_of(module.chunk_gated_delta_rule_backward, BackwardArguments)
    assert caught(mutant, oracle, (call(1, 70, v_dim=36, device=device),))
