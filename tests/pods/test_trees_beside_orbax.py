"""Whatever plain Orbax saves in several processes, flaxckpt saves and restores."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from jax.sharding import SingleDeviceSharding
from multiprocess import pod
from multiprocess.tree_workers import EVERYWHERE, TREES, OnHost
from orbax.checkpoint import v1

import flaxckpt

# For each tree that flaxckpt refuses, a leaf that the error names.
REFUSED = {
    "dtype_uint1": "of_dtype/w",
    "dtype_int1": "of_dtype/w",
    "dtype_uint2": "of_dtype/w",
    "dtype_uint4": "of_dtype/w",
    "dtype_float8_e4m3": "of_dtype/w",
    "numpy_float6": "six",
    "numpy_dates": "when",
    "numpy_text": "a",
    "numpy_structured": "a",
    "numpy_objects": "a",
    "an_object": "a",
    "a_set": "a",
    "of_the_first_processes": "part",
    "of_the_last_processes": "part",
    "of_one_process": "part",
    "of_each_half": "",  # each process names the first that it has no part of
    "pinned_part": "a",
    "empty_tree": "tree",
    "only_none": "tree",  # a checkpoint of it would be empty
}
SAVED_BY_ORBAX_ALONE = {"only_none"}
OTHERS = [name for name in TREES if name not in EVERYWHERE]
OF_FOUR = (
    "two_axes", "partly_replicated", "turned_mesh", "interleaved_mesh", "two_meshes",
    "of_the_first_processes", "of_the_last_processes", "of_each_half", "of_one_process",
    "one_device_of_each", "local_arrays", "local_meshes", "memories", "pinned_part",
    "keys_sharded", "keys_local", "keys_none", "empty_arrays", "optax_state", "large",
)  # fmt: skip
# The devices of each process, the trees, and where flaxckpt copies them to.
PODS = {
    "4 with 1 device": ([1] * 4, OF_FOUR, "auto"),
    "2 with 2 devices": ([2] * 2, EVERYWHERE, "auto"),
    "2 with 2 devices, others": ([2] * 2, OTHERS, "auto"),
    "1 device and 3": ([1, 3], [*EVERYWHERE, "dtypes"], "host"),
}


@pytest.mark.parametrize("kind", PODS)
def test_what_orbax_saves_is_saved_and_restored_in_each_process(tmp_path, kind):
    devices, names, snapshot = PODS[kind]
    said = pod.run(
        tmp_path, "save_trees", len(devices), tmp_path, snapshot, *names,
        devices=devices, script="tree_workers.py",
    )  # fmt: skip
    problems, by_both = [], 0
    for name, *told in zip(names, *said, strict=True):
        assert {each[0] for each in told} == {name}
        _, by_orbax, saved, loaded, *counts = zip(*told, strict=True)
        by_both += not (any(by_orbax) or any(saved))
        found = _problem(name, by_orbax, saved, loaded)
        if not found and not any(saved):
            flaxckpt.verify(tmp_path / "flaxckpt" / name / "1")
            if min(*counts) < 1:  # an equal tree before it may have shown the form
                problems.append(f"{name}: direct {counts}")
            found = _problem_on_disk(tmp_path / "flaxckpt" / name / "2", name, devices)
        if found:
            problems.append(f"{name}: {found}")
    assert not problems, "\n".join(problems)
    # Where the numbers of devices differ, Orbax saves nothing.
    assert by_both == 0 if kind == "1 device and 3" else by_both >= 10


def _problem(name, by_orbax, saved, loaded):
    """Say what is wrong with a tree's errors in all processes; empty if nothing is."""
    if any(saved):
        if not any(by_orbax) and name not in SAVED_BY_ORBAX_ALONE:
            return f"only Orbax saves it: {saved}"
        wanted = REFUSED.get(name)
        if wanted is None or not all(
            text.startswith("flaxckpt.") and wanted in text for text in saved
        ):
            return f"not refused as it should be: {saved}"
        return ""
    if name in REFUSED:
        return "it is saved, and not refused"
    return f"not what was saved: {loaded}" if any(loaded) else ""


def _problem_on_disk(path, name, devices):
    """Say in what one process finds the checkpoint otherwise; empty if in nothing."""
    flaxckpt.verify(path)
    tree = TREES[name](OnHost(devices))
    wanted = values_of(tree)
    like = v1.metadata(path).metadata
    if like is None:  # Orbax's metadata know no Python booleans
        like = jax.tree.map(lambda x: _abstract(x) if hasattr(x, "shape") else x, tree)
    else:
        like = jax.tree.map(_abstract, like, is_leaf=lambda x: hasattr(x, "shape"))
    if not wanted:
        return ""
    if values_of(v1.load(path, like)) != wanted:
        return f"v1 of Orbax reads {v1.load(path, like)}"
    if any(isinstance(leaf, str) for leaf in jax.tree.leaves(like)):
        return ""  # v0 takes no text in a target
    with v0.StandardCheckpointer() as reader:
        found = reader.restore(path / "state", like)
    return "" if values_of(found) == wanted else f"v0 of Orbax reads {found}"


def _abstract(leaf):
    """Have Orbax read an array onto a device; with 64 bits, into a numpy array."""
    if not hasattr(leaf, "shape"):
        return leaf
    if hasattr(leaf, "sharding_metadata") and leaf.dtype.itemsize < 8:
        here = SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
    return np.zeros(leaf.shape, leaf.dtype)


def values_of(tree):
    """Return the values in a tree, each once, without those that have no elements."""
    return {
        value
        for leaf in jax.tree.leaves(tree)
        if (value := _value_of(leaf)) is not None
    }


def _value_of(leaf):
    if isinstance(leaf, str):
        return leaf
    if isinstance(leaf, bytes):
        leaf = np.frombuffer(leaf, np.uint8)
    if callable(leaf):
        return None
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, int) and leaf >= 2**64:  # as the store has it
        leaf = np.frombuffer(leaf.to_bytes(16, "little", signed=True), np.uint8)
    array = np.asarray(leaf)
    array = array.astype(array.dtype.newbyteorder("="))
    if not array.size:
        return None
    return str(array.dtype), array.shape, array.tobytes()
