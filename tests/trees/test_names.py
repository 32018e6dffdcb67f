"""Names: any text names a leaf or a directory above, and what is saved can be read."""

import collections
import os
import string

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from multiprocess import pod
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.serialization import ocdbt_utils

import flaxckpt
from flaxckpt._checkpoints import load as _load
from flaxckpt._checkpoints import looks as _looks
from flaxckpt._checkpoints import write as _write
from flaxckpt._direct import chunks as _chunks
from flaxckpt._direct import read as _read
from flaxckpt._direct import write as _direct_write
from flaxckpt._disk.alias import aliased, needs_no_alias
from flaxckpt._disk.files import Draft
from flaxckpt._orbax import files as _files
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.names import spelled
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointPathError,
    CheckpointWriteError,
    UnsupportedLeafError,
)

FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
EXAMPLES = 200 if FULL else 4  # of trees, in each way of writing

# Ways of writing; the second and third save of each go another way than the first.
WAYS = {
    "plain": {},
    "compressed": {"compress": True},
    "frozen": {"frozen": lambda path, leaf: True},
}

AWKWARD = (
    "/", "/x", "//", "x", "x/", "X", "a/b", "a//b", "a/./b", "a/../../up", "../up",
    ".", "..", "...", "", " ", "%", "%2F", "a%2Fb", "%25", "a.b", "a", "a.", ".a",
    "x/c/0", "x/zarr.json", "c", "c/0", "c.0", "d", "d/0", "0", "-", "~", "a~1b", "a\\b",
    "\\", "a\\", "\0", "a\0b", "\n", "\x7f", "\x85", "*", "?", "**", "[x]", "[!x]", "{}",
    "manifest.ocdbt", "_METADATA", "_strings.json", "_sharding", "array_metadatas",
    "ocdbt.process_0", "zarr.json", ".zarray", "x.__lock", "__lock", "gs://x", "file:",
    "é", "e\u0301", "\u202e", "\ufffe", "\U0001f600", "\ud800", "\udfff", "x\udc80",
    "L" * 200, "L" * 201, "L" * 255, "L" * 256, "L" * 5000, "é" * 200, "/" * 200,
)  # fmt: skip


