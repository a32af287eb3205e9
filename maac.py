"""MAAC: soft actor-critic for teams, whose critics attend to the other agents.

Every agent has a policy on its own observation and a critic that sees what the agent sees, and of the others
what its attention picks: keys, values and queries are shared by all critics. A critic values all of the
agent's own actions at once, so their mean under its policy is the baseline of its policy gradient.
[MAAC] Iqbal and Sha, "Actor-Attention-Critic for Multi-Agent Reinforcement Learning", ICML 2019.

    python maac.py --env mill
    python maac.py --env 3m

B games or batch, N agents, A discrete actions, D action dimensions (A if discrete), O observation, S state,
G networks, M inputs of a network, H units of the critics, E units of a head, P pairs of a game and a head.

Differs from the paper:
1. all critics learn the team reward, which is neither normalised nor scaled;
2. continuous actions, of which the paper only says how to get the baseline and its code has none, are our own
   version: Gaussian policies squashed by tanh, heads that take the own action, reparameterised gradients;
3. clipped in one: the gradients of all policies;
4. an episode ended by the clock bootstraps from its own last observation;
5. critics and policies take the same batch, and targets move at every update, as in the official code.

Differs from the official code: inputs are not normalised; policies and heads use ReLU; gradients of shared
weights are not divided by N; the entropy is discounted and ends with the episode, as in the paper's target.
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
    env: str = "mill"
    """environment id, in any case, arguments behind commas (cdm,n_agents=5); its PRESETS beat defaults"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where everything lives; auto takes cuda if there is one"""
    total_timesteps: int = 1_000_000
    """environment steps of the run; one step of one game counts as 1"""
    num_envs: int = 12
    """games played in parallel"""
    eval_every: int = 5_000
    """environment steps between two evaluations (0: none)"""
    eval_episodes: int = 128
    """games of one evaluation, all in parallel"""
    log_every: int = 1_000
    """environment steps between two points of charts and losses"""
    save_every: int = 50_000
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
    actor_lr: float = 1e-3
    """learning rate of the policies (official code)"""
    critic_lr: float = 1e-3
    """learning rate of the critics (official code)"""
    critic_weight_decay: float = 1e-3
    """L2 penalty on the critics' weights (official code)"""
    gamma: float = 0.99
    """discount (official code)"""
    tau: float = 1e-3
    """share of the live networks that enters the targets at an update (official code)"""
    alpha: float = 0.01
    """temperature: weight of the entropy beside rewards (official code: 1 / its reward_scale of 100)"""
    hidden_dim: int = 128
    """units of a policy's two hidden layers (official code)"""
    critic_dim: int = 128
    """units of the critics' encodings, of all heads together, and of a hidden layer (official code)"""
    heads: int = 4
    """attention heads, a divisor of critic_dim (official code)"""
    attention_penalty: float = 1e-3
    """weight of the mean square of attention logits in the critic loss (official code)"""
    logit_penalty: float = 1e-3
    """weight of the mean square of discrete actions' logits in the actor loss (official code)"""
    max_grad_norm: float = 0.5
    """norm that the policies' gradients are clipped to (official code, each apart; 0: no clipping)"""
    critic_max_grad_norm: float = 10.0
    """the same of the critics, per agent (official code)"""
    batch_size: int = 1024
    """transitions per update (official code)"""
    buffer_size: int = 1_000_000
    """transitions in the replay buffer (official code)"""
    warmup_steps: int = 1_024
    """environment steps before the first update, by the untrained policies (official code: a batch)"""
    update_every: int = 25
    """environment steps per update (official code: 4 updates every 100 steps)"""


