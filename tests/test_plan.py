"""serving.Plan: what it says of a batch, and how it refuses one."""

from typing import Any

import numpy as np
import pytest
import torch

from mamba_ops import registry
from mamba_ops.serving import Plan
from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")


def lists(plan: Plan) -> dict[str, Any]:
    return {name: None if t is None else t.tolist() for name, t in plan.tensors._asdict().items()}


def test_decodes_first_then_prefills_padded_to_the_largest_batch() -> None:
    plan = Plan.of([0, 7, 4, 9], [5, 1, 3, 1], [6, 2, 0, 3], max_requests=6, device=DEVICE)
    assert plan.order == (1, 3, 0, 2)
    assert plan.tokens == 10
    assert str(plan) == "plan of 2 decodes and 2 prefills, 10 tokens"
    assert lists(plan) == {
        "counts": [2, 2, 2, 8],
        "cu_seqlens": [0, 1, 2, 7, 10, 10, 10],
        "prefill_cu_seqlens": [0, 5, 8, 8, 8, 8, 8],
        "slots": [[2], [3], [6], [0], [-1], [-1]],
        "has_initial_state": [True, True, False, True, False, False],
        "num_computed_tokens": [7, 9, 0, 4, 0, 0],
        "num_accepted_tokens": None,
        "write_slots": None,
    }
    assert plan.tensors.counts is not None
    assert plan.tensors.counts.device.type == "cpu"
    assert {t.device.type for t in plan.tensors[1:] if t is not None} == {DEVICE.type}


def test_a_first_token_alone_is_a_prefill() -> None:
    assert str(Plan.of([0], [1], [0])) == "plan of 0 decodes and 1 prefills, 1 tokens"


def test_speculative_decodes_have_a_slot_per_token() -> None:
    plan = Plan.of(
        [9, 0, 4], [3, 2, 1], [[1, 2, 3], [4, 5, 6], [7, 8, 0]], accepted=[2, 0, 0], max_requests=4, null_slot=0
    )
    assert plan.order == (0, 2, 1)
    assert plan.null_slot == 0
    found = lists(plan)
    assert found["counts"] == [2, 4, 1, 2]
    assert found["num_accepted_tokens"] == [2, 1, 1, 1]
    assert found["slots"] == [[1, 2, 3], [7, 8, 0], [4, 5, 6], [-1, -1, -1]]


def test_zeros_has_the_sizes_of_any_other_plan() -> None:
    sizes: dict[str, Any] = {"rounds": 3, "max_requests": 5, "device": DEVICE}
    zeros = Plan.zeros(40, columns=2, speculative=True, shared=True, **sizes)
    other = Plan.of([3], [2], [[1, 2]], accepted=[1], keep=[None], **sizes)
    assert zeros.tokens == 40
    assert lists(zeros)["counts"] == [0] * 8
    for mine, theirs in zip(zeros.tensors, other.tensors, strict=True):
        assert mine is not None
        assert theirs is not None
        assert (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)


