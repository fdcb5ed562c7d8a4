"""Models of Transformers for an audit: any type, or a folder with a config.json, small and with random weights."""

import contextlib
import importlib
from pathlib import Path
from typing import Any

import torch

from mamba_ops.commands.targets import quiet_transformers

SHAPES = ((1, 32), (1, 33), (2, 80))
_SMALL = {  # what makes a config small; a name that it does not have is left out
    "vocab_size": 256,
    "hidden_size": 64,
    "d_model": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "state_size": 16,
    "time_step_rank": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "mamba_d_state": 16,
    "mamba_dt_rank": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_OF_TYPE: dict[str, dict[str, Any]] = {  # where sizes depend on each other, or two layers need to be of two kinds
    "mamba": {"intermediate_size": 128},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 32},
    "falcon_h1": {"mamba_d_ssm": 128},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16},
}


class ModelNameError(ValueError):
    """There is no such model; the message is a sentence for the user."""


def build(what: str, *, layers: int | None = None, full: bool = False) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return a causal language model in eval mode and the keyword arguments of one call.

    Args:
        what: a model type of Transformers, or a folder with a config.json. Nothing is downloaded, no weights are read.
        layers: how many; None: 2, or all of them with `full`.
        full: whether to keep the config's own sizes.

    Raises:
        ModelNameError: Transformers is not installed, has no such model, or cannot build it.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModelNameError(
            "transformers is not installed, and this target needs it; pip install 'mamba-ops[transformers]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    try:
        if Path(what).is_dir():
            config = transformers.AutoConfig.from_pretrained(what, local_files_only=True)
        else:
            config = transformers.AutoConfig.for_model(what)
    except (ValueError, OSError) as error:
        sentence = str(error).partition("\n")[0].partition(". Should contain")[0]
        raise ModelNameError(
            f"got {what}, expected a model type of Transformers or a folder: {sentence[:200]}"
        ) from None
    wanted: dict[str, Any] = {} if full else {**_SMALL, **_OF_TYPE.get(config.model_type, {})}
    count = layers or (None if full else 2)
    text = config.get_text_config()
    if count is not None:
        wanted["num_hidden_layers"] = count
    for name, value in wanted.items():
        if name in text.to_dict():
            setattr(text, name, value)
    for name, value in text.to_dict().items():  # such as that of padding
        if name.endswith("_token_id") and isinstance(value, int) and value >= text.vocab_size:
            setattr(text, name, None)
    for name in ("layer_types", "layers_block_type"):
        if count is not None and getattr(text, name, None):
            with contextlib.suppress(AttributeError):  # some configs compute it from the number of layers
                setattr(text, name, _kinds(list(getattr(text, name)), count))
                if hasattr(text, "hybrid_layer_ids"):
                    text.hybrid_layer_ids = [i for i, kind in enumerate(getattr(text, name)) if kind == "hybrid"]
    inputs: dict[str, Any] = {"use_cache": False}
    inputs["input_ids"] = torch.randint(int(text.vocab_size), (1, 32), generator=torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet_transformers():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            if not full:
                model(**inputs)
    except Exception as error:
        hint = "" if full else "; take a folder with a config.json whose sizes are small and fit, and --full"
        sentence = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        how = "build it" if full else "run it with small sizes"
        raise ModelNameError(f"{what}: Transformers cannot {how} ({sentence}){hint}") from error
    return model, inputs


def _kinds(types: list[str], count: int) -> list[str]:
    """Return kinds for `count` layers, with each kind among them if there are enough layers."""
    kept = (types * count)[:count]
    missing = [kind for kind in dict.fromkeys(types) if kind not in kept]
    for at, kind in enumerate(missing[: max(count - 1, 0)]):
        kept[count - 1 - at] = kind
    return kept
