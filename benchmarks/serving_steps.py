"""What the cold-start benchmark runs in a process of its own: a hybrid model that is warmed up or not, and requests."""

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

import mamba_ops
from benchmarks.measure import compilations
from benchmarks.peers import vllm_ops
from mamba_ops.layers import GatedDeltaNet, Mamba, Mamba2
from mamba_ops.serving import Plan

SLOTS = 72
REQUESTS = 64
LENGTHS = "64 prompts, log-normal: median 384 tokens, sigma 1, between 16 and 4096; seed 0"


def prompt_lengths() -> list[int]:
    """The distribution that LENGTHS states."""
    rng = random.Random(0)
    return [min(max(round(rng.lognormvariate(math.log(384), 1)), 16), 4096) for _ in range(REQUESTS)]


class Hybrid(nn.Module):
    """Layers one after the other, each behind a norm and beside a residual; its caches are its own."""

    def __init__(self, layers: list[nn.Module], hidden: int, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, device=device, dtype=layer.dtype) for layer in layers)
        self.caches = [layer.empty_caches(SLOTS) for layer in cast(Any, layers)]

    def forward(self, hidden: Tensor, plan: Any) -> Tensor:
        for layer, norm, caches in zip(self.layers, self.norms, self.caches, strict=True):
            hidden = hidden + layer(norm(hidden), *caches, plan=plan)
        return hidden


def build(sizes: dict[str, Any], device: torch.device, *, others: bool) -> Hybrid:
    """The model: Mamba-2 layers of Nemotron-H's sizes, and if asked for one Mamba-1 and one gated delta net layer."""
    new: dict[str, Any] = {"device": device, "dtype": getattr(torch, sizes["dtype"])}
    layers: list[nn.Module] = [Mamba2(sizes["hidden"], **sizes["mamba2"], **new) for _ in range(sizes["layers"])]
    if others:
        layers.insert(1, Mamba(sizes["hidden"], **sizes["mamba"], **new))
        layers.insert(2, GatedDeltaNet(sizes["hidden"], **sizes["gdn"], **new))
    for layer in layers:
        layer.dtype = new["dtype"]  # type: ignore[assignment]
    return Hybrid(layers, sizes["hidden"], device)


# ---- requests --------------------------------------------------------------------------------------------------------


class Ours:
    """One request after the other through our layers."""

    def __init__(self, model: Hybrid, sizes: dict[str, Any], device: torch.device) -> None:
        self.model, self.size, self.device = model, sizes["hidden"], device

    def step(self, computed: int, tokens: int) -> None:
        plan = Plan.of([computed], [tokens], [1], max_requests=SLOTS, device=self.device)
        self.model(self.hidden(tokens), plan)

    def hidden(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.size, device=self.device, dtype=next(self.model.parameters()).dtype)


