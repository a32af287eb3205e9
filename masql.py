"""MASQL: soft Q-learning of joint actions, to coordinate where policy gradients settle for less.

A central critic Q(s, a_1..a_N) is learnt by soft Q-learning. Every agent trains, on its own observation, a
sampler of *joint* actions towards exp(Q / alpha), and executes its own part of a sample. While alpha is high
the samplers spread over all good joint actions; then alpha is annealed, and they lock on the best.
[MASQL] Wei et al., "Multiagent Soft Q-Learning", AAAI Spring Symposium 2018.
[SQL] Haarnoja et al., "Reinforcement Learning with Deep Energy-Based Policies", ICML 2017.
[DDPG] Lillicrap et al., "Continuous Control with Deep Reinforcement Learning", ICLR 2016.

    python masql.py --env quadratic
    python masql.py --env quadratic --annealing linear --alpha-start 0.3

B games or batch, N agents, D action dimensions, J = N D joint ones, O observation, S state, K particles,
G networks, M inputs of a network.

Differs from the papers:
1. the samplers' own spread is the only exploration: [SQL] adds noise, which would hide the reward of (5, 5);
2. the value's samples stay uniform ([SQL] changes to the sampler's own); the samplers' noise stays random
   while alpha falls ([SQL] fixes it), and each agent draws its own;
3. as in the official code of [SQL], the kernel's width is median / log K and log(1 - a^2) joins the density;
4. where all states of a minibatch are the same, one stands for all: the same expectation in less time;
5. evaluation feeds the samplers zero noise;
6. an episode ended by the clock bootstraps from its own last observation.
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
    env: str = "quadratic"  # environment id, with arguments as in cdm,n_agents=5; its PRESETS beat defaults
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where everything lives; auto takes cuda if there is one
    total_timesteps: int = 100_000  # environment steps of the run; one step of one game counts as 1
    num_envs: int = 1  # games played in parallel
    eval_every: int = 5_000  # environment steps between two evaluations (0: none)
    eval_episodes: int = 128  # games of one evaluation, all in parallel
    log_every: int = 1_000  # environment steps between two points of charts and losses
    save_every: int = 50_000  # environment steps between two checkpoints (0: only at the end)
    save_replay: bool = False  # put the replay into checkpoints, so that a resumed run goes on exactly
    capture_video: bool = False  # save one game of every evaluation as a GIF in the run folder
    resume: str | None = None  # run folder to continue with its own settings
    run_dir: str = "runs"  # folder of the run folders

    # Algorithm specific arguments
    actor_lr: float = 1e-4  # learning rate of the samplers (appendix of [SQL])
    critic_lr: float = 1e-3  # learning rate of the critic (appendix of [SQL])
    gamma: float = 0.99  # discount (section 7 of [DDPG])
    hidden_dim: int = 100  # units of the two hidden layers (Experiments of [MASQL])
    max_grad_norm: float = 0.0  # norm that gradients are clipped to (0: no clipping)
    batch_size: int = 64  # transitions per update (appendix of [SQL])
    buffer_size: int = 1_000_000  # transitions in the replay buffer (appendix of [SQL])
    warmup_steps: int = 1_000  # environment steps before the first update (Experiments of [MASQL])
    update_every: int = 1  # environment steps per update (appendix of [SQL])
    target_period: int = 1_000  # updates between two copies to the target critic (appendix of [SQL])
    alpha_start: float = 1.0  # temperature until the annealing (Experiments of [MASQL])
    alpha_end: float = 1e-3  # temperature after the annealing (Experiments of [MASQL])
    annealing: Literal["exponential", "linear", "instant"] = "exponential"  # how alpha falls ([SQL])
    anneal_start: int = 60_000  # environment step at which alpha begins to fall
    anneal_steps: int = 20_000  # environment steps that its fall takes, unless instant
    value_samples: int = 50  # uniform joint actions per state in the soft value (appendix of [SQL])
    particles: int = 32  # that attract, and as many that move, per state and agent (appendix of [SQL])
    reward_scale: float = 1.0  # factor on rewards in the critic's targets; logged returns are without it

    def __post_init__(self):
        least = dict(anneal_start=0, alpha_start=1e-6, alpha_end=1e-6, particles=2)
        machine.check_numbers(vars(self), reward_scale=0, max_grad_norm=0, **least)
        if self.buffer_size < self.num_envs:
            raise ValueError(f"--buffer-size must be at least --num-envs, {self.num_envs}")


# particle tasks: games and replay of the siblings, and fewer updates, as each costs ten of theirs or more
MPE = dict(
    total_timesteps=500_000, num_envs=32, buffer_size=250_000, warmup_steps=5_000, update_every=96,
    target_period=20, actor_lr=1e-3, anneal_start=300_000, anneal_steps=100_000,
)  # fmt: skip
# environment id -> what differs from the defaults
PRESETS = {
    # [MASQL]: 150 epochs of 100 steps, alpha falls in epochs 100 to 115, reward x 0.1
    "quadratic": dict(
        total_timesteps=15_000, num_envs=1, log_every=100, eval_every=1_000, eval_episodes=1, save_every=0,
        anneal_start=10_000, anneal_steps=1_500, reward_scale=0.1,
    ),
    "aggregation": MPE | dict(eval_every=20_000, log_every=5_000, warmup_steps=100_000, update_every=192),
    "mill": MPE | dict(total_timesteps=60_000, batch_size=32, anneal_start=30_000, anneal_steps=10_000),
    "spread": MPE | dict(eval_every=20_000, gamma=0.95),
}  # fmt: skip
PRESETS |= {"aggregation_hard": PRESETS["aggregation"]}
# what cannot change in a resumed run: it decides shapes and meaning of what was saved
FIXED = ("env", "seed", "num_envs", "buffer_size", "hidden_dim", "reward_scale")


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
    """A sampler of joint actions per agent: the energy-based policy of [SQL], on the agent's observation."""

    def __init__(self, env, args):
        low, high = map(torch.as_tensor, (env.single_action_space.low, env.single_action_space.high))
        joint_dim = low.numel()
        super().__init__(env.n_agents, env.obs_dim + joint_dim, args.hidden_dim, args.hidden_dim, joint_dim)
        self.register_buffer("low", low)  # (N, D), the environment's bounds
        self.register_buffer("high", high)

    def forward(self, obs, noise):
        """obs (B, N, O), noise (B, K, N, J) -> K joint actions per agent, in -1..1 (B, K, N, J)."""
        obs = obs.unsqueeze(1).expand(-1, noise.shape[1], -1, -1)  # (B, K, N, O)
        return super().forward(torch.cat([obs, noise], -1)).tanh()


