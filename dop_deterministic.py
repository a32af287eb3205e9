"""Deterministic DOP: deterministic policies, each climbing its own part of a decomposed critic.

The critic Q_tot = sum_i k_i(s) Q_i(s, a_i) + b(s) is learnt from replay with target networks. Agent i's
policy follows the gradient of k_i Q_i, which the other agents' actions do not enter.
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021.
[DDPG] Lillicrap et al., "Continuous Control with Deep Reinforcement Learning", ICLR 2016.

    python dop_deterministic.py --env aggregation
    python dop_deterministic.py --env mill --setting paper

B games or batch, N agents, A discrete actions, D action dimensions (A if discrete), O observation, S state,
G networks, M inputs of a network.

[DOP] has no code for it and contradicts itself on replay, batches and learning rates: `--setting paper` takes
section 5.2 and the lower rates, `--setting appendix` takes Appendix G.2 and the higher ones.

Differs from the paper:
1. discrete actions are straight-through Gumbel-softmax samples at temperature 1, not at one near 0 (D.2);
2. discount, target updates and noise, not in the paper, are those of stochastic DOP, MADDPG and [DDPG];
3. an episode ended by the clock bootstraps from its own last observation.

Without `--setting` also, to learn in minutes on one core (docs/dop_deterministic.md):
4. 32 games and an update every 32 steps, not one game and an update at every step; smaller critics, batches;
5. faster targets, and actors that learn slowly beside the critic: RMSprop would otherwise let the noise of an
   unlearnt critic drive them to their bounds.
"""

import copy
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
    env: str = "aggregation"  # environment id, with arguments as in cdm,n_agents=5; its PRESETS beat defaults
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where everything lives; auto takes cuda if there is one
    total_timesteps: int = 100_000  # environment steps of the run; one step of one game counts as 1
    num_envs: int = 32  # games played in parallel
    eval_every: int = 5_000  # environment steps between two evaluations (0: none)
    eval_episodes: int = 128  # games of one evaluation, all in parallel
    log_every: int = 1_000  # environment steps between two points of charts and losses
    save_every: int = 50_000  # environment steps between two checkpoints (0: only at the end)
    save_replay: bool = False  # put the replay into checkpoints, so that a resumed run goes on exactly
    capture_video: bool = False  # save one game of every evaluation as a GIF in the run folder
    resume: str | None = None  # run folder to continue with its own settings
    run_dir: str = "runs"  # folder of the run folders

    # Algorithm specific arguments
    setting: Literal["default", "paper", "appendix"] = "default"  # PRESETS: 5.2, or G.2, of [DOP]; flags win
    actor_lr: float = 5e-5  # learning rate of the actors (both 5e-3 and 5e-4 in Appendix G.2 of [DOP])
    critic_lr: float = 1e-3  # learning rate of the critic (both 5e-3 and 5e-4 in Appendix G.2 of [DOP])
    gamma: float = 0.99  # discount (code of stochastic [DOP])
    tau: float = 0.05  # share of the live networks that enters the targets (0.01 in the appendix of MADDPG)
    policy_delay: int = 2  # critic updates per update of actors and targets (Appendix G.2 of [DOP])
    hidden_dim: int = 64  # units of an actor's two hidden layers (Appendix G.2 of [DOP])
    critic_hidden_dim: int = 64  # units of a local critic's two hidden layers (256 in Appendix G.1 of [DOP])
    max_grad_norm: float = 20.0  # norm that gradients are clipped to (code of stochastic [DOP]; 0: none)
    batch_size: int = 256  # transitions per update (1024 in section 5.2 of [DOP], 1250 in its Appendix G.2)
    buffer_size: int = 250_000  # transitions in the replay buffer (section 5.2 of [DOP]; 10,000 in G.2)
    warmup_steps: int = 10_000  # environment steps before the first update
    warmup_actions: Literal["untrained", "uniform"] = "untrained"  # until then: policies, or uniform draws
    update_every: int = 32  # environment steps per update of the critic (1 in Algorithm 2 of [DOP])
    noise_sigma: float = 0.2  # scale of noise on continuous actions in -1..1 (section 7 of [DDPG])
    noise_theta: float = 0.15  # pull of this noise to 0 per step (section 7 of [DDPG]; 1: Gaussian noise)

    def __post_init__(self):
        machine.check_numbers(vars(self), noise_sigma=0, max_grad_norm=0)
        if self.buffer_size < self.num_envs:
            raise ValueError(f"--buffer-size must be at least --num-envs, {self.num_envs}")


