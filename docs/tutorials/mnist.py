# %% [markdown]
# # MNIST: one network, a blend, the best two
#
# This page goes from one small network for handwritten digits to a sparse mixture of eight: a
# folder of digits, the network, a look inside one step of its training, a soft mixture of eight
# networks, and then the sparse one in which every image is seen by two experts only.
#
# $$y = \sum_e g_e(x)\, E_e(x), \qquad
# E_e(x) = W_e^{(2)}\,\mathrm{ReLU}\big(W_e^{(1)} x + b_e^{(1)}\big) + b_e^{(2)}, \qquad
# g(x) = \mathrm{softmax}(W x + b).$$
#
# It is the sum of [the toy](toy.ipynb) with networks for lines and ten outputs for one.

# %% tags=["parameters"]
TRAIN_IMAGES = 60_000
TEST_IMAGES = 10_000
SGD_STEPS = 5
EPOCHS = 3
BATCH_SIZE = 100
EXPERTS = 8
HIDDEN = 128

# %% [markdown]
# The loaders of the data belong to the experiments of the repository, not to the library. The line
# with `sys.path` finds them from the repository's root and from the folder of this page.

# %%
# %matplotlib inline
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import moejax
from moejax import plot
from moejax.training import init_state, inspect_step, train_epoch, train_step

sys.path += ["experiments", "../../experiments"]
from data import Split, flat, load, one_hot

# %% [markdown]
# ## A folder of digits
#
# ```text
# digits/train/0/00001.png    digits/train/1/00003.png    ...    digits/test/9/00007.png
# ```
#
# ```python
# # PyTorch
# to_tensor = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
# train = ImageFolder("digits/train", transform=to_tensor)
# batches = DataLoader(train, batch_size=100, shuffle=True)
# ```
#
# `load("digits")` reads such a folder, or one with MNIST's four IDX files, into arrays. Without a
# name it takes the folder that the environment variable `MOEJAX_DATA_DIR` names, else it downloads
# MNIST once; offline it takes 5,000 images of MNIST that a package carries, and says so.

# %%
data = load()
train = Split(*(array[:TRAIN_IMAGES] for array in data.train))
test = Split(*(array[:TEST_IMAGES] for array in data.test))
print(data.notice or f"all of {data.name}: {len(data.train.labels):,} images to train")
print(f"this page: {len(train.labels):,} images to train, {len(test.labels):,} to test")


# %%
def one_of_each():
    figure, axes = plot.new_figure(1, 10, width=8, height=0.9)
    for digit, ax in enumerate(axes[0]):
        ax.imshow(train.images[train.labels == digit][0], cmap="gray_r")
        ax.axis("off")
    return figure


one_of_each()

# %% [markdown]
# The network reads a row of 784 numbers in $[0, 1]$, and its target is a one-hot row of ten.
#
# ```python
# # PyTorch
# x = images.view(-1, 784)
# y = F.one_hot(labels, num_classes=10).float()
# ```
#
# `flat` and `one_hot` are pure functions, so they can be part of the compiled step. The images stay
# the bytes that they are until a batch is used.

# %%
print(flat(train.images[:5]).shape, one_hot(train.labels[:5]).shape)
print(train.labels[0], "->", one_hot(train.labels[:1])[0])

# %% [markdown]
# ## One network
#
# ```python
# # PyTorch
# network = nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))
# loss = nn.CrossEntropyLoss()(network(x), y)
# ```
#
# The cross-entropy is $-\sum_c y_c \log \mathrm{softmax}(\mathrm{logits})_c$. A network that has
# learnt nothing gives each digit about a tenth, so it starts near $\log 10 = 2.303$.

# %%
network = moejax.mlp(784, 50, 10)


def alone(network, params, x):
    return network.apply(params, x), 0.0  # logits [T, 10], and no balance loss


def objective(forward, params, batch, key):
    logits, balance = forward(params, flat(batch.images))
    loss = optax.softmax_cross_entropy(logits, one_hot(batch.labels)).mean()
    accuracy = jnp.mean(logits.argmax(axis=1) == batch.labels)
    return loss + balance, {"cross_entropy": loss, "accuracy": accuracy}