class Critic(Perceptrons):
    """Q(s, a_1..a_N) of the team."""

    def __init__(self, env, args):
        joint_dim = math.prod(env.single_action_space.shape)
        super().__init__(1, env.state_dim + joint_dim, args.hidden_dim, args.hidden_dim, 1)

    def forward(self, state, joint_actions):
        """state (B, S), joint_actions (B, M, N * D) -> q (B, M); M any with one critic, else N."""
        state = state.unsqueeze(1).expand(*joint_actions.shape[:2], -1)  # (B, M, S)
        return super().forward(torch.cat([state, joint_actions], -1)).squeeze(-1)


# ---- equations ----
def soft_value(q_values, alpha, log_volume):
    """V (B,) from q_values (B, M) of joint actions drawn uniformly from a space of volume exp(log_volume)."""
    # Eq. 10 of [SQL]: V = alpha log E_q[exp(Q / alpha) / q(a)], q(a) = 1 / volume
    return alpha * (torch.logsumexp(q_values / alpha, -1) - math.log(q_values.shape[-1]) + log_volume)


def td_targets(reward, terminated, next_v, gamma):
    """Targets of the critic, all (B,); nothing follows a terminated step, next_v a truncated one."""
    assert reward.shape == terminated.shape == next_v.shape
    # Soft Q-Learning in [MASQL]: Q(s, a) <- r + gamma E[V(s')]
    return reward + gamma * (1 - terminated.to(reward.dtype)) * next_v


