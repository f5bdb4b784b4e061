"""Small twins, and the data on which PyTorch and moejax are compared."""

import numpy as np

from language.contenders import Mixture
from language.transformer import Sizes
from pytorch import twins
from pytorch.language_twin import language

WIDTHS = (5, 4, 3)
SIZES = Sizes(vocabulary=7, width=8, layers=1, heads=2, context=6)
MIXTURE = Mixture(num_experts=3, k=2, hidden=4)
TWINS = {
    "toy": twins.toy_mixture(),
    "dense": twins.dense(WIDTHS),
    "soft": twins.soft(4, WIDTHS),
    "sparse": twins.sparse(4, WIDTHS),
    "hard": twins.hard(4, WIDTHS),
    "language": language(SIZES, MIXTURE),
}


def problem(name):
    random = np.random.default_rng(0)
    if name == "language":
        text = random.integers(0, SIZES.vocabulary, (24, SIZES.context + 1))
        return twins.Problem(text[:, :-1], text[:, 1:], batches(random))
    x = random.standard_normal((24, 2 if name == "toy" else 5))
    y = (x[:, 0] > 0).astype(np.float64) if name == "toy" else random.integers(0, 3, 24)
    return twins.Problem(x, y, batches(random))


def batches(random):
    return np.stack([random.permutation(24)[:8] for _ in range(40)])
