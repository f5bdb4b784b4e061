"""Many tasks, one set of experts: against PyTorch, one pass over experts, and the command."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

import moejax
from cases import normal, params_of
from commands import refusal, run
from studies.many_tasks_data import FREQUENCIES, NOISE, PHASES, WIDTH, batch, weights
from studies.many_tasks_models import extraction, multi_gate, progressive, shared_bottom
from studies.many_tasks_report import cell_name, correlations, sentence
from studies.many_tasks_training import MODELS
from study_cases import save_no_pictures

pytestmark = pytest.mark.usefixtures("standard_promotion")
TASKS, EXPERTS, N, D, H = 3, 4, 5, 6, 7

EXPERT = moejax.mlp(D, H, H)
TOWER = moejax.mlp(H, 4, 2)


def gates(count):
    return multi_gate(
        EXPERT,
        moejax.linear(D, EXPERTS),
        TOWER,
        num_experts=EXPERTS,
        num_tasks=TASKS,
        num_gates=count,
    )


def levels(own=2, shared=3):
    """Two levels of PLE."""
    first = extraction(
        moejax.mlp(D, H, H),
        moejax.linear(D, own + shared),
        moejax.linear(D, TASKS * own + shared),
        num_tasks=TASKS,
        own=own,
        shared=shared,
    )
    last = extraction(
        moejax.mlp(H, H),
        moejax.linear(H, own + shared),
        None,
        num_tasks=TASKS,
        own=own,
        shared=shared,
    )
    return progressive([first, last], TOWER, num_tasks=TASKS)


def double(layer):
    """Parameters, inputs and outputs of a layer in double precision."""
    params = jax.tree.map(lambda leaf: leaf.astype(float), layer.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (N, D))
    return params, x, layer.apply(params, x)


def in_torch(torch, tree):
    """The parameters as tensors."""
    return jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), tree)


def at(tree, *indices):
    """One layer of a stack of stacks."""
    return jax.tree.map(lambda leaf: leaf[indices], tree)


def perceptron(torch, params, x):
    *hidden, last = params["layers"]
    for layer in hidden:
        x = torch.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


@pytest.mark.parametrize("count", [1, TASKS])
def test_multi_gate_is_a_loop_of_pytorch(count, x64):
    torch = pytest.importorskip("torch")
    params, x, y = double(gates(count))
    params, x = in_torch(torch, params), torch.from_numpy(np.array(x))
    for task in range(TASKS):
        gate = at(params["gates"], task % count)
        weight = torch.softmax(x @ gate["kernel"] + gate["bias"], dim=-1)
        blend = sum(
            weight[:, [e]] * perceptron(torch, at(params["experts"], e), x) for e in range(EXPERTS)
        )
        expected = perceptron(torch, at(params["towers"], task), blend)
        np.testing.assert_allclose(y[task], expected, rtol=1e-12, atol=1e-12)


def test_progressive_layered_extraction_is_a_loop_of_pytorch(x64):
    torch = pytest.importorskip("torch")
    params, x, y = double(levels())
    params, x = in_torch(torch, params), torch.from_numpy(np.array(x))
    own, shared = 2, 3
    inputs, common = [x] * TASKS, x
    for number, level in enumerate(params["levels"]):
        ours = [perceptron(torch, at(level["shared"], e), common) for e in range(shared)]
        mine = [
            [perceptron(torch, at(level["own"], task, e), inputs[task]) for e in range(own)]
            for task in range(TASKS)
        ]
        nexts = []
        for task in range(TASKS):
            gate = at(level["gates"], task)
            weight = torch.softmax(inputs[task] @ gate["kernel"] + gate["bias"], dim=-1)
            seen = mine[task] + ours
            nexts.append(sum(weight[:, [e]] * one for e, one in enumerate(seen)))
        if number == 0:
            gate = level["shared_gate"]
            weight = torch.softmax(common @ gate["kernel"] + gate["bias"], dim=-1)
            seen = [one for each in mine for one in each] + ours
            common = sum(weight[:, [e]] * one for e, one in enumerate(seen))
        inputs = nexts
    for task in range(TASKS):
        expected = perceptron(torch, at(params["towers"], task), inputs[task])
        np.testing.assert_allclose(y[task], expected, rtol=1e-12, atol=1e-12)


def equations(jaxpr):
    """Every equation, those of inner functions included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax_core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def products(model, shape):
    """How often a stack of kernels of this shape is multiplied with something."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    jaxpr = jax.make_jaxpr(model.apply)(params, jax.ShapeDtypeStruct((N, D), jnp.float32))
    return sum(
        equation.primitive.name == "dot_general"
        and any(tuple(operand.aval.shape) == shape for operand in equation.invars)
        for equation in equations(jaxpr.jaxpr)
    )


@pytest.mark.parametrize("num_tasks", [1, 2, 9])
def test_all_gates_share_one_pass_over_the_experts(num_tasks):
    model = multi_gate(
        EXPERT,
        moejax.linear(D, EXPERTS),
        TOWER,
        num_experts=EXPERTS,
        num_tasks=num_tasks,
        num_gates=num_tasks,
    )
    assert products(model, (EXPERTS, D, H)) == 1
    assert products(model, (EXPERTS, H, H)) == 1


def test_all_tasks_share_one_pass_over_the_shared_experts():
    model = levels(own=2, shared=5)
    assert products(model, (5, D, H)) == 1
    assert products(model, (TASKS, 2, D, H)) == 1


def test_equal_gates_are_one_gate():
    one, many = gates(1), gates(TASKS)
    params, x = params_of(one), normal(0, N, D)
    repeated = jax.tree.map(lambda leaf: np.repeat(leaf, TASKS, axis=0), params["gates"])
    y = jax.jit(many.apply)(params | {"gates": repeated}, x)
    np.testing.assert_allclose(y, jax.jit(one.apply)(params, x), rtol=1e-5, atol=1e-6)


def test_a_shared_bottom_is_run_once():
    model = shared_bottom(moejax.linear(D, H), moejax.linear(H, 2), num_tasks=TASKS)
    params, x = jax.device_get((params_of(model), normal(0, N, D)))
    hidden = x @ params["bottom"]["kernel"] + params["bottom"]["bias"]
    for task, y in enumerate(jax.jit(model.apply)(params, x)):
        tower = at(params["towers"], task)
        expected = hidden @ tower["kernel"] + tower["bias"]
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert products(model, (D, H)) == 1


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_tasks_have_the_cosine_asked_for(key, correlation):
    both = np.asarray(jax.jit(weights)(key, correlation))
    cosines = [[1, correlation], [correlation, 1]]
    np.testing.assert_allclose(both @ both.T, cosines, atol=1e-5)
    x, y = jax.jit(batch, static_argnums=2)(key, both, 4000)
    assert x.shape == (4000, WIDTH)
    along = np.asarray(both @ x.T)
    rest = np.asarray(y) - along
    for a, b in zip(FREQUENCIES, PHASES, strict=True):
        rest -= np.sin(a * along + b)
    assert abs(rest.mean()) < 5 * NOISE / math.sqrt(rest.size)
    assert rest.std() == pytest.approx(NOISE, rel=0.05)


def test_the_models_are_of_equal_size():
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, key)))
        for key in [jax.random.key(0)]
        for name, model in MODELS.items()
    }
    gate = WIDTH * 8
    assert sizes["multi-gate"] - sizes["one-gate"] == gate
    assert abs(sizes["shared-bottom"] - sizes["one-gate"] + gate) < 0.03 * sizes["one-gate"]


def test_the_command_ends_with_a_table_and_goes_on(tmp_path, capsys, monkeypatch):
    options = "--steps 50 --batch-size 4 --correlations 1 0.5 --no-cache --out"
    run("many_tasks", "--seeds", "2", *options.split(), str(tmp_path / "out"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["cells"]) == 6
    one, two = (summary["cells"][f"{name}-at-0.5"]["loss"] for name in ("one-gate", "multi-gate"))
    found = summary["differences"]["one-gate minus multi-gate"]["0.5"]["values"]
    np.testing.assert_allclose(found, np.subtract(one["values"], two["values"]), rtol=1e-3)
    head = "| correlation | seeds | shared bottom | one gate | multi gate |"
    assert head in capsys.readouterr().out
    assert (tmp_path / "out" / "many_tasks.png").stat().st_size > 10_000

    again = [*options.split(), str(tmp_path / "out")]
    assert "go on with it by --resume" in refusal("many_tasks", *again, capsys=capsys)
    save_no_pictures(monkeypatch)
    page = tmp_path / "studies.md"
    page.write_text("<!-- many_tasks -->\n<!-- /many_tasks -->\n")
    finished = ["--seeds", "2", "--resume", "--docs", str(tmp_path)]
    run("many_tasks", *again, *finished)
    assert head in page.read_text()
    now = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert now == summary == json.loads((tmp_path / "studies" / "many_tasks.json").read_text())


def test_correlations_are_checked(capsys):
    assert "from 0 to 1, got 2" in refusal("many_tasks", "--correlations", "2", capsys=capsys)


def test_a_sentence_says_which_way():
    make = partial(dict, mean=0)
    rows = {"0": make(low=0.1, high=0.3), "0.5": make(low=-1, high=1), "1": make(low=-2, high=-1)}
    assert sentence("a minus b", rows) == "B beats a at correlations 0, and loses to it at 1."
    unsure = "B is not shown to beat a at any correlation."
    assert sentence("a minus b", {"0": make(low=-1, high=1)}) == unsure
    assert sentence("a minus b", {"0": make(low=None, high=None)}) == unsure


def test_correlations_that_hardly_differ_have_names_of_their_own():
    near = [0.1234567, 0.1234568, 1.0, 0.0]
    names = [cell_name("one-gate", p) for p in near]
    assert correlations(names) == sorted(near)
    assert names[2:] == ["one-gate-at-1", "one-gate-at-0"]
