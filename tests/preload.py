"""What the experiments import, imported once before processes are forked that run them."""

import flax.nnx  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401

import commands  # noqa: F401
import mnist  # noqa: F401
import moejax.plot  # noqa: F401
import settings
import toy  # noqa: F401
from moejax.checkpoint.folder import orbax

settings.save_time()
with orbax():
    pass
