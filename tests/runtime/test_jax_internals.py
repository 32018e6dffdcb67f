"""The private names of JAX: each is there, and what is lost without them."""

import ast
import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

import flaxckpt
from flaxckpt._runtime import jax_internals

PACKAGE = Path(flaxckpt.__file__).parent

# Each private name, by its module.
NAMES = {
    "jax._src.callback": {"_IOEffect", "_callback_op_sharding"},
    "jax._src.dispatch": {"prim_requires_devices_during_lowering", "runtime_tokens"},
    "jax._src.distributed": {"global_state"},
    "jax._src.interpreters.pxla": {"batched_device_put"},
    "jax._src.lax.lax": {"_convert_element_type"},
    "jax._src.mesh": {"thread_resources"},
    "jax._src.xla_bridge": {"backends_are_initialized"},
}
# What is used of some of them.
PARTS = [
    ("jax._src.dispatch", "runtime_tokens.current_tokens"),
    ("jax._src.dispatch", "runtime_tokens.output_runtime_tokens"),
    ("jax._src.dispatch", "runtime_tokens.clear"),
    ("jax._src.distributed", "global_state.client"),
    ("jax._src.distributed", "global_state.num_processes"),
    ("jax._src.distributed", "global_state.process_id"),
    ("jax._src.mesh", "thread_resources.env.physical_mesh"),
]


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module in NAMES for name in sorted(NAMES[module])] + PARTS,
)
def test_this_jax_has(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)