# environment id -> what differs from the defaults
PRESETS = {
    # particle tasks: games, replay, critic updates, tau of dop_deterministic.py, learning rates as published
    "aggregation": dict(
        total_timesteps=500_000, num_envs=32, eval_every=20_000, log_every=5_000, tau=0.05, batch_size=256,
        buffer_size=250_000, warmup_steps=100_000, update_every=32,
    ),
    "mill": dict(
        total_timesteps=60_000, num_envs=32, tau=0.05, batch_size=256, buffer_size=250_000,
        warmup_steps=5_000, update_every=32,
    ),
    # discount and speed of the policies as for maddpg.py: those of the official code diverge here
    "spread": dict(
        total_timesteps=500_000, num_envs=32, eval_every=20_000, tau=0.05, batch_size=256,
        buffer_size=250_000, warmup_steps=5_000, update_every=32, gamma=0.95, actor_lr=1e-4,
    ),
    "cdm": dict(
        total_timesteps=10_000, num_envs=4, log_every=100, eval_every=500, eval_episodes=1, save_every=0,
        batch_size=128, warmup_steps=256, update_every=4,
    ),
}  # fmt: skip
PRESETS |= {"aggregation_hard": PRESETS["aggregation"]}
# of numbers, where an integer may be less than 1 or another number may leave 0 to 1
LIMITS = dict.fromkeys(("seed", "eval_every", "save_every", "warmup_steps"), (0, math.inf))
LIMITS |= dict.fromkeys(("alpha", "max_grad_norm", "critic_max_grad_norm"), (0, math.inf))


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
class Perceptrons(nn.Module):
    """G perceptrons of equal shape, evaluated at once: x (..., G, n_in) -> (..., G, n_out); G = 1: any x."""

    def __init__(self, groups, *sizes, final_init=0.0):
        super().__init__()
        self.groups = groups
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in pairwise(sizes):
            final = final_init if len(self.weights) == len(sizes) - 2 else 0.0
            bound = final or n_in**-0.5  # as nn.Linear and as [DDPG]
            self.weights.append(torch.empty(groups, n_in, n_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(groups, 1, n_out).uniform_(-bound, bound))
        self.layers = tuple(zip(self.weights, self.biases, strict=True))  # reading the lists takes long

    def forward(self, x):
        shape = x.shape[:-1]
        x = x.reshape(-1, self.groups, x.shape[-1]).transpose(0, 1)  # (G, M, n_in)
        for layer, (weight, bias) in enumerate(self.layers):
            x = torch.baddbmm(bias, F.relu(x) if layer else x, weight)
        return x.transpose(0, 1).reshape(*shape, -1)  # (..., G, n_out)


class Actor(Perceptrons):
    """A policy network per agent: logits of discrete actions, or mean and log deviation before the tanh."""

    def __init__(self, groups, *sizes, low, high):
        super().__init__(groups, *sizes)
        self.register_buffer("low", low)  # (N, D), the environment's bounds
        self.register_buffer("high", high)

    def forward(self, obs, avail_actions):
        """obs (B, N, O), avail_actions (B, N, A) or None -> logits (B, N, A), or (B, N, 2 D)."""
        x = super().forward(obs)
        return x if avail_actions is None else torch.where(avail_actions, x, -1e9)


class AttentionCritic(nn.Module):
    """Q_i of every agent, of all its actions if they are discrete, else of one (Figure 1 of [MAAC])."""

    def __init__(self, n_agents, obs_dim, action_dim, critic_dim, heads, discrete):
        super().__init__()
        self.heads, self.discrete = heads, discrete
        self.own_encoder = Perceptrons(n_agents, obs_dim, critic_dim)
        self.other_encoder = Perceptrons(n_agents, obs_dim + action_dim, critic_dim)
        self.query, self.key = (nn.Linear(critic_dim, critic_dim, bias=False) for _ in range(2))
        self.value = nn.Linear(critic_dim, critic_dim)
        n_in, n_out = (2 * critic_dim, action_dim) if discrete else (2 * critic_dim + action_dim, 1)
        self.head = Perceptrons(n_agents, n_in, critic_dim, n_out)

    def forward(self, obs, actions, own_actions=None):
        """obs (B, N, O), actions (B, N, D) -> q_taken (B, N), q_values (B, N, A or 1), logits (P, N, N).

        Others see an agent's `actions`; continuous `own_actions` are what its own critic takes instead.
        """
        B, N, _ = obs.shape
        own = F.leaky_relu(self.own_encoder(obs)).transpose(0, 1)  # (N, B, H)
        other = F.leaky_relu(self.other_encoder(torch.cat([obs, actions], -1))).transpose(0, 1)  # (N, B, H)
        parts = self.query(own), self.key(other), F.leaky_relu(self.value(other))
        seen, logits = attention(*(x.view(N, B * self.heads, -1) for x in parts))  # (N, P, H / heads)
        parts = [torch.cat([x.view(N, B, self.heads, -1) for x in (own, seen)], 2).flatten(2)]  # (N, B, 2 H)
        if not self.discrete:
            parts.append((actions if own_actions is None else own_actions).transpose(0, 1))
        # Eq. 5 of [MAAC]: Q_i = f_i(g_i(o_i), x_i), with the own action among the outputs, not in g_i
        q_values = self.head(torch.cat(parts, -1).transpose(0, 1))  # (B, N, A or 1)
        q_taken = (q_values * actions).sum(-1) if self.discrete else q_values.squeeze(-1)
        return q_taken, q_values, logits


# ---- equations ----
LOG_STD = (-5.0, 2.0)  # bounds of continuous policies' log deviation


def attention(query, keys, values):
    """What each agent picks from the others' values; all (N, P, E), without others 0. Also the logits.

    The logits (P, N, N) are those before scaling, of agent j in row j for agent i in column i, 0 at i = j.
    """
    others = 1 - torch.eye(len(query), dtype=query.dtype, device=query.device)  # (N, N)
    # Eq. 6 of [MAAC]: alpha_j ~ exp(e_j^T W_k^T W_q e_i), over j other than i
    logits = torch.bmm(keys.transpose(0, 1), query.permute(1, 2, 0)) * others  # (P, N, N)
    weights = (logits / query.shape[-1] ** 0.5 - 1e9 * (1 - others)).softmax(1) * others  # (P, N, N)
    # x_i = sum_j alpha_j v_j, below Eq. 5 of [MAAC]
    return torch.bmm(weights.transpose(1, 2), values.transpose(0, 1)).transpose(0, 1), logits


def soft_td_targets(reward, terminated, next_q, next_log_pi, gamma, alpha):
    """Targets (B, N) from reward and terminated (B,), next_q and next_log_pi (B, N) of the next actions.

    Neither value nor entropy follows a terminated step; both follow a truncated one.
    """
    assert next_q.shape == next_log_pi.shape and reward.shape == terminated.shape
    goes_on = 1 - terminated.to(reward.dtype)  # (B,)
    # Eq. 7 of [MAAC]: y_i = r_i + gamma E[Q'_i(o', a') - alpha log pi'_i(a'_i | o'_i)], a' ~ pi'(o')
    return reward.unsqueeze(-1) + gamma * goes_on.unsqueeze(-1) * (next_q - alpha * next_log_pi)


def counterfactual_advantage(q_values, pi, actions):
    """A_i (B, N) of discrete actions, one-hot, from q_values of all own actions; all (B, N, A)."""
    assert q_values.shape == pi.shape == actions.shape
    # Eq. 9 of [MAAC]: A_i = Q_i(o, a) - b_i
    # Eq. 10 of [MAAC]: b_i = sum_{a'_i} pi_i(a'_i | o_i) Q_i(o, (a'_i, a_others))
    return (q_values * (actions - pi)).sum(-1)


def soft_policy_gradient_loss(log_pi_taken, advantage, alpha):
    """Loss of the policies, summed over agents, of sampled discrete actions; both (B, N)."""
    assert log_pi_taken.shape == advantage.shape
    # Eq. 8 of [MAAC]: grad J_i = E[grad log pi_i(a_i | o_i) (-alpha log pi_i(a_i | o_i) + Q_i(o, a) - b_i)]
    return -(log_pi_taken * (advantage - alpha * log_pi_taken).detach()).mean(0).sum()


def sample_categorical(logits, generator):
    """Actions as one-hot vectors (..., A), without gradient, and their log_pi (...)."""
    log_pi = logits.log_softmax(-1)  # (..., A)
    race = torch.empty_like(log_pi).exponential_(generator=generator).clamp_min(1e-30)
    # first to arrive, at the rate pi; illegal actions have pi = 0 exactly
    actions = F.one_hot((log_pi.detach().exp() / race).argmax(-1), logits.shape[-1]).to(log_pi.dtype)
    return actions, (log_pi * actions).sum(-1)


def sample_squashed(policy, generator):
    """Actions (..., D) in -1..1 and their log_pi (...), both with a gradient to policy (..., 2 D)."""
    mean, log_std = policy.chunk(2, -1)  # (..., D)
    log_std = log_std.clamp(*LOG_STD)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    x = mean + log_std.exp() * noise
    # log N(x) - log(1 - tanh(x)^2), the latter in a form that does not overflow
    log_pi = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_pi = log_pi - 2 * (math.log(2) - x - F.softplus(-2 * x))
    return x.tanh(), log_pi.sum(-1)


# ---- storage ----
class Batch(NamedTuple):
    """Transitions; `next_*` is what the step led to, also where it ended the episode."""

    obs: torch.Tensor  # (B, N, O)
    state: torch.Tensor  # (B, S)
    avail_actions: torch.Tensor | None  # (B, N, A), None: continuous actions
    actions: torch.Tensor  # (B, N) or (B, N, D), as the environment takes them
    reward: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, N, O)
    next_state: torch.Tensor  # (B, S)
    next_avail_actions: torch.Tensor | None  # (B, N, A)


