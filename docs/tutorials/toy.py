# %% [markdown]
# # The toy: two lines and a gate
#
# Two experts that can each draw one straight line, and a gate that says at every point how much
# each of them counts. Together they draw a curve that neither could draw:
#
# $$p(x) = \sigma\Big(\sum_e g_e(x)\, E_e(x)\Big), \qquad
# E_e(x) = w_e^\top x + b_e, \qquad
# g(x) = \mathrm{softmax}\big(W_2\,\mathrm{ReLU}(W_1 x + b_1) + b_2\big).$$
#
# This page builds that mixture cell by cell. Above each cell stands what it would be in a PyTorch
# notebook. The sizes come first; change them and run the page again.

# %% tags=["parameters"]
SAMPLES = 1000
STEPS = 500
SEEDS = 30
SEED = 0

# %%
# %matplotlib inline
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import moejax
from moejax import plot

# %% [markdown]
# ## Data
#
# Half of the points come from $N([3, 2], I)$ and half from $N([-3, 2], I)$. The label is 1 where
# the norm exceeds $\sqrt{13}$. Only then is 2 subtracted from the second coordinate. The order
# matters: the labels' boundary is a circle around the origin *before* the shift, so in the data
# that the model sees it is a circle around $[0, -2]$, which cuts through both clouds.
#
# ```python
# # PyTorch
# right = MultivariateNormal(torch.tensor([3.0, 2.0]), torch.eye(2)).sample((500,))
# left = MultivariateNormal(torch.tensor([-3.0, 2.0]), torch.eye(2)).sample((500,))
# x = torch.cat([right, left])
# y = (x.norm(dim=1) > 13**0.5).float()
# x[:, 1] -= 2
# ```
#
# JAX has no global random state and no assignment into arrays: a key says which numbers are drawn,
# and `x` becomes a new array.

