"""Train in several processes, each of which writes its shards, and resume.

    python examples/multihost.py [DIRECTORY]

starts two processes on this machine. On a pod or a cluster whose number of devices
divides 64 start one for each machine or GPU, with a directory that all of them see or a
`gs://` or `s3://` URL; `jax.distributed.initialize` knows who is who:

    srun python examples/multihost.py --pod /shared/runs      # under Slurm
    python examples/multihost.py --pod gs://bucket/runs       # on each TPU host
"""

import os
import socket
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import flaxckpt

EPOCHS = 4
PROCESSES = 2


def main(directory):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    optimizer = optax.adam(0.01)

    def fresh():
        params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
        return {"params": params, "moments": optimizer.init(params)}

    # The weights in shards, all else in each device.
    like = jax.eval_shape(fresh)
    shardings = jax.tree.map(lambda x: rows if x.ndim == 2 else everywhere, like)
    train = jax.jit(fresh, out_shardings=shardings)()

    def loss_of(params, images, labels):
        logits = images @ params["w"] + params["b"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    @jax.jit
    def step(train, images, labels):
        loss, grads = jax.value_and_grad(loss_of)(train["params"], images, labels)
        updates, moments = optimizer.update(grads, train["moments"], train["params"])
        params = optax.apply_updates(train["params"], updates)
        return {"params": params, "moments": moments}, loss

    @jax.jit
    def accuracy(params, images, labels):
        return jnp.mean((images @ params["w"] + params["b"]).argmax(-1) == labels)

    def placed(chosen):
        """Place images and labels; each process passes its own."""
        size = len(chosen) // jax.process_count()
        own = chosen[jax.process_index() * size :][:size]
        put = jax.make_array_from_process_local_data
        return put(rows, images[own]), put(rows, labels[own])

    tell = print if jax.process_index() == 0 else lambda *_, **__: None
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch:02d}}", "val_accuracy", max_to_keep=2
    ) as ckpt:
        train, state, start = ckpt.resume(train)
        if start:
            tell(f"resumed after epoch {start}", flush=True)
        for epoch in range(start, EPOCHS):
            order = np.random.default_rng(epoch).permutation(1472) + 320
            for batch in order.reshape(-1, 64):
                train, loss = step(train, *placed(batch))
            val_accuracy = accuracy(train["params"], *placed(np.arange(320)))
            logs = {"loss": loss, "val_accuracy": val_accuracy}
            state = ckpt.update(state, train, logs, epoch)
            tell(f"epoch {epoch + 1}: val_accuracy {val_accuracy:.3f}", flush=True)
        ckpt.wait()
        tell(f"best: epoch {ckpt.best.epoch + 1}", flush=True)


def start_here(directory):
    """Start several processes of this program on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = []
    for index in range(PROCESSES):
        environment = {**os.environ, "FLAXCKPT_EXAMPLE": f"{address} {index}"}
        command = [sys.executable, __file__, directory]
        running.append(subprocess.Popen(command, env=environment))
    assert [process.wait(300) for process in running] == [0] * PROCESSES


if __name__ == "__main__":
    if "FLAXCKPT_EXAMPLE" in os.environ:
        address, index = os.environ["FLAXCKPT_EXAMPLE"].split()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 2)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, PROCESSES, int(index))
        main(sys.argv[1])
    elif "--pod" in sys.argv:
        jax.distributed.initialize()
        main(sys.argv[2])
    elif len(sys.argv) > 1:
        start_here(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            start_here(temporary)
