# %% [markdown]
# # A mixture inside a Flax model
#
# A transformer's block is attention and a feed-forward layer, each added to its input. Here the
# feed-forward layer is a mixture, and everything else is Flax as usual:
#
# $$h = x + \mathrm{Attention}(\mathrm{Norm}(x)), \qquad
# y_t = h_t + \sum_e g_{te}\, E_e(\mathrm{Norm}(h)_t).$$
#
# The model reads a handwritten digit, eight rows of eight pixels each, as eight tokens. The images
# are those of scikit-learn, which comes with `pip install -e ".[experiments]"` in a clone.

# %% tags=["parameters"]
TRAIN = 1437
STEPS = 300
BATCH = 64
SEED = 0

# %%
# %matplotlib inline
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import moejax
from moejax import plot
from moejax.interop.flax import linen_variables, to_linen, to_nnx

ROWS, CLASSES, WIDTH, EXPERTS = 8, 10, 32, 8

# %%
digits = load_digits()
order = np.random.default_rng(SEED).permutation(len(digits.target))
images = jnp.asarray(digits.images[order], jnp.float32) / 16  # [N, rows, pixels]
labels = jnp.asarray(digits.target[order])  # [N]
train_set = images[:TRAIN], labels[:TRAIN]
test_set = images[1437:], labels[1437:]
print(f"{TRAIN} images to train on, {len(test_set[0])} to test")

# %% [markdown]
# ## The layer
#
# A moejax layer holds no parameters and knows no framework: a SwiGLU expert, a linear router, and
# the rule, which sends each token to its two best experts.

# %%
layer = moejax.moe(
    moejax.glu(WIDTH, WIDTH),
    moejax.linear(WIDTH, EXPERTS),
    num_experts=EXPERTS,
    route=partial(moejax.top_k, k=2),
)

# %% [markdown]
# ## The model
#
# `to_nnx(layer, rngs=rngs)` is the layer as a module. A call returns the output and the decision;
# the model hands the decision on, for losses, diagnostics and pictures.


# %%
class Block(nnx.Module):
    def __init__(self, layer, rngs):
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.mixture = to_nnx(layer, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        y, routing = self.mixture(self.norms[1](x))
        return x + y, routing


class Classifier(nnx.Module):
    def __init__(self, layer, rngs):
        self.embed = nnx.Linear(ROWS, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (ROWS, WIDTH)))
        self.block = Block(layer, rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images):  # [B, rows, pixels]
        x = self.embed(images) + self.positions[...]  # [B, rows, D]
        x, routing = self.block(x)
        return self.head(x.mean(axis=1)), routing  # [B, classes]


model = Classifier(layer, nnx.Rngs(SEED))
logits, routing = model(images[:5])
print("logits", logits.shape, " experts of the 5 x 8 tokens", routing.experts.shape)

# %% [markdown]
# Its parameters are ordinary `nnx.Param` variables, with a leading axis of experts where there is
# one set for each expert. Optimizers, checkpoints and transformations treat them as any other.

# %%
for path, variable in nnx.to_flat_state(nnx.state(model.block.mixture)):
    print(f"{type(variable).__name__:6} {'.'.join(path):22} {variable.shape}")

# %% [markdown]
# Inside is the same pure function. `as_params` gives the parameters as it takes them, and the
# module's output has the same bits:

# %%
x = jax.random.normal(jax.random.key(1), (4, ROWS, WIDTH))
module = model.block.mixture
from_module, _ = nnx.jit(lambda module, x: module(x))(module, x)
from_function, _ = jax.jit(layer.apply)(module.as_params(), x)
np.testing.assert_array_equal(from_module, from_function)
print("largest difference:", abs(from_module - from_function).max())

# %% [markdown]
# ## Training
#
# The loss is the cross-entropy and, with a small weight, the
# [load-balancing loss](../rules.md#losses) of the block's decision, $E \sum_e f_e P_e$: $f_e$ is
# the share of the choices that expert e gets, $P_e$ its mean score. It is 1 at perfect balance.


# %%
def objective(model, batch):
    images, labels = batch
    logits, routing = model(images)
    error = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    balance = moejax.load_balancing_loss(routing)
    return error + 0.01 * balance, {"cross-entropy": error, "balance": balance}


@nnx.jit
def train_step(model, optimizer, batch):
    gradients, metrics = nnx.grad(objective, has_aux=True)(model, batch)
    optimizer.update(model, gradients)
    return metrics


@nnx.jit
def evaluate(model, images, labels):
    logits, routing = model(images)
    return jnp.mean(logits.argmax(axis=1) == labels), routing