def assert_same(one, other):
    """Equal in structure, kind, dtype and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert type(a) is type(b)
        if isinstance(a, str | bytes):
            assert a == b
        else:
            a, b = np.asarray(a), np.asarray(b)
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def is_held(leaf):
    """Whether Orbax has a leaf: it takes no arrays without elements."""
    return leaf != b"" if isinstance(leaf, bytes) else np.asarray(leaf).size > 0


def check_saves(directory, tree, *, epochs=3, **settings):
    """Save a tree some times, and read each checkpoint in all ways that there are."""
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", **settings) as ckpt:
        for epoch in range(epochs):
            path = ckpt.save(tree, epoch=epoch)
            ckpt.wait()
            flaxckpt.verify(path)
            assert_same(flaxckpt.load(path), tree)
            assert_same(flaxckpt.load(path, tree), tree)
            with aliased(path) as plain:
                by_orbax = ocp.load(plain)
            held = [x for x in jax.tree.leaves(tree) if is_held(x)]
            assert len(jax.tree.leaves(by_orbax)) == len(held)
        return ckpt.checkpoints


# ---- how a name is spelled ---------------------------------------------------------------


def joined(paths, **settings):
    new = spelled(paths, **settings)
    return [".".join(new.get(index, path)) for index, path in enumerate(paths)]


@pytest.mark.parametrize(
    "paths",
    [
        [()],
        [("w",)],
        [("params", "Dense_0", "kernel"), ("params", "Dense_0", "bias")],
        [("opt_state", "0", "0"), ("step",), ("größe", "a b"), ("w",), ("W",)],
        [("a.b",), ("layer.0", "w"), ("50%",), ("*",), ("[x]",), (".x",), ("d",)],
        [("x" * 200,), ("c", "0"), ("a:b",), ("-",), ("日本",)],
        [("mlp/~/linear", "w"), ("mlp/~/linear", "b"), ("mlp/~/linear_1", "w")],
        [("a/b",), ("a/c", "d"), ("a.b",), ("x/", "y"), ("~",), ("a~b",)],
    ],
)
def test_ordinary_names_stay_as_they_are(paths):
    assert spelled(paths, folds=False) == {}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([("a/b",), ("a",)], ["a%2Fb", "a"]),
        ([("a/b", "w"), ("a/b.w/c",)], ["a%2Fb.w", "a%2Fb.w%2Fc"]),
        ([("a//b",), ("c/d",)], ["a%2F%2Fb", "c%2Fd"]),
        ([("a/../b",)], ["a%2F..%2Fb"]),
        ([("/a",), ("b/",)], ["%2Fa", "b%2F"]),
        ([("a/zarr.json",)], ["a%2Fzarr.json"]),
        (
            [("a/x.__lock", "w"), ("b/x", "__lock/w")],
            ["a%2Fx.__lock.w", "b%2Fx.__lock%2Fw"],
        ),
        ([("x",), ("x/",)], ["x", "x%2F"]),
        ([("",)], ["%"]),
        ([("",), ("%",)], ["%", "%25"]),
        ([("",), ("a", "", ""), ("..",)], ["%", "a.%.%", "%2E%2E"]),
        ([("a~b",), ("a\\b",), ("\0\n",)], ["a~b", "a%5Cb", "%00%0A"]),
        ([("\ud800",)], ["%ED%A0%80"]),
        ([("a.b",), ("a", "b")], ["a%2Eb", "a.b"]),
        ([("a/b",), ("a%2Fb",), ("a",)], ["a%2Fb", "a%252Fb", "a"]),
        ([("a/b", "x"), ("a%2Fb", "y")], ["a/b.x", "a%2Fb.y"]),
        ([("a/b\\c", "")], ["a/b%5Cc.%"]),
        ([("_METADATA",), ("_strings", "json")], ["_METADAT%41", "_strings.jso%6E"]),
        ([("x", "__lock"), ("x.__lock",)], ["x.__loc%6B", "x%2E__lock"]),
    ],
)
def test_other_names_are_escaped(paths, names):
    assert joined(paths, folds=False) == names


@pytest.mark.parametrize(
    "paths", [[("A/x",), ("a/y",)], [("é/x",), ("e\u0301/y",)], [("ß/x",), ("ss/y",)]]
)
def test_directories_that_a_file_system_takes_for_one_are_not_made(paths):
    assert joined(paths, folds=False) == [path for (path,) in paths]
    assert not any("/" in name for name in joined(paths, folds=True))


def test_texts_have_no_slashes_for_a_json_pointer_leads_to_them():
    paths = [("mlp/~/linear", "name"), ("mlp/~/linear", "w")]
    names = joined(paths, slashes=False, folds=False)
    assert names == ["mlp%2F%7E%2Flinear.name", "mlp%2F%7E%2Flinear.w"]


def test_long_names_are_shortened():
    deep = ("layer",) * 100
    names = joined([("x" * 201,), (*deep, "w"), (*deep, "b"), ("é" * 150, "w"), ("s",)])
    assert names[-1] == "s"
    assert len(set(names)) == 5
    assert all(len(name.encode()) < 100 for name in names)
    assert names[0].startswith("xxx")
    assert names[1].startswith("layer.layer.")


KEYS = st.one_of(
    st.sampled_from(AWKWARD),
    st.text(st.characters(exclude_categories=()), max_size=4),
    st.text(string.ascii_letters + "./%\\~", max_size=3),
    st.text(min_size=60, max_size=300),
).filter(
    lambda key: (
        key == key.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    )
)


def nested(leaves):
    """Draw trees that have any text as keys, and some leaf."""
    return st.dictionaries(
        KEYS,
        st.recursive(
            leaves,
            lambda below: st.one_of(
                st.dictionaries(KEYS, below, max_size=3),
                st.lists(below, max_size=2),
                st.tuples(below, st.none()),
            ),
            max_leaves=6,
        ),
        min_size=2,
        max_size=6,
    ).filter(jax.tree.leaves)


def paths_of(tree):
    return [
        tuple(str(getattr(entry, "key", getattr(entry, "idx", None))) for entry in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


@given(nested(st.just(0)), st.booleans(), st.booleans())
@example({"a" * 193 + ".__lock": 0}, True, False)  # an escape makes it too long
@example({"\u1f80" * 66: 0}, False, True)
@settings(max_examples=3000 if FULL else 60)
def test_any_names_are_told_apart(tree, slashes, folds):
    """By the file system, TensorStore and Orbax, and with none of Orbax's own."""
    paths = paths_of(tree)
    names = joined(paths, slashes=slashes, folds=folds)
    folded = [name.casefold() if folds else name for name in names]
    assert len(set(folded)) == len(paths)
    # A folded name may be longer, but nothing is stored under it.
    assert all(0 < len(name.encode()) <= 200 for name in names)
    for name in folded:
        assert not set("\\\0\n" if slashes else "/\\~\0\n") & set(name)
        assert not any(other.startswith(f"{name}/") for other in folded)
        for part in name.split("/"):
            assert part.strip(".")
            assert not part.endswith(".__lock")
            assert part not in ("_METADATA", "_strings.json", "manifest.ocdbt")
            assert part not in ("zarr.json", "array_metadatas", ".flaxckpt-current")
    # Each entry of a node has a key of its own, too, wherever it has moved.
    keys = collections.defaultdict(set)
    new = spelled(paths, slashes=slashes, folds=folds)
    for index, path in enumerate(paths):
        keys[new.get(index, path)[:1]].add(path[:1])
    lengths = [len(new.get(index, path)) for index, path in enumerate(paths)]
    if lengths == [len(path) for path in paths]:
        assert all(len(origins) == 1 for origins in keys.values())


