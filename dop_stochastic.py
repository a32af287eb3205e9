"""Stochastic DOP: off-policy policy gradients with a decomposed critic, for discrete cooperative games.

One centralised critic Q_tot = sum_i k_i(s) Q_i(s, a_i) + b(s) is learnt from tree backups over old episodes
and TD(lambda) over recent ones; every agent's recurrent policy climbs its own share k_i Q_i.
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021.

    python dop_stochastic.py --env mmm
    python dop_stochastic.py --env mmm --setting paper

B games or episodes, T time, N agents, A actions, O observation, S state, H hidden, G networks, M transitions.

Differs from the paper:
1. epsilon is a floor inside the policy and the mixture is differentiated, as in COMA and the official code;
2. targets use the current policies, there are no target actors, as in the official code;
3. an episode ended by the clock bootstraps from E_pi[Q_tot] of its last observation: no action follows it;
   replayed observations and states are in half precision, to halve the memory.

Without `--setting paper` also, to win in less time (docs/dop_stochastic.md):
4. 16 games, not 4; 8 critic minibatches per iteration at 5e-4, not one full batch at 1e-4; a target copied
   every 10 iterations, not 8 (the paper leaves the last two open);
5. the expectation over an agent's own action in Eq. 9 is exact, not sampled;
6. the local critics share their two layers and keep a head each, instead of a network each;
7. their last layer starts at zero and the actor waits for `critic_warmup` iterations, because RMSprop, which
   normalises gradients, would let the noise of an unlearnt critic drive the policies at full speed;
8. epsilon falls from 0.5 within 50,000 steps, not from 1.0 within 500,000.
"""

import copy
import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import make


# ---- settings ----
@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment, a part of the run folder's name"""
    seed: int = 1
    """seed of networks, games, exploration and sampling; evaluation has its own"""
    env: str = "mmm"
    """environment id, in any case, arguments behind commas (cdm,n_agents=5); its PRESETS beat defaults"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where everything lives; auto takes cuda if there is one"""
    total_timesteps: int = 500_000
    """environment steps of the run; one step of one game counts as 1"""
    num_envs: int = 16
    """games played in parallel"""
    eval_every: int = 20_000
    """environment steps between two evaluations (0: none)"""
    eval_episodes: int = 128
    """games of one evaluation, all in parallel"""
    log_every: int = 1_000
    """environment steps between two points of charts and losses"""
    save_every: int = 100_000
    """environment steps between two checkpoints (0: only at the end)"""
    capture_video: bool = False
    """save one game of every evaluation as a GIF in the run folder"""
    resume: str | None = None
    """run folder to continue with its own settings; replay is not saved and fills anew"""
    evaluate: str | None = None
    """run folder whose policy plays greedily, without training"""
    run_dir: str = "runs"
    """folder of the run folders"""

    # Algorithm specific arguments
    setting: Literal["default", "paper"] = "default"
    """entry of PRESETS to start from; flags win"""
    actor_lr: float = 5e-4
    """learning rate of the actor (Appendix G.1 of [DOP])"""
    critic_lr: float = 5e-4
    """learning rate of the critic (both 5e-4 and 1e-4 in Appendix G.1 of [DOP])"""
    gamma: float = 0.99
    """discount (official code)"""
    td_lambda: float = 0.8
    """lambda of the on-policy targets, Eq. 8 (official code)"""
    tb_lambda: float = 0.93
    """lambda of the tree backup, Eq. 7 (official code)"""
    n_steps: int = 5
    """steps k of the tree backup (Appendix G.1 of [DOP])"""
    kappa: float = 0.5
    """weight of the off-policy loss in Eq. 6 (Appendix G.1 of [DOP])"""
    tree_backup: Literal["decomposed", "sampled", "none"] = "decomposed"
    """E_pi[Q_tot] by Eq. 5, from sampled joint actions, or on-policy loss only (section 5.1.1 of [DOP])"""
    actor_gradient: Literal["expected", "sampled"] = "expected"
    """expectation over the own action in Eq. 9: exact, or sampled by the action played"""
    separate_critics: bool = False
    """a local critic network per agent (Appendix G.1 of [DOP]), not a shared trunk with a head each"""
    epsilon_start: float = 0.5
    """share of uniform exploration in the policies at the start (1.0 in Appendix G.1 of [DOP])"""
    epsilon_end: float = 0.05
    """the same after the decay (Appendix G.1 of [DOP])"""
    epsilon_steps: int = 50_000
    """environment steps of the linear decay (500,000 in Appendix G.1 of [DOP])"""
    off_policy_size: int = 5_000
    """latest episodes in the off-policy buffer (Appendix G.1 of [DOP])"""
    off_policy_batch: int = 32
    """episodes per off-policy batch (Appendix G.1 of [DOP])"""
    on_policy_size: int = 32
    """latest episodes that count as on-policy (Appendix G.1 of [DOP])"""
    on_policy_batch: int = 16
    """episodes per on-policy batch (Appendix G.1 of [DOP])"""
    episodes_per_iteration: int = 4
    """finished episodes per training iteration (4 parallel games in Appendix G.1 of [DOP])"""
    critic_updates: int = 8
    """critic minibatches that an iteration splits its transitions into (1: one full-batch step)"""
    critic_warmup: int = 30
    """first iterations without actor updates, from local critics that start at zero (0: neither of both)"""
    target_period: int = 10
    """training iterations between two copies to the target critic"""


