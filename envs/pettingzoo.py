"""PettingZoo both ways: its parallel environments as a `VecEnv`, ours as its `ParallelEnv`.

    env = make("pettingzoo:mpe2.simple_spread_v3,N=5,continuous_actions=True", num_envs=4)
    env = to_pettingzoo("3m")

Letters as in envs/base.py: B games, N agents, O observation, S state, A discrete actions, D dimensions.
"""

import contextlib
import importlib
import inspect
import multiprocessing
import os
import signal
import traceback
import weakref

import numpy as np
import torch
from gymnasium import spaces

from envs import make
from envs.base import VecEnv, require_whole

try:
    from pettingzoo import ParallelEnv
except ImportError as error:
    raise ValueError("PettingZoo is not installed: pip install -r requirements.txt") from error

NO_LIMIT = 1_000_000  # steps, where an environment tells no limit: it ends its episodes itself


# ---- PettingZoo in ----
class Unfit(ValueError):
    """An environment that cannot be a VecEnv, and why, in one sentence."""


class PettingZoo(VecEnv):
    """B games of the module `path`, each built by its `parallel_env(**arguments)`, in worker processes.

    Observations and actions are padded to those of the largest agent: observations with zeros, discrete
    actions with illegal ones, continuous actions with ignored ones from -1 to 1. An agent that has left, or
    has not come yet, sees zeros, earns 0 and has action 0 only, which is not played. A mask is that of the
    observation or of the agent's info; one that allows nothing allows action 0. The state is that of
    `state()`, or else the padded observations. `info["agent_rewards"]` (B, N); the team reward is their mean
    over all N agents, or their sum with `team_reward="sum"`. The episode ends when no agent is left: as
    truncated if one of the last ones was truncated without being terminated, or by our own clock.

    The clock is `episode_limit`, else the environment's `max_cycles` if it has one, else NO_LIMIT. Game g is
    seeded with seed + g at the first reset; later episodes go on from there. `processes` share the games, by
    default one per core. Raises ValueError for an environment that does not fit, RuntimeError for one that
    fails later and for a worker that dies; both close all workers.
    """

    def __init__(
        self, path, num_envs, device, seed, validate=True, team_reward="mean", episode_limit=None,
        processes=None, **arguments,
    ):  # fmt: skip
        if team_reward not in ("mean", "sum"):
            raise ValueError(f"team_reward must be 'mean' or 'sum', got {team_reward!r}")
        for name, value in (("episode_limit", episode_limit), ("processes", processes)):
            if value is not None:
                require_whole(**{name: value})
        self._path, self._mean = path, team_reward == "mean"
        n_workers = min(num_envs, processes or os.cpu_count())
        self._shares = [range(worker, num_envs, n_workers) for worker in range(n_workers)]
        self._pipes, self._workers = [], []
        self._finalizer = weakref.finalize(self, _release, self._pipes, self._workers)  # at exit too
        # Not fork, which copies the learner's threads and CUDA context. The server imports torch for all.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        for share in self._shares:
            pipe, far_end = context.Pipe()
            worker = context.Process(target=_work, args=(far_end, path, arguments, share), daemon=True)
            worker.start()
            far_end.close()  # else the pipe would outlive a worker that dies
            self._pipes.append(pipe)
            self._workers.append(worker)
        n_agents, obs_dim, state_dim, limit, space = self._ask("describe", {0: ()})[0]
        limit = episode_limit or limit
        super().__init__(num_envs, n_agents, obs_dim, state_dim, limit, space, device, seed, validate)
        self._seed = seed  # of the next restart, None: go on
        self._features = self._truncated = None  # what _observe() returns; games (B,) truncated by themselves

    def reset(self, *, seed=None, options=None):
        self._seed = self._seed if seed is None else seed
        self._features = None
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        obs, reward, over, late, info = super().step(actions)
        return obs, reward, over & ~self._truncated, late | self._truncated, info

    def close_extras(self):
        self._finalizer()

    def render(self):
        """(H, W, 3) uint8: game 0 as the latest step left it, by the environment's render().

        The end of an episode is drawn only if render() was called before. RuntimeError without a picture.
        """
        if self._obs is None:
            raise RuntimeError("call env.reset() before env.render()")
        picture = self._ask("render", {0: ()})[0]
        if np.ndim(picture) != 3:
            kind = type(picture).__name__
            raise RuntimeError(
                f"pettingzoo:{self._path} draws no picture (H, W, 3): render() returned {kind}"
            )
        return np.asarray(picture, np.uint8)

    def _restart(self, done):
        if not done.any():
            return
        games, first, seed = done.nonzero().flatten(), self._features is None, self._seed
        calls = {game: (None if seed is None else seed + game, not first) for game in games.tolist()}
        fresh, self._seed = self._gather("reset", calls), None
        if not first:  # the old ones are still needed, as final_obs and the like
            pairs = zip(self._features, fresh, strict=True)
            fresh = [old.index_copy(0, games, new) for old, new in pairs]
        self._features = fresh

    def _advance(self, actions):
        calls = {game: (action,) for game, action in enumerate(actions.cpu().numpy())}
        *self._features, rewards, over, self._truncated = self._gather("step", calls)
        return rewards.mean(1) if self._mean else rewards.sum(1), over, {"agent_rewards": rewards}

    def _observe(self):
        obs, state, avail_actions = self._features
        return obs, state, avail_actions if avail_actions.shape[2] else None

    def _gather(self, command, calls):
        """The answers of the games, in their order, as a batch per field on the device."""
        answers = self._ask(command, calls)
        fields = zip(*(answers[game] for game in calls), strict=True)
        return [torch.from_numpy(np.stack(field)).to(self.device) for field in fields]

    def _ask(self, command, calls):
        """{game: answer} to a method of `_Game`, with arguments {game: (...)}."""
        if self.closed:
            raise RuntimeError(f"pettingzoo:{self._path} is closed")
        orders = [{game: calls[game] for game in share if game in calls} for share in self._shares]
        asked, answers = [worker for worker, order in enumerate(orders) if order], {}
        try:
            for worker in asked:
                # a worker that failed to build its games has left, and its message waits below
                with contextlib.suppress(OSError):
                    self._pipes[worker].send((command, orders[worker]))
            for worker in asked:
                answer = self._pipes[worker].recv()
                if isinstance(answer, Exception):
                    raise answer
                answers |= answer
        except (EOFError, OSError):  # OSError: within a message
            self._workers[worker].join(5)
            died = f"worker process {worker} died (exit code {self._workers[worker].exitcode})"
            self.close()
            raise RuntimeError(f"pettingzoo:{self._path}: {died}") from None
        except Exception:
            self.close()
            raise
        return answers


