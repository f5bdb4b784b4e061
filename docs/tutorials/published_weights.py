# %% [markdown]
# # Published weights, and upcycling
#
# Parameters of one mixture can come from another model: from a published checkpoint, or from a
# dense layer that is trained already. This page reads, checks and writes back a checkpoint, and
# then makes a mixture of a dense layer without changing what it computes.
#
# It needs PyTorch and transformers to make the checkpoint and to compare with:
# `pip install -e ".[torch]"` in a clone. Reading and writing one needs safetensors alone.

# %% tags=["parameters"]
TOKENS = 16384
STEPS = 2000
BATCH = 256
SEED = 0

# %%
# %matplotlib inline
import tempfile
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

import moejax
from moejax import plot
from moejax.interop.transformers import block, load, save
from moejax.training import init_state, scan_batches, train_step

warnings.filterwarnings("ignore", message="IProgress not found")
import torch
import transformers

transformers.utils.logging.disable_progress_bar()

WIDTH, HIDDEN, EXPERTS = 16, 24, 8

# %% [markdown]
# ## A checkpoint
#
# This page has no network, so it writes a Mixtral of its own with random weights: small, but with
# the files and names of the real one. For a published model, `hf download` leaves such
# a folder.

# %%
torch.manual_seed(SEED)
config = transformers.MixtralConfig(
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_local_experts=EXPERTS,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    initializer_range=0.35,  # not 0.02: numbers that are easy to compare
)
network = transformers.MixtralForCausalLM(config).eval()
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
network.save_pretrained(folder)
print(*sorted(path.name for path in folder.iterdir()), sep="\n")
tensors = load_file(folder / "model.safetensors")
names = [name for name in tensors if "layers.1." in name and "experts" in name]
print(len(names), "tensors of experts in layer 1:", names[0], "...")

# %% [markdown]
# ## Reading it
#
# `block` makes the layer that `config.json` describes, `load` reads the weights of one block,
# tensor by tensor. For Mixtral the layer is made of pieces that you could compose yourself:
#
# $$y_t = \sum_{e \in \mathrm{top}_2(l_t)} g_{te}\, W^\mathrm{down}_e
# \big(\mathrm{silu}(W^\mathrm{gate}_e x_t) \odot W^\mathrm{up}_e x_t\big)$$
#
# with $g_t$ the softmax of the two kept logits of $l_t = W^\mathrm{router} x_t$,
# that is `moe(glu(16, 24), router, num_experts=8, route=partial(top_k, k=2))`.

# %%
layer, layout = block(folder)
params = jax.tree.map(jnp.asarray, load(folder, 1))
for path, leaf in jax.tree.leaves_with_path(params):
    print(f"{jax.tree_util.keystr(path, simple=True, separator='.'):22} {leaf.shape}")

# %% [markdown]
# ## Is it the same function?
#
# The module of transformers and the layer, on the same tokens, in float32. The decision comes
# beside the output, so every loss, diagnostic and picture works on a published model too.

# %%
x = jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))
apply = jax.jit(layer.apply)
y, routing = apply(params, x)


def torch_output(network):
    with torch.no_grad():
        output = network.model.layers[1].mlp(torch.from_numpy(np.array(x))[None])
    output = output[0] if isinstance(output, tuple) else output
    return output.numpy().reshape(x.shape)