# setting or environment id -> what differs from the defaults
PRESETS = {
    "paper": dict(
        num_envs=4, critic_lr=1e-4, actor_gradient="sampled", separate_critics=True, epsilon_start=1.0,
        epsilon_steps=500_000, critic_updates=1, critic_warmup=0, target_period=8, total_timesteps=2_000_000,
    ),
    "cdm": dict(
        num_envs=4, critic_updates=1, total_timesteps=10_000, epsilon_steps=5_000, eval_every=500,
        eval_episodes=1, log_every=100,
    ),
}  # fmt: skip
# of numbers, where an integer may be less than 1 or another number may leave 0 to 1
LIMITS = dict.fromkeys(("seed", "eval_every", "save_every", "critic_warmup"), (0, math.inf))


def fail(message):
    """Leave with one sentence on stderr and exit code 1."""
    sys.exit(f"{Path(__file__).name}: {message}")


def parse_args():
    """Flags over PRESETS over the defaults, or over the settings of the run to resume or to evaluate."""
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]  # help comes with the presets
    first = tyro.cli(Args, args=words, description=__doc__)
    env_id = first.env.lower().split(",")[0].strip()
    overrides = PRESETS.get(env_id, {}) | PRESETS.get(getattr(first, "setting", None), {})
    if first.resume and first.evaluate:
        fail("--resume and --evaluate exclude each other")
    if run := first.resume or first.evaluate:
        try:
            overrides = json.loads(Path(run, "args.json").read_text()) | {"resume": None, "evaluate": None}
            Args(**overrides)
        except (OSError, TypeError, ValueError) as error:
            fail(f"{run} is no run folder of this algorithm: {error}")
    args = tyro.cli(Args, description=__doc__, default=Args(**overrides))
    for name in ("env", "setting") if run else ():
        if name in overrides and getattr(args, name).lower() != overrides[name].lower():
            fail(f"{run} has the {name} {overrides[name]}, which cannot become {getattr(args, name)}")
    for name, value in vars(args).items():
        if type(value) in (int, float):
            low, high = LIMITS.get(name, (1, math.inf) if type(value) is int else (0, 1))
            if not (low <= value <= high and math.isfinite(value)):
                limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                fail(f"--{name.replace('_', '-')} must be {limits}, got {value}")
    return args


# ---- networks ----
class Actor(nn.Module):
    """Policy logits or Q values from an agent's history: layer, GRU, layer, shared by agents."""

    def __init__(self, obs_dim, n_agents, n_actions, hidden_dim):
        super().__init__()
        self.in_dims = [obs_dim, n_actions, n_agents]  # observation, last action, own id
        self.fc = nn.Linear(sum(self.in_dims), hidden_dim)
        self.gru = nn.GRU(hidden_dim, hidden_dim)
        self.head = nn.Linear(hidden_dim, n_actions)

    def embed(self, obs, last_actions):
        """obs (..., N, O), last_actions (..., N), -1: none -> (..., N, H)."""
        # a one-hot input picks a column of the weight, so look that up; row 0 of the table is "no action yet"
        w_obs, w_action, w_agent = self.fc.weight.split(self.in_dims, dim=1)  # (H, O), (H, A), (H, N)
        table = F.pad(w_action.t(), (0, 0, 1, 0))  # (1 + A, H)
        return F.relu(F.linear(obs, w_obs, self.fc.bias) + F.embedding(last_actions + 1, table) + w_agent.t())

    def forward(self, obs, last_actions, hidden=None):
        """One step: obs (B, N, O), last_actions (B, N) -> logits (B, N, A) and the next hidden (B, N, H)."""
        x = self.embed(obs, last_actions).view(1, -1, self.gru.hidden_size)  # (1, B * N, H)
        _, hidden = self.gru(x, None if hidden is None else hidden.view(x.shape))
        hidden = hidden.view(*obs.shape[:2], -1)
        return self.head(hidden), hidden

    def unroll(self, batch):
        """The same for whole episodes from their first step on: (B, T + 1, N, A), 0 behind their ends."""
        (B, T, N), steps = batch.actions.shape, [n + 1 for n in batch.length]
        last_actions = F.pad(batch.actions, (0, 0, 1, 0), value=-1)  # (B, T + 1, N)
        order = batch.mask.sum(1).argsort(descending=True)  # (B,), so that the rows that go on lie together
        seen = F.pad(batch.mask, (1, 0), value=True)[order]  # (B, T + 1)
        row, time = seen.nonzero_static(size=sum(steps)).unbind(1)  # (M + B,), nothing is spent on padding
        at = order[row], time
        x = self.embed(batch.obs[at], last_actions[at])  # (M + B, N, H)
        x = x.new_zeros(T + 1, B, *x.shape[1:]).index_put((time, row), x).flatten(1, 2)  # (T + 1, B * N, H)
        hidden, parts = x.new_zeros(1, *x.shape[1:]), []
        for start in range(0, T + 1, 32):
            n = N * sum(length > start for length in steps)  # rows that go on
            part, hidden = self.gru(x[start : start + 32, :n], hidden[:, :n])
            parts.append(F.pad(part, (0, 0, 0, B * N - n)))
        x = self.head(torch.cat(parts).unflatten(1, (B, N))[time, row])  # (M + B, N, A)
        return x.new_zeros(B, T + 1, *x.shape[1:]).index_put(at, x)