def train(model, step):
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    rng = np.random.default_rng(SEED)
    for number in range(STEPS):
        rows = rng.integers(TRAIN, size=BATCH)
        metrics = step(model, optimizer, (train_set[0][rows], train_set[1][rows]))
        if number % max(STEPS // 5, 1) == 0:
            values = [f"{name} {value:.3f}" for name, value in metrics.items()]
            print(f"step {number:3}:", *values)
    return evaluate(model, *test_set)


accuracy, routing = train(model, train_step)
print(f"test images that are right: {accuracy:.1%}")

# %% [markdown]
# ## Reading the decision
#
# `routing` holds the choices of all tokens of the test images, image by image and row by row.
# The entropy of two gates is at most $\log 2 = 0.69$.

# %%
print("load of each expert:", np.asarray(moejax.expert_load(routing)).round(2))
print(f"dead experts: {moejax.dead_experts(routing)}")
print(f"experts that share the work: {moejax.effective_experts(routing):.2f} of {EXPERTS}")
print(f"entropy of a token's gates: {moejax.gate_entropy(routing):.2f} nats")

# %% [markdown]
# `expert_by_class` counts which expert serves which class of tokens. The classes can be anything
# that is known of a token: which row it is, or which digit its image shows. How much does the
# expert tell about each?

# %%
row_of_token = jnp.tile(jnp.arange(ROWS), len(test_set[0]))  # [T]
digit_of_token = jnp.repeat(test_set[1], ROWS)  # [T]
by_row = moejax.expert_by_class(routing, row_of_token, ROWS)  # [E, rows]
by_digit = moejax.expert_by_class(routing, digit_of_token, CLASSES)  # [E, digits]
for name, by_class in {"row": by_row, "digit": by_digit}.items():
    print(f"{moejax.mutual_information(by_class):.2f} nats about the {name}")

# %%
plot.specialisation(np.asarray(by_digit), classes="digit")

# %% [markdown]
# A column adds up to 100%, and all columns would be alike if experts knew nothing of digits. They
# know more of the digit than of the row: attention lets each row see the others before the
# router reads it.
#
# ## A balance bias in the place of the loss
#
# `moejax.biased` puts a bias beside a router that only decides who is chosen. After each step it
# moves towards balance, $b_e \leftarrow b_e + \rho\,\mathrm{sign}(\bar n - n_e)$, where $n_e$
# counts the choices of expert e. It is not trained by gradient, so in the module it is a
# `BalanceBias` and not an `nnx.Param`: the optimizer never sees it.


# %%
biased_layer = moejax.moe(
    moejax.glu(WIDTH, WIDTH),
    moejax.biased(moejax.linear(WIDTH, EXPERTS), EXPERTS),
    num_experts=EXPERTS,
    route=partial(moejax.sigmoid_top_k, k=2),
)


def biased_objective(model, batch):
    images, labels = batch
    logits, routing = model(images)
    error = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return error, ({"cross-entropy": error}, routing)


@nnx.jit
def biased_step(model, optimizer, batch):
    gradients, (metrics, routing) = nnx.grad(biased_objective, has_aux=True)(model, batch)
    optimizer.update(model, gradients)
    bias = model.block.mixture.router.balance_bias
    bias[...] = moejax.update_balance_bias(bias[...], routing, rate=0.01)
    return metrics


biased_model = Classifier(biased_layer, nnx.Rngs(SEED))
accuracy, routing = train(biased_model, biased_step)
print(f"test images that are right: {accuracy:.1%}")
print("load of each expert:", np.asarray(moejax.expert_load(routing)).round(2))
bias = biased_model.block.mixture.router.balance_bias[...]
print("bias of each expert:", np.asarray(bias).round(2))

# %% [markdown]
# ## Linen
#
# `to_linen` is the same for Linen. Given the parameters of the trained NNX module, it returns the
# same numbers.

# %%
linen_module = to_linen(layer)
variables = linen_variables(module.as_params())
from_linen, _ = jax.jit(linen_module.apply)(variables, x)
from_module, _ = nnx.jit(lambda module, x: module(x))(module, x)
np.testing.assert_array_equal(from_linen, from_module)
print("largest difference:", abs(from_linen - from_module).max())

# %% [markdown]
# ## Try
#
# - Another rule: `route=moejax.switch`, or `partial(moejax.top_p, p=0.6)`. The parameters stay.
# - The weight 0 in the place of 0.01: how do the loads differ?
# - A shared expert: `moejax.with_shared(layer, moejax.glu(WIDTH, WIDTH))` is a layer, too.
# - A mask for padding: `self.mixture(x, mask=mask)`.
#
# ## Read next
#
# [What routers learn](what_routers_learn.ipynb) takes balance and collapse apart.
# [Flax](../flax.md) has meshes, a module of yours as an expert, Equinox and Haiku, and [a language
# model](../language_model.md) is a transformer of this kind that is trained in earnest.