# ---- what is saved can be read -----------------------------------------------------------


LEAVES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=()), max_size=4),
    st.binary(max_size=3),
    st.sampled_from([np.float32([1, 2]), np.zeros((0, 2)), np.int8(3), True, 1j]),
    st.integers(0, 9).map(lambda i: jnp.arange(4.0) + i),
)


@pytest.mark.parametrize("arrangement", ["files", "database"])
@pytest.mark.parametrize("way", WAYS)
@given(tree=nested(LEAVES))
@settings(max_examples=EXAMPLES)
def test_any_tree_is_saved_and_read(
    tmp_path_factory, monkeypatch, way, arrangement, tree
):
    large = 0 if arrangement == "files" else 2**20
    with monkeypatch.context() as patch:
        patch.setattr(_write, "_LARGE_LEAF", large)  # as if its leaves were large
        check_saves(tmp_path_factory.mktemp("any"), tree, epochs=2, **WAYS[way])


KINDS = (
    lambda i: jnp.arange(3.0) + i,
    lambda i: np.arange(3) + i,
    lambda i: f"t{i}",
    lambda i: f"\ud800{i}",
    lambda i: bytes([i]),
    float,
)


def awkward_tree(turn=0):
    """Return a leaf of each awkward name; with each turn, of another kind."""
    return {name: KINDS[(i + turn) % len(KINDS)](i) for i, name in enumerate(AWKWARD)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("turn", range(len(KINDS)) if FULL else (0, 2))
def test_awkward_names(tmp_path, turn, way):
    own = awkward_tree(turn)
    tree = {"below": own, "list": [own["x"], (own["a"], None)], "a/b": None, **own}
    found = check_saves(tmp_path / "run", tree, epochs=2, **WAYS[way])
    assert len(found) == 2
    assert os.listdir(tmp_path) == ["run"]  # nothing got out
    names = [name for name in os.listdir(tmp_path / "run") if name[0] != "."]
    assert sorted(names) == ["1", "2"]


@pytest.mark.parametrize("way", WAYS)
def test_awkward_names_of_large_leaves(tmp_path, way):
    """The same names that small leaves may have: no threshold decides."""
    names = ("/x", "x/", "x", "a\\b", "../up", "..", "", "_METADATA", "L" * 5000)
    tree = {name: jnp.arange(300_000.0) + i for i, name in enumerate(names)}
    check_saves(tmp_path / "run", tree, **WAYS[way])
    assert (tmp_path / "run/3/state/manifest.ocdbt").exists() == (way == "compressed"
        and (tmp_path / "run/1/state/manifest.ocdbt").exists())  # fmt: skip
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("way", ["plain", "compressed"])
def test_awkward_names_of_sharded_leaves(tmp_path, way):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x"))
    tree = {
        name: {"w": jax.device_put(jnp.arange(8.0) + i, sharding)}
        for i, name in enumerate(AWKWARD)
    }
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", **WAYS[way]) as ckpt:
        for epoch in range(2):
            path = ckpt.save(tree, epoch=epoch)
            ckpt.wait()
            found = flaxckpt.load(path, tree)
            assert_same(found, tree)
            assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(found))
            assert len(jax.tree.leaves(ocp.load(path))) == len(AWKWARD)


