"""What is called outside of `jax.jit` is compiled as a whole, forward and backward."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from cases import RULES, SLOT_RULES, TABLE, C, E

LOSSES = [moejax.load_balancing_loss, moejax.importance_loss, moejax.router_z_loss]


@pytest.mark.parametrize("function", [*LOSSES, moejax.gate_entropy])
def test_one_program_and_not_one_for_each_operation(function, caplog):
    routing = jax.jit(moejax.switch)(np.zeros((37, 5), np.float32))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        function(routing)
        function(routing)
    compiled = [message for message in caplog.messages if message.startswith("Compiling")]
    assert len(compiled) == 1, compiled


ALL_RULES = RULES | SLOT_RULES
# A number of tokens that no other test has, so that nothing of it is compiled yet.
TOKENS = {name: 1001 + index for index, name in enumerate(ALL_RULES)}
IDS = np.arange(TOKENS["hashed"], dtype=np.int32)
ALL_RULES["hashed"] = partial(moejax.hashed, token_ids=IDS, table=TABLE)


@pytest.mark.parametrize("name", ALL_RULES)
def test_a_rule_is_one_program(name, caplog):
    rule, shape = ALL_RULES[name], (TOKENS[name], E)
    logits = np.ones((*shape, C) if name == "soft_slots" else shape, np.float32)
    assert len(jax.make_jaxpr(rule)(logits).eqns) == 1  # what does not depend on tokens, too
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        rule(logits)
    compiled = [message for message in caplog.messages if message.startswith("Compiling")]
    # Beside it, a number that a rule is given becomes an array.
    makes_an_array = ("jit(stage)", "jit(convert_element_type)")
    programs = [one for one in compiled if not any(name in one for name in makes_an_array)]
    assert len(programs) == 1, programs


@pytest.mark.parametrize("function", LOSSES)
def test_the_backward_pass_is_compiled_as_a_whole_too(function, caplog):
    routing = jax.jit(moejax.switch)(np.zeros((37, 5), np.float32))
    like = {"scores": routing.scores, "logits": routing.logits, "weights": routing.weights}
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.grad(lambda some: function(routing._replace(**some)))(like)
    compiled = [message for message in caplog.messages if message.startswith("Compiling")]
    own = [message for message in compiled if function.__name__ in message]
    assert len(own) == 2, compiled
    assert len(compiled) <= 6, compiled  # and what JAX makes to start from one


def test_a_first_gradient_of_a_mixture_is_few_programs(caplog):
    model = moejax.moe(moejax.mlp(3, 4, 3), moejax.linear(3, 5), num_experts=5)
    params, x = jax.jit(model.init)(jax.random.key(0)), jnp.ones((29, 3))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.grad(lambda params: jnp.sum(model.apply(params, x)[0]))(params)
    compiled = [message for message in caplog.messages if message.startswith("Compiling")]
    assert len(compiled) <= 14, compiled  # 26 where the router's operations are compiled singly
