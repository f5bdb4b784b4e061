"""Training as pure functions: a state, a step, and a loop of it over shuffled batches.

A loss is any function ``(params, batch, key) -> (loss, metrics)``; key is None in evaluation.
Data is a pytree of arrays that share axis 0 (the examples) and stay on the device.
"""

from moejax.training.batches import Masked, batch_sizes, epoch_order
from moejax.training.epoch import empty_metrics, scan_batches, train_epoch, train_until
from moejax.training.inspection import ParameterStep, inspect_step
from moejax.training.memory import KeptGradients, keep_gradients
from moejax.training.step import Loss, Metrics, Step, TrainState, init_state, train_step

__all__ = [
    "KeptGradients",
    "Loss",
    "Masked",
    "Metrics",
    "ParameterStep",
    "Step",
    "TrainState",
    "batch_sizes",
    "empty_metrics",
    "epoch_order",
    "init_state",
    "inspect_step",
    "keep_gradients",
    "scan_batches",
    "train_epoch",
    "train_step",
    "train_until",
]
