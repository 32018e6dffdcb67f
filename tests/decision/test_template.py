"""The filepath template."""

import contextlib
import os
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flaxckpt import CheckpointError, ModelCheckpoint, TemplateError, list_checkpoints
from flaxckpt._decision.moment import Moment
from flaxckpt._decision.template import Template

OWN = (
    "a name of flaxckpt's own files. Choose one that does not begin with "
    "'.flaxckpt-', and is not 'flaxckpt.json' or 'flaxckpt_leaves.json'."
)


def shown(template, epoch=0, batch=None, **logs):
    return os.path.relpath(Template.parse(template).render(Moment(epoch, batch), logs))


def test_fields_are_one_based_and_formatted():
    assert shown("{epoch:02d}-{val_loss:.2f}", val_loss=0.256) == "01-0.26"  # 26
    assert shown("a/{epoch}/b-{batch:>4}", 4, 6) == "a/5/b-   7"
    assert shown("m-{epoch}", 5) == "m-6"  # 11
    assert shown("{epoch:x}{epoch:+d}{x:e}{x!r}{n:,}", 9, x=0.5, n=1000) == (
        "a+105.000000e-010.51,000"
    )
    assert shown("{x:{epoch}.2f}", 7, x=1.0) == "    1.00"
    assert shown("{{literal}}-{epoch}") == "{literal}-1"


def test_field_names_are_those_of_logs():
    logs = {"val/loss": 0.5, "top-5": 1, "a b": 2}
    template = Template.parse("{val/loss:.1f} {top-5} {a b}")
    assert Path(template.render(Moment(0), logs)).name == "0.5 1 2"


def test_logs_do_not_shadow_epoch_and_batch():
    logs = {"epoch": 77, "batch": 88}
    assert (
        shown(
            "{epoch}-{batch}",
            0,
            1,
        )
        == "1-2"
    )
    assert (
        Path(Template.parse("{epoch}-{batch}").render(Moment(0, 1), logs)).name == "1-2"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(jnp.float32(0.256), "0.26"), (np.float32(0.256), "0.26"), (jnp.bfloat16(0.25), "0.25"),
     (np.array(0.256), "0.26"), (1, "1.00"), (True, "1.00"), (float("nan"), "nan")],
)  # fmt: skip
def test_scalars_of_any_kind_are_shown(value, text):
    assert shown("{x:.2f}", x=value) == text


def test_a_float32_without_a_spec_is_shown_as_short_as_it_is():
    assert shown("{x}", x=np.float32(0.1)) == "0.1"
    assert shown("{x}", x=jnp.float32(0.1)) == "0.1"


def test_paths_are_absolute_from_where_the_template_was_parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here, home = Template.parse("a/{epoch}"), Template.parse(Path("~/b/{epoch}"))
    monkeypatch.chdir("/")
    assert here.render(Moment(0), {}) == str(tmp_path / "a/1")
    assert home.render(Moment(0), {}) == str(tmp_path / "home/b/1")


