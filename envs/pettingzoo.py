"""PettingZoo both ways: its parallel environments as a `VecEnv`, ours as its `ParallelEnv`.

    env = make("pettingzoo:mpe2.simple_spread_v3,N=5,continuous_actions=True", num_envs=4)
    env = to_pettingzoo("3m")

Letters as in envs/base.py: B games, N agents, O observation, S state, A discrete actions, D dimensions.
"""

import contextlib
import importlib
import inspect
import math
import multiprocessing.forkserver
import os
import pkgutil
import signal
import sys
import tempfile
import traceback
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces

from envs import make
from envs.base import NO_LIMIT, VecEnv, require_whole

try:
    from pettingzoo import ParallelEnv
except ImportError as error:
    raise ValueError("PettingZoo is not installed: pip install -r requirements.txt") from error

FLOAT_MAX = float(np.finfo(np.float32).max)


# ---- PettingZoo in ----
class Unfit(ValueError):
    """An environment that cannot be a VecEnv, and why, in one sentence."""


class Wrong(Exception):
    """What an environment did against its own spaces or against PettingZoo, without where and when."""


class PettingZoo(VecEnv):
    """B games, each built by `parallel_env(**arguments)` of the module `path`, in worker processes.

    `path` may be "module:name" for another function or a class. An argument that is called like one of ours
    gets an underscore (`seed_=3`). Observations are flattened (images as they are, Discrete ones one-hot) and
    padded with zeros to the largest; discrete actions are padded with illegal ones, continuous ones with
    ignored ones from -1 to 1, as is a dimension whose bounds are equal. An agent that has left, or has not
    come yet, sees zeros, earns 0 and has action 0 only, which is not played. A mask is that of the
    observation or of the agent's info; one that allows nothing allows action 0. The state is that of
    `state()`, or else the padded observations: the first reset decides, `use_state=False` takes the latter.
    `info["agent_rewards"]` (B, N); the team reward is their mean over all N agents, or their sum with
    `team_reward="sum"`. The episode ends when no agent is left: as truncated if one of the last ones was
    truncated without being terminated, or by our own clock.

    The clock is `episode_limit`, else the environment's `max_cycles` if it has one, else NO_LIMIT. The games'
    first episodes have seeds from `generator`; later ones go on from there. `processes` share the games, by
    default one per core. Raises ValueError for an environment that does not fit, RuntimeError for one that
    fails later or returns something wrong, and for a worker that dies; all of them close the workers.
    """

    saved = ()  # the games live in other processes: a resumed run begins new ones

    def __init__(
        self, path, num_envs, device, seed, validate=True, team_reward="mean", episode_limit=None,
        processes=None, use_state=True, **arguments,
    ):  # fmt: skip
        if team_reward not in ("mean", "sum"):
            raise ValueError(f"team_reward must be 'mean' or 'sum', got {team_reward!r}")
        for name, value in (("episode_limit", episode_limit), ("processes", processes)):
            if value is not None:
                require_whole(**{name: value})
        ours = inspect.signature(PettingZoo).parameters
        arguments = {name[:-1] if name[:-1] in ours else name: arguments[name] for name in arguments}
        self._path, self._mean, self._announced = path, team_reward == "mean", None
        n_workers = min(num_envs, processes or _cores())
        self._shares = [range(worker, num_envs, n_workers) for worker in range(n_workers)]
        self._pipes, self._workers = [], []
        self._finalizer = weakref.finalize(self, _release, self._pipes, self._workers)  # at exit too
        # Not fork, which copies the learner's threads and CUDA context. The server imports torch for all.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        try:
            with contextlib.chdir(Path(__file__).parents[1]):  # where the server looks for what it imports
                multiprocessing.forkserver.ensure_running()
            for share in self._shares:
                pipe, far_end = context.Pipe()
                work = (far_end, path, arguments, share, use_state)
                worker = context.Process(target=_work, args=work, daemon=True)
                worker.start()
                far_end.close()  # else the pipe would outlive a worker that dies
                self._pipes.append(pipe)
                self._workers.append(worker)
        except OSError as error:
            self.close()
            hint = f"; take a shorter TMPDIR than {tempfile.gettempdir()}" if "AF_UNIX" in str(error) else ""
            raise ValueError(f"pettingzoo:{path}: no worker process starts ({error}){hint}") from error
        *self._announced, limit, space = self._ask("describe", {0: ()})[0]
        (n_agents, obs_dim, _), state_dim = self._announced
        state_dim, limit = n_agents * obs_dim if state_dim is None else state_dim, episode_limit or limit
        super().__init__(num_envs, n_agents, obs_dim, state_dim, limit, space, device, seed, validate)
        self._seeding = True  # at the next restart, else the games go on
        self._features = self._truncated = None  # what _observe() returns; games (B,) truncated by themselves

    def reset(self, *, seed=None, options=None):
        self._seeding |= seed is not None
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
        return self._ask("render", {0: ()})[0]

    def _restart(self, done):
        if not done.any():
            return
        games, first, seeds = done.nonzero().flatten(), self._features is None, [None] * self.num_envs
        if self._seeding:  # a resumed run, whose generator is further on, plays other games
            kind = dict(generator=self.generator, device=self.device)
            seeds = torch.randint(2**31, (self.num_envs,), **kind).tolist()
        calls = {game: (seeds[game], not first, *self._announced) for game in games.tolist()}
        fresh, self._seeding = self._gather("reset", calls), False
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
            if self._announced is None and self._workers[worker].exitcode == 1:
                died += ' with no game built: is make() called outside of `if __name__ == "__main__":`?'
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


