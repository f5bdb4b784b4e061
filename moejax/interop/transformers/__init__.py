"""The sparse blocks of published models: from their configuration to a layer, and their weights.

transformers itself is not needed: a configuration may be a ``config.json``, and weights are read
from the folder of a checkpoint. A block computes what the module of transformers does in
evaluation.

Example:
    >>> from moejax.interop import transformers
    >>> layer, layout = transformers.block(folder)  # doctest: +SKIP
    >>> params = transformers.load(folder, 3)  # doctest: +SKIP
    >>> y, routing = layer.apply(params, x)  # doctest: +SKIP
"""

from moejax.interop.transformers.checkpoints import load, save
from moejax.interop.transformers.families import FAMILIES, block, published

__all__ = ["FAMILIES", "block", "load", "published", "save"]
