"""The same run in PyTorch and in moejax: live where torch is installed, else stored numbers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.interop import torch as conversion
from pages import DOCS
from parts.ending import EndedError, RefusedError
from pytorch import twins
from pytorch.problems import batches
from pytorch.table import DESCRIPTIONS, waits
from pytorch.twins import Problem
from pytorch_cases import TWINS, problem

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax and flax rely on it

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"outputs": 1e-14, "gradients": 1e-14, "losses": 1e-13, "parameters": 1e-12}
ROUNDING = {"outputs": 1e-5, "gradients": 1e-5, "losses": 1e-4}  # float32 grows along a run


def stored(name):
    run = json.loads((GOLDEN / "pytorch.json").read_text())["runs"][name]
    arrays = lambda part: {key: np.array(value) for key, value in part.items()}  # noqa: E731
    start, gradients, parameters = map(arrays, (run["start"], run["gradients"], run["parameters"]))
    outputs, losses = np.array(run["outputs"]), np.array(run["losses"])
    return start, twins.Trace(outputs, gradients, losses, parameters)


@pytest.fixture(scope="session")
def torch():
    """PyTorch; where it must be there, being without it is a failure."""
    if os.environ.get("MOEJAX_REQUIRE_TORCH") == "1":
        import torch
    else:
        torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def live(torch, monkeypatch):
    """Runs a study in PyTorch, now."""
    monkeypatch.syspath_prepend(str(GOLDEN))
    import write_pytorch

    return write_pytorch.reference


def exact_attention(queries, keys, values, *, is_causal):
    """JAX's own takes its softmax in float32, whatever the precision of its inputs."""
    assert is_causal
    scores = jnp.einsum("bqhw,bkhw->bhqk", queries, keys) / queries.shape[-1] ** 0.5
    before = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(scores, where=before[None, None])
    return jnp.einsum("bhqk,bkhw->bqhw", weights, values)


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", exact_attention)


def check(name, start, trace):
    ours = twins.run_moejax(TWINS[name], start, problem(name), np.float64)
    worst = twins.differences(trace, ours)
    assert {part: value for part, value in worst.items() if not value <= TOLERANCE[part]} == {}


@pytest.mark.parametrize("name", TWINS)
def test_the_stored_run(name, exact):
    check(name, *stored(name))


@pytest.mark.parametrize("name", TWINS)
def test_the_live_run(name, live, exact):
    check(name, *live(name))


@pytest.mark.parametrize("name", TWINS)
def test_stored_numbers_are_those_of_torch(name, live):
    start, trace = stored(name)
    live_start, live_trace = live(name)
    jax.tree.map(np.testing.assert_array_equal, start, live_start)
    worst = twins.differences(trace, live_trace)
    assert {part: value for part, value in worst.items() if not value <= TOLERANCE[part]} == {}


@pytest.mark.parametrize("name", TWINS)
def test_float32(name):
    start, trace = stored(name)
    ours = twins.run_moejax(TWINS[name], start, problem(name), np.float32)
    assert ours.losses.dtype == ours.outputs.dtype == np.float32
    worst = twins.differences(trace, ours)
    assert {part: worst[part] for part in ROUNDING if not worst[part] <= ROUNDING[part]} == {}


def test_training_moves_every_weight():
    for name in TWINS:
        start, trace = stored(name)
        same = [key for key in start if np.array_equal(start[key], trace.parameters[key])]
        assert all(key.startswith("noise.") for key in same), same