init_key, run_key = jax.random.split(jax.random.key(0))
sgd = optax.sgd(0.001)
state = init_state(network.init(init_key), sgd, run_key)
first_objective = partial(objective, partial(alone, network))
loss, metrics = first_objective(state.params, train, None)
print(f"loss {loss:.3f}, accuracy {metrics['accuracy']:.1%}; log 10 = {np.log(10):.3f}")

# %% [markdown]
# ## Inside one step
#
# In PyTorch one would look at a parameter and its gradient three times:
#
# ```python
# # PyTorch
# optimizer.zero_grad()   # gradients: None or zero
# loss.backward()         # gradients: filled in
# optimizer.step()        # parameters: moved by -0.001 times the gradient
# ```
#
# There, gradients live beside the parameters and add up until somebody zeroes them. Here a gradient
# is a value that a function returns: nothing needs to be zeroed. `inspect_step` gives for every
# parameter what a step would see and do, without taking it.

# %%
for record in inspect_step(first_objective, sgd, state, train):
    sizes = [float(jnp.abs(part).mean()) for part in (record.value, record.gradient, record.update)]
    print(
        f"{record.path:<16} {record.shape!s:<10}"
        " mean size {:.1e}, gradient {:.1e}, update {:.1e}".format(*sizes)
    )
    np.testing.assert_allclose(record.update, -0.001 * record.gradient, rtol=1e-6)

# %% [markdown]
# The updates are thousands of times smaller than what they are added to, so plain SGD with a rate
# of 0.001, each step on all images, hardly moves:

# %%
step = jax.jit(train_step(first_objective, sgd))
for _ in range(SGD_STEPS):
    state, metrics = step(state, train)
    print(f"step {state.step}: loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.2%}")

# %% [markdown]
# ## Small batches
#
# Nothing is wrong with the network. It needs more steps, which small batches give, and steps of a
# better size, which Adam takes.
#
# ```python
# # PyTorch
# for epoch in range(3):
#     for images, labels in batches:
#         optimizer.zero_grad()
#         F.cross_entropy(network(images.view(-1, 784)), labels).backward()
#         optimizer.step()
# ```
#
# `train_epoch` shuffles, cuts into batches and takes the steps, all in one compiled program. `fit`
# runs it for any model: `layer` makes the parameters, `forward` gives logits and a balance loss.


# %%
def fit(layer, forward):
    adam = optax.adam(1e-3)
    step = train_step(partial(objective, forward), adam)
    epoch = jax.jit(partial(train_epoch, step, batch_size=BATCH_SIZE))
    evaluate = jax.jit(partial(objective, forward))
    state, history = init_state(layer.init(init_key), adam, run_key), []
    for number in range(1, EPOCHS + 1):
        state, metrics = epoch(state, train)
        _, tested = evaluate(state.params, test, None)
        history.append(
            {
                "epoch": number,
                "train_loss": metrics["cross_entropy"].mean(),
                "train_accuracy": metrics["accuracy"].mean(),
                "test_loss": tested["cross_entropy"],
                "test_accuracy": tested["accuracy"],
            }
        )
    last = history[-1]
    print(f"test: loss {last['test_loss']:.4f}, accuracy {last['test_accuracy']:.2%}")
    return state.params, history


histories = {}
_, histories["one network"] = fit(network, partial(alone, network))

# %% [markdown]
# ## The soft mixture
#
# Eight networks, and a linear gate that reads the same pixels.
#
# ```python
# # PyTorch
# gates = self.gate(x).softmax(dim=1)  # [T, E]
# outputs = torch.stack([expert(x) for expert in self.experts], dim=1)  # [T, E, 10]
# logits = (gates.unsqueeze(-1) * outputs).sum(dim=1)  # [T, 10]
# ```
#
# `moe` returns the same logits with the decision of the gate beside them.

# %%
expert, router = moejax.mlp(784, HIDDEN, 10), moejax.linear(784, EXPERTS)
soft = moejax.moe(expert, router, num_experts=EXPERTS)


def blended(params, x):
    logits, _ = soft.apply(params, x)
    return logits, 0.0


soft_params, histories["all of eight"] = fit(soft, blended)

# %% [markdown]
# Who does what? For each digit, the share of the gate that each expert gets, over the test images:


# %%
def shares(layer, params):
    _, routing = layer.apply(params, flat(test.images))
    return np.asarray(moejax.expert_by_class(routing, jnp.asarray(test.labels), 10))  # [E, 10]