def _release(pipes, workers):
    """End the workers, those that do not listen by force."""
    for pipe in pipes:
        with contextlib.suppress(OSError):
            pipe.send(None)
        pipe.close()
    for worker in workers:
        worker.join(5)
        worker.kill()


def _work(pipe, path, arguments, share):
    """Body of a worker process: the games `share`, as the pipe says, until it says None or breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the learner, which saves, then closes
    games, number = {}, None
    try:
        for number in share:
            games[number] = _Game(path, arguments, drawn=number == 0)
        while order := pipe.recv():
            (command, calls), answers = order, {}
            for number, call in calls.items():
                answers[number] = getattr(games[number], command)(*call)
            pipe.send(answers)
    except Exception as error:
        if not isinstance(error, Unfit):
            sentence = " ".join(f"{type(error).__name__}: {error}".split())
            error = RuntimeError(f"pettingzoo:{path}: game {number} failed: {sentence}")
            error.add_note(traceback.format_exc())
        with contextlib.suppress(OSError):  # the learner is gone, or another worker's error has come first
            pipe.send(error)
    finally:
        for game in games.values():
            game.env.close()


class _Game:
    """One parallel environment whose agents, by number, all show and take arrays of the same size."""

    def __init__(self, path, arguments, drawn):
        self.path, (self.env, self.limit) = path, _build(path, arguments, drawn)
        self.picture, self.watched = None, False  # picture: of an episode that is over
        self.names = list(self.env.possible_agents)
        self.actions = [self.env.action_space(name) for name in self.names]
        shapes = []  # of observations
        for name, action in zip(self.names, self.actions, strict=True):
            space = self.env.observation_space(name)
            if isinstance(space, spaces.Dict):
                space = space.spaces.get("observation", space)
            if not isinstance(space, spaces.Box):
                self.refuse(f"{name} observes a {space}, but only Box is supported, alone or beside a mask")
            shapes.append(space.shape)
            box = isinstance(action, spaces.Box) and np.issubdtype(action.dtype, np.floating)
            if not isinstance(action, spaces.Discrete) and not (box and action.is_bounded()):
                self.refuse(f"{name} acts in {action}, but only Discrete and bounded float Box are supported")
        if len({isinstance(action, spaces.Box) for action in self.actions}) != 1:
            self.refuse("some agents act discretely and some continuously, which is not supported")
        self.n_actions = max(getattr(action, "n", 0) for action in self.actions)
        self.obs_dim = int(max(np.prod(shape) for shape in shapes))

    def refuse(self, reason):
        raise Unfit(f"pettingzoo:{self.path}: {reason}")

    def describe(self):
        """n_agents, obs_dim, state_dim, episode_limit and single_action_space of the VecEnv."""
        state = self.reset(0, False)[1]
        if self.n_actions:
            space = spaces.MultiDiscrete([self.n_actions] * len(self.names))
        else:
            high = np.ones((len(self.names), max(action.low.size for action in self.actions)))  # (N, D)
            low = -high
            for i, action in enumerate(self.actions):
                dims = slice(action.low.size)
                low[i, dims], high[i, dims] = action.low.ravel(), action.high.ravel()
            space = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        return len(self.names), self.obs_dim, state.size, self.limit, space

    def reset(self, seed, keep):
        """The features of a new episode; with `keep` a picture of the old one, if somebody looks on."""
        self.picture = self.env.render() if keep and self.watched else None
        obs, infos = self.env.reset(seed=seed)
        return self.features(self.env.agents, obs, infos)

    def step(self, action):
        """The features, the rewards (N,), whether the episode is over, and whether by truncation."""
        self.picture, agents = None, list(self.env.agents)
        played = {name: self.native(self.names.index(name), action) for name in agents}
        obs, rewards, terminated, truncated, infos = self.env.step(played)
        over = all(terminated.get(name) or truncated.get(name) for name in self.env.agents)
        cut = over and any(truncated[name] and not terminated[name] for name in agents)
        # who leaves early sees nothing then, who stays to the end sees it
        features = self.features(agents if over else self.env.agents, obs, infos)
        rewards = np.array([rewards.get(name, 0) for name in self.names], np.float32)  # (N,)
        return *features, rewards, np.bool_(over), np.bool_(cut)

    def native(self, i, action):
        """What agent i plays of the padded joint action (N,) or (N, D)."""
        space = self.actions[i]
        if self.n_actions:
            return space.start + action[i]
        played = action[i, : space.low.size].reshape(space.shape).astype(space.dtype)
        return played.clip(space.low, space.high)  # float32 may round a bound of float64 up

    def features(self, agents, obs, infos):
        """Observations (N, O), state (S,) and legal actions (N, A) of which `agents` are there."""
        seen = np.zeros((len(self.names), self.obs_dim), np.float32)
        legal = np.zeros((len(self.names), self.n_actions), bool)
        for name in agents:
            i, value, mask = self.names.index(name), obs[name], infos.get(name, {}).get("action_mask")
            if isinstance(value, dict):
                value, mask = value["observation"], value.get("action_mask", mask)
            seen[i, : np.size(value)] = np.ravel(value)
            if self.n_actions:
                legal[i, : self.actions[i].n] = True if mask is None else mask
        if self.n_actions:
            legal[~legal.any(1), 0] = True
        try:
            state = np.ravel(self.env.state()).astype(np.float32)
        except (AttributeError, NotImplementedError):
            state = seen.flatten()
        return seen, state, legal

    def render(self):
        self.watched = True
        return self.env.render() if self.picture is None else self.picture


def _build(path, arguments, drawn):
    """The environment, if `drawn` one that draws RGB pictures where it knows such modes, and its clock."""
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever a module does while it is imported
        raise Unfit(
            f"pettingzoo:{path} cannot be imported ({type(error).__name__}: {error}): "
            "pip install its package, or mend the id, which reads like pettingzoo:mpe2.simple_spread_v3"
        ) from error
    if not hasattr(module, "parallel_env"):
        aec = ": it is AEC-only, its agents act in turn" if hasattr(module, "env") else ""
        raise Unfit(f"pettingzoo:{path} has no parallel_env(), in which all agents act at once{aec}")
    env = None
    if drawn and "render_mode" not in arguments:
        with contextlib.suppress(Exception):
            env = module.parallel_env(**arguments, render_mode="rgb_array")
    try:
        env = module.parallel_env(**arguments) if env is None else env
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise Unfit(
            f"pettingzoo:{path}: parallel_env({given}) fails: {type(error).__name__}: {error}"
        ) from error
    default = inspect.signature(module.parallel_env).parameters.get("max_cycles")
    own = getattr(getattr(env, "unwrapped", env), "max_cycles", None)
    clocks = [arguments.get("max_cycles"), own, getattr(default, "default", None)]
    return env, next((clock for clock in clocks if type(clock) is int and clock > 0), NO_LIMIT)


# ---- PettingZoo out ----
def to_pettingzoo(env_id, device="cpu", seed=0, **kwargs):
    """One game of `make(env_id, 1, device, seed, **kwargs)` as a PettingZoo ParallelEnv of numpy arrays.

    Agents are "agent_0" and so on; all of them stay until the end. Observations and rewards are per agent,
    where the game has rewards per agent, else the team's. Masks (A,) int8 are in the infos, as `action_mask`,
    and so is `battle_won`. A masked action is played as the agent's first legal one, because PettingZoo's own
    tests and many users sample without looking at masks. `max_cycles` is our episode_limit. Raises what
    `make()` raises, and RuntimeError for a step outside of an episode.
    """
    return _Parallel(make(env_id, 1, device, seed, **kwargs), env_id)


class _Parallel(ParallelEnv):
    def __init__(self, env, name):
        self.metadata = {"name": name, "render_modes": ["rgb_array"], "is_parallelizable": True}
        self.render_mode, self.max_cycles = "rgb_array", env.episode_limit
        self.possible_agents = [f"agent_{i}" for i in range(env.n_agents)]
        self.agents = []
        # spaces have their own random streams, so every agent needs its own
        self.observation_spaces, self.action_spaces = {}, {}
        for i, agent in enumerate(self.possible_agents):
            self.observation_spaces[agent] = spaces.Box(-np.inf, np.inf, (env.obs_dim,), np.float32)
            actions = env.single_action_space
            self.action_spaces[agent] = (
                spaces.Box(actions.low[i], actions.high[i], dtype=np.float32)
                if isinstance(actions, spaces.Box)
                else spaces.Discrete(int(actions.nvec[i]))
            )
        self.state_space = spaces.Box(-np.inf, np.inf, (env.state_dim,), np.float32)
        self._env, self._state, self._mask = env, None, None

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        """Observations (O,) and infos by agent; without a seed the random stream goes on."""
        obs, _ = self._env.reset(seed=seed, options=options)
        self.agents = self.possible_agents[:]
        return self._show(obs, self._env.state(), self._env.avail_actions(), {})

    def step(self, actions):
        """Observations, rewards, terminations, truncations and infos by agent; actions likewise."""
        if not self.agents:
            raise RuntimeError("no episode is running: call env.reset() before env.step()")
        dtype = np.float32 if self._mask is None else np.int64
        played = np.stack([actions[agent] for agent in self.agents]).astype(dtype)  # (N,) or (N, D)
        if self._mask is not None:
            for i, action in enumerate(played):  # what is no action at all, the game refuses itself
                if 0 <= action < self._mask.shape[1] and not self._mask[i, action]:
                    played[i] = self._mask[i].argmax()
        played = torch.from_numpy(played).unsqueeze(0).to(self._env.device)
        _, reward, terminated, truncated, info = self._env.step(played)
        rewards = info.get("agent_rewards", reward.unsqueeze(1).expand(-1, len(self.agents)))[0].tolist()
        extra = {"battle_won": bool(info["battle_won"])} if "battle_won" in info else {}
        obs, infos = self._show(info["final_obs"], info["final_state"], info["final_avail_actions"], extra)
        flags = (dict.fromkeys(self.agents, bool(flag)) for flag in (terminated, truncated))
        answer = obs, dict(zip(self.agents, rewards, strict=True)), *flags, infos
        if terminated or truncated:
            self.agents = []
        return answer

    def _show(self, obs, state, avail_actions, info):
        """Observations and infos by agent of the only game of a batch; keeps state and mask."""
        obs, self._state = (value[0].cpu().numpy().copy() for value in (obs, state))
        infos = {agent: dict(info) for agent in self.agents}
        self._mask = None
        if avail_actions is not None:
            self._mask = avail_actions[0].cpu().numpy().astype(np.int8)  # (N, A)
            for i, agent in enumerate(self.agents):
                infos[agent]["action_mask"] = self._mask[i].copy()
        return dict(zip(self.agents, obs, strict=True)), infos

    def state(self):
        """(S,) float32, of the latest step."""
        return self._state

    def render(self):
        """(H, W, 3) uint8."""
        return self._env.render()

    def close(self):
        self._env.close()
