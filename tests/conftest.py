"""What holds for all tests: devices, strict promotion, Hypothesis, and no known form."""

import gc
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["KERAS_BACKEND"] = "jax"

import absl.logging
import hypothesis
import jax
import pytest

absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs what it also raises
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile(
    "flaxckpt",
    deadline=None,  # the first example compiles
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("flaxckpt")

pytest_plugins = ["object_stores"]


if "FLAXCKPT_TEST_ENGINE" in os.environ:  # orbax: the direct way is off
    from flaxckpt import ModelCheckpoint

    ModelCheckpoint.__init__.__kwdefaults__["engine"] = os.environ[
        "FLAXCKPT_TEST_ENGINE"
    ]


@pytest.fixture(autouse=True)
def _no_known_form():
    """Have Orbax write each test's first tree, as in a new process."""
    from flaxckpt._direct.forms import shared_forms

    shared_forms.cache_clear()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Have MLflow and Weights & Biases log into files below `tmp_path`."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))


@pytest.fixture(scope="module")
def none_left_behind():
    """Have tasks that Orbax leaves behind end with their file.

    In the test of another file they would be errors.
    """
    yield
    gc.collect()
