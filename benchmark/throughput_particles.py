"""The peers of throughput.py on particle tasks: simple_spread of `mpe2` or `vmas`, 5 agents, random forces.

Runs in an interpreter that has the package (docs/benchmark.md), knows nothing of this repository, and answers
"build TASK GAMES" with "ready" and "turn SECONDS" with environment steps per second. Episodes have 25 steps.
mpe2 has no batch: it plays one game, whatever is asked for. The games of vmas end together and are reset
together, which is the fastest way to do it.
"""

import argparse
import importlib.metadata
import os
import sys
import time

N_AGENTS, LIMIT = 5, 25
STEPS = 25  # between two looks at the clock


def mpe2_player(num_envs):
    """A function that plays STEPS steps, and how many games it plays."""
    import numpy as np
    from mpe2 import simple_spread_v3

    env = simple_spread_v3.parallel_env(N=N_AGENTS, max_cycles=LIMIT, continuous_actions=True)
    env.reset(seed=0)
    generator = np.random.default_rng(0)

    def play():
        for _ in range(STEPS):
            actions = generator.random((N_AGENTS, 5), np.float32)  # nothing, left, right, down, up
            env.step(dict(zip(env.agents, actions, strict=True)))
            env.state()
            if not env.agents:
                env.reset()

    return play, 1


def vmas_player(num_envs):
    """A function that plays STEPS steps, and how many games it plays."""
    import torch
    import vmas

    env = vmas.make_env("simple_spread", num_envs, "cpu", max_steps=LIMIT, seed=0, n_agents=N_AGENTS)
    env.reset()

    def play():
        for _ in range(STEPS):
            actions = 2 * torch.rand(N_AGENTS, num_envs, 2) - 1
            _, _, done, _ = env.step(list(actions))
            if done.all():
                env.reset()

    return torch.no_grad()(play), num_envs


def answer(text):
    """A line for throughput.py, which passes over lines without the mark."""
    print(f"> {text}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=["mpe2", "vmas"], required=True)
    parser.add_argument("--threads", type=int, required=True, help="processor cores to use")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    about = f"simple_spread of {args.peer} {importlib.metadata.version(args.peer)}"
    if args.peer == "vmas":
        import torch

        torch.set_num_threads(args.threads)
        about += f" on torch {torch.__version__}"
    answer(about)
    for line in sys.stdin:
        word, *values = line.split()
        if word == "build":
            play, games = {"mpe2": mpe2_player, "vmas": vmas_player}[args.peer](int(values[1]))
            play()
            answer("ready")
        else:
            steps, start = 0, time.perf_counter()
            while (spent := time.perf_counter() - start) < float(values[0]):
                play()
                steps += STEPS
            answer(steps * games / spent)


if __name__ == "__main__":
    main()
