"""Pictures: what is drawn faster is the same picture, and shades keep their colour."""

import numpy as np
import pytest
from PIL import Image

from moejax.plot import (
    Plane,
    boundary_frame,
    boundary_frames,
    confusion,
    curves,
    diagnostics,
    grid,
    loss,
    new_figure,
    save_animation,
    specialisation,
    table,
)

POINTS = np.random.default_rng(0).normal(size=(40, 2))
LABELS = POINTS[:, 0] > 0


def plane(angle):
    """Two experts whose lines turn, and a boundary between them."""
    x, y, _ = grid(POINTS, size=20)
    slope = np.cos(angle) * x + np.sin(angle) * y[:, None]
    experts = np.stack([slope, slope.T])
    return Plane(x, y, experts, np.full_like(experts, 0.5), 1 / (1 + np.exp(-slope)))


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def test_a_frame_that_keeps_what_is_still_is_the_frame_drawn_whole():
    planes = [(plane(angle), f"at {angle}") for angle in (0.1, 0.7, 1.3)]
    for (own, title), figure in zip(planes, boundary_frames(POINTS, LABELS, planes), strict=True):
        whole = pixels(boundary_frame(POINTS, LABELS, own, title=title))
        np.testing.assert_allclose(pixels(figure), whole, atol=1)


def test_a_line_that_misses_the_plane_is_not_drawn():
    away = plane(0.1)._replace(experts=np.ones((2, 20, 20)), probability=np.ones((20, 20)))
    figure = boundary_frame(POINTS, LABELS, away, title="")
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [0, 0, 0]


@pytest.mark.parametrize("hue", [(255, 0, 0), (0, 114, 178)])
def test_an_animation_does_not_tint_shades_of_grey(tmp_path, hue):
    figure, axes = new_figure(width=2, height=1)
    axes[0, 0].set_axis_off()
    axes[0, 0].imshow(np.linspace(0, 1, 256)[None], cmap="gray", aspect="auto")
    axes[0, 0].axvline(20, color=np.array(hue) / 255)
    save_animation([figure], tmp_path / "shades.gif")
    with Image.open(tmp_path / "shades.gif") as animation:
        shown = np.asarray(animation.convert("RGB")).astype(int)
    grey = np.ptp(pixels(figure), axis=-1) == 0
    assert np.ptp(shown, axis=-1)[grey].max() == 0
    np.testing.assert_allclose(shown[grey], pixels(figure)[grey], atol=3)
    assert np.abs(shown - np.array(hue)).sum(axis=-1).min() < 12


@pytest.mark.parametrize("draw", [specialisation, confusion])
def test_pictures_call_a_class_what_it_is(draw):
    for given, word in ({}, "class"), ({"classes": "animal"}, "animal"):
        (axes,) = draw(np.eye(3, dtype=int), **given).axes
        assert word in axes.get_xlabel()
        assert word in axes.get_title()


def shows(axes, values):
    low, high = axes.get_ylim()
    return low <= np.min(values) and np.max(values) <= high


def test_every_run_of_any_sign_and_length_is_drawn():
    runs = {f"run {i}": -np.linspace(1, 2 + i, 30) for i in range(6)}
    figure = loss(runs, -np.ones((4, 3)))
    (axes,) = figure.axes
    assert {text.get_text() for text in figure.legends[0].texts} >= runs.keys()
    assert shows(axes, [*runs.values()])
    assert axes.get_xlim() == (0, 29)
    assert loss({"run": np.ones(3)}, np.ones((4, 3))).axes[0].get_ylim()[0] == 0


def test_all_epochs_of_all_models_are_drawn():
    rates = dict.fromkeys(("train_loss", "test_loss", "train_accuracy", "test_accuracy"), 0.5)
    lengths = {"long": 10, "short": 3}
    histories = {
        name: [{"epoch": epoch, **rates} for epoch in range(1, length + 1)]
        for name, length in lengths.items()
    }
    assert curves(histories).axes[0].get_xlim() == (0.5, 10.5)
    with pytest.raises(ValueError, match="at least one model with one record"):
        curves({})


@pytest.mark.parametrize("values", [[-2.0, -1.0], [-1.0, 3.0], [0.5, 0.7], [0.0, 0.0]])
def test_diagnostics_of_any_sign_are_shown(values):
    records = [{"epoch": epoch, "what": value} for epoch, value in enumerate([*values, np.inf])]
    (axes,) = (axes for axes in diagnostics(records).axes if axes.get_visible())
    assert shows(axes, [0, *values])


def test_a_table_of_negative_numbers_is_drawn():
    pixels(table(-np.ones((2, 2)), rows="r", columns="c", title="t", form=str))
