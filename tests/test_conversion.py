"""Params to PyTorch's layout and back: exact, and every mismatch is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import params_of
from moejax.interop import torch as conversion

LAYERS = {
    "linear": (moejax.linear(3, 2), conversion.linear(3, 2)),
    "no bias": (moejax.linear(3, 2, bias=False), conversion.linear(3, 2, bias=False)),
    "mlp": (moejax.mlp(3, 5, 2), conversion.mlp(3, 5, 2)),
    "glu": (moejax.glu(3, 5), conversion.glu(3, 5, gate="w1", up="w3", down="w2")),
    "noisy router": (
        moejax.noisy(moejax.linear(3, 4), moejax.linear(3, 4)),
        {
            "router": conversion.at("gate", conversion.linear(3, 4)),
            "noise": conversion.at("noise", conversion.linear(3, 4)),
        },
    ),
}


def fused(interleaved=False, axis=0):
    """A gated layer whose gate and up are one tensor, [2 F, D] or its transpose."""
    shape, axes = ((10, 3), (1, 0)) if axis == 0 else ((3, 10), (0, 1))
    whole = conversion.Tensor("gate_up.weight", shape, axes)
    gate, up = conversion.parts(whole, 2, axis=axis, interleaved=interleaved)
    down = conversion.at("down", conversion.linear(5, 3, bias=False))
    return {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": down}


LAYERS |= {
    "fused halves": (moejax.glu(3, 5), fused()),
    "interleaved": (moejax.glu(3, 5), fused(interleaved=True)),
    "interleaved along the other axis": (moejax.glu(3, 5), fused(interleaved=True, axis=1)),
    "in one tensor": (moejax.stack(moejax.glu(3, 5), 6), conversion.stacked(fused(), 6)),
    "in another shape": (
        moejax.stack(moejax.linear(3, 2, bias=False), 6),
        {"kernel": conversion.Tensor("w", (6, 2, 3), (0, 2, 1), stored=(12, 3))},
    ),
}
LAYERS |= {
    f"mixture of {name}": (
        moejax.moe(layer, moejax.mlp(3, 4, 6), num_experts=6),
        conversion.moe(layout, conversion.mlp(3, 4, 6), num_experts=6),
    )
    for name, (layer, layout) in LAYERS.items()
    if name not in {"in one tensor", "in another shape"}
}
LAYERS["mixture of mixtures"] = (
    moejax.moe(LAYERS["mixture of mlp"][0], moejax.linear(3, 2), num_experts=2),
    conversion.moe(LAYERS["mixture of mlp"][1], conversion.linear(3, 2), num_experts=2),
)


def same(one, other):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_round_trip_is_exact(name, dtype):
    layer, layout = LAYERS[name]
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params_of(layer))
    state_dict = conversion.to_torch(layout, params)
    jax.tree.map(same, conversion.from_torch(layout, state_dict), params)
    assert all(
        array.flags["C_CONTIGUOUS"] and array.flags["WRITEABLE"] for array in state_dict.values()
    )


def test_every_expert_gets_its_own_weights():
    layer, layout = LAYERS["mixture of mixtures"]
    params = params_of(layer)
    state_dict = conversion.to_torch(layout, params)
    inner = params["experts"]["experts"]["layers"][1]["kernel"]  # [2, 6, 5, 2]
    same(state_dict["experts.1.experts.4.2.weight"], np.asarray(inner[1, 4].T))


def test_halves_and_every_other_row():
    params = params_of(moejax.glu(3, 5))
    gate, up = (np.asarray(params[name]["kernel"]).T for name in ("gate", "up"))  # [F, D]
    halves = conversion.to_torch(fused(), params)
    same(halves["gate_up.weight"], np.concatenate([gate, up]))
    others = conversion.to_torch(fused(interleaved=True), params)
    same(others["gate_up.weight"][::2], gate)
    same(others["gate_up.weight"][1::2], up)


def test_all_experts_in_one_tensor():
    params = params_of(moejax.stack(moejax.linear(3, 2), 4))
    state_dict = conversion.to_torch(conversion.stacked(conversion.linear(3, 2), 4), params)
    assert {name: array.shape for name, array in state_dict.items()} == {
        "weight": (4, 2, 3),
        "bias": (4, 2),
    }
    same(state_dict["weight"][1], np.asarray(params["kernel"][1]).T)


def without(layout, name):
    return {key: value for key, value in layout.items() if key != name}


GATE, UP = fused()["gate"], fused()["up"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (conversion.mlp(3, 3, 3, names=("fc", "fc")), "`fc.bias` is used twice, by .*layers.0"),
        (
            {"a": conversion.linear(3, 2), "b": conversion.linear(3, 2)},
            r"`bias` is used twice, by \['a.bias', 'b.bias'\]",
        ),
        ({"gate": GATE, "up": GATE}, "A part of `gate_up.weight` is used twice"),
        ({"gate": GATE}, "Parts of `gate_up.weight` are missing: 5 of 10 along axis 0"),
        (
            {
                "gate": GATE,
                "whole": {"kernel": conversion.Tensor("gate_up.weight", (10, 3), (1, 0))},
            },
            "`gate_up.weight` is used twice",
        ),
        (
            {
                "gate": GATE,
                "up": conversion.parts(conversion.Tensor("gate_up.weight", (10, 4), (1, 0)), 2)[1],
            },
            "`gate_up.weight` must have one shape",
        ),
        (
            {"w": conversion.Tensor("w", (6, 2, 3), (0, 2, 1), stored=(12, 4))},
            "`w` of shape .* as many numbers, got \\(12, 4\\)",
        ),
    ],
)
def test_every_number_is_in_one_parameter(layout, message):
    params = jax.tree.map(lambda tensor: np.zeros(tensor.param_shape), layout)
    with pytest.raises(ValueError, match=message):
        conversion.to_torch(layout, params)
    with pytest.raises(ValueError, match=message):
        conversion.from_torch(layout, {})


def test_what_does_not_divide_is_named():
    with pytest.raises(
        ValueError, match="Axis 0 of `gate_up` must divide into 2 equal parts, got 7"
    ):
        conversion.parts(conversion.Tensor("gate_up", (7, 3), (1, 0)), 2)
    with pytest.raises(ValueError, match=r"`{}\.bias` cannot hold all experts"):
        conversion.stacked(conversion.stack(conversion.linear(3, 2), 2), 4)


def test_parts_of_two_dtypes_are_named():
    params = params_of(moejax.glu(3, 5))
    params["up"]["kernel"] = params["up"]["kernel"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"The parts of `gate_up\.weight` must have one dtype"):
        conversion.to_torch(fused(), params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_of_torch_in_every_dtype(dtype):
    torch = pytest.importorskip("torch")
    layout = conversion.linear(3, 2)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params_of(moejax.linear(3, 2))
    )
    module = torch.nn.Linear(3, 2, dtype=getattr(torch, dtype))
    module.load_state_dict(conversion.as_tensors(conversion.to_torch(layout, params)))
    jax.tree.map(same, conversion.from_torch(layout, module.state_dict()), params)
    # Parameters that have gradients will do, too.
    jax.tree.map(same, conversion.from_torch(layout, dict(module.named_parameters())), params)


def test_params_do_not_share_memory():
    state_dict = {"weight": np.ones((2, 3)), "bias": np.ones(2)}
    params = conversion.from_torch(conversion.linear(3, 2), state_dict)
    back = conversion.to_torch(conversion.linear(3, 2), params)
    state_dict["weight"][:] = 0  # as an optimizer of PyTorch does, in place
    assert params["kernel"].all()
    params["kernel"][:] = 2
    assert (back["weight"] == 1).all()


def mixture_state(num_experts=4):
    layer = moejax.moe(moejax.linear(3, 2), moejax.linear(3, num_experts), num_experts=num_experts)
    return conversion.to_torch(mixture_layout(num_experts), params_of(layer))


def mixture_layout(num_experts=4):
    return conversion.moe(
        conversion.linear(3, 2), conversion.linear(3, num_experts), num_experts=num_experts
    )


def test_another_number_of_experts_is_named():
    with pytest.raises(ValueError, match=r"has 4 experts at `experts\.`, the state_dict 3: build"):
        conversion.from_torch(mixture_layout(4), mixture_state(3))


def test_another_number_of_inner_experts_is_named():
    layer, layout = LAYERS["mixture of mixtures"]
    state_dict = conversion.to_torch(layout, params_of(layer))
    inner = conversion.moe(conversion.mlp(3, 5, 2), conversion.mlp(3, 4, 5), num_experts=5)
    outer = conversion.moe(inner, conversion.linear(3, 2), num_experts=2)
    with pytest.raises(ValueError, match=r"has 5 experts at `experts\.{}\.experts\.`, .* 6: build"):
        conversion.from_torch(outer, state_dict)


def test_missing_and_unknown_names_are_named():
    state_dict = mixture_state()
    state_dict["experts.2.wieght"] = state_dict.pop("experts.2.weight")
    state_dict["extra"] = np.ones(1)
    # Three of four weights are there: that is a misspelt name and not another number of experts.
    message = r"missing \['experts.2.weight'\], not expected \['experts.2.wieght', 'extra'\]"
    with pytest.raises(ValueError, match=message):
        conversion.from_torch(mixture_layout(), state_dict)


def test_another_shape_is_named():
    state_dict = mixture_state()
    state_dict["experts.2.weight"] = state_dict["experts.2.weight"].T
    with pytest.raises(
        ValueError, match=r"`experts.2.weight` must have shape \(2, 3\), got \(3, 2\)"
    ):
        conversion.from_torch(mixture_layout(), state_dict)


def test_params_of_another_shape_or_structure_are_named():
    layout = conversion.mlp(3, 5, 2)
    with pytest.raises(ValueError, match=r"shape \(2,\) at layers.1.bias, got \(4,\)"):
        conversion.to_torch(layout, params_of(moejax.mlp(3, 5, 4)))
    with pytest.raises(ValueError, match="structure"):
        conversion.to_torch(layout, params_of(moejax.linear(3, 5)))


def test_names_must_name_every_layer():
    with pytest.raises(ValueError, match="each of the 2 layers"):
        conversion.mlp(3, 5, 2, names=["fc1"])


def test_two_tensors_of_one_name_are_refused():
    layout = conversion.mlp(3, 3, 3, names=("fc", "fc"))
    with pytest.raises(ValueError, match=r"`fc.bias` is used twice"):
        conversion.to_torch(layout, params_of(moejax.mlp(3, 3, 3)))
    with pytest.raises(ValueError, match="is used twice"):
        conversion.from_torch(layout, {"fc.weight": np.ones((3, 3)), "fc.bias": np.ones(3)})


DTYPES = ["float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_pytorch_travels_bit_by_bit(dtype):
    torch = pytest.importorskip("torch")
    layout = conversion.linear(3, 2)
    params = {"kernel": np.arange(6.0).reshape(3, 2), "bias": np.array([0.5, -0.0])}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    tensors = conversion.as_tensors(conversion.to_torch(layout, params))
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    np.testing.assert_array_equal(tensors["weight"].double(), params["kernel"].T.astype(float))
    back = conversion.from_torch(layout, tensors)
    jax.tree.map(same, back, params)
    assert np.signbit(back["bias"][1])


def test_a_tensor_of_pytorch_may_be_a_parameter_or_a_view():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.arange(6, dtype=torch.bfloat16).reshape(3, 2).T)
    params = conversion.from_torch(conversion.linear(3, 2, bias=False), {"weight": weight})
    np.testing.assert_array_equal(params["kernel"].astype(float), np.arange(6).reshape(3, 2))


def test_a_tensor_that_numpy_cannot_hold_is_named():
    torch = pytest.importorskip("torch")
    weight = torch.ones((2, 3), device="meta")
    with pytest.raises(ValueError, match="`weight` must be readable as a NumPy array"):
        conversion.from_torch(conversion.linear(3, 2, bias=False), {"weight": weight})


def test_experts_of_different_dtypes_are_refused():
    layout = conversion.stack(conversion.linear(3, 2, bias=False), 2)
    state = {"0.weight": np.ones((2, 3), np.float16), "1.weight": np.full((2, 3), 1e6, np.float32)}
    with pytest.raises(
        ValueError, match=r"`1.weight` must have the dtype .*, float16, got float32"
    ):
        conversion.from_torch(layout, state)
