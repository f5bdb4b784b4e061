"""Bridges to other libraries, each imported at its first use."""

from importlib import import_module
from types import ModuleType

_MODULES = ("flax", "safetensors", "torch", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return import_module(f"moejax.interop.{name}")
    raise AttributeError(f"module 'moejax.interop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