class DecomposedCritic(nn.Module):
    """Q_i, k_i, b of Eq. 4 from the state (Appendix G.1 of [DOP]); G = N networks if separate, else G = 1."""

    def __init__(self, state_dim, n_agents, n_actions, hidden_dim, separate, zero_init=True):
        super().__init__()
        self.out_dims = (n_agents, n_actions)
        self.groups = n_agents if separate else 1
        sizes = (state_dim, hidden_dim, hidden_dim, n_agents * n_actions // self.groups)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in pairwise(sizes):
            bound = n_in**-0.5  # as nn.Linear
            self.weights.append(torch.empty(self.groups, n_in, n_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(self.groups, 1, n_out).uniform_(-bound, bound))
        if zero_init:
            nn.init.zeros_(self.weights[-1])
            nn.init.zeros_(self.biases[-1])
        self.k = nn.Linear(state_dim, n_agents)
        self.b = nn.Linear(state_dim, 1)

    def forward(self, state):
        """state (..., S) -> q_values (..., N, A), k (..., N), b (...)."""
        x = state.reshape(1, -1, state.shape[-1]).expand(self.groups, -1, -1)  # (G, M, S)
        x = F.relu(torch.baddbmm(self.biases[0], x, self.weights[0]))
        x = F.relu(torch.baddbmm(self.biases[1], x, self.weights[1]))
        x = torch.baddbmm(self.biases[2], x, self.weights[2])  # (G, M, N * A / G)
        q_values = x.transpose(0, 1).reshape(*state.shape[:-1], *self.out_dims)  # (..., N, A)
        k = self.k(state).abs()  # (..., N)
        return q_values, k / k.sum(-1, keepdim=True).clamp_min(1e-8), self.b(state).squeeze(-1)


# ---- equations ----
def epsilon_policy(logits, avail_actions, epsilon):
    """pi = (1 - epsilon) softmax + epsilon uniform, both over legal actions, (..., A); 0 on illegal ones."""
    softmax = logits.masked_fill(~avail_actions, -1e9).softmax(-1)
    n_legal = avail_actions.sum(-1, keepdim=True).clamp_min(1).to(logits.dtype)  # (..., 1)
    return ((1 - epsilon) * softmax + epsilon / n_legal) * avail_actions


def sample_actions(pi, generator):
    """Actions (...) from pi (..., A) as argmax(pi / Exp(1)), which never picks a zero probability."""
    noise = torch.empty_like(pi).exponential_(generator=generator).clamp_min(torch.finfo(pi.dtype).tiny)
    return (pi / noise).argmax(-1)


def decomposed_q(k, b, q):
    """Q_tot (...) from k and the agents' q (..., N) and b (...)."""
    # Eq. 4 of [DOP]: Q_tot = sum_i k_i Q_i + b
    return (k * q).sum(-1) + b


def expected_q(k, b, q_values, pi):
    """E_pi[Q_tot] (...) without joint actions; k (..., N), b (...), q_values and pi (..., N, A)."""
    # Eq. 5 of [DOP]: E_pi[Q_tot] = sum_i k_i E_{pi_i}[Q_i] + b
    return decomposed_q(k, b, (pi * q_values).sum(-1))


def sampled_expected_q(k, b, q_values, pi, n_samples, generator):
    """The same as a mean over joint actions sampled from pi (section 5.1.1 of [DOP])."""
    cdf = pi.cumsum(-1)  # (..., N, A)
    cdf = cdf / cdf[..., -1:].clamp_min(torch.finfo(pi.dtype).tiny)  # ends in exactly 1, above any draw
    total = torch.zeros_like(b)  # (...)
    for _ in range(n_samples):
        draw = torch.rand(*k.shape, 1, generator=generator, dtype=pi.dtype, device=pi.device)
        actions = torch.searchsorted(cdf, draw, right=True).clamp_max(pi.shape[-1] - 1)  # (..., N, 1)
        total = total + decomposed_q(k, b, q_values.gather(-1, actions).squeeze(-1))
    return total / n_samples


def tree_backup_targets(reward, terminated, mask, q_tot, next_v, pi_joint, gamma, tb_lambda, n_steps):
    """Off-policy targets; all (B, T), one episode per row, mask 0 behind its end.

    q_tot: of the actions played; next_v: E_pi[Q_tot] one step later; pi_joint: prod_i pi_i of these actions.
    """
    assert reward.shape == terminated.shape == mask.shape == q_tot.shape == next_v.shape == pi_joint.shape
    T = reward.shape[1]
    delta = (reward + gamma * (1 - terminated.to(reward.dtype)) * next_v - q_tot) * mask
    delta, pi_joint = F.pad(delta, (0, n_steps)), F.pad(pi_joint, (0, n_steps))  # (B, T + n_steps)
    td_target, trace = q_tot, torch.ones_like(q_tot)
    for step in range(n_steps):
        # Eq. 7 of [DOP]: y_t = Q_tot + sum_l gamma^l c_l delta_{t+l}, c_l = prod_{j=1..l} lambda pi_{t+j}
        td_target = td_target + trace * delta[:, step : step + T]
        trace = gamma * tb_lambda * trace * pi_joint[:, step + 1 : step + 1 + T]
    return td_target


def td_lambda_targets(reward, terminated, mask, q_taken, next_q, gamma, td_lambda):
    """On-policy targets; all (B, T, ...), one episode per row, mask 0 behind its end.

    q_taken: of the actions played; next_q: the same one step later, a truncated end's expected one.
    """
    assert reward.shape == terminated.shape == mask.shape == q_taken.shape == next_q.shape
    delta = (reward + gamma * (1 - terminated.to(reward.dtype)) * next_q - q_taken) * mask
    sums = [torch.zeros_like(delta[:, 0])]
    for t in reversed(range(reward.shape[1])):
        # lambda return: y_t = Q + sum_l (gamma lambda)^l delta_{t+l}, summed from the end
        sums.append(delta[:, t] + gamma * td_lambda * sums[-1])
    return q_taken + torch.stack(sums[:0:-1], 1)


def expected_policy_gradient_loss(k, q_values, pi, mask):
    """Minus Eq. 9, same expectation, over the own action exactly; k (..., N), q_values and pi (..., N, A)."""
    # Eq. 9 of [DOP]: E_pi[sum_i k_i grad log pi_i(a_i) Q_i(a_i)] = sum_i k_i sum_a grad pi_i(a) Q_i(a)
    return -(k.detach() * (pi * q_values.detach()).sum(-1) * mask.unsqueeze(-1)).sum() / mask.sum()


def sampled_policy_gradient_loss(k, q_values, pi, actions, mask):
    """Minus Eq. 9 at the actions (..., N) played, with the utility U_i of Appendix A.3.1."""
    k, q_values, actions = k.detach(), q_values.detach(), actions.unsqueeze(-1)
    advantage = q_values.gather(-1, actions).squeeze(-1) - (pi.detach() * q_values).sum(-1)  # (..., N)
    log_pi_taken = pi.gather(-1, actions).squeeze(-1).clamp_min(torch.finfo(pi.dtype).tiny).log()  # (..., N)
    # Eq. 9 of [DOP]: E_pi[sum_i k_i grad log pi_i(a_i) (Q_i(a_i) - E_{pi_i}[Q_i])]
    return -(k * log_pi_taken * advantage * mask.unsqueeze(-1)).sum() / mask.sum()


# ---- storage ----
class Batch(NamedTuple):
    """Whole episodes, as long as the longest; behind its end one repeats its last step, and mask is False."""

    obs: torch.Tensor  # (B, T + 1, N, O)
    state: torch.Tensor  # (B, T + 1, S)
    avail_actions: torch.Tensor  # (B, T + 1, N, A)
    actions: torch.Tensor  # (B, T, N)
    reward: torch.Tensor  # (B, T)
    terminated: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T)
    length: list  # (B,) numbers in Python, which tell the sizes of what the mask selects without a wait


class EpisodeBuffer:
    """The latest `capacity` complete episodes and the open ones of B games, which end whenever they like.

    When a game ends, its slot enters the ring of complete ones, and the slot that drops out is its next one.
    """

    def __init__(self, capacity, num_envs, episode_limit, n_agents, obs_dim, state_dim, n_actions, device):
        def new(dtype, *shape):
            return torch.empty(capacity + num_envs, episode_limit + 1, *shape, dtype=dtype, device=device)

        self.steps = {
            # NOTE: half precision keeps three digits of features of about 1, in half the memory
            "obs": new(torch.half, n_agents, obs_dim),
            "state": new(torch.half, state_dim),
            "avail_actions": new(torch.bool, n_agents, n_actions),
            "actions": new(torch.int64, n_agents),
            "reward": new(torch.float32),
            "terminated": new(torch.bool),
        }
        self.length = torch.zeros(capacity + num_envs, dtype=torch.int64, device=device)
        self.ring = torch.arange(capacity, device=device)  # position -> slot
        self.open_slot = torch.arange(num_envs, device=device) + capacity  # (B,)
        self.time = torch.zeros(num_envs, dtype=torch.int64, device=device)  # (B,)
        self.n_episodes = 0  # completed ever

    def add(self, step, info, ended):
        """Store a step of every game, a dict of (B, ...); it ended the episodes of the games `ended` (E,)."""
        for name, value in step.items():
            self.steps[name][self.open_slot, self.time] = value.to(self.steps[name].dtype)
        self.time = self.time + 1
        if len(ended):
            slot, length = self.open_slot[ended], self.time[ended]  # (E,)
            for name in ("obs", "state", "avail_actions"):
                self.steps[name][slot, length] = info[f"final_{name}"][ended].to(self.steps[name].dtype)
            self.length[slot], self.time[ended] = length, 0
            oldest = (torch.arange(len(ended), device=slot.device) + self.n_episodes) % len(self.ring)  # (E,)
            self.open_slot[ended], self.ring[oldest] = self.ring[oldest], slot
            self.n_episodes += len(ended)

    def sample(self, draws, generator):
        """A Batch with, for each (n, latest) of `draws`, n of the latest episodes, uniform and none twice."""
        windows = [(n, min(self.n_episodes, latest, len(self.ring))) for n, latest in draws]
        age = [torch.randperm(x, generator=generator, device=self.ring.device)[:n] for n, x in windows]
        slot = self.ring[(self.n_episodes - 1 - torch.cat(age)) % len(self.ring)].unsqueeze(1)  # (B, 1)
        length = self.length[slot]  # (B, 1)
        steps = length.flatten().tolist()  # the one time per iteration that Python waits for the device
        time = torch.arange(max(steps) + 1, device=slot.device)  # (T + 1,)
        seen, acted = time.minimum(length), time[:-1].minimum(length - 1)  # (B, T + 1), (B, T)
        x = {name: x[slot, seen if name in Batch._fields[:3] else acted] for name, x in self.steps.items()}
        x |= dict(obs=x["obs"].float(), state=x["state"].float())
        return Batch(**x, mask=time[:-1] < length, length=steps)


# ---- acting and evaluation ----
EVALUATION_SEED = 1_000_000


@torch.no_grad()
def act(actor, obs, avail_actions, memory=None, epsilon=0.0, generator=None):
    """Actions (B, N) of one step, greedy without a generator, and the memory (they, hidden) for the next."""
    last_actions, hidden = memory or (torch.full_like(avail_actions[..., 0], -1, dtype=torch.int64), None)
    logits, hidden = actor(obs, last_actions, hidden)  # (B, N, A), (B, N, H)
    pi = epsilon_policy(logits, avail_actions, epsilon)  # (B, N, A)
    actions = pi.argmax(-1) if generator is None else sample_actions(pi, generator)
    return actions, (actions, hidden)


def episode_metrics(info):
    """Tag -> (B,) about every game's episode; a win rate only where a game can be won."""
    tags = dict(episodic_return="episode_return", episodic_length="episode_length", win_rate="battle_won")
    return {tag: info[key].float() for tag, key in tags.items() if key in info}


def evaluate(actor, env, video=None):
    """Greedy play from a fixed seed: means over the first episode of each game; `video`: GIF of game 0."""
    obs, _ = env.reset(seed=EVALUATION_SEED, options={"evaluation": True})
    running = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)  # (B,)
    memory, results, frames = None, {}, []
    while running.any():
        actions, memory = act(actor, obs, env.avail_actions(), memory)
        obs, _, terminated, truncated, info = env.step(actions)
        if video and running[0]:
            frames.append(Image.fromarray(np.asarray(env.render())))
        for tag, value in episode_metrics(info).items():
            results[tag] = torch.where(running, value, results.get(tag, value))  # (B,)
        running = running & ~(terminated | truncated)
    if video:
        frames[0].save(video, save_all=True, append_images=frames[1:], duration=125, loop=0)
    return {tag: value.mean().item() for tag, value in results.items()}


