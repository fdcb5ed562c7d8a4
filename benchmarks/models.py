"""Whole models in one run: Mamba-2 in its 1.3B shape, and a hybrid; prefill and decode, and where the time goes.

Stock Transformers (which takes the kernels of mamba_ssm and causal-conv1d where they are installed), mamba_ssm's own
model, and ours: the Transformers model under `use_mamba_ops`, eager and compiled, and mamba_ssm's model over our ops,
eager and captured. Weights are random. All are timed by turns, so that what else runs on the host hits all alike.
Decoding is greedy, after a prompt of 8, by each library's own `generate`.
"""

import argparse
import gc
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.drop_in import seconds
from benchmarks.measure import command, report
from mamba_ops.commands.bench.peers import module
from mamba_ops.commands.bench.peers import versions as peer_versions
from mamba_ops.commands.targets import quiet_transformers
from mamba_ops.commands.watch import device_name
from mamba_ops.compat.transformers import use_mamba_ops

SIZES = {"mamba2": (2048, 48, 50288), "hybrid": (2048, 24, 50288)}
"""Width, layers and words of each model."""
PROMPT = 8
PRODUCTS = re.compile(r"gemm|nvjet|cutlass|xmma|cublas|_mm_|addmm|bmm|attention|flash|fmha", re.IGNORECASE)


class Contestant(NamedTuple):
    """A model of one library.

    Attributes:
        read: makes its forward pass over tokens `(batch, length)`.
        write: appends so many tokens to a prompt, greedily; None: it has no way to.
        during: what is in force while it reads or writes.
    """

    read: Callable[[Tensor], object]
    write: Callable[[Tensor, int], object] | None
    during: Callable[[], AbstractContextManager[object]] = nullcontext


