"""Fit a neural ODE with Equinox in two phases: short series first, then whole ones.

    python examples/neural_ode.py [DIRECTORY]

Each phase has its own optimizer and its own checkpoints. Kill it in either phase, run
it again with the same directory, and it ends with the same digest.
"""

import sys
import tempfile
from hashlib import sha256

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.flatten_util import ravel_pytree

import flaxckpt

PHASES = [(200, 0.1, 3e-3), (200, 1.0, 1e-3)]  # steps, part of each series, rate
SERIES, LENGTH, BATCH, SAVE_EVERY, PRINT_EVERY = 256, 100, 32, 40, 50


class NeuralODE(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(2, 2, 32, 2, activation=jax.nn.softplus, key=key)

    def __call__(self, times, y0):
        return solve(self.mlp, times, y0)


def solve(f, times, y0):
    """Solve dy/dt = f(y) by the classic Runge-Kutta method."""

    def body(y, h):
        k1 = f(y)
        k2 = f(y + h / 2 * k1)
        k3 = f(y + h / 2 * k2)
        k4 = f(y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y, y

    return jnp.concatenate([y0[None], jax.lax.scan(body, y0, jnp.diff(times))[1]])


def get_data(key):
    """Return times, and series of nonlinear oscillators at these times."""

    def oscillator(y):
        x = y / (1 + y)
        return jnp.stack([x[1], -x[0]])

    times = jnp.linspace(0, 10, LENGTH)
    starts = jr.uniform(key, (SERIES, 2), minval=-0.6, maxval=1)
    return times, jax.vmap(solve, in_axes=(None, None, 0))(oscillator, times, starts)


def dataloader(series, key):
    while True:
        key, now = jr.split(key)
        yield from jr.permutation(now, series).reshape(-1, BATCH, *series.shape[1:])


@eqx.filter_value_and_grad
def grad_loss(model, times, series):
    predicted = jax.vmap(model, in_axes=(None, 0))(times, series[:, 0])
    return jnp.mean((series - predicted) ** 2)


@eqx.filter_jit
def make_step(times, series, model, optim, moments):
    loss, grads = grad_loss(model, times, series)
    updates, moments = optim.update(grads, moments)
    return loss, eqx.apply_updates(model, updates), moments


def main(directory):
    data_key, model_key, loader_key = jr.split(jr.key(5678), 3)
    times, series = get_data(data_key)
    model = NeuralODE(model_key)

    for phase, (steps, part, rate) in enumerate(PHASES, 1):
        size = int(LENGTH * part)
        batches = dataloader(series[:, :size], loader_key)
        optim = optax.adabelief(rate)
        moments = optim.init(eqx.filter(model, eqx.is_inexact_array))
        with flaxckpt.ModelCheckpoint(
            f"{directory}/{phase}/{{step}}", "loss", save_freq=SAVE_EVERY, max_to_keep=2
        ) as ckpt:
            (model, moments), state, start = ckpt.resume((model, moments), data=batches)
            print(f"phase {phase}:", "new" if start.is_new else f"resumed at {start}")
            for step in range(start, steps + 1):
                batch = next(batches)
                loss, model, moments = make_step(
                    times[:size], batch, model, optim, moments
                )
                state = ckpt.update(state, (model, moments), {"loss": loss}, step=step)
                if step % PRINT_EVERY == 0:
                    print(f"phase {phase}, step {step}: loss {loss:.5f}")

    flat = ravel_pytree(eqx.filter(model, eqx.is_array))[0]
    print("digest:", sha256(flat.tobytes()).hexdigest())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(*sys.argv[1:] or [temporary])
