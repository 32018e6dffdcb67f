"""What imports what: layers, and no heavy package before it is needed."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import flaxckpt

PACKAGE = Path(flaxckpt.__file__).parent
HEAVY = (
    "orbax",
    "tensorstore",
    "flax",
    "optax",
    "keras",
    "grain",
    "equinox",
    "sklearn",
)

# Each room imports only from rooms above it in this list.
LAYERS = [
    "errors",
    "_failures",
    "_frames",
    "_forks",
    "_locks",
    "_logs",
    "_direction",
    "_template",
    "_open",
    "_parsing",
    "_patience",
    "_aside",
    "_record",
    "_vetting",
    "_retention",
    "_ties",
    "_unchecked",
    "_memory",
    "_state",
    "_chunks",
    "_slots",
    "_placing",
    "_values",
    "_names",
    "_tree",
    "_weights",
    "_pieces",
    "_snapshot",
    "_packing",
    "_callback",
    "_lock",
    "_objects",
    "_lease",
    "_background",
    "_processes",
    "_quiet",
    "_interval",
    "_draft",
    "_commit",
    "_mirror",
    "_listing",
    "_digest",
    "_frozen",
    "_alias",
    "_form",
    "_looks",
    "_store",
    "_series",
    "_writer",
    "_saves",
    "_pod_saves",
    "_traced",
    "_preemption",
    "_checkpoint",
    "__init__",
    "_demo",
    "cli",
]


ARRAYS = ("_store", "_form", "_objects")  # what may know TensorStore


def imports_of(module):
    """Names of all modules that a room imports, wherever in it."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", LAYERS)
def test_imports_go_one_way(module):
    above = LAYERS[: LAYERS.index(module)]
    for name in imports_of(module):
        package, _, room = name.partition(".")
        room = room.partition(".")[0]
        if package == "flaxckpt" and room in LAYERS:
            assert room in above, f"{module} imports {room}"


def test_every_room_has_its_layer():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(LAYERS)


def test_only_the_store_knows_orbax():
    for module in LAYERS:
        known = {name.partition(".")[0] for name in imports_of(module)}
        assert module == "_store" or "orbax" not in known, module
        assert module in ARRAYS or "tensorstore" not in known, module


@pytest.mark.parametrize(
    ("module", "allowed"),
    [("errors", set()), ("_direction", set()), ("_template", set()), ("_record", set()),
     ("_open", set()), ("_parsing", set()), ("_vetting", set()),
     ("_retention", set()), ("_draft", set()), ("_commit", set()), ("_writer", set()),
     ("_state", {"jax", "numpy"}), ("_slots", {"jax", "numpy"}),
     ("_pieces", {"jax", "numpy"}), ("_snapshot", {"jax", "numpy"})],
)  # fmt: skip
def test_pure_rooms_need_little(module, allowed):
    found = {name.partition(".")[0] for name in imports_of(module)}
    assert found - set(sys.stdlib_module_names) <= allowed | {"flaxckpt"}


def modules_after(code):
    code = textwrap.dedent(code) + "\nimport sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_the_decision_loads_jax_alone():
    loaded = modules_after("""
        import flaxckpt
        state = flaxckpt.CheckpointState.create(save_best_only=True)
        flaxckpt.step(state, {"val_loss": 0.5}, 0)
        flaxckpt.list_checkpoints("nowhere")
        flaxckpt.CheckpointError
    """)
    assert not loaded & set(HEAVY)
    assert "jax" in loaded
    # The probe works: what saves loads Orbax, and still nothing of the frameworks.
    loaded = modules_after("import flaxckpt; flaxckpt.ModelCheckpoint")
    assert "orbax" in loaded
    assert not loaded & {"flax", "optax", "keras", "grain", "equinox", "sklearn"}
