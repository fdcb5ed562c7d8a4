"""Which backends run which ops, and how states are rounded: one record, from code, the environment or a string."""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from mamba_ops.ops._namespace import mamba
from mamba_ops.registry import Backend, backends
from mamba_ops.registry.errors import ConfigError, RegistryError
from mamba_ops.registry.request import (
    Request,
    entries_of,
    known_op,
    lowered,
    order_of,
    problems,
    unknown_entry,
)

Order = str | Sequence[str] | Mapping[str, str | Sequence[str]]

EVERY = "*"
"""Stands in an order for all ops that it does not name."""


@dataclass(frozen=True)
class BackendConfig:
    """Backends in an order for each op, and settings that they share; checked against a device when it is made.

    Put it in force with `mamba_ops.configure(config)` for the process, or `mamba_ops.use_backend(config)` for a block;
    nothing is recompiled. An op that the order does not name goes by the environment, then by priority. Its settings
    hold as a whole: those of the environment are not looked at.

    Args:
        order: op name to the backends to try, in order, `"*"` standing for all other ops; or a string or list for all.
            A backend without a kernel for an op is passed over under `"*"`, and an error under the op's name. A call
            that the last backend of an order refuses is refused, with every reason. Names in any case.
        stochastic_rounding: round a float16 state of `selective_state_update` up or down at random, without bias, in
            every call that brings no `rounding_seed` of its own: one is drawn for each call, from torch's generator of
            the device. States of other dtypes are rounded to nearest.
        philox_rounds: rounds of the Philox generator that rounds them; 0 is the default of 10.
        flashinfer_algorithm: of the backend `flashinfer`: auto, simple, vertical or horizontal.
        device: what it is checked against. None: the accelerator of this machine, or its CPU.

    Raises:
        ConfigError: with a sentence for everything that is wrong: names that nobody has, with the valid ones, backends
            that cannot run on the device, values. `problems` is the list.
    """

    order: Order = field(default_factory=dict)
    stochastic_rounding: bool = False
    philox_rounds: int = 0
    flashinfer_algorithm: str = "auto"
    device: torch.device | str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        found: list[str] = []
        order = dict(self.order) if isinstance(self.order, Mapping) else {EVERY: self.order}
        named: dict[str, tuple[str, ...]] = {}
        for place, names in order.items():
            names = order_of(names) if isinstance(names, str) else names
            if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
                named[known_op(place) or place] = lowered(names)
            else:
                found.append(f"order: got {names!r} for {place}, expected names of backends")
        object.__setattr__(self, "order", {place: names for place, names in named.items() if names or place != EVERY})
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        try:
            device = torch.device(self.device or device)
        except RuntimeError:
            found.append(f"device: got {self.device!r}, expected one such as cpu or {device}")
        object.__setattr__(self, "device", device)
        found += [f"order: {problem}" for problem in problems(self.request("BackendConfig"))]
        found += [f"order: {sentence}" for sentence in _unusable(self._names(), device)]
        found += [f"{name}: {sentence}" for name, sentence in _wrong_values(self, device)]
        if found:
            raise ConfigError(found)

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
        found: list[str] = []
        values: dict[str, Any] = {}
        order: dict[str, Any] = {}
        try:
            everywhere, named = entries_of(text)
        except RegistryError as error:
            raise ConfigError([str(error)]) from None
        if everywhere:
            order[EVERY] = everywhere
        for key, word in named.items():
            try:
                if key.lower() in READERS:
                    values[key.lower()] = READERS[key.lower()](word)
                elif known_op(key) is None:
                    raise unknown_entry(key, READERS)
                else:
                    order[key] = order_of(word)
            except RegistryError as error:
                found.append(str(error))
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

    def __str__(self) -> str:
        """Return the string that makes this configuration again."""
        defaults = {f.name: f.default for f in fields(self)}
        given = {name: getattr(self, name) for name in READERS if getattr(self, name) != defaults[name]}
        order = {place: ":".join(names) for place, names in _as_mapping(self.order).items()}
        entries = [order.pop(EVERY)] if EVERY in order else []
        return ",".join([*entries, *(f"{name}={value}".lower() for name, value in (order | given).items())])

    def request(self, by: str) -> Request:
        """Return what `use_backend` and `configure` put in force."""
        order = _as_mapping(self.order)
        named = {place: names for place, names in order.items() if place != EVERY}
        return Request(by, order.get(EVERY, ()), named, self._settings())

    def _settings(self) -> dict[str, Hashable]:
        return {name: getattr(self, name) for name in READERS}

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for names in _as_mapping(self.order).values() for name in names))


def _as_mapping(order: Any) -> dict[str, tuple[str, ...]]:
    return dict(order)


def _unusable(names: list[str], device: torch.device) -> list[str]:
    known = {backend.name: backend for backend in backends()}
    reasons = {name: known[name].why_unusable(device.type, by_name=True) for name in names if name in known}
    return [f"{name} {reason}" for name, reason in reasons.items() if reason]


def _wrong_values(config: BackendConfig, device: torch.device) -> list[tuple[str, str]]:
    found = []
    if not isinstance(config.stochastic_rounding, bool):
        found.append(("stochastic_rounding", f"got {config.stochastic_rounding!r}, expected True or False"))
    rounds = config.philox_rounds
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 0:
        found.append(("philox_rounds", f"got {rounds!r}, expected a number of rounds, or 0 for the default of 10"))
    for backend in backends():
        for setting, choices in backend.choices.items():
            name = f"{backend.name}_{setting}"
            value = getattr(config, name, choices[0])
            if value not in choices:
                found.append((name, f"got {value!r}, expected {', '.join(choices)}"))
            elif value != choices[0] and (reason := _why_not_setting(backend, setting, value, device)):
                found.append((name, reason))
    return found


def _why_not_setting(backend: Backend, setting: str, value: str, device: torch.device) -> str | None:
    if reason := backend.why_unusable(device.type, by_name=True):
        return f"{backend.name} {reason}"
    return backend.why_not_setting(setting, value, device) if backend.why_not_setting else None


# -- what the settings are, as text and to the op ---------------------------------------------------------------------


def _yes_or_no(word: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if word.lower() not in words:
        raise RegistryError(f"stochastic_rounding: got {word!r}, expected true or false")
    return words[word.lower()]


def _count(word: str) -> int:
    if not word.isdecimal():
        raise RegistryError(f"philox_rounds: got {word!r}, expected a number of rounds, or 0 for the default of 10")
    return int(word)


def _algorithm(word: str) -> str:
    choices = next(backend.choices["algorithm"] for backend in backends() if backend.name == "flashinfer")
    if word.lower() not in choices:
        raise RegistryError(f"flashinfer_algorithm: got {word!r}, expected {', '.join(choices)}")
    return word.lower()


READERS: dict[str, Callable[[str], Hashable]] = {
    "stochastic_rounding": _yes_or_no,
    "philox_rounds": _count,
    "flashinfer_algorithm": _algorithm,
}
"""The settings, by the names of their fields, each with what reads it from a string."""

mamba.settings.update(READERS)
