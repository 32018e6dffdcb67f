"""The pages of docs/ run, their links lead somewhere, and they name all that is public."""

import contextlib
import inspect
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import doc_pages
import jax
import nbclient
import nbformat
import pytest
from doc_pages import DOCS, blocks_of, run_page
from object_stores import free_port

import flaxckpt
from flaxckpt import errors

ROOT = DOCS.parent
PACKAGE = Path(flaxckpt.__file__).parent
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
WITH_PYTHON = [
    page for page in PAGES if any(b.language == "python" for b in blocks_of(page))
]
LANGUAGES = {"python", "bash", "console", "text", ""}
WARNS = {"loading.md": "loaded . of . leaves; kept from like"}  # what a page tells of
SKIPPED = {}  # pages that do not run, each with its reason
ELSEWHERE = {"pods.md", "object-stores.md"}  # pages with a test of their own


# ---- code ----------------------------------------------------------------------------


@pytest.fixture
def _quiet_logger():
    yield
    logger = logging.getLogger("flaxckpt")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def as_a_reader_has_it(page):
    """Have the default promotion, and no warning but those that the page tells of."""
    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        if page in WARNS:
            warnings.filterwarnings("ignore", f".*{WARNS[page]}")
        yield


def members_have_two_each(names):
    """Of the slots under `vmap`, on the page: two for each member, the best among them."""
    for member in range(3):
        infos = flaxckpt.list_checkpoints("members")
        infos = [info for info in infos if info.logs["member"] == member]
        assert len(infos) == 2
        best = min(infos, key=lambda info: info.logs["val_loss"])
        assert best.epoch == 2 - member


def second_run_goes_on(names):
    """Of the first program of a reader: five epochs, and three more."""
    assert names["resumed_at"] == 5


def base_is_linked(names):
    """Of the base weights under adapters: they are not written again."""
    assert names["ckpt"].counts.linked_bytes > 0


CHECKS = {
    "getting-started.md": second_run_goes_on,
    "loading.md": base_is_linked,
    "inside-jit.md": members_have_two_each,
    "interchange.md": lambda _: os.stat("exported.weights.h5"),
}


@pytest.mark.parametrize(
    "page", [page for page in WITH_PYTHON if page not in ELSEWHERE]
)
@pytest.mark.usefixtures("offline", "_quiet_logger")
def test_a_page_runs_as_one_program(tmp_path, monkeypatch, page):
    if page in SKIPPED:
        pytest.skip(SKIPPED[page])
    monkeypatch.chdir(tmp_path)
    with as_a_reader_has_it(page):
        names = run_page(page)
        CHECKS.get(page, lambda _: None)(names)
        if page.startswith("families/") and page != "families/keras.md":
            again = run_page(page)
            assert names["start"] == 0
            assert again["start"] > 0
            assert again["ckpt"].latest.path == names["ckpt"].latest.path


@pytest.mark.parametrize("store", ["gs", "s3"])
def test_the_page_on_object_stores_runs_in_one(request, store):
    replaced = [("gs://bucket", request.getfixturevalue(store))]
    with as_a_reader_has_it("object-stores.md"):
        names = run_page("object-stores.md", replaced)
    assert len(names["infos"]) == 3