@pytest.mark.parametrize(
    ("text", "root", "name", "depth"),
    [
        ("/a/b", "/a", "b", 1),
        ("/a/b/", "/a", "b", 1),
        ("/a/{epoch}", "/a", "{epoch}", 1),
        ("/a/x{epoch}/b/{x/y}/", "/a", "x{epoch}/b/{x/y}", 3),
        ("/a/../c/{epoch}", "/c", "{epoch}", 1),
        ("/{{a}}/{epoch}", "/{a}", "{epoch}", 1),
        ("/a//{epoch}", "/a", "{epoch}", 1),
        ("/{{a}}", "/", "{{a}}", 1),
        ("/a/{epoch}//b///{x//y!r:/>{n//m}}-{{//}}//", "/a", "{epoch}/b/{x//y!r:/>{n//m}}-{{/}}", 4),
    ],
)  # fmt: skip
def test_root_and_name(text, root, name, depth):
    template = Template.parse(text)
    assert (template.root, template.name, template.depth) == (root, name, depth)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must be a non-empty path as text."),
        ("a\0b", "must be a non-empty path as text."),
        ("/", "is the root directory. Name one below it."),
        ("az://b/{epoch}", "is a URL of another kind than gs:// and s3://. Mount it."),
        ("{epoch", "expected '}' before end of string. Write {{ and }} for literal braces."),
        ("a}", "Single '}' encountered in format string. Write {{ and }} for literal braces."),
        ("{}", "field {} has no name. Name each field: {epoch}, {batch} or a key of `logs`."),
        ("{0}", "field {0} has no name. Name each field: {epoch}, {batch} or a key of `logs`."),
        ("{a.b}", "field {a.b} looks up an attribute or an index. Use plain names: {epoch}, {batch} or a key of `logs`."),
        ("{a[0]}", "field {a[0]} looks up an attribute or an index. Use plain names: {epoch}, {batch} or a key of `logs`."),
        ("{epoch:{a.b}}", "field {a.b} looks up an attribute or an index. Use plain names: {epoch}, {batch} or a key of `logs`."),
        ("{epoch!z}", "field {epoch} has a conversion or format spec that Python does not know. See the format specification of Python's `str.format`."),
        ("{x:.2q}", "field {x} has a conversion or format spec that Python does not know. See the format specification of Python's `str.format`."),
        ("{epoch:1000000000d}", "field {epoch}: no file name has a width or precision of four digits. Take a smaller one."),
        ("{x:{n:.1000000000f}}", "field {n}: no file name has a width or precision of four digits. Take a smaller one."),
        ("/r/.flaxckpt-x", f"has {OWN}"),
        ("/r/.flaxckpt-{epoch}/{a}", f"has {OWN}"),
        ("/r/{epoch}/flaxckpt.json/x", f"has {OWN}"),
        ("/r/FlaxCkpt_Leaves.json/{epoch}", f"has {OWN}"),
        ("{epoch}/../x", "has a '.' or '..' behind a field. Write the path without them."),
    ],
)  # fmt: skip
def test_malformed_templates_are_refused_when_parsed(text, problem):
    with pytest.raises(TemplateError) as caught:
        Template.parse(text)
    assert str(caught.value) == f"filepath {text!r}: {problem}"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "logs", "problem"),
    [
        ("/r/{val_loss}", {"loss": 1, "acc": 2}, "no value for 'val_loss'; fields there are: acc, epoch, loss. Put what is missing into `logs`, or take it out of the filepath."),
        ("/r/{batch}", {"batch": 3}, "no value for 'batch' ({batch} has none at the end of an epoch); fields there are: epoch. Put what is missing into `logs`, or take it out of the filepath."),
        ("/r/{x:d}", {"x": 0.5}, "{x:d} cannot show 0.5: Unknown format code 'd' for object of type 'float'. Change the format spec, or what `logs` holds."),
        ("/r/{x}", {"x": np.ones(2)}, "{x} cannot show array([1., 1.]): it has shape (2,), and only a scalar can be shown. Change the format spec, or what `logs` holds."),
        ("/r/{x}", {"x": "a/b"}, "field {x} gives 'a/b', which is no part of a file name."),
        ("/r/{x}", {"x": ".."}, "gives '..', which is no file name."),
        ("/r/{x}", {"x": ""}, "gives '', which is no file name."),
        ("/r/{x}/{epoch}", {"x": ""}, "gives '/1', in which a name is empty, '.' or '..'. Change what `logs` holds, or the filepath."),
        ("/r/{epoch}/{x}", {"x": ""}, "gives '1/', in which a name is empty, '.' or '..'. Change what `logs` holds, or the filepath."),
        ("/r/{epoch}/{x}/x", {"x": ""}, "gives '1//x', in which a name is empty, '.' or '..'. Change what `logs` holds, or the filepath."),
        ("/r/{epoch}/.{x}", {"x": "."}, "gives '1/..', in which a name is empty, '.' or '..'. Change what `logs` holds, or the filepath."),
        ("/r/{x}", {"x": ".flaxckpt-x"}, f"gives '.flaxckpt-x', with {OWN}"),
        ("/r/{x}{y}", {"x": ".flax", "y": "ckpt-replaced-a"}, f"gives '.flaxckpt-replaced-a', with {OWN}"),
        ("/r/{epoch}/{x}/x", {"x": "flaxckpt.json"}, f"gives '1/flaxckpt.json/x', with {OWN}"),
        ("/r/{epoch:{x}}", {"x": 10**9}, "{epoch:1000000000} cannot show 1: no file name has a width or precision of four digits. Change the format spec, or what `logs` holds."),
        ("/r/{epoch:{x:{y}}}", {"x": 1, "y": 10**9}, "{epoch:{x:{y}}} cannot show 1: no file name has a width or precision of four digits. Change the format spec, or what `logs` holds."),
    ],
)  # fmt: skip
def test_values_that_cannot_be_shown(text, logs, problem):
    with pytest.raises(TemplateError) as caught:
        Template.parse(text).render(Moment(0), logs)
    assert str(caught.value) == f"filepath {text!r}: {problem}"


