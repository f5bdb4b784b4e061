"""The language model: its text, its cache, its runs and what it refuses."""

import json
import shutil
import signal
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import params_of
from commands import die_after, draw_nothing, refusal, run, start_fork
from data.kinds import KINDS, kinds_of
from data.text import CHARACTERS, UNKNOWN, decode, encode, from_files, standard_library
from language.contenders import CONTENDERS, Mixture, count
from language.figures import curves
from language.page import page
from language.report import add_times, claim, print_table
from language.runs import Plan, Run, check_finite, note_nothing_to_resume
from language.sampling import sample
from language.training import batch_at
from language.transformer import Sizes
from moejax import checkpoint
from moejax.training import init_state
from parts.ending import EndedError
from parts.records import versions
from parts.resume import note_other_versions

SIZES = Sizes(vocabulary=UNKNOWN + 1, width=16, layers=2, heads=2, context=12)
MIXTURE = Mixture(num_experts=4, k=2, hidden=8)
pytestmark = pytest.mark.usefixtures("standard_promotion")

TINY = "--width 16 --heads 2 --context 16 --experts 4 --hidden 8 --layers 1 --sample-length 20"
TRAINING = "--steps 6 --evaluate-every 3 --batch-size 4 --windows 64 --seeds 2"
SHORT = [*TINY.split(), *TRAINING.split()]


@cache
def contender(name):
    """One for all tests, so that they share what is compiled of it."""
    return CONTENDERS[name](SIZES, MIXTURE, None)


def source(number):
    return "".join(f"def f{number}_{i}(x):\n    return x + {i}  # add\n" for i in range(60))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Thirty files, of which some are for validation."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        (folder / f"{number}.py").write_text(source(number))
    return sorted(folder.glob("*.py"))


def test_every_character_comes_back():
    assert decode(encode(CHARACTERS)) == CHARACTERS
    assert encode("é€").tolist() == [UNKNOWN, UNKNOWN]


def test_no_file_is_on_both_sides(files):
    text = from_files(files, "files")
    sides = [decode(side) for side in (text.train, text.validation)]
    for number in range(30):
        marker = f"def f{number}_"
        assert sum(marker in side for side in sides) == 1
    assert all(sides)
    assert len(text.kinds) == len(text.validation)


def test_copies_of_a_file_are_on_one_side(files, tmp_path):
    copies = [tmp_path / f"copy{number}.py" for number in range(30)]
    for original, copy in zip(files, copies, strict=True):
        shutil.copy(original, copy)
    text = from_files([*files, *copies], "files")
    sides = [decode(side) for side in (text.train, text.validation)]
    assert sorted(side.count("def f3_0(") for side in sides) == [0, 2]


def test_the_standard_library_is_there():
    text = standard_library()
    assert len(text.train) > 10**6
    assert 0.05 < len(text.validation) / len(text.train) < 0.3
    assert set(np.unique(text.kinds)) == set(range(len(KINDS)))


def test_kinds():
    code = 'if x1:\n    y = "if"  # else\n'
    expected = (
        ["keyword"] * 2
        + ["space", "letter", "digit", "punctuation", "newline"]
        + ["indentation"] * 4
        + ["letter", "space", "punctuation", "space"]
        + ["string"] * 4
        + ["space"] * 2
        + ["comment"] * 6
        + ["newline"]
    )
    assert [KINDS[kind] for kind in kinds_of(code)] == expected
    assert [KINDS[kind] for kind in kinds_of("it's")] == [*["letter"] * 2, "punctuation", "letter"]


@pytest.mark.parametrize("name", CONTENDERS)
def test_the_cache_changes_nothing(name):
    network = contender(name)
    params = params_of(network)
    tokens = np.random.default_rng(0).integers(SIZES.vocabulary, size=(2, SIZES.context))
    expected, decisions = jax.device_get(jax.jit(network.apply)(params, tokens))
    step = jax.jit(lambda params, token, cache: network.module(params).step(token, cache))
    cache = network.module(params).empty_cache(2)
    for place in range(SIZES.context):
        logits, now, cache = step(params, tokens[:, place], cache)
        np.testing.assert_allclose(logits, expected[:, place], rtol=1e-4, atol=1e-4)
        if name == "sparse":
            before = decisions[1].experts.reshape(2, SIZES.context, -1)[:, place]
            np.testing.assert_array_equal(now[1].experts, before)


def test_no_character_sees_those_after_it():
    network = contender("sparse")
    tokens = np.zeros((2, SIZES.context), int)
    tokens[1, 7] = 5
    before, after = np.asarray(jax.jit(network.apply)(params_of(network), tokens)[0])
    np.testing.assert_array_equal(before[:7], after[:7])
    assert not np.array_equal(before[7:], after[7:])


