"""Checkpoints: what a run needs to go on, written by orbax and checked when read back.

A checkpoint is a folder named after its step, with two items that orbax alone can read too:
``state``, the leaves of a pytree by name (``params.router.kernel``), and ``manifest``, JSON with
the configuration, the versions of the libraries, and the shape, dtype and SHA-256 of every leaf.
It gets its name when it is complete, so a run that is killed while it saves leaves the previous
checkpoint untouched. Nothing in it is pickled.
"""

from moejax.checkpoint.folder import discard, latest
from moejax.checkpoint.read import Checkpoint, read_config, restore
from moejax.checkpoint.write import Save, save, writer

__all__ = ["Checkpoint", "Save", "discard", "latest", "read_config", "restore", "save", "writer"]