class ReplayBuffer:
    """The latest `capacity` transitions of all games, in tensors that the first `add` lays out."""

    def __init__(self, capacity):
        self.capacity, self.n_steps, self.steps = capacity, 0, None

    def add(self, step):
        """Store a Batch with a transition of every game."""
        if self.steps is None:
            try:
                self.steps = [x if x is None else x.new_empty(self.capacity, *x.shape[1:]) for x in step]
            except RuntimeError:
                fail(f"no memory for {self.capacity} transitions; lower --buffer-size")
        slot = torch.arange(len(step.reward), device=step.reward.device) + self.n_steps  # (B,)
        slot = slot % self.capacity
        for stored, x in zip(self.steps, step, strict=True):
            if x is not None:
                stored[slot] = x
        self.n_steps += len(step.reward)

    def sample(self, n, generator):
        """A Batch of n stored transitions, uniform, with repetition."""
        stored = min(self.n_steps, self.capacity)
        index = torch.randint(stored, (n,), generator=generator, device=generator.device)
        return Batch(*(x if x is None else x[index] for x in self.steps))


# ---- acting and evaluation ----
EVALUATION_SEED = 1_000_000


@torch.no_grad()
def act(actor, obs, avail_actions, memory=None, generator=None):
    """Actions of one step, sampled, or the likeliest (mean, if continuous) without a generator; and None."""
    policy = actor(obs, avail_actions)  # (B, N, A) or (B, N, 2 D)
    if avail_actions is not None:
        return (policy if generator is None else sample_categorical(policy, generator)[0]).argmax(-1), None
    actions = policy.chunk(2, -1)[0].tanh() if generator is None else sample_squashed(policy, generator)[0]
    return torch.lerp(actor.low, actor.high, (actions + 1) / 2), None


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
def encode(actor, actions):
    """Actions (B, N, D) for the critic, of those for the environment: scaled to -1..1, or one-hot vectors."""
    if actions.dtype == torch.int64:
        return F.one_hot(actions, actor.high.shape[-1]).float()
    return 2 * (actions - actor.low) / (actor.high - actor.low) - 1


