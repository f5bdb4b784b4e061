# %% [markdown]
# # A rule and an expert of your own
#
# An expert is a function $E(\theta, x)$ and a rule is a function from logits to a decision. Neither
# needs a class, a registry or a change in the library. This page writes one of each, checks both
# against the definition,
#
# $$y_t = \sum_e g_{te}\, E(\theta_e, x_t),$$
#
# runs them in every schedule, and trains them on a signal whose pitch changes.

# %% tags=["parameters"]
POINTS = 512
EXPERTS = 4
WAVES = 8
STEPS = 2000

# %%
# %matplotlib inline
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import moejax
from moejax import plot
from moejax.sharding import expert_parallel

jax.config.update("jax_num_cpu_devices", 2)  # for the last schedule; must come before any array

# %% [markdown]
# ## The signal
#
# Slow on the left, a straight line in the middle, fast on the right, and some noise.

# %%
noise_key, init_key = jax.random.split(jax.random.key(0))
x = jnp.linspace(-3, 3, POINTS)[:, None]  # [T, 1]
clean = jnp.where(x < -1, jnp.sin(3 * x), jnp.where(x < 1, 0.4 * x, jnp.sin(12 * x)))
y = clean + 0.1 * jax.random.normal(noise_key, x.shape)  # [T, 1]

# %% [markdown]
# ## An expert: a sum of waves
#
# $$E(\theta, x) = \sum_f a_f \sin(\omega_f x + \varphi_f).$$
#
# ```python
# # PyTorch
# class Waves(nn.Module):
#     def __init__(self, waves):
#         super().__init__()
#         self.frequencies = nn.Parameter(12 * torch.rand(waves))
#         self.phases = nn.Parameter(2 * math.pi * torch.rand(waves))
#         self.amplitudes = nn.Parameter(torch.zeros(waves, 1))
#
#     def forward(self, x):
#         return torch.sin(x * self.frequencies + self.phases) @ self.amplitudes
# ```
#
# The same as two functions. Parameters are any pytree of arrays, here a dictionary.


# %%
def init_waves(key):
    frequency_key, phase_key = jax.random.split(key)
    return {
        "frequencies": jax.random.uniform(frequency_key, (WAVES,), maxval=12.0),
        "phases": jax.random.uniform(phase_key, (WAVES,), maxval=2 * jnp.pi),
        "amplitudes": jnp.zeros((WAVES, 1)),
    }


def waves(params, x):
    return jnp.sin(x * params["frequencies"] + params["phases"]) @ params["amplitudes"]  # [T, 1]


expert = moejax.Layer(init_waves, waves)

# %% [markdown]
# There is one condition: what an expert makes of a token depends on that token alone, because a
# schedule decides which tokens an expert sees together. Anything else is allowed: images as tokens
# (`feature_ndim=3`), convolutions, [modules of Flax](../flax.md), a network inside a network.
#
# ## A rule: everybody near the best
#
# Top-k takes the same number of experts for every token. Here is a rule that takes one where the
# gate is sure and more where it is not: all experts with at least a share $r$ of the best
# probability,
#
# $$S_t = \{e : p_{te} \ge r \max_{e'} p_{te'}\}, \qquad
# g_{te} = \frac{p_{te}}{\sum_{e' \in S_t} p_{te'}} \text{ for } e \in S_t, \text{ else } 0.$$
#
# A decision is a `Routing`: which experts each token chose and with what weight, [T, K], and for
# losses and pictures the scores and logits of all, [T, E]. Here K = E, and a choice that is not
# taken has the number E, which means nowhere.


# %%
def near_best(logits, *, ratio):
    num_experts = logits.shape[1]
    scores = jax.nn.softmax(logits)  # [T, E]
    taken = scores >= ratio * scores.max(axis=1, keepdims=True)  # [T, E]
    kept = jnp.where(taken, scores, 0)
    experts = jnp.where(taken, jnp.arange(num_experts)[None], num_experts)
    return moejax.Routing(experts, kept / kept.sum(axis=1, keepdims=True), scores, logits)


