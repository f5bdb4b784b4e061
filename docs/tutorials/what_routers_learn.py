# %% [markdown]
# # What routers learn
#
# A router is trained by the task's loss alone, and that loss knows nothing of balance: an expert
# that is good gets more tokens, becomes better by them, and gets more. This page watches eight
# experts do that, on a problem whose right division of labour is known, and then what a
# load-balancing loss, a balance bias, a z-loss and expert choice change.

# %% tags=["parameters"]
POINTS = 512
STEPS = 1000
SEEDS = 8
SEED = 0

# %%
# %matplotlib inline
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import ListedColormap

import moejax
from moejax import plot
from moejax.training import init_state, train_step

EXPERTS = 8
COLORS = [plot.color(number) for number in range(EXPERTS)]

# %% [markdown]
# ## Data
#
# Eight clusters of points around a circle, with as many points each. In cluster c the target is a
# linear function of its own, $y = w_c^\top (x - m_c) + h_c$. Eight linear experts can therefore
# have next to no error if each takes one cluster, and no other division of labour does as well.

# %%
slopes_key, heights_key, points_key = jax.random.split(jax.random.key(SEED), 3)
angles = 2 * jnp.pi * jnp.arange(EXPERTS) / EXPERTS
middles = 3 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)  # [clusters, 2]
slopes = 2 * jax.random.normal(slopes_key, (EXPERTS, 2))
heights = 2 * jax.random.normal(heights_key, (EXPERTS,))

cluster = jnp.arange(POINTS) % EXPERTS  # [T]
offset = 0.4 * jax.random.normal(points_key, (POINTS, 2))
x = middles[cluster] + offset  # [T, 2]
y = (jnp.sum(slopes[cluster] * offset, axis=1) + heights[cluster])[:, None]  # [T, 1]
print(f"{POINTS} points, variance of the target {y.var():.2f}")

# %% [markdown]
# ## One model for all remedies
#
# A linear router, and the rule of Switch with a balance bias b beside it. With
# $p_t = \mathrm{softmax}(l_t)$, each token goes to one expert, weighted by its raw probability:
#
# $$e_t = \arg\max_e\,(p_{te} + b_e), \qquad y_t = p_{t e_t}\, E_{e_t}(x_t).$$
#
# Three numbers say what is done about balance, and zero switches each of them off:
#
# $$\mathcal{L} = \frac1T \sum_t (y_t - y^*_t)^2
# + \alpha\, E \sum_e f_e P_e + \beta\, \frac1T \sum_t \big(\mathrm{logsumexp}\, l_t\big)^2,$$
#
# $$b_e \leftarrow b_e + \rho\,\mathrm{sign}(\bar n - n_e).$$
#
# $y^*_t$ is the target, $f_e$ the share of tokens that expert e gets, $P_e$ its mean probability,
# $n_e$ its number of tokens. So all runs are one function, mapped over the three numbers and over
# seeds.

# %%
layer = moejax.moe(
    moejax.linear(2, 1),
    moejax.biased(moejax.linear(2, EXPERTS), EXPERTS),
    num_experts=EXPERTS,
    route=partial(moejax.by_score, k=1, renormalize=False),
    execute=moejax.dense,  # experts as small as these run fastest all at once
)
optimizer = optax.adam(0.01)


def objective(params, alpha, beta):
    output, routing = layer.apply(params, x)
    error = jnp.mean((output - y) ** 2)
    balance, size = moejax.load_balancing_loss(routing), moejax.router_z_loss(routing)
    return error + alpha * balance + beta * size, (error, routing)


def moved(params, routing, rho):
    router = params["router"]
    bias = moejax.update_balance_bias(router["balance_bias"], routing, rate=rho)
    return {**params, "router": {**router, "balance_bias": bias}}


def train(alpha, beta, rho, key):
    def step(state, _):
        params, opt_state = state
        gradients, (error, routing) = jax.grad(objective, has_aux=True)(params, alpha, beta)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = moved(optax.apply_updates(params, updates), routing, rho)
        seen = {
            "error": error,
            "load": moejax.expert_load(routing),
            "logits": jnp.sqrt(moejax.router_z_loss(routing)),
        }
        return (params, opt_state), seen

    params = layer.init(key)
    (params, _), history = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)
    return params, history


# %%
REMEDIES = {  # alpha, beta, rho
    "nothing": (0.0, 0.0, 0.0),
    "balance loss": (1.0, 0.0, 0.0),
    "balance bias": (0.0, 0.0, 0.01),
    "z-loss": (0.0, 0.01, 0.0),
}
numbers = jnp.repeat(jnp.array(list(REMEDIES.values())), SEEDS, axis=0)  # [runs, 3]
keys = jnp.tile(jax.random.split(jax.random.key(SEED), SEEDS), len(REMEDIES))  # [runs]
params, history = jax.jit(jax.vmap(train))(*numbers.T, keys)