def test_a_tree_of_any_depth(tmp_path):
    deep = {"w": jnp.arange(3.0), "text": "some"}
    for _ in range(60):
        deep = {"layer": deep, "b": jnp.ones(2)}
    check_saves(tmp_path / "dict", deep)
    check_saves(tmp_path / "list", [deep, [deep], "L" * 300, {"L" * 300: 1}])


def test_orbax_finds_ordinary_names_and_escaped_ones(tmp_path):
    tree = {
        "params": {"a.b": jnp.ones(2), "W": 1, "w": 2},
        "a\\b": 3,
        "": [4, {"~": 5}],
    }
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save(tree, epoch=0)
    found = ocp.load(path)
    assert found["params"].keys() == {"a.b", "W", "w"}
    assert (found["a%5Cb"], found["%"]) == (3, [4, {"~": 5}])


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_orbax_finds_the_names_of_haiku(tmp_path, monkeypatch, way, large):
    monkeypatch.setattr(_write, "_LARGE_LEAF", 0 if large else 2**40)
    tree = {
        f"transformer/~/mlp/~/linear_{i}": {
            "w": jnp.ones((4, i + 1)),
            "b": jnp.zeros(4),
        }
        for i in range(3)
    }
    tree["a/b"] = {"c": 1.5, "": np.ones(2), "d\\e/f": 2}
    for checkpoint in check_saves(tmp_path, tree, **WAYS[way]):
        found = ocp.load(checkpoint.path)
        assert found.pop("a/b").keys() == {"c", "%", "d%5Ce/f"}
        assert_same(found, {key: tree[key] for key in found})
        assert len(found) == 3
    tree.pop("a/b")
    with flaxckpt.ModelCheckpoint(tmp_path / "named/{epoch}") as ckpt:
        path = ckpt.save({**tree, "a/b": {"name": "text"}}, epoch=0)
    assert flaxckpt.load(path)["a/b"] == {"name": "text"}
    assert ocp.load(path)["a%2Fb"] == {"name": "text"}