# setting or environment id -> what differs from the defaults
PRESETS = {
    "paper": dict(
        num_envs=1, update_every=1, critic_hidden_dim=256, batch_size=1024, tau=0.01,
        actor_lr=5e-4, critic_lr=5e-4, gamma=0.99, policy_delay=2,
    ),
    "appendix": dict(
        num_envs=1, update_every=1, critic_hidden_dim=256, batch_size=1250, buffer_size=10_000, tau=0.01,
        actor_lr=5e-3, critic_lr=5e-3, gamma=0.99, policy_delay=2,
    ),
    "aggregation": dict(
        total_timesteps=500_000, warmup_steps=100_000, eval_every=20_000, log_every=5_000,
    ),
    "mill": dict(total_timesteps=60_000, warmup_steps=5_000),
    # dense rewards: discount and speed of the actors as for maddpg.py
    "spread": dict(
        total_timesteps=500_000, eval_every=20_000, warmup_steps=5_000, gamma=0.95, policy_delay=1,
        actor_lr=1e-4,
    ),
    "cdm": dict(
        total_timesteps=10_000, num_envs=4, log_every=100, eval_every=500, eval_episodes=1, save_every=0,
        batch_size=128, warmup_steps=256, update_every=4,
    ),
}  # fmt: skip
PRESETS |= {"aggregation_hard": PRESETS["aggregation"]}
# what cannot change in a resumed run: it decides shapes and meaning of what was saved
FIXED = ("env", "seed", "setting", "num_envs", "buffer_size", "hidden_dim", "critic_hidden_dim")


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
    """A policy network per agent: continuous actions in -1..1, or the logits of discrete ones."""

    def __init__(self, env, args):
        space, shape = env.single_action_space, (2, env.n_agents, env.n_actions)
        low, high = torch.zeros(shape) if env.n_actions else map(torch.as_tensor, (space.low, space.high))
        super().__init__(env.n_agents, env.obs_dim, args.hidden_dim, args.hidden_dim, low.shape[1])
        self.register_buffer("low", low)  # (N, D), the environment's bounds
        self.register_buffer("high", high)
        if env.action_bias is not None:
            self.biases[-1].data += env.action_bias.cpu()

    def forward(self, obs, avail_actions):
        """obs (B, N, O), avail_actions (B, N, A) or None -> (B, N, D): actions in -1..1, or logits."""
        x = super().forward(obs)
        return x.tanh() if avail_actions is None else torch.where(avail_actions, x, -1e9)


class DecomposedCritic(Perceptrons):
    """Q_i (a network each), k_i, b of Eq. 4 from the state, Q_i also from agent i's action (Appendix G.2)."""

    def __init__(self, env, args):
        action_dim, hidden_dim = env.n_actions or env.single_action_space.shape[1], args.critic_hidden_dim
        super().__init__(env.n_agents, env.state_dim + action_dim, hidden_dim, hidden_dim, 1)
        self.k = nn.Linear(env.state_dim, env.n_agents)
        self.b = nn.Linear(env.state_dim, 1)

    def forward(self, state, actions):
        """state (B, S), actions (B, N, D) -> q (B, N), k (B, N), b (B,)."""
        x = torch.cat([state.unsqueeze(1).expand(*actions.shape[:2], -1), actions], -1)  # (B, N, S + D)
        k = self.k(state).abs()  # (B, N)
        k = k / k.sum(-1, keepdim=True).clamp_min(1e-8)
        return super().forward(x).squeeze(-1), k, self.b(state).squeeze(-1)


# ---- equations ----
def decomposed_q(k, b, q):
    """Q_tot (...) from k and the agents' q (..., N) and b (...)."""
    # Eq. 4 of [DOP]: Q_tot = sum_i k_i Q_i + b
    return (k * q).sum(-1) + b


