"""Writes pytorch.json: short runs of small models in PyTorch itself, in float64.

    PYTHONPATH=experiments:tests python tests/golden/write_pytorch.py

Every number is written with all its digits, so that it is read back exactly.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pytorch import language_model, modules
from pytorch.recipes import STUDIES
from pytorch.training import initial_state, run_torch
from pytorch_cases import MIXTURE, SIZES, WIDTHS, problem

PATH = Path(__file__).parent / "pytorch.json"
SMALL = {
    "toy": STUDIES["toy"],
    "dense": STUDIES["dense"]._replace(model=partial(modules.dense, WIDTHS)),
    "soft": STUDIES["soft"]._replace(model=partial(modules.soft, 4, WIDTHS)),
    "sparse": STUDIES["sparse"]._replace(model=partial(modules.sparse, 4, WIDTHS)),
    "hard": STUDIES["hard"]._replace(model=partial(modules.hard, 4, WIDTHS)),
    "language": STUDIES["language"]._replace(
        model=partial(language_model.sparse, language_model.Sizes(*SIZES[:4], *MIXTURE))
    ),
}


def reference(name):
    """The weights that the run starts from, and what it leaves."""
    start = {key: value.astype(np.float64) for key, value in initial_state(SMALL[name], 0).items()}
    return start, run_torch(SMALL[name], start, problem(name), np.float64)


def main():
    """Writes all of them."""
    runs = {}
    for name in SMALL:
        start, trace = reference(name)
        runs[name] = {"start": start, **trace._asdict()}
    record = {"torch": torch.__version__, "runs": runs}
    PATH.write_text(json.dumps(record, default=np.ndarray.tolist, indent=None) + "\n")


if __name__ == "__main__":
    main()
