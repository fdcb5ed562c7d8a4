"""Perplexity of a Mamba-2 checkpoint on a text file, stock Transformers and mamba-ops side by side.

Run it with `python examples/evaluate_checkpoint.py FOLDER TEXT`: FOLDER is what `save_pretrained` wrote. Without
arguments it evaluates a small model with random weights on its own source. It needs `mamba-ops[transformers]`.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from mamba_ops.commands.targets import TargetError, quiet_transformers, tokenize, transformers_model
from mamba_ops.compat.transformers import use_mamba_ops


@torch.no_grad()  # the ops record no gradients, and parameters require them
def evaluate(model: nn.Module, tokens: list[int], window: int, device: torch.device) -> tuple[float, float]:
    """Return the perplexity of a text, and the tokens read a second; every window is read from an empty state."""
    loss, count = 0.0, 0
    start = time.perf_counter()
    for begin in range(0, len(tokens) - 1, window):
        part = torch.tensor([tokens[begin : begin + window + 1]], device=device)
        logits = model(part[:, :-1], use_cache=False).logits
        loss += float(functional.cross_entropy(logits[0].double(), part[0, 1:], reduction="sum"))
        count += part.shape[1] - 1
    return math.exp(loss / count), count / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default="mamba2", help="a folder; by default random weights")
    parser.add_argument("text", nargs="?", type=Path, default=Path(__file__), help="a file; by default this one")
    parser.add_argument("--window", type=int, default=1024, help="tokens read at once")
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    options = parser.parse_args(arguments)
    try:
        with quiet_transformers():
            model = transformers_model(options.checkpoint, options.device)
            tokens = tokenize(options.text.read_bytes(), options.checkpoint)
            if len(tokens) < 2:
                parser.error(f"{options.text} has {len(tokens)} tokens, expected at least 2")
            evaluate(model, tokens[: options.window], options.window, options.device)  # so that both are warm
            stock = evaluate(model, tokens, options.window, options.device)
            with use_mamba_ops(model):
                evaluate(model, tokens[: options.window], options.window, options.device)
                ours = evaluate(model, tokens, options.window, options.device)
    except (TargetError, OSError) as error:
        parser.error(str(error))
    print(f"{options.text.name}, {len(tokens)} tokens in windows of {options.window}, on {options.device}")
    for name, (perplexity, speed) in {"stock": stock, "ours": ours}.items():
        print(f"  {name:<5}  perplexity {perplexity:.6f}  {speed:,.0f} tokens/s")
    return 0 if math.isclose(stock[0], ours[0], rel_tol=1e-3) else 1


if __name__ == "__main__":
    sys.exit(main())
