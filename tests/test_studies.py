"""What all studies share: intervals, blocks of seeds, the page of docs."""

import argparse
import importlib
import json
import signal
import time

import jax
import numpy as np
import pytest

from commands import forks, refusal
from data import Dataset
from pages import DOCS
from parts.command_line import OneLineParser
from parts.ending import EndedError, RefusedError
from studies import (
    balance_report,
    clusters_report,
    efficiency_report,
    heads_report,
    hierarchy_report,
    images,
    many_tasks_report,
    sharpness_report,
)
from studies.blocks import Cell, collect
from studies.command import Study, work
from studies.intervals import interval, shown
from studies.page import check_page, pattern, publish, table
from study_cases import stay_in_the_third_block, uniform

RENDERED = {
    "balance": balance_report.render,
    "clusters": clusters_report.render,
    "efficiency": efficiency_report.render,
    "heads": heads_report.render,
    "hierarchy": hierarchy_report.render,
    "many_tasks": many_tasks_report.render,
    "sharpness": sharpness_report.render,
}


def test_an_interval_covers_the_mean_in_19_of_20():
    samples = np.random.default_rng(0).normal(3.0, 2.0, (2000, 6))
    found = [interval(sample) for sample in samples]
    covered = np.mean([one["low"] <= 3 <= one["high"] for one in found])
    assert abs(covered - 0.95) < 0.02
    assert found[0]["sd"] == pytest.approx(samples[0].std(ddof=1))


def test_one_seed_has_no_interval():
    one = interval(np.array([2.5]))
    assert one == {"mean": 2.5, "sd": None, "low": None, "high": None}
    assert shown(one, 1) == "2.5"
    assert shown(interval(np.array([1.0, 2.0, 3.0])), 2) == "2.00 [-0.48, 4.48]"


def test_blocks_are_measured_once(tmp_path):
    calls = []
    cells = [Cell("a", 5, 2, uniform(calls)), Cell("b", 1, 2, uniform(calls))]
    first = collect(tmp_path / "blocks", cells, 7, {"--x": "1"}, resume=False)
    assert sorted(calls) == [1, 1, 2, 2]
    assert first["a"]["value"].shape == (5,)
    assert len(set(first["a"]["value"])) == 5
    assert first["b"]["value"][0] == first["a"]["value"][0]  # equal seeds, equal keys
    again = collect(tmp_path / "blocks", cells, 7, {"--x": "1"}, resume=True)
    assert len(calls) == 4
    np.testing.assert_array_equal(again["a"]["value"], first["a"]["value"])
    longer = [Cell("a", 6, 2, uniform(calls))]
    more = collect(tmp_path / "blocks", longer, 7, {"--x": "1"}, resume=True)
    assert calls[4:] == [2]
    np.testing.assert_array_equal(more["a"]["value"][:5], first["a"]["value"])


def test_other_runs_are_refused(tmp_path):
    cells = [Cell("a", 1, 1, uniform([]))]
    collect(tmp_path / "blocks", cells, 0, {"--x": "1"}, resume=False)
    with pytest.raises(RefusedError, match="--resume, or choose another --out"):
        collect(tmp_path / "blocks", cells, 0, {"--x": "1"}, resume=False)
    with pytest.raises(RefusedError, match=r"--x must be what the run began with, 1; got 2"):
        collect(tmp_path / "blocks", cells, 0, {"--x": "2"}, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_measured_nothing_leaves_its_folder_free(resume, tmp_path, capsys):
    def stop(keys):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "blocks", [Cell("a", 1, 1, stop)], 0, {"--x": "1"}, resume=False)
    cells = [Cell("a", 1, 1, uniform([]))]
    found = collect(tmp_path / "blocks", cells, 0, {"--x": "2"}, resume=resume)
    assert ("nothing to resume" in capsys.readouterr().out) == resume
    again = collect(tmp_path / "blocks", cells, 0, {"--x": "2"}, resume=True)
    np.testing.assert_array_equal(again["a"]["value"], found["a"]["value"])


