"""Models of Transformers for an audit: any type, or a folder with a config.json, small and with random weights."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mamba_ops.commands.audit.sizes import ALWAYS, OF_TYPE, SMALL, VARIANTS
from mamba_ops.commands.targets import quiet_transformers

# First the length alone changes, to two new values, then the batch alone.
SHAPES = ((1, 32), (1, 33), (1, 48), (2, 48))
_LARGEST = 50_000_000  # parameters of a model that is to be small
_KINDS = "layer_types", "layers_block_type", "block_types", "mlp_layer_types"


class ModelNameError(ValueError):
    """There is no such model; the message is a sentence for the user."""


def build(what: str, *, layers: int | None = None, full: bool = False) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return a language model in eval mode and the keyword arguments of one call.

    Args:
        what: a model type of Transformers, or a folder with a config.json. Nothing is downloaded, no weights are read.
        layers: how many; None: 2, or as many as the model has kinds of layers, or all of them with `full`.
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
    failed: Exception | None = None
    for variant in VARIANTS if not full else VARIANTS[:1]:
        config = _config(transformers, what)
        try:
            if not full:
                _shrink(config, variant, layers)
            elif layers is not None:
                _set_layers(config.get_text_config(), layers, {})
            return _made(transformers, config, what, full)
        except ModelNameError:
            raise
        except Exception as error:
            failed = failed or error
    hint = "" if full else "; take a folder with a config.json whose sizes are small and fit, and --full"
    sentence = f"{type(failed).__name__}: {str(failed).strip().partition(chr(10))[0][:200]}"
    how = "build it" if full else "run it with small sizes"
    raise ModelNameError(f"{what}: Transformers cannot {how} ({sentence}){hint}") from failed


def _config(transformers: Any, what: str) -> Any:
    try:
        if Path(what).is_dir():
            return transformers.AutoConfig.from_pretrained(what, local_files_only=True)
        return transformers.AutoConfig.for_model(what)
    except Exception as error:  # some configs of Transformers cannot be made without arguments
        sentence = str(error).strip().partition("\n")[0].partition(". Should contain")[0]
        raise ModelNameError(
            f"got {what}, expected a model type of Transformers or a folder: {sentence[:200]}"
        ) from None


def _made(transformers: Any, config: Any, what: str, full: bool) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build a model, and call it once if it is small."""
    make = _factory(transformers, config, what)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet_transformers():
        torch.manual_seed(0)
        if not full:
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in make(config).parameters())
            if count > _LARGEST:
                raise ValueError(f"it has {count:,} parameters even so")
        model = make(config).eval()
        vocabulary = int(getattr(config.get_text_config(), "vocab_size", None) or SMALL["vocab_size"])
        tokens = torch.randint(vocabulary, (1, SHAPES[0][1]), generator=torch.Generator().manual_seed(0))
        inputs: dict[str, Any] = {"use_cache": False, "input_ids": tokens}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens.clone()
        if not full:
            model(**inputs)
    return model, inputs


def _factory(transformers: Any, config: Any, what: str) -> Any:
    """Return what makes a model of a config: as a causal language model if there is one, else without a head."""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            taken = auto._model_mapping[type(config)]
            taken = taken[0] if isinstance(taken, tuple) else taken
            if taken.main_input_name == "input_ids":
                return auto.from_config
            said = f"{what}: it takes {taken.main_input_name}, and this target calls models with tokens"
            raise ModelNameError(f"{said}; write a factory, file.py:make, that returns (model, inputs)")
    raise ModelNameError(f"{what}: it is a part of other models, and Transformers has no model of this type alone")


def _shrink(config: Any, variant: dict[str, Any], layers: int | None) -> None:
    """Make the sizes of a config small, and those of the configs in it."""
    text = config.get_text_config()
    for part in _parts(config):
        own = OF_TYPE.get(part.model_type, {})
        given = {**SMALL, **variant, **own}
        if hasattr(part, "kv_lora_rank"):  # multi-head latent attention: its heads have their own sizes
            given |= {"head_dim": 16, "qk_head_dim": 32, "num_key_value_heads": SMALL["num_attention_heads"]}
        for name, value in given.items():
            with contextlib.suppress(Exception):  # a property, which follows from others, or one that layers differ in
                if name in own or name in ALWAYS or getattr(part, name, None) is not None:
                    setattr(part, name, value)
        _set_layers(part, layers if part is text else None, given)
        for name, value in part.to_dict().items():  # such as that of padding
            size = getattr(part, "vocab_size", None)
            if name.endswith("_token_id") and isinstance(value, int) and size and value >= size:
                try:
                    setattr(part, name, None)
                except Exception:  # it has to be a number
                    setattr(part, name, 0)


def _parts(config: Any) -> Iterator[Any]:
    """Return a config and the configs in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "get_text_config"):
            yield from _parts(value)


def _set_layers(text: Any, layers: int | None, given: dict[str, Any]) -> None:
    """Set the number of layers, so that there is one of each kind if they are to be that many."""
    kinds = next((list(getattr(text, name)) for name in _KINDS if isinstance(getattr(text, name, None), list)), [])
    count = layers or max(2, len(given.get("layer_types", ())), len(dict.fromkeys(kinds)))
    for name in (
        "num_hidden_layers",
        "num_blocks",
        "num_layers",
        "encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
    ):
        if isinstance(getattr(text, name, None), int):
            with contextlib.suppress(AttributeError, NotImplementedError):
                setattr(text, name, count)
    for name in _KINDS:
        if isinstance(found := getattr(text, name, None), (list, tuple)) and found:
            with contextlib.suppress(AttributeError):  # some configs compute it from the number of layers
                setattr(text, name, _kinds(list(found), count))
                if hasattr(text, "hybrid_layer_ids"):
                    text.hybrid_layer_ids = [i for i, kind in enumerate(getattr(text, name)) if kind == "hybrid"]


def _kinds(types: list[str], count: int) -> list[str]:
    """Return kinds for `count` layers, with each kind among them if there are enough layers."""
    kept = (types * count)[:count]
    missing = [kind for kind in dict.fromkeys(types) if kind not in kept]
    for at, kind in enumerate(missing[: max(count - 1, 0)]):
        kept[count - 1 - at] = kind
    return kept
