"""What the tests of the programs share: toy games, flags of small runs, random batches and slow networks."""

import importlib
import os
import signal
import sys
import types

import numpy as np
import torch
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs.base import NO_LIMIT, VecEnv

EPISODE = ("dop_stochastic", "coma", "qmix")
STEP = ("maddpg", "masql", "dop_deterministic", "maac")
MODULES = {name: importlib.import_module(name) for name in (*EPISODE, *STEP)}
_EPISODE = "--num-envs 4 --total-timesteps 400 --eval-every 200 --eval-episodes 6"
_STEP = f"{_EPISODE} --log-every 40 --warmup-steps 100 --update-every 8 --batch-size 16 --hidden-dim 16"
SMALL = {  # flags of a run of about 0.1 s
    "dop_stochastic": f"{_EPISODE} --off-policy-size 20 --on-policy-size 8 --on-policy-batch 4"
    " --off-policy-batch 6 --critic-updates 2 --critic-warmup 2",
    "coma": f"{_EPISODE} --batch-size 4 --critic-updates 2",
    "qmix": f"{_EPISODE} --buffer-size 20 --batch-size 6 --target-period 5 --epsilon-steps 2000",
    "maddpg": _STEP,
    "masql": f"{_STEP} --particles 6 --value-samples 8",
    "dop_deterministic": f"{_STEP} --critic-hidden-dim 16",
    "maac": f"{_STEP} --critic-dim 16",
}
N, A, D = 3, 5, 2  # agents, discrete actions, action dimensions
J = N * D
LOW, HIGH = torch.tensor([[[-1.0, -2.0], [0, 1], [-5, -1]], [[3, -1], [1, 2], [-4, 7]]])  # both (N, D)


# ---- toy games ----
class Troubled(VecEnv):
    """Games that end at random or by the clock, and in which `trouble` may come at step 60.

    It is "interrupt" (Ctrl-C), "kill", "hangup" (a closed terminal), "break" (an error of the game), "nan"
    (rewards of that step), "blind" (no pictures at all), "external" (games that no checkpoint can hold), or,
    of evaluations, "interrupt_evaluation" at its step 3, after which it never ends. "early" is Ctrl-C before
    any step. "lost" are games that break while others go on: all in the first step, then one in each seventh.
    In "guided" ones all play the digit in each third step; those "together" end by the clock only.
    `log` has for each step obs, state, avail_actions, actions, reward, terminated, final_obs, final_state,
    final_avail_actions, agent_rewards, truncated and broken, all (B, ...), or None where there are none.
    """

    saved = (*VecEnv.saved, "time", "steps")

    def __init__(self, num_envs, space, device, seed, trouble):
        limit = NO_LIMIT if trouble == "interrupt_evaluation" else self.LIMIT
        super().__init__(num_envs, N, self.OBS, self.S, limit, space, device, seed, trouble != "nan")
        self.time = torch.zeros(num_envs, dtype=torch.int64)  # (B,)
        self.trouble, self.steps, self.external, self.log = trouble, 0, trouble == "lost", []
        if trouble == "early":
            os.kill(os.getpid(), signal.SIGINT)
        if trouble == "external":
            self.saved = ()
        self.evaluates = False

    def reset(self, *, seed=None, options=None):
        if options:
            self.evaluates, self.steps = True, 0
        return super().reset(seed=seed, options=options)

    def pass_time(self, reward, chance):
        """Reward (B, ...) with what trouble makes of it; the games (B,) that end, each by this chance."""
        self.time, self.steps = self.time + 1, self.steps + 1
        if self.evaluates and self.trouble == "interrupt_evaluation":
            assert self.steps < 100, "it goes on and on"
            if self.steps == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return reward, torch.zeros(self.num_envs, dtype=torch.bool)
        number = dict(interrupt=signal.SIGINT, kill=signal.SIGTERM, hangup=signal.SIGHUP).get(self.trouble)
        if self.steps == 60 and not self.evaluates and number:
            os.kill(os.getpid(), number)
        if self.steps == 60 and not self.evaluates and self.trouble == "break":
            raise RuntimeError("the game broke")
        if self.steps == 60 and self.trouble == "nan":
            reward = reward * float("nan")
        over = torch.rand(self.num_envs, generator=self.generator) < chance * (self.trouble != "together")
        if self.external:
            self.broken = torch.full((self.num_envs,), self.steps == 1)  # (B,)
            self.broken[1] |= self.steps % 7 == 0
            self._episode_length = torch.where(self.broken, self.LIMIT, self._episode_length)  # truncated
            reward[self.broken], over = 0, over & ~self.broken
        return reward, over

    def _step(self, actions):
        *shown, info = super()._step(actions)
        return *shown, info | ({"broken": self.broken} if self.external else {})

    def step(self, actions):
        before = self._obs, self._state, self._avail_actions
        result = super().step(actions)
        info = result[-1]
        after = (info[x] for x in ("final_obs", "final_state", "final_avail_actions"))
        more = info.get("agent_rewards"), result[3], info["broken"]
        self.log.append((*before, info["actions"].clone(), *result[1:3], *after, *more))
        return result

    def close(self, **_):
        """The program closes its training games last of all: keep them, and the program's variables."""
        Troubled.last, Troubled.program = self, sys._getframe(1).f_globals