@pytest.mark.parametrize("name", ["identity.json", "a-000-001.json"])
@pytest.mark.parametrize("text", ['{"value": [1.', "[]", "{}"])
def test_damaged_files_are_named(name, text, tmp_path):
    cells = [Cell("a", 1, 1, uniform([]))]
    collect(tmp_path / "blocks", cells, 0, {"--x": "1"}, resume=False)
    (tmp_path / "blocks" / name).write_text(text)
    advice = "choose another --out" if name == "identity.json" else "delete it to go on without it"
    expected = f"{name} is damaged: {advice}"
    if (name, text) == ("identity.json", "{}"):
        expected = "--x must be"
    with pytest.raises(RefusedError, match=expected):
        collect(tmp_path / "blocks", cells, 0, {"--x": "1"}, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_results_of_an_unknown_run_are_not_used(resume, tmp_path):
    cells = [Cell("a", 1, 1, uniform([]))]
    collect(tmp_path / "blocks", cells, 0, {"--x": "1"}, resume=False)
    (tmp_path / "blocks" / "identity.json").unlink()
    with pytest.raises(RefusedError, match="results of an unknown run: choose another --out"):
        collect(tmp_path / "blocks", cells, 0, {"--x": "2"}, resume=resume)


def test_what_is_not_finite_is_not_written(tmp_path):
    cells = [Cell("a", 1, 1, lambda keys: {"value": jax.numpy.full(1, np.nan)})]
    with pytest.raises(EndedError, match="value of a is not finite"):
        collect(tmp_path / "blocks", cells, 0, {}, resume=False)
    assert not list((tmp_path / "blocks").glob("a-*"))


def test_a_killed_run_goes_on(tmp_path):
    killed = tmp_path / "killed"
    process = forks().Process(target=stay_in_the_third_block, args=(killed,), daemon=True)
    process.start()
    while process.is_alive() and len(list(killed.glob("a-*.json"))) < 2:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = {one.name: one.stat().st_mtime_ns for one in killed.glob("a-*.json")}
    assert len(kept) == 2
    calls = []
    cells = [Cell("a", 6, 1, uniform(calls))]
    resumed = collect(killed, cells, 3, {}, resume=True)
    assert len(calls) == 4
    whole = collect(tmp_path / "whole", cells, 3, {}, resume=False)
    assert len(whole["a"]["value"]) == 6
    np.testing.assert_array_equal(resumed["a"]["value"], whole["a"]["value"])
    assert all((killed / name).stat().st_mtime_ns == when for name, when in kept.items())


def stored(docs, name):
    """The summary that the page's section was made of."""
    return json.loads((docs / "studies" / f"{name}.json").read_text())


def section(text, name):
    """What stands between the marks of a study."""
    found = pattern(name).search(text)
    return found[1] if found else ""


@pytest.mark.parametrize("name", RENDERED)
def test_the_page_is_what_the_stored_summary_says(name):
    text = (DOCS / "studies.md").read_text()
    assert section(text, name).strip() == RENDERED[name](stored(DOCS, name)).strip() != ""
    assert f"(studies/{name}.png)" in text
    assert (DOCS / "studies" / f"{name}.png").exists()


def test_a_study_writes_its_section(tmp_path):
    from moejax.plot import new_figure

    (tmp_path / "studies.md").write_text("# Page\n\n<!-- x -->\nold\n<!-- /x -->\n\nend\n")
    figure, _ = new_figure(width=1, height=1)
    publish(tmp_path, "x", {"mean": 2.0}, figure, lambda one: f"mean {one['mean']}\n")
    text = (tmp_path / "studies.md").read_text()
    assert text == "# Page\n\n<!-- x -->\n\nmean 2.0\n\n<!-- /x -->\n\nend\n"
    assert section(text, "x") == "mean 2.0\n"
    assert stored(tmp_path, "x") == {"mean": 2.0}
    assert (tmp_path / "studies" / "x.png").exists()
    check_page(tmp_path, "x")
    with pytest.raises(RefusedError, match="must have the lines <!-- y -->"):
        check_page(tmp_path, "y")


def test_results_of_a_sample_bear_its_notice_and_are_not_published(tmp_path, capsys, monkeypatch):
    from moejax.plot import new_figure

    sample = Dataset("mnist-sample", None, None, "a package", notice="A SAMPLE OF MNIST")
    monkeypatch.setattr(images, "loaded", lambda folder: sample)
    study = Study(
        "x",
        add_options=lambda parser: None,
        cells=lambda args: [Cell("a", 1, 1, uniform([]))],
        summarize=lambda measured: {},
        render=lambda summary: "a table",
        draw=lambda summary, measured: new_figure(width=1, height=1)[0],
    )
    args = argparse.Namespace(out=tmp_path, seed=0, resume=False, docs=None, data_dir=None)
    work(study, args)
    assert capsys.readouterr().out.endswith("\nA SAMPLE OF MNIST\n")
    published = argparse.Namespace(out=tmp_path / "new", docs=tmp_path, data_dir=None)
    with pytest.raises(RefusedError, match="--docs needs all images of MNIST, got a sample"):
        work(study, published)
    assert not (tmp_path / "new").exists()
    assert images.notice_of(argparse.Namespace(out=tmp_path)) == ""


@pytest.mark.parametrize("name", RENDERED)
def test_help_tells_every_default(name):
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(name).STUDY.add_options(parser)
    untold = [
        action.option_strings
        for action in parser._actions
        if action.default not in (None, False) and "(default: " not in action.help
    ]
    assert not untold


@pytest.mark.parametrize("name", RENDERED)
def test_a_count_that_32_bits_do_not_hold_is_refused(name, capsys):
    parser = OneLineParser(add_help=False)
    importlib.import_module(name).STUDY.add_options(parser)
    counts = [
        action.option_strings[0]
        for action in parser._actions
        if all(isinstance(default, int) for default in np.atleast_1d(action.default).tolist())
    ]
    assert "--seeds" in counts
    for option in counts:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([option, str(10**13)])
        assert ended.value.code == 2
        assert f"argument {option}: must be a whole number from" in capsys.readouterr().err


TOO_LARGE = {
    "clusters": ["--examples"],
    "efficiency": ["--batches"],
    "hierarchy": ["--toy-steps", "--samples", "--iterations", "--steps"],
    "many_tasks": ["--batch-size"],
    "sharpness": ["--steps", "--starts"],
}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, each in TOO_LARGE.items() for option in each]
)
def test_a_size_that_a_machine_cannot_hold_is_refused(name, option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("parts.command_line.machine_memory", lambda: 10**9)
    out = tmp_path / "out"
    message = refusal(name, "--out", str(out), option, str(10**9), capsys=capsys)
    assert message.endswith(f": choose a smaller {option}\n")
    assert not out.exists()


def test_a_table():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_settings_that_are_not_there_are_refused(capsys):
    message = refusal("clusters", "--settings", "5", capsys=capsys)
    assert "must be a whole number from 1 to 4" in message


def test_steps_of_networks_that_are_not_trained_are_refused(tmp_path, capsys):
    options = "--single-seeds 0 --single-steps 5 --out".split()
    message = refusal("clusters", *options, str(tmp_path), capsys=capsys)
    assert "--single-steps does nothing with --single-seeds 0" in message
