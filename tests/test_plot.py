"""Pictures: what is drawn faster is the same picture, and shades keep their colour."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from moejax.plot import (
    Plane,
    boundary_frame,
    boundary_frames,
    confusion,
    curves,
    diagnostics,
    grid,
    images_by_expert,
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


def numbers_in(axes):
    """What is written in each cell, by row and column."""
    places = [tuple(map(int, text.get_position()[::-1])) for text in axes.texts]
    return dict(zip(places, [text.get_text() for text in axes.texts], strict=True))


def test_specialisation_names_shares_and_idle_experts():
    (axes,) = specialisation(np.array([[3, 1], [1, 1], [0, 0]])).axes
    rows = [["75%", "50%"], ["25%", "50%"], ["0%", "0%"]]
    assert numbers_in(axes) == {(r, c): rows[r][c] for r in range(3) for c in range(2)}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2 (idle)"]


def test_confusion_has_the_true_class_in_the_row():
    (axes,) = confusion(np.array([[5, 3], [0, 4]])).axes
    assert numbers_in(axes) == {(0, 0): "5", (0, 1): "3", (1, 1): "4"}
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    shades = np.sqrt([[5 / 8, 3 / 8], [0, 1]])
    np.testing.assert_allclose(axes.images[0].get_array(), shades)


def test_an_animation_repeats_and_holds_its_last_frame(tmp_path):
    figures = [new_figure(width=1, height=1)[0] for _ in range(3)]
    for figure, shade in zip(figures, ["red", "green", "blue"], strict=True):
        figure.set_facecolor(shade)
    save_animation(figures, tmp_path / "three.gif", milliseconds=100)
    with Image.open(tmp_path / "three.gif") as animation:
        assert animation.info["loop"] == 0  # for ever
        shown = [frame.info["duration"] for frame in ImageSequence.Iterator(animation)]
    assert shown == [100, 100, 2000]


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


@pytest.mark.parametrize("quantities", [1, 8])
@pytest.mark.parametrize("num_experts", [2, 11, 12, 40, 300])
def test_diagnostics_name_every_expert(quantities, num_experts):
    record = {f"load {i}": np.full(num_experts, 1 / num_experts) for i in range(quantities)}
    figure = diagnostics([{"epoch": 1, **record}])
    pixels(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == [str(i) for i in range(num_experts)]
    inside = legend.get_window_extent()
    assert figure.bbox.containsx(inside.x0)
    assert figure.bbox.containsx(inside.x1)
    assert figure.bbox.containsy(inside.y0)
    assert figure.bbox.containsy(inside.y1)
    panel = figure.axes[0].get_window_extent()
    assert panel.width / figure.dpi > 1.5  # the legend leaves it its room
    assert not panel.overlaps(inside)


def test_a_table_of_negative_numbers_is_drawn():
    pixels(table(-np.ones((2, 2)), rows="r", columns="c", title="t", form=str))


def test_small_shares_have_labels_that_differ():
    records = [{"epoch": epoch, "share_dropped": 0.01 * epoch} for epoch in (1, 2)]
    (axes,) = (axes for axes in diagnostics(records).axes if axes.get_visible())
    axes.figure.canvas.draw()
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert len(set(labels)) == len(labels)


def test_a_quantity_may_begin_later():
    records = [{"epoch": 1, "a": 1.0}, {"epoch": 2, "a": 2.0, "b": np.array([3.0, 4.0])}]
    first, second = (axes for axes in diagnostics(records).axes if axes.get_visible())
    assert [line.get_xydata().tolist() for line in second.lines] == [[[2, 3]], [[2, 4]]]
    assert first.get_xlim() == second.get_xlim()


def test_a_seed_that_diverged_leaves_the_band_of_the_others():
    seeds = np.ones((3, 4))
    seeds[1, 2:] = np.nan
    (axes,) = loss({}, seeds).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.ones(4))


def test_the_darkest_cells_have_light_digits():
    figure = table(np.array([[-10.0, -1.0]]), rows="r", columns="c", title="t", form=str)
    assert [text.get_color() for text in figure.axes[0].texts] == ["#222222", "white"]


def test_images_of_no_expert_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        images_by_expert(np.zeros((0, 28, 28)), np.zeros(0), 2)
