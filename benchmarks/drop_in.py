"""Models of Transformers under use_mamba_ops beside stock: seconds to bind and to compile, and tokens a second.

Prefill of whole rows, eager and compiled, without a cache; then packed documents in one row beside one of the length of
all, on our ops; they are told by cu_seq_lens_q, so attention sees one. All in one process; models have random weights.
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import command
from mamba_ops.commands.targets import quiet_transformers
from mamba_ops.commands.watch import device_name
from mamba_ops.compat.transformers import use_mamba_ops

MODELS = ("mamba", "mamba2", "qwen3_next")


def new_model(name: str, layers: int, width: int, device: torch.device) -> Any:
    """Return a model whose layers are recurrent, and for Qwen3-Next every fourth one attention."""
    heads = max(width // 64, 1)
    sizes: dict[str, Any] = {"vocab_size": 1024, "hidden_size": width, "num_hidden_layers": layers}
    kind = {"mamba": "Mamba", "mamba2": "Mamba2", "qwen3_next": "Qwen3Next"}[name]
    if name == "mamba2":
        sizes |= {"num_heads": 2 * heads, "head_dim": 2 * width // (2 * heads), "n_groups": 1, "state_size": 128}
    if name == "qwen3_next":
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64}
        sizes |= {"linear_num_key_heads": heads, "linear_num_value_heads": 2 * heads, "linear_key_head_dim": 64}
        sizes |= {"linear_value_head_dim": 64, "intermediate_size": 2 * width, "mlp_only_layers": list(range(layers))}
    modeling = import_module(f"transformers.models.{name}.modeling_{name}")
    model = getattr(modeling, f"{kind}ForCausalLM")(getattr(modeling, f"{kind}Config")(**sizes))
    return model.eval().to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)


def seconds(call: Callable[[], object], device: torch.device, runs: int) -> float:
    """Return the median of several calls, after one that does not count."""
    wait = (lambda: None) if device.type == "cpu" else torch.get_device_module(device).synchronize
    call()
    wait()
    taken = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def measured(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Return what was measured of a model."""
    device, found = options.device, {}
    model = new_model(name, options.layers, options.width, device)
    tokens = torch.randint(1024, (options.rows, options.length), device=device)
    for title in ("stock", "ours"):
        begin = time.perf_counter()
        binding = use_mamba_ops(model) if title == "ours" else None
        if binding is not None:
            found["bind, s"] = time.perf_counter() - begin
        found[f"{title}, eager"] = tokens.numel() / seconds(lambda: _read(model, tokens), device, options.runs)
        if not options.eager:
            torch.compiler.reset()
            compiled = torch.compile(model, dynamic=True)
            begin = time.perf_counter()
            _read(compiled, tokens)
            found[f"{title}, compile, s"] = time.perf_counter() - begin
            taken = seconds(lambda compiled=compiled: _read(compiled, tokens), device, options.runs)  # type: ignore[misc]
            found[f"{title}, compiled"] = tokens.numel() / taken
    row = torch.randint(1024, (1, options.documents * options.document), device=device)
    ends = torch.arange(0, row.numel() + 1, options.document, dtype=torch.int32, device=device)
    whole = seconds(lambda: _read(model, row), device, options.runs)
    packed = seconds(lambda: _read(model, row, cu_seq_lens_q=ends), device, options.runs)
    found["one document"], found["packed"] = row.numel() / whole, row.numel() / packed
    assert binding is not None
    binding.undo()
    return found


def _read(model: Any, tokens: Tensor, **more: Any) -> None:
    model(tokens, use_cache=False, **more)


def page(results: dict[str, dict[str, float]], options: argparse.Namespace, called: str) -> str:
    """Return what is printed and saved."""
    columns = list(dict.fromkeys(key for found in results.values() for key in found))
    lines = [f"# Models of Transformers on {device_name(options.device)}, {date.today().isoformat()}", ""]
    lines += [f"| model | {' | '.join(columns)} | packed / one |", f"|{'---|' * (len(columns) + 2)}"]
    for name, found in results.items():
        cells = [f"{found[c]:.2f}" if c.endswith(", s") else f"{found[c]:,.0f}" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {found['packed'] / found['one document']:.2f} |")
    packed = f"packed: {options.documents} documents of {options.document} in one row, eager"
    runs = f"{options.rows} rows of {options.length} tokens, the median of {options.runs} calls"
    versions = f"torch {torch.__version__}, transformers {version('transformers')}"
    lines += ["", f"- tokens a second, but for columns in seconds; {runs}; {packed}"]
    lines += [f"- {options.layers} layers of width {options.width}; {versions}; `{called}`"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drop_in", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--document", type=int, default=1024, help="tokens of one")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=results, metavar="FOLDER", help="write a dated page (default: results/)"
    )
    options = parser.parse_args(arguments)
    found = {}
    with torch.no_grad(), quiet_transformers():
        for name in options.models:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found[name] = measured(name, options)
    text = page(found, options, command(parser, options))
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9]+", "-", device_name(options.device))
        (options.save / f"{date.today().isoformat()}_{name}_drop_in.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
