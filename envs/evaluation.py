"""One episode of every game, played by a policy: what training prints and draws, and play.py too."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from envs.base import NO_LIMIT

SEED = 1_000_000
STEPS = 10_000  # of an evaluation at most, where games have no known limit


@torch.no_grad()
def evaluate(env, policy, video=None, stop=None):
    """Means over one episode of every game, always the same games; `video`: path of a GIF of game 0.

    `policy(obs, avail_actions, memory)` gives actions, as step() takes them for obs (B, N, O), and the memory
    for its next call, None at first. Once something is in the list `stop`, nothing is returned; a game that
    breaks, or a GIF that cannot be written, puts its error there, or raises it where no list is given. A game
    without end counts as far as it went in STEPS steps.
    """
    try:
        return _evaluate(env, policy, video, stop)
    except (OSError, RuntimeError) as error:
        if stop is None:
            raise
        stop.append(error)
        return {}


def _evaluate(env, policy, video, stop):
    obs, _ = env.reset(seed=SEED, options={"evaluation": True})
    running = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)  # (B,)
    counted, memory, results, frames = running, None, {}, []
    for _ in range(STEPS if env.episode_limit >= NO_LIMIT else env.episode_limit):
        if stop:
            return {}
        actions, memory = policy(obs, env.avail_actions(), memory)
        obs, _, terminated, truncated, info = env.step(actions)
        if video and running[0]:
            frames.append(Image.fromarray(np.asarray(env.render())))
        for name, value in info["episode"].items():
            results[name] = torch.where(running, value, results.get(name, value))  # (B,)
        counted = counted & ~(running & info["broken"])
        running = running & ~(terminated | truncated)
        if not running.any():
            break
    if video:
        new = Path(f"{video}.tmp")
        try:
            frames[0].save(new, "GIF", save_all=True, append_images=frames[1:], duration=125, loop=0)
            new.replace(video)
        finally:
            new.unlink(missing_ok=True)
    if not counted.any():  # every game broke
        return {}
    return {name: value[counted].double().mean().item() for name, value in results.items()}
