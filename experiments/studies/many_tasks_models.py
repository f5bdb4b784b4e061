"""Many tasks, one set of experts: compositions of layers of the library.

All experts see every example once, however many gates then blend their outputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import moejax


def shared_bottom(bottom: moejax.Layer, tower: moejax.Layer, *, num_tasks: int) -> moejax.Layer:
    """``y_k = t_k(f(x))``: what tasks share is one network.

    Args:
        bottom: f, ``x [N, D] -> [N, H]``.
        tower: t, ``[N, H] -> [N, O]``, of which every task has its own.
        num_tasks: how many tasks.

    Returns:
        A layer with ``apply(params, x [N, D]) -> y [tasks, N, O]``.
    """
    layers = {"bottom": bottom, "towers": moejax.stack(tower, num_tasks)}

    def init(key: jax.Array) -> Any:
        return init_all(layers, key)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return layers["towers"].apply(params["towers"], bottom.apply(params["bottom"], x))

    return moejax.Layer(init, apply)


def multi_gate(
    expert: moejax.Layer,
    gate: moejax.Layer,
    tower: moejax.Layer,
    *,
    num_experts: int,
    num_tasks: int,
    num_gates: int,
) -> moejax.Layer:
    """``y_k = t_k(sum_e g_ke(x) E_e(x))``: a gate for each task, or one that all tasks share.

    Args:
        expert: ``x [N, D] -> [N, H]``.
        gate: ``x -> logits [N, E]``.
        tower: ``[N, H] -> [N, O]``.
        num_experts: E.
        num_tasks: how many tasks.
        num_gates: ``num_tasks`` of them, or 1.

    Returns:
        A layer with ``apply(params, x) -> y [tasks, N, O]``.

    References:
        Ma et al., `Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts <https://doi.org/10.1145/3219819.3220007>`_, 2018
    """
    layers = {
        "experts": moejax.stack(expert, num_experts),
        "gates": moejax.stack(gate, num_gates),
        "towers": moejax.stack(tower, num_tasks),
    }

    def init(key: jax.Array) -> Any:
        return init_all(layers, key)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        outputs = layers["experts"].apply(params["experts"], x)  # [E, N, H]
        gates = jax.nn.softmax(layers["gates"].apply(params["gates"], x))  # [gates, N, E]
        blends = jnp.einsum("kne,enh->knh", gates, outputs)
        blends = jnp.broadcast_to(blends, (num_tasks, *blends.shape[1:]))
        return jax.vmap(tower.apply)(params["towers"], blends)

    return moejax.Layer(init, apply)


def extraction(
    expert: moejax.Layer,
    gate: moejax.Layer,
    shared_gate: moejax.Layer | None,
    *,
    num_tasks: int,
    own: int,
    shared: int,
) -> moejax.Layer:
    """One level of PLE: each task blends its own experts and the shared ones.

    ``z_k = sum_e g_ke(x_k) E_e``, over the task's own experts on ``x_k`` and the shared ones on
    ``x_0``; the shared ``z_0`` blends the experts of all.

    Args:
        expert: ``[N, D] -> [N, H]``.
        gate: of a task, ``[N, D] -> logits [N, own + shared]``.
        shared_gate: ``[N, D] -> logits [N, tasks * own + shared]``; None at the last level, which
            passes nothing on but what the towers read.
        num_tasks: how many tasks.
        own: experts of each task.
        shared: experts of all.

    Returns:
        A layer with ``apply(params, x [tasks + 1, N, D])``, the shared representation last, that
        returns [tasks + 1, N, H], or [tasks, N, H] at the last level.

    References:
        Tang et al., `Progressive Layered Extraction
        <https://doi.org/10.1145/3383313.3412236>`_, 2020
    """
    group = moejax.stack(expert, own)
    layers = {
        "own": moejax.stack(group, num_tasks),
        "shared": moejax.stack(expert, shared),
        "gates": moejax.stack(gate, num_tasks),
    } | ({} if shared_gate is None else {"shared_gate": shared_gate})

    def init(key: jax.Array) -> Any:
        return init_all(layers, key)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        tasks, common = x[:-1], x[-1]
        mine = jax.vmap(group.apply)(params["own"], tasks)  # [tasks, own, N, H]
        ours = layers["shared"].apply(params["shared"], common)  # [shared, N, H]
        every = jnp.broadcast_to(ours, (num_tasks, *ours.shape))
        gates = jax.nn.softmax(jax.vmap(gate.apply)(params["gates"], tasks))  # [tasks, N, experts]
        blends = jnp.einsum("kne,kenh->knh", gates, jnp.concatenate([mine, every], axis=1))
        if shared_gate is None:
            return blends
        weights = jax.nn.softmax(shared_gate.apply(params["shared_gate"], common))
        outputs = jnp.concatenate([mine.reshape(-1, *mine.shape[2:]), ours])
        return jnp.concatenate([blends, jnp.einsum("ne,enh->nh", weights, outputs)[None]])

    return moejax.Layer(init, apply)


def progressive(levels: list[moejax.Layer], tower: moejax.Layer, *, num_tasks: int) -> moejax.Layer:
    """PLE: levels of `extraction`, the last without a shared gate, and a tower for each task.

    Returns:
        A layer with ``apply(params, x [N, D]) -> y [tasks, N, O]``.
    """
    towers = moejax.stack(tower, num_tasks)

    def init(key: jax.Array) -> Any:
        *keys, last = jax.random.split(key, len(levels) + 1)
        each = [level.init(one) for level, one in zip(levels, keys, strict=True)]
        return {"levels": each, "towers": towers.init(last)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, (num_tasks + 1, *x.shape))
        for level, one in zip(levels, params["levels"], strict=True):
            x = level.apply(one, x)
        return jax.vmap(tower.apply)(params["towers"], x)

    return moejax.Layer(init, apply)


def init_all(layers: dict[str, moejax.Layer], key: jax.Array) -> Any:
    """The parameters of named layers, each from a key of its own."""
    keys = jax.random.split(key, len(layers))
    return {name: one.init(k) for (name, one), k in zip(layers.items(), keys, strict=True)}