def descend(optimizer, loss, max_grad_norm):
    """One step down the gradient, clipped at a norm (0: not); returns the norm."""
    parameters = optimizer.param_groups[0]["params"]
    grads = torch.autograd.grad(loss, parameters)  # of no others: the actor's loss runs through the critic
    grad_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    if max_grad_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    optimizer.step()
    return grad_norm


@torch.no_grad()
def follow(target, network, tau):
    """Move a target network by the share tau towards the live one; tau = 1 copies it."""
    torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), tau)


def merge(*parts):
    """Tensors (B, ...), or their first row (1, ...) if all rows are the same: one state stands for all."""
    same = torch.stack([(x == x[:1]).all() for x in parts]).all()
    return [x[:1] for x in parts] if same else parts


def update(args, actor, critic, actor_target, critic_target, optimizers, batch, generator):
    """Critics, policies and targets, all on one batch (Algorithm 1 of [MAAC])."""
    actions = encode(actor, batch.actions)  # (B, N, D)
    (B, N, _), discrete = actions.shape, batch.avail_actions is not None
    sample = sample_categorical if discrete else sample_squashed
    obs, next_obs = merge(batch.obs, batch.next_obs)  # (U, N, O), U = B or 1

    # critic
    with torch.no_grad():
        policy = actor_target(next_obs, batch.next_avail_actions).expand(B, -1, -1)  # (B, N, A or 2 D)
        next_actions, next_log_pi = sample(policy, generator)  # (B, N, D), (B, N)
        next_q, _, _ = critic_target(batch.next_obs, next_actions)  # (B, N)
        td_target = soft_td_targets(
            batch.reward, batch.terminated, next_q, next_log_pi, args.gamma, args.alpha
        )  # (B, N)
    q_taken, _, logits = critic(batch.obs, actions)  # (B, N), (P, N, N)
    assert td_target.shape == q_taken.shape
    # Eq. 7 of [MAAC]: L = sum_i E[(Q_i(o, a) - y_i)^2]
    critic_loss = (q_taken - td_target).square().mean(0).sum()
    # mean over batch and others, sum over agents and heads, as in the official code
    penalty = args.attention_penalty * logits.square().sum() / (B * max(N - 1, 1))
    grad_norm_critic = descend(optimizers[1], critic_loss + penalty, N * args.critic_max_grad_norm)

    # actor
    policy = actor(obs, batch.avail_actions).expand(B, -1, -1)  # (B, N, A or 2 D)
    own, log_pi = sample(policy, generator)  # (B, N, D), (B, N)
    if discrete:
        with torch.no_grad():
            _, q_values, _ = critic(batch.obs, own)  # (B, N, A)
            advantage = counterfactual_advantage(q_values, policy.softmax(-1), own)  # (B, N)
        actor_loss = soft_policy_gradient_loss(log_pi, advantage, args.alpha)
        legal = policy.masked_fill(~batch.avail_actions, 0.0)  # (B, N, A)
        actor_loss = actor_loss + args.logit_penalty * legal.square().mean((0, 2)).sum()
    else:
        # NOTE: the paper keeps Eq. 8, its baseline estimated; here reparameterised, others' actions constant
        q_own, _, _ = critic(batch.obs, own.detach(), own)  # (B, N)
        actor_loss = (args.alpha * log_pi - q_own).mean(0).sum()
    grad_norm_actor = descend(optimizers[0], actor_loss, args.max_grad_norm)

    # targets
    follow(actor_target, actor, args.tau)
    follow(critic_target, critic, args.tau)
    losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "q_taken": q_taken.mean()}
    losses |= {"td_target": td_target.mean(), "entropy": -log_pi.mean(), "grad_norm_actor": grad_norm_actor}
    return {name: value.detach() for name, value in losses.items()} | {"grad_norm_critic": grad_norm_critic}


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
    space, n_agents = env.single_action_space, env.n_agents
    if discrete := isinstance(space, gymnasium.spaces.MultiDiscrete):
        low, high = torch.zeros(2, n_agents, int(space.nvec[0]))
    else:
        low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)  # (N, D)
        if not (low.isfinite() & high.isfinite()).all():
            fail(f"{args.env} has actions without finite bounds; this algorithm needs bounds to scale them")
    action_dim = low.shape[1]
    actor_sizes = (env.obs_dim, args.hidden_dim, args.hidden_dim, action_dim if discrete else 2 * action_dim)
    actor = Actor(n_agents, *actor_sizes, low=low, high=high).to(device)
    if env.action_bias is not None:
        actor.biases[-1].data += env.action_bias
    if run := args.evaluate:
        global_step = load(run, {"actor": actor})["global_step"]
        results = evaluate(actor, eval_env, Path(run, "evaluate.gif") if args.capture_video else None)
        print("run | step |", " | ".join(results))
        print(run, "|", global_step, "|", " | ".join(f"{x:.3f}" for x in results.values()))
        sys.exit()
    if args.critic_dim % args.heads:
        fail(f"--critic-dim must be a multiple of --heads, {args.heads}, got {args.critic_dim}")
    critic_sizes = (env.obs_dim, action_dim, args.critic_dim, args.heads, discrete)
    critic = AttentionCritic(n_agents, *critic_sizes).to(device)
    actor_target, critic_target = copy.deepcopy(actor), copy.deepcopy(critic)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.actor_lr, fused=True)
    critic_options = dict(lr=args.critic_lr, weight_decay=args.critic_weight_decay, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), **critic_options)
    optimizers = (actor_optimizer, critic_optimizer)
    parts = {"actor": actor, "critic": critic, "actor_target": actor_target, "critic_target": critic_target}
    parts |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    buffer = ReplayBuffer(args.buffer_size)
    if args.buffer_size < args.num_envs:
        fail(f"--buffer-size must be at least --num-envs, {args.num_envs}")

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
    memory, recent, losses, new_steps, schedule = None, [], {}, 0, {}
    start_step, start_seconds = global_step, train_seconds
    bar = tqdm(total=args.total_timesteps, initial=global_step, disable=not sys.stderr.isatty())
    while global_step < args.total_timesteps and not stop:
        # act, step
        started = time.perf_counter()
        state, avail_actions = env.state(), env.avail_actions()
        actions, memory = act(actor, obs, avail_actions, memory, generator)
        try:
            next_obs, reward, terminated, truncated, info = env.step(actions)
        except RuntimeError as error:  # of the game, which may be a program of its own
            save(run, args, parts, generators, global_step, iteration, train_seconds)
            fail(f"{error}; saved {run}/model.pt")
        actions = info.get("actions", actions)

        # store
        final = (info["final_obs"], info["final_state"], info["final_avail_actions"])
        buffer.add(Batch(obs, state, avail_actions, actions, reward, terminated, *final))
        obs, done = next_obs, terminated | truncated  # (B, N, O), (B,)
        ended = done.nonzero().squeeze(1)  # (E,), Python waits for the device here and in merge()
        if len(ended):
            recent.append(torch.stack([x[ended] for x in episode_metrics(info).values()]))  # (metrics, E)
        new_steps += args.num_envs
        global_step += args.num_envs

        # update
        while new_steps >= args.update_every:
            new_steps -= args.update_every
            if buffer.n_steps < args.warmup_steps:
                continue
            iteration += 1
            batch = buffer.sample(args.batch_size, generator)
            losses = update(args, actor, critic, actor_target, critic_target, optimizers, batch, generator)
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
