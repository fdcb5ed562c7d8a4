"""Nothing is copied or cast beside an op in the code that Inductor writes for a layer, forward and backward.

What is there is named here with its reason; docs/compiled_code.md tells of it, and of what is fused.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_tests.generated import CAST, COPY, Around, Program, programs
from mamba_ops import causal_conv1d
from mamba_ops.layers.mixer import side_by_side
from tests.layers import HIDDEN, KINDS, new_layer
from tests.pages import ROOT

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GDN, KDA, SSD, SCAN = "chunk_gated_delta_rule", "chunk_kda", "mamba_chunk_scan", "selective_scan"
CONV_BACK = Around("causal_conv1d_backward", "before", COPY)
"""The forward splits what it convolved into x, B and C, or q, k and v: their gradients are put side by side."""
INTO_PROJECTION = Around("causal_conv1d_backward", "after", COPY)
"""Likewise the gradients of what a projection made: of what is convolved, of z, of dt."""
KNOWN: dict[str, dict[str, Counter[Around]]] = {
    "mamba": {"backward": Counter({Around(f"{SCAN}_backward", "after", COPY): 3, INTO_PROJECTION: 1})},
    "mamba2": {"backward": Counter({Around(f"{SSD}_backward", "after", COPY): 4, CONV_BACK: 1, INTO_PROJECTION: 1})},
    # The weights of Qwen3-Next have q, k, v and z of a head of keys side by side, and b and a likewise.
    "gdn": {
        "forward": Counter({Around("causal_conv1d_forward", "before", COPY): 1}),
        "backward": Counter({Around(f"{GDN}_backward", "after", COPY): 3, CONV_BACK: 1, INTO_PROJECTION: 3}),
        "prefill": Counter({Around("causal_conv1d", "before", COPY): 1}),
        "step": Counter(
            {
                Around("causal_conv1d_update", "before", COPY): 1,
                Around("gated_delta_rule_update", "before", COPY): 2,
            }
        ),
    },
    "gdn, apart": {"backward": Counter({Around(f"{GDN}_backward", "after", COPY): 3, CONV_BACK: 1})},
    "kda": {"backward": Counter({Around(f"{KDA}_backward", "after", COPY): 3, CONV_BACK: 1})},
    # The pairs of q that are turned, and the rest, in float32; rounded where they are put side by side.
    "mamba3": {"forward": Counter({Around(f"{SSD}_forward", "before", CAST): 1})},
    "short_conv": {},
}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in KINDS}
LAYERS["gdn, apart"] = ("gdn", {"interleaved": False})
KERNELS = {
    "mamba": (1, 4, 1, 1),
    "mamba2": (2, 4, 2, 2),
    "gdn": (3, 5, 3, 3),
    "gdn, apart": (2, 4, 1, 3),
    "kda": (2, 4, 1, 3),
    "mamba3": (4, 7, 1, 1),
    "short_conv": (2, 2, 2, 2),
}
"""Generated kernels at most: of a forward that trains, of its backward, of a decode step, of a prefill into caches."""


def layer_of(name: str) -> Any:
    kind, changes = LAYERS[name]
    return new_layer(kind, "cpu", **changes).to(torch.bfloat16)


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN, dtype=torch.bfloat16)


def trained(layer: Callable[[Tensor], Tensor]) -> list[Program]:
    """Forward and backward."""
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    x = hidden(5, 37).requires_grad_()
    return programs(lambda: compiled(x).sum().backward())


def inferred(layer: Any) -> list[Program]:
    """A step, and a prefill into caches."""
    step, prefill = (torch.compile(call, fullgraph=True, dynamic=True) for call in (layer.step, layer))
    with torch.no_grad():
        found = programs(lambda: step(hidden(5), *layer.empty_caches(5)))
        return found + programs(lambda: prefill(hidden(5, 37), *layer.empty_caches(5)))


def cases(*daily: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in daily else pytest.mark.slow) for name in LAYERS]


def hold(name: str, found: dict[str, Program]) -> None:
    for place, program in found.items():
        assert program.ops, place
        assert not program.words, place
        extra = Counter(program.around) - KNOWN[name].get(place, Counter())
        assert not extra, (name, place)


@pytest.mark.parametrize("name", cases("short_conv", "mamba2"))
def test_nothing_is_copied_or_cast_beside_an_op_that_trains(name: str) -> None:
    forward, backward = trained(layer_of(name))
    hold(name, {"forward": forward, "backward": backward})
    assert forward.kernels <= KERNELS[name][0]
    assert backward.kernels <= KERNELS[name][1]


@pytest.mark.parametrize("name", cases("short_conv"))
def test_nothing_is_copied_or_cast_beside_an_op_that_serves(name: str) -> None:
    step, prefill = inferred(layer_of(name))
    hold(name, {"step": step, "prefill": prefill})
    assert step.kernels <= KERNELS[name][2]
    assert prefill.kernels <= KERNELS[name][3]


# -- what the reader finds --------------------------------------------------------------------------------------------


@pytest.fixture
def strict() -> Iterator[Callable[[Tensor], Tensor]]:
    """An op that wants its input contiguous."""
    library = torch.library.Library("planted_strides", "DEF")
    library.define("scan(Tensor x) -> Tensor", tags=(torch.Tag.needs_contiguous_strides,))
    library.impl("scan", lambda x: x * 2, "CPU")
    library.impl("scan", lambda x: torch.empty_like(x), "Meta")
    yield torch.ops.planted_strides.scan.default
    library._destroy()


def of(call: Callable[[Tensor], Tensor]) -> Program:
    compiled = torch.compile(call, fullgraph=True)
    with torch.no_grad():
        [program] = programs(lambda: compiled(hidden(3, 7)))
    return program


def test_a_layout_that_an_op_insists_on_is_found(strict: Callable[[Tensor], Tensor]) -> None:
    project = nn.Linear(HIDDEN, 2 * HIDDEN, dtype=torch.bfloat16)
    program = of(lambda x: strict(project(x)[..., HIDDEN:]))
    assert program.ops == ["scan"]
    assert program.around == [Around("scan", "before", COPY)]
    free = of(lambda x: strict(project(x)))
    assert free.ops == ["scan"]
    assert not free.around


WEIGHT = torch.randn(HIDDEN, 4, dtype=torch.bfloat16)


def test_a_cast_to_float32_and_back_is_found() -> None:
    program = of(lambda x: causal_conv1d(x.float(), WEIGHT.float()).to(torch.bfloat16))
    assert Counter(program.around) == Counter(
        {Around("causal_conv1d", "before", CAST): 2, Around("causal_conv1d", "after", CAST): 1}
    )
    assert not of(lambda x: causal_conv1d(x * 2, WEIGHT) + 1).around


def test_a_copy_of_a_part_of_a_cat_is_told_from_what_is_computed_there() -> None:
    first, second = (nn.Linear(HIDDEN, HIDDEN // 2, dtype=torch.bfloat16) for _ in range(2))
    copied = of(lambda x: causal_conv1d(torch.cat([first(x), second(x)], dim=-1), WEIGHT))
    assert copied.around == [Around("causal_conv1d", "before", COPY)]
    in_place = of(lambda x: causal_conv1d(side_by_side(x, first, second), WEIGHT))
    assert in_place.ops == ["causal_conv1d"]
    assert not in_place.around


def test_a_clone_is_found() -> None:
    program = of(lambda x: causal_conv1d(x.transpose(0, 1).contiguous().transpose(0, 1), WEIGHT))
    assert program.around == [Around("causal_conv1d", "before", COPY)]


def test_the_page_tells_how_many_kernels_there_are() -> None:
    page = (ROOT / "docs" / "compiled_code.md").read_text(encoding="utf-8")
    for name, counts in KERNELS.items():
        assert f"| {name} | {' | '.join(map(str, counts))} |" in page
