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
4. replayed observations and states that stay within about 1 are in half precision, to halve the memory.

By default also, to win in less time (docs/dop_stochastic.md), unlike `--setting paper` and `official`:
5. more games; the critic takes 8 minibatches, at another learning rate; epsilon falls sooner;
6. the expectation over an agent's own action in Eq. 9 is exact, not sampled;
7. the local critics share their two layers and start at zero, and the actor waits for them;
8. a pull to uniform policies keeps the softmax from saturating; the actor's learning rate is twice theirs;
9. evaluations play an average of the latest actors, which falls back less often on most maps.
"""

import copy
import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import machine
from envs import Stream, evaluate, make


# ---- settings ----
@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, a part of the run folder's name
    seed: int = 1  # seed of networks, games, exploration and sampling; evaluation has its own
    env: str = "mmm"  # environment id, with arguments as in cdm,n_agents=5; its PRESETS beat defaults
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where everything lives; auto takes cuda if there is one
    total_timesteps: int = 500_000  # environment steps of the run; one step of one game counts as 1
    num_envs: int = 16  # games played in parallel
    eval_every: int = 20_000  # environment steps between two evaluations (0: none)
    eval_episodes: int = 128  # games of one evaluation, all in parallel
    log_every: int = 1_000  # environment steps between two points of charts and losses
    save_every: int = 100_000  # environment steps between two checkpoints (0: only at the end)
    save_replay: bool = False  # put the replay into checkpoints, so that a resumed run goes on exactly
    capture_video: bool = False  # save one game of every evaluation as a GIF in the run folder
    resume: str | None = None  # run folder to continue with its own settings
    run_dir: str = "runs"  # folder of the run folders

    # Algorithm specific arguments
    setting: Literal["default", "paper", "official"] = "default"  # entry of PRESETS to start from; flags win
    hidden_dim: int = 64  # units of the policies' layers (official code)
    critic_hidden_dim: int = 256  # units of the critic's two hidden layers (Appendix G.1 of [DOP])
    actor_lr: float = 1e-3  # learning rate of the actor (5e-4 in Appendix G.1 of [DOP])
    critic_lr: float = 5e-4  # learning rate of the critic (both 5e-4 and 1e-4 in Appendix G.1 of [DOP])
    gamma: float = 0.99  # discount (official code)
    td_lambda: float = 0.8  # lambda of the on-policy targets, Eq. 8 (official code)
    tb_lambda: float = 0.93  # lambda of the tree backup, Eq. 7 (official code)
    n_steps: int = 5  # steps k of the tree backup (Appendix G.1 of [DOP])
    kappa: float = 0.5  # weight of the off-policy loss in Eq. 6 (Appendix G.1 of [DOP])
    tree_backup: Literal["decomposed", "sampled", "none"] = "decomposed"  # by Eq. 5, samples, none (5.1.1)
    actor_gradient: Literal["expected", "sampled"] = "expected"  # of Eq. 9: over all own actions, or one
    actor_loss_mean: Literal["steps", "agents"] = "steps"  # mean over steps, or agents too (official code)
    uniform_coef: float = 0.01  # weight of the pull to uniform policies in the actor's loss (0 in [DOP])
    averaging: float = 0.98  # weight of the past in the average of actors that evaluations play (0: none)
    separate_critics: bool = False  # a network per local critic (Appendix G.1 of [DOP]), not only a head
    epsilon_start: float = 0.5  # share of uniform exploration at the start (1.0 in Appendix G.1 of [DOP])
    epsilon_end: float = 0.05  # the same after the decay (Appendix G.1 of [DOP])
    epsilon_steps: int = 50_000  # environment steps of the linear decay (500,000 in Appendix G.1 of [DOP])
    off_policy_size: int = 5_000  # latest episodes in the off-policy buffer (Appendix G.1 of [DOP])
    off_policy_batch: int = 32  # episodes per off-policy batch (Appendix G.1 of [DOP])
    on_policy_size: int = 32  # latest episodes that count as on-policy (Appendix G.1 of [DOP])
    on_policy_batch: int = 16  # episodes per on-policy batch (Appendix G.1 of [DOP])
    episodes_per_iteration: int = 4  # finished episodes per iteration (4 parallel games in Appendix G.1)
    critic_updates: int = 8  # minibatches per iteration (1: a full batch; 0: one per time step, as official)
    critic_warmup: int = 30  # first iterations without actor updates, from local critics at zero (0: neither)
    target_period: int = 10  # training iterations between two copies to the target critic

    def __post_init__(self):
        machine.check_numbers(vars(self), critic_warmup=0, critic_updates=0)
        if self.on_policy_batch > self.on_policy_size or self.off_policy_batch > self.off_policy_size:
            raise ValueError("--on-policy-batch or --off-policy-batch is larger than its buffer")
        if self.off_policy_size < max(self.on_policy_size, self.num_envs):
            raise ValueError("--off-policy-size is less than --on-policy-size or --num-envs")


# setting or environment id -> what differs from the defaults
PRESETS = {
    "paper": dict(
        num_envs=4, actor_lr=5e-4, critic_lr=1e-4, actor_gradient="sampled", uniform_coef=0.0,
        averaging=0.0, separate_critics=True, epsilon_start=1.0, epsilon_steps=500_000, critic_updates=1,
        critic_warmup=0, target_period=8, total_timesteps=2_000_000,
    ),
    # the authors' code: 16 + 32 episodes in one mean, hence kappa, and a target every 600 critic steps
    "official": dict(
        num_envs=4, actor_lr=5e-4, critic_lr=1e-4, kappa=0.67, actor_gradient="sampled",
        actor_loss_mean="agents", uniform_coef=0.0, averaging=0.0, separate_critics=True,
        epsilon_steps=500_000, critic_updates=0, critic_warmup=0, target_period=10, total_timesteps=2_000_000,
    ),
    "cdm": dict(
        num_envs=4, actor_lr=5e-4, uniform_coef=0.0, averaging=0.0, critic_updates=1, total_timesteps=10_000,
        epsilon_steps=5_000, eval_every=500, eval_episodes=1, log_every=100,
    ),
}  # fmt: skip
# what cannot change in a resumed run: it decides shapes and meaning of what was saved
FIXED = "env seed setting num_envs off_policy_size hidden_dim critic_hidden_dim separate_critics".split()


# ---- networks ----
class Actor(nn.Module):
    """Policy logits or Q values from an agent's history: layer, GRU, layer, shared by agents."""

    def __init__(self, env, args):
        super().__init__()
        self.in_dims = [env.obs_dim, env.n_actions, env.n_agents]  # observation, last action, own id
        self.fc = nn.Linear(sum(self.in_dims), args.hidden_dim)
        self.gru = nn.GRU(args.hidden_dim, args.hidden_dim)
        self.head = nn.Linear(args.hidden_dim, env.n_actions)
        if env.action_bias is not None:
            self.head.bias.data += env.action_bias.cpu()

    def forward(self, obs, last_actions, hidden=None):
        """obs (B, T, N, O), last_actions (B, T, N), -1: none -> logits (B, T, N, A) and hidden (B, N, H)."""
        B, _, N, _ = obs.shape
        # a one-hot input picks a column of the weight, so look that up; row 0 of the table is "no action yet"
        w_obs, w_action, w_agent = self.fc.weight.split(self.in_dims, dim=1)  # (H, O), (H, A), (H, N)
        table = F.pad(w_action.t(), (0, 0, 1, 0))  # (1 + A, H)
        x = F.linear(obs.to(table.dtype), w_obs, self.fc.bias)  # replay may have half precision
        x = F.relu(x + F.embedding(last_actions + 1, table) + w_agent.t())  # (B, T, N, H)
        x = x.transpose(0, 1).flatten(1, 2)  # (T, B * N, H)
        x, hidden = self.gru(x, None if hidden is None else hidden.flatten(0, 1).unsqueeze(0))
        logits = self.head(x).unflatten(1, (B, N)).transpose(0, 1)  # (B, T, N, A)
        return logits, hidden.view(B, N, self.gru.hidden_size)

    def unroll(self, batch):
        """Logits (B, T + 1, N, A) of whole episodes from their first step on; arbitrary behind their ends."""
        B, T, N = batch.actions.shape
        last_actions = F.pad(batch.actions, (0, 0, 1, 0), value=-1)  # (B, T + 1, N)
        order = batch.mask.sum(1).argsort(descending=True)  # (B,), so that those that go on lie together
        hidden, parts = self.fc.bias.new_zeros(B, N, self.gru.hidden_size), []
        for start in range(0, T + 1, 16):  # in pieces, as little is spent on padding then
            n = sum(length >= start for length in batch.length)  # episodes that go on
            piece = (order[:n], slice(start, start + 16))
            logits, hidden = self(batch.obs[piece], last_actions[piece], hidden[:n])
            parts.append(F.pad(logits, (0, 0, 0, 0, 0, 0, 0, B - n)))
        return torch.cat(parts, 1)[order.argsort()]


