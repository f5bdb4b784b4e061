"""Small twins, and the data on which PyTorch and moejax are compared."""

import numpy as np

from pytorch import twins

WIDTHS = (5, 4, 3)
TWINS = {
    "toy": twins.toy_mixture(),
    "dense": twins.dense(WIDTHS),
    "soft": twins.soft(4, WIDTHS),
    "sparse": twins.sparse(4, WIDTHS),
    "hard": twins.hard(4, WIDTHS),
}


def problem(name):
    random = np.random.default_rng(0)
    x = random.standard_normal((24, 2 if name == "toy" else 5))
    y = (x[:, 0] > 0).astype(np.float64) if name == "toy" else random.integers(0, 3, 24)
    return twins.Problem(x, y, np.stack([random.permutation(24)[:8] for _ in range(40)]))
