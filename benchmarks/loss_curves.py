"""Loss curves of Transformers' Mamba-2, stock beside ours: the same seed and data, AdamW, float32.

Ours, eager and compiled, may be no farther from stock in float32 than that is from stock in float64, or 1e-4.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from mamba_ops.commands.targets import quiet_transformers
from mamba_ops.compat.transformers import use_mamba_ops

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 32}
FLOOR = 1e-4
Curves = dict[str, Tensor]


def new_model(layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(**SIZES, n_groups=2, num_hidden_layers=layers, chunk_size=32, use_cache=False)
    return Mamba2ForCausalLM(config).to(device, dtype)


def batches(steps: int, device: torch.device) -> Tensor:
    """Rows that can be learnt: each token is a function of the two before it, and one in ten is random."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(SIZES["vocab_size"], (steps, 4, 48), generator=generator)
    kept = torch.rand(rows.shape, generator=generator) < 0.1
    for place in range(2, rows.shape[2]):
        rule = (3 * rows[..., place - 1] + rows[..., place - 2] + 1) % SIZES["vocab_size"]
        rows[..., place] = torch.where(kept[..., place], rows[..., place], rule)
    return rows.to(device)


def curve(model: Any, rows: Tensor, *, ours: bool = False, compiled: bool = False) -> Tensor:
    """Train and return the loss of every step, in float64."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    run: Callable[..., Any] = torch.compile(model, fullgraph=True) if compiled else model
    losses = []
    with use_mamba_ops(model) if ours else nullcontext():
        for row in rows:
            optimizer.zero_grad()
            loss = run(input_ids=row, labels=row).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double().cpu())
    return torch.stack(losses)


def curves(steps: int, layers: int, device: torch.device, *, compiled: bool = True) -> Curves:
    """Train every contestant from the same parameters on the same rows."""
    rows, found = batches(steps, device), {}
    with quiet_transformers():
        found["stock, float64"] = curve(new_model(layers, device, torch.float64), rows)
        found["stock, float32"] = curve(new_model(layers, device, torch.float32), rows)
        found["ours, eager"] = curve(new_model(layers, device, torch.float32), rows, ours=True)
        if compiled:
            found["ours, compiled"] = curve(new_model(layers, device, torch.float32), rows, ours=True, compiled=True)
    return found


def distances(found: Curves) -> dict[str, float]:
    """The largest distance of every curve from stock's in float32."""
    stock = found["stock, float32"]
    return {name: float((losses - stock).abs().max()) for name, losses in found.items() if losses is not stock}


def allowed(far: dict[str, float]) -> float:
    return max(FLOOR, far["stock, float64"])


def plot(found: Curves, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    losses, apart = figure.subplots(1, 2)
    for name, curve_ in found.items():
        losses.plot(curve_, label=name)
        if name != "stock, float32":
            apart.semilogy((curve_ - found["stock, float32"]).abs().clamp(min=1e-9), label=name)
    losses.set(xlabel="step", ylabel="loss")
    apart.set(xlabel="step", ylabel="distance from stock, float32")
    losses.legend()
    figure.savefig(path)


def main() -> int:
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    description = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_curves", description=description)
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there; needs mamba-ops[plot]")
    options = parser.parse_args()
    found = curves(options.steps, options.layers, options.device)
    far = distances(found)
    print(f"# Loss curves on {options.device}, {date.today().isoformat()}, torch {torch.__version__}\n")
    print("| | first loss | last loss | farthest from stock, float32 |\n|---|---|---|---|")
    for name, losses in found.items():
        print(f"| {name} | {losses[0]:.4f} | {losses[-1]:.4f} | {far.get(name, 0.0):.1e} |")
    print(f"\n- allowed: {allowed(far):.1e}\n- `{measure.command(parser, options)}`")
    if options.plot:
        plot(found, options.plot)
    return int(any(distance > allowed(far) for distance in far.values()))


if __name__ == "__main__":
    sys.exit(main())