@pytest.mark.parametrize("name", ["tokens", "columns", "max_requests", "rounds"])
def test_an_array_is_no_number(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^Plan: {name}: got array\(\[1, 2\]\), expected a whole number"):
        Plan.zeros(**({"tokens": 1} | {name: np.array([1, 2])}))


def test_nothing_at_all_is_a_plan() -> None:
    assert lists(Plan.of([], [], [], max_requests=2))["cu_seqlens"] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (([1], [1, 1], [0, 1]), {}, "num_computed_tokens: got 1 entries, expected 2, one per request"),
        (([1, 1], [1, 1], [0]), {}, "slots: got 1 entries, expected 2, one per request"),
        (([1], [1], [0]), {"accepted": []}, "accepted: got 0 entries, expected 1, one per request"),
        (
            ([0] * 3, [1] * 3, [0, 1, 2]),
            {"max_requests": 2},
            "new_tokens: got 3 requests, expected at most max_requests",
        ),
        (([0, 0], [1, 0], [0, 1]), {}, "new_tokens: got 0 for request 1, expected at least 1; leave the request out"),
        (([0, -1], [1, 1], [0, 1]), {}, "num_computed_tokens: got -1 for request 1, expected 0 or more"),
        (([0, 0], [1, 1], [[0], [1, 2]]), {}, "slots: got 2 for request 1, expected 1, as for the others"),
        (([0], [1], [[]]), {}, "slots: got none for request 0, expected 1 at least"),
        (([0, 5], [4, 1], [3, 3]), {}, "slots: got slot 3 for requests 0 and 1, expected different slots; a slot has"),
        (
            ([5], [3], [[1, 2]]),
            {"accepted": [1]},
            "slots: got 3 new tokens and 1 accepted ones for request 0, expected no more than its 2 slots; every",
        ),
        (([5], [1], [[1, 2]]), {"accepted": [3]}, "slots: got 1 new tokens and 3 accepted ones for request 0"),
        (([5], [2], [[3, 3]]), {"accepted": [1]}, "slots: got slot 3 twice for request 0, expected different slots; a"),
        (
            ([5], [2], [[3, -1]]),
            {"accepted": [2]},
            "slots: got -1 for the accepted token of request 0 and 3 for its first one, expected a slot for both",
        ),
        (([0, 0], [2**31 - 1] * 2, [0, 1]), {}, "new_tokens: got 4294967294 in all, expected fewer than 2.31; read"),
        (([2**31 - 1], [5], [0]), {}, "num_computed_tokens: got 2147483647 and 5 new ones for request 0, expected f"),
        (([5], [1], [0]), {"prompt_tokens": [-4]}, "prompt_tokens: got -4, expected 0 or more"),
        (([5], [1], [0]), {"prompt_tokens": ["4"]}, r"prompt_tokens: got \['4'\], expected whole numbers"),
    ],
)
def test_refusals(arguments: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^Plan: {says}"):
        Plan.of(*arguments, **options)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_the_slots_of_requests_may_be_rows_of_an_array(kind: Any) -> None:
    plan = Plan.of([5, 5], [2, 2], kind([[1, 2], [3, 4]]), accepted=[1, 1], max_requests=2)
    assert lists(plan)["slots"] == [[1, 2], [3, 4]]


def test_padding_rows_may_share_a_slot() -> None:
    Plan.of([1, 1, 1, 1], [1, 1, 1, 1], [-1, -1, 0, 0], null_slot=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accepted": [3]}, "accepted: got 3 for request 0, of which 3 tokens came before, expected 1 after a prompt"),
        ({"accepted": [0]}, "accepted: got 0 for request 0 with 4 new tokens, .* expected at least 1 or None"),
        ({"accepted": [-1]}, "accepted: got -1 for request 0, expected 0 or more"),
        ({"accepted": [1.0]}, r"accepted: got \[1.0\], expected whole numbers"),
        ({"num_computed_tokens": [3.0]}, r"num_computed_tokens: got \[3.0\], expected whole numbers"),
        ({"new_tokens": ["4"]}, r"new_tokens: got \['4'\], expected whole numbers"),
        ({"slots": [[1, 2, 3, None]]}, r"slots: got \[1, 2, 3, None\], expected whole numbers"),
        ({"null_slot": 0.5}, r"null_slot: got \[0.5\], expected whole numbers"),
        ({"max_requests": None}, r"max_requests: got \[None\], expected whole numbers"),
    ],
    ids=str,
)
def test_what_a_plan_cannot_mean_is_refused(changes: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"num_computed_tokens": [3], "new_tokens": [4], "slots": [[1, 2, 3, 4]], "accepted": [1]}
    assert Plan.of(**right).tensors.counts.tolist() == [1, 4, 0, 0]
    with pytest.raises(ValueError, match=f"Plan: {message}"):
        Plan.of(**(right | changes))


def test_a_prompts_last_chunk_may_be_as_short_as_a_decode() -> None:
    plan = Plan.of([8], [2], [[1, 2, 3, 4]], accepted=[None])
    assert plan.tensors.counts.tolist() == [0, 0, 1, 2]


def test_numbers_of_other_libraries_are_numbers() -> None:
    plan = Plan.of(torch.tensor([3, 0]), [torch.tensor(1), 2], torch.tensor([4, 5]))
    assert plan.tensors.counts.tolist() == [1, 1, 1, 2]


def test_prompts_are_cut_where_states_are_kept() -> None:
    plan = Plan.of(
        [16, 0, 9, 0],
        [4, 10, 1, 3],
        [1, 2, 3, 4],
        sources=[8, None, None, None],
        keep=[None, {4: 5, 8: 6}, None, {3: 7}],
        rounds=3,
        max_requests=8,
    )
    assert str(plan) == "plan of 1 decodes and 3 prefills in 6 pieces, 18 tokens"
    assert plan.pieces == ((2, 9, 10), (0, 16, 20), (1, 0, 4), (3, 0, 3), (1, 4, 8), (1, 8, 10))
    assert plan.order == (2, 0, 1, 3, 1, 1)
    assert plan.last_tokens == {2: 0, 0: 4, 1: 17, 3: 11}
    assert lists(plan) == {
        "counts": [1, 1, 3, 11, 2, 4, 1, 2],
        "cu_seqlens": [0, 1, 5, 9, 12, 16, 16, 18, 18],
        "prefill_cu_seqlens": [0, 4, 8, 11, 15, 15, 17, 17, 17],
        "slots": [[3], [8], [2], [4], [5], [7], [6], [-1]],
        "has_initial_state": [True, True, False, False, True, True, True, False],
        "num_computed_tokens": [9, 16, 0, 0, 4, 3, 8, 0],
        "num_accepted_tokens": None,
        "write_slots": [3, 1, 5, 7, 6, 4, 2, -1],
    }


