"""A study with made-up measures of the right shapes: what it says and draws, without its runs."""

import argparse
import importlib
import time

import jax
import numpy as np

from commands import draw_nothing
from studies.blocks import Cell, collect


def uniform(calls):
    """A measure that notes how many keys it gets."""

    def measure(keys):
        calls.append(len(keys))
        return {"value": jax.vmap(jax.random.uniform)(keys)}

    return measure


def stay_in_the_third_block(folder):
    """A study of six blocks that does not end by itself."""

    def measure(keys):
        if len(calls) == 2:
            time.sleep(60)
        return uniform(calls)(keys)

    calls = []
    collect(folder, [Cell("a", 6, 1, measure)], 3, {}, resume=False)


def save_no_pictures(monkeypatch):
    """For a second run of a study, at whose pictures nobody looks."""
    for module in ("command", "page"):
        monkeypatch.setattr(f"studies.{module}.save_figure", draw_nothing)


def studied(name, options):
    """The summary of a study, its measures and the study, as the command line would ask for it."""
    study = importlib.import_module(name).STUDY
    parser = argparse.ArgumentParser()
    study.add_options(parser)
    random = np.random.default_rng(0)
    measured = {}
    for cell in study.cells(parser.parse_args(options.split())):
        keys = jax.random.split(jax.random.key(0), cell.seeds)
        shapes = jax.eval_shape(cell.measure, keys)  # every program is traced, none compiled
        measured[cell.name] = {
            measure: random.uniform(0.5, 1, shape.shape) for measure, shape in shapes.items()
        }
        if "iterations" in shapes:
            measured[cell.name]["iterations"] = np.full(cell.seeds, 100.0)
    rest = {"seconds": 90.0, "versions": {"cores": "2", "processor": "a processor"}}
    return study.summarize(measured) | rest, measured, study