def _cores():
    """Cores that this process may use: by its affinity, and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # control groups of version 2, of version 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max": no quota, like -1
            quota, period = map(int, " ".join(Path("/sys/fs/cgroup", x).read_text() for x in files).split())
            cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return cores


def _work(pipe, path, arguments, share, use_state):
    """Body of a worker process: the games `share`, as the pipe says, until it says None or breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the learner, which saves, then closes
    games, number = {}, None
    try:
        for number in share:
            games[number] = _Game(path, arguments, number == 0, use_state)
        while order := pipe.recv():
            (command, calls), answers = order, {}
            for number, call in calls.items():
                answers[number] = getattr(games[number], command)(*call)
            pipe.send(answers)
    except Exception as error:
        if not isinstance(error, Unfit):
            where = f"game {number}{games[number].where() if number in games else ''}"
            reason = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            trace, error = (
                traceback.format_exc(),
                RuntimeError(_line(f"pettingzoo:{path}: {where}: {reason}")),
            )
            error.add_note(trace)
        with contextlib.suppress(OSError):  # the learner is gone, or another worker's error has come first
            pipe.send(error)
    finally:
        for game in games.values():
            with contextlib.suppress(Exception):  # of one that cannot close, when all is over
                game.env.close()


class _Game:
    """One parallel environment whose agents, by number, all show and take arrays of the same size.

    Whatever it returns is checked as it arrives: against its spaces, and the state against the first reset's.
    """

    def __init__(self, path, arguments, drawn, use_state):
        self.path, (self.env, self.limit) = path, _build(path, arguments, drawn)
        self.picture, self.watched = None, False  # picture: of an episode that is over
        self.clock = self.agent = None  # where it is: steps of the episode, and whose things are looked at
        self.use_state, self.state_dim = use_state, None  # state_dim None: the observations are the state
        self.names = {name: i for i, name in enumerate(self.env.possible_agents)}  # agents' numbers
        self.actions = [self.env.action_space(name) for name in self.names]
        self.observed = []  # the agents' spaces, without a mask
        for name, action in zip(self.names, self.actions, strict=True):
            space = self.env.observation_space(name)
            if isinstance(space, spaces.Dict):
                space = spaces.Dict({key: part for key, part in space.items() if key != "action_mask"})
            if not space.is_np_flattenable:
                self.refuse(f"{name} observes {space}, of which gymnasium.spaces.flatten makes no array")
            self.observed.append(space)
            box = isinstance(action, spaces.Box) and np.issubdtype(action.dtype, np.floating)
            if not isinstance(action, spaces.Discrete) and not (box and action.is_bounded()):
                self.refuse(f"{name} acts in {action}, but only Discrete and bounded float Box are supported")
        if len({isinstance(action, spaces.Box) for action in self.actions}) != 1:
            self.refuse("some agents act discretely and some continuously, which is not supported")
        self.n_actions = max(int(getattr(action, "n", 0)) for action in self.actions)
        self.obs_dim = max(spaces.flatdim(space) for space in self.observed)
        self.sizes = len(self.names), self.obs_dim, self.n_actions

    def refuse(self, reason):
        raise Unfit(_line(f"pettingzoo:{self.path}: {reason}"))

    def where(self):
        agent = "" if self.agent is None else f", agent {self.agent}"
        return agent + {None: "", 0: ", reset()"}.get(self.clock, f", step {self.clock}")

    def describe(self):
        """What the first reset announces: sizes, state_dim; then episode_limit, single_action_space."""
        obs, infos, state = *self.begin(0), None
        if self.use_state:
            with contextlib.suppress(Exception):  # whatever has no state() that works has none
                state = self.env.state()
        self.state_dim = None if state is None else np.size(state)
        self.features(self.env.agents, obs, infos)
        if self.n_actions:
            return (
                self.sizes,
                self.state_dim,
                self.limit,
                spaces.MultiDiscrete([self.n_actions] * len(self.names)),
            )
        high = np.ones(
            (len(self.names), max(action.low.size for action in self.actions)), np.float32
        )  # (N, D)
        low = -high
        for (name, i), action in zip(self.names.items(), self.actions, strict=True):
            with np.errstate(over="ignore"):
                bounds = np.stack([action.low.ravel(), action.high.ravel()]).astype(np.float32)  # (2, D)
                if not np.isfinite(2 * (bounds[1] - bounds[0])).all():
                    self.refuse(f"{name} acts in {action}, whose bounds are too wide for float32")
            wide = np.flatnonzero(bounds[0] < bounds[1])  # native() plays the only value of the others
            low[i, wide], high[i, wide] = bounds[:, wide]
        return self.sizes, self.state_dim, self.limit, spaces.Box(low, high, dtype=np.float32)

    def begin(self, seed):
        """Observations and infos of a new episode, as PettingZoo has them."""
        self.clock = 0
        obs, infos = _dicts(self.env.reset(seed=seed), "observations", "infos")
        if not self.env.agents:
            raise Wrong("it has no agents")
        return obs, infos

    def reset(self, seed, keep, sizes, state_dim):
        """The features of a new episode; with `keep` a picture of the old one, if somebody looks on."""
        self.picture, self.state_dim = self.env.render() if keep and self.watched else None, state_dim
        if self.sizes != sizes:
            raise Wrong(f"agents, observation and actions have sizes {self.sizes}, in game 0 {sizes}")
        obs, infos = self.begin(seed)
        return self.features(self.env.agents, obs, infos)

    def step(self, action):
        """The features, the rewards (N,), whether the episode is over, and whether by truncation."""
        self.picture, agents, self.clock = None, list(self.env.agents), self.clock + 1
        played = {name: self.native(self.names[name], action) for name in agents}
        parts = "observations", "rewards", "terminations", "truncations", "infos"
        obs, rewards, terminated, truncated, infos = _dicts(self.env.step(played), *parts)
        over = all(terminated.get(name) or truncated.get(name) for name in self.env.agents)
        cut = over and any(truncated.get(name) and not terminated.get(name) for name in agents)
        # who leaves early sees nothing then, who stays to the end sees it
        features = self.features(agents if over else self.env.agents, obs, infos)
        earned = np.zeros(len(self.names), np.float32)  # (N,)
        for name, i in self.names.items():
            self.agent, reward = name, rewards.get(name, 0)
            try:
                number = reward.item() if hasattr(reward, "item") else reward  # an array of one number, too
                finite = abs(number) <= FLOAT_MAX
            except (TypeError, ValueError, RuntimeError):  # no number, or more than one
                finite = False
            if not finite:
                raise Wrong(f"its reward is {_short(reward)}, not a finite number")
            earned[i] = number
        self.agent = None
        return *features, earned, np.bool_(over), np.bool_(cut)

    def native(self, i, action):
        """What agent i plays of the padded joint action (N,) or (N, D)."""
        space = self.actions[i]
        if self.n_actions:
            return space.start + action[i]
        played = action[i, : space.low.size].reshape(space.shape).astype(space.dtype)
        return played.clip(space.low, space.high)  # float32 may round a bound of float64 up

    @np.errstate(over="ignore")  # what float32 cannot hold is infinite, and named as such
    def features(self, agents, obs, infos):
        """Observations (N, O), state (S,) and legal actions (N, A) of which `agents` are there."""
        seen = np.zeros((len(self.names), self.obs_dim), np.float32)
        legal = np.zeros((len(self.names), self.n_actions), bool)
        for name in agents:
            self.agent = name
            if name not in self.names or name not in obs:
                raise Wrong(f"it is not in {'observations' if name in self.names else 'possible_agents'}")
            i, value, info = self.names[name], obs[name], infos.get(name, {})
            if not isinstance(info, Mapping):
                raise Wrong(f"its info is {_short(info)}, not a dict")
            mask = value.get("action_mask") if isinstance(value, Mapping) else None
            mask = info.get("action_mask") if mask is None else mask
            try:
                flat = _flatten(self.observed[i], value)
                seen[i, : flat.size] = flat
            except Exception as error:  # whatever NumPy and gymnasium make of it
                fits = f"does not fit {self.observed[i]}"
                raise Wrong(f"its observation {_short(value)} {fits}") from error
            if self.n_actions:
                n_own = int(self.actions[i].n)
                if mask is not None and np.size(mask) != n_own:
                    raise Wrong(f"its action_mask is {_short(mask)}, for {n_own} actions")
                legal[i, :n_own] = True if mask is None else np.ravel(mask)
        if not np.isfinite(seen).all():
            self.agent = next(name for name, i in self.names.items() if not np.isfinite(seen[i]).all())
            raise Wrong(f"its observation {_short(obs[self.agent])} is not finite")
        self.agent = None
        if self.n_actions:
            legal[~legal.any(1), 0] = True
        return seen, seen.flatten() if self.state_dim is None else self.state(), legal

    def state(self):
        """state() of the environment, flattened (S,), which has to be as it was at the first reset."""
        other = "use_state=false takes the observations in its place"
        try:
            value = self.env.state()
            state = np.ravel(value).astype(np.float32)
        except Exception as error:
            raise Wrong(f"state() fails ({type(error).__name__}: {error}); {other}") from error
        if state.size != self.state_dim or not np.isfinite(state).all():
            raise Wrong(f"state() returned {_short(value)}, not {self.state_dim} finite numbers; {other}")
        return state

    def render(self):
        self.watched = True
        try:
            return _picture(self.env.render() if self.picture is None else self.picture)
        except Wrong:
            raise
        except Exception as error:
            raise Wrong(f"no picture, as render() fails ({type(error).__name__}: {error})") from error


