"""The one environment contract of this repository: a batch of games on one device, stepped together."""

import contextlib
import os
import re
from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

NO_LIMIT = 1_000_000  # the `episode_limit` of games that tell none: they end by themselves, if at all


def require_whole(low=1, high=None, **values):
    """ValueError for an argument of an environment that is no int, less than `low` or more than `high`."""
    most = "" if high is None else f" and at most {high:,}"
    for name, value in values.items():
        if type(value) is not int or value < low or (most and value > high):  # True would pass isinstance()
            raise ValueError(f"{name} must be a whole number, at least {low}{most}, got {value!r}")


def require_number(low=-1e6, high=1e6, **values):
    """ValueError for an argument of an environment that is no number from `low` to `high`."""
    for name, value in values.items():
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")


def free_memory():
    """Bytes that this process may still take: of the machine, and of the container where there is one."""
    free = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # none on Windows
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, TypeError):
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free.append(1024 * int(available[1]))
    groups = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit, which reads "max"
            statistics = (groups / limit).with_name("memory.stat").read_text()
            cached = sum(
                int(x) for x in re.findall(r"^(?:total_)?inactive_file (\d+)$", statistics, re.M)[-1:]
            )
            free.append(int((groups / limit).read_text()) - int((groups / used).read_text()) + cached)
    return max(0, min(free, default=2**62))


class Stream(torch.Generator):
    """A random stream that is saved and restored as networks are."""

    def state_dict(self):
        return {"state": self.get_state()}

    def load_state_dict(self, state):
        if state["state"].shape == self.get_state().shape:  # else it comes from another kind of device
            self.set_state(state["state"].cpu())


