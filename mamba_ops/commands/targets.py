"""The models that subcommands work on, found by what the user names: their own factory, or a model of Transformers."""

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ops.audit import _torch

TRANSFORMERS = "transformers:"
PROMPTS = (512, 300, 1024)  # tokens: of one size with chunks of 256, of another, and of several
FORMS = "package.module:factory, file.py:factory, transformers:TYPE or transformers:FOLDER"


class TargetError(ValueError):
    """A model cannot be found or made; the cause is the error in user code, if there is one."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def on(self, model: Callable[..., Any]) -> Any:
        """Call with copies of the arguments, as a model may write to its caches."""
        args, kwargs = copy.deepcopy((self.args, dict(self.kwargs or {})))
        return model(*args, **kwargs)


@dataclass(frozen=True)
class Target:
    """A model, in eval mode unless it was to stay as made, and calls of it, best of different sizes."""

    model: nn.Module
    calls: list[Call]


def load_target(what: str, device: torch.device, *, layers: int | None = None, as_made: bool = False) -> Target:
    """Find a model and example inputs.

    Args:
        what: `package.module:factory` or `file.py:factory`, a function without arguments that returns the model and its
            inputs: a tensor, a tuple of positional or a dict of keyword arguments, or a list of these, one a call;
            or `transformers:TYPE`, such a model with random weights, or `transformers:FOLDER`, a checkpoint. These
            read three prompts.
        device: where the model goes, and tensors among the inputs.
        layers: of a model with random weights.
        as_made: whether the model stays in training mode if the factory left it there.

    Raises:
        TargetError: nothing there, or the factory raised, or returned something else.
    """
    if what.startswith(TRANSFORMERS):
        model = transformers_model(what.removeprefix(TRANSFORMERS), device, layers=layers)
        tokens = torch.randint(_vocabulary(model), (1, max(PROMPTS)), generator=torch.Generator().manual_seed(0))
        return as_target((model, [{"input_ids": tokens[:, :n], "use_cache": False} for n in PROMPTS]), what, device)
    if layers is not None:
        raise TargetError(f"got {layers} layers for {what}, expected them for {TRANSFORMERS}mamba2 alone")
    return as_target(_call_factory(what), f"what {what} returned", device, as_made=as_made)


def as_target(made: Any, what: str, device: torch.device, *, as_made: bool = False) -> Target:
    """Read `(model, inputs)` as `load_target` describes it; `what` is its name in errors."""
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise TargetError(f"{what}: got {_shape_of(made)}, expected (model, inputs)")
    model, inputs = made
    calls = [_call(one, what, device) for one in (inputs if isinstance(inputs, list) else [inputs])]
    if not calls:
        raise TargetError(f"{what}: got no inputs, expected at least one call's")
    return Target((model if as_made else model.eval()).to(device), calls)


def _call(inputs: Any, what: str, device: torch.device) -> Call:
    moved = _torch.map_tensors(lambda tensor: tensor.to(device), inputs)
    if isinstance(moved, Tensor):
        return Call((moved,))
    if isinstance(moved, tuple):
        return Call(moved)
    if isinstance(moved, dict):
        return Call((), moved)
    expected = "a tensor, a tuple, a dict, or a list of these"
    raise TargetError(f"{what}: got inputs of type {type(inputs).__name__}, expected {expected}")


def _shape_of(made: object) -> str:
    """Describe what a factory returned, in a few words."""
    if isinstance(made, tuple):
        return f"({', '.join(type(item).__name__ for item in made)})"
    return type(made).__name__


# -- a factory of the user's ------------------------------------------------------------------------------------------


def _call_factory(what: str) -> Any:
    where, colon, name = what.rpartition(":")
    if not colon or not where or not name:
        raise TargetError(f"got {what}, expected {FORMS}")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise TargetError(f"{where} has no function {name}")
    try:
        return factory()
    except Exception as error:
        raise TargetError(f"{what} raised {type(error).__name__}") from error


def _load_file(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise TargetError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # as dataclasses and torch.compile look their modules up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        _restore(path.stem, before)
        raise TargetError(f"{path} raised {type(error).__name__}") from error
    return module


def _restore(name: str, module: Any) -> None:
    if module is None:
        del sys.modules[name]
    else:
        sys.modules[name] = module


def _load_module(name: str) -> object:
    with _current_folder_on_path():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise TargetError(f"there is no module {error.name}; for a file, write its .py") from None
            raise TargetError(f"{name} raised {type(error).__name__}") from error
        except Exception as error:
            raise TargetError(f"{name} raised {type(error).__name__}") from error


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Within the block, modules are found in the current folder too, which a command's own path does not hold."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


# -- models of Transformers -------------------------------------------------------------------------------------------


def transformers_model(
    what: str, device: torch.device, *, layers: int | None = None, width: int | None = None
) -> nn.Module:
    """Return a causal language model in float32.

    Args:
        what: a model type ("mamba2"), for random but always the same weights and bytes as tokens; or a folder with a
            checkpoint. Nothing is downloaded.
        device: where it goes.
        layers, width: sizes of a model with random weights. None: 2 layers of width 128.

    Raises:
        TargetError: there is no such model, or it cannot be loaded.
    """
    transformers = require_transformers()
    folder = Path(what)
    if not folder.is_dir():
        if what != "mamba2":
            raise TargetError(f"got {what}, expected mamba2, or a folder with a checkpoint")
        width = width or 128
        config = transformers.Mamba2Config(
            vocab_size=256,
            hidden_size=width,
            num_hidden_layers=layers or 2,
            num_heads=2 * width // 32,
            head_dim=32,
            state_size=64,
            n_groups=1,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.Mamba2ForCausalLM(config)
    elif layers or width:
        raise TargetError(f"got {layers or width} layers for {what}, expected none: a checkpoint has its own")
    elif not (folder / "config.json").is_file():
        raise TargetError(f"there is no config.json in {folder}, expected a checkpoint saved by Transformers")
    else:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise TargetError(f"Transformers cannot load {folder}: {error}") from error
    return model.eval().to(device)  # type: ignore[no-any-return]


def tokenize(text: bytes, what: str) -> list[int]:
    """Return a text as tokens of a model of Transformers: the checkpoint's own, if it has a tokenizer, else bytes."""
    transformers = require_transformers()
    if not any(
        (Path(what) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    ):
        return list(text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(what, local_files_only=True)
    return list(tokenizer(text.decode(errors="replace"), add_special_tokens=False)["input_ids"])


def require_transformers() -> Any:
    """Import Transformers, or say what to install."""
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        sentence = "transformers is not installed, and this needs it; pip install 'mamba-ops[transformers]'"
        raise TargetError(sentence) from None
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block, Transformers shows errors alone, neither progress nor which kernels it has not got."""
    logging = require_transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
