"""What is called outside of `jax.jit` is compiled as a whole, and inside nothing changes."""

import logging

import jax
import jax.numpy as jnp
import pytest

import moejax

LOSSES = [moejax.load_balancing_loss, moejax.importance_loss, moejax.router_z_loss]


@pytest.mark.parametrize("function", [*LOSSES, moejax.gate_entropy])
def test_one_program_and_not_one_for_each_operation(function, caplog):
    routing = jax.jit(moejax.switch)(jnp.zeros((37, 5)))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        function(routing)
        function(routing)
    compiled = [message for message in caplog.messages if message.startswith("Compiling")]
    assert len(compiled) == 1, compiled


@pytest.mark.parametrize("function", LOSSES)
def test_nothing_is_wrapped_inside_of_a_program(function):
    routing = moejax.switch(jnp.zeros((37, 5)))
    equations = jax.make_jaxpr(function)(routing).eqns
    names = {equation.params.get("name") for equation in equations}
    assert function.__name__ not in names