def by_remedy(tree):
    """For each remedy its runs, one for each seed."""
    parts = [slice(SEEDS * number, SEEDS * (number + 1)) for number in range(len(REMEDIES))]
    each = [jax.tree.map(lambda leaf, part=part: leaf[part], tree) for part in parts]
    return dict(zip(REMEDIES, each, strict=True))


# %% [markdown]
# ## Collapse
#
# First without any remedy: the share of points that each expert gets, in the course of the first
# seed's run, and the experts' regions at the end. A point is drawn in the colour of its expert.


# %%
def draw_load(ax, load):
    for expert, line in enumerate(np.asarray(load).T):
        ax.plot(line, color=COLORS[expert], linewidth=0.8, label=expert)
    ax.axhline(1 / EXPERTS, color="0.6", linestyle=":")
    ax.set(xlabel="step", ylabel="share of the points", ylim=(0, None))


edge = np.linspace(-4.5, 4.5, 150)
plane = jnp.asarray(np.stack(np.meshgrid(edge, edge), axis=-1), jnp.float32)  # [H, W, 2]
experts_of = jax.jit(lambda params, x: layer.apply(params, x)[1].experts[:, 0])  # [T]


def draw_regions(ax, params):
    regions = experts_of(params, plane).reshape(len(edge), len(edge))
    cmap = ListedColormap(COLORS)
    extent = (edge[0], edge[-1], edge[0], edge[-1])
    style = {"cmap": cmap, "vmin": -0.5, "vmax": EXPERTS - 0.5}
    ax.imshow(regions, **style, origin="lower", extent=extent, alpha=0.35, interpolation="nearest")
    ax.scatter(x[:, 0], x[:, 1], s=3, c=experts_of(params, x), **style)
    ax.set(xlabel="$x_1$", ylabel="$x_2$")


def run(tree, name):
    """The first seed's run."""
    return jax.tree.map(lambda leaf: leaf[0], by_remedy(tree)[name])


def draw_runs(*names):
    figure, axes = plot.new_figure(len(names), 2, width=7.6, height=0.4 + 2.6 * len(names))
    for (left, right), name in zip(axes, names, strict=True):
        draw_load(left, run(history, name)["load"])
        left.set_title(name, fontsize=10)
        draw_regions(right, run(params, name))
    handles, experts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, experts, title="expert", loc="outside right upper", frameon=False)
    return figure


draw_runs("nothing")

# %% [markdown]
# After a few steps three experts have nearly all points. An expert without points gets no gradient,
# for it learns from its own points alone; it comes back only if the router, which the other experts
# train, happens to send it some. Here some come back after hundreds of steps, and one never does.
#
# ## The same start, with each remedy
#
# The same seed, so the same parameters at step 0. The load-balancing loss has a weight of 1 here,
# where 0.01 is usual in large models: the weight is relative to the task's loss.

# %%
draw_runs(*REMEDIES)

# %% [markdown]
# ## What each diagnostic says
#
# One run may be luck, so here are the mean and the standard deviation over the seeds.
#
# - `dead_experts`: how many experts got no point. It sees a collapse, but not one expert with a
#   single point.
# - `effective_experts`: how many experts share the work, $\exp H(\bar g)$; 8 is an even load.
# - `load_balancing_loss`: about 1 for an even load, a diagnostic whether or not it is trained on.
# - entropy of the scores, `entropy_loss`: how undecided the router is, at most $\log 8 = 2.08$.
#   (With one expert per token, `confidence` is always 1 and `gate_entropy` always 0.)
# - size of the logits: the root of `router_z_loss`.
# - `mutual_information` of expert and cluster: how much the expert of a point tells about its
#   cluster; $\log 8 = 2.08$ if each expert has one cluster. That needs to know the clusters.


# %%
def report(params):
    output, routing = layer.apply(params, x)
    by_cluster = moejax.expert_by_class(routing, cluster, EXPERTS)
    return {
        "squared error": jnp.mean((output - y) ** 2),
        "dead experts": moejax.dead_experts(routing),
        "effective experts": moejax.effective_experts(routing),
        "load-balancing loss": moejax.load_balancing_loss(routing),
        "entropy of the scores": moejax.entropy_loss(routing),
        "size of the logits": jnp.sqrt(moejax.router_z_loss(routing)),
        "mutual information": moejax.mutual_information(by_cluster),
    }, by_cluster