class Peers(Ours):
    """The same with vLLM's Triton kernels in the same layers; their tables are made once for all layers, as there."""

    def __init__(self, model: Hybrid, sizes: dict[str, Any], device: torch.device) -> None:
        super().__init__(model, sizes, device)
        self.kernels = vllm_ops()
        self.slots = torch.tensor([1], dtype=torch.int32, device=device)

    def step(self, computed: int, tokens: int) -> None:
        hidden = self.hidden(tokens)
        table = None if computed else self._table(tokens)
        for layer, norm, caches in zip(self.model.layers, self.model.norms, self.model.caches, strict=True):
            hidden = hidden + self._mix(cast(Any, layer), norm(hidden), *caches, table)

    def _table(self, tokens: int) -> Any:
        layer = cast(Any, self.model.layers[0])
        ends = [*range(0, tokens, layer.chunk_size), tokens]
        count = -(-tokens // 8)  # programs of its convolution have 8 tokens

        def indices(values: Any) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32).to(self.device, non_blocking=True)

        programs = {"batch_ptr": indices([0] * count), "token_chunk_offset_ptr": indices(range(count))}
        row = {"tot": count, "mlist": torch.zeros(count, dtype=torch.int32), "mlist_len": count}
        row["offsetlist"] = torch.arange(count, dtype=torch.int32)
        metadata = SimpleNamespace(nums_dict={8: {**row, **programs}}, **programs)
        scan = {
            "cu_seqlens": indices([0, tokens]),
            "cu_chunk_seqlens": indices(ends),
            "seq_idx": indices([0] * (len(ends) - 1)),
            "last_chunk_indices": indices([len(ends) - 2]),
        }
        return SimpleNamespace(metadata=metadata, scan=scan, known=torch.zeros(1, dtype=torch.bool, device=self.device))

    def _mix(self, layer: Any, hidden: Tensor, conv_state: Tensor, ssm_state: Tensor, table: Any) -> Tensor:
        gate, mixed, dt = layer.in_proj(hidden).split(layer.projected, dim=-1)
        weight, bias, A = layer.conv1d.weight.squeeze(1), layer.conv1d.bias, -layer.A_log.float().exp()
        by_head, by_group = (layer.heads, layer.head_dim), (layer.groups, layer.dstate)

        def parts(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, B, C = mixed.split(layer.convolved, dim=-1)
            return x.unflatten(-1, by_head), B.unflatten(-1, by_group), C.unflatten(-1, by_group)

        y = hidden.new_empty(hidden.shape[0], *by_head)
        if table is None:
            mixed = self.kernels.conv_update(mixed, conv_state, weight, bias, "silu", conv_state_indices=self.slots)
            x, B, C = parts(mixed)
            A = A[:, None, None].expand(-1, layer.head_dim, layer.dstate)
            dt, D, dt_bias = (t[..., None].expand(*t.shape, layer.head_dim) for t in (dt, layer.D, layer.dt_bias))
            options: dict[str, Any] = {"dt_softplus": True, "state_batch_indices": self.slots, "out": y}
            self.kernels.update(ssm_state, x, dt, A, B, C, D, dt_bias, **options)
        else:
            options = {"query_start_loc": table.scan["cu_seqlens"], "cache_indices": self.slots}
            options |= {"has_initial_state": table.known, "metadata": table.metadata}
            x, B, C = parts(self.kernels.conv(mixed.t(), weight, bias, conv_state, **options).t())
            options = {"D": layer.D, "z": None, "dt_bias": layer.dt_bias, "dt_softplus": True, "out": y}
            options |= {"initial_states": None, "state_dtype": ssm_state.dtype, "final_states_out": ssm_state}
            options |= {"final_state_indices": self.slots}
            self.kernels.scan(x, dt, A, B, C, layer.chunk_size, **table.scan, **options)
        return cast(Tensor, layer.out_proj(layer.norm(y.flatten(-2), gate)))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter() - begin


def serve(requests: Ours, lengths: list[int], *, cap: float) -> dict[str, Any]:
    """Read prompts one after the other, each with four more tokens: seconds to the first and for each that follows."""
    first, following, begin = [], [], time.perf_counter()
    with compilations() as compiled:
        for length in lengths:
            first.append(seconds(lambda n=length: requests.step(0, n), requests.device))
            following += [seconds(lambda n=length + k: requests.step(n, 1), requests.device) for k in range(4)]
            if len(first) == 1:
                begin = time.perf_counter()  # the cap is for what comes after the first
            elif time.perf_counter() - begin > cap:
                break
    return {"first": first, "following": following, "compiled": len(compiled)}


def by_turns(contestants: dict[str, Ours], device: torch.device, *, rounds: int = 200) -> dict[str, list[float]]:
    """Seconds for one token of one sequence, each contestant in turn: what disturbs the host disturbs them alike."""
    taken: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    for requests in contestants.values():
        for computed, tokens in ((0, 128), (128, 1)):
            requests.step(computed, tokens)
    for _ in range(rounds):
        for contestant, requests in contestants.items():
            taken[contestant].append(seconds(lambda r=requests: r.step(128, 1), device))  # type: ignore[misc]
    return taken


# ---- steps -----------------------------------------------------------------------------------------------------------


def plans(count: int, device: torch.device, *, most: int) -> Iterator[Plan]:
    """Random batches of decodes and prefills, at most so many tokens each."""
    rng = random.Random(1)
    for number in range(count):
        decodes, prefills = (5, 3) if not number else (rng.randint(0, 60), rng.randint(0, 6))
        new, computed = [1] * decodes, [rng.randint(1, 900) for _ in range(decodes)]
        for _ in range(prefills):
            new.append(rng.randint(1, most))
            computed.append(rng.choice((0, 0, 17, 128)))
        while sum(new) > 4 * most:
            new.pop()
            computed.pop()
        if new:
            slots = rng.sample(range(SLOTS), len(new))
            yield Plan.of(computed, new, slots, max_requests=SLOTS, device=device)


def mixed_steps(model: nn.Module, requests: Ours, count: int, *, most: int, compiled: bool) -> dict[str, Any]:
    """Run random mixed batches with all compiling forbidden; return what Triton and Dynamo compiled nevertheless."""
    from torch._dynamo.utils import counters

    todo = list(plans(count, requests.device, most=most))
    if compiled:
        for plan in (todo[0], Plan.of([4], [1], [0], max_requests=SLOTS, device=requests.device)):  # many tokens, one
            model(requests.hidden(plan.tokens), plan)
    before = counters["stats"]["unique_graphs"]
    taken = []
    with mamba_ops.no_jit(), compilations() as kernels:
        for plan in todo:
            hidden = requests.hidden(plan.tokens)
            taken.append(seconds(lambda h=hidden, p=plan: model(h, p), requests.device))
    graphs = counters["stats"]["unique_graphs"] - before
    return {"steps": len(todo), "compiles": len(kernels), "recompiles": graphs, "seconds": taken}


def compile_seconds(sizes: dict[str, Any], device: torch.device, count: int, *, how: str, most: int) -> dict[str, Any]:
    """How long torch.compile takes for so many Mamba-2 layers: layer by layer, or as one graph."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = build(sizes | {"layers": count}, device, others=False)
    requests, plan = Ours(model, sizes, device), next(plans(1, device, most=most))
    run: Any = model
    if how == "layer by layer":
        for layer in model.layers:
            layer.compile(dynamic=True, fullgraph=True)
    else:
        run = torch.compile(model, dynamic=True, fullgraph=True)
    hidden = requests.hidden(plan.tokens)
    taken = seconds(lambda: run(hidden, plan), device)
    return {"layers": count, "how": how, "seconds": taken, "graphs": counters["stats"]["unique_graphs"]}


# ---- roles -----------------------------------------------------------------------------------------------------------


def warmed(model: nn.Module, device: torch.device) -> dict[str, Any]:
    report = mamba_ops.warm_up(model, device=device)
    again = mamba_ops.warm_up(model, device=device)
    return {
        "seconds": report.seconds,
        "compiled": report.compiled,
        "loaded": report.loaded,
        "rows": len(report),
        "slowest": report.slowest[:6],
        "peak_bytes": report.peak_bytes,
        "skipped": report.skipped,
        "again_seconds": again.seconds,
        "again_compiled": again.compiled,
    }


def main(role: str, device: torch.device, sizes: dict[str, Any], cap: float) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    most = sizes["most"]
    lengths = [min(length, 4 * most) for length in prompt_lengths()]
    results: dict[str, Any] = {}
    if role in ("empty", "full", "again"):
        model = build(sizes, device, others=True)
        requests = Ours(model, sizes, device)
        results["warm_up"] = warmed(model, device)
        results["requests"] = [seconds(lambda: requests.step(0, most), device) for _ in range(10)]
    if role == "empty":
        results["serve"] = serve(Ours(build(sizes, device, others=False), sizes, device), lengths, cap=cap)
    elif role == "again":
        pass
    elif role == "full":
        results["eager"] = mixed_steps(model, requests, 200, most=most, compiled=False)
        for layer in model.layers:
            layer.compile(dynamic=True, fullgraph=True)
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 32)
        results["compiled"] = mixed_steps(model, requests, 200, most=most, compiled=True)
    elif role == "compile":
        counts = (1, sizes["layers"])
        results["compile"] = [
            compile_seconds(sizes, device, n, how=how, most=most)
            for how in ("layer by layer", "whole model")
            for n in counts
        ]
    elif role == "turns":
        model = build(sizes, device, others=False)
        results["turns"] = by_turns({"ours": Ours(model, sizes, device), "vllm": Peers(model, sizes, device)}, device)
    else:
        model = build(sizes, device, others=False)
        requests = (Ours if role == "cold" else Peers)(model, sizes, device)
        if role == "vllm_warmed":  # as vLLM's layer does: a chunk of tokens; and a token, as its engine does
            results["warm_up"] = {"seconds": seconds(lambda: (requests.step(0, 128), requests.step(128, 1)), device)}
        results["serve"] = serve(requests, lengths, cap=cap)
    return results


if __name__ == "__main__":
    role, where, sizes, cap = sys.argv[1:]
    print(json.dumps(main(role, torch.device(where), json.loads(sizes), float(cap))))