def transformers_model(name: str, width: int, layers: int, words: int, device: torch.device) -> Any:
    """Return Transformers' model: Mamba-2, or Qwen3-Next with dense MLPs, every fourth layer of it attention."""
    heads = max(width // 64, 1)
    sizes: dict[str, Any] = {"vocab_size": words, "hidden_size": width, "num_hidden_layers": layers}
    if name == "mamba2":
        kind, family = "Mamba2", "mamba2"
        sizes |= {"num_heads": 2 * heads, "head_dim": 2 * width // (2 * heads), "n_groups": 1, "state_size": 128}
    else:
        kind, family = "Qwen3Next", "qwen3_next"
        kinds = ["full_attention" if i % 4 == 3 or i == layers - 1 else "linear_attention" for i in range(layers)]
        sizes |= {"layer_types": kinds, "num_attention_heads": heads, "num_key_value_heads": max(heads // 4, 1)}
        sizes |= {"head_dim": 64, "linear_num_key_heads": max(heads // 2, 1), "linear_num_value_heads": heads}
        sizes |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "intermediate_size": 3 * width}
        sizes |= {"mlp_only_layers": list(range(layers))}
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    with torch.device(device):
        model = getattr(modeling, f"{kind}ForCausalLM")(getattr(modeling, f"{kind}Config")(**sizes))
    return model.eval().to(torch.float32 if device.type == "cpu" else torch.bfloat16)


def of_transformers(model: Any, read: Any) -> Contestant:
    def write(prompt: Tensor, count: int) -> object:
        return model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

    return Contestant(lambda tokens: read(tokens, use_cache=False, logits_to_keep=1), write)


def of_mamba_ssm(library: Any, sizes: tuple[int, int, int], device: torch.device, *, captured: bool) -> Contestant:
    """Return the model of mamba_ssm, its own or ours: `library` has MambaConfig and MambaLMHeadModel."""
    width, layers, words = sizes
    config = library.MambaConfig(d_model=width, n_layer=layers, vocab_size=words, ssm_cfg={"layer": "Mamba2"})
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = library.MambaLMHeadModel(config, device=device, dtype=dtype).eval()

    def write(prompt: Tensor, count: int) -> object:
        return model.generate(prompt, prompt.shape[1] + count, cg=captured)

    return Contestant(lambda tokens: model(tokens, num_last_tokens=1), write)


class _Theirs:
    """mamba_ssm's own model, which needs its compiled modules, and fails in a forward without causal_conv1d."""

    def __init__(self) -> None:
        module("causal_conv1d")
        self.MambaConfig = module("mamba_ssm.models.config_mamba").MambaConfig
        self.MambaLMHeadModel = module("mamba_ssm.models.mixer_seq_simple").MambaLMHeadModel


def contestants(name: str, sizes: tuple[int, int, int], device: torch.device) -> dict[str, Callable[[], Contestant]]:
    """Return who reads and writes, and how it is built."""

    def stock() -> Contestant:
        model = transformers_model(name, *sizes, device)
        return of_transformers(model, model)

    def ours() -> Contestant:
        model = transformers_model(name, *sizes, device)
        return of_transformers(model, model)._replace(during=partial(use_mamba_ops, model))

    def compiled() -> Contestant:
        model = transformers_model(name, *sizes, device)
        return of_transformers(model, torch.compile(model))._replace(write=None, during=partial(use_mamba_ops, model))

    found = {"Transformers": stock, "ours, eager": ours, "ours, compiled": compiled}
    if name == "mamba2":
        front = import_module("mamba_ops.compat.mamba_ssm.models")
        found |= {
            "mamba_ssm": lambda: of_mamba_ssm(_Theirs(), sizes, device, captured=False),
            "mamba_ssm, captured": lambda: of_mamba_ssm(_Theirs(), sizes, device, captured=True),
            "ours by mamba_ssm's names": lambda: of_mamba_ssm(front, sizes, device, captured=False),
            "ours by those, captured": lambda: of_mamba_ssm(front, sizes, device, captured=True),
        }
    return found


def shares(call: Callable[[], object], took: float) -> dict[str, float]:
    """Return the parts of a call's time: matrix products, kernels of the ops, other kernels, and no kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        call()
        torch.accelerator.synchronize()
    found = dict.fromkeys(("products", "ops", "rest"), 0.0)
    for event in watched.events() or ():
        if event.device_type != DeviceType.CPU:
            of_triton = event.name.startswith("_") or "ssd" in event.name or "conv1d" in event.name
            kind = "products" if PRODUCTS.search(event.name) else "ops" if of_triton else "rest"
            found[kind] += 1e-6 * event.self_device_time_total / took
    return {**found, "waiting": max(1 - sum(found.values()), 0.0)}


def by_turns(
    calls: Mapping[str, Callable[[], object]], those: Mapping[str, Contestant], options: argparse.Namespace
) -> dict[str, float]:
    """Return the median time of each one's call; they take turns, each with a call before that does not count.

    Who runs out of memory is left out.
    """
    taken: dict[str, list[float]] = {title: [] for title in calls}
    for _ in range(options.runs):
        for title in list(taken):
            try:
                with those[title].during():
                    taken[title].append(seconds(calls[title], options.device, runs=1))
            except torch.OutOfMemoryError:  # stock keeps every chunk's states and decays at once
                del taken[title]
                _free(options.device)
    return {title: statistics.median(times) for title, times in taken.items()}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def measure(
    those: Mapping[str, Contestant], words: int, options: argparse.Namespace, found: dict[str, dict[str, float]]
) -> None:
    """Add tokens a second of prefill and of decode by batch, and the shares of a prefill's time, to each one's row."""
    tokens = torch.randint(words, (1, options.length), device=options.device)
    reading = {title: partial(one.read, tokens) for title, one in those.items()}
    for title, took in by_turns(reading, those, options).items():
        found[title]["prefill"] = tokens.numel() / took
        if options.device.type != "cpu":
            with those[title].during():
                parts = shares(reading[title], took)
            found[title] |= {f"prefill {name}": share for name, share in parts.items()}
    for batch in options.batch:
        prompt = torch.randint(words, (batch, PROMPT), device=options.device)
        left = {title: one.write for title, one in those.items() if one.write is not None}
        few = by_turns({title: partial(write, prompt, 2) for title, write in left.items()}, those, options)
        for count in (options.decode, 8 * options.decode):
            writing = {title: partial(left[title], prompt, 2 + count) for title in few if title in left}
            many = by_turns(writing, those, options)
            for title, took in many.items():
                found[title][f"decode {batch}"] = batch * count / max(took - few[title], 1e-9)
            # Of others what was timed is mostly the prompt, which both have.
            left = {title: left[title] for title, took in many.items() if took <= 2 * few[title]}


def too_large(those: Mapping[str, Contestant], rows: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """Return who lacks what for want of memory."""
    wanted = ["prefill", *(f"decode {batch}" for batch in options.batch)]
    lacking = {t: [w for w in wanted[: None if one.write else 1] if w not in rows[t]] for t, one in those.items()}
    return "; ".join(f"{title} {', '.join(what)}" for title, what in lacking.items() if what)


def table(results: dict[str, dict[str, dict[str, float]]], options: argparse.Namespace) -> list[str]:
    """Return a table for each model."""
    lines = []
    for name, rows in results.items():
        width, layers, words = sizes_of(name, options)
        columns = list(dict.fromkeys(key for found in rows.values() for key in found))
        columns.sort(key=lambda column: not column.startswith("prefill"))  # the first row may have none
        lines += ["", f"## {name}: {layers} layers of width {width}, {words} words", ""]
        lines += [f"| tokens a second | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
        for title, found in rows.items():
            cells = (_cell(column, found.get(column, math.nan)) for column in columns)
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _cell(column: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0%}" if column.startswith("prefill ") else f"{value:,.0f}"


def sizes_of(name: str, options: argparse.Namespace) -> tuple[int, int, int]:
    width, layers, words = SIZES[name]
    return options.width or width, options.layers or layers, options.words or words


def main(arguments: list[str] | None = None) -> int:
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    parser.add_argument("--models", nargs="+", default=tuple(SIZES), choices=SIZES)
    parser.add_argument("--width", type=int, help="of every model; default: 2048")
    parser.add_argument("--layers", type=int, help="of every model; default: 48 and 24")
    parser.add_argument("--words", type=int, help="default: 50288")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a prefill")
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8, 64), help="rows that decode")
    parser.add_argument("--decode", type=int, default=32, help="tokens that are timed, a row")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, after every row")
    folder = Path(__file__).parent / "results"
    parser.add_argument(
        "--save", type=Path, nargs="?", const=folder, metavar="FOLDER", help="write a dated page (default: results/)"
    )
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, dict[str, float]]] = {}
    results = {"device": device_name(options.device), "date": date.today().isoformat(), "models": found}
    missing: list[str] = []
    finished = False
    bar = Progress(disable=not sys.stderr.isatty())
    with suppress(KeyboardInterrupt), torch.no_grad(), quiet_transformers(), bar as progress:
        task = progress.add_task("models", total=len(options.models))
        for name in options.models:
            those: dict[str, Contestant] = {}
            rows = found[name] = {}
            for title, build in contestants(name, sizes_of(name, options), options.device).items():
                try:
                    those[title], rows[title] = build(), {}
                except ImportError as error:
                    missing.append(f"{title}: {str(error).partition('. ')[0]}")
            measure(those, sizes_of(name, options)[2], options, rows)
            if lacking := too_large(those, rows, options):
                missing.append(f"{name}, for want of memory: {lacking}")
            those.clear()
            torch.compiler.reset()
            _free(options.device)
            progress.advance(task)
            print(f"{name}: {json.dumps(rows)}", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
        finished = True
    lines = [f"# Whole models on {results['device']}, {results['date']}", *table(found, options), ""]
    decode = f"rows x {options.decode} tokens, eight times as many where these take less than a prompt of {PROMPT}"
    lines += [f"- prefill: one row of {options.length} tokens, its last logits; decode: {decode}"]
    lines += ["- shares of a prefill: matrix products and attention, the ops' kernels, other kernels, no kernel"]
    lines += [f"- not measured: {sentence}" for sentence in missing]
    lines += [] if finished else ["- broken off: what is missing was not measured"]
    versions = f"torch {torch.__version__}, transformers {version('transformers')}"
    here = [f"{peer} {number}" for peer, number in peer_versions().items() if not number.startswith("absent")]
    lines += [f"- installed: {', '.join(here) or 'no peers'}; Transformers takes the kernels of those that it knows"]
    lines += [f"- the median of {options.runs} calls, by turns; {versions}; `{command(parser, options)}`"]
    text = "\n".join(lines) + "\n"
    options.name = "models"  # after the command was read from them
    report(options, text, results)
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main())
