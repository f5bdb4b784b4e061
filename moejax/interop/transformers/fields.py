"""A published configuration as a plain dict, whose fields are checked and never guessed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from moejax._arrays import normal_cdf
from moejax._checks import is_integer
from moejax._paths import local
from moejax.base import Array

Config = Mapping[str, Any]

# The names are those of `hidden_act` in published configurations.
ACTIVATIONS = MappingProxyType(
    {
        "gelu": lambda x: x * normal_cdf(x),
        "gelu_new": jax.nn.gelu,
        "gelu_pytorch_tanh": jax.nn.gelu,
        "relu": jax.nn.relu,
        "sigmoid": jax.nn.sigmoid,
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "tanh": jax.numpy.tanh,
    }
)


def as_dict(config: Any) -> Config:
    """The fields of a configuration object, a dict, a ``config.json``, or the folder of one."""
    if isinstance(config, str | os.PathLike):
        path = local(config)
        return read_json(path / "config.json" if path.is_dir() else path)
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "to_dict"):
        return config.to_dict()
    raise ValueError(
        "`config` must be a configuration object of transformers, a dict, or the path of a "
        f"config.json, got {type(config).__name__}."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a file of JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    return value


def get(config: Config, *names: str) -> Any:
    """A field by the first of its names that the configuration has."""
    for name in names:
        if name in config:
            return config[name]
    raise ValueError(
        f"The configuration of {_model(config)} must have the field `{names[0]}`, got none: a "
        "config.json leaves out what has its default, so pass "
        "config=transformers.AutoConfig.from_pretrained(folder)."
    )


def count(config: Config, *names: str) -> int:
    """A field that is a positive integer."""
    value = get(config, *names)
    if not is_integer(value) or value < 1:
        refuse(config, names[0], "be a positive integer", value)
    return value


def one_of(config: Config, name: str, *supported: Any) -> Any:
    """A field that must have one of a few values."""
    value = get(config, name)
    if value not in supported:
        refuse(config, name, f"be {' or '.join(map(repr, supported))}", value)
    return value


def optional(config: Config, name: str, default: Any) -> Any:
    """A field that older configurations of the family do not have."""
    return config.get(name, default)


def activation(config: Config, name: str = "hidden_act") -> Callable[[Array], Array]:
    """The function that a field names."""
    return ACTIVATIONS[one_of(config, name, *ACTIVATIONS)]


def refuse(config: Config, name: str, must: str, value: Any) -> None:
    """Refuses the value of a field, naming the field."""
    raise ValueError(
        f"The field `{name}` of {_model(config)} must {must}, got {value!r}: no other value is "
        "supported."
    )


def _model(config: Config) -> str:
    return f"`{config.get('model_type', 'this model')}`"
