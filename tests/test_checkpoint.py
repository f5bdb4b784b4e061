"""What is restored is bit by bit what was saved, or it is refused by name."""

import asyncio
import logging
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from disk import file_size_limit
from moejax import checkpoint
from moejax.training import init_state


def train_state(seed=0, width=3):
    params = {"experts": [{"kernel": jax.random.normal(jax.random.key(seed), (width, 4))}]}
    return init_state(params, optax.adam(1e-3), jax.random.key(seed, impl="threefry2x32"))


def assorted(seed=0):
    """One leaf of every kind, beside the state of a run."""
    normal = jax.random.normal(jax.random.key(seed), (5,))
    return {
        "run": train_state(seed),
        "router": {"bias": normal.astype(jnp.bfloat16), "load": jnp.arange(4, dtype=jnp.uint8)},
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "legacy_key": jax.random.PRNGKey(seed),
        "flags": normal > 0,
        "complex": jax.lax.complex(normal, -normal),
        "float8": normal.astype(jnp.float8_e4m3fn),
        "nan": jnp.array([jnp.nan, -jnp.nan, jnp.inf, -0.0]),
        "empty": jnp.zeros((0, 3)),
        "host": np.arange(3, dtype=np.float64),
        "a.b/c d": jnp.ones(()),
    }