class DecomposedCritic(nn.Module):
    """Q_i, k_i, b of Eq. 4 from the state (Appendix G.1 of [DOP]); G = N networks if separate, else G = 1."""

    def __init__(self, env, args):
        super().__init__()
        self.out_dims = (env.n_agents, env.n_actions)
        self.groups = env.n_agents if args.separate_critics else 1
        sizes = (env.state_dim, args.critic_hidden_dim, args.critic_hidden_dim)
        sizes += (env.n_agents * env.n_actions // self.groups,)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in pairwise(sizes):
            bound = n_in**-0.5  # as nn.Linear
            self.weights.append(torch.empty(self.groups, n_in, n_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(self.groups, 1, n_out).uniform_(-bound, bound))
        if args.critic_warmup > 0:
            nn.init.zeros_(self.weights[-1])
            nn.init.zeros_(self.biases[-1])
        self.k = nn.Linear(env.state_dim, env.n_agents)
        self.b = nn.Linear(env.state_dim, 1)

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


def epsilon_policy(logits, avail_actions, epsilon):
    """pi = (1 - epsilon) softmax + epsilon uniform, both over legal actions, (..., A); 0 on illegal ones."""
    softmax = logits.masked_fill(~avail_actions, -1e9).softmax(-1)
    n_legal = avail_actions.sum(-1, keepdim=True).clamp_min(1).to(logits.dtype)  # (..., 1)
    return ((1 - epsilon) * softmax + epsilon / n_legal) * avail_actions


def sample_actions(pi, generator):
    """Actions (...) from pi (..., A) as argmax(pi / Exp(1)), which never picks a zero probability."""
    noise = torch.empty_like(pi).exponential_(generator=generator).clamp_min(torch.finfo(pi.dtype).tiny)
    return (pi / noise).argmax(-1)


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
    """Minus Eq. 9, exact in the own action; k (..., N), q_values and pi (..., N, A), mask (...)."""
    # Eq. 9 of [DOP]: E_pi[sum_i k_i grad log pi_i(a_i) Q_i(a_i)] = sum_i k_i sum_a grad pi_i(a) Q_i(a)
    return -(k.detach() * (pi * q_values.detach()).sum(-1) * mask.unsqueeze(-1)).sum() / mask.sum()


def sampled_policy_gradient_loss(k, q_values, pi, actions, mask):
    """Minus Eq. 9 at the actions (..., N) played, with the utility U_i of Appendix A.3.1; shapes as above."""
    k, q_values, actions = k.detach(), q_values.detach(), actions.unsqueeze(-1)
    advantage = q_values.gather(-1, actions).squeeze(-1) - (pi.detach() * q_values).sum(-1)  # (..., N)
    log_pi_taken = pi.gather(-1, actions).squeeze(-1).clamp_min(torch.finfo(pi.dtype).tiny).log()  # (..., N)
    # Eq. 9 of [DOP]: E_pi[sum_i k_i grad log pi_i(a_i) (Q_i(a_i) - E_{pi_i}[Q_i])]
    return -(k * log_pi_taken * advantage * mask.unsqueeze(-1)).sum() / mask.sum()


def uniform_divergence(logits, avail_actions):
    """KL(uniform, softmax) over legal actions, (...); both (..., A). Not of [DOP].

    Its gradient, softmax - uniform, does not vanish where the softmax is sharp, as that of the entropy does.
    """
    log_pi = logits.masked_fill(~avail_actions, -1e9).log_softmax(-1)
    n_legal = avail_actions.sum(-1).clamp_min(1)  # (...)
    return -log_pi.masked_fill(~avail_actions, 0.0).sum(-1) / n_legal - n_legal.log()


# ---- storage ----
class Batch(NamedTuple):
    """Whole episodes, as long as the longest; behind its end one repeats its last step, and mask is False."""

    obs: torch.Tensor  # (B, T + 1, N, O), in the replay's precision
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

    def __init__(self, capacity, env, advice):
        self.episode_limit, self.advice, self.steps = env.episode_limit, advice, {}  # by the first add
        self.length = torch.zeros(capacity + env.num_envs, dtype=torch.int64, device=env.device)
        self.ring = torch.arange(capacity, device=env.device)  # position -> slot
        self.open_slot = torch.arange(env.num_envs, device=env.device) + capacity  # (B,)
        self.n_episodes = 0  # completed ever

    def add(self, step, info, ended):
        """Store a step of every game, a dict of (B, ...); it ended the episodes of the games `ended` (E,)."""
        if not self.steps:
            size = (len(self.length), self.episode_limit + 1)
            row = sum(x[0].nbytes for x in step.values())
            machine.require_memory(math.prod(size) * row, self.ring.device, self.advice)
            # not zeros: on the CPU, only rows that are written take memory
            self.steps = {name: x.new_empty(*size, *x.shape[1:]) for name, x in step.items()}
        for name, x in step.items():
            self.steps[name][self.open_slot, info["episode_length"] - 1] = x
        if len(ended):
            slot, length = self.open_slot[ended], info["episode_length"][ended]  # (E,)
            for name in Batch._fields[:3]:
                self.steps[name][slot, length] = info[f"final_{name}"][ended].to(self.steps[name].dtype)
            oldest = (torch.arange(len(ended), device=slot.device) + self.n_episodes) % len(self.ring)  # (E,)
            self.open_slot[ended], self.ring[oldest], self.length[slot] = self.ring[oldest], slot, length
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
        x["state"] = x["state"].float()  # obs stay as they are until an actor knows which ones it needs
        return Batch(**x, mask=time[:-1] < length, length=steps)

    def state_dict(self):
        return vars(self)

    def load_state_dict(self, state):
        vars(self).update(state)


# ---- acting ----
@torch.no_grad()
def act(actor, obs, avail_actions, memory=None, epsilon=0.0, generator=None):
    """Actions (B, N) of one step, greedy without a generator, and the memory (they, hidden) for the next."""
    last_actions, hidden = memory or (torch.full_like(avail_actions[..., 0], -1, dtype=torch.int64), None)
    logits, hidden = actor(obs.unsqueeze(1), last_actions.unsqueeze(1), hidden)  # (B, 1, N, A), (B, N, H)
    pi = epsilon_policy(logits.squeeze(1), avail_actions, epsilon)  # (B, N, A)
    actions = pi.argmax(-1) if generator is None else sample_actions(pi, generator)
    return actions, (actions, hidden)


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
    on_valid = on.mask.nonzero_static(size=n_on).unbind(1)  # (M,), (M,)

    # actor; its forward pass also serves the on-policy targets
    logits = actor.unroll(on)  # (n, T + 1, N, A)
    pi = epsilon_policy(logits, on.avail_actions, epsilon)  # (n, T + 1, N, A)
    entropy = -(pi * pi.clamp_min(1e-8).log()).sum(-1)[:, :-1][on_valid].mean()  # of steps and agents
    if train_actor:
        q_values, k, _ = evaluate_steps(critic, on.state[:, :-1], on.mask, n_on)
        if args.actor_gradient == "expected":
            actor_loss = expected_policy_gradient_loss(k, q_values, pi[:, :-1], on.mask)
        else:
            actor_loss = sampled_policy_gradient_loss(k, q_values, pi[:, :-1], on.actions, on.mask)
        uniform = uniform_divergence(logits[:, :-1][on_valid], on.avail_actions[:, :-1][on_valid]).mean()
        actor_loss = actor_loss + args.uniform_coef * uniform
        if args.actor_loss_mean == "agents":
            actor_loss = actor_loss / actions.shape[2]
        logs = dict(actor_loss=actor_loss.detach(), grad_norm_actor=descend(optimizers[0], actor_loss, 20.0))

    # targets
    with torch.no_grad():
        # of the policies before the actor's step on-policy, after it off-policy: one pass each is enough
        pi = torch.cat([pi, policy(actor, off, epsilon)])  # (B, T + 1, N, A)
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
    order = torch.randperm(n_steps, generator=generator, device=mask.device)
    order = order.chunk(args.critic_updates or mask.shape[1])
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
    return logs | {"td_target": batch[2].mean(), "entropy": entropy.detach()}


if __name__ == "__main__":
    # ---- run ----
    args = machine.parse_args(Args, PRESETS, FIXED, __doc__)
    seeds = machine.seeds(args.seed, 3)  # of weights, games and exploration
    torch.manual_seed(seeds[0])
    with machine.set_up():
        options = dict(device=args.device, actions="discrete", validate=False)
        env = make(args.env, args.num_envs, seed=seeds[1], **options)
        if args.eval_every:
            eval_env = make(args.env, args.eval_episodes, render=args.capture_video, **options)
        env.reset()
    run, stop = machine.open_folder(vars(args)), machine.catch_signals()

    # ---- networks and storage ----
    generator = Stream(env.device).manual_seed(seeds[2])
    actor, critic = Actor(env, args).to(env.device), DecomposedCritic(env, args).to(env.device)
    critic_target, average = copy.deepcopy(critic), copy.deepcopy(actor)
    average.gru.flatten_parameters()  # a copy's weights lie apart: cuDNN would join them at each call
    weights = [list(x.state_dict().values()) for x in (average, actor)]  # their own memory, no copies
    actor_optimizer = torch.optim.RMSprop(actor.parameters(), lr=args.actor_lr, alpha=0.99, eps=1e-5)
    critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=args.critic_lr, alpha=0.99, eps=1e-5)
    optimizers = (actor_optimizer, critic_optimizer)
    draws = [(args.on_policy_batch, args.on_policy_size), (args.off_policy_batch, args.off_policy_size)]
    draws = draws[:1] if args.tree_backup == "none" else draws
    needed = max(n for n, _ in draws)  # episodes
    buffer = EpisodeBuffer(args.off_policy_size, env, "lower --off-policy-size")
    parts = dict(actor=actor, average=average, critic=critic, critic_target=critic_target)
    parts |= dict(actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    parts |= dict(env=env, generator=generator) | (dict(buffer=buffer) if args.save_replay else {})

    # ---- loop ----
    progress = dict(global_step=0, iteration=0, train_seconds=0.0, new_episodes=0)
    progress |= dict(memory=None, losses={}, recent={})
    if args.resume:
        progress = machine.load(run, parts, progress, env.device)
    global_step, iteration, train_seconds, new_episodes, memory, losses, recent = progress.values()
    if args.resume and not (buffer.steps and env.saved):  # it has to see episodes from their start
        env.reset()
        new_episodes, memory = 0, None
    if global_step + env.episode_limit * (needed - buffer.n_episodes) > args.total_timesteps:
        machine.say("this run may end before its first update: raise --total-timesteps")
    log = machine.Log(run, args, global_step, recent)
    while global_step < args.total_timesteps and not stop:
        # act, step
        started = time.perf_counter()
        decay = min(1.0, global_step / args.epsilon_steps)
        epsilon = args.epsilon_start + decay * (args.epsilon_end - args.epsilon_start)
        obs, state, avail_actions = env.obs(), env.state(), env.avail_actions()
        actions, memory = act(actor, obs, avail_actions, memory, epsilon, generator)
        try:
            _, reward, terminated, truncated, info = env.step(actions)
        except RuntimeError as error:  # of the game, which may be a program of its own
            stop.append(error)
            break
        global_step += args.num_envs

        # store
        actions, done = info["actions"], terminated | truncated  # (B, N), (B,)
        ended = (done & ~info["broken"]).nonzero().squeeze(1)  # (E,), the one wait for the device per step
        # NOTE: half precision keeps three digits of features of about 1, in half the memory
        features = torch.half if env.bounded_features else torch.float32
        step = dict(obs=obs.to(features), state=state.to(features), avail_actions=avail_actions)
        step |= dict(actions=actions, reward=reward, terminated=terminated)
        buffer.add(step, info, ended)
        memory = (actions.masked_fill(done[:, None], -1), memory[1] * ~done[:, None, None])
        log.add(args.num_envs, info["episode"], ended)
        new_episodes += len(ended)

        # update
        updates, new_episodes = divmod(new_episodes, args.episodes_per_iteration)
        for _ in range(updates if buffer.n_episodes >= needed else 0):
            iteration += 1
            batch, trains = buffer.sample(draws, generator), iteration > args.critic_warmup
            losses = update(args, actor, critic, critic_target, optimizers, batch, epsilon, generator, trains)
            torch._foreach_lerp_(*weights, 1 - args.averaging)
            if iteration % args.target_period == 0:
                critic_target.load_state_dict(critic.state_dict())
        train_seconds += time.perf_counter() - started

        # log, evaluate, save
        last = global_step >= args.total_timesteps or bool(stop)
        if machine.due(args.log_every, global_step, args.num_envs, last):
            log.training(global_step, train_seconds, losses, epsilon=epsilon)
        if machine.due(args.eval_every, global_step, args.num_envs, last):
            video = run / f"{global_step}.gif" if args.capture_video else None
            log.evaluation(global_step, train_seconds, evaluate(eval_env, partial(act, average), video, stop))
        progress = dict(global_step=global_step, iteration=iteration, train_seconds=train_seconds)
        progress |= dict(new_episodes=new_episodes, memory=memory, losses=losses, recent=log.recent)
        if machine.due(args.save_every, global_step, args.num_envs):
            log.flush()  # what a resumed run will not write again
            machine.save(run, vars(args), parts, progress)

    # ---- close ----
    machine.save(run, vars(args), parts, progress)
    log.close()
    env.close()
    machine.say(f"saved {run}/model.pt of step {global_step}, after {iteration or 'no'} updates")
    if stop:
        machine.fail(stop[0])