plot.specialisation(shares(soft, soft_params), classes="digit")

# %% [markdown]
# Nobody told the gate about digits, and nobody asked it to share the work fairly. An expert that
# the picture calls idle is left with hardly any of the gate; [what routers
# learn](what_routers_learn.ipynb) looks into that.
#
# ## Top-k
#
# In the soft mixture all eight networks run for every image. In a sparse one each image goes to its
# two best experts,
#
# $$y = \sum_{e \in \mathrm{top}\,2} \tilde g_e(x)\, E_e(x), \qquad
# \tilde g = \text{softmax over the two kept logits},$$
#
# so there is a quarter of the work for the same parameters.
#
# ```python
# # PyTorch
# kept, chosen = self.gate(x).topk(2, dim=1)  # [T, K]
# weights = kept.softmax(dim=1)
# for e, expert in enumerate(self.experts):
#     token, choice = torch.where(chosen == e)
#     y = y.index_add(0, token, weights[token, choice, None] * expert(x[token]))
# ```
#
# Here only the rule changes. The parameters have the same shapes, so the trained soft mixture can
# be asked what it would do with two experts per image, or with all eight, which is the softmax:


# %%
def of_eight(k):
    route = partial(moejax.top_k, k=k)
    return moejax.moe(expert, router, num_experts=EXPERTS, route=route)


x = flat(test.images)
logits, _ = soft.apply(soft_params, x)
for k in (EXPERTS, 2):
    sparse_logits, _ = of_eight(k).apply(soft_params, x)
    same = jnp.mean(sparse_logits.argmax(axis=1) == logits.argmax(axis=1))
    print(f"k = {k}: {same:.1%} of predictions as in the soft mixture")

# %% [markdown]
# Training it needs one thing more. An expert that is not chosen learns nothing from that image, and
# so is chosen less: a gate that sends everything to few experts is a stable mistake. A balance loss
# stands against it,
#
# $$L_{\mathrm{balance}} = E \sum_e f_e P_e,$$
#
# where $f_e$ is the share of choices that expert $e$ gets and $P_e$ its mean probability. It is 1
# when all experts get the same. The decision that `moe` returns is all that the loss reads.

# %%
sparse = of_eight(2)


def best_two(params, x):
    logits, routing = sparse.apply(params, x)
    return logits, 0.01 * moejax.load_balancing_loss(routing)


sparse_params, histories["two of eight"] = fit(sparse, best_two)
_, routing = sparse.apply(sparse_params, x)
loads = moejax.expert_load(routing)
print("share of the choices, by expert:", *(f"{load:.0%}" for load in loads))

# %%
plot.specialisation(shares(sparse, sparse_params), classes="digit")

# %%
top = np.asarray(routing.experts[:, 0])  # the best expert comes first
plot.images_by_expert(test.images, top, EXPERTS)

# %% [markdown]
# ## Side by side
#
# The mixtures have many times the parameters of the first network, so it is no fair comparison. A
# network of twice an expert's width does as much work for an image as two experts do:

# %%
wide = moejax.mlp(784, 2 * HIDDEN, 10)
_, histories["one wide network"] = fit(wide, partial(alone, wide))
plot.curves(histories)

# %%
for name, layer in zip(histories, (network, soft, sparse, wide), strict=True):
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(layer.init, init_key)))
    accuracy = histories[name][-1]["test_accuracy"]
    print(f"{name:<16} {count:>9,} parameters, test accuracy {accuracy:.2%}")

# %% [markdown]
# MNIST is nearly solved by one network of moderate width: here mixtures are for looking at, not for
# winning. They pay where one network of the same work is too small for what there is to learn.
#
# ## Try
#
# - Another seed, in `jax.random.key(0)`: do the same digits find the same experts?
# - Without the balance loss: return `0.0` from `best_two`, and look at the shares again.
# - Another rule: `route=moejax.relu`, where the number of experts differs between images.
# - The same with everything that a real run needs (progress, resuming, many devices):
#   `python experiments/mnist.py --model all`.
#
# ## Read next
#
# [A rule and an expert of your own](your_own.ipynb); then [rules and their losses](../rules.md) and
# the [speed](../speed.md) of the schedules.