class VecEnv(gymnasium.vector.VectorEnv):
    """B cooperative games of N agents; every array is a torch tensor on `device`.

    Letters: B games, N agents, O observation, S state, A discrete actions, D action dimensions.
    A subclass implements three hooks and `render()`; checks live in `step()`, clocks and auto-reset in
    `_step()`, which a subclass with its own clockwork replaces as a whole:

    - `_restart(done)` starts a new episode in every game where `done` (B,) is True.
    - `_advance(actions)` plays one step and returns reward (B,), terminated (B,) and a dict for `info`.
    - `_observe()` returns obs (B, N, O), state (B, S) and avail_actions (B, N, A) of the current step.

    `saved` names the attributes that, with the random stream, decide how the games go on: tensors on
    `device`, tuples of them and plain values. A subclass adds its own.
    """

    metadata = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.SAME_STEP}
    render_mode = "rgb_array"
    action_bias = None  # (A,) to add to the logits of an untrained policy, where a game asks for one
    external = False  # whether each game is a program of its own, which may break
    bounded_features = False  # whether observations and state stay within about 1, so that 16 bits hold them
    saved = ("_episode_return", "_episode_length", "_obs", "_state", "_avail_actions")

    def __init__(
        self,
        num_envs,
        n_agents,
        obs_dim,
        state_dim,
        episode_limit,
        single_action_space,
        device,
        seed,
        validate=True,
    ):
        self.num_envs = num_envs
        self.n_agents = n_agents
        self.obs_dim = obs_dim
        self.state_dim = state_dim
        self.episode_limit = episode_limit
        self.device = torch.device(device)
        self.validate = validate
        self.single_action_space = single_action_space
        discrete = isinstance(single_action_space, spaces.MultiDiscrete)
        self.n_actions = int(single_action_space.nvec[0]) if discrete else None
        if not discrete and not single_action_space.is_bounded():
            raise ValueError("continuous actions need finite bounds, so that policies can be scaled to them")
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (n_agents, obs_dim), np.float32)
        self.action_space = batch_space(single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.generator = Stream(self.device).manual_seed(seed)
        self._episode_return = torch.zeros(num_envs, device=self.device)  # (B,)
        self._episode_length = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # (B,)
        self._obs = self._state = self._avail_actions = None
        self._whole = torch.zeros(num_envs, dtype=torch.bool, device=self.device)  # (B,), of no game broken

    def reset(self, *, seed=None, options=None):
        """Start every game anew. `seed` restarts the random stream. Returns obs (B, N, O) and {}."""
        if seed is not None:
            self.generator.manual_seed(seed)
        everywhere = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)  # (B,)
        self._restart(everywhere)
        self._episode_return.zero_()
        self._episode_length.zero_()
        self._obs, self._state, self._avail_actions = self._observe()
        return self._obs, {}

    def step(self, actions):
        """Play one step of every game: actions (B, N) int64, or (B, N, D) float32 within the bounds.

        Returns obs (B, N, O), reward (B,), terminated (B,), truncated (B,), info. A game that ended has
        already been restarted in `obs`; `final_obs`, `final_state` and `final_avail_actions` of info
        hold what this step led to in every game, before any restart. `episode_return` and
        `episode_length` (B,) of info count the running episode up to and including this step, and so does
        `info["episode"]`, name -> (B,), of what is worth a chart: a `win_rate` too where games can be won.
        `info["actions"]` are those played, which may be others than asked for. `info["broken"]` (B,) marks
        steps that a game did not survive, which can only happen where a game is a program of its own:
        truncated, reward 0, made up, so nothing to learn from and no episode to count.
        Raises RuntimeError before the first reset, ValueError for an action that the game does not allow.
        """
        if self._obs is None:
            raise RuntimeError("call env.reset() before the first env.step()")
        if self.validate:
            self._check(actions)
        obs, reward, terminated, truncated, info = self._step(actions)
        info.setdefault("actions", actions)
        info.setdefault("broken", self._whole)
        names = dict(
            episodic_return="episode_return", episodic_length="episode_length", win_rate="battle_won"
        )
        info["episode"] = {name: info[key] for name, key in names.items() if key in info}
        return obs, reward, terminated, truncated, info

    def _step(self, actions):
        """`step()` without its checks and without `actions` and `episode` in the info."""
        reward, terminated, info = self._advance(actions)
        self._episode_return = self._episode_return + reward
        self._episode_length = self._episode_length + 1
        truncated = ~terminated & (self._episode_length >= self.episode_limit)  # (B,)
        done = terminated | truncated  # (B,)
        final = self._observe()
        info["final_obs"], info["final_state"], info["final_avail_actions"] = final
        info["episode_return"], info["episode_length"] = self._episode_return, self._episode_length
        self._restart(done)
        self._episode_return = self._episode_return * ~done
        self._episode_length = self._episode_length * ~done
        self._obs, self._state, self._avail_actions = self._observe_restarted(done, final)
        return self._obs, reward, terminated, truncated, info

    def obs(self):
        """Observations (B, N, O) float32, those that `reset()` and `step()` returned last."""
        return self._obs

    def state(self):
        """Global state (B, S) float32, for centralised training."""
        return self._state

    def avail_actions(self):
        """Legal discrete actions (B, N, A) bool; None where actions are continuous."""
        return self._avail_actions

    @property
    def sizes(self):
        """What decides the shapes of a policy and a critic, by name."""
        actions = self.n_actions or self.single_action_space.shape[1:]
        sizes = dict(n_agents=self.n_agents, obs_dim=self.obs_dim, state_dim=self.state_dim)
        return sizes | {"n_actions" if self.n_actions else "action_dims": actions}

    def state_dict(self):
        """All that decides how the games go on, for `load_state_dict()` of as many games of the same kind."""
        state = {name: getattr(self, name) for name in self.saved}
        whole = {"sizes": self.sizes, "num_envs": self.num_envs, "generator": self.generator.state_dict()}
        return whole | state

    def load_state_dict(self, state):
        """Go on where another instance was, after `reset()`; ValueError for one of another size."""
        if state["sizes"] != self.sizes:
            raise ValueError(f"the environment's sizes are {self.sizes}, those of the run {state['sizes']}")
        if state["num_envs"] != self.num_envs:
            raise ValueError(f"{self.num_envs} games cannot go on where {state['num_envs']} were")
        self.generator.load_state_dict(state["generator"])
        for name in self.saved:
            setattr(self, name, state[name])

    def _observe_restarted(self, done, final):
        """Like `_observe()`, right after `_restart(done)`; `final`, the features before it, may be reused."""
        return self._observe()

    def _check(self, actions):
        shape = (self.num_envs, *self.single_action_space.shape)
        if not torch.is_tensor(actions) or tuple(actions.shape) != shape:
            got = tuple(actions.shape) if torch.is_tensor(actions) else type(actions).__name__
            raise ValueError(f"actions must be a tensor of shape {shape} (games, agents, ...), got {got}")
        if isinstance(self.single_action_space, spaces.Box):
            if actions.dtype != torch.float32:
                raise ValueError(f"continuous actions must be float32, got {actions.dtype}")
            low = torch.as_tensor(self.single_action_space.low, device=self.device)  # (N, D)
            high = torch.as_tensor(self.single_action_space.high, device=self.device)
            wrong = ~((actions >= low) & (actions <= high)).all(-1)  # (B, N), also True for NaN
        else:
            if actions.dtype != torch.int64:
                raise ValueError(f"discrete actions must be int64, got {actions.dtype}")
            n_actions = self._avail_actions.shape[-1]
            inside = (actions >= 0) & (actions < n_actions)  # (B, N)
            # (B, N)
            chosen = self._avail_actions.gather(2, actions.clamp(0, n_actions - 1).unsqueeze(2)).squeeze(2)
            wrong = ~(inside & chosen)
        if wrong.any():
            game, agent = (int(i) for i in wrong.nonzero()[0])
            message = f"game {game}, agent {agent}: action {actions[game, agent].tolist()} is not allowed; "
            if isinstance(self.single_action_space, spaces.Box):
                raise ValueError(message + f"bounds are {low[agent].tolist()} to {high[agent].tolist()}")
            raise ValueError(
                message + f"available: {self._avail_actions[game, agent].nonzero().flatten().tolist()}"
            )