logits = jnp.log(jnp.array([[0.90, 0.05, 0.05], [0.50, 0.30, 0.20]]))
decision = near_best(logits, ratio=0.5)
print("experts", decision.experts.tolist(), "where 3 is nowhere")
print("gates  ", np.asarray(decision.gates, float).round(2).tolist())

# %% [markdown]
# Hyperparameters are keywords, bound with `partial`. A rule that draws random numbers names a `key`
# beside them and gets one whenever `apply` does; without a key it must be deterministic:


# %%
def explored(logits, *, ratio, key=None):
    if key is None:
        return near_best(logits, ratio=ratio)
    noisy = near_best(logits + jax.random.normal(key, logits.shape), ratio=ratio)
    return noisy._replace(logits=logits)  # losses read the logits before the noise


# %% [markdown]
# ## The mixture
#
# A linear gate of one number: each expert is the best in one interval of the axis, or nowhere.

# %%
router = moejax.linear(1, EXPERTS)
route = partial(near_best, ratio=0.2)
model = moejax.moe(expert, router, num_experts=EXPERTS, route=route)
params = model.init(init_key)
prediction, routing = model.apply(params, x)
print(jax.tree.map(jnp.shape, params["experts"]))
print(f"experts per token, on average: {routing.chosen.sum(axis=1).mean():.2f}")

# %%
exploring = moejax.moe(expert, router, num_experts=EXPERTS, route=partial(explored, ratio=0.2))
for name, key in {"without a key": None, "with a key": jax.random.key(1)}.items():
    _, other = exploring.apply(params, x, key=key)
    print(f"{name}: {jnp.mean(other.chooses != routing.chooses):.0%} of the choices are others")

# %% [markdown]
# ## Check it against the definition
#
# The slow and obvious loop: one expert, one token at a time, with the decision that the rule took.
# So that there is something to compare, the amplitudes are not zero here.

# %%
amplitudes = jax.random.normal(init_key, (EXPERTS, WAVES, 1))
random_params = params["experts"] | {"amplitudes": amplitudes}


def loop(params, x, routing):
    rows = []
    for t in range(len(x)):
        row = jnp.zeros(1)
        for k, e in enumerate(routing.experts[t].tolist()):
            if e < EXPERTS:  # else nowhere
                own = jax.tree.map(lambda leaf, e=e: leaf[e], params)
                row += routing.weights[t, k] * waves(own, x[t : t + 1])[0]
        rows.append(row)
    return jnp.stack(rows)


