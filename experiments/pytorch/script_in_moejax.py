"""The same training in moejax, in a process of its own: a line for each result.

    python -m pytorch.script_in_moejax FOLDER EPOCHS NUMBER toy

Compiled programs are kept where MOEJAX_CACHE_DIR says, as every experiment keeps them.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.training import Masked, TrainState, init_state, train_epoch, train_step
from parts.cache import keep_programs
from parts.compiling import QUICK_TO_COMPILE, compile_in_background
from pytorch.twins import TWINS, Twin, full_batches
from pytorch.ways import BATCH_SIZE


def main(folder: str, epochs: str, number: str, name: str) -> None:
    """Trains, and says the mean loss of every epoch."""
    keep_programs(True)
    x, y = (jnp.asarray(np.load(f"{folder}/{leaf}.npy")) for leaf in "xy")
    data = Masked((x, y), jnp.ones(len(x), bool))
    twin = TWINS[name]()
    step = train_step(partial(masked_objective, twin), twin.optimizer)
    advance = (
        partial(train_epoch, batch_size=int(number))
        if name in BATCH_SIZE
        else partial(full_batches, steps=int(number))
    )
    key, initial = jax.random.key(0), partial(start, twin)
    (begin, run), _ = compile_in_background(
        (jax.jit(initial, compiler_options=QUICK_TO_COMPILE), (key,)),
        (jax.jit(partial(advance, step), donate_argnums=0), (jax.eval_shape(initial, key), data)),
    )()
    state = begin(key)
    for epoch in range(int(epochs)):
        state, metrics = run(state, data)
        print(epoch + 1, float(metrics["loss"].mean()), flush=True)


def start(twin: Twin, key: jax.Array) -> TrainState:
    """The state before the first step."""
    init_key, run_key = jax.random.split(key)
    return init_state(twin.init(init_key), twin.optimizer, run_key)


def masked_objective(
    twin: Twin, params: Any, batch: Masked, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The twin's loss over the examples that count, so that one step takes every batch."""
    x, y = batch.data
    losses = jax.vmap(twin.loss)(twin.apply(params, x)[:, None], y[:, None])
    return jnp.mean(losses, where=batch.mask), {}


if __name__ == "__main__":
    main(*sys.argv[1:])