def _line(text, most=None):
    return " ".join(str(text).split())[:most]


def _short(value):
    """What an environment returned, for a sentence."""
    shape = f" of shape {value.shape}" if getattr(value, "shape", ()) else ""
    return f"{_line(repr(value), 100)}{shape}"


def _dicts(answer, *names):
    """What reset() or step() returned, if it is a dict for each of `names`."""
    if not isinstance(answer, tuple) or len(answer) != len(names):
        raise Wrong(f"it returned {_short(answer)}, not a tuple of {', '.join(names)}")
    for name, part in zip(names, answer, strict=True):
        if not isinstance(part, Mapping):
            raise Wrong(f"{name} are {_short(part)}, not a dict by agent")
    return answer


def _flatten(space, value):
    """A value of a space as a flat array: Box as it is, others as gymnasium has them (Discrete one-hot)."""
    if isinstance(space, spaces.Box):
        flat, size = np.ravel(value), math.prod(space.shape)
    elif isinstance(space, spaces.Dict):
        return np.concatenate([_flatten(part, value[key]) for key, part in space.items()])
    elif isinstance(space, spaces.Tuple):
        return np.concatenate([_flatten(*pair) for pair in zip(space, value, strict=True)])
    else:
        value = np.asarray(value).item() if isinstance(space, spaces.Discrete) else value
        flat = spaces.flatten(space, value) if space.contains(value) else np.empty(0)
        size = spaces.flatdim(space)
    if flat.size != size:
        raise ValueError(f"{value!r} is not in {space}")
    return flat


