"""Train a variational autoencoder whose NNX model and optimizer are globals, by epochs.

    python examples/nnx_vae.py [DIRECTORY]

`resume` puts what is on disk into the globals themselves. Kill it, run it again with
the same directory, and it ends with the same digest.
"""

import sys
import tempfile
from hashlib import sha256

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import flaxckpt

EPOCHS, BATCH, HIDDEN, LATENT = 20, 64, 256, 16
IMAGES = load_digits().data.astype(np.float32) / 16


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, HIDDEN, rngs=rngs)
        self.mean = nnx.Linear(HIDDEN, LATENT, rngs=rngs)
        self.deviation = nnx.Linear(HIDDEN, LATENT, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        x = nnx.relu(self.hidden(x))
        mean, deviation = self.mean(x), jnp.exp(self.deviation(x))
        noise = jax.random.normal(self.rngs.noise(), mean.shape)
        return mean + deviation * noise, mean, deviation


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(LATENT, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, 64, rngs=rngs)

    def __call__(self, z):
        return self.out(nnx.relu(self.hidden(z)))


class VAE(nnx.Module):
    def __init__(self, rngs):
        self.encoder = Encoder(rngs)
        self.decoder = Decoder(rngs)

    def __call__(self, x):
        z, mean, deviation = self.encoder(x)
        return self.decoder(z), mean, deviation


model = VAE(nnx.Rngs(0, noise=1))
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
rng = np.random.default_rng(42)


@nnx.jit
def train_step(model, optimizer, x):
    def loss_of(model):
        logits, mean, deviation = model(x)
        spread = mean**2 + deviation**2 - 1 - 2 * jnp.log(deviation)
        rebuilt = optax.sigmoid_binary_cross_entropy(logits, x).sum(axis=-1)
        return jnp.mean(rebuilt + 0.5 * spread.sum(axis=-1))

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def train(directory):
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch:02d}}", "loss", max_to_keep=2
    ) as ckpt:
        _, state, start = ckpt.resume((model, optimizer, rng))  # in place
        print("new" if start.is_new else "resumed", "at epoch", start + 1)
        for epoch in range(start, EPOCHS):
            order = rng.permutation(len(IMAGES) // BATCH * BATCH)
            losses = [
                train_step(model, optimizer, IMAGES[rows])
                for rows in order.reshape(-1, BATCH)
            ]
            loss = np.mean(losses)
            state = ckpt.update(state, (model, optimizer, rng), {"loss": loss}, epoch)
            print(f"epoch {epoch + 1}: loss {loss:.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        train(*sys.argv[1:] or [temporary])
    flat = ravel_pytree(nnx.state(model, nnx.Param))[0]
    print("digest:", sha256(flat.tobytes()).hexdigest())
