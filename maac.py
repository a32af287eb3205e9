"""MAAC: soft actor-critic for teams, whose critics attend to the other agents.

Every agent's critic sees what the agent sees and what its attention, shared by all, picks of the others. It
values all own actions at once: their mean under the policy is the policy's baseline.
[MAAC] Iqbal and Sha, "Actor-Attention-Critic for Multi-Agent Reinforcement Learning", ICML 2019.

    python maac.py --env mill
    python maac.py --env 3m

B games or batch, N agents, A discrete actions, D action dimensions (A if discrete), O observation, S state,
G networks, M inputs of a network, H units of the critics, E units of a head, P pairs of a game and a head.

Differs from the paper (docs/maac.md: and from its code):
1. all critics learn the team reward, which is neither normalised nor scaled;
2. continuous actions, for which the paper has no more than a hint, are our own version;
3. an episode ended by the clock bootstraps from its own last observation.
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
    env: str = "mill"  # environment id, with arguments as in cdm,n_agents=5; its PRESETS beat defaults
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where everything lives; auto takes cuda if there is one
    total_timesteps: int = 1_000_000  # environment steps of the run; one step of one game counts as 1
    num_envs: int = 12  # games played in parallel
    eval_every: int = 5_000  # environment steps between two evaluations (0: none)
    eval_episodes: int = 128  # games of one evaluation, all in parallel
    log_every: int = 1_000  # environment steps between two points of charts and losses
    save_every: int = 50_000  # environment steps between two checkpoints (0: only at the end)
    save_replay: bool = False  # put the replay into checkpoints, so that a resumed run goes on exactly
    capture_video: bool = False  # save one game of every evaluation as a GIF in the run folder
    resume: str | None = None  # run folder to continue with its own settings
    run_dir: str = "runs"  # folder of the run folders

    # Algorithm specific arguments
    actor_lr: float = 1e-3  # learning rate of the policies (official code: 0.001)
    critic_lr: float = 1e-3  # learning rate of the critics (official code)
    critic_weight_decay: float = 1e-3  # L2 penalty on the critics' weights (official code)
    gamma: float = 0.99  # discount (official code: 0.99)
    tau: float = 1e-3  # share of the live networks that enters the targets per update (official code: 0.001)
    alpha: float = 0.01  # temperature: weight of the entropy (official code: 1 / its reward_scale of 100)
    hidden_dim: int = 128  # units of a policy's two hidden layers (official code)
    critic_dim: int = 128  # units of the critics' encodings, heads together, hidden layers (official code)
    heads: int = 4  # attention heads, a divisor of critic_dim (official code)
    attention_penalty: float = 1e-3  # weight of attention logits' mean square in the loss (official code)
    logit_penalty: float = 1e-3  # weight of discrete actions' mean square logits in the loss (official code)
    max_grad_norm: float = 0.5  # norm that policies' gradients are clipped to (official code: each; 0: none)
    critic_max_grad_norm: float = 10.0  # the same of the critics, per agent (official code)
    batch_size: int = 1024  # transitions per update (official code: 1024)
    buffer_size: int = 1_000_000  # transitions in the replay buffer (official code: 1,000,000)
    warmup_steps: int = 1_024  # environment steps before the first update, untrained (official code: a batch)
    update_every: int = 25  # environment steps per update of the critics (official code: 4 every 100 steps)
    policy_delay: int = 1  # critics' updates per update of policies and targets (2 in DOP's Appendix G.2)

    def __post_init__(self):
        machine.check_numbers(vars(self), alpha=0, max_grad_norm=0, critic_max_grad_norm=0)
        if self.buffer_size < self.num_envs:
            raise ValueError(f"--buffer-size must be at least --num-envs, {self.num_envs}")
        if self.critic_dim % self.heads:
            raise ValueError(f"--critic-dim {self.critic_dim} is no multiple of --heads {self.heads}")


# particle tasks: games, replay, critic updates, tau of dop_deterministic.py, learning rates as published
MPE = dict(num_envs=32, tau=0.05, batch_size=256, buffer_size=250_000, warmup_steps=5_000, update_every=32)
# environment id -> what differs from the defaults
PRESETS = {
    "aggregation": MPE | dict(total_timesteps=500_000, eval_every=20_000, log_every=5_000)
    | dict(warmup_steps=100_000, policy_delay=2),
    "mill": MPE | dict(total_timesteps=60_000, policy_delay=2),
    # discount and speed of the policies as for maddpg.py: those of the official code diverge here
    "spread": MPE | dict(total_timesteps=500_000, eval_every=20_000, gamma=0.95, actor_lr=1e-4),
    "cdm": dict(
        total_timesteps=10_000, num_envs=4, log_every=100, eval_every=500, eval_episodes=1, save_every=0,
        batch_size=128, warmup_steps=256, update_every=4,
    ),
}  # fmt: skip
PRESETS |= {"aggregation_hard": PRESETS["aggregation"]}
# what cannot change in a resumed run: it decides shapes and meaning of what was saved
FIXED = ("env", "seed", "num_envs", "buffer_size", "hidden_dim", "critic_dim", "heads")


# ---- networks ----
class Perceptrons(nn.Module):
    """G perceptrons of equal shape, evaluated at once: x (..., G, n_in) -> (..., G, n_out); G = 1: any x."""

    def __init__(self, groups, *sizes, final_init=0.0):
        super().__init__()
        self.groups = groups
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in pairwise(sizes):
            final = final_init if len(self.weights) == len(sizes) - 2 else 0.0
            bound = final or n_in**-0.5  # as nn.Linear
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

    def __init__(self, env, args):
        space, shape = env.single_action_space, (2, env.n_agents, env.n_actions)
        low, high = torch.zeros(shape) if env.n_actions else map(torch.as_tensor, (space.low, space.high))
        sizes = (env.obs_dim, args.hidden_dim, args.hidden_dim, env.n_actions or 2 * low.shape[1])
        super().__init__(env.n_agents, *sizes)
        self.register_buffer("low", low)  # (N, D), the environment's bounds
        self.register_buffer("high", high)
        if env.action_bias is not None:
            self.biases[-1].data += env.action_bias.cpu()

    def forward(self, obs, avail_actions):
        """obs (B, N, O), avail_actions (B, N, A) or None -> logits (B, N, A), or (B, N, 2 D)."""
        x = super().forward(obs)
        return x if avail_actions is None else torch.where(avail_actions, x, -1e9)


class AttentionCritic(nn.Module):
    """Q_i of every agent, of all its actions if they are discrete, else of one (Figure 1 of [MAAC])."""

    def __init__(self, env, args):
        super().__init__()
        self.heads, self.discrete = args.heads, bool(env.n_actions)
        action_dim, H = env.n_actions or env.single_action_space.shape[1], args.critic_dim
        self.own_encoder = Perceptrons(env.n_agents, env.obs_dim, H)
        self.other_encoder = Perceptrons(env.n_agents, env.obs_dim + action_dim, H)
        self.query, self.key = (nn.Linear(H, H, bias=False) for _ in range(2))
        self.value = nn.Linear(H, H)
        n_in, n_out = (2 * H, action_dim) if self.discrete else (2 * H + action_dim, 1)
        self.head = Perceptrons(env.n_agents, n_in, H, n_out)

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
            row = sum(x.shape[1:].numel() * x.itemsize for x in step if x is not None)
            machine.require_memory(self.capacity * row, step.obs.device, "lower --buffer-size")
            self.steps = [x if x is None else x.new_empty(self.capacity, *x.shape[1:]) for x in step]
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

    def state_dict(self):
        steps = [x if x is None else x[: self.n_steps].clone() for x in self.steps or ()]
        return {"steps": steps, "n_steps": self.n_steps}

    def load_state_dict(self, state):
        if state["steps"]:
            self.add(Batch(*state["steps"]))
        self.n_steps = state["n_steps"]


# ---- acting ----
@torch.no_grad()
def act(actor, obs, avail_actions, memory=None, generator=None):
    """Actions (B, N) or (B, N, D), sampled, or without a generator the likeliest (the mean); and None."""
    policy = actor(obs, avail_actions)  # (B, N, A) or (B, N, 2 D)
    if avail_actions is not None:
        return (policy if generator is None else sample_categorical(policy, generator)[0]).argmax(-1), None
    actions = policy.chunk(2, -1)[0].tanh() if generator is None else sample_squashed(policy, generator)[0]
    return torch.lerp(actor.low, actor.high, (actions + 1) / 2), None


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


def update(args, actor, critic, actor_target, critic_target, optimizers, batch, generator, train_actor=True):
    """Critics, and if `train_actor` policies and targets, on one batch (Algorithm 1 of [MAAC])."""
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
    losses = {"critic_loss": critic_loss.detach(), "q_taken": q_taken.detach().mean()}
    losses |= {"td_target": td_target.mean(), "grad_norm_critic": grad_norm_critic}
    if not train_actor:
        return losses

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
    losses |= {"actor_loss": actor_loss.detach(), "entropy": -log_pi.detach().mean()}
    return losses | {"grad_norm_actor": grad_norm_actor}


if __name__ == "__main__":
    # ---- run ----
    args = machine.parse_args(Args, PRESETS, FIXED, __doc__)
    seeds = machine.seeds(args.seed, 3)  # of weights, games and exploration
    torch.manual_seed(seeds[0])
    with machine.set_up():
        options = dict(device=args.device, validate=False)
        env = make(args.env, args.num_envs, seed=seeds[1], **options)
        if args.eval_every:
            eval_env = make(args.env, args.eval_episodes, render=args.capture_video, **options)
        env.reset()
    run, stop = machine.open_folder(vars(args)), machine.catch_signals()

    # ---- networks and storage ----
    generator = Stream(env.device).manual_seed(seeds[2])
    actor, critic = Actor(env, args).to(env.device), AttentionCritic(env, args).to(env.device)
    actor_target, critic_target = copy.deepcopy(actor), copy.deepcopy(critic)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.actor_lr, fused=True)
    critic_options = dict(lr=args.critic_lr, weight_decay=args.critic_weight_decay, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), **critic_options)
    optimizers = (actor_optimizer, critic_optimizer)
    buffer = ReplayBuffer(args.buffer_size)
    parts = dict(actor=actor, critic=critic, actor_target=actor_target, critic_target=critic_target)
    parts |= dict(actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    parts |= dict(env=env, generator=generator) | (dict(buffer=buffer) if args.save_replay else {})

    # ---- loop ----
    progress = dict(global_step=0, iteration=0, train_seconds=0.0, new_steps=0)
    progress |= dict(memory=None, losses={}, recent={})
    if args.resume:
        progress = machine.load(run, parts, progress, env.device)
    global_step, iteration, train_seconds, new_steps, memory, losses, recent = progress.values()
    if global_step + max(args.warmup_steps - buffer.n_steps, args.update_every) > args.total_timesteps:
        machine.say("this run may end before its first update: lower --warmup-steps, raise --total-timesteps")
    log = machine.Log(run, args, global_step, recent)
    while global_step < args.total_timesteps and not stop:
        # act, step
        started = time.perf_counter()
        obs, state, avail_actions = env.obs(), env.state(), env.avail_actions()
        actions, memory = act(actor, obs, avail_actions, memory, generator)
        try:
            _, reward, terminated, truncated, info = env.step(actions)
        except RuntimeError as error:  # of the game, which may be a program of its own
            stop.append(error)
            break
        global_step += args.num_envs

        # store
        final = (info["final_obs"], info["final_state"], info["final_avail_actions"])
        step = Batch(obs, state, avail_actions, info["actions"], reward, terminated, *final)
        if env.external:  # the step of a game that broke is made up
            step = Batch(*(x if x is None else x[~info["broken"]] for x in step))
        buffer.add(step)
        done = terminated | truncated  # (B,)
        ended = (done & ~info["broken"]).nonzero().squeeze(1)  # (E,), Python waits here and in merge()
        log.add(args.num_envs, info["episode"], ended)

        # update
        updates, new_steps = divmod(new_steps + args.num_envs, args.update_every)
        for _ in range(updates if buffer.n_steps >= args.warmup_steps else 0):
            iteration += 1
            batch = buffer.sample(args.batch_size, generator)
            losses |= update(
                args, actor, critic, actor_target, critic_target, optimizers, batch, generator,
                train_actor=iteration % args.policy_delay == 0,
            )  # fmt: skip
        train_seconds += time.perf_counter() - started

        # log, evaluate, save
        last = global_step >= args.total_timesteps or bool(stop)
        if machine.due(args.log_every, global_step, args.num_envs, last):
            log.training(global_step, train_seconds, losses)
        if machine.due(args.eval_every, global_step, args.num_envs, last):
            video = run / f"{global_step}.gif" if args.capture_video else None
            log.evaluation(global_step, train_seconds, evaluate(eval_env, partial(act, actor), video, stop))
        progress = dict(global_step=global_step, iteration=iteration, train_seconds=train_seconds)
        progress |= dict(new_steps=new_steps, memory=memory, losses=losses, recent=log.recent)
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