few = x[:: POINTS // 16]  # the loop is slow
few_routing = route(router.apply(params["router"], few))
expected = loop(random_params, few, few_routing)
got = moejax.dense(waves, random_params, few, few_routing)
np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
print("largest difference to the loop:", float(abs(got - expected).max()))

# %% [markdown]
# ## Run it in every schedule
#
# `dense` is the definition; every other schedule is a faster order of the same sum, and must agree
# in value and in gradient:
#
# - `dropless` computes the choices that were taken, and no others;
# - `capacity` gives each expert the same number of slots, here enough for all;
# - `expert_parallel` spreads tokens and experts over devices, here two that the processor plays.

# %%
auto = jax.sharding.AxisType.Auto
mesh = jax.make_mesh((min(2, jax.device_count()),), ("expert",), (auto,))
schedules = {
    "dense": moejax.dense,
    "dropless": moejax.dropless,
    "capacity": partial(moejax.capacity, factor=1.0),  # ceil(factor T K / E) slots, and K = E
    "expert_parallel": expert_parallel(mesh),
}


def value_and_gradient(schedule, expert):
    def loss(params, x, routing):
        return jnp.mean((schedule(expert, params, x, routing) - y) ** 2)

    return jax.jit(jax.value_and_grad(loss))(random_params, x, routing)


def differences(expert):
    _, gradients = value_and_gradient(moejax.dense, expert)
    for name, schedule in schedules.items():
        own_value, own_gradients = value_and_gradient(schedule, expert)
        gaps = jax.tree.map(lambda a, b: abs(a - b).max(), own_gradients, gradients)
        largest = max(map(float, jax.tree.leaves(gaps)))
        print(f"{name:<16} loss {own_value:.6f}, gradients differ by at most {largest:.0e}")


differences(waves)

# %% [markdown]
# The check finds what breaks the one condition. This expert subtracts the mean of the tokens that
# it is shown, so its output depends on who else is there. A schedule that shows an expert other
# tokens, or splits them over devices, computes something else. (Two schedules may still agree, as
# `dense` and `capacity` do here: both fill the places of tokens that did not choose an expert with
# one that did. Only a comparison with the loop finds that.)


# %%
def centred(params, x):
    return waves(params, x - x.mean(axis=0))


differences(centred)

# %% [markdown]
# Mistakes in shapes and kinds do not get that far. They are refused where they are made:


# %%
def refusal(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except ValueError as error:
        print(error)


refusal(moejax.moe, waves, router, num_experts=EXPERTS)
narrow = moejax.moe(expert, moejax.linear(1, EXPERTS - 1), num_experts=EXPERTS, route=route)
refusal(narrow.apply, narrow.init(init_key), x)

# %% [markdown]
# ## Train it

# %%
optimizer = optax.adam(0.01)


def loss(params, key):
    prediction, _ = model.apply(params, x, key=key)
    return jnp.mean((prediction - y) ** 2)


def step(state, key):
    params, opt_state = state
    value, gradients = jax.value_and_grad(loss)(params, key)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value


@jax.jit
def train(params):
    keys = jax.random.split(jax.random.key(1), STEPS)
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params, losses


trained, losses = train(params)
print(f"mean squared error {losses[0]:.3f} -> {losses[-1]:.4f}; the noise alone is 0.01")


# %%
def draw(params):
    prediction, routing = model.apply(params, x)
    figure, (top, bottom) = plot.new_figure(2, 1, width=8, height=5)
    top[0].plot(x[:, 0], y[:, 0], ".", color="#b0b0b0", markersize=4, label="data")
    top[0].plot(x[:, 0], prediction[:, 0], color="#222222", label="mixture")
    top[0].set(ylabel="y")
    for e in range(EXPERTS):
        bottom[0].plot(x[:, 0], routing.gates[:, e], color=plot.color(e), label=f"expert {e}")
    bottom[0].set(xlabel="x", ylabel="gate")
    figure.legend(loc="outside upper center", ncols=EXPERTS + 2, frameon=False)
    return figure


draw(trained)

# %%
_, routing = model.apply(trained, x)
taken = routing.chosen.sum(axis=1)  # [T]
for count in range(1, EXPERTS + 1):
    print(f"{count} of {EXPERTS} experts: {jnp.mean(taken == count):.0%} of tokens")

# %% [markdown]
# Where one expert has the gate to itself, the others are not computed. In between, several share
# the work, which is what the rule was made for. Where an expert joins or leaves, the gates jump, as
# they do under top-k; `relu` is a rule whose gates are continuous.
#
# ## Try
#
# - Another share: `ratio=0.5`, or `ratio=0.9`, which is nearly one expert per token. Where do the
#   borders go, and does the fit suffer?
# - The same experts under a rule of the library: `route=partial(moejax.top_k, k=2)`.
# - Another expert: a polynomial, `x ** jnp.arange(4)` times four coefficients.
# - Train `exploring` instead of `model`. `loss` already passes it a key.
#
# ## Read next
#
# "Add a rule" in the repository's CONTRIBUTING.md says how a rule joins the library, where one line
# in a table of tests does what this page did by hand.
# [Rules](../rules.md) has those that exist, [speed](../speed.md) and [many
# devices](../sharding.md) compare the schedules, and [a mixture inside a Flax
# model](flax_model.ipynb) comes next.