def test_the_contenders_are_of_equal_size():
    active, total = {}, {}
    for name, make in CONTENDERS.items():
        active[name], total[name] = count(make(SIZES, MIXTURE, None))
    router = SIZES.layers * SIZES.width * MIXTURE.num_experts
    assert active["sparse"] == active["dense"] + router
    assert total["sparse"] == total["dense_total"] + router
    assert active["dense"] == total["dense"]


def test_batches_are_a_function_of_the_step():
    import optax

    state = init_state({}, optax.sgd(0.1), jax.random.key(0))
    text = jnp.asarray(np.arange(200, dtype=np.uint8))
    take = jax.jit(lambda step: batch_at(text, state._replace(step=step), 4, SIZES.context))
    batch = np.asarray(take(0))
    np.testing.assert_array_equal(batch, take(0))
    assert not np.array_equal(batch, take(1))
    np.testing.assert_array_equal(batch[:, 1:], batch[:, :-1] + 1)


def test_a_sample_begins_with_its_prompt():
    network = contender("sparse")
    one = sample(network, params_of(network), jnp.asarray(encode("def ")), 30, 0.7)
    assert decode(one.characters).startswith("def ")
    assert one.experts.shape == (SIZES.layers, 30)
    html = page({"sparse": (one.characters, one.experts), "dense": (encode("<a>"), None)})
    assert html.count("<h3>layer") == SIZES.layers
    assert "&lt;a&gt;" in html
    assert "http" not in html


@pytest.fixture
def without_samples(monkeypatch):
    """Runs write and draw no samples, where a test looks at losses only."""
    for target in ("language.sampling.sample", "language.drawing.draw"):
        monkeypatch.setattr(target, draw_nothing)


def summary(out):
    return json.loads((out / "summary.json").read_text())["models"]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The folder of a run of all contenders."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run("language_model", *SHORT, "--text", *map(str, files), "--out", str(out))
    return out


def test_it_reports(whole):
    models = summary(whole)
    assert set(models) == {"dense", "sparse", "dense_total"}
    for one in models.values():
        assert len(one["validation_loss"]) == 2
        assert one["active_parameters"] <= one["total_parameters"]
        assert one["seconds_per_step"] > 0
        assert one["tokens_per_second"] > 0
    assert np.shape(models["sparse"]["dead_experts"]) == (2, 1)  # seeds, layers
    pictures = ["curves.png", "samples.html"]
    pictures += [f"sparse/{name}.png" for name in ("balance", "kinds", "text")]
    assert all((whole / name).stat().st_size > 1000 for name in pictures)


def test_it_resumes(whole, files, tmp_path, capsys, without_samples):
    # As if it had been killed in the middle: one run half done, those after it not begun.
    out = tmp_path / "half"
    shutil.copytree(whole, out)
    checkpoint.discard(out / "sparse" / "seed-0" / "checkpoints", after=3)
    shutil.rmtree(out / "sparse" / "seed-1")
    shutil.rmtree(out / "dense_total")
    (out / "summary.json").unlink()
    arguments = [*SHORT, "--text", *map(str, files), "--out", str(out)]
    again = refusal("language_model", *arguments, capsys=capsys)
    assert "go on with it by --resume" in again
    run("language_model", *arguments, "--resume")
    assert "sparse, seed 0: resumed after step 3" in capsys.readouterr().out
    for name, one in summary(whole).items():
        assert summary(out)[name]["validation_loss"] == one["validation_loss"], name


def test_all_runs_are_checked_before_one_begins(whole, files, tmp_path, capsys):
    shutil.copytree(whole / "sparse", tmp_path / "sparse")
    arguments = [*SHORT, "--text", *map(str, files), "--out", str(tmp_path), "--resume"]
    message = refusal("language_model", *arguments, "--learning-rate=1", capsys=capsys)
    assert "--learning-rate must be what the run began with, 0.01; got 1.0" in message
    assert not (tmp_path / "dense").exists()


def test_it_writes_on_by_a_network_that_was_trained(whole, capsys):
    options = [*TINY.split(), "--out", str(whole), "--model=sparse"]
    run("language_model", *options, "--sample=try:")
    written = capsys.readouterr().out
    assert "characters per second" in written
    assert "try:" in written
    message = refusal("language_model", *options, "--heads=4", "--sample=def", capsys=capsys)
    assert "--heads must be what the run began with, 2; got 4" in message


