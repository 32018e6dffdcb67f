"""The ready-made functions for `on_saved`, with the real libraries, offline."""

import json
import os
import struct
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import pytest

import flaxckpt
from flaxckpt import HookError, ModelCheckpoint, SettingError
from flaxckpt.integrations import mlflow as of_mlflow
from flaxckpt.integrations import tensorboard as of_tensorboard
from flaxckpt.integrations import wandb as of_wandb

LOSSES = [0.5, 0.75, 0.25]


def train(filepath, hook, **settings):
    """Save at steps 10, 20 and 30, of which the third is the best; return the paths."""
    with ModelCheckpoint(
        filepath, save_freq=10, on_saved=hook, mode="min", **settings
    ) as ckpt:
        state = ckpt.init()
        for i, loss in enumerate(LOSSES, 1):
            logs = {"val_loss": loss, "acc@5": jnp.float32(i), "note": "some text"}
            state = ckpt.update(state, {"w": np.full(3, i)}, logs, step=10 * i)
    return [str(info.path) for info in ckpt.checkpoints]


# ---- TensorBoard ---------------------------------------------------------------------


def until(is_there):
    """Wait for what another thread or process writes."""
    end = time.monotonic() + 60
    while not is_there():
        assert time.monotonic() < end
        time.sleep(0.02)


