"""What processes that train import late, imported once before they are forked."""

import flax.nnx  # noqa: F401
import matplotlib.figure  # noqa: F401

import test_resume  # noqa: F401
from moejax.checkpoint.folder import orbax

with orbax():
    pass