def test_weights_are_found_by_their_own_names(tmp_path):
    params = {"linear/~/w": jnp.arange(3.0), "L" * 300: jnp.ones(2)}
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save({"params": params, "opt_state": params}, epoch=0)
    assert_same(flaxckpt.load_weights(path)["params"], params)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ((1, "1"), "node/1"),
        ((True, "True"), "node/True"),
        ((1.5, "1.5"), "node/1.5"),
        (((1, 2), "(1, 2)"), "node/(1, 2)"),
        (("\ud83d\ude00", "x"), "node/\ud83d\ude00"),
    ],
)
@pytest.mark.parametrize("below", [1, {"a": 1}], ids=["leaf", "node"])
def test_keys_that_are_the_same_as_text_are_refused(tmp_path, keys, name, below):
    other = {"b": 2} if isinstance(below, dict) else 2  # no two leaves have one path
    node = collections.OrderedDict(zip(keys, (below, other), strict=True))
    with flaxckpt.ModelCheckpoint(tmp_path / "run/{epoch}") as ckpt:
        with pytest.raises(UnsupportedLeafError) as caught:
            ckpt.save({"node": node}, epoch=0)
    assert [leaf for leaf, _ in caught.value.leaves] == [name]
    assert not (tmp_path / "run").exists()


def test_numbers_among_text_as_keys(tmp_path):
    """Only some types of nodes have them: JAX cannot sort a dict's."""
    tree = {"x": collections.OrderedDict([("b", np.ones(2)), (1, 3), (-1, "some")])}
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save(tree, epoch=0)
    assert_same(flaxckpt.load(path, tree), tree)
    assert list(flaxckpt.load(path)["x"]) == ["b", "1", "-1"]
    assert len(jax.tree.leaves(flaxckpt.load(path))) == 3


def test_keys_of_other_kinds(tmp_path):
    tree = {"n": {1: 0, -2: 1}, "f": {1.5: 2, 2.0: 3}, "t": {(1, 2): 4}, "b": {True: 5}}
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save(tree, epoch=0)
    assert_same(flaxckpt.load(path, tree), tree)
    assert flaxckpt.load(path)["n"] == tree["n"]


@pytest.mark.parametrize("large", [0, 2**20], ids=["files", "database"])
def test_awkward_names_in_an_object_store(url, monkeypatch, large):
    monkeypatch.setattr(_write, "_LARGE_LEAF", large)
    awkward = awkward_tree(), {"w": jnp.ones(2), "text": "some"}
    for base, tree in zip((f"{url}/a", f"{url}/h=[2, 2] %2F\\*"), awkward, strict=True):
        with flaxckpt.ModelCheckpoint(f"{base}/{{epoch}}") as ckpt:
            for epoch in range(2):
                path = ckpt.save(tree, epoch=epoch)
                ckpt.wait()
                assert_same(flaxckpt.load(path), tree)
                flaxckpt.verify(path)
        assert len(flaxckpt.list_checkpoints(base)) == 2


def test_awkward_names_in_several_processes(tmp_path):
    run = tmp_path / "hidden=[256, 256]"
    assert pod.run(tmp_path, "save_names", 2, run) == [["same"]] * 2
    for info in flaxckpt.list_checkpoints(run):
        flaxckpt.verify(info.path)
    assert len(flaxckpt.list_checkpoints(run)) == 2


def test_damage_is_looked_for_inside_the_checkpoint(tmp_path):
    """A path in a table may say anything, and no directory but its own is walked."""
    beside = tmp_path / "beside/file"
    beside.parent.mkdir()
    beside.write_bytes(b"x")
    state = tmp_path / "run/state"
    (state / "w").mkdir(parents=True)
    (state / "w/c").write_bytes(b"x")
    for name in ("/", str(beside.parent), "../../beside", "..", "w/../../../beside"):
        leaves = [Leaf((name,), "jax"), Leaf(("w",), "jax")]
        assert _files.data_files(tmp_path / "run", leaves) == ["state/w/c"]


# ---- directories above -------------------------------------------------------------------


ABOVE = (
    "hidden=[256, 256]", "[!a]", "[", "*", "?", "**", "a\\b", "\\", "a\\", "{a}", "\n",
    "\x01", "a:b", "logs:", "gs:", "file:", "#", "%41", "x.__lock", ".__lock", "é",
    "\udcff", "zarr.json", " ", "~", "a" * 255,
)  # fmt: skip
SOME_ABOVE = ("hidden=[256, 256]", "*", "a\\b", "\n", "gs:", "%41", ".__lock", "\udcff")