def gumbel_softmax(logits, generator):
    """Samples (..., A) as one-hot vectors, with the gradient of the softmax at temperature 1."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).clamp_min(1e-30).log()
    soft = (logits + noise).softmax(-1)  # (..., A)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


def noise_step(noise, theta, sigma, generator):
    """The next Ornstein-Uhlenbeck noise, any shape: x <- (1 - theta) x + sigma N(0, 1)."""
    return (1 - theta) * noise + sigma * torch.randn(noise.shape, generator=generator, device=noise.device)


def td_targets(reward, terminated, next_q, gamma):
    """Targets of the critic, all (B,); nothing follows a terminated step, next_q a truncated one."""
    assert reward.shape == terminated.shape == next_q.shape
    # Eq. 12 of [DOP]: y = r + gamma Q'_tot(s', mu'_1(o'_1)..mu'_N(o'_N))
    return reward + gamma * (1 - terminated.to(reward.dtype)) * next_q


def policy_gradient_loss(k, q):
    """Minus the mean of sum_i k_i Q_i, both (B, N), Q_i at the action of agent i's policy."""
    # Eq. 13 of [DOP]: grad J = E[sum_i k_i(s) grad mu_i(o_i) grad_{a_i} Q_i(s, a_i)] at a_i = mu_i(o_i)
    return -(k * q).sum(-1).mean()


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
def act(actor, obs, avail_actions, memory=None, generator=None, theta=1.0, sigma=0.0, uniform=False):
    """Actions (B, N) or (B, N, D), noise-free without a generator, and the noise (B, N, D) for the next."""
    policy = actor(obs, avail_actions)  # (B, N, D)
    if avail_actions is not None:
        logits = torch.where(avail_actions, 0.0, policy) if uniform else policy
        return (logits if generator is None else gumbel_softmax(logits, generator)).argmax(-1), None
    if uniform:
        policy = 2 * torch.rand(policy.shape, generator=generator, device=policy.device) - 1
    elif generator is not None:
        memory = noise_step(
            policy.new_zeros(policy.shape) if memory is None else memory, theta, sigma, generator
        )
        policy = (policy + memory).clamp(-1, 1)
    return torch.lerp(actor.low, actor.high, (policy + 1) / 2), memory


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
    """Critic, and if `train_actor` actors and targets, on one batch, as in Algorithm 2 of [DOP]."""
    discrete, actions = batch.avail_actions is not None, encode(actor, batch.actions)  # (B, N, D)
    obs, next_obs, next_state = merge(batch.obs, batch.next_obs, batch.next_state)  # (U, ...), U = B or 1

    # critic
    with torch.no_grad():
        next_actions = actor_target(next_obs, batch.next_avail_actions)  # (U, N, D), with a mask (B, N, D)
        if discrete:
            next_actions = gumbel_softmax(next_actions, generator)
        next_q, k, b = critic_target(next_state, next_actions)  # (U, N), (U, N), (U,)
        next_q = decomposed_q(k, b, next_q).expand_as(batch.reward)  # (B,)
        td_target = td_targets(batch.reward, batch.terminated, next_q, args.gamma)  # (B,)
    q, k, b = critic(batch.state, actions)  # (B, N), (B, N), (B,)
    q_tot = decomposed_q(k, b, q)  # (B,)
    assert td_target.shape == q_tot.shape
    # Eq. 12 of [DOP]: L = E[(y - Q_tot(s, a))^2]
    critic_loss = F.mse_loss(q_tot, td_target)
    grad_norm_critic = descend(optimizers[1], critic_loss, args.max_grad_norm)
    losses = {"critic_loss": critic_loss.detach(), "q_taken": q_tot.detach().mean()}
    losses |= {"td_target": td_target.mean(), "grad_norm_critic": grad_norm_critic}
    if not train_actor:
        return losses

    # actor
    own = actor(obs, batch.avail_actions).expand_as(actions)  # (B, N, D)
    if discrete:
        own = gumbel_softmax(own, generator)
    q, k, _ = critic(batch.state, own)  # (B, N)
    actor_loss = policy_gradient_loss(k, q)
    grad_norm_actor = descend(optimizers[0], actor_loss, args.max_grad_norm)

    # targets
    follow(actor_target, actor, args.tau)
    follow(critic_target, critic, args.tau)
    return losses | {"actor_loss": actor_loss.detach(), "grad_norm_actor": grad_norm_actor}


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
    actor, critic = Actor(env, args).to(env.device), DecomposedCritic(env, args).to(env.device)
    actor_target, critic_target = copy.deepcopy(actor), copy.deepcopy(critic)
    actor_optimizer = torch.optim.RMSprop(actor.parameters(), lr=args.actor_lr, alpha=0.99, eps=1e-5)
    critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=args.critic_lr, alpha=0.99, eps=1e-5)
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
        warming_up = buffer.n_steps < args.warmup_steps
        explore = dict(theta=args.noise_theta, sigma=args.noise_sigma)
        explore |= {"uniform": warming_up and args.warmup_actions == "uniform"}
        obs, state, avail_actions = env.obs(), env.state(), env.avail_actions()
        actions, memory = act(actor, obs, avail_actions, memory, generator, **explore)
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
        if memory is not None:
            memory = memory * ~done[:, None, None]
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