def _picture(drawn):
    """What render() returned, as (H, W, 3) uint8: from grey, RGBA, channels first, floats from 0 to 1."""
    picture = np.asarray(drawn)
    if picture.ndim == 2:
        picture = picture[..., None]
    if picture.ndim == 3 and picture.shape[2] not in (1, 3, 4) and picture.shape[0] in (1, 3, 4):
        picture = np.moveaxis(picture, 0, 2)
    if picture.ndim != 3 or picture.shape[2] not in (1, 3, 4) or picture.dtype.kind not in "biuf":
        raise Wrong(f"it draws no picture (H, W, 3): render() returned {type(drawn).__name__}")
    if picture.dtype.kind in "bf" and picture.max() <= 1:
        picture = picture * 255.0
    picture = np.clip(picture, 0, 255).astype(np.uint8)
    return np.repeat(picture, 3, 2) if picture.shape[2] == 1 else picture[..., :3]


def _build(path, arguments, drawn):
    """The environment, if `drawn` one that draws RGB pictures where it knows such modes, and its clock."""
    ours = sys.modules[__package__]  # a package `envs` of the user's is the rest of this one
    ours.__path__ = pkgutil.extend_path(ours.__path__, __package__)
    path, _, name = path.partition(":")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever a module does while it is imported
        raise Unfit(
            f"pettingzoo:{path} cannot be imported ({type(error).__name__}: {_line(error)}): "
            "pip install its package, or mend the id, which reads like pettingzoo:mpe2.simple_spread_v3"
        ) from error
    name = name or "parallel_env"
    if not hasattr(module, name):
        aec = ": it is AEC-only, its agents act in turn" if hasattr(module, "env") else ""
        raise Unfit(f"pettingzoo:{path} has no {name}(), in which all agents act at once{aec}")
    make_one, env = getattr(module, name), None
    if drawn and "render_mode" not in arguments:
        with contextlib.suppress(Exception):
            env = make_one(**arguments, render_mode="rgb_array")
    try:
        env = make_one(**arguments) if env is None else env
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        sentence = f"{name}({given}) fails: {type(error).__name__}: {error}"
        raise Unfit(_line(f"pettingzoo:{path}: {sentence}")) from error
    layers = [env]  # an environment that was made from one in turns has its clock further inside
    for layer in layers:
        inner = [getattr(layer, name, None) for name in ("unwrapped", "aec_env", "env")]
        layers += [x for x in inner if x is not None and all(x is not known for known in layers)]
    default = inspect.signature(make_one).parameters.get("max_cycles")
    clocks = [arguments.get("max_cycles"), *(getattr(layer, "max_cycles", None) for layer in layers)]
    clocks.append(getattr(default, "default", None))
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
        if missing := [agent for agent in self.agents if agent not in actions]:
            raise ValueError(f"actions of {', '.join(missing)} are missing")
        dtype = np.float32 if self._mask is None else np.int64
        for agent in self.agents:
            action, space = np.asarray(actions[agent]), self.action_spaces[agent]
            if action.shape != space.shape or action.dtype.kind not in ("iu" if dtype == np.int64 else "iuf"):
                raise ValueError(f"{agent}: {actions[agent]!r} is no action of {space}")
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