@pytest.mark.parametrize("above", ABOVE if FULL else SOME_ABOVE, ids=ascii)
def test_any_directory_above(tmp_path, above):
    """Small leaves, compressed ones and files: by Orbax, and directly."""
    filepath = str(tmp_path / above / "run").replace("{", "{{").replace("}", "}}")
    tree = {"w": jnp.arange(3.0), "host": np.ones(2), "text": "some"}
    for way, settings_ in WAYS.items():
        with flaxckpt.ModelCheckpoint(
            f"{filepath}/{way}/{{epoch}}", **settings_
        ) as ckpt:
            for epoch in range(2):
                path = ckpt.save(tree, epoch=epoch)
                ckpt.wait()
                flaxckpt.verify(path)
                assert_same(flaxckpt.load(path, tree), tree)
    assert len(flaxckpt.list_checkpoints(tmp_path / above)) == 6
    assert os.listdir(tmp_path) == [above]


@pytest.mark.parametrize("name", ["[1]", "*", "a\\b", "\udcff", "x.__lock"], ids=ascii)
def test_any_name_of_a_checkpoint(tmp_path, name):
    tree = {"w": jnp.arange(3.0)}
    for _ in range(3):
        with flaxckpt.ModelCheckpoint(tmp_path / name) as ckpt:
            path = ckpt.save(tree, epoch=0)
        assert_same(flaxckpt.load(path), tree)
        with flaxckpt.ModelCheckpoint(tmp_path / name) as ckpt:
            assert_same(ckpt.restore(tree).tree, tree)
    assert [info.path.name for info in flaxckpt.list_checkpoints(tmp_path)] == [name]


def test_what_plain_orbax_wrote_is_read_below_any_directory(tmp_path):
    ocp.save(tmp_path / "written", {"w": jnp.arange(3.0)})
    for above in ("[1]", "a\\b", "**"):
        (tmp_path / above).mkdir()
        os.rename(tmp_path / "written", tmp_path / above / "written")
        found = flaxckpt.load(tmp_path / above / "written")
        assert found["w"].tolist() == [0, 1, 2]
        os.rename(tmp_path / above / "written", tmp_path / "written")


@given(
    st.text(
        st.characters(exclude_characters="/\0", exclude_categories=["Cs"]),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=50)
def test_a_plain_path_leads_to_the_same_directory(tmp_path_factory, name):
    directory = tmp_path_factory.mktemp("plain") / f"x{name}"
    try:
        directory.mkdir()
    except OSError:  # a longer name than the file system takes
        return
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with aliased(directory) as plain, aliased(directory / "new") as new:
        assert needs_no_alias(plain)
        assert needs_no_alias(new)
        new.write_bytes(b"x")
        assert os.path.samefile(plain, directory)
    assert (directory / "new").read_bytes() == b"x"
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("x" * 256, "a name of 256 bytes"),
        ("é" * 128 + "/y", "a name of 256 bytes"),
        ("x/" * 2000, "is too long"),
        ("\ud800", "encoding"),
    ],
    ids=["name", "name above", "path", "surrogate"],
)
def test_paths_that_no_file_system_takes(tmp_path, name, problem):
    with pytest.raises(CheckpointPathError, match=problem):
        flaxckpt.ModelCheckpoint(f"{tmp_path}/{name}/{{epoch}}")
    if "/" not in name:
        with flaxckpt.ModelCheckpoint(f"{tmp_path}/run/{{tag}}") as ckpt:
            with pytest.raises(CheckpointError, match=f"{problem}|surrogates"):
                ckpt.save({"w": 1}, epoch=0, logs={"tag": name})
    assert os.listdir(tmp_path) == []


# ---- looked at before it is acknowledged -------------------------------------------------


def nothing_merged(monkeypatch):
    async def merge(*args, **kwargs):
        pass

    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", merge)


