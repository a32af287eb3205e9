"""COMA: counterfactual multi-agent policy gradients, for discrete cooperative games.

One centralised critic tells every agent what each of its actions would have been worth beside what the
others did; the mean over its own policy is the baseline that its recurrent policy has to beat.
[COMA] Foerster et al., "Counterfactual Multi-Agent Policy Gradients", AAAI 2018.

    python coma.py --env 3m
    python coma.py --env 3m --setting paper

B games or episodes, T time, N agents, A actions, O observation, S state, H hidden, M transitions.

Differs from the paper and from the authors' later code for SMAC (oxwhirl/pymarl), whose settings these are:
1. games go on while others end: an iteration takes all episodes that ended since the last one, each of them
   once, and the first steps of some were played by the policies before;
2. the critic steps through shuffled transitions, not through time from the last step to the first;
3. an episode ended by the clock bootstraps from its last observation: joint actions are drawn there from the
   policies, and each agent takes the mean over its own action;
4. observations and states are stored in half precision.

Without `--setting paper` also, to win in less time (docs/coma.md):
5. 16 games, not 8; 16 critic minibatches per iteration, not about 60; a target copied every 5
   iterations, not 3.
"""

import copy
import json
import math
import signal
import sys
import time
from dataclasses import dataclass
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
    """learning rate of the actor (authors' code)"""
    critic_lr: float = 5e-4
    """learning rate of the critic (authors' code)"""
    gamma: float = 0.99
    """discount (authors' code)"""
    td_lambda: float = 0.8
    """lambda of the critic's targets (authors' code)"""
    epsilon_start: float = 0.5
    """share of uniform exploration in the policies at the start (authors' code)"""
    epsilon_end: float = 0.01
    """the same after the decay (authors' code)"""
    epsilon_steps: int = 100_000
    """environment steps of the linear decay (authors' code)"""
    batch_size: int = 8
    """new episodes that start a training iteration (8 parallel games in the authors' code)"""
    critic_updates: int = 16
    """critic minibatches that an iteration splits its transitions into (one per time step in [COMA])"""
    target_period: int = 5
    """training iterations between two copies to the target critic"""


# setting or environment id -> what differs from the defaults
PRESETS = {
    # the authors' code steps its critic once per time step, about 60 times on most maps, and copies the
    # target after 200 of these
    "paper": dict(num_envs=8, critic_updates=60, target_period=3, total_timesteps=2_000_000),
    "cdm": dict(
        num_envs=8, critic_updates=1, total_timesteps=10_000, epsilon_steps=5_000, eval_every=500,
        eval_episodes=1, log_every=100,
    ),
}  # fmt: skip
# of numbers, where an integer may be less than 1 or another number may leave 0 to 1
LIMITS = dict.fromkeys(("seed", "eval_every", "save_every"), (0, math.inf))


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


