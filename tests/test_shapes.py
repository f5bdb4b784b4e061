"""What functions say of shapes and dtypes, checked at run time: here, and not in users' programs.

The annotations of the library are those of NumPy's readers, and need nothing installed; the shapes
that its docstrings promise are written here in jaxtyping's terms. One letter is one size in a call.
"""

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, TypeCheckError, jaxtyped

import moejax
from cases import EXPERTS, PAIRS, RULES, SCHEDULES, SLOT_RULES, SLOT_SCHEDULES, logits_for, problem

checked = jaxtyped(typechecker=beartype)


@checked
def check_routing(
    logits: Float[Array, "T E"],
    experts: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    scores: Float32[Array, "T E"],
    clean: Float32[Array, "T E"],
    chances: Float32[Array, "T E"] | None,
    gates: Float32[Array, "T E"],
    counts: Int32[Array, " E"],
    present: Bool[Array, " T"],
    chosen: Bool[Array, "T K"],
    queue: Int32[Array, "T K"],
) -> None:
    """A decision of tokens, its derived fields, and the place of every choice in its queue."""


@checked
def check_expert_choice(
    logits: Float[Array, "T E"],
    tokens: Int32[Array, "E C"],
    weights: Float32[Array, "E C"],
    scores: Float32[Array, "T E"],
    clean: Float32[Array, "T E"],
    present: Bool[Array, " T"],
) -> None:
    """A decision of experts."""


@checked
def check_soft_slots(
    logits: Float[Array, "T E C"],
    dispatch: Float32[Array, "T E C"],
    combine: Float32[Array, "T E C"],
    clean: Float32[Array, "T E C"],
    present: Bool[Array, " T"],
) -> None:
    """A decision of slots."""


def check_decision(logits, decision):
    if isinstance(decision, moejax.Routing):
        derived = decision.gates, decision.counts, decision.present, decision.chosen
        check_routing(logits, *decision, *derived, moejax.positions(decision))
    elif isinstance(decision, moejax.ExpertChoice):
        check_expert_choice(logits, *decision, decision.present)
    else:
        check_soft_slots(logits, *decision, decision.present)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rule", RULES | SLOT_RULES)
def test_decisions(rule, dtype):
    """Whatever the dtype of the logits, down to the places of choices; while tracing, too."""
    logits = logits_for(rule).astype(dtype)

    def decide(logits):
        decision = (RULES | SLOT_RULES)[rule](logits)
        check_decision(logits, decision)
        return decision

    jax.eval_shape(decide, logits)


@pytest.mark.parametrize("rule", RULES)
def test_limits_and_masks_keep_the_shapes_of_a_decision(rule):
    def decide(logits, mask):
        decision = moejax.mask_tokens(RULES[rule](logits), mask)
        check_decision(logits, decision)
        check_decision(logits, moejax.limit_capacity(decision, capacity=2))

    logits = logits_for(rule)
    jax.eval_shape(decide, logits, jnp.ones(len(logits), bool))


@checked
def check_output(
    x: Float[Array, "T *features"], y: Float[Array, "T *outputs"], routed: Int[Array, "T ..."]
) -> None:
    """A mixture answers for every token."""


@pytest.mark.parametrize(("schedule", "rule"), PAIRS)
def test_outputs_are_one_per_token_in_the_dtype_of_the_tokens(schedule, rule):
    def run(params, x, logits):
        decision = (RULES | SLOT_RULES)[rule](logits)
        y = (SCHEDULES | SLOT_SCHEDULES)[schedule](EXPERTS["mlp"].apply, params, x, decision)
        assert y.dtype == x.dtype
        check_output(x, y, decision.present.astype(jnp.int32))

    params, x = problem("mlp", jnp.bfloat16)
    jax.eval_shape(run, params, x, logits_for(rule))


@checked
def check_numbers(*values: Float32[Array, ""]) -> None:
    """Losses and diagnostics are scalars."""


@pytest.mark.parametrize("rule", RULES)
def test_losses_are_scalars(rule):
    losses = [getattr(moejax, name) for name in moejax.__all__ if name.endswith("_loss")]
    losses += [moejax.gate_entropy, moejax.confidence, moejax.effective_experts]

    def read(logits):
        routing = RULES[rule](logits)
        usable = [loss for loss in losses if loss is not moejax.load_loss]
        if routing.chances is not None:
            usable.append(moejax.load_loss)
        check_numbers(*(loss(routing) for loss in usable))

    jax.eval_shape(read, logits_for(rule))


def test_the_check_refuses():
    """A decision whose logits are of another shape does not pass."""
    logits = logits_for("top_2")
    routing = moejax.top_k(logits, k=2)
    with pytest.raises(TypeCheckError):
        check_decision(logits, routing._replace(logits=routing.logits[:, :1]))