def test_the_page_on_pods_runs_in_two_processes(tmp_path):
    """Slurm's variables are those by which `initialize` finds the processes there."""
    (tmp_path / "shared").mkdir()
    slurm = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    page = [doc_pages.__file__, "pods.md", f"/shared={tmp_path}/shared"]
    processes = [
        subprocess.Popen(
            [sys.executable, *page],
            env={**os.environ, **slurm, "SLURM_PROCID": each, "SLURM_LOCALID": each},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in ("0", "1")
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)
    assert len(flaxckpt.list_checkpoints(tmp_path / "shared/runs")) == 3
    (own,) = flaxckpt.list_checkpoints(tmp_path / "shared/own")
    assert own.epoch == 0


def test_blocks_have_a_known_language():
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in LANGUAGES, f"{page}:{block.line}"
        fences = re.findall("^ *```", (DOCS / page).read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), page


def test_tables_of_this_file_name_pages():
    assert {*WARNS, *SKIPPED, *ELSEWHERE, *CHECKS} <= {*WITH_PYTHON}
    assert all(SKIPPED.values())


def test_the_notebook_runs(tmp_path):
    path = ROOT / "examples/quickstart.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    stored = [str(cell.outputs) for cell in code]
    assert not any("/tmp" in each or "/home" in each for each in stored)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    for cell, before in zip(code, stored, strict=True):
        kinds = [output.output_type for output in cell.outputs]
        assert "error" not in kinds
        assert bool(kinds) == (before != "[]"), cell.source


# ---- links ---------------------------------------------------------------------------

LINK = re.compile(r"\]\(([^()\s]+)\)")
LINKING = [
    *(DOCS / page for page in PAGES),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md")),
    ROOT / "examples/README.md",
    ROOT / "benchmarks/README.md",
]


def anchors_of(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {*map(anchor_of, headings)}


def anchor_of(heading):
    """Return what the site and GitHub make of a heading without odd characters."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in LINK.findall(text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor:
            assert anchor in anchors_of(file), link


def test_code_names_pages_that_are_there():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for page in re.findall(r"\bdocs/([\w/-]+\.md)", path.read_text()):
            assert page in PAGES, f"{path}: {page}"


# ---- what is named -------------------------------------------------------------------

INTEGRATIONS = {
    f"flaxckpt.integrations.{path.stem}": path
    for path in (PACKAGE / "integrations").glob("[!_]*.py")
}


def test_the_reference_has_each_public_name_once():
    named = []
    for path in sorted((DOCS / "api").glob("*.md")):
        named += re.findall(r"^::: ([\w.]+)$", path.read_text(), re.MULTILINE)
    public = {f"flaxckpt.{name}" for name in flaxckpt.__all__ if name != "errors"}
    public |= {
        f"flaxckpt.errors.{name}"
        for name in vars(errors)
        if getattr(vars(errors)[name], "__module__", "")
        in ("flaxckpt", errors.__name__)
        and not name.startswith("_")
        and name not in flaxckpt.__all__
    }
    for module, path in INTEGRATIONS.items():
        defined = re.findall(r"^(?:class|def) ([a-zA-Z]\w*)", path.read_text(), re.M)
        public |= {f"{module}.{name}" for name in defined}
    assert sorted(named) == sorted(public)


@pytest.mark.parametrize("name", flaxckpt.__all__)
def test_the_reference_takes_no_words_for_a_type(name):
    """In front of a colon in the first line of `Returns`, Griffe sees the type."""
    thing = getattr(flaxckpt, name)
    members = vars(thing).values() if inspect.isclass(thing) else [thing]
    for each in members:
        text = inspect.getdoc(each) or ""
        for first in re.findall(r"^ *(?:Returns|Yields):\n(.*)$", text, re.MULTILINE):
            assert "- " in first[:8] or ": " not in first, f"{each}: {first}"


def test_the_site_has_each_page():
    config = (ROOT / "mkdocs.yml").read_text()
    nav = re.findall(r": ([\w/-]+\.md)$", config, re.MULTILINE)
    assert len(nav) == len(set(nav))
    assert {*PAGES} <= {*nav}
    made = {"changelog.md", "examples/index.md", "measuring.md", "quickstart.md"}
    assert {*nav} - {*PAGES} == made


def test_the_version_to_cite_is_that_of_the_package():
    for path in (ROOT / "CITATION.cff", DOCS / "citing.md"):
        assert re.search(r"(?<![-\w])version\W+([\d.]+)", path.read_text())[1] == (
            flaxckpt.__version__
        )


def test_the_numbers_of_the_summary_are_those_of_the_benchmarks():
    sections = re.split("^## ", (DOCS / "benchmarks.md").read_text(), flags=re.M)
    measured = {anchor_of(each.partition("\n")[0]): each for each in sections}
    table = (DOCS / "performance.md").read_text()
    _, *columns = cells_of(re.search(r"^\| \| flaxckpt .*$", table, re.MULTILINE)[0])
    rows = re.findall(
        r"^\| \[.*\]\(benchmarks\.md#(\S+)\) (\|.*)$", table, re.MULTILINE
    )
    assert len(rows) == 6
    for anchor, numbers in rows:
        for column, number in zip(columns, cells_of(numbers), strict=True):
            row = re.search(rf"^\| {column}.*$", measured[anchor], re.MULTILINE)
            if number[0].isdigit():
                assert cells_of(row[0])[1] == number, (anchor, column)


def cells_of(row):
    return [cell.strip() for cell in row.strip("|").split("|")]