class Toy(Troubled):
    """Agents see a digit at first and should play it; action 4 is masked."""

    bounded_features = True
    saved = (*Troubled.saved, "digit")
    OBS, S, LIMIT = 8, 6, 12

    def __init__(self, num_envs, device, seed, validate=True, continuous=False, trouble=None):
        space = spaces.Box(-1, 1, (N, 2), np.float32) if continuous else spaces.MultiDiscrete([A] * N)
        super().__init__(num_envs, space, device, seed, trouble)
        self.digit = torch.zeros(num_envs, dtype=torch.int64)  # (B,)

    def _restart(self, done):
        digit = torch.randint(1, 4, (self.num_envs,), generator=self.generator)
        self.digit, self.time = torch.where(done, digit, self.digit), self.time * ~done

    def _advance(self, actions):
        guided = self.trouble == "guided" and self.steps % 3 == 0
        actions = self.digit[:, None].expand(-1, N) if guided else actions
        reward, over = self.pass_time((actions == self.digit[:, None]).float().mean(1), 0.1)  # both (B,)
        return reward, over, {"battle_won": over & (reward == 1), "actions": actions}

    def _observe(self):
        obs, state = torch.zeros(self.num_envs, N, self.OBS), torch.zeros(self.num_envs, self.S)
        obs[torch.arange(self.num_envs), :, self.digit] = (self.time == 0).float()[:, None]
        state[torch.arange(self.num_envs), self.digit] = 1
        state[:, 5] = self.time / self.LIMIT
        avail_actions = torch.ones(self.num_envs, N, A, dtype=torch.bool)
        avail_actions[:, :, 4] = False
        return obs, state, avail_actions

    def render(self):
        if self.trouble == "blind":
            raise RuntimeError("it draws no picture")
        return np.full((8, 8, 3), 10 * self.time[0].item(), np.uint8)


class Aim(Troubled):
    """All see which of 3 goals counts, and each has a pair to play there."""

    saved = (*Troubled.saved, "goal")
    OBS, S, LIMIT = 4, 5, 5

    def __init__(self, num_envs, device, seed, validate=True, bounded=True, trouble=None):
        bounds = (LOW.numpy(), HIGH.numpy()) if bounded else (-np.inf, np.inf)
        super().__init__(num_envs, spaces.Box(*bounds, (N, D), np.float32), device, seed, trouble)
        # the pairs of each goal (3, N, D), of -1..1, where the bounds count as -1 and 1
        pairs = torch.tensor([[0.5, -0.5], [-0.8, 0.3], [0.0, 0.9]])
        self.targets = torch.tensor([1, -1, 0.5])[:, None, None] * pairs
        self.goal = torch.zeros(num_envs, dtype=torch.int64)  # (B,)

    def _restart(self, done):
        goal = torch.randint(3, (self.num_envs,), generator=self.generator)
        self.goal, self.time = torch.where(done, goal, self.goal), self.time * ~done

    def _advance(self, actions):
        scaled = (actions - LOW) / (HIGH - LOW) * 2 - 1
        rewards = 1 - (scaled - self.targets[self.goal]).square().mean(2)  # (B, N)
        rewards, over = self.pass_time(rewards, 0.2)
        return rewards.mean(1), over, {"agent_rewards": rewards}

    def _observe(self):
        one_hot, time = torch.eye(3)[self.goal], (self.time / self.LIMIT)[:, None]
        obs = torch.cat([one_hot, time], 1).unsqueeze(1).repeat(1, N, 1)
        return obs, torch.cat([1 - one_hot, time, -time], 1), None

    def render(self):
        if self.trouble == "blind":
            raise RuntimeError("it draws no picture")
        return np.zeros((8, 8, 3), np.uint8)