def events_in(directory):
    """The scalars and texts in TensorBoard's event files: by tag, by step."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for file in directory.iterdir():
        data = file.read_bytes()
        while len(data) > 12:  # length, its checksum, the event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                shown = value.simple_value
                if kind == "tensor":
                    shown = value.tensor.string_val[0].decode()
                found.setdefault(value.tag, {})[event.step] = shown
            data = data[16 + size :]
    return found


@pytest.mark.parametrize("given", ["directory", "writer"])
def test_tensorboard(tmp_path, given):
    library = pytest.importorskip("tensorboardX")
    events = tmp_path / "events"
    writer = events if given == "directory" else library.SummaryWriter(str(events))
    paths = train(tmp_path / "{step}", of_tensorboard.log_to(writer))
    if given == "writer":
        writer.close()
    until(lambda: 30 in events_in(events).get("checkpoint/path/text_summary", ()))
    assert events_in(events) == {
        "checkpoint/val_loss": {10: 0.5, 20: 0.75, 30: 0.25},
        "checkpoint/acc_5": {10: 1.0, 20: 2.0, 30: 3.0},
        "checkpoint/is_best": {10: 1.0, 20: 0.0, 30: 1.0},
        "checkpoint/path/text_summary": dict(zip((10, 20, 30), paths, strict=True)),
    }


def test_a_prefix_of_ones_own(tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path / "{step}", of_tensorboard.log_to(tmp_path / "events", prefix="a/b"))
    until(lambda: "a/b/val_loss" in events_in(tmp_path / "events"))


def test_what_is_no_writer():
    with pytest.raises(SettingError, match="pass a directory, or a SummaryWriter"):
        of_tensorboard.log_to(3)


# ---- MLflow --------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["active", "id"])
def test_mlflow(tmp_path, offline, given):
    library = pytest.importorskip("mlflow")
    with library.start_run() as run:
        of_run = run.info.run_id
        hook = of_mlflow.log_to(*([of_run] if given == "id" else []), files=True)
        paths = train(tmp_path / "{step}", hook)
    client = library.MlflowClient()

    def history(name):
        found = client.get_metric_history(of_run, f"checkpoint/{name}")
        return [(each.step, each.value) for each in found]

    steps = 10, 20, 30
    assert history("val_loss") == list(zip(steps, LOSSES, strict=True))
    assert history("acc_5") == list(zip(steps, [1.0, 2.0, 3.0], strict=True))
    assert history("is_best") == list(zip(steps, [1.0, 0.0, 1.0], strict=True))
    tags = client.get_run(of_run).data.tags
    assert (tags["checkpoint/path"], tags["checkpoint/best_path"]) == (paths[2],) * 2
    # What was uploaded is a checkpoint.
    copy = client.download_artifacts(of_run, "checkpoint/20", tmp_path)
    assert flaxckpt.load(copy)["w"][0] == 2


def test_mlflow_takes_no_files_from_a_store(tmp_path, offline, s3):
    library = pytest.importorskip("mlflow")
    with library.start_run() as run:
        hook = of_mlflow.log_to(files=True)
        ckpt = ModelCheckpoint(f"{s3}/{{epoch}}", on_saved=hook)
        ckpt.save({"w": np.ones(2)}, 0, logs={"val_loss": 1.0})
        with pytest.raises(HookError, match="is in an object store") as caught:
            ckpt.close()
    assert "on_saved=mlflow.log_to then failed: " in str(caught.value)
    assert "Leave out files=True: the run's tags say where" in str(caught.value)
    tags = library.MlflowClient().get_run(run.info.run_id).data.tags
    assert tags["checkpoint/path"] == f"{s3}/1"


def test_mlflow_without_a_run(offline):
    pytest.importorskip("mlflow")
    with pytest.raises(SettingError, match=r"call mlflow.start_run\(\) first, or pass"):
        of_mlflow.log_to()


# ---- Weights & Biases ----------------------------------------------------------------


def records_in(directory):
    """The records of an offline run: LevelDB's log format behind a header of W&B's."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file,) = directory.glob("wandb/offline-run-*/*.wandb")
    data, at, part, block = file.read_bytes(), 7, b"", 32768
    while at < len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield pb.Record.FromString(part)
            part = b""


def rows_in(directory):
    """The rows that a run has logged, less W&B's own columns."""
    until(lambda: any(each.HasField("exit") for each in records_in(directory)))
    rows = []
    for record in records_in(directory):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {".".join(i.nested_key) or i.key: i.value_json for i in items}
            rows.append({k: json.loads(v) for k, v in row.items() if k[0] != "_"})
    return rows


def artifacts_in(directory):
    found = [each for each in records_in(directory) if each.HasField("artifact")]
    return [each.artifact for each in found]


@pytest.mark.parametrize("given", ["begun", "run"])
def test_wandb(tmp_path, offline, given):
    library = pytest.importorskip("wandb")
    with library.init(dir=tmp_path) as run:
        hook = of_wandb.log_to(*([run] if given == "run" else []), files=True)
        paths = train(tmp_path / "{step}", hook)
        assert run.summary["checkpoint/best_path"] == paths[2]
    steps, best = (10, 20, 30), (1.0, 0.0, 1.0)
    assert rows_in(tmp_path) == [
        {
            "checkpoint/step": steps[i],
            "checkpoint/path": paths[i],
            "checkpoint/val_loss": LOSSES[i],
            "checkpoint/acc@5": i + 1.0,
            "checkpoint/is_best": best[i],
        }
        for i in range(3)
    ]
    metrics = [each.metric for each in records_in(tmp_path) if each.HasField("metric")]
    assert {each.step_metric for each in metrics if each.glob_name} == {
        "checkpoint/step"
    }
    artifacts = artifacts_in(tmp_path)
    assert [each.name for each in artifacts] == [f"checkpoint-{run.id}"] * 3
    assert [sorted(each.aliases) for each in artifacts] == [
        ["best", "latest"],
        ["latest"],
        ["best", "latest"],
    ]
    assert json.loads(artifacts[1].metadata)["logs"]["val_loss"] == 0.75
    assert "flaxckpt.json" in {each.path for each in artifacts[1].manifest.contents}


def test_wandb_in_the_rows_of_a_loop(tmp_path, offline):
    """With commit=False, nothing of a loop that logs a step in parts is refused."""
    library = pytest.importorskip("wandb")
    with library.init(dir=tmp_path) as run:
        hook = of_wandb.log_to(run, commit=False)
        with ModelCheckpoint(tmp_path / "{epoch}", on_saved=hook) as ckpt:
            for epoch in range(2):
                run.log({"loss": epoch}, step=epoch)
                ckpt.save({"w": np.ones(2)}, epoch, logs={"val_loss": 1.0})
                ckpt.wait()
                run.log({"accuracy": epoch}, step=epoch)
    rows = rows_in(tmp_path)
    assert [(row["loss"], row["accuracy"]) for row in rows] == [(0, 0), (1, 1)]
    assert [row["checkpoint/step"] for row in rows] == [1, 2]


def test_wandb_refers_to_a_store(tmp_path, offline, s3, monkeypatch):
    library = pytest.importorskip("wandb")
    monkeypatch.setenv("AWS_S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
    with library.init(dir=tmp_path) as run:
        hook = of_wandb.log_to(run, files=True)
        with ModelCheckpoint(f"{s3}/{{epoch}}", on_saved=hook) as ckpt:
            ckpt.save({"w": np.ones(2)}, 0, logs={"val_loss": float("nan")})
    assert np.isnan(rows_in(tmp_path)[0]["checkpoint/val_loss"])
    (artifact,) = artifacts_in(tmp_path)
    (entry,) = artifact.manifest.contents
    assert entry.ref == f"{s3}/1"


def test_wandb_without_a_run(offline):
    pytest.importorskip("wandb")
    with pytest.raises(SettingError, match=r"call wandb.init\(\) first, or pass its"):
        of_wandb.log_to()


# ---- none of them installed ----------------------------------------------------------


def test_a_missing_library_is_named_with_its_extra():
    code = """
        import sys
        sys.modules.update(dict.fromkeys(["tensorboardX", "mlflow", "wandb"]))
        import flaxckpt
        from flaxckpt.integrations import mlflow, tensorboard, wandb
        for make in (lambda: tensorboard.log_to("x"), mlflow.log_to, wandb.log_to):
            try:
                make()
            except ModuleNotFoundError as error:
                print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines() == [
        f"flaxckpt.integrations.{extra} needs {library}, which is not installed. In a "
        f"clone of flaxckpt: pip install '.[{extra}]'"
        for extra, library in [
            ("tensorboard", "tensorboardX"),
            ("mlflow", "mlflow"),
            ("wandb", "wandb"),
        ]
    ]
