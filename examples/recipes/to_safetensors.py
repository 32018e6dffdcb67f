"""Export a checkpoint to safetensors, and load it with `safetensors.flax`.

    python examples/recipes/to_safetensors.py [DIRECTORY]

The checkpoint has a whole training state. The file has the weights alone, under their
names joined by dots.
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from flax.traverse_util import unflatten_dict
from safetensors.flax import load_file

import flaxckpt

X = jax.random.normal(jax.random.key(0), (8, 4))


def main(directory):
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(1)])
    variables = model.init(jax.random.key(1), X)
    train = TrainState.create(apply_fn=model.apply, tx=optax.adam(1e-3), **variables)
    with flaxckpt.ModelCheckpoint(f"{directory}/run") as ckpt:
        path = ckpt.save(train, epoch=0)

    file = flaxckpt.export(path, f"{directory}/model.safetensors")

    arrays = load_file(file)
    print("in the file:", *sorted(arrays))
    loaded = unflatten_dict(arrays, sep=".")
    same = jnp.array_equal(model.apply(loaded, X), model.apply(variables, X))
    print("the same predictions:", same)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(*sys.argv[1:] or [temporary])
