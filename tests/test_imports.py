"""What imports what: folders, and no heavy package before it is needed."""

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
    "safetensors",
    "h5py",
    "msgpack",
    "tensorboardX",
    "mlflow",
    "wandb",
    "tqdm",
)

# Each folder, or file beside them, imports only from those above it in this list.
LAYERS = [
    "errors",
    "_runtime",
    "_trees",
    "_decision",
    "_processes",
    "_disk",
    "_object_store",
    "_copies",
    "_direct",
    "_orbax",
    "_files",
    "_checkpoints",
    "_settings",
    "_saving",
    "_pods",
    "_program",
    "_restoring",
    "_resuming",
    "_updating",
    "_model_checkpoint",
    "__init__",
    "integrations",
    "_cli",
]

MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    for path in PACKAGE.rglob("*.py")
)

# What may know TensorStore.
ARRAYS = ("_orbax.engine", "_direct.write", "_direct.sources", "_object_store.objects")


def layer_of(module):
    return module.partition(".")[0]


def imports_of(module):
    """Names of all modules that a module imports, wherever in it."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports_of(module):
    """The modules of the package that a module imports."""
    for name in imports_of(module):
        package, _, inside = name.partition(".")
        if package == "flaxckpt" and inside in MODULES:
            yield inside


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_down(layer):
    below = LAYERS[: LAYERS.index(layer)]
    for module in MODULES:
        if layer_of(module) == layer:
            for name in own_imports_of(module):
                other = layer_of(name)
                assert other == layer or other in below, f"{module} imports {name}"


def test_no_modules_import_each_other():
    done = set()

    def visit(module, under_way):
        assert module not in under_way, [*under_way, module]
        if module not in done:
            for name in own_imports_of(module):
                visit(name, [*under_way, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_every_folder_has_its_layer():
    assert {layer_of(module) for module in MODULES} == set(LAYERS)


def test_only_one_folder_knows_orbax():
    for module in MODULES:
        known = {name.partition(".")[0] for name in imports_of(module)}
        assert layer_of(module) == "_orbax" or "orbax" not in known, module
        assert module in ARRAYS or "tensorstore" not in known, module


CHANGES = {
    "add", "append", "appendleft", "clear", "discard", "pop", "popleft", "remove",
    "set", "setdefault", "update", "enter", "acquire",
}  # fmt: skip


def changed_in(module):
    """The names of a module that its functions change."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    names, changed = set(), set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = (n for target in targets for n in ast.walk(target))
            names |= {n.id for n in found if isinstance(n, ast.Name)}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr)):
                changed |= {name} if attr in CHANGES else set()
            case ast.Call(func=ast.Name(id="next"), args=[ast.Name(id=name), *_]):
                changed.add(name)
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                changed.add(name)
            case ast.Global(names=some):
                changed |= {*some}
            case ast.withitem(context_expr=ast.Name(id=name)):
                changed.add(name)
    return changed & names


def test_the_design_lists_the_state_of_the_process():
    text = (Path(__file__).parents[1] / "docs/design.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `_")]
    for module in MODULES:
        here = f"`{module.replace('.', '/')}`"
        listed = "".join(row for row in rows if here in row)
        for name in changed_in(module):
            assert f"`{name}`" in listed, f"{module} changes {name}"


@pytest.mark.parametrize(
    ("layer", "allowed"),
    [
        ("errors", set()),
        ("_decision", {"jax", "numpy"}),
        ("_disk", set()),
        ("_processes", {"jax", "numpy"}),
        ("_trees", {"jax", "numpy", "xxhash"}),
        ("_copies", {"jax", "numpy"}),
    ],
)
def test_pure_folders_need_little(layer, allowed):
    modules = [module for module in MODULES if layer_of(module) == layer]
    found = {name.partition(".")[0] for each in modules for name in imports_of(each)}
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
