"""Params to PyTorch's layout and back: exact, and every mismatch is named."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
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
LAYERS |= {
    f"mixture of {name}": (
        moejax.moe(layer, moejax.mlp(3, 4, 6), num_experts=6),
        conversion.moe(layout, conversion.mlp(3, 4, 6), num_experts=6),
    )
    for name, (layer, layout) in LAYERS.items()
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
def test_round_trip_is_exact(name, dtype, key):
    layer, layout = LAYERS[name]
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), layer.init(key))
    state_dict = conversion.to_torch(layout, params)
    jax.tree.map(same, conversion.from_torch(layout, state_dict), params)
    assert all(
        array.flags["C_CONTIGUOUS"] and array.flags["WRITEABLE"] for array in state_dict.values()
    )


def test_every_expert_gets_its_own_weights(key):
    layer, layout = LAYERS["mixture of mixtures"]
    params = layer.init(key)
    state_dict = conversion.to_torch(layout, params)
    inner = params["experts"]["experts"]["layers"][1]["kernel"]  # [2, 6, 5, 2]
    same(state_dict["experts.1.experts.4.2.weight"], np.asarray(inner[1, 4].T))


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
    return conversion.to_torch(mixture_layout(num_experts), layer.init(jax.random.key(0)))


def mixture_layout(num_experts=4):
    return conversion.moe(
        conversion.linear(3, 2), conversion.linear(3, num_experts), num_experts=num_experts
    )


def test_another_number_of_experts_is_named():
    with pytest.raises(ValueError, match=r"has 4 experts at `experts\.`, the state_dict 3: build"):
        conversion.from_torch(mixture_layout(4), mixture_state(3))


def test_another_number_of_inner_experts_is_named(key):
    layer, layout = LAYERS["mixture of mixtures"]
    state_dict = conversion.to_torch(layout, layer.init(key))
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


def test_params_of_another_shape_or_structure_are_named(key):
    layout = conversion.mlp(3, 5, 2)
    with pytest.raises(ValueError, match=r"shape \(2,\) at layers.1.bias, got \(4,\)"):
        conversion.to_torch(layout, moejax.mlp(3, 5, 4).init(key))
    with pytest.raises(ValueError, match="structure"):
        conversion.to_torch(layout, moejax.linear(3, 5).init(key))


def test_names_must_name_every_layer():
    with pytest.raises(ValueError, match="each of the 2 layers"):
        conversion.mlp(3, 5, 2, names=["fc1"])


def test_two_tensors_of_one_name_are_refused(key):
    layout = conversion.mlp(3, 3, 3, names=("fc", "fc"))
    with pytest.raises(ValueError, match=r"has \['fc.bias', 'fc.weight'\] more than once"):
        conversion.to_torch(layout, moejax.mlp(3, 3, 3).init(key))
    with pytest.raises(ValueError, match="must have its own name"):
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


def test_torch_is_not_imported():
    code = (
        "import sys, moejax.interop.torch, moejax.interop.safetensors; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