def test_killed_it_goes_on_to_the_same_end(whole, files, tmp_path, without_samples):
    out, log = tmp_path / "killed", tmp_path / "killed.log"
    last = f"{'sparse':<12} {0:>4} {6:>7}"  # how the line of its last evaluation begins
    options = ["--model=sparse", "--seeds=1", "--text", *map(str, files), "--out", str(out)]
    process = start_fork(
        "language_model",
        *(*SHORT, *options),
        log=log,
        programs=tmp_path / "programs",
        replaced={"language.runs.say": partial(die_after, last)},
    )
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert not (out / "sparse" / "seed-0" / "metrics.jsonl").exists()  # it had not ended
    begun = checkpoint.latest(out / "sparse" / "seed-0" / "checkpoints")
    assert begun in (3, 6)  # the second was being written
    run("language_model", *SHORT, *options, "--resume")
    ends = [summary(folder)["sparse"]["validation_loss"][0] for folder in (whole, out)]
    assert ends[0] == ends[1]


def test_one_rule_on_a_mesh(files, tmp_path, without_samples):
    arguments = [*SHORT, "--text", *map(str, files), "--model=switch", "--seeds=1"]
    losses = []
    for mesh in ([], ["--mesh=data=2,expert=4"]):
        out = tmp_path / str(len(mesh))
        run("language_model", *arguments, "--out", str(out), *mesh)
        losses.append(summary(out)["switch"]["validation_loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model=expert-choice"], "depend on the tokens after it"),
        (["--model=soft-moe"], "depend on the tokens after it"),
        (["--model=sinkhorn"], "depend on the tokens after it"),
        (["--model=gpt"], "must be all or one of dense, sparse"),
        (["--width=30"], "even multiple of --heads"),
        (["--top-k=9"], "at most --experts"),
        (["--model=switch", "--top-k=2"], "--top-k does nothing with --model switch"),
        (["--model=dense_total", "--top-k=2"], "--top-k does nothing with --model dense_total"),
        (["--model=dense", "--experts=4"], "--experts does nothing with --model dense"),
        (["--windows=100"], "--windows must be a multiple of 64"),
        (["--steps=3000000000"], "from 1 to 1000000000"),
        (["--model=sparse", "--top-k=1"], "the router gets exactly zero gradient"),
        (
            ["--model=sparse", "--experts=6", "--mesh=data=2,expert=4", "--text", __file__],
            "a multiple of the 4 devices",
        ),
        (["--out", "s3://bucket/run"], "must be a folder on this machine, got s3://bucket/run"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--sample=x"], "Train dense first"),
        (["--sample=x", "--text", __file__], "--text does nothing with --sample"),
        (["--sample=x", "--resume"], "--resume does nothing with --sample"),
        (["--sample=x", "--mesh=expert=8"], "--mesh does nothing with --sample"),
        (["--sample=x", "--seeds=3"], "--seeds does nothing with --sample"),
        (["--sample=x", "--windows=64"], "--windows does nothing with --sample"),
        (["--sample=x", "--steps=7"], "--steps does nothing with --sample"),
        (["--sample=x", "--evaluate-every=3"], "--evaluate-every does nothing with --sample"),
        (["--sample=x", "--batch-size=5"], "--batch-size does nothing with --sample"),
        (["--sample=x", "--learning-rate=3"], "--learning-rate does nothing with --sample"),
        (["--model=dense", "--mesh=expert=8"], "--mesh does nothing with --model dense"),
        (["--model=dense_total", "--mesh=expert=8"], "--mesh does nothing with --model dense_"),
        (["--sample=def", "--sample-length=3"], "must be more than the 3 characters of --sample"),
        (["--sample-length=3000000000"], "must be a whole number from 1 to 1000000, got"),
        (["--width=1000000"], "choose a smaller --width, --layers, --experts, --hidden"),
        (["--layers=100000000"], "this run would take"),
        (["--hidden=1000000000"], "this run would take"),
        (["--model=dense", "--top-k=100000000"], "this run would take"),
        (["--model=switch", "--experts=1000000000"], "this run would take"),
        (["--context=1000000"], "this run would take"),
        (["--batch-size=100000000"], "this run would take"),
        (["--seeds=1000000000"], "this run would take"),
        (["--mesh=data=2,expert=4", "--batch-size=3", "--context=3"], "multiple of the 8 devices"),
    ],
)
def test_refusals(arguments, words, tmp_path, capsys):
    options = ["--layers=1", "--out", str(tmp_path)]
    error = refusal("language_model", *options, *arguments, capsys=capsys)
    assert words in error


@pytest.mark.parametrize("sample", [[], ["--sample=def"]])
def test_a_folder_that_is_not_utf8_is_refused(sample, tmp_path, capsys):
    out = tmp_path / "Fr\udcc3\udca4ulein"  # as an ASCII locale reads an a with two dots
    message = refusal("language_model", "--out", str(out), *sample, capsys=capsys)
    assert "set PYTHONUTF8=1, or choose another --out" in message
    assert not out.exists()