@given(st.text(), st.integers(0, 10**9), st.integers(0, 10**9))
def test_any_literal_text_names_a_file_below_the_root(text, epoch, batch):
    """Whatever stands around the fields, the path is below root, and shows them."""
    escaped = text.replace("{", "{{").replace("}", "}}")
    try:
        template = Template.parse(f"/root/{{epoch}}{escaped}{{batch}}")
    except TemplateError:
        assert (
            "\0" in text or {".", ".."} & set(f"x{text}x".split("/")) or "://" in text
        )
        return
    path = template.render(Moment(epoch, batch), {})
    assert path.startswith(f"/root/{epoch + 1}")
    assert path.endswith(f"{batch + 1}")
    assert os.path.relpath(path, "/root").count("/") == template.depth - 1


def test_names_that_only_look_like_our_own():
    assert shown("{epoch}/.flaxckpt") == "1/.flaxckpt"
    assert (
        shown(".fla{x}ckpt-/flaxckpt.json{epoch}", x="?") == ".fla?ckpt-/flaxckpt.json1"
    )


def test_slashes_in_a_row_are_one(tmp_path):
    assert shown(f"{tmp_path}//a/{{epoch}}//x///").endswith("/a/1/x")
    assert Template.parse("/r/{a:/>3}//{b}").name == "{a:/>3}/{b}"


@given(
    st.lists(st.sampled_from(["{a}", "{b}", "{a}-{b}", ".{a}", "x"]), min_size=1),
    st.text("./~ a"),
    st.text("./~ a"),
)
def test_whatever_the_fields_show_the_path_is_so_deep_below_the_root(names, a, b):
    template = Template.parse("/root/{epoch}/" + "/".join(names))
    try:
        path = template.render(Moment(0), {"a": a, "b": b})
    except TemplateError:
        return
    assert path == os.path.normpath(path)
    assert path.startswith("/root/1/")
    assert os.path.relpath(path, "/root").count("/") == template.depth - 1


NAMES = (
    *("", "last", ".flax", "ckpt-x", ".json", ".flaxckpt-x", ".flaxckpt-12345678.lock"),
    *(".flaxckpt-replaced-", ".flaxckpt-replaced-a", "flaxckpt.json", "x" * 240),
)
SHAPES = (
    *("{a}", "{a}{b}", "{a}/{b}", "{epoch}/{a}", "{a}/{epoch}", "{epoch}/{a}/x"),
    *(".{a}", "flaxckpt{a}", "{epoch}//{a}", "{a!r:.{n}}", "{a}/{b}/{epoch}"),
)
texts = st.one_of(st.text(), st.text("./~- alst"), st.sampled_from(NAMES))


@example("{a}/{epoch}", "last", "", True)
@given(
    st.sampled_from(SHAPES),
    texts,
    texts,
    st.one_of(st.booleans(), texts),
)
def test_what_is_saved_is_listed_or_refused(tmp_path_factory, name, a, b, last):
    """Whatever text is in the logs; nor does the last state take its place."""
    directory = tmp_path_factory.mktemp("names")
    root, tree = directory / "runs", {"w": np.ones(2)}
    settings = {"save_best_only": True, "initial_value_threshold": 1.0}
    with contextlib.ExitStack() as closed:
        try:
            ckpt = ModelCheckpoint(root / name, "loss", save_last=last, **settings)
            closed.enter_context(ckpt)
            logs = {"a": a, "b": b, "n": 9}
            ckpt.update(ckpt.init(), tree, {**logs, "loss": 2.0}, 0)
            path = ckpt.save(tree, 0, logs={**logs, "loss": 0.5})
            ckpt.wait()
        except CheckpointError:
            assert {each.name for each in directory.iterdir()} <= {"runs"}
            return
        with contextlib.suppress(CheckpointError):
            ckpt.update(ckpt.init(), tree, {**logs, "loss": 2.0}, 1)
            ckpt.wait()
        assert path in [info.path for info in ckpt.checkpoints]
        assert path.is_relative_to(root)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            list_checkpoints(directory)