def no_description(monkeypatch):
    finish = _write.finish

    def spoil(draft, *args):
        finish(draft, *args)
        (draft._root / "state/_METADATA").unlink()

    monkeypatch.setattr(_write, "finish", spoil)


def spoiled(name, change):
    """Have a file changed once all are written."""

    def patch(monkeypatch):
        finish = _write.finish

        def spoil(draft, *args):
            finish(draft, *args)
            for file in draft._root.glob(name):  # Orbax names the file otherwise
                change(file)

        monkeypatch.setattr(_write, "finish", spoil)

    return patch


def shortened(file):
    os.truncate(file, file.stat().st_size - 1)


def not_in_the_database(monkeypatch):
    chunks = _chunks.chunks_of

    def some(stored, value):
        return iter(()) if stored.name == "w" else chunks(stored, value)

    for module in (_direct_write, _chunks):
        monkeypatch.setattr(module, "chunks_of", some)


def linked_nowhere(monkeypatch):
    monkeypatch.setattr(Draft, "link", lambda *args: True)
    monkeypatch.setattr(Draft, "stamp", lambda *args: (0, 0, 0, 0))


TREE = {"w": np.arange(3.0), "text": "some", "b": {"x": np.ones(2)}}
LARGE = {"w": jnp.arange(600_000.0), "b": {"x": jnp.ones(600_000)}}
FROZEN = {"frozen": lambda path, leaf: path == ("w",)}
FAULTS = {  # what goes wrong, of which tree, at which save, in what way
    "nothing merged": (nothing_merged, TREE, 0, {}),
    "nothing merged of compressed": (nothing_merged, TREE, 0, {"compress": True}),
    "no metadata": (no_description, TREE, 0, {}),
    "no texts": (spoiled("state/_strings.json", os.unlink), TREE, 0, {}),
    "no texts directly": (spoiled("state/_strings.json", os.unlink), TREE, 1, {}),
    "no table": (spoiled("flaxckpt_leaves.json", os.unlink), TREE, 0, {}),
    "no record": (spoiled("flaxckpt.json", os.unlink), TREE, 1, {}),
    "no database": (spoiled("state/manifest.ocdbt", os.unlink), TREE, 1, {}),
    "a file by Orbax": (spoiled("state/w/c/0", os.unlink), LARGE, 0, {}),
    "a description": (spoiled("state/b.x/zarr.json", shortened), LARGE, 1, {}),
    "a compressed file": (
        spoiled("state/w/c/0", os.unlink), LARGE, 0, {"compress": True}
    ),
}  # fmt: skip
FAULTS_OF_THE_DIRECT_WAY = {  # Orbax writes all of it
    "a key of the database": (not_in_the_database, TREE, {}),
    "a file": (spoiled("state/w/c.0", os.unlink), LARGE, {}),
    "a shorter file": (spoiled("state/w/c.0", shortened), LARGE, {}),
    "a link": (linked_nowhere, LARGE, FROZEN),
}


@pytest.mark.direct
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_there_is_not_acknowledged(tmp_path, monkeypatch, fault):
    patch, tree, at, how = FAULTS[fault]
    earlier = {"other": np.arange(5.0)}
    tree = {**tree, fault: 1}  # of which no form is known yet
    with flaxckpt.ModelCheckpoint(tmp_path / "run", **how) as ckpt:
        if not how.get("frozen"):
            ckpt.save(earlier, epoch=0)
            ckpt.wait()
        for epoch in range(at):
            ckpt.save(tree, epoch=epoch)
            ckpt.wait()
        before, count = flaxckpt.load(tmp_path / "run"), ckpt.counts.saved
        with monkeypatch.context() as context:
            patch(context)
            ckpt.save(tree, epoch=7)
            with pytest.raises(CheckpointWriteError, match="not all there") as caught:
                ckpt.wait()
        assert caught.value.path == str(tmp_path / "run")
        assert ckpt.counts.saved == count
        assert_same(flaxckpt.load(tmp_path / "run"), before)
        ckpt.save(tree, epoch=8)  # whole again
        ckpt.wait()
        assert_same(flaxckpt.load(tmp_path / "run"), tree)
        flaxckpt.verify(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"] or not any(
        name.startswith(".flaxckpt") and name.count("-") > 1
        for name in os.listdir(tmp_path)
    )


