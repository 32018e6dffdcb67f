"""Train PPO policies of three seeds in one jitted program, which saves them together.

    python examples/ppo.py [DIRECTORY]

Kill it, run it again with the same directory, and it ends with the same digest.
"""

import sys
import tempfile
from hashlib import sha256

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree

import flaxckpt

SEEDS, UPDATES, STEPS, ENVS, PASSES, BATCHES, LIMIT = 3, 30, 128, 32, 4, 4, 500
REWARD, RATE, GAMMA, LAMBDA, CLIP = 0.1, 3e-3, 0.99, 0.95, 0.2


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, x):
        actor, critic = (nn.tanh(nn.Dense(64)(nn.tanh(nn.Dense(64)(x)))) for _ in "ac")
        return nn.log_softmax(nn.Dense(2)(actor)), nn.Dense(1)(critic)[..., 0]


class Training(TrainState):
    key: jax.Array
    envs: jax.Array  # of each: position, velocity, angle, angular velocity, steps


def begin(key):  # an episode of CartPole in each environment
    return jax.random.uniform(key, (ENVS, 5), jnp.float32, -0.05, 0.05).at[:, 4].set(0)


def move(env, action):
    """Push the cart for a fiftieth of a second; return whether the pole has fallen."""
    _, v, angle, spin, _ = env
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    push = (20.0 * action - 10.0 + 0.05 * spin**2 * sin) / 1.1  # cart 1 kg, pole 0.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    pull = push - 0.05 * turn * cos / 1.1
    env = env + jnp.stack([0.02 * v, 0.02 * pull, 0.02 * spin, 0.02 * turn, 1.0])
    return env, (jnp.abs(env[0]) > 2.4) | (jnp.abs(env[2]) > jnp.deg2rad(12))


def play(train, key):  # where an episode ends, the next one begins
    def body(envs, key):
        scores, value = train.apply_fn({"params": train.params}, envs[:, :4])
        action = jax.random.categorical(key, scores)
        score = jnp.take_along_axis(scores, action[:, None], 1)
        after, fell = jax.vmap(move)(envs, action)
        ended = fell | (after[:, 4] >= LIMIT)
        now = (envs[:, :4], action[:, None], score, value, after, fell, ended)
        return jnp.where(ended[:, None], begin(jax.random.fold_in(key, 1)), after), now

    return jax.lax.scan(body, train.envs, jax.random.split(key, STEPS))


def loss_of(params, train, seen, action, score, gain, target):
    scores, value = train.apply_fn({"params": params}, seen)
    ratio = jnp.exp(jnp.take_along_axis(scores, action, 1) - score)[:, 0]
    gain = jax.nn.standardize(gain)
    policy = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * gain)
    return jnp.mean(0.5 * (value - target) ** 2 - policy)


def update(train):
    """Play and learn; return the mean return of the episodes that ended (NaN: none)."""
    key, play_key, order_key = jax.random.split(train.key, 3)
    envs, (seen, action, score, value, after, fell, ended) = play(train, play_key)
    following = train.apply_fn({"params": train.params}, after[..., :4])[1]
    errors = REWARD + GAMMA * jnp.where(fell, 0.0, following) - value

    def back(gain, now):  # generalized advantage estimation
        gain = now[0] + GAMMA * LAMBDA * jnp.where(now[1], 0.0, gain)
        return gain, gain

    _, gain = jax.lax.scan(back, jnp.zeros(ENVS), (errors, ended), reverse=True)
    data = [jnp.concatenate(x) for x in (seen, action, score, gain, gain + value)]

    def learn(train, rows):
        grads = jax.grad(loss_of)(train.params, train, *(x[rows] for x in data))
        return train.apply_gradients(grads=grads), None

    orders = jax.random.uniform(order_key, (PASSES, STEPS * ENVS)).argsort(axis=1)
    train, _ = jax.lax.scan(learn, train, orders.reshape(PASSES * BATCHES, -1))
    return train.replace(key=key, envs=envs), jnp.mean(after[..., 4], where=ended)


def init(key):
    model, (key, params_key, envs_key) = ActorCritic(), jax.random.split(key, 3)
    params = model.init(params_key, jnp.zeros(4))["params"]
    tx = optax.adam(optax.linear_schedule(RATE, 0, UPDATES * PASSES * BATCHES))
    more = {"key": key, "envs": begin(envs_key)}
    return Training.create(apply_fn=model.apply, params=params, tx=tx, **more)


def main(directory):
    trains = jax.jit(jax.vmap(init))(jax.random.split(jax.random.key(30), SEEDS))
    with flaxckpt.ModelCheckpoint(f"{directory}/{{step}}", save_freq=5) as ckpt:
        trains, state, start = ckpt.resume(trains)
        print("new" if start.is_new else "resumed", "at step", start)
        steps = jnp.arange(start, UPDATES + 1)

        def make_updates(train):
            def body(carry, i):
                train, state = carry
                train, returned = update(train)
                logs = {"episodic_return": jax.lax.pmean(returned, "seed")}  # of all
                return (train, ckpt.update(state, train, logs, step=i)), returned

            (train, _), returns = jax.lax.scan(body, (train, state), steps)
            return train, returns

        trains, returns = jax.jit(jax.vmap(make_updates, axis_name="seed"))(trains)

    for i, returned in zip(steps, returns.mean(axis=0), strict=True):
        print(f"step {i}: episodic_return {returned:.0f}")
    print("digest:", sha256(ravel_pytree(trains.params)[0].tobytes()).hexdigest())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(*sys.argv[1:] or [temporary])