# environment id -> class and arguments
TOYS = {"toy": ("Toy", {}), "Toy2": ("Toy", {}), "continuous": ("Toy", {"continuous": True})}
TOYS |= {"aim": ("Aim", {}), "boundless": ("Aim", {"bounded": False})}
for _trouble in (
    "interrupt",
    "interrupt_evaluation",
    "kill",
    "hangup",
    "break",
    "blind",
    "nan",
    "early",
    "lost",
    "external",
    "guided",
    "together",
):
    TOYS |= {f"{name}_{_trouble}": (name.title(), {"trouble": _trouble}) for name in ("toy", "aim")}


def toy_of(program):
    """The toy game that a program learns."""
    return "toy" if program in EPISODE else "aim"


# ---- run folders ----
def checkpoint(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def scalars(folder):
    """Tag -> pairs of step and value, as written: file names do not order what one second wrote."""
    curves = {}
    for file in sorted(folder.glob("events*"), key=lambda file: file.stat().st_mtime_ns):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            curves.setdefault(tag, []).extend((x.step, x.value) for x in events.Scalars(tag))
    return curves


def same(x, y):
    """Whether two checkpoints or parts of them hold the same numbers."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return torch.equal(x, y) if torch.is_tensor(x) else x == y


# ---- episodes ----
def random_play(capacity=5, games=3, steps=200, limit=9, seed=0):
    """A buffer fed with numbered steps of games that end by themselves, and the episodes as plain lists."""
    rng, (OBS, S) = np.random.default_rng(seed), (Toy.OBS, Toy.S)
    env = types.SimpleNamespace(episode_limit=limit, num_envs=games, device="cpu")
    buffer = MODULES["dop_stochastic"].EpisodeBuffer(capacity, env, "")
    open_episodes, episodes, number = [[] for _ in range(games)], [], 0
    for _ in range(steps):
        number += 1
        names = {"obs": (N, OBS), "state": (S,), "avail_actions": (N, A), "actions": (N,), "reward": ()}
        step = {name: torch.tensor(rng.integers(0, 2, (games, *shape))) for name, shape in names.items()}
        step["reward"] = torch.arange(games) / 100 + number
        step["avail_actions"] = step["avail_actions"].bool()
        step["obs"], step["state"] = step["obs"].float(), step["state"].float()
        stored = step | {"obs": step["obs"].half(), "state": step["state"].half()}
        length = torch.tensor([len(x) + 1 for x in open_episodes])
        step["terminated"] = torch.tensor(rng.random(games) < 0.2)
        done = step["terminated"] | (length >= limit)
        info = {f"final_{name}": 1 - step[name].float() for name in ("obs", "state", "avail_actions")}
        stored["terminated"], info["episode_length"] = step["terminated"], length
        if number == 1:
            buffer.add(stored, info, [])
            for name in ("obs", "state", "reward"):
                buffer.steps[name].fill_(float("nan"))
        buffer.add(stored, info, done.nonzero().squeeze(1))
        for game in range(games):
            open_episodes[game].append({name: value[game] for name, value in step.items()})
        for game in done.nonzero().flatten().tolist():
            final = {name: info[f"final_{name}"][game] for name in ("obs", "state", "avail_actions")}
            episodes.append((open_episodes[game], final))
            open_episodes[game] = []
    return buffer, episodes


def random_episodes(draws, limit=9, seed=0):
    """A batch of what was played, with two actions that are always legal."""
    batch = random_play(capacity=20, limit=limit)[0].sample(draws, seeded(seed))
    avail_actions = batch.avail_actions.clone()
    avail_actions[..., :2] = True
    return batch._replace(avail_actions=avail_actions)


def in_double(batch):
    floats = {name: getattr(batch, name).double() for name in ("obs", "state", "reward")}
    return batch._replace(**floats)


def with_garbage(batch):
    """A batch of episodes with other numbers behind their ends."""
    padding = ~batch.mask  # (B, T)
    behind = torch.nn.functional.pad(padding, (1, 0))  # (B, T + 1), without the last observation
    garbage = {name: x.clone() for name, x in batch._asdict().items() if torch.is_tensor(x)}
    for name in ("obs", "state"):
        garbage[name][behind] = 1e6
    garbage["avail_actions"][behind] = ~garbage["avail_actions"][behind]
    garbage["avail_actions"][::2][behind[::2]] = False
    garbage["actions"][padding] = 3
    garbage["reward"][padding] = 1e6
    garbage["terminated"][padding] = True
    return batch._replace(**garbage)


# ---- transitions ----
def games(discrete, of=Aim):
    """What networks must know of an environment: Aim's, or one with discrete actions."""
    sizes = dict(n_agents=N, obs_dim=of.OBS, state_dim=of.S, n_actions=A if discrete else None)
    space = spaces.MultiDiscrete([A] * N) if discrete else spaces.Box(LOW.numpy(), HIGH.numpy())
    return types.SimpleNamespace(**sizes, single_action_space=space, action_bias=None)


def random_transitions(module, discrete, reward_shape=(6,)):
    """A Batch of 6 transitions, some of which terminate."""
    masks, actions = [None] * 2, (LOW + torch.rand(6, N, D) * (HIGH - LOW)).to(torch.get_default_dtype())
    if discrete:
        masks = torch.rand(2, 6, N, A) < 0.6
        masks[..., 0] = True
        actions = masks[0].float().flatten(0, 1).multinomial(1, generator=seeded()).view(6, N)
    obs, next_obs = torch.randn(2, 6, N, Aim.OBS)
    state, next_state = torch.randn(2, 6, Aim.S)
    played = masks[0], actions, torch.randn(reward_shape), torch.arange(6) % 3 == 0
    return module.Batch(obs, state, *played, next_obs, next_state, masks[1])


def for_critics(actions):
    """Actions of one game, as the environment takes them -> a list of N one-hot or scaled vectors."""
    if actions.dim() == 1:
        return [torch.eye(A)[a] for a in actions]
    return [(a - low) / (high - low) * 2 - 1 for a, low, high in zip(actions, LOW, HIGH, strict=True)]


def catch_gradients(monkeypatch, module):
    """Nothing moves any more in `update`; returns a list for the loss and gradients of critic, then actor."""
    seen = []

    def descend(optimizer, loss, max_grad_norm):
        parameters = optimizer.param_groups[0]["params"]
        seen.append((loss.item(), torch.autograd.grad(loss, parameters, retain_graph=True)))
        return torch.zeros(())

    monkeypatch.setattr(module, "descend", descend)
    return seen


def gradients_of(monkeypatch, module, parts, **options):
    """Logs of `update`, then loss and gradients of the critic and of the actor, without any step."""
    with monkeypatch.context() as patch:
        seen = catch_gradients(patch, module)
        return module.update(*parts, seeded(), **options), *seen


def clipping_norms(monkeypatch, module, *arguments):
    """The norms at which `update` clips the gradients of the critic and of the actor, without any step."""
    norms = []
    monkeypatch.setattr(
        module, "descend", lambda optimizer, loss, norm: norms.append(norm) or torch.zeros(())
    )
    module.update(*arguments)
    return norms


def check_update(module, parts, train_actor):
    """Critics move, and only if `train_actor` actors too, and targets by a quarter of the way."""
    before = [[x.clone() for x in part.parameters()] for part in parts[1:5]]
    logs = module.update(*parts, seeded(), train_actor=train_actor)
    after = [list(part.parameters()) for part in parts[1:5]]
    actor, critic, *targets = [not same(x, y) for x, y in zip(before, after, strict=True)]
    assert critic and actor == train_actor and targets == [train_actor] * 2
    assert ("actor_loss" in logs) == train_actor and all(x.isfinite() for x in logs.values())
    for live, target in ((0, 2), (1, 3)) if train_actor else ():
        expected = [0.75 * x + 0.25 * y for x, y in zip(before[target], after[live], strict=True)]
        torch.testing.assert_close(after[target], expected)


# ---- numbers and networks ----
def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def slow_net(network, group, *x):
    """One plain perceptron of a network: vectors (n,), which it sees joined -> vector."""
    x = torch.cat(x)
    for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        x = (torch.relu(x) if layer else x) @ weight[group] + bias[group, 0]
    return x


def slow_policy(network, i, obs, avail_actions):
    """Agent i's action in -1..1, or its softmax over legal actions; also its legal logits."""
    x = slow_net(network, i, obs)
    if avail_actions is None:
        return x.tanh(), None
    p = x.exp() * avail_actions
    return p / p.sum(), x[avail_actions]
