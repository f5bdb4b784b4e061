"""The code in README runs as it stands."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_code_runs():
    definition, usage = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(usage, names)
    assert names["p"].shape == (1000, 1)
    assert names["loss"].shape == ()
    assert names["y"].shape == (5, 4)
    # The definition at the top, on the model of the usage.
    x = names["jnp"].ones((5, 16))
    names.update(expert=names["fourier"], params=names["params"]["experts"], x=x)
    names["gates"] = names["jnp"].ones((5, 4)) / 4
    exec(definition, names)
    assert names["y"].shape == (5, 4)