def difference(actual, expected):
    """The largest difference, relative to the largest number."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


print(f"relative difference from torch: {difference(y, torch_output(network)):.1e}")
print("load of each expert:", np.asarray(moejax.expert_load(routing)).round(2))

# %% [markdown]
# Float32 has seven digits, and the two add up in another order. [Published
# models](../transformers.md) has the same comparison for every supported family in float64, with
# gradients.
#
# ## Writing it back
#
# `save` puts params where they were in the folder. Halve what the experts return, write that, and
# let transformers load the folder.

# %%
halved = {**params, "experts": {**params["experts"]}}
halved["experts"]["down"] = jax.tree.map(lambda leaf: leaf / 2, params["experts"]["down"])
save(folder, 1, halved)
reloaded = transformers.MixtralForCausalLM.from_pretrained(folder).eval()
print(f"half of the old output, to within {difference(torch_output(reloaded), y / 2):.1e}")
save(folder, 1, params)  # as it was

# %% [markdown]
# ## A dense layer that has learnt
#
# Now the other way to get parameters. A dense SwiGLU of the width of one expert learns what the
# block of eight computes, for which it is too small. The loss is the mean squared error.

# %%
train_x, test_x = x[: TOKENS * 3 // 4], x[TOKENS * 3 // 4 :]
train_y, test_y = y[: TOKENS * 3 // 4], y[TOKENS * 3 // 4 :]
optimizer = optax.adam(3e-3)
dense = moejax.glu(WIDTH, HIDDEN)


def dense_loss(params, batch, key):
    x, y = batch
    return jnp.mean((dense.apply(params, x) - y) ** 2), {}


def trainer(loss):
    run = jax.jit(partial(scan_batches, train_step(loss, optimizer)))

    def train(params, key):
        rows = jax.random.randint(key, (STEPS, BATCH), 0, len(train_x))
        state, metrics = run(init_state(params, optimizer, key), (train_x, train_y), rows)
        return state.params, metrics

    return train


def test_error(apply, params):
    return float(jnp.mean((apply(params, test_x) - test_y) ** 2))


keys = jax.random.split(jax.random.key(SEED), 5)
dense_key, first_key, second_key, router_key, noise_key = keys
train_dense = trainer(dense_loss)
learnt, first = train_dense(dense.init(dense_key), first_key)
print(f"variance of the target {test_y.var():.3f}")
print(f"test error of the dense layer after {STEPS} steps: {test_error(dense.apply, learnt):.3f}")

# %% [markdown]
# ## Upcycling
#
# `upcycle` makes E experts that are all that layer, and a router of zeros. Weights that sum to one
# then give the layer's own output:
#
# $$\sum_{e \in \mathrm{top}_k} g_{te}\, E(x_t) = E(x_t) \quad\text{because}\quad
# \sum_{e \in \mathrm{top}_k} g_{te} = 1.$$

# %%
mixture = moejax.moe(
    dense,
    moejax.linear(WIDTH, EXPERTS),
    num_experts=EXPERTS,
    route=partial(moejax.top_k, k=2),
)
router = moejax.linear(WIDTH, EXPERTS).init(router_key)
upcycled = moejax.upcycle(learnt, router, num_experts=EXPERTS)
same, routing = jax.jit(mixture.apply)(upcycled, test_x)
print(f"difference from the dense layer: {difference(same, dense.apply(learnt, test_x)):.1e}")
print("load of each expert:", np.asarray(moejax.expert_load(routing)).round(2))

# %% [markdown]
# The load shows a trap. All logits are zero, ties go to the lower index, so all tokens choose the
# experts 0 and 1; and as copies are equal, the error has no gradient for the router. Two things
# bring the others in: `noise` makes the copies differ a little, and a balance loss spreads the
# tokens. With noise the function is only nearly the same:

# %%
noisy = moejax.upcycle(learnt, router, num_experts=EXPERTS, noise=0.1, key=noise_key)
nearly, _ = jax.jit(mixture.apply)(noisy, test_x)
print(f"difference with noise: {difference(nearly, dense.apply(learnt, test_x)):.1e}")

# %% [markdown]
# ## Training on
#
# From here, the dense layer goes on, and so does the mixture, with noise and without, on the same
# batches. A token uses two of eight experts, so a step of the mixture does about twice the
# arithmetic of a step of the dense layer.


# %%
def mixture_loss(params, batch, key):
    x, y = batch
    output, routing = mixture.apply(params, x)
    error = jnp.mean((output - y) ** 2)
    balance = moejax.load_balancing_loss(routing)
    return error + 0.01 * balance, {"error": error}


train_mixture = trainer(mixture_loss)
goes_on, dense_metrics = train_dense(learnt, second_key)
from_equal, equal_metrics = train_mixture(upcycled, second_key)
from_noisy, noisy_metrics = train_mixture(noisy, second_key)


def mixture_output(params, x):
    return mixture.apply(params, x)[0]


def spread(params):
    """How far experts are from each other, relative to the size of their parameters."""
    kernel = params["experts"]["gate"]["kernel"]  # [E, D, F]
    return float(kernel.std(axis=0).mean() / kernel.std())


print(f"dense layer: test error {test_error(dense.apply, goes_on):.3f}")
for name, trained in {"without noise": from_equal, "with noise": from_noisy}.items():
    _, routing = mixture.apply(trained, test_x)
    print(
        f"upcycled {name}: test error {test_error(mixture_output, trained):.3f}, "
        f"{moejax.dead_experts(routing)} dead experts, spread of the experts {spread(trained):.2f}"
    )

# %%
curves = {  # where it starts, the errors, colour, style
    "dense": (0, first["loss"], "#222222", "-"),
    "dense goes on": (STEPS, dense_metrics["loss"], "#222222", "--"),
    "upcycled": (STEPS, equal_metrics["error"], plot.color(0), "-"),
    "upcycled with noise": (STEPS, noisy_metrics["error"], plot.color(1), "-"),
}


def draw_curves(window):
    figure, axes = plot.new_figure(width=6.4, height=3.4)
    ax = axes[0, 0]
    for name, (start, errors, shade, style) in curves.items():
        mean = np.convolve(errors, np.ones(window) / window, mode="valid")
        steps = start + window - 1 + np.arange(len(mean))
        ax.plot(steps, mean, style, color=shade, label=name)
    ax.set(xlabel="step", ylabel=f"squared error, mean of {window} steps", ylim=(0, None))
    ax.legend(frameon=False)
    return figure


draw_curves(window=min(50, STEPS))

# %% [markdown]
# Without noise the mixture is no better than the dense layer: the balance loss does spread the
# tokens, but the copies stay nearly equal, so it does not matter which of them a token goes to.
# With noise they part, and the capacity of eight experts is used.
#
# ## Grow, prune, merge
#
# The other operations start from a mixture; here, the published block. All of them take params and
# return params. The moments of an optimizer follow by taking the same experts:
# `map_mixtures(partial(take_experts, ids=ids), state)`, where `ids` are those that `prune` keeps,
# or `np.arange(num_experts) % EXPERTS` after `grow`. Its offset and noise are for params alone.
#
# `grow` copies experts and their columns of the router. If K doubles with E, each chosen pair of
# copies shares the gate of its original, and the function stays the same:

# %%
twice = moejax.moe(
    moejax.glu(WIDTH, HIDDEN),
    moejax.linear(WIDTH, 2 * EXPERTS, bias=False),
    num_experts=2 * EXPERTS,
    route=partial(moejax.top_k, k=4),
)
grown = moejax.grow(params, num_experts=2 * EXPERTS)
print(f"grown to 16 experts, 4 per token: {difference(twice.apply(grown, x)[0], y):.1e}")

# %% [markdown]
# `prune` leaves experts out. It is exact for experts that no token chooses; leaving out the two
# with the least load of this block is not. `merge` makes one layer, the mean of all experts
# weighted by their load. Experts with random weights have nothing in common, so here that is poor:
# it is a start to train on from.

# %%
_, routing = apply(params, x)
shares = moejax.expert_load(routing)
keep = np.sort(np.argsort(-shares)[: EXPERTS - 2])
smaller = moejax.moe(
    moejax.glu(WIDTH, HIDDEN),
    moejax.linear(WIDTH, EXPERTS - 2, bias=False),
    num_experts=EXPERTS - 2,
    route=partial(moejax.top_k, k=2),
)
pruned = smaller.apply(moejax.prune(params, keep), x)[0]
merged = dense.apply(moejax.merge(params, shares), x)
for name, output in {"pruned to 6 experts": pruned, "merged into one": merged}.items():
    print(f"{name}: squared error {jnp.mean((output - y) ** 2):.3f} of a variance {y.var():.3f}")

# %%
temporary.cleanup()

# %% [markdown]
# ## Try
#
# - Another family: `transformers.Qwen3MoeForCausalLM`, in whose `Qwen3MoeConfig` the fields are
#   called `num_experts` and `moe_intermediate_size`. The two lines that read it stay the same.
# - `noise=0.01` and `noise=0.5`: how close is the function at the start, how soon do copies part?
# - `route=moejax.switch` with `upcycle(..., total=1 / EXPERTS)`: raw probabilities sum to 1/E.
# - Grow the trained mixture with `offset`, which keeps K, and bring the copies in with
#   `update_balance_bias`.
#
# ## Read next
#
# [Published models](../transformers.md) lists the families. [What routers
# learn](what_routers_learn.ipynb) is about balance and collapse. `python experiments/upcycle.py`
# asks on MNIST, with three seeds, whether upcycling pays.
