"""The peer of throughput.py: SMAX of `jaxmarl` under a random policy, asked line by line on standard input.

Runs in an interpreter that has jaxmarl (docs/benchmark.md), knows nothing of this repository, and answers
"build MAP GAMES" with "ready" and "turn SECONDS" with environment steps per second. The whole of a rollout
(policy, step, masks, auto-reset) is one jitted scan over a vmapped batch: SMAX at its fastest.
"""

import argparse
import os
import sys
import time

import jax
import jax.numpy as jnp
import jaxmarl
from jaxmarl.environments.smax import map_name_to_scenario

STEPS = 100  # steps of one call, about two random games


def build(map_name, num_envs):
    """A jitted function (state, key) -> (state, key, checksum) that plays STEPS steps of `num_envs` games."""
    env = jaxmarl.make("HeuristicEnemySMAX", scenario=map_name_to_scenario(map_name))

    def step(carry, _):
        states, key = carry
        key, key_actions, key_step = jax.random.split(key, 3)
        avail = jax.vmap(env.get_avail_actions)(states)
        avail = jnp.stack([avail[agent] for agent in env.agents], 1)  # (B, N, A)
        actions = (jax.random.uniform(key_actions, avail.shape) + avail).argmax(-1)  # (B, N)
        actions = {agent: actions[:, i] for i, agent in enumerate(env.agents)}
        obs, states, rewards, dones, _ = jax.vmap(env.step)(
            jax.random.split(key_step, num_envs), states, actions
        )
        # a number that needs every output, or the compiler would leave out observations and state
        checksum = sum(x.sum() for x in [*obs.values(), *rewards.values(), dones["__all__"]])
        return (states, key), checksum

    @jax.jit
    def rollout(states, key):
        (states, key), checksums = jax.lax.scan(step, (states, key), None, length=STEPS)
        return states, key, checksums.sum()

    _, states = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(0), num_envs))
    return rollout, states, jax.random.PRNGKey(1)


def answer(text):
    """A line for throughput.py, which passes over lines without the mark."""
    print(f"> {text}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=["smax"], required=True)
    parser.add_argument("--threads", type=int, required=True, help="processor cores to use")
    threads = parser.parse_args().threads
    if hasattr(os, "sched_setaffinity"):  # Linux; before the first use of jax, which counts the cores then
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    answer(f"SMAX of jaxmarl {jaxmarl.__version__} on jax {jax.__version__} ({jax.default_backend()})")
    for line in sys.stdin:
        word, *values = line.split()
        if word == "build":
            num_envs = int(values[1])
            rollout, states, key = build(values[0].lower(), num_envs)
            for _ in range(2):  # compiles, twice as the types of a reset differ; brings games out of step
                states, key, _ = jax.block_until_ready(rollout(states, key))
            answer("ready")
        else:
            steps, start = 0, time.perf_counter()
            while (spent := time.perf_counter() - start) < float(values[0]):
                states, key, _ = jax.block_until_ready(rollout(states, key))
                steps += STEPS
            answer(steps * num_envs / spent)


if __name__ == "__main__":
    main()
