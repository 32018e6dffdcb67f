"""Train a small transformer on bytes of Python's library, by global steps, from Grain.

    python examples/transformer.py [DIRECTORY]

The iterator is a leaf of the tree, so each checkpoint has its position in the data.
Kill it, run it again with the same directory, and it ends with the same digest.
"""

import argparse
import functools
import inspect
import sys
import tempfile
from hashlib import sha256

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree

import flaxckpt

STEPS, SAVE_EVERY, PRINT_EVERY = 150, 25, 25
BATCH, CONTEXT, LAYERS, HEADS, WIDTH, VOCABULARY = 16, 64, 2, 4, 64, 128


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0])
        attend = nn.MultiHeadDotProductAttention(HEADS, use_bias=False)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH)
        position = nn.Embed(CONTEXT, WIDTH)(jnp.arange(tokens.shape[-1]))
        x = embed(tokens) + position
        for _ in range(LAYERS):
            x = Block()(x)
        return embed.attend(nn.LayerNorm()(x))


def get_batches():
    """Return a Grain iterator over batches of token sequences, shuffled each epoch."""
    text = inspect.getsource(argparse).encode("ascii", "replace")
    size = CONTEXT + 1
    rows = np.frombuffer(text, np.uint8)[: len(text) // size * size].reshape(-1, size)
    data = grain.MapDataset.source(rows).seed(0).shuffle().repeat().batch(BATCH)
    return iter(data.to_iter_dataset())


@jax.jit
def init_train_state(key):
    model = Transformer()
    params = model.init(key, jnp.zeros((1, CONTEXT), jnp.int32))["params"]
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, STEPS // 10, STEPS)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@functools.partial(jax.jit, donate_argnames="train")
def train_step(train, rows):
    tokens, targets = rows[:, :-1].astype(int), rows[:, 1:].astype(int)

    def loss_of(params):
        logits = train.apply_fn({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    loss, grads = jax.value_and_grad(loss_of)(train.params)
    return train.apply_gradients(grads=grads), loss


def main(directory):
    train, batches = init_train_state(jax.random.key(0)), get_batches()
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{step}}", "loss", save_freq=SAVE_EVERY, max_to_keep=2
    ) as ckpt:
        (train, batches), state, start = ckpt.resume((train, batches))
        print("new" if start.is_new else "resumed", "at step", start)
        for i in range(start, STEPS + 1):
            train, loss = train_step(train, next(batches))
            state = ckpt.update(state, (train, batches), {"loss": loss}, step=i)
            if i % PRINT_EVERY == 0:
                print(f"step {i}: loss {loss:.3f}")

    print("digest:", sha256(ravel_pytree(train.params)[0].tobytes()).hexdigest())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(*sys.argv[1:] or [temporary])