def svgd_direction(fixed, score, updated):
    """Where to move the actions `updated` (B, K, J), given others `fixed` and their score (both (B, K, J)).

    Returns (B, K, J), the steepest descent of the KL-divergence of Eq. 3 of [MASQL] in the kernel's space;
    score, mostly grad_a Q / alpha, is the gradient of the log density that the actions should get.
    """
    assert fixed.shape == score.shape
    # only differences matter, and small numbers lose less in products of matrices, which TF32 rounds
    centre = fixed.mean(1, keepdim=True)  # (B, 1, J)
    fixed, updated = fixed - centre, updated - centre
    distance = torch.cdist(fixed, updated).square()  # (B, K, K)
    # section 5 of Liu and Wang 2016, "Stein Variational Gradient Descent": h = median / log K
    width = (distance.flatten(1).median(1).values / math.log(fixed.shape[1])).clamp_min(1e-3)[:, None, None]
    kernel = (-distance / width).exp()  # (B, K, K), k(fixed, updated)
    # Eq. 13 of [SQL] over alpha, as Eq. 3 of [MASQL]: E_{a ~ pi}[k(a, f) grad_a Q / alpha + grad_a k(a, f)],
    # where grad_a k(a, f) = 2 / width (f - a) k(a, f); as products of matrices, without all pairs' vectors
    attraction = torch.bmm(kernel.mT, score - 2 / width * fixed)  # (B, K, J)
    return (attraction + 2 / width * kernel.sum(1).unsqueeze(-1) * updated) / fixed.shape[1]


def annealed_alpha(step, start, steps, alpha_start, alpha_end, annealing):
    """Temperature at an environment step: constant, falling from `start` on for `steps`, constant."""
    share = float(step >= start) if annealing == "instant" else min(max((step - start) / steps, 0.0), 1.0)
    if annealing == "linear":
        return alpha_start + share * (alpha_end - alpha_start)
    return alpha_start * (alpha_end / alpha_start) ** share


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
    """Actions (B, N, D) of one step, each agent's part of its own sample; zero noise without a generator."""
    (B, N, _), (_, D) = obs.shape, actor.high.shape
    noise = obs.new_zeros(B, 1, N, N * D)
    if generator is not None:
        noise.normal_(generator=generator)
    own = actor(obs, noise).view(B, N, N, D).diagonal(dim1=1, dim2=2).transpose(1, 2)  # (B, N, D)
    return torch.lerp(actor.low, actor.high, (own + 1) / 2), memory


# ---- update ----
def encode(actor, actions):
    """Actions (B, N, D) for the critic, of those for the environment: scaled to -1..1."""
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