# ---- saving ----
def due(every, global_step, num_envs, last):
    """Whether an interval of `every` steps (0: never) ended within the latest `num_envs`, or the run does."""
    return every > 0 and (global_step % every < num_envs or last)


def save(run, args, parts, generators, global_step, iteration, train_seconds):
    """Write run/model.pt under another name, then rename it: no crash leaves half a checkpoint."""
    progress = {"global_step": global_step, "iteration": iteration, "train_seconds": train_seconds}
    checkpoint = {"args": vars(args), "rng": [generator.get_state() for generator in generators], **progress}
    checkpoint |= {name: part.state_dict() for name, part in parts.items()}
    torch.save(checkpoint, Path(run, "model.pt.tmp"))
    Path(run, "model.pt.tmp").replace(Path(run, "model.pt"))


def load(run, parts, generators=()):
    """Put run/model.pt back into networks, optimisers and generators; returns the whole checkpoint."""
    if not Path(run, "model.pt").exists():
        fail(f"{run} has no model.pt: it was stopped before its first checkpoint")
    try:
        checkpoint = torch.load(Path(run, "model.pt"), map_location="cpu", weights_only=True)
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):  # learning rates are settings, not progress
                checkpoint[name]["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(checkpoint[name])
        for generator, state in zip(generators, checkpoint["rng"], strict=False):
            if state.shape == generator.get_state().shape:  # else it comes from another kind of device
                generator.set_state(state)
    except Exception as error:  # a broken file may fail anywhere in the unpickler
        fail(f"{run}/model.pt is broken or does not fit these settings ({type(error).__name__})")
    return checkpoint


# ---- update ----
def policy(actor, batch, epsilon):
    """pi (B, T + 1, N, A) of whole episodes, in one pass from their first step."""
    return epsilon_policy(actor.unroll(batch), batch.avail_actions, epsilon)


@torch.no_grad()
def evaluate_steps(critic, state, mask, n_steps):
    """The critic's q_values (..., N, A), k (..., N), b (...) at the n_steps of a mask (...); else zeros."""
    valid = mask.nonzero_static(size=n_steps).unbind(1)
    return [x.new_zeros(*mask.shape, *x.shape[1:]).index_put(valid, x) for x in critic(state[valid])]


def descend(optimizer, loss, max_norm):
    """One step down the gradient, clipped at `max_norm`; returns its norm before."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    optimizer.step()
    return grad_norm


def update(args, actor, critic, critic_target, optimizers, batch, epsilon, generator, train_actor):
    """One iteration of Algorithm 1 of [DOP]; the first `on_policy_batch` episodes are the on-policy ones."""
    n, logs = args.on_policy_batch, {}
    on, off = Batch(*(x[:n] for x in batch)), Batch(*(x[n:] for x in batch))
    mask, actions = batch.mask, batch.actions.unsqueeze(-1)  # (B, T), (B, T, N, 1)
    n_steps, n_on = sum(batch.length), sum(on.length)

    # actor; its forward pass also serves the on-policy targets
    pi = policy(actor, on, epsilon)  # (n, T + 1, N, A)
    if train_actor:
        q_values, k, _ = evaluate_steps(critic, on.state[:, :-1], on.mask, n_on)
        if args.actor_gradient == "expected":
            actor_loss = expected_policy_gradient_loss(k, q_values, pi[:, :-1], on.mask)
        else:
            actor_loss = sampled_policy_gradient_loss(k, q_values, pi[:, :-1], on.actions, on.mask)
        logs = dict(actor_loss=actor_loss.detach(), grad_norm_actor=descend(optimizers[0], actor_loss, 20.0))

    # targets
    with torch.no_grad():
        # of the policies before the actor's step on-policy, after it off-policy: one pass each is enough
        pi = torch.cat([pi, policy(actor, off, epsilon)])  # (B, T + 1, N, A)
        entropy = -(pi * pi.clamp_min(1e-8).log()).sum(-1)[:n, :-1]  # (n, T, N)
        seen = F.pad(mask, (1, 0), value=True)  # (B, T + 1)
        q_values, k, b = evaluate_steps(critic_target, batch.state, seen, n_steps + len(mask))
        q_taken = q_values[:, :-1].gather(-1, actions).squeeze(-1)  # (B, T, N)
        q_tot = decomposed_q(k[:, :-1], b[:, :-1], q_taken)  # (B, T)
        v = expected_q(k, b, q_values, pi)  # (B, T + 1)
        if args.tree_backup == "sampled":
            n_samples = 20 if pi.shape[2] <= 2 else 200  # section 5.1.1 of [DOP]
            v[n:] = sampled_expected_q(k[n:], b[n:], q_values[n:], pi[n:], n_samples, generator)
        last = mask & ~F.pad(mask[:, 1:], (0, 1))  # (B, T)
        next_q = torch.where(last, v[:, 1:], F.pad(q_tot[:, 1:], (0, 1)))  # (B, T)
        pi_joint = pi[:, :-1].gather(-1, actions).squeeze(-1).prod(-1)  # (B, T)
        on_steps = (on.reward, on.terminated, on.mask, q_tot[:n], next_q[:n])
        off_steps = (off.reward, off.terminated, off.mask, q_tot[n:], v[n:, 1:], pi_joint[n:])
        # Eq. 8 of [DOP], and Eq. 7
        on_target = td_lambda_targets(*on_steps, args.gamma, args.td_lambda)  # (n, T)
        off_target = tree_backup_targets(*off_steps, args.gamma, args.tb_lambda, args.n_steps)  # (B - n, T)
        td_target = torch.cat([on_target, off_target])  # (B, T)
        kappa = 0.0 if args.tree_backup == "none" else args.kappa
        on_weight, off_weight = (1 - kappa) / on.mask.sum(), kappa / off.mask.sum()
        weight = torch.cat([on.mask * on_weight, off.mask * off_weight])  # (B, T)

    # critic
    valid = mask.nonzero_static(size=n_steps).unbind(1)  # (M,), (M,)
    batch = [x[valid] for x in (batch.state[:, :-1], actions, td_target, weight)]  # (M, ...)
    order = torch.randperm(n_steps, generator=generator, device=mask.device).chunk(args.critic_updates)
    steps = []
    for index in order:
        state, actions, td_target, weight = (x[index] for x in batch)
        q_values, k, b = critic(state)
        q_tot = decomposed_q(k, b, q_values.gather(-1, actions).squeeze(-1))
        assert td_target.shape == q_tot.shape
        # Eq. 6 of [DOP]: L = kappa L_TB + (1 - kappa) L_On, each a mean over its own transitions
        critic_loss = len(order) * (weight * (td_target - q_tot).square()).sum()
        grad_norm = descend(optimizers[1], critic_loss, 20.0)  # official code
        steps.append(torch.stack([critic_loss.detach(), grad_norm, q_tot.detach().mean()]))
    logs["critic_loss"], logs["grad_norm_critic"], logs["q_taken"] = torch.stack(steps).mean(0)
    return logs | {"td_target": batch[2].mean(), "entropy": entropy[valid[0][:n_on], valid[1][:n_on]].mean()}


if __name__ == "__main__":
    args = parse_args()

    # ---- run ----
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    # TF32 on a GPU, for matrix products and recurrent layers alike: faster, and three digits are enough here
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.fp32_precision = "tf32"
    torch.manual_seed(args.seed)
    try:
        env = make(args.env, args.num_envs, device, args.seed, validate=False)
        eval_env = make(args.env, args.eval_episodes, device, EVALUATION_SEED, validate=False)
        if args.capture_video:  # whoever draws no pictures says so now, not at the first evaluation
            eval_env.reset()
            eval_env.render()
    except (ValueError, RuntimeError) as error:
        fail(error)
    generator = torch.Generator(device).manual_seed(args.seed)

    # ---- networks and storage ----
    if not isinstance(env.single_action_space, gymnasium.spaces.MultiDiscrete):
        fail(f"{args.env} has continuous actions; this algorithm needs discrete ones")
    n_agents, n_actions = env.n_agents, int(env.single_action_space.nvec[0])
    actor = Actor(env.obs_dim, n_agents, n_actions, hidden_dim=64).to(device)
    if env.action_bias is not None:
        actor.head.bias.data += env.action_bias
    if run := args.evaluate:
        global_step = load(run, {"actor": actor})["global_step"]
        results = evaluate(actor, eval_env, Path(run, "evaluate.gif") if args.capture_video else None)
        print("run | step |", " | ".join(results))
        print(run, "|", global_step, "|", " | ".join(f"{x:.3f}" for x in results.values()))
        sys.exit()
    critic_options = dict(hidden_dim=256, separate=args.separate_critics, zero_init=args.critic_warmup > 0)
    critic = DecomposedCritic(env.state_dim, n_agents, n_actions, **critic_options).to(device)
    critic_target = copy.deepcopy(critic)
    actor_optimizer = torch.optim.RMSprop(actor.parameters(), lr=args.actor_lr, alpha=0.99, eps=1e-5)
    critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=args.critic_lr, alpha=0.99, eps=1e-5)
    optimizers = (actor_optimizer, critic_optimizer)
    parts = {"actor": actor, "critic": critic, "critic_target": critic_target}
    parts |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    draws = [(args.on_policy_batch, args.on_policy_size), (args.off_policy_batch, args.off_policy_size)]
    if any(n > size for n, size in draws) or args.off_policy_size < max(args.on_policy_size, args.num_envs):
        fail(
            "a batch is larger than its buffer, or --off-policy-size less than --on-policy-size or --num-envs"
        )
    draws = draws[:1] if args.tree_backup == "none" else draws
    sizes = (env.episode_limit, n_agents, env.obs_dim, env.state_dim, n_actions)
    try:
        buffer = EpisodeBuffer(args.off_policy_size, args.num_envs, *sizes, device)
    except RuntimeError:
        fail(f"no memory for {args.off_policy_size} x {env.episode_limit} steps; lower --off-policy-size")

    # ---- run folder ----
    run, generators = args.resume, (generator, env.generator)
    checkpoint = load(run, parts, generators) if run else {}
    global_step, iteration = checkpoint.get("global_step", 0), checkpoint.get("iteration", 0)
    train_seconds = checkpoint.get("train_seconds", 0.0)
    if global_step >= args.total_timesteps:
        fail(f"{run} is at step {global_step} already; raise --total-timesteps to go on")
    run = run or f"{args.run_dir}/{args.env.lower()}__{args.exp_name}__{args.seed}__{int(time.time())}"
    try:
        Path(run).mkdir(parents=True, exist_ok=True)
        Path(run, "args.json").write_text(json.dumps(vars(args), indent=2))
    except OSError as error:
        fail(f"cannot write the run folder: {error}")
    writer = SummaryWriter(run, purge_step=global_step + 1 if checkpoint else None)
    print(f"{json.dumps(vars(args), indent=2)}\nrun folder {run}", flush=True)
    stop = []  # Ctrl-C or kill ends the run after the step in progress, a second one at once
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda name, _: (stop.append(True), signal.signal(name, signal.SIG_DFL)))

    # ---- loop ----
    obs, _ = env.reset()  # (B, N, O)
    memory, recent, losses, new_episodes = None, [], {}, 0
    start_step, start_seconds = global_step, train_seconds
    bar = tqdm(total=args.total_timesteps, initial=global_step, disable=not sys.stderr.isatty())
    while global_step < args.total_timesteps and not stop:
        # act, step
        started = time.perf_counter()
        decay = min(1.0, global_step / args.epsilon_steps)
        epsilon = args.epsilon_start + decay * (args.epsilon_end - args.epsilon_start)
        schedule = {"epsilon": epsilon}
        state, avail_actions = env.state(), env.avail_actions()
        actions, memory = act(actor, obs, avail_actions, memory, epsilon, generator)
        try:
            next_obs, reward, terminated, truncated, info = env.step(actions)
        except RuntimeError as error:  # of the game, which may be a program of its own
            save(run, args, parts, generators, global_step, iteration, train_seconds)
            fail(f"{error}; saved {run}/model.pt")
        actions = info.get("actions", actions)

        # store
        step = dict(obs=obs, state=state, avail_actions=avail_actions, actions=actions, reward=reward)
        done = terminated | truncated  # (B,)
        ended = done.nonzero().squeeze(1)  # (E,), the one time per step that Python waits for the device
        buffer.add(step | {"terminated": terminated}, info, ended)
        obs, memory = next_obs, (actions.masked_fill(done[:, None], -1), memory[1] * ~done[:, None, None])
        if len(ended):
            recent.append(torch.stack([x[ended] for x in episode_metrics(info).values()]))  # (metrics, E)
        new_episodes += len(ended)
        global_step += args.num_envs

        # update
        while new_episodes >= args.episodes_per_iteration:
            new_episodes -= args.episodes_per_iteration
            if buffer.n_episodes < max(n for n, _ in draws):
                continue
            iteration += 1
            losses = update(
                args, actor, critic, critic_target, optimizers, buffer.sample(draws, generator), epsilon,
                generator, train_actor=iteration > args.critic_warmup,
            )  # fmt: skip
            if iteration % args.target_period == 0:
                critic_target.load_state_dict(critic.state_dict())
        train_seconds += time.perf_counter() - started

        # log
        sps = (global_step - start_step) / (train_seconds - start_seconds)
        last = global_step >= args.total_timesteps or bool(stop)
        save_due = due(args.save_every, global_step, args.num_envs, last=False)
        bar.update(args.num_envs)
        if due(args.log_every, global_step, args.num_envs, last) or save_due:
            means = torch.cat(recent, 1).mean(1).tolist() if recent else ()
            charts = dict(zip(episode_metrics(info), means, strict=False)) | {"SPS": sps}
            bar.set_postfix(charts)
            if bar.disable and not args.eval_every:
                tqdm.write(f"step {global_step}, " + ", ".join(f"{x} {y:.2f}" for x, y in charts.items()))
            charts |= {"train_seconds": train_seconds} | schedule
            recent, numbers = [], torch.stack([*losses.values()]).tolist() if losses else ()
            for group, values in (("losses", dict(zip(losses, numbers, strict=True))), ("charts", charts)):
                for name, value in values.items():
                    if not math.isfinite(value):
                        writer.close()
                        fail(f"{name} is {value} at step {global_step}; model.pt, if there, is from before")
                    writer.add_scalar(f"{group}/{name}", value, global_step)

        # evaluate, save
        if due(args.eval_every, global_step, args.num_envs, last) and not stop:
            video = Path(run, f"{global_step}.gif") if args.capture_video else None
            results = evaluate(actor, eval_env, video)
            for name, value in results.items():
                writer.add_scalar(f"eval/{name}", value, global_step)
            line = ", ".join(f"{name} {value:.2f}" for name, value in results.items())
            tqdm.write(f"step {global_step}, {sps:.0f} steps/s, greedy {line}")
        if save_due:
            save(run, args, parts, generators, global_step, iteration, train_seconds)

    # ---- close ----
    save(run, args, parts, generators, global_step, iteration, train_seconds)
    bar.close()
    writer.close()
    env.close()
    print(f"saved {run}/model.pt")
    sys.exit(130 if stop else 0)
