"""Real object stores, in processes of their own, for tests."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest

BUCKET = "bucket"


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def running(command, url):
    """Run a server until it answers, and as long as it is needed."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while not _answers(url):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def _answers(url):
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def environment(**values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def s3_server():
    """Run moto's S3, with a bucket; yield the process."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    settings = {
        "AWS_ACCESS_KEY_ID": "some",
        "AWS_SECRET_ACCESS_KEY": "thing",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    }
    with running(command, url) as process, environment(**settings):
        request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        yield process


@pytest.fixture(scope="session")
def _s3():
    with s3_server():
        yield


@pytest.fixture(scope="session")
def _gs():
    """Run a server, and yield where it is; see gcs_server.py."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(__file__).with_name("gcs_server.py")), str(port)]
    settings = {
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "some",
    }
    with running(command, url), environment(**settings):
        yield url


@pytest.fixture
def s3(_s3):
    """The URL of a directory on an S3 server, in which nothing is."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def gs(_gs):
    """The URL of one on a server of Google Cloud Storage's protocol."""
    bucket = f"b{uuid.uuid4().hex}"
    body = json.dumps({"name": bucket}).encode()
    settings = {"Content-Type": "application/json"}
    where = f"{_gs}/storage/v1/b?project=some"
    urllib.request.urlopen(urllib.request.Request(where, body, settings)).close()
    return f"gs://{bucket}/some/where"


@pytest.fixture(params=["s3", "gs"])
def url(request):
    """The URL of one, on either."""
    return request.getfixturevalue(request.param)
