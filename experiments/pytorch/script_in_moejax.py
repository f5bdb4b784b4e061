"""The same training in moejax, in a process of its own: a line for each result.

    python -m pytorch.script_in_moejax toy FOLDER EPOCHS

Compiled programs are kept where MOEJAX_CACHE_DIR says, as every experiment keeps them.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.training import Step, TrainState, init_state, train_epoch, train_step
from parts.cache import keep_programs
from parts.compiling import QUICK_TO_COMPILE
from pytorch.twins import TWINS, objective

BATCH_SIZE, STEPS = 128, 100


def main(name: str, folder: str, epochs: str) -> None:
    """Trains, and says the mean loss of every epoch."""
    keep_programs(True)
    data = tuple(jnp.asarray(np.load(f"{folder}/{leaf}.npy")) for leaf in "xy")
    twin = TWINS[name]()
    step = train_step(partial(objective, twin), twin.optimizer)
    advance = full_batches if name == "toy" else partial(train_epoch, batch_size=BATCH_SIZE)
    run = jax.jit(partial(advance, step), donate_argnums=0)
    params = jax.jit(twin.init, compiler_options=QUICK_TO_COMPILE)(jax.random.key(0))
    state = init_state(params, twin.optimizer, jax.random.key(1))
    for epoch in range(int(epochs)):
        state, metrics = run(state, data)
        print(epoch + 1, float(metrics["loss"].mean()), flush=True)


def full_batches(step: Step, state: TrainState, data: Any) -> tuple[TrainState, Any]:
    """An epoch of the toy: all points in every step."""
    return jax.lax.scan(lambda state, _: step(state, data), state, length=STEPS)


if __name__ == "__main__":
    main(*sys.argv[1:])
