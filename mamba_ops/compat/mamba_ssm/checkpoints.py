"""Checkpoints of mamba_ssm: in a folder, or on Hugging Face's hub."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """Return what `config.json` of a checkpoint says."""
    config: dict[str, Any] = json.loads(_file(model_name, "config.json").read_text())
    return config


def load_state_dict_hf(
    model_name: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, as `dtype` and on `device` where they are given."""
    path = _file(model_name, "pytorch_model.bin")
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()}


def _file(model_name: str | Path, name: str) -> Path:
    """Return where a checkpoint's file is."""
    missing = FileNotFoundError(f"{model_name}: got no {name}, expected a checkpoint of mamba_ssm")
    folder = Path(model_name)
    if folder.is_dir():
        if (folder / name).is_file():
            return folder / name
        raise missing
    try:
        from transformers.utils.hub import cached_file
    except ImportError:
        expected = "a folder; without Transformers nothing is fetched from the hub"
        raise FileNotFoundError(f"{model_name}: got no folder, expected {expected}") from None
    found = cached_file(str(model_name), name, _raise_exceptions_for_missing_entries=False)
    if found is None:
        raise missing
    return Path(found)