def test_every_sharding_orders_its_devices():
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.P("x"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    assert tuple(jax_internals.device_order(whole)) == tuple(mesh.devices.flat)
    assert tuple(jax_internals.device_order(one)) == (jax.devices()[1],)


def test_one_file_has_all_of_them():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        is_it = path == Path(jax_internals.__file__)
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.ImportFrom(module=module) if module and "jax._src" in module:
                    assert is_it, path
                    assert node.col_offset, "it is imported only on use"
                    names = {alias.name for alias in node.names}
                    found[module] = found.get(module, set()) | names
                case ast.Constant(value=str(text)) if text == "jax._src.xla_bridge":
                    assert is_it, path
                    found[text] = {"backends_are_initialized"}
                case ast.Attribute(attr="_src") | ast.Import():
                    assert "jax._src" not in ast.unparse(node), path
                case ast.Constant(value="_device_assignment"):
                    assert is_it, path
                case _:
                    pass
    assert found == NAMES


# A JAX without any of the names, as far as flaxckpt can see.
WITHOUT = """
    import builtins, os, sys, warnings
    import jax, jax.numpy as jnp, numpy as np

    original, gone = builtins.__import__, []

    def without(name, globals=None, locals=None, fromlist=(), level=0):
        ours = str((globals or {}).get("__name__")).startswith("flaxckpt")
        if ours and name.startswith("jax._src"):
            gone.append(name)
            raise ImportError(f"there is no {name}")
        return original(name, globals, locals, fromlist, level)

    def without_attributes(owner, name, *default):
        if name in ("_device_assignment", "backends_are_initialized"):
            gone.append(name)
            return default[0]
        return getattr(owner, name, *default)

    builtins.__import__ = without
    import flaxckpt
    from flaxckpt._runtime import jax_internals
    jax_internals.getattr = without_attributes
    directory = sys.argv[1]
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.P("x"))
    tree = {
        "one": jnp.arange(3.0),
        "split": jax.device_put(jnp.arange(8.0), split),
        "other": jax.device_put(jnp.arange(4), jax.devices()[3]),
        "another": jax.device_put(jnp.arange(1, 5), jax.devices()[3]),
    }

    def error_of(call):
        try:
            call()
        except flaxckpt.CheckpointError as error:
            return " ".join(str(error).split())
        return "none"
"""


def run(code, *arguments):
    code = textwrap.dedent(WITHOUT) + textwrap.dedent(code) + "\nprint(*set(gone))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "4"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, gone = done.stdout.splitlines()
    return said, set(gone.split())


def test_a_loop_saves_and_restores_without_them(tmp_path):
    said, gone = run(
        """
        with flaxckpt.ModelCheckpoint(directory + "/{epoch}", mode="min") as ckpt:
            state = ckpt.init(like=tree)
            for epoch in range(3):
                loss = jnp.float32(1 / (epoch + 1))
                state = ckpt.update(state, tree, {"val_loss": loss}, epoch)
            found = ckpt.restore(like=tree)
        assert all(map(np.array_equal, *map(jax.tree.leaves, (found.tree, tree))))
        print(found.epoch, found.tree["split"].sharding == split)
        flaxckpt.verify(found.path)
        like = {name: jax.P() for name in tree}
        print(error_of(lambda: flaxckpt.load(found.path, like)))
        with jax.set_mesh(mesh):
            print(flaxckpt.load(found.path, like)["one"].sharding.spec == jax.P())
        child = os.fork()
        if not child:
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        """,
        tmp_path,
    )
    assert said[0] == "2 True"
    assert "no mesh is set" in said[1]
    assert said[2:] == ["True", "0"]
    assert gone == {
        "_device_assignment",
        "backends_are_initialized",
        "jax._src.interpreters.pxla",
        "jax._src.mesh",
    }


def test_a_program_decides_and_saves_without_them(tmp_path):
    said, gone = run(
        """
        begun = flaxckpt.CheckpointState.create(save_best_only=True)
        step = jax.jit(flaxckpt.step)
        state, save = step(begun, {"val_loss": 0.5}, 0)
        print(save, state.best)

        with flaxckpt.ModelCheckpoint(directory + "/{epoch}") as ckpt:
            state = ckpt.init(like=tree["split"])
            update = jax.jit(lambda s, x: ckpt.update(s, x, {"val_loss": 1.0}, 0))
            jax.block_until_ready(update(state, tree["split"]))
            ckpt.wait()
            print(ckpt.latest.epoch)

            # On CPU, where it is not known how the tree is sharded.
            update = jax.jit(lambda s, x: ckpt.update(s, x, {"val_loss": 1.0}, 1))
            with warnings.catch_warnings(action="ignore"):
                print(error_of(lambda: update(state, {"other": tree["split"]})))

        body = lambda carry, x: (carry + x, carry)
        run = lambda carry: list(
            flaxckpt.scan_in_chunks(body, carry, jnp.arange(4.0), chunk=2)
        )
        print(run(jnp.float32(0))[-1].carry, error_of(lambda: run(0.0)))
        """,
        tmp_path,
    )
    version = jax.__version__
    assert said == [
        "True 0.5",
        "0",
        f"JAX {version} lacks what flaxckpt needs here (there is no "
        "jax._src.callback): update within jit cannot save on several CPU devices "
        "without the shardings of the tree. Pass init(like=...), or call update "
        "between the parts of flaxckpt.scan_in_chunks.",
        f"6.0 JAX {version} lacks what flaxckpt needs here (there is no "
        "jax._src.lax.lax): scan_in_chunks takes no Python number in its carry. Give "
        "each a dtype, as in jnp.float32(0).",
    ]
    assert gone == {"jax._src.callback", "jax._src.lax.lax"}


def test_a_failed_program_without_them(tmp_path):
    """It is not known when the other programs have handed over what they save."""
    said, _ = run(
        """
        like = tree["split"]
        ckpt = flaxckpt.ModelCheckpoint(directory + "/{epoch}")
        state = ckpt.init(like=like)

        @jax.jit
        def update(state, x):
            return ckpt.update(state, x, {}, 0, force=True)

        jax.block_until_ready(update(state, like))
        jax.effects_barrier = lambda: (_ for _ in ()).throw(
            jax.errors.JaxRuntimeError("failed")
        )
        print(error_of(ckpt.wait))
        jax.effects_barrier = lambda: None
        ckpt.close()
        """,
        tmp_path,
    )
    assert "nothing can wait for the saves of other programs" in said[0]


def test_several_processes_without_them(tmp_path):
    said, _ = run(
        """
        jax.distributed.is_initialized = lambda: True
        make = lambda: flaxckpt.ModelCheckpoint(directory + "/{epoch}")
        print(error_of(make))
        """,
        tmp_path,
    )
    assert said[0].endswith("several processes cannot save or load.")
