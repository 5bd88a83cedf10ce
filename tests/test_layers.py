"""The rooms of the house: imports point down, nothing goes round, and importing the package stays light.

Imports are read from the source, those inside functions included, so that a lazy import hides nothing.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gibbsian

ROOT = Path(gibbsian.__file__).parent

LAYERS = (
    {"typing", "errors", "files", "matmul", "replaying"},
    {"compilation", "processes"},
    {"energies", "kernels", "diagnostics"},
    {"samples", "chain_lanes"},
    {"chain_checks"},
    {"sampling", "buffers", "data"},
    {"short_run", "temperatures"},
    {"objectives", "partition", "adaptation", "annealing", "ladders"},
    {"warmup", "microcanonical_adaptation", "path_adaptation", "detection"},
    {"learned"},
    {"bridges"},
    {"training"},
    {"recipes"},
    {"families"},
    {"building"},
    {"models"},
    {"planning", "estimator", "transformer", "report", "applications", "flow_evaluation"},
    {"molecules", "sequences"},
    {"labelled"},
    {"evaluation", "options", "expressions"},
    {"reporting"},
    {"runs"},
    {"scoring", "composing"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
"""What a room may import: rooms of lower layers, and itself. Rooms side by side do not know each other."""


def files():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(module):
    """The room of ``gibbsian.room.file``; the package itself is none."""
    return module.split(".")[1] if "." in module else None


def module_of(path, root=ROOT):
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source, module, is_package=False, known=frozenset()):
    """Every module of the package that this source imports, at its head or anywhere inside."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: None if is_package else -1]
            base = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{origin}.{alias.name}" for alias in node.names}
            # "from room import file" imports the file, "from room import name" the room.
            found |= {name if name in known else origin for name in names}
    return {name for name in found if name.split(".")[0] == "gibbsian"}


KNOWN = frozenset(module_of(path) for path in files())
GRAPH = {
    module_of(path): imports(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py", KNOWN)
    for path in files()
}


def wrong(graph):
    """Imports that do not point down."""
    found = []
    for module, targets in graph.items():
        for target in targets:
            here, there = room_of(module), room_of(target)
            if there is None:
                found.append(f"{module} imports the package itself; name the room")
            elif here != there and LEVEL.get(there, 0) >= LEVEL.get(here, 99):
                found.append(f"{module} imports {target}, which is not below it")
    return found


def round_trip(graph):
    """A cycle of imports between files, if there is one."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in graph:
            return None
        path.append(module)
        cycle = next((c for target in sorted(graph[module]) if (c := visit(target))), None)
        path.pop()
        done.add(module)
        return cycle

    return next((c for module in sorted(graph) if (c := visit(module))), None)


def test_every_room_has_its_layer():
    rooms = {room_of(module) for module in GRAPH}
    assert rooms <= LEVEL.keys(), f"say in LAYERS where {sorted(rooms - LEVEL.keys())} belong"


def test_imports_point_down():
    assert wrong(GRAPH) == []


def test_no_imports_go_round():
    assert round_trip(GRAPH) is None


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gibbsian.kernels.hmc", "from gibbsian.energies.base import Energy"),
        ("gibbsian.energies.base", "import gibbsian.kernels.base"),
        ("gibbsian.energies.base", "def f():\n    from gibbsian.training import fit"),
        ("gibbsian.sampling", "from .buffers import ReplayBuffer"),
        ("gibbsian.kernels.hmc", "from ..sampling import sample"),
        ("gibbsian.errors", "from gibbsian.typing import Scalar"),
        ("gibbsian.objectives.base", "from gibbsian import cli"),
        ("gibbsian.cli", "import gibbsian"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_seen(module, source):
    assert len(wrong({module: imports(source, module, known=frozenset({"gibbsian.cli"}))})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gibbsian.kernels.hmc", "from .langevin import MALA\nimport torch\nfrom torch import nn"),
        ("gibbsian.sampling", "from gibbsian.kernels.base import Kernel"),
        ("gibbsian.cli", "from gibbsian import sampling"),
    ],
)
def test_an_import_that_points_down_is_let_through(module, source):
    assert wrong({module: imports(source, module, known=frozenset({"gibbsian.sampling"}))}) == []


def test_a_cycle_is_seen():
    assert round_trip({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


LIGHT = """
import sys, torch
before = set(sys.modules)
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
state = torch.get_rng_state()
import gibbsian
heavy = {"sklearn", "matplotlib", "pandas", "scipy", "rich", "tyro", "PIL", "pyarrow", "safetensors", "zuko",
         "torch._inductor", "tensorboard"}
print(sorted(heavy & (set(sys.modules) - before)))
assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())
assert torch.equal(state, torch.get_rng_state())
"""


def test_importing_the_package_is_light_and_changes_nothing():
    done = subprocess.run([sys.executable, "-W", "error", "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