def update(args, actor, critic, critic_target, optimizers, batch, alpha, generator):
    """Critic and samplers on one batch, as in Algorithm 1 of [MASQL]."""
    joint_actions = encode(actor, batch.actions).flatten(1)  # (B, J)
    (_, N, _), J, K = batch.obs.shape, joint_actions.shape[1], args.particles
    state, obs, next_state = merge(batch.state, batch.obs, batch.next_state)  # (U, ...), U = B or 1

    # critic
    with torch.no_grad():
        samples = torch.empty(len(next_state), args.value_samples, J, device=next_state.device)
        q_values = critic_target(next_state, samples.uniform_(-1, 1, generator=generator))  # (U, M)
        next_v = soft_value(q_values, alpha, J * math.log(2)).expand_as(batch.reward)  # (B,)
        td_target = td_targets(args.reward_scale * batch.reward, batch.terminated, next_v, args.gamma)  # (B,)
    q_taken = critic(batch.state, joint_actions.unsqueeze(1)).squeeze(1)  # (B,)
    assert td_target.shape == q_taken.shape
    # Eq. 11 of [SQL]: J_Q = E[(y - Q(s, a))^2 / 2]
    critic_loss = 0.5 * F.mse_loss(q_taken, td_target)
    grad_norm_critic = descend(optimizers[1], critic_loss, args.max_grad_norm)

    # actor
    noise = torch.randn(len(obs), 2 * K, N, J, generator=generator, device=obs.device)
    fixed = actor(obs, noise[:, :K]).detach().transpose(1, 2).requires_grad_()  # (U, N, K, J)
    updated = actor(obs, noise[:, K:]).transpose(1, 2)  # (U, N, K, J), each agent's apart
    # NOTE: as the official code of [SQL]: without this term particles push each other onto the bounds
    squash = (1 - fixed.square() + 1e-6).log().sum()
    log_density = critic(state, fixed.flatten(1, 2)).sum() / alpha + squash
    score = torch.autograd.grad(log_density, fixed)[0]  # (U, N, K, J)
    direction = svgd_direction(*(x.flatten(0, 1) for x in (fixed.detach(), score, updated.detach())))
    # Eq. 14 of [SQL]: grad J = E_noise[direction grad f(noise, s)]
    actor_loss = -(direction.view_as(updated) * updated).sum(-1).mean((0, 2)).sum()
    grad_norm_actor = descend(optimizers[0], actor_loss, args.max_grad_norm)

    losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "q_taken": q_taken.mean()}
    losses |= {"td_target": td_target.mean(), "grad_norm_actor": grad_norm_actor}
    return {name: value.detach() for name, value in losses.items()} | {"grad_norm_critic": grad_norm_critic}


if __name__ == "__main__":
    # ---- run ----
    args = machine.parse_args(Args, PRESETS, FIXED, __doc__)
    seeds = machine.seeds(args.seed, 3)  # of weights, games and exploration
    torch.manual_seed(seeds[0])
    with machine.set_up():
        options = dict(device=args.device, actions="continuous", validate=False)
        env = make(args.env, args.num_envs, seed=seeds[1], **options)
        if args.eval_every:
            eval_env = make(args.env, args.eval_episodes, render=args.capture_video, **options)
        env.reset()
    run, stop = machine.open_folder(vars(args)), machine.catch_signals()

    # ---- networks and storage ----
    generator = Stream(env.device).manual_seed(seeds[2])
    actor, critic = Actor(env, args).to(env.device), Critic(env, args).to(env.device)
    critic_target = copy.deepcopy(critic)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_lr, fused=True)
    optimizers = (actor_optimizer, critic_optimizer)
    buffer = ReplayBuffer(args.buffer_size)
    parts = dict(actor=actor, critic=critic, critic_target=critic_target)
    parts |= dict(actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    parts |= dict(env=env, generator=generator) | (dict(buffer=buffer) if args.save_replay else {})
    anneal = (args.anneal_start, args.anneal_steps, args.alpha_start, args.alpha_end, args.annealing)
    if annealed_alpha(args.total_timesteps, *anneal) > 1.1 * args.alpha_end:
        machine.say("alpha has not fallen yet when this run ends: lower --anneal-start or --anneal-steps")

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
        alpha = annealed_alpha(global_step, *anneal)
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
            losses |= update(args, actor, critic, critic_target, optimizers, batch, alpha, generator)
            if iteration % args.target_period == 0:
                follow(critic_target, critic, tau=1.0)
        train_seconds += time.perf_counter() - started

        # log, evaluate, save
        last = global_step >= args.total_timesteps or bool(stop)
        if machine.due(args.log_every, global_step, args.num_envs, last):
            log.training(global_step, train_seconds, losses, alpha=alpha)
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