reports, by_cluster = jax.jit(jax.vmap(report))(params)
print(" " * 21, *(f"{name:>14}" for name in REMEDIES))
for quantity, values in reports.items():
    runs = [np.asarray(one) for one in by_remedy(values).values()]
    texts = [f"{one.mean():.2f} ± {one.std(ddof=1):.2f}" for one in runs]
    print(f"{quantity:21}", *(f"{text:>14}" for text in texts))

# %% [markdown]
# Both the loss and the bias keep nearly all experts alive and the load nearly even. On average the
# loss lowers the squared error, too. The bias, at this rate, does not, and its runs differ most: a
# bias moves by the same $\rho$ however small the imbalance is, and the load jumps from step to
# step. (Under the loss two experts swap points in this way, too.) Where the load-balancing loss is
# below 1, the bias sends points to experts that the scores do not prefer.
#
# An even load is not the right division of labour. The mutual information is higher with it, but
# stays short of 2.08: some experts have parts of several clusters.
#
# ## Which cluster goes to which expert
#
# With the right division, each row and each column would have one dark cell. The run is the one
# with the load-balancing loss that is drawn above.

# %%
by_expert = np.asarray(run(by_cluster, "balance loss"))  # [E, clusters]
plot.table(
    by_expert / by_expert.sum(axis=0),
    rows="expert",
    columns="cluster",
    title="Share of each cluster's points, by expert",
    form=lambda share: f"{share:.0%}",
)

# %% [markdown]
# ## The z-loss is about something else
#
# It keeps the logits small, and does nothing for the load: in the table above, it leaves as many
# experts dead as no remedy does. The mean over the seeds, at each step:


# %%
def draw_means(**labels):
    figure, axes = plot.new_figure(1, len(labels), width=8.4, height=3.4)
    for ax, (quantity, label) in zip(axes[0], labels.items(), strict=True):
        for number, (name, values) in enumerate(by_remedy(history[quantity]).items()):
            ax.plot(np.asarray(values).mean(axis=0), color=COLORS[number], label=name)
        ax.set(xlabel="step", ylabel=label, ylim=(0, None))
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return figure


draw_means(logits="size of the logits", error="squared error")

# %% [markdown]
# ## Expert choice
#
# Here experts choose points: each takes the C = T/E points that have the highest scores for it. The
# load is even by construction, and no loss is needed for it. What can go wrong is on the other
# side: a point may be taken by several experts, or by none, and then its output is zero.

# %%
choice = moejax.moe(
    moejax.linear(2, 1),
    moejax.linear(2, EXPERTS),
    num_experts=EXPERTS,
    route=partial(moejax.expert_choice, capacity=POINTS // EXPERTS),
    execute=moejax.gather_slots,
)


def choice_loss(params, batch, key):
    output, _ = choice.apply(params, x)
    return jnp.mean((output - y) ** 2), {}


def train_choice(key):
    step = train_step(choice_loss, optimizer)
    state = init_state(choice.init(key), optimizer, key)
    state, metrics = jax.lax.scan(lambda state, _: step(state, None), state, length=STEPS)
    _, decision = choice.apply(state.params, x)
    return decision.tokens, metrics["loss"][-1]


tokens, errors = jax.jit(jax.vmap(train_choice))(keys[:SEEDS])  # [seeds, E, C], [seeds]
taken = np.stack([np.bincount(one.ravel(), minlength=POINTS) for one in np.asarray(tokens)])
print(f"squared error {errors.mean():.2f} ± {errors.std(ddof=1):.2f}")
for count in range(4):
    print(f"points that {count} experts take: {np.mean(taken == count):.1%}")
print(f"points that more take: {np.mean(taken > 3):.1%}")

# %% [markdown]
# The second happens here: about a quarter of the points go to nobody, and on average the squared
# error is larger than with any remedy above. An even load says nothing about the points that are
# left out.
#
# The rule looks at all points at once, so it cannot stand in a decoder that writes one token after
# the other; see *causal* in [the table of rules](../rules.md).
#
# ## Try
#
# - Another strength: `(0.1, 0, 0)` and `(0.01, 0, 0)` in `REMEDIES`, or a slower bias,
#   `(0, 0, 0.001)`. When is a remedy too weak to help?
# - Two experts per point: `k=2, renormalize=True`. What do `confidence` and `gate_entropy` say now?
# - Clusters of unequal size, `cluster = jnp.minimum(jnp.arange(POINTS) % 12, 7)`. An even load is
#   then not the right division: what do the losses do about it?
# - A router that is not linear, `moejax.mlp(2, 16, EXPERTS)` inside of `biased`.
#
# ## Read next
#
# [How to](../howto.md) says what to do about a router that has collapsed. [Rules, losses,
# diagnostics](../rules.md) has all of them with their formulas, and [MNIST](mnist.ipynb) shows the
# same on images.