@pytest.mark.direct
@pytest.mark.parametrize("fault", FAULTS_OF_THE_DIRECT_WAY)
def test_what_the_direct_way_leaves_out_orbax_writes(tmp_path, monkeypatch, fault):
    patch, tree, how = FAULTS_OF_THE_DIRECT_WAY[fault]
    tree = {**tree, fault: 1}  # of which no form is known yet
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", **how) as ckpt:
        ckpt.save(tree, epoch=0)
        ckpt.wait()
        with monkeypatch.context() as context:
            patch(context)
            ckpt.save(tree, epoch=1)
            with pytest.warns(UserWarning, match="not all there"):
                ckpt.wait()
        assert (ckpt.counts.direct, ckpt.counts.by_orbax) == (0, 2)
    for info in flaxckpt.list_checkpoints(tmp_path):
        assert_same(flaxckpt.load(info.path), tree)
        flaxckpt.verify(info.path)


def test_the_error_says_what_is_missing(tmp_path, monkeypatch):
    tree = {"w": np.arange(3.0), "said": np.ones(2)}
    nothing_merged(monkeypatch)
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "{epoch}")
    ckpt.save(tree, epoch=0)
    with pytest.raises(CheckpointWriteError, match=r"not all there \(said, w: "):
        ckpt.close()
    assert flaxckpt.list_checkpoints(tmp_path) == ()


@pytest.mark.direct
@pytest.mark.parametrize("tree", [TREE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("way", WAYS)
def test_one_looks_once_and_reads_no_values(tmp_path, monkeypatch, way, tree):
    """At the first save in each way; the later ones cost nothing."""
    holds, looked = _read.Reader.holds, []

    def count(reader, leaf):
        looked.append(leaf.name)
        return holds(reader, leaf)

    def no_read(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(_read.Reader, "holds", count)
    for module in (_load, _looks):
        monkeypatch.setattr(module, "read", no_read)
    how = WAYS[way]
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", **how) as ckpt:
        for epoch in range(4):
            ckpt.save({**tree, f"{way} once": 1}, epoch=epoch)
            ckpt.wait()
    # By Orbax; directly, or linked.
    number = 1 if way == "compressed" else 2
    assert len(looked) == number * (len(jax.tree.leaves(tree)) + 1)


def test_one_looks_again_at_another_path(tmp_path, monkeypatch):
    """Whether a directory was renamed, or its inode is that of a deleted one."""
    holds, looked = _read.Reader.holds, []
    monkeypatch.setattr(
        _read.Reader, "holds", lambda *what: looked.append(what) or holds(*what)
    )

    def save(directory):
        looked.clear()
        for epoch in range(2):  # by Orbax, or else as known already
            with flaxckpt.ModelCheckpoint(directory / "{epoch}") as ckpt:
                ckpt.save({"at another path": np.ones(3)}, epoch=epoch)
        return len(looked)

    first, moved = tmp_path / "first", tmp_path / "hidden=[256, 256]"
    assert save(first)
    assert not save(first)
    os.rename(first, moved)
    assert save(moved)
    assert not save(moved)


@pytest.mark.direct
def test_a_damaged_file_is_still_found_when_it_is_read(tmp_path):
    tree = {"/": jnp.arange(300_000.0)}
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(2):
            path = ckpt.save(tree, epoch=epoch)
    (file,) = path.glob("state/%2F/c*")
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointCorruptError) as caught:
        flaxckpt.verify(path)
    assert "not what was saved: / (in one of the files state/%2F/c" in str(caught.value)