class CounterfactualCritic(nn.Module):
    """Q of each own action beside the others' actions, in one pass (authors' code); shared by agents."""

    def __init__(self, obs_dim, state_dim, n_agents, n_actions, hidden_dim):
        super().__init__()
        self.in_dims = [state_dim, obs_dim, n_agents * n_actions, n_agents * n_actions, n_agents]
        self.fc1 = nn.Linear(sum(self.in_dims), hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.head = nn.Linear(hidden_dim, n_actions)
        self.register_buffer("others", 1 - torch.eye(n_agents), persistent=False)  # (N, N)

    def forward(self, state, obs, actions, last_actions):
        """state (..., S), obs (..., N, O), actions, last_actions (..., N), -1: none -> Q (..., N, A)."""
        w_state, w_obs, w_actions, w_last, w_agent = self.fc1.weight.split(self.in_dims, dim=1)
        # a product with exact zeros keeps an agent's own action out, to the last digit
        x = self.others @ self.columns(w_actions, actions)  # (..., N, H)
        x = x + F.linear(obs, w_obs, self.fc1.bias) + w_agent.t()
        # what all agents share is computed once
        team = F.linear(state, w_state) + self.columns(w_last, last_actions).sum(-2)  # (..., H)
        return self.head(F.relu(self.fc2(F.relu(x + team.unsqueeze(-2)))))

    def columns(self, weight, actions):
        """weight (H, N * A) times the one-hot action of each agent in actions (..., N) -> (..., N, H)."""
        n_agents = len(self.others)
        table = F.pad(weight.unflatten(1, (n_agents, -1)), (1, 0)).flatten(1).t()  # (N * (1 + A), H)
        first = torch.arange(n_agents, device=actions.device) * (len(table) // n_agents)  # (N,)
        return F.embedding(first + 1 + actions, table)


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


def counterfactual_advantage(q_values, pi, actions):
    """Gain (..., N) of the actions (..., N) over the mean of the own policy; q_values, pi (..., N, A)."""
    assert q_values.shape == pi.shape and pi.shape[:-1] == actions.shape
    q_taken = q_values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (..., N)
    # Eq. 4 of [COMA]: A_i(s, u) = Q(s, u) - sum_a pi_i(a) Q(s, (u_-i, a))
    return (q_taken - (pi * q_values).sum(-1)).detach()


def policy_gradient_loss(pi, actions, advantage):
    """Minus the policy's objective; pi (..., N, A), actions and advantage (..., N)."""
    pi_taken = pi.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (..., N)
    assert pi_taken.shape == advantage.shape
    # Lemma 1 of [COMA]: g = E_pi[sum_i grad log pi_i(u_i) A_i(s, u)]; a mean over agents here
    return -(pi_taken.clamp_min(torch.finfo(pi.dtype).tiny).log() * advantage).mean()


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


def descend(optimizer, loss, max_norm):
    """One step down the gradient, clipped at `max_norm`; returns its norm before."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    optimizer.step()
    return grad_norm


def update(args, actor, critic, critic_target, optimizers, batch, epsilon, generator):
    """One iteration of Algorithm 1 of [COMA]."""
    mask, n_steps = batch.mask, sum(batch.length)
    valid = mask.nonzero_static(size=n_steps).unbind(1)  # (M,), (M,)
    pi = policy(actor, batch, epsilon)  # (B, T + 1, N, A)

    # targets
    with torch.no_grad():
        ends = (torch.arange(len(mask), device=mask.device), mask.sum(1))  # last observations
        actions = F.pad(batch.actions, (0, 0, 0, 1))  # (B, T + 1, N)
        actions[ends] = sample_actions(pi[ends], generator)
        last_actions = F.pad(batch.actions, (0, 0, 1, 0), value=-1)  # (B, T + 1, N)
        seen = F.pad(mask, (1, 0), value=True).nonzero_static(size=n_steps + len(mask)).unbind(1)
        inputs = (batch.state, batch.obs, actions, last_actions)
        # (B, T + 1, N, A), zeros on padding
        q_values = torch.zeros_like(pi).index_put(seen, critic_target(*(x[seen] for x in inputs)))
        q_taken = q_values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (B, T + 1, N)
        q_taken[ends] = (pi[ends] * q_values[ends]).sum(-1)
        q_taken, next_q = q_taken[:, :-1], q_taken[:, 1:]  # (B, T, N)
        steps = [x.unsqueeze(-1).expand_as(next_q) for x in (batch.reward, batch.terminated, mask)]
        td_target = td_lambda_targets(*steps, q_taken, next_q, args.gamma, args.td_lambda)  # (B, T, N)
        entropy = -(pi * pi.clamp_min(1e-8).log()).sum(-1)[:, :-1][valid]  # (M, N)

    # critic
    inputs = [x[:, :-1][valid] for x in inputs]  # (M, ...)
    actions, td_target = inputs[2], td_target[valid]  # (M, N)
    steps = []
    order = torch.randperm(len(actions), generator=generator, device=mask.device)
    for index in order.chunk(args.critic_updates):
        q_values = critic(*(x[index] for x in inputs))  # (m, N, A)
        q_taken = q_values.gather(-1, actions[index].unsqueeze(-1)).squeeze(-1)  # (m, N)
        critic_loss = F.mse_loss(q_taken, td_target[index])
        grad_norm = descend(optimizers[1], critic_loss, 10.0)
        steps.append(torch.stack([critic_loss.detach(), grad_norm, q_taken.detach().mean()]))
    logs = dict(zip(("critic_loss", "grad_norm_critic", "q_taken"), torch.stack(steps).mean(0), strict=True))

    # actor
    with torch.no_grad():
        q_values = critic(*inputs)  # (M, N, A)
    pi = pi[:, :-1][valid]  # (M, N, A)
    advantage = counterfactual_advantage(q_values, pi, actions)  # (M, N)
    actor_loss = policy_gradient_loss(pi, actions, advantage)
    logs |= {"grad_norm_actor": descend(optimizers[0], actor_loss, 10.0), "actor_loss": actor_loss.detach()}
    return logs | {"td_target": td_target.mean(), "entropy": entropy.mean()}


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
    critic = CounterfactualCritic(env.obs_dim, env.state_dim, n_agents, n_actions, hidden_dim=128).to(device)
    critic_target = copy.deepcopy(critic)
    actor_optimizer = torch.optim.RMSprop(actor.parameters(), lr=args.actor_lr, alpha=0.99, eps=1e-5)
    critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=args.critic_lr, alpha=0.99, eps=1e-5)
    optimizers = (actor_optimizer, critic_optimizer)
    parts = {"actor": actor, "critic": critic, "critic_target": critic_target}
    parts |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    sizes = (env.episode_limit, n_agents, env.obs_dim, env.state_dim, n_actions)
    try:
        # what an iteration takes at most: all games may end in the step that starts it
        buffer = EpisodeBuffer(args.batch_size + args.num_envs, args.num_envs, *sizes, device)
    except RuntimeError:
        fail(f"no memory for {args.batch_size} x {env.episode_limit} steps; lower --batch-size")

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
        if new_episodes >= args.batch_size:
            iteration += 1
            batch, new_episodes = buffer.sample([(new_episodes, new_episodes)], generator), 0
            losses = update(args, actor, critic, critic_target, optimizers, batch, epsilon, generator)
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
