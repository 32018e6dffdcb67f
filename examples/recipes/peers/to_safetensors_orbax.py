"""Export a checkpoint to safetensors, and load it with `safetensors.flax`.

    python examples/recipes/peers/to_safetensors_orbax.py [DIRECTORY]

The same as ../to_safetensors.py with Orbax's v1, flax and safetensors. Nobody compares
what is exported with what was saved.
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp
from safetensors.flax import load_file, save_file

X = jax.random.normal(jax.random.key(0), (8, 4))


def main(directory):
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(1)])
    variables = model.init(jax.random.key(1), X)
    train = TrainState.create(apply_fn=model.apply, tx=optax.adam(1e-3), **variables)
    ocp.save(f"{directory}/run", train)

    params = ocp.load(f"{directory}/run")["params"]
    flat = flatten_dict({"params": params}, sep=".")
    file = f"{directory}/model.safetensors"
    save_file(flat, file)

    arrays = load_file(file)
    print("in the file:", *sorted(arrays))
    loaded = unflatten_dict(arrays, sep=".")
    same = jnp.array_equal(model.apply(loaded, X), model.apply(variables, X))
    print("the same predictions:", same)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(*sys.argv[1:] or [temporary])