# %%
data_key, model_key, seeds_key = jax.random.split(jax.random.key(SEED), 3)
means = jnp.repeat(jnp.array([[3.0, 2.0], [-3.0, 2.0]]), SAMPLES // 2, axis=0)  # [T, 2]
drawn = means + jax.random.normal(data_key, means.shape)
y = (jnp.linalg.norm(drawn, axis=1) > jnp.sqrt(13.0)).astype(jnp.float32)  # [T]
x = drawn - jnp.array([[0.0, 2.0]])  # [T, 2]
print(f"{len(x)} points, {y.mean():.0%} with label 1, mean {x.mean(axis=0).round(2)}")

# %%
angle = np.linspace(0, 2 * np.pi, 181)
circle = np.sqrt(13) * np.stack([np.cos(angle), np.sin(angle)], axis=1) - [0, 2]  # [M, 2]
plot.data(np.asarray(x), np.asarray(y), truth=circle)

# %% [markdown]
# ## Experts
#
# $E_e(x) = w_e^\top x + b_e$, one number for each point.
#
# ```python
# # PyTorch
# experts = nn.ModuleList([nn.Linear(2, 1) for _ in range(2)])
# ```
#
# A moejax layer is a pair of pure functions: `init` makes parameters, `apply` uses them. It holds
# no numbers itself, so one `linear(2, 1)` describes both experts; there will be two sets of
# parameters. They start as `nn.Linear` starts them.

# %%
expert = moejax.linear(2, 1)
one = expert.init(jax.random.key(1))
print(jax.tree.map(jnp.shape, one), "->", expert.apply(one, x).shape)

# %% [markdown]
# ## Gate
#
# ```python
# # PyTorch
# gate = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(dim=1))
# ```
#
# Here the network ends with its logits. What turns logits into gates is a *rule* of its own:
# `moejax.softmax`, which is the default, or any of [the others](../rules.md).

# %%
router = moejax.mlp(2, 4, 2)
two = router.init(jax.random.key(2))
gates = moejax.softmax(router.apply(two, x)).gates  # [T, E]
print(gates.shape, "the gates of a point add up to", gates.sum(axis=1)[:3])

# %% [markdown]
# ## Mixture
#
# ```python
# # PyTorch
# class Mixture(nn.Module):
#     def forward(self, x):
#         gates = self.gate(x)  # [T, E]
#         outputs = torch.stack([expert(x) for expert in self.experts], dim=1)  # [T, E, 1]
#         return torch.sigmoid((gates.unsqueeze(-1) * outputs).sum(dim=1))
# ```
#
# `moe` composes the two layers. It returns the gated sum and the decision of the gate, which
# losses, diagnostics and pictures read. Experts' parameters have a leading axis of experts.

# %%
model = moejax.moe(expert, router, num_experts=2)
params = model.init(model_key)
output, routing = model.apply(params, x)  # [T, 1]
print(jax.tree.map(jnp.shape, params))

# %% [markdown]
# There is nothing else inside. The equation is two lines of JAX, $E_e(x_t)$ and
# $\sum_e g_{te} E_e(x_t)$, and they give the same numbers:

# %%
gates = jax.nn.softmax(router.apply(params["router"], x))  # [T, E]
outputs = jax.vmap(expert.apply, in_axes=(0, None))(params["experts"], x)  # [E, T, O]
by_hand = jnp.einsum("te,eto->to", gates, outputs)  # [T, O]
np.testing.assert_allclose(output, by_hand, rtol=1e-5, atol=1e-6)
print("largest difference:", abs(output - by_hand).max())

# %% [markdown]
# ## Training
#
# The mean squared error between probability and label, and Adam with a learning rate of 0.01, each
# step on all points.
#
# ```python
# # PyTorch
# optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
# for step in range(500):
#     optimizer.zero_grad()
#     loss = ((model(x)[:, 0] - y) ** 2).mean()
#     loss.backward()
#     optimizer.step()
# ```
#
# In JAX there is no gradient to set to zero and no module that changes. `value_and_grad` turns the
# loss into a function that returns its value and its gradient, a step maps parameters to
# parameters, and `scan` is the loop. So a whole run is a pure function of its key, and `jit`
# compiles it as one program. (`moejax.training.train_step` is this step with the bookkeeping of
# longer runs.)

# %%
optimizer = optax.adam(0.01)


def probability(model, params, x):
    output, _ = model.apply(params, x)
    return jax.nn.sigmoid(output[:, 0])  # [T]


def loss(params, model):
    return jnp.mean((probability(model, params, x) - y) ** 2)


def step(model, state, _):
    params, opt_state = state
    value, gradients = jax.value_and_grad(loss)(params, model)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value


def train(model, key):
    params = model.init(key)
    start = params, optimizer.init(params)
    (params, _), losses = jax.lax.scan(partial(step, model), start, length=STEPS)
    return params, losses


def accuracy(model, params):
    return jnp.mean((probability(model, params, x) > 0.5) == (y > 0.5))


# %%
trained, losses = jax.jit(partial(train, model))(model_key)
for name, one in {"before": params, "after": trained}.items():
    print(f"{name} training: loss {loss(one, model):.4f}, accuracy {accuracy(model, one):.1%}")

# %% [markdown]
# A pure function of a key can be run for many keys at once: `vmap` trains all the seeds in one
# program. A mixture of one expert, whose gate is the constant 1, is a single line: the baseline.

# %%
keys = jax.random.split(seeds_key, SEEDS)
single = moejax.moe(moejax.linear(2, 1), moejax.mlp(2, 4, 1), num_experts=1)
curves = {}
for name, one in {"two experts": model, "a single line": single}.items():
    many, curves[name] = jax.jit(jax.vmap(partial(train, one)))(keys)
    right = jax.vmap(partial(accuracy, one))(many)  # [SEEDS]
    low, middle, high = jnp.quantile(right, jnp.array([0.05, 0.5, 0.95]))
    print(f"{name}: median accuracy {middle:.1%}, 90% of seeds {low:.1%} to {high:.1%}")

# %%
plot.loss({"this page's run": np.asarray(losses)}, np.asarray(curves["two experts"]))

# %% [markdown]
# ## Decision boundaries
#
# `Plane` holds every part of the mixture on a grid of points: the experts' outputs, the gates and
# the probability. `boundaries` draws them one beside the other.

# %%
across, up, both = plot.grid(np.asarray(x))  # [W], [H], [H W, 2]
square = len(up), len(across)
grid = jnp.asarray(both, jnp.float32)
outputs = moejax.stack(expert, 2).apply(trained["experts"], grid)[..., 0]  # [E, H W]
gates = model.apply(trained, grid)[1].gates.T  # [E, H W]
plane = plot.Plane(
    across,
    up,
    np.asarray(outputs).reshape(2, *square),
    np.asarray(gates).reshape(2, *square),
    np.asarray(probability(model, trained, grid)).reshape(square),
)
plot.boundaries(np.asarray(x), np.asarray(y), plane, truth=circle)

# %% [markdown]
# The two lines are not the two halves of the boundary. The squared error of the *blend* lets
# experts cooperate: neither has to be right by itself, and where the gate is undecided the boundary
# bends from one line to the other. The gate can even be the boundary: where an expert says the same
# label to all of its region, what separates the labels there is the border of the region. How right
# would each point's top expert be alone?

# %%
at_points = moejax.stack(expert, 2).apply(trained["experts"], x)[..., 0]  # [E, T]
top = model.apply(trained, x)[1].gates.argmax(axis=1)  # [T]
alone = jnp.take_along_axis(at_points, top[None], axis=0)[0]  # [T]
print(f"the mixture: {accuracy(model, trained):.1%}")
print(f"the expert with the largest gate, alone: {jnp.mean((alone > 0) == (y > 0.5)):.1%}")
for number, own in enumerate(at_points):
    print(f"expert {number} for all points: {jnp.mean((own > 0) == (y > 0.5)):.1%}")

# %% [markdown]
# ## What a plot of the experts can get wrong
#
# A common plot of the experts' lines has two mistakes worth knowing.
#
# **It shifted the lines.** An expert's line is where its output is zero,
#
# $$w_1 x_1 + w_2 x_2 + b = 0 \quad\Longleftrightarrow\quad x_2 = -\frac{w_1 x_1 + b}{w_2},$$
#
# and nothing may be added to that. The data were shifted by 2, but *before* training: the weights
# have already learnt the shifted data. Here are the lines as they are, and moved by the same 2:


# %%
def trained_expert(number):
    return jax.tree.map(lambda leaf: leaf[number], trained["experts"])


def line(params, x1):
    (w1, w2), b = params["kernel"][:, 0], params["bias"][0]
    return -(w1 * x1 + b) / w2


def draw_lines(*shifts):
    figure, axes = plot.new_figure(1, len(shifts), width=9, height=3.6)
    for ax, shift in zip(axes[0], shifts, strict=True):
        ax.scatter(x[:, 0], x[:, 1], s=6, c=np.where(y > 0.5, "#111111", "#b0b0b0"))
        for number in range(2):
            ax.plot(across, line(trained_expert(number), across) - shift, color=plot.color(number))
        ax.set(xlim=across[[0, -1]], ylim=up[[0, -1]], aspect="equal")
        ax.set_title(f"moved down by {shift}: wrong" if shift else "where the outputs are 0")
    return figure


draw_lines(0, 2)

# %%
for shift in (0, 2):
    for number in range(2):
        x2 = line(trained_expert(number), across) - shift
        on_line = jnp.stack([jnp.asarray(across), x2], axis=1)  # [W, 2]
        output = expert.apply(trained_expert(number), on_line).mean()
        print(f"moved down by {shift}: the output of expert {number} on its line is {output:.2f}")

# %% [markdown]
# A number tells what the eye might not: on the line that is drawn, the expert's output must be 0.
# `plot.boundaries` avoids the algebra altogether. It evaluates the outputs on a grid and draws
# their contour at 0, which is right for experts of any shape.
#
# **It used an undefined name.** A plotting cell that reads a name which no cell above it defines
# runs only as long as an older cell has left that name behind, and fails when the notebook is
# restarted and run from the top. Give a plotting function everything as arguments, as above, and
# run the notebook from the top before you believe it. This page is made that way.
#
# ## Try
#
# - Four experts: `num_experts=4` and `mlp(2, 4, 4)`. Does the boundary become rounder?
# - A wider gate, `mlp(2, 16, 2)`: what does it gain? A linear one, `linear(2, 2)`: what can it no
#   longer do?
# - One expert per point: `moe(..., route=moejax.switch)`. Nothing else changes.
# - Experts that compete for points instead of cooperating on them:
#   `python experiments/toy.py --objective likelihood`, which also writes an animation.
#
# ## Read next
#
# [MNIST](mnist.ipynb) is the same on images, from one network to a sparse mixture.
# [Rules](../rules.md) lists what can stand in the place of the softmax.