def test_a_module_takes_the_weights_and_gives_them_back(torch, key):
    class SwiGLU(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = torch.nn.Linear(4, 8, bias=False)
            self.w2 = torch.nn.Linear(8, 4, bias=False)
            self.w3 = torch.nn.Linear(4, 8, bias=False)

        def forward(self, x):
            return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))

    layer, layout = moejax.glu(4, 8), conversion.glu(4, 8, gate="w1", up="w3", down="w2")
    params, x = layer.init(key), np.asarray(jax.random.normal(key, (3, 4)))
    module, state_dict = SwiGLU(), conversion.to_torch(layout, params)
    module.load_state_dict(conversion.as_tensors(state_dict))
    theirs = module(torch.from_numpy(x.copy())).detach().numpy()
    np.testing.assert_allclose(theirs, layer.apply(params, jnp.asarray(x)), atol=1e-6)
    back = conversion.from_torch(layout, module.state_dict())
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_grouped_product_is_the_loop_over_experts(torch):
    from pytorch.recipes import STUDIES

    torch.manual_seed(0)
    models = [STUDIES[name].model() for name in ("language", "language_grouped")]
    models[1].load_state_dict(models[0].state_dict())
    text = torch.randint(0, 97, (2, 16))
    loop, grouped = (model(text) for model in models)
    torch.testing.assert_close(loop, grouped, rtol=0, atol=1e-5)
    loop.square().sum().backward(), grouped.square().sum().backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_noise_is_on_in_training_only(torch):
    from pytorch import modules

    torch.manual_seed(0)
    module, x = modules.sparse(4, (5, 4, 3)), torch.randn(8, 5)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_an_expert_sees_only_its_own_rows(torch):
    from pytorch import modules

    torch.manual_seed(0)
    module, seen = modules.hard(4, (5, 4, 3)), []
    for expert in module.experts:
        expert.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    module(torch.randn(8, 5))
    assert sum(seen) == 8


def test_the_script_in_torch_needs_no_jax(torch):
    experiments = Path(__file__).parent.parent / "experiments"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(experiments), *sys.path])}
    code = "import sys, pytorch.script_in_torch; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_waits_are_of_whole_processes(torch, monkeypatch):
    from pytorch import from_the_start, ways

    monkeypatch.setattr(ways, "compiler", lambda: None)  # torch.compile takes half a minute
    monkeypatch.setattr(from_the_start, "EPOCHS", 2)
    x, y = np.ones((256, 784)), np.arange(256) % 10
    found = from_the_start.waits("soft", Problem(x, y, y).astype(np.float32), 1, set())
    names = ["PyTorch, DataLoader", "PyTorch, indexing", "moejax", "moejax, programs kept"]
    assert list(found["first"]) == names
    assert all(0.1 < found["first"][name] < found["whole"][name] for name in names)
    with pytest.raises(EndedError, match="script_in_torch nothing ended with 1"):
        from_the_start.wait(["pytorch.script_in_torch", "nothing"], Path())


def test_fewer_examples_than_a_batch_are_refused():
    assert batches(10, 4, most=5).shape == (2, 4)
    with pytest.raises(RefusedError, match="batches of 64 examples, and there are 20"):
        batches(20, 64, most=5)


def test_the_table_sets_cold_beside_cold_and_kept_beside_the_best():
    theirs = {"loop": 4.0, "torch.compile": 9.0, "torch.compile, programs kept": 3.0}
    times = {f"PyTorch, {way}": seconds for way, seconds in theirs.items()}
    times |= {"moejax": 2.0, "moejax, programs kept": 1.0}
    found = waits({"toy": {"first": times, "whole": times, "busy_elsewhere": 0.0}})
    cells = "4.0 (loop) | 2.0 | 2.00 | 3.0 (torch.compile, programs kept) | 1.0 | 3.00 |"
    assert f"| toy, 2 linear experts, Adam | end | {cells}" in found.splitlines()


def test_the_page_names_the_tolerance_of_every_model(torch):
    from compare_pytorch import LOSS_TOLERANCE

    page = (DOCS / "pytorch.md").read_text()
    for name, tolerance in LOSS_TOLERANCE.items():
        row = rf"^\| {re.escape(DESCRIPTIONS[name])} \|.* float64 \|(.*)\|$"
        [(_, _, losses, _)] = [cells.split("|") for cells in re.findall(row, page, re.MULTILINE)]
        assert float(losses) <= tolerance
        assert f"{tolerance:.0e} ({name})" in page
