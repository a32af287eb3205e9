"""The stateless game of section 3.1 of [DOP] on the "centralized-decentralized mismatch" (CDM).

All agents choose the first of their actions: +10 for the team. Any other joint action: -10.
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021.

In [DOP] all algorithms "explored the optimal strategy" of 10 agents with 10 actions, which uniform play hits
once in 10^10 steps, and how is not told. So we had to choose how, the same way for every algorithm. Two
arguments of the environment, both off by default:
- `guided_share` of the first `guided_steps` games are played at the optimum instead of as asked for;
- `first_action` is the probability of the first action in the policies that training starts from.
"""

import math

import numpy as np
import torch
from gymnasium import spaces

from envs.base import VecEnv, require_whole


class CDM(VecEnv):
    """B games of one step with nothing to see: observations and state are the constant 1.

    `info` adds `actions` (B, N), the joint actions played, and `optimum` (B,), whether they were the optimum.
    `guided`: whether guidance is on. Games are counted from the start, or from the latest `reset(seed=...)`,
    and `reset(options={"evaluation": True})` ends the guidance of this instance for good.
    `action_bias`: logits of a policy with `first_action`, None for 0. Raises ValueError for an argument of
    the wrong type or out of its range.
    """

    bounded_features = True
    saved = (*VecEnv.saved, "_played", "guided")

    def __init__(
        self, num_envs, device, seed, validate=True, n_agents=10, n_actions=10, guided_share=0.0,
        guided_steps=0, first_action=0.0,
    ):  # fmt: skip
        require_whole(n_agents=n_agents)
        require_whole(2, n_actions=n_actions)
        require_whole(0, guided_steps=guided_steps)
        if type(guided_share) not in (int, float) or not 0 <= guided_share <= 1:
            raise ValueError(f"guided_share must be a number from 0 to 1, got {guided_share!r}")
        if type(first_action) not in (int, float) or not 0 <= first_action < 1:
            raise ValueError(f"first_action must be a number from 0 to less than 1, got {first_action!r}")
        space = spaces.MultiDiscrete([n_actions] * n_agents)
        super().__init__(num_envs, n_agents, 1, 1, 1, space, device, seed, validate)
        self.guided = guided_share > 0 and guided_steps > 0
        self._guided_share, self._guided_steps, self._played = guided_share, guided_steps, 0
        if first_action > 0:
            self.action_bias = torch.zeros(n_actions, device=self.device)  # (A,)
            self.action_bias[0] = math.log(first_action * (n_actions - 1) / (1 - first_action))
        self._game = torch.arange(num_envs, device=self.device)  # (B,)
        self._always = torch.ones(num_envs, dtype=torch.bool, device=self.device)  # (B,)
        # the same at every step
        self._features = (
            torch.ones(num_envs, n_agents, 1, device=self.device),
            torch.ones(num_envs, 1, device=self.device),
            torch.ones(num_envs, n_agents, n_actions, dtype=torch.bool, device=self.device),
        )
        self._latest = None  # joint actions (B, N) to draw

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self._played = 0
        if options and options.get("evaluation"):
            self.guided = False
        self._latest = None
        return super().reset(seed=seed, options=options)

    def _restart(self, done):
        pass

    def _advance(self, actions):
        if self.guided and self._played < self._guided_steps:
            draw = torch.rand(self.num_envs, generator=self.generator, device=self.device)  # (B,)
            replaced = (draw < self._guided_share) & (self._game < self._guided_steps - self._played)
            actions = actions * ~replaced[:, None]  # (B, N), 0 is the first action
        self._played += self.num_envs
        self._latest = actions
        optimum = (actions == 0).all(1)  # (B,)
        reward = torch.where(optimum, 10.0, -10.0)  # (B,)
        return reward, self._always, {"actions": actions, "optimum": optimum}

    def _observe(self):
        return self._features

    def render(self):
        """(H, W, 3) uint8: game 0, a row per agent, a column per action, the latest choices filled.

        They are green at the optimum and red elsewhere; there are none right after a reset.
        """
        if self._obs is None:
            raise RuntimeError("call env.reset() before env.render()")
        n_actions = len(self._features[2][0, 0])
        cell = max(8, 320 // max(self.n_agents, n_actions) // 2 * 2)  # pixels, even for video codecs
        cells = np.full((self.n_agents, n_actions, 3), 70, np.uint8)
        if self._latest is not None:
            choice = self._latest[0].cpu().numpy()  # (N,)
            cells[range(self.n_agents), choice] = (214, 60, 50) if choice.any() else (74, 168, 90)
        picture = cells.repeat(cell, 0).repeat(cell, 1)
        picture[::cell] = picture[:, ::cell] = 38
        return picture
