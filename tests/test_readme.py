"""The code in README and in docs runs as it stands."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import moejax
from moejax.training import init_state
from pages import blocks_of
from reference import close

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTORCH = (ROOT / "docs" / "pytorch.md").read_text()
RULES = (ROOT / "docs" / "rules.md").read_text()
SHARDING = (ROOT / "docs" / "sharding.md").read_text()


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


@pytest.mark.usefixtures("standard_promotion")
def test_code_of_the_rules_runs():
    names = {"jax": jax, "jnp": jnp, "moejax": moejax, "partial": partial}
    for code in re.findall(r"```python\n(.*?)```", RULES, flags=re.DOTALL):
        exec(code, names)
    routing = moejax.switch(jnp.eye(8))
    assert names["bias"].shape == (8,)
    y = names["execute"](lambda p, x: x, jnp.zeros(8), jnp.ones((8, 3)), routing)
    assert y.shape == (8, 3)


def test_code_of_the_pytorch_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", PYTORCH, flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert set(names["params"]) == {"router", "experts"}


def table(page, header):
    """The cells of the first table whose header begins so."""
    rows = page[page.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_times_are_those_of_the_comparison_with_pytorch():
    times = []
    for _, eager, by_compiler, ours, *_ in table(PYTORCH, "| ms of a training step |"):
        peers = re.findall(r"\d[\d.]*", f"{eager} {by_compiler}")
        times.append([min(peers, key=float), ours])
    shown = table(README, "| a training step on two CPU cores, ms |")
    assert [row[1:] for row in shown] == times


def test_code_of_the_first_page_is_one_mixture_twice():
    definition, usage = blocks_of("index.md", "python")
    names: dict = {}
    exec(usage, names)
    y, expert = names["y"], moejax.linear(2, 1).apply
    names.update(expert=expert, params=names["params"]["experts"], gates=names["routing"].gates)
    exec(definition, names | {"x": jnp.ones((1000, 2))}, outcome := {})
    close(outcome["y"], y)


@pytest.mark.usefixtures("standard_promotion")
def test_code_of_the_page_about_speed_runs(key):
    [code] = blocks_of("speed.md", "python")
    names: dict = {}
    exec(code, names)
    state = init_state(jnp.zeros(3), names["optimizer"], key)
    state, metrics = names["step"](state, jnp.ones(3))
    assert metrics["loss"] == 9
    assert state.opt_state.gradients.tolist() == [-6, -6, -6]


def test_the_rules_page_names_what_exists_and_every_rule():
    named = set(re.findall(r"`(\w+)", RULES))
    rules = {
        name
        for name in moejax.__all__
        if getattr(getattr(moejax, name), "__annotations__", {}).get("return")
        in ("Routing", "ExpertChoice", "SoftSlots")
    }
    assert len(rules) > 10
    assert rules <= named, f"docs/rules.md leaves out {rules - named}"
    table = RULES[: RULES.index("## Routers")]
    linked = set(re.findall(r"^\| `(\w+)", table, flags=re.MULTILINE))
    assert linked <= set(moejax.__all__)


def test_code_of_the_page_on_devices_runs():
    [code] = re.findall(r"```python\n(.*?)```", SHARDING, flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["y"].shape == (16, 64)
    assert names["params"]["experts"]["up"]["kernel"].sharding.shard_shape((8, 64, 128))[0] == 2