def test_a_short_text_is_refused(tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    arguments = ["--out", str(tmp_path), "--text", str(path)]
    assert "at least 1,000 characters" in refusal("language_model", *arguments, capsys=capsys)


def test_every_model_reaches_the_worst_of_the_final_losses():
    """Whatever the order in which a mean is taken: it differs in the last bit."""
    draws = np.random.default_rng(0)
    for _ in range(50):
        runs = [
            Run([{"step": 1, "seconds": 1.0, "validation_loss": loss}], {}, None)
            for loss in draws.normal(size=12)
        ]
        summaries = {"dense": {}}
        add_times(summaries, {"dense": runs})
        assert summaries["dense"]["steps_to_equal_loss"] == 1


@pytest.mark.parametrize(("count", "cut"), [(1, 0), (3, 0), (7, 0), (16, 2)])
def test_every_loss_but_the_first_of_many_is_in_the_picture(count, cut):
    losses = [5.0, *np.linspace(4, 2, count)][:count]
    history = [
        {"step": 10 * place, "seconds": float(place), "validation_loss": loss}
        for place, loss in enumerate(losses, 1)
    ]
    for axes in curves({"sparse": [Run(history, {}, None)] * 2}).axes:
        (line,) = axes.lines
        assert line.get_marker() == "."  # one record makes no line
        low, high = axes.get_ylim()
        shown = [low < loss <= high for loss in losses]
        assert shown == [False] * cut + [True] * (count - cut)


def test_a_loss_that_is_not_finite_ends_the_run(files, tmp_path, capsys):
    rates = ["--learning-rate", "1e30", "--model", "dense_total", "--no-cache"]
    options = [*SHORT, *rates, "--text", *map(str, files), "--out", str(tmp_path / "out")]
    message = refusal("language_model", *options, capsys=capsys, code=1)
    assert "the loss of dense_total, seed 0, is not finite by step" in message


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path):
    plan = Plan("sparse", 0, tmp_path, 6, 3, {})
    check_finite(plan, 3, np.float32(1), np.float32(2))
    with pytest.raises(EndedError, match="the loss of sparse, seed 0, is not finite by step 3"):
        check_finite(plan, 3, np.float32(1), np.float32("nan"))


def test_it_says_if_there_is_nothing_to_resume(tmp_path, capsys):
    note_nothing_to_resume([Plan("sparse", 0, tmp_path / "none", 6, 3, {})], tmp_path)
    assert capsys.readouterr().out.startswith(f"nothing to resume in {tmp_path}: starting from")


def test_it_says_if_other_versions_wrote_the_checkpoint(capsys):
    note_other_versions({"versions": versions()})
    assert capsys.readouterr().out == ""
    note_other_versions({"versions": versions() | {"jax": "0.0"}})
    assert capsys.readouterr().out.startswith("other versions or another machine wrote")


def test_kinds_do_not_depend_on_where_a_file_is_cut(tmp_path):
    path = tmp_path / "one.py"
    path.write_text(source(0) + 'LAST = """' + "words in a string, " * 800 + '"""\n')
    text = from_files([path], "one")
    whole = kinds_of(path.read_text())
    np.testing.assert_array_equal(text.kinds, whole[-len(text.kinds) :])
    assert (text.kinds == KINDS.index("string")).mean() > 0.9


def test_an_f_string_is_a_string():
    kinds = kinds_of('x = f"total of all"\n')
    assert {KINDS[kind] for kind in kinds[4:-1]} == {"string"}


def test_the_claim_needs_three_standard_deviations():
    def models(sparse, spread):
        one = {"validation_loss": [0, 0, 0], "validation_loss_std": spread}
        return {
            "dense": one | {"validation_loss_mean": 1.60},
            "sparse": one | {"validation_loss_mean": sparse},
        }

    assert claim(models(1.50, 0.03)).startswith("sparse beats dense")
    assert "NOT" in claim(models(1.50, 0.04))
    assert "NOT" in claim(models(1.61, 0.0))


def test_one_seed_has_no_standard_deviation(capsys):
    parameters = dict.fromkeys(("active_parameters", "total_parameters"), 1000)
    rates = dict.fromkeys(("seconds_per_step", "tokens_per_second"), 1.0)
    times = {"steps_to_equal_loss": 3, "seconds_to_equal_loss": 1.0}
    loss = {"validation_loss": [1.5], "validation_loss_mean": 1.5, "validation_loss_std": None}
    one = parameters | rates | times | loss
    print_table({"dense": one, "sparse": one})
    assert capsys.readouterr().out.count("1.5000 +- -     ") == 2
    assert claim({"dense": one, "sparse": one}).endswith("; one seed shows no difference")
