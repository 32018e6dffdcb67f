"""Train a policy by PPO in one jitted scan, which keeps its best on disk as it goes.

    python examples/ppo.py [DIRECTORY]

Kill it, run it again with the same directory, and it goes on from what is on disk.
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import flaxckpt

UPDATES, STEPS, ENVS, PASSES, BATCHES, LIMIT = 60, 128, 32, 4, 4, 500
REWARD, RATE, GAMMA, LAMBDA, CLIP = 0.1, 3e-3, 0.99, 0.95, 0.2


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, x):
        actor, critic = (nn.tanh(nn.Dense(64)(nn.tanh(nn.Dense(64)(x)))) for _ in "ac")
        return nn.log_softmax(nn.Dense(2)(actor)), nn.Dense(1)(critic)[..., 0]


class Training(TrainState):
    envs: jax.Array  # of each: position, velocity, angle, angular velocity, steps


def begin(key):
    """Begin an episode of CartPole in each environment."""
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


def play(train, key, steps):
    """Act in all environments; where an episode ends, the next one begins."""

    def body(envs, key):
        scores, value = train.apply_fn({"params": train.params}, envs[:, :4])
        action = jax.random.categorical(key, scores)
        score = jnp.take_along_axis(scores, action[:, None], 1)
        after, fell = jax.vmap(move)(envs, action)
        ended = fell | (after[:, 4] >= LIMIT)
        now = (envs[:, :4], action[:, None], score, value, after, fell, ended)
        return jnp.where(ended[:, None], begin(jax.random.fold_in(key, 1)), after), now

    return jax.lax.scan(body, train.envs, jax.random.split(key, steps))


def loss_of(params, train, seen, action, score, gain, target):
    scores, value = train.apply_fn({"params": params}, seen)
    ratio = jnp.exp(jnp.take_along_axis(scores, action, 1) - score)[:, 0]
    gain = jax.nn.standardize(gain)
    policy = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * gain)
    return jnp.mean(0.5 * (value - target) ** 2 - policy)


def update(train, key):
    """Play and learn; return the mean return of the episodes that ended (NaN: none)."""
    key, order_key = jax.random.split(key)
    envs, (seen, action, score, value, after, fell, ended) = play(train, key, STEPS)
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
    return train.replace(envs=envs), jnp.sum(after[..., 4], where=ended) / ended.sum()


def main(directory):
    model, key = ActorCritic(), jax.random.key(0)
    params = model.init(key, jnp.zeros(4))["params"]
    tx = optax.adam(optax.linear_schedule(RATE, 0, UPDATES * PASSES * BATCHES))
    fresh = Training.create(apply_fn=model.apply, params=params, tx=tx, envs=begin(key))
    train = fresh = fresh.replace(step=jnp.int32(0))  # a fixed dtype, for the scan

    with flaxckpt.ModelCheckpoint(  # keeps the best, and the newest to go on from
        f"{directory}/best", "episodic_return", save_best_only=True, save_last=True
    ) as ckpt:

        def body(carry, epoch):
            train, returned = update(carry[0], jax.random.fold_in(key, epoch))
            logs = {"episodic_return": returned}
            return (train, ckpt.update(carry[1], train, logs, epoch)), returned

        train, state, first = ckpt.resume(train)
        if first:
            print(f"resumed after epoch {first}")
        run = jax.jit(jax.lax.scan, static_argnums=0)  # all updates, one program
        returns = run(body, (train, state), jnp.arange(first, UPDATES))[1]

    for epoch in range(first, UPDATES, 10):
        print(f"epoch {epoch + 1}: episodic_return {returns[epoch - first]:.0f}")
    best = fresh.replace(params=flaxckpt.load_weights(ckpt.best.path)["params"])
    ended = play(best, key, LIMIT)[1][-1]
    balanced = jnp.mean(ended.argmax(axis=0) + 1)  # how long the first episodes are
    print(f"the best, restored, balances for {balanced:.0f} of {LIMIT} steps")
    assert balanced > 400


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(*sys.argv[1:] or [temporary])
