"""What does a training loop pay in a step where nothing is due?

`ModelCheckpoint.update`, with logs on the host and with logs that are device arrays,
beside Keras's callback and the `should_save` of Orbax's two managers.
"""

import os
import tempfile
import timeit

os.environ["KERAS_BACKEND"] = "jax"

import absl.logging
import harness
import jax.numpy as jnp
import keras
import numpy as np
import orbax.checkpoint as v0
from orbax.checkpoint import v1

import flaxckpt

absl.logging.set_verbosity(absl.logging.ERROR)
NEVER = 2**30


def main() -> None:
    options = harness.arguments(__doc__)
    calls = 2_000 if options.quick else 20_000
    root = tempfile.mkdtemp()
    tree = {"w": jnp.ones(8)}
    host, device = {"loss": 0.5}, {"loss": jnp.float32(0.5)}

    def ours(logs, save_freq):
        ckpt = flaxckpt.ModelCheckpoint(f"{root}/ours", save_freq=save_freq)
        state = ckpt.init()
        batch = 0

        def call():
            nonlocal state, batch
            state = ckpt.update(state, tree, logs, 0, batch)
            batch += 1

        return call

    def step():
        state = flaxckpt.CheckpointState.create("loss", save_freq=NEVER)
        batch = 0

        def call():
            nonlocal state, batch
            state, _ = flaxckpt.step(state, host, 0, batch)
            batch += 1

        return call

    def of_keras():
        callback = keras.callbacks.ModelCheckpoint(f"{root}/k.keras", save_freq=NEVER)
        callback.on_epoch_begin(0)
        batch = 0

        def call():
            nonlocal batch
            callback.on_train_batch_end(batch, host)
            batch += 1

        return call

    v0_manager = v0.CheckpointManager(
        f"{root}/v0", options=v0.CheckpointManagerOptions(save_interval_steps=NEVER)
    )
    v0_manager.save(0, args=v0.args.StandardSave({"w": np.ones(1)}))
    v0_manager.wait_until_finished()
    v1_manager = v1.training.Checkpointer(
        f"{root}/v1",
        save_decision_policy=v1.training.save_decision_policies.FixedIntervalPolicy(
            NEVER
        ),
    )
    v1_manager.save(0, {"w": np.ones(1)})
    candidates = {
        "flaxckpt update, host logs": ours(host, NEVER),
        "flaxckpt update, device logs": ours(device, NEVER),
        'flaxckpt update, save_freq="epoch"': ours(device, "epoch"),
        "flaxckpt step alone": step(),
        "Keras ModelCheckpoint": of_keras(),
        "Orbax v0 CheckpointManager.should_save": lambda: v0_manager.should_save(7),
        "Orbax v1 Checkpointer.should_save": lambda: v1_manager.should_save(7),
    }

    def timed(call):
        def measure():
            times = timeit.repeat(call, number=calls // 20, repeat=20)
            return sorted(times)[10] / (calls // 20) * 1e6

        return measure

    results = harness.rounds(
        {name: timed(call) for name, call in candidates.items()}, options.rounds
    )
    harness.report("A step in which nothing is due", "µs a call", results, options.json)
    v0_manager.close()
    v1_manager.close()


if __name__ == "__main__":
    main()
