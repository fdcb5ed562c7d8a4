"""Models of Transformers under use_mamba_ops beside stock: seconds to bind and to compile, and tokens a second.

Prefill of whole rows, eager and compiled, without a cache; greedy decoding by `generate`; packed documents in one row
beside one of the length of all, on our ops, where attention reads each by itself. Then decoding by the
front of mamba_ssm, step by step and captured (`cg`). Models have random weights; what is compiled has a process
of its own.
"""

import argparse
import json
import math
import re
import signal
import statistics
import subprocess
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
from mamba_ops.compat.mamba_ssm.models import MambaConfig, MambaLMHeadModel
from mamba_ops.compat.transformers import use_mamba_ops

MODELS = ("mamba", "mamba2", "qwen3_next")


def new_model(name: str, layers: int, width: int, device: torch.device) -> Any:
    """Return a model whose layers are recurrent, and for Qwen3-Next every fourth one and the last attention."""
    heads = max(width // 64, 1)
    sizes: dict[str, Any] = {"vocab_size": 1024, "hidden_size": width, "num_hidden_layers": layers}
    kind = {"mamba": "Mamba", "mamba2": "Mamba2", "qwen3_next": "Qwen3Next"}[name]
    if name == "mamba2":
        sizes |= {"num_heads": 2 * heads, "head_dim": 2 * width // (2 * heads), "n_groups": 1, "state_size": 128}
    if name == "qwen3_next":
        layers = max(layers, 2)  # `generate` asks a layer of attention how many tokens there are
        last = layers - 1
        kinds = ["full_attention" if i == last or i % 4 == 3 else "linear_attention" for i in range(layers)]
        sizes |= {"num_hidden_layers": layers, "layer_types": kinds}
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


def compiled_alone(name: str, title: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure the compiled model in a process of its own, which ends when the compile takes longer than the limit.

    Stock unrolls its loops over tokens, which can take an hour; and a compile that is broken off leaves a process that
    cannot go on.
    """
    own = [
        f"--{key}={getattr(options, key)}" for key in ("device", "layers", "width", "rows", "length", "runs", "limit")
    ]
    call = [sys.executable, "-m", "benchmarks.drop_in", *own, "--compile-one", name, title]
    ended = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode == -signal.SIGALRM:
        return {"compile, s": math.inf, "compiled": math.nan}
    ended.check_returncode()
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def compiled_here(name: str, title: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure the compiled model: seconds of its first call, and tokens a second."""
    model = new_model(name, options.layers, options.width, options.device)
    tokens = torch.randint(1024, (options.rows, options.length), device=options.device)
    if title == "ours":
        use_mamba_ops(model)
    _read(model, tokens)
    compiled = torch.compile(model, dynamic=True)
    signal.setitimer(signal.ITIMER_REAL, options.limit)  # which ends the process
    begin = time.perf_counter()
    _read(compiled, tokens)
    took = time.perf_counter() - begin
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    taken = seconds(lambda: _read(compiled, tokens), options.device, options.runs)
    return {"compile, s": took, "compiled": tokens.numel() / taken}


class Found(dict[str, float]):
    """What was measured of a model, shown as soon as it is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __setitem__(self, key: str, value: float) -> None:
        print(f"{self.name}: {key}: {value:,.2f}", file=sys.stderr, flush=True)
        super().__setitem__(key, value)


def measured(found: Found, options: argparse.Namespace) -> None:
    """Note what is measured of a model of Transformers."""
    name, device = found.name, options.device
    model = new_model(name, options.layers, options.width, device)
    tokens = torch.randint(1024, (options.rows, options.length), device=device)
    for title in ("stock", "ours"):
        begin = time.perf_counter()
        binding = use_mamba_ops(model) if title == "ours" else None
        if binding is not None:
            found["bind, s"] = time.perf_counter() - begin
        found[f"{title}, eager"] = tokens.numel() / seconds(lambda: _read(model, tokens), device, options.runs)
        if not options.eager:
            for key, value in compiled_alone(name, title, options).items():
                found[f"{title}, {key}"] = value
        new = options.decode
        more: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        taken = seconds(lambda more=more: model.generate(tokens[:, :8], **more), device, options.runs)  # type: ignore[misc]
        found[f"{title}, decode"] = options.rows * new / taken
    row = torch.randint(1024, (1, options.documents * options.document), device=device)
    ends = torch.arange(0, row.numel() + 1, options.document, dtype=torch.int32, device=device)
    whole = seconds(lambda: _read(model, row), device, options.runs)
    packed = seconds(lambda: _read(model, row, cu_seq_lens_q=ends), device, options.runs)
    found["one document"], found["packed"] = row.numel() / whole, row.numel() / packed
    found["packed / one"] = found["packed"] / found["one document"]
    assert binding is not None
    binding.undo()


def of_mamba_ssm(found: Found, layer: str, options: argparse.Namespace) -> None:
    """Note the tokens a second of decoding by MambaLMHeadModel, without and with graphs."""
    device, dtype = options.device, torch.float32 if options.device.type == "cpu" else torch.bfloat16
    config = MambaConfig(d_model=options.width, n_layer=options.layers, vocab_size=1024, ssm_cfg={"layer": layer})
    model = MambaLMHeadModel(config, device=device, dtype=dtype).eval()
    prompt = torch.randint(1024, (options.rows, 8), device=device)
    for cg in (False, True):
        taken = seconds(lambda cg=cg: model.generate(prompt, 8 + options.decode, cg=cg), device, options.runs)  # type: ignore[misc]
        found[f"decode, cg={cg}"] = options.rows * options.decode / taken


def _read(model: Any, tokens: Tensor, **more: Any) -> None:
    model(tokens, use_cache=False, **more)


def _table(results: list[Found], limit: float) -> list[str]:
    columns = list(dict.fromkeys(key for found in results for key in found))
    lines = [f"| model | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for found in results:
        cells = [_cell(column, found.get(column, math.nan), limit) for column in columns]
        lines.append(f"| {found.name} | {' | '.join(cells)} |")
    return lines


def _cell(column: str, value: float, limit: float) -> str:
    if not math.isfinite(value):
        return f"over {limit:.0f}" if value == math.inf else "-"
    return f"{value:.2f}" if column.endswith((", s", "/ one")) else f"{value:,.0f}"


def page(results: list[Found], fronts: list[Found], options: argparse.Namespace, called: str, *, finished: bool) -> str:
    """Return what is printed and saved."""
    lines = [f"# Models of Transformers on {device_name(options.device)}, {date.today().isoformat()}"]
    for heading, found in (("Transformers", results), ("The front of mamba_ssm", fronts)):
        if any(found):
            lines += ["", f"## {heading}", "", *_table(found, options.limit)]
    packed = f"packed: {options.documents} documents of {options.document} in one row, eager"
    runs = f"{options.rows} rows of {options.length} tokens, the median of {options.runs} calls"
    versions = f"torch {torch.__version__}, transformers {version('transformers')}"
    decode = f"decode: {options.decode} tokens a row after a prompt of 8"
    lines += ["", f"- tokens a second, but for columns in seconds; {runs}; {packed}; {decode}"]
    lines += [f"- {options.layers} layers of width {options.width}; {versions}; `{called}`"]
    lines += [] if finished else ["- broken off: what is missing was not measured"]
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
    parser.add_argument("--decode", type=int, default=64, help="tokens that are generated, a row")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a compile is given up")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=results, metavar="FOLDER", help="write a dated page (default: results/)"
    )
    parser.add_argument("--compile-one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile_one:
        with torch.no_grad(), quiet_transformers():
            print(json.dumps(compiled_here(*options.compile_one, options)))
        return 0
    found = [Found(name) for name in options.models]
    layers = ("Mamba1", "Mamba2")
    fronts = [Found(f"MambaLMHeadModel, {layer}") for layer in layers]
    finished = False
    with torch.no_grad(), quiet_transformers():
        try:
            for of_model in found:
                measured(of_model, options)
            for layer, of_front in zip(layers, fronts, strict=True):
                of_mamba_ssm(of_front, layer, options)
            finished = True
        except KeyboardInterrupt:
            print("broken off", file=sys.stderr)
    text = page(found, fronts, options, command(parser, options), finished=finished)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9]+", "-", device_name(options.device))
        (options.save / f"{date.today().isoformat()}_{name}_drop_in.md").write_text(text)
    print(text)
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main())
