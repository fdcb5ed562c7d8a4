"""Which backends run which ops, and how states are rounded: one record, from code, the environment or a string."""

import json
import os
import platform
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mamba_ops.ops._namespace import mamba
from mamba_ops.registry import Backend, backends
from mamba_ops.registry.errors import ConfigError, RegistryError, unknown
from mamba_ops.registry.request import known_op, lowered, order_of, parse, problems
from mamba_ops.registry.snapshot import Request

Order = str | Sequence[str] | Mapping[str, str | Sequence[str]]

EVERY = "*"
"""Stands in an order for all ops that it does not name."""
FILE_KIND = "mamba-ops choices 1"
"""What a file of choices begins with."""


def device_kind(device: torch.device) -> str:
    """Return what a device is, such that timings of one hold for others of the same name."""
    if device.type == "cpu":
        return f"cpu {platform.machine()}"
    return str(torch.get_device_module(device).get_device_name(device))


@dataclass(frozen=True, init=False)
class BackendConfig:
    """Backends in an order for each op, and settings that they share; checked against a device when it is made.

    Put it in force with `mamba_ops.configure(config)` for the process, or `mamba_ops.use_backend(config)` for a block;
    nothing is recompiled. An op that the order does not name goes by the environment, then by priority. Its settings
    hold as a whole: those of the environment are not looked at.

    Args:
        order: op name to the backends to try, in order, `"*"` standing for all other ops; or a string or list for all.
            A backend without a kernel for an op is passed over under `"*"`, and an error under the op's name. A call
            that the last backend of an order refuses is refused, with every reason. Names in any case.
        stochastic_rounding: round a state of float16, int16 or float8_e4m3fn of the ops that take a `rounding_seed`,
            as `selective_state_update`, up or down at random, without bias, in every call that brings none: one is
            drawn for each call, from torch's generator of the device. States of other dtypes are rounded to nearest.
        philox_rounds: rounds of the Philox generator that rounds them, 100 at most; 0 is the default of 10.
        device: what it is checked against. None: the accelerator of this machine, or its CPU.
        why: op name to a sentence that says why it has its order; `explain` repeats it.
        backend_settings: `<backend>_<setting>=value` for each setting of a backend, such as
            `flashinfer_algorithm="simple"` (auto, simple, vertical or horizontal). Each can be read as an attribute.

    Raises:
        ConfigError: with a sentence for everything that is wrong: unknown names, with the valid ones, backends that
            cannot run on the device, values. `problems` is the list.
    """

    order: Mapping[str, tuple[str, ...]]
    stochastic_rounding: bool
    philox_rounds: int
    backend_settings: Mapping[str, str]
    device: torch.device = field(compare=False)
    why: Mapping[str, str] = field(compare=False)

    def __init__(
        self,
        order: Order | None = None,
        stochastic_rounding: bool = False,
        philox_rounds: int = 0,
        *,
        device: torch.device | str | None = None,
        why: Mapping[str, str] | None = None,
        **backend_settings: str,
    ) -> None:
        found: list[str] = []
        orders = {} if order is None else dict(order) if isinstance(order, Mapping) else {EVERY: order}
        named: dict[str, tuple[str, ...]] = {}
        for place, names in orders.items():
            names = order_of(names) if isinstance(names, str) else names
            if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
                named[known_op(place) or place] = lowered(names)
            else:
                found.append(f"order: got {names!r} for {place}, expected names of backends")
        where = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        try:
            where = torch.device(device or where)
        except RuntimeError:
            found.append(f"device: got {device!r}, expected one such as cpu or {where}")
        values: dict[str, Any] = {
            "order": {place: names for place, names in named.items() if names or place != EVERY},
            "stochastic_rounding": stochastic_rounding,
            "philox_rounds": philox_rounds,
            "backend_settings": dict(backend_settings),
            "device": where,
            "why": dict(why or {}),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        found += [f"order: {problem}" for problem in problems(self.request("BackendConfig"))]
        found += [f"order: {sentence}" for sentence in _unusable(self.order, where)]
        found += _wrong_values(self)
        if found:
            raise ConfigError(found)

    def __getattr__(self, name: str) -> str:
        """Return a backend's setting: what was given, or its default."""
        for backend in () if name.startswith("__") else backends():
            for setting, choices in backend.choices.items():
                if name == f"{backend.name}_{setting}":
                    return self.backend_settings.get(name, choices[0])
        raise AttributeError(f"BackendConfig has no attribute {name!r}")

    @classmethod
    def from_string(cls, text: str, *, device: torch.device | str | None = None) -> "BackendConfig":
        """Read entries separated by commas, as a command line or the environment has them.

        Args:
            text: `flashinfer`, a backend, or `flashinfer:triton`, several in order, for all ops; at most one of these.
                `selective_state_update=flashinfer:triton` for one op. `stochastic_rounding=true`, `philox_rounds=6`,
                `flashinfer_algorithm=simple`. Names in any case.
            device: what it is checked against, as for the class.

        Raises:
            ConfigError: as the class, and for entries that are none of these.
        """
        orders, values, wrong = parse(text, mamba)
        order = {name or EVERY: names for name, names in orders.items()}
        found = [str(error) for error in wrong]
        try:
            config = cls(order, device=device, **values)
        except ConfigError as error:
            raise ConfigError([*found, *error.problems]) from None
        if found:
            raise ConfigError(found)
        return config

    @classmethod
    def from_env(cls, *, device: torch.device | str | None = None) -> "BackendConfig":
        """Read the environment variable MAMBA_OPS_BACKEND, in the form of `from_string`.

        Raises:
            ConfigError: as `from_string`.
        """
        try:
            return cls.from_string(os.environ.get("MAMBA_OPS_BACKEND", ""), device=device)
        except ConfigError as error:
            raise ConfigError([f"MAMBA_OPS_BACKEND: {problem}" for problem in error.problems]) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> "BackendConfig":
        """Read a file that `mamba-ops bench --choose` has written.

        Nothing is timed and nothing is in force yet. All ranks that load one file choose alike.

        Args:
            path: the file.
            device: what it is checked against, as for the class: it must be of the kind that was timed.

        Raises:
            ConfigError: as the class; the file is none of these, or was written on another device.
            OSError: it cannot be read.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            is_right = found["kind"] == FILE_KIND
            order, why, timed_on = found["order"], found["why"], found["device"]
        except (ValueError, KeyError, TypeError):
            is_right = False
        if not is_right or not isinstance(order, Mapping) or not isinstance(why, Mapping):
            raise ConfigError([f"{path}: expected a file that mamba-ops bench --choose has written"])
        try:
            config = cls(order, device=device, why={op: f"{path}: {sentence}" for op, sentence in why.items()})
        except ConfigError as error:
            raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None
        if (here := device_kind(config.device)) != timed_on:
            hint = f"run mamba-ops bench --choose {path} here"
            raise ConfigError([f"{path}: got timings of {timed_on}, expected those of {here}; {hint}"])
        return config

    def __str__(self) -> str:
        """Return the string that makes this configuration again."""
        order = {place: ":".join(names) for place, names in self.order.items()}
        entries = [order.pop(EVERY)] if EVERY in order else []
        defaults = {"stochastic_rounding": False, "philox_rounds": 0} | {
            f"{b.name}_{setting}": choices[0] for b in backends() for setting, choices in b.choices.items()
        }
        given = {name: value for name, value in self._settings().items() if value != defaults.get(name)}
        return ",".join([*entries, *(f"{name}={value}".lower() for name, value in (order | given).items())])

    def request(self, by: str) -> Request:
        """Return what `use_backend` and `configure` put in force."""
        named = tuple((place, names) for place, names in self.order.items() if place != EVERY)
        settings, why = tuple(self._settings().items()), tuple(self.why.items())
        return Request(by, self.order.get(EVERY, ()), named, settings, why=why)

    def _settings(self) -> dict[str, Hashable]:
        own = {"stochastic_rounding": self.stochastic_rounding, "philox_rounds": self.philox_rounds}
        return {**own, **self.backend_settings}


def _unusable(order: Mapping[str, Sequence[str]], device: torch.device) -> list[str]:
    known = {backend.name: backend for backend in backends()}
    names = dict.fromkeys(name for names in order.values() for name in names if name in known)
    reasons = {name: known[name].why_unusable(device.type, by_name=True) for name in names}
    return [f"{name} {reason}" for name, reason in reasons.items() if reason]


def _wrong_values(config: BackendConfig) -> list[str]:
    found = []
    if not isinstance(config.stochastic_rounding, bool):
        found.append(f"stochastic_rounding: got {config.stochastic_rounding!r}, expected True or False")
    rounds = config.philox_rounds
    if not isinstance(rounds, int) or isinstance(rounds, bool) or not 0 <= rounds <= 100:
        found.append(
            f"philox_rounds: got {rounds!r}, expected a number of rounds, 1 to 100, or 0 for the default of 10"
        )
    known = {f"{b.name}_{setting}": (b, setting) for b in backends() for setting in b.choices}
    for name, value in config.backend_settings.items():
        if name not in known:
            found.append(str(unknown("setting", name, ["stochastic_rounding", "philox_rounds", *known])))
            continue
        backend, setting = known[name]
        choices = backend.choices[setting]
        if value not in choices:
            found.append(f"{name}: got {value!r}, expected {', '.join(choices)}")
        elif value != choices[0] and (reason := _why_not_setting(backend, setting, value, config.device)):
            found.append(f"{name}: {reason}")
    return found


def _why_not_setting(backend: Backend, setting: str, value: str, device: torch.device) -> str | None:
    if reason := backend.why_unusable(device.type, by_name=True):
        return f"{backend.name} {reason}"
    return backend.why_not_setting(setting, value, device) if backend.why_not_setting else None


# -- the settings of the ops, as text ---------------------------------------------------------------------------------


def _yes_or_no(word: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if word.lower() not in words:
        raise RegistryError(f"stochastic_rounding: got {word!r}, expected true or false")
    return words[word.lower()]


def _count(word: str) -> int:
    if not word.isdecimal():
        raise RegistryError(f"philox_rounds: got {word!r}, expected a number of rounds, or 0 for the default of 10")
    return int(word)


mamba.settings.update(stochastic_rounding=_yes_or_no, philox_rounds=_count)