def test_a_source_makes_a_prefill_of_one_token() -> None:
    plan = Plan.of([5, 5], [1, 1], [0, 1], sources=[2, None])
    assert plan.tensors.counts.tolist() == [1, 1, 1, 1]
    assert Plan.of([5], [1], [0], sources=[0]).tensors.counts.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": [3, 9]}, "sources: got slot 3 for request 0, expected no slot of request 1, which writes there"),
        ({"sources": [None, 9]}, "sources: got slot 9 for request 1 without computed tokens, expected none for it"),
        ({"sources": [-1, None]}, "sources: got -1 for request 0, expected a slot with a state"),
        ({"sources": [0.5, None]}, "sources: got 0.5, expected whole numbers"),
        ({"sources": [None]}, "sources: got 1 entries, expected 2, one per request"),
        (
            {"slots": [-1, 3], "sources": [9, None]},
            "sources: got 9 for request 0 without a slot, expected none for pad",
        ),
        ({"keep": [{8: 5}, {4: 5}]}, "keep: got slot 5 for token 4 of request 1, .* where request 0 is kept; a slot"),
        (
            {"keep": [None, {4: 5, 6: 5}]},
            "keep: got slot 5 for token 6 of request 1, .* where request 1 is kept; a slot",
        ),
        ({"keep": [{8: 3}, None]}, "keep: got slot 3 for token 8 of request 0, .* request 1 has its own state"),
        ({"keep": [{8: 2}, None]}, "keep: got slot 2 for token 8 of request 0, .* request 0 has its own state"),
        ({"sources": [9, None], "keep": [None, {4: 9}]}, "keep: got slot 9 .* where request 0 goes on from a state"),
        ({"keep": [{4: 5}, None]}, "keep: got token 4 of request 0, expected 5 to 9, as it reads these"),
        ({"keep": [{10: 5}, None]}, "keep: got token 10 of request 0, expected 5 to 9, as it reads these"),
        ({"keep": [{8: -1}, None]}, "keep: got slot -1 for request 0, expected a slot of the caches"),
        ({"keep": [[8], None]}, r"keep: got \[8\] for request 0, expected numbers of tokens, each with a slot"),
        (
            {"keep": [{8: 5}, None], "rounds": 1},
            "keep: got 1 states of request 0 in 2 pieces, expected at most rounds=1",
        ),
        ({"keep": [{8: 5}, {4: 6}], "max_requests": 3}, "keep: got 4 pieces of 2 requests, expected at most max_requ"),
        ({"rounds": 0}, "rounds: got 0, expected 1 to max_requests=8"),
        ({"rounds": 9}, "rounds: got 9, expected 1 to max_requests=8; each piece of a prompt is a row"),
        ({"rounds": 2**40}, "rounds: got 1099511627776, expected numbers of 32 bits"),
        ({"accepted": [1, 0], "keep": [{8: 5}, None]}, "keep: got .*, a speculative decode, expected none for it"),
        ({"accepted": [None, None], "prompt_tokens": [4]}, "prompt_tokens: got 1 entries, expected 2, one per request"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused(changes: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"num_computed_tokens": [4, 0], "new_tokens": [5, 9], "slots": [2, 3]}
    right |= {"rounds": 3, "max_requests": 8}
    Plan.of(**right, sources=[9, None], keep=[{8: 5, 9: 6}, {4: 7}])
    with pytest.raises(ValueError, match=f"^Plan: {message}"):
        Plan.of(**(right | changes))


@pytest.mark.parametrize(("accepted", "computed"), [(1, 5), (2, 7), (3, 8)])
def test_a_rollback_past_the_prompt_is_refused(accepted: int, computed: int) -> None:
    rows: dict[str, Any] = {"new_tokens": [3], "slots": [[1, 2, 3]], "prompt_tokens": [6], "accepted": [accepted]}
    Plan.of([computed + 1], **rows)
    says = (
        f"got {accepted} for request 0, of which {computed} tokens came before, 6 of them its prompt, expected no roll"
    )
    with pytest.raises(ValueError, match=f"^Plan: accepted: {says}"):
        Plan.of([computed], **rows)


@pytest.mark.parametrize("name", ["mamba2_mixing", "short_conv_mixing"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_plan_that_is_written_in_place_is_read_anew(name: str, inference: bool) -> None:
    """Engines keep their plans at one address; what later rounds have of them is computed once for all layers."""
    op = registry.ops()[name]

    def written() -> dict[str, torch.Tensor]:
        return {name: values[name].clone() for name in op.mutates if values[name] is not None}

    with torch.inference_mode(inference):
        calls = [op.fill(op.bind(sample.args, sample.kwargs)) for sample in op.make_samples(DEVICE)]
        values = next(call for call in calls if call["counts"] is not None and len(call["counts"]) > 4)
        run = op.kernels["composed"].function
        run(**(values | written()))
        rows = sum(values["counts"].tolist()[0:6:2])  # the last two are read in the second round
        values["cu_seqlens"][rows - 1] += 2
        values["prefill_cu_seqlens"][rows - 1 - values["counts"][0]] += 2
        got, expected = written(), written()
        run(**(values | got))
        fresh = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
        run(**(fresh | expected))
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True)
