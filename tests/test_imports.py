"""What `import moejax` costs, and which way modules import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import moejax

PACKAGE = Path(moejax.__file__).parent
LAZY = {"flax", "optax", "orbax", "matplotlib", "tensorflow_datasets", "torch", "PIL", "sklearn"}
ORDER = ["types", "experts", "routing", "losses", "execution"]
ORDER += ["dispatch", "blocks", "capacity", "dropless", "grouped_matmul", "layer"]


def run_afresh(code):
    """Runs a program in an interpreter that has imported nothing yet."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_import_is_light_and_starts_no_backend():
    code = (
        "import sys, moejax\n"
        "from jax._src import xla_bridge\n"
        f"loaded = sorted({LAZY!r} & set(sys.modules))\n"
        "assert not loaded, loaded\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    run_afresh(code)


def test_modules_are_attributes_without_an_import_of_their_own():
    code = (
        "import moejax\n"
        "moejax.adapters.from_linen, moejax.checkpoint.save, moejax.conversion.to_torch\n"
        "moejax.interop.flax, moejax.plot, moejax.sharding.shardings\n"
        "moejax.training.train_step, moejax.weights.load\n"
        "assert not hasattr(moejax, 'nothing_of_that_name')\n"
    )
    run_afresh(code)


def test_naming_the_modules_imports_none():
    code = (
        "import sys, moejax\n"
        "named = {'adapters', 'checkpoint', 'conversion', 'interop'}\n"
        "named |= {'plot', 'sharding', 'training', 'weights'}\n"
        "assert named <= {*dir(moejax)}\n"
        "loaded = [name for name in named if moejax._MODULES[name] in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    run_afresh(code)


def imports(module):
    """Which other modules of the package a module, or a folder of them, imports."""
    path = PACKAGE / module
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[1] for name in names if name.startswith("moejax.")} - {module}


def test_the_core_imports_one_way():
    core = {module: imports(module) for module in ORDER}
    for position, module in enumerate(ORDER):
        later = set(ORDER[position:]) & core[module]
        assert not later, f"{module} imports {later}"


def test_the_core_imports_nothing_outside_it():
    outside = {
        "training",
        "datasets",
        "plot",
        "adapters",
        "checkpoint",
        "conversion",
        "diagnostics",
    }
    for module in ORDER:
        assert not outside & imports(module)
    assert not imports("training") - {"types"}, "training knows only callables"