def bits(tree):
    def of(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
        return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()

    return jax.tree.map(of, tree)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with checkpoints 10 and 20, and the state of each."""
    folder, states = tmp_path_factory.mktemp("written"), {10: train_state(1), 20: train_state(2)}
    with checkpoint.writer(folder) as save:
        for step, state in states.items():
            save(state, step=step, config={"learning_rate": 0.1})
    return folder, states


@pytest.fixture
def two(written, tmp_path):
    """A copy of that folder, to do anything with."""
    folder, states = written
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path, states


@pytest.mark.parametrize("abstract", [False, True])
def test_every_leaf_returns_bit_by_bit(tmp_path, abstract):
    state, like = assorted(0), assorted(1)
    checkpoint.save(tmp_path, state, step=3, config={"seed": 0, "rates": [0.1, None]})
    if abstract:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        like["host"] = np.zeros(3)  # float64 outside of numpy would need x64
    restored = checkpoint.restore(tmp_path, like)
    assert restored.step == 3
    assert restored.config == {"seed": 0, "rates": [0.1, None]}
    assert restored.versions["jax"] == jax.__version__
    assert restored.versions["python"].split(".")[0] == "3"
    assert bits(restored.state) == bits(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)


ORDERED = ["f2", "f4", "f8", "i2", "u4", "i8", "c8", "c16"]
BYTES = ["?", "i1", "u1", "bfloat16", "int4", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]


@pytest.mark.parametrize("dtype", [*(f">{name}" for name in ORDERED), *ORDERED, *BYTES])
def test_every_dtype_and_layout_of_numpy(tmp_path, dtype):
    grid = np.arange(12.0).reshape(3, 4).astype(np.dtype(dtype))
    state = {
        "rows": grid,
        "fortran": np.asfortranarray(grid),
        "strided": grid[::2, ::-1],
        "transposed": grid.T,
        "broadcast": np.broadcast_to(grid[:1], (3, 4)),
        "scalar": grid[1, 1],
        "zero-dimensional": grid[1, 1].reshape(()),
        "empty": grid[:0],
    }
    checkpoint.save(tmp_path, state, step=1)
    restored = checkpoint.restore(tmp_path, jax.tree.map(np.zeros_like, state)).state
    assert bits(restored) == bits(state)


def test_the_order_of_bytes_is_that_of_like(tmp_path):
    checkpoint.save(tmp_path, {"x": np.array([1, 2], ">f4")}, step=1)
    for like in (np.zeros(2, "<f4"), np.zeros(2, ">f4"), jnp.zeros(2)):
        restored = checkpoint.restore(tmp_path, {"x": like}).state["x"]
        assert restored.dtype == like.dtype
        np.testing.assert_array_equal(restored, [1, 2])


@pytest.mark.parametrize("dtype", [np.longdouble, "U3", "M8[s]", object, "V2", "uint4"])
def test_a_dtype_that_cannot_be_stored_names_the_leaf(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"of a dtype that JAX has, but `a\.names` is"):
        checkpoint.save(tmp_path, {"a": {"names": np.zeros(2, dtype)}}, step=1)


@pytest.mark.parametrize("path", ["~/run", "file://{home}/run", "file:{home}/a%20run"])
def test_a_folder_by_its_other_names(tmp_path, monkeypatch, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = path.format(home=tmp_path)
    checkpoint.save(folder, {"x": jnp.ones(2)}, step=1)
    checkpoint.save(folder, {"x": jnp.ones(2)}, step=2)
    name = "a run" if "%20" in path else "run"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert sorted(entry.name for entry in (tmp_path / name).iterdir()) == ["1", "2"]
    assert checkpoint.restore(folder, {"x": jnp.zeros(2)}).step == 2
    checkpoint.discard(folder, after=1)
    assert checkpoint.latest(folder) == 1


ADDRESSES = ["s3://bucket/run", "gs://bucket", "file://host/run", Path("s3://bucket/run")]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_elsewhere_is_refused_by_name(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    uses = [
        lambda: checkpoint.save(address, jnp.ones(1), step=1),
        lambda: checkpoint.restore(address, jnp.ones(1)),
        lambda: checkpoint.latest(address),
        lambda: checkpoint.discard(address, after=0),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=f"on this machine.*got {address}"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_not_utf8_is_refused_by_name(two, tmp_path):
    folder, states = two
    other = tmp_path / "Fr\udcc3\udca4ulein"  # as an ASCII locale reads an a with two dots
    uses = [
        lambda: checkpoint.save(other, states[10], step=30),
        lambda: checkpoint.restore(other, states[10]),
        lambda: checkpoint.read_config(other),
    ]
    for moved in (lambda: None, lambda: shutil.copytree(folder, other)):
        moved()
        for use in uses:
            with pytest.raises(ValueError, match=r"must be one in UTF-8.*set PYTHONUTF8=1"):
                use()
    assert checkpoint.latest(other) == 20


def test_entries_of_others_are_left_alone(two):
    folder, states = two
    (folder / "30").write_text("notes")
    (folder / "notes.orbax-checkpoint-tmp").write_text("notes")
    for name in ("00000040", "\N{ARABIC-INDIC DIGIT FIVE}0", "best"):
        shutil.copytree(folder / "20", folder / name)
    assert checkpoint.latest(folder) == 20
    assert checkpoint.restore(folder, states[10]).step == 20
    checkpoint.save(folder, states[10], step=25, keep=1)
    left = {"25", "30", "notes.orbax-checkpoint-tmp", "00000040", "\N{ARABIC-INDIC DIGIT FIVE}0"}
    assert {path.name for path in folder.iterdir()} == left | {"best"}


def test_state_of_one_array(tmp_path):
    checkpoint.save(tmp_path, jnp.arange(3), step=0)
    assert checkpoint.restore(tmp_path, jnp.zeros(3, jnp.int32)).state.tolist() == [0, 1, 2]


def test_latest_and_pruning(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    with checkpoint.writer(tmp_path, keep=2) as save:
        for step in (5, 10, 15, 100):
            save(train_state(step), step=step)
    assert checkpoint.latest(tmp_path) == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "15"]
    assert checkpoint.read_config(tmp_path, step=15) == {}
    older = checkpoint.restore(tmp_path, train_state(), step=15)
    assert older.step == 15
    assert bits(older.state) == bits(train_state(15))


def test_three_are_kept_by_default(tmp_path):
    with checkpoint.writer(tmp_path) as save:
        for step in range(4):
            save(jnp.ones(1), step=step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]
    checkpoint.save(tmp_path, jnp.ones(1), step=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_keep_all(tmp_path):
    with checkpoint.writer(tmp_path, keep=None) as save:
        for step in range(5):
            save(jnp.ones(1), step=step)
    assert len(list(tmp_path.iterdir())) == 5


def test_missing_checkpoint(tmp_path, two):
    with pytest.raises(ValueError, match=r"There must be a checkpoint in .*it has none"):
        checkpoint.restore(tmp_path / "none", train_state())
    with pytest.raises(ValueError, match=r"of step 15 in .*it has \[10, 20\]"):
        checkpoint.restore(tmp_path, train_state(), step=15)


def test_a_renamed_folder_is_told_its_step(two):
    folder, states = two
    shutil.rmtree(folder / "20")
    (folder / "10").rename(folder / "20")
    with pytest.raises(
        ValueError, match=r"Checkpoint 20 .* it is of step 10, so rename its folder"
    ):
        checkpoint.restore(folder, states[10])
    with pytest.raises(ValueError, match="it is of step 10"):
        checkpoint.read_config(folder)
    (folder / "20").rename(folder / "10")
    assert checkpoint.restore(folder, states[10]).step == 10


@pytest.mark.parametrize("read", [checkpoint.restore, lambda folder, like, step:
                                  checkpoint.read_config(folder, step=step)])  # fmt: skip
@pytest.mark.parametrize("step", [10.0, np.float32(10), jnp.ones(2), "10", -1, -10])
def test_a_step_that_no_checkpoint_has_is_refused(two, step, read):
    folder, states = two
    with pytest.raises(ValueError, match=re.escape(f"integer of at least 0, got {step!r}.")):
        read(folder, states[10], step=step)


@pytest.mark.parametrize("step", [np.int64(10), jnp.array(10, jnp.int32), np.array(10, np.uint8)])
def test_the_step_to_read_may_be_a_scalar_array(two, step):
    folder, states = two
    assert checkpoint.restore(folder, states[10], step=step).step == 10
    assert checkpoint.read_config(folder, step=step) == {"learning_rate": 0.1}


def test_steps_only_grow(two):
    folder, states = two
    with (
        pytest.raises(ValueError, match=r"`step` must be larger .*\(20\), got 20"),
        checkpoint.writer(folder) as save,
    ):
        save(states[10], step=20)
    checkpoint.discard(folder, after=10)
    assert checkpoint.latest(folder) == 10
    checkpoint.save(folder, states[10], step=15)
    assert checkpoint.latest(folder) == 15


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


def refused(folder, states):
    """Whether checkpoint 20 is refused, naming the one before it; else it must be intact."""
    try:
        restored = checkpoint.restore(folder, states[10])
    except ValueError as error:
        damaged, offer = (
            f"Checkpoint 20 in {folder} is damaged: ",
            "The one before it is intact: step 10.",
        )
        return str(error).startswith(damaged) and str(error).endswith(offer)
    assert restored.step == 20
    assert restored.config == {"learning_rate": 0.1}
    assert bits(restored.state) == bits(states[20])
    return False


def test_flipped_bits_are_refused(two, tmp_path_factory):
    folder, states = two
    whole = tmp_path_factory.mktemp("whole") / "20"
    shutil.copytree(folder / "20", whole)
    draw, essential = random.Random(0), []
    for path in files(whole):
        target = folder / "20" / path.relative_to(whole)
        flips = 0
        for _ in range(4):
            flip(target, draw.randrange(target.stat().st_size))
            flips += refused(folder, states)
            shutil.copy(path, target)
        if flips == 4:
            essential.append(str(path.relative_to(whole)))
    assert not refused(folder, states)
    # Some of orbax's own files hold more than is needed; these do not.
    assert {"manifest/metadata", "state/manifest.ocdbt"} <= set(essential)


def test_flipped_bit_in_an_array_names_the_leaf(tmp_path):
    state = {"kernel": jax.random.normal(jax.random.key(0), (100, 100))}
    checkpoint.save(tmp_path, state, step=1)
    largest = max(files(tmp_path), key=lambda path: path.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    message = r"damaged: leaf `kernel` differs from its SHA-256. There is no intact one before it"
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, state)


@pytest.mark.parametrize("damage", ["missing", "half", "empty"])
def test_half_written_is_refused(two, tmp_path_factory, damage):
    folder, states = two
    whole = tmp_path_factory.mktemp("whole") / "20"
    shutil.copytree(folder / "20", whole)
    essential = []
    for path in files(whole):
        target = folder / "20" / path.relative_to(whole)
        if damage == "missing":
            target.unlink()
        else:
            os.truncate(target, target.stat().st_size // 2 if damage == "half" else 0)
        if refused(folder, states):
            essential.append(str(path.relative_to(whole)))
        shutil.copy(path, target)
    assert {"manifest/metadata", "state/manifest.ocdbt"} <= set(essential)
    (folder / "10" / "manifest" / "metadata").unlink()
    (folder / "20" / "manifest" / "metadata").unlink()
    with pytest.raises(ValueError, match=r"Checkpoint 20 .* There is no intact one before it"):
        checkpoint.restore(folder, states[10])


def test_remains_of_a_killed_save_are_ignored_then_deleted(two):
    folder, states = two
    remains = [folder / f"{step}.orbax-checkpoint-tmp" for step in (25, 30)]
    for unfinished in remains:
        shutil.copytree(folder / "20", unfinished)
    assert checkpoint.latest(folder) == 20
    assert checkpoint.restore(folder, states[10]).step == 20
    checkpoint.save(folder, states[10], step=30)
    assert not any(unfinished.exists() for unfinished in remains)
    assert bits(checkpoint.restore(folder, states[10]).state) == bits(states[10])


def test_half_deleted_checkpoints_are_pruned(two):
    folder, states = two
    for path in files(folder / "10")[:2]:
        path.unlink()
    with checkpoint.writer(folder, keep=2) as save:
        save(states[10], step=30)
    assert sorted(path.name for path in folder.iterdir()) == ["20", "30"]


MISFITS = {
    "shape": (
        lambda s: s._replace(params=train_state(width=2).params),
        r"shape of leaf `params.experts.0.kernel` .* \[3, 4\]; got \[2, 4\]",
    ),
    "dtype": (
        lambda s: s._replace(step=s.step.astype(jnp.int16)),
        r"dtype of leaf `step` .* int32; got int16",
    ),
    "key": (
        lambda s: s._replace(key=jax.random.key(0, impl="rbg")),
        r"dtype of leaf `key` .* key<fry>; got key<rbg>",
    ),
    "missing": (
        lambda s: {"params": s.params, "bias": jnp.ones(1)},
        r"lacks `bias` and has `key`, `opt_state.0.count`, `opt_state.0.mu.*, \.\.\. besides",
    ),
    "unknown": (
        lambda s: s._asdict() | {"extra": jnp.ones(1)},
        r"lacks `extra` and has nothing besides",
    ),
    "superfluous": (
        lambda s: {name: value for name, value in s._asdict().items() if name != "step"},
        r"lacks nothing and has `step` besides",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_name_the_leaf(two, name):
    folder, states = two
    change, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(folder, change(states[20]))


@pytest.mark.parametrize("step", [-1, 3.0, np.float32(3), jnp.ones(()), jnp.arange(2), "3", None])
def test_a_checkpoint_that_could_not_be_found_is_not_written(tmp_path, step):
    with pytest.raises(ValueError, match=re.escape(f"integer of at least 0, got {step!r}.")):
        checkpoint.save(tmp_path, {"w": jnp.ones(3)}, step=step)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [np.int64(7), jnp.array(7, jnp.int32), np.array(7, np.uint8)])
def test_the_step_may_be_a_scalar_array(tmp_path, step):
    checkpoint.save(tmp_path, {"w": jnp.ones(3)}, step=step)
    assert checkpoint.latest(tmp_path) == 7
    assert checkpoint.restore(tmp_path, {"w": jnp.zeros(3)}).step == 7


def test_what_cannot_be_saved(tmp_path):
    with checkpoint.writer(tmp_path) as save:
        with pytest.raises(ValueError, match="`rate` is a <class 'float'>"):
            save({"rate": 0.1}, step=1)
        with pytest.raises(ValueError, match=r"two are called `a.b`"):
            save({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, step=1)
        with pytest.raises(ValueError, match="JSON can hold"):
            save(jnp.ones(1), step=1, config={"model": object()})
        with pytest.raises(ValueError, match="at least one array"):
            save({"empty": jnp.ones((0, 2))}, step=1)
        save(jnp.ones(1), step=1)  # the writer goes on
    assert checkpoint.latest(tmp_path) == 1
    with pytest.raises(ValueError, match="`keep` must be an integer of at least 1"):
        checkpoint.save(tmp_path, jnp.ones(1), step=2, keep=0)


def test_background_does_not_see_later_changes(tmp_path):
    step = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    device = jax.random.normal(jax.random.key(0), (1000, 1000))
    host = np.array(device)
    expected = host.copy()
    with checkpoint.writer(tmp_path) as save:
        save({"device": device, "host": host}, step=1)
        jax.block_until_ready(step(device))
        host[:] = 0
    restored = checkpoint.restore(tmp_path, {"device": expected, "host": expected}).state
    np.testing.assert_array_equal(restored["device"], expected)
    np.testing.assert_array_equal(restored["host"], expected)


def test_full_disk_keeps_the_last_good_one(tmp_path):
    others = set(threading.enumerate())
    state = {"w": jax.random.normal(jax.random.key(0), (300, 300))}
    checkpoint.save(tmp_path, state, step=1, keep=1)
    threads = running_threads(others)
    with (
        file_size_limit(100_000),
        pytest.raises(OSError, match=r"newest complete one is 1. The reason: .*too large"),
    ):
        checkpoint.save(tmp_path, state, step=2, keep=1)
    assert running_threads(others) == threads
    assert bits(checkpoint.restore(tmp_path, state).state) == bits(state)
    checkpoint.save(tmp_path, state, step=2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not be written to .*file.*run; the newest .* None"):
        checkpoint.save(tmp_path / "file" / "run", jnp.ones(1), step=1)


def test_error_in_the_body_is_not_masked(tmp_path):
    def failing():
        with checkpoint.writer(tmp_path) as save:
            save(jnp.ones(1), step=1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert checkpoint.latest(tmp_path) == 1


def running_threads(others):
    """Threads beside the others, once those about to end have ended."""
    for thread in set(threading.enumerate()) - others:
        thread.join(timeout=1)
    return set(threading.enumerate()) - others


def process_state(others):
    return {
        "root handlers": list(logging.root.handlers),
        "root level": logging.root.level,
        "absl level": logging.getLogger("absl").level,
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "hooks": (sys.excepthook, threading.excepthook, asyncio.get_event_loop_policy()),
        "threads": running_threads(others),
        "descriptors": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        "environment": dict(os.environ),
        "x64": jax.config.jax_enable_x64,
    }


def test_leaves_no_trace_in_the_process(tmp_path, monkeypatch, capfd):
    others = set(threading.enumerate())
    monkeypatch.setattr(logging.root, "handlers", [])

    def cycle(name):
        checkpoint.save(tmp_path / name, train_state(), step=1)
        return checkpoint.restore(tmp_path / name, train_state())

    cycle("first")  # what is loaded lazily
    before = process_state(others)
    for name in ("second", "third"):
        cycle(name)
    assert process_state(others) == before
    assert logging.root.handlers == []
    assert capfd.readouterr() == ("", "")


def test_configured_logging_is_left_alone(tmp_path):
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    before = list(logging.root.handlers)
    checkpoint.save(tmp_path, jnp.ones(1), step=1)
    assert logging.root.handlers == before
    logging.root.removeHandler(handler)


def test_no_pickle(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    checkpoint.save(tmp_path, assorted(), step=1)
    checkpoint.restore(tmp_path, assorted())


def test_inside_a_running_event_loop(tmp_path):
    before = asyncio.Task, asyncio.run, asyncio.get_event_loop

    async def notebook():
        checkpoint.save(tmp_path, train_state(), step=1)
        return checkpoint.restore(tmp_path, train_state())

    assert asyncio.run(notebook()).step == 1
    assert before == (asyncio.Task, asyncio.run, asyncio.get_event_loop)


def test_the_event_loop_of_the_caller_stays(tmp_path):
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    checkpoint.save(tmp_path, train_state(), step=1)
    checkpoint.restore(tmp_path, train_state())
    assert asyncio.get_event_loop() is loop
    asyncio.set_event_loop(None)
    loop.close()


def test_double_precision(tmp_path, x64):
    state = {"w": jnp.linspace(0.0, 1.0, 7, dtype=jnp.float64)}
    checkpoint.save(tmp_path, state, step=1)
    assert bits(checkpoint.restore(tmp_path, state).state) == bits(state)


@pytest.mark.usefixtures("standard_promotion")
def test_the_code_in_the_documentation_runs(tmp_path, monkeypatch):
    page = Path(__file__).parent.parent / "docs" / "checkpoints.md"
    [code] = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["found"].step == 100
    assert bits(names["found"].state) == bits(names["state"])
    assert sorted(os.listdir("runs/mine/checkpoints")) == ["100", "50", "75"]


def test_restores_onto_other_devices(tmp_path):
    def placed(state, devices):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("expert",))
        return {
            "w": jax.device_put(state["w"], NamedSharding(mesh, PartitionSpec("expert"))),
            "key": jax.device_put(state["key"], NamedSharding(mesh, PartitionSpec())),
        }

    state = {"w": jnp.arange(48.0).reshape(8, 6), "key": jax.random.key(3)}
    checkpoint.save(tmp_path, placed(state, 8), step=1)
    for like in (placed(state, 8), placed(state, 2), state):
        restored = checkpoint.restore(tmp_path, like).state
        assert bits(restored) == bits(state)
        for name in state:
            assert restored[name].sharding == like[name].sharding
            assert restored[name].committed == like[name].committed


def test_saving_after_the_block_is_refused(tmp_path):
    with checkpoint.writer(tmp_path) as save:
        save(jnp.ones(1), step=1)
    with pytest.raises(RuntimeError, match=r"has ended: save inside the `with` block\.$"):
        save(jnp.ones(1), step=2)
    assert checkpoint.latest(tmp_path) == 1


@pytest.mark.parametrize("abstract", [False, True])
def test_the_weak_type_returns(tmp_path, abstract):
    state = {
        "scalar": jnp.asarray(0.1),
        "count": jnp.asarray(3),
        "complex": jnp.asarray(1j),
        "filled": jnp.full((2, 3), -0.0),
        "empty": jnp.full((0, 3), 0.1),
        "strong": jnp.ones(3),
    }
    like = jax.tree.map(jnp.zeros_like, state)
    if abstract:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    checkpoint.save(tmp_path, state, step=1)
    restored = checkpoint.restore(tmp_path, like).state
    assert bits(restored) == bits(state)
    assert {name: leaf.weak_type for name, leaf in restored.items()} == {
        name: name != "strong" for name in state
    }
    assert not restored["scalar"].committed
    with jax.numpy_dtype_promotion("standard"):
        assert (restored["scalar"] * jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_weak_type_does_not_change_the_width(tmp_path):
    checkpoint.save(tmp_path, jnp.asarray(0.1), step=1)
    with jax.enable_x64(True):
        assert checkpoint.restore(tmp_path, jnp.zeros((), jnp.float32)).state.dtype == jnp.float32


def test_numbers_that_jax_would_narrow_are_refused(tmp_path):
    state = {"n": np.array([2**40 + 1]), "w": np.array([1 / 3])}
    checkpoint.save(tmp_path, state, step=1)
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in state.items()}
    with pytest.raises(ValueError, match="holds int64, of which JAX would make int32"):
        checkpoint.restore(tmp_path, like)
    restored = checkpoint.restore(tmp_path, state).state
    assert all(np.array_equal(restored[name], state[name]) for name in state)
    with jax.enable_x64(True):
        assert int(checkpoint.restore(tmp_path, like).state["n"][0]) == 2**40 + 1


@pytest.mark.parametrize("content", ["null", "[]"])
def test_a_manifest_that_is_no_object_is_damaged(tmp_path, content):
    checkpoint.save(tmp_path, jnp.ones(1), step=1)
    (tmp_path / "1" / "manifest" / "metadata").write_text(content)
    with pytest.raises(ValueError, match="not a JSON object"):
        checkpoint.restore(tmp_path, jnp.ones(1))


def test_how_many_to_keep_is_an_integer(tmp_path):
    with (
        pytest.raises(ValueError, match=r"integer of at least 1.*got 2.5"),
        checkpoint.writer(tmp_path, keep=2.5),
    ):
        raise AssertionError


@pytest.mark.parametrize("config", [[], 0, False, ""])
def test_an_empty_configuration_is_kept_as_it_is(tmp_path, config):
    checkpoint.save(tmp_path, jnp.ones(1), step=1, config=config)
    assert checkpoint.read_config(tmp_path) == config
