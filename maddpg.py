"""MADDPG: deterministic policies, each climbing a centralised critic that sees everybody's actions.

Every agent acts on its own observation. In training a critic Q(s, a_1..a_N) is learnt from replay with target
networks, as in Q-learning, and agent i's policy follows its gradient through the agent's own action only.
[MADDPG] Lowe et al., "Multi-Agent Actor-Critic for Mixed Cooperative-Competitive Environments", NIPS 2017.
[DDPG] Lillicrap et al., "Continuous Control with Deep Reinforcement Learning", ICLR 2016.
[MASQL] Wei et al., "Multiagent Soft Q-Learning", AAAI Spring Symposium 2018: the protocol of `quadratic`.
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021: the delay.

    python maddpg.py --env quadratic
    python maddpg.py --env 3m

B games or batch, N agents, A discrete actions, D action dimensions (A if discrete), O observation, S state,
G networks, M inputs of a network.

Differs from the paper:
1. the games are cooperative: one critic learns the team reward, not one per agent (`--critic-per-agent`);
2. discrete actions are straight-through Gumbel-softmax samples: the environments take no soft actions;
3. continuous actions explore with the noise of [DDPG] ([MADDPG] leaves it open), discrete ones by sampling;
4. the agents' networks are batched: one gradient clip and one update of targets for all of them;
5. an episode ended by the clock bootstraps from its own last observation.
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
    actor_lr: float = 1e-2  # learning rate of the actors (0.01 in the appendix of [MADDPG])
    critic_lr: float = 1e-2  # learning rate of the critic (0.01 in the appendix of [MADDPG])
    critic_weight_decay: float = 0.0  # L2 penalty on the critic's weights (1e-2 in section 7 of [DDPG])
    gamma: float = 0.95  # discount (0.95 in the appendix of [MADDPG])
    tau: float = 0.01  # share of the live networks that enters the targets (0.01 in the appendix of [MADDPG])
    hidden_dim: int = 64  # units of the two hidden layers (64 in the appendix of [MADDPG])
    final_init: float = 0.0  # bound of last layers' initial weights (3e-3 in [DDPG], section 7; 0: as others)
    max_grad_norm: float = 0.5  # norm that gradients are clipped to (official code; 0: no clipping)
    batch_size: int = 1024  # transitions per update (1024 in the appendix of [MADDPG])
    buffer_size: int = 1_000_000  # transitions in the replay buffer (1,000,000 in the appendix of [MADDPG])
    warmup_steps: int = 25_600  # environment steps before the first update (official code: batch size x 25)
    warmup_actions: Literal["untrained", "uniform"] = "untrained"  # until then: policies, or uniform draws
    update_every: int = 100  # environment steps per update of the critic (100 in the appendix of [MADDPG])
    policy_delay: int = 1  # critic updates per update of actors and targets (2 in Appendix G.2 of [DOP])
    # others' actions in an actor's gradient: of the replay (both papers), or of their current policies
    others_actions: Literal["replayed", "current"] = "replayed"
    # a critic for each agent, which learns the agent's own reward where the environment has such rewards
    critic_per_agent: bool = False
    noise_sigma: float = 0.2  # scale of noise on continuous actions in -1..1 (section 7 of [DDPG])
    noise_theta: float = 0.15  # pull of this noise to 0 per step (section 7 of [DDPG]; 1: Gaussian noise)
    logit_penalty: float = 1e-3  # weight of discrete actions' mean square logits in the loss (official code)
    reward_scale: float = 1.0  # factor on rewards in the critic's targets; logged returns are without it

    def __post_init__(self):
        machine.check_numbers(vars(self), noise_sigma=0, reward_scale=0, max_grad_norm=0)
        if self.buffer_size < self.num_envs:
            raise ValueError(f"--buffer-size must be at least --num-envs, {self.num_envs}")


# particle tasks: games, replay, critic updates, tau of dop_deterministic.py, learning rates of [DDPG]
MPE = dict(
    num_envs=32, actor_lr=1e-4, critic_lr=1e-3, tau=0.05, batch_size=256, buffer_size=250_000,
    warmup_steps=5_000, update_every=32,
)  # fmt: skip
# environment id -> what differs from the defaults
PRESETS = {
    # [MASQL]: 150 epochs of 100 steps, 1000 samples first, reward x 0.1, layers of 100; or [DDPG]
    "quadratic": dict(
        total_timesteps=15_000, num_envs=1, log_every=100, eval_every=1_000, eval_episodes=1, save_every=0,
        actor_lr=1e-4, critic_lr=1e-3, critic_weight_decay=1e-2, gamma=0.99, tau=1e-3, hidden_dim=100,
        final_init=3e-3, max_grad_norm=0, batch_size=64, warmup_steps=1_000, update_every=1, reward_scale=0.1,
    ),
    # [DOP]'s tasks, where its baselines have the delay too
    "aggregation": MPE | dict(
        total_timesteps=500_000, eval_every=20_000, log_every=5_000, warmup_steps=100_000, policy_delay=2,
    ),
    "mill": MPE | dict(total_timesteps=60_000, policy_delay=2),
    "spread": MPE | dict(total_timesteps=500_000, eval_every=20_000),
    "cdm": dict(
        total_timesteps=10_000, num_envs=4, log_every=100, eval_every=500, eval_episodes=1, save_every=0,
        batch_size=128, warmup_steps=256, update_every=4,
    ),
}  # fmt: skip
PRESETS |= {"aggregation_hard": PRESETS["aggregation"]}
# what cannot change in a resumed run: it decides shapes and meaning of what was saved
FIXED = ("env", "seed", "num_envs", "buffer_size", "hidden_dim", "critic_per_agent", "reward_scale")


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
        sizes = (env.obs_dim, args.hidden_dim, args.hidden_dim, low.shape[1])
        super().__init__(env.n_agents, *sizes, final_init=args.final_init)
        self.register_buffer("low", low)  # (N, D), the environment's bounds
        self.register_buffer("high", high)
        if env.action_bias is not None:
            self.biases[-1].data += env.action_bias.cpu()

    def forward(self, obs, avail_actions):
        """obs (B, N, O), avail_actions (B, N, A) or None -> (B, N, D): actions in -1..1, or logits."""
        x = super().forward(obs)
        return x.tanh() if avail_actions is None else torch.where(avail_actions, x, -1e9)


class Critic(Perceptrons):
    """Q(s, a_1..a_N), one for the team or one for each agent."""

    def __init__(self, env, args):
        action_dim = env.n_actions or env.single_action_space.shape[1]
        sizes = (env.state_dim + env.n_agents * action_dim, args.hidden_dim, args.hidden_dim, 1)
        super().__init__(env.n_agents if args.critic_per_agent else 1, *sizes, final_init=args.final_init)

    def forward(self, state, joint_actions):
        """state (B, S), joint_actions (B, M, N * D) -> q (B, M); M any with one critic, else N."""
        state = state.unsqueeze(1).expand(*joint_actions.shape[:2], -1)  # (B, M, S)
        return super().forward(torch.cat([state, joint_actions], -1)).squeeze(-1)


# ---- equations ----
def td_targets(reward, terminated, next_q, gamma):
    """Targets of the critics, all (B, G); nothing follows a terminated step, next_q a truncated one."""
    assert reward.shape == terminated.shape == next_q.shape
    # Eq. 6 of [MADDPG]: y = r + gamma Q'(x', a'_1..a'_N) with a'_j = mu'_j(o'_j)
    return reward + gamma * (1 - terminated.to(reward.dtype)) * next_q


def gumbel_softmax(logits, generator):
    """Samples (..., A) as one-hot vectors, with the gradient of the softmax at temperature 1."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).clamp_min(1e-30).log()
    soft = (logits + noise).softmax(-1)  # (..., A)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


def noise_step(noise, theta, sigma, generator):
    """The next Ornstein-Uhlenbeck noise, any shape: x <- (1 - theta) x + sigma N(0, 1)."""
    return (1 - theta) * noise + sigma * torch.randn(noise.shape, generator=generator, device=noise.device)


def own_in_joint(own, others):
    """Joint actions (B, N, N * D), row i with agent i's of `own`, the others' of `others`; both (B, N, D)."""
    assert own.shape == others.shape
    is_own = torch.eye(own.shape[1], dtype=torch.bool, device=own.device).unsqueeze(-1)  # (N, N, 1)
    return torch.where(is_own, own.unsqueeze(1), others.unsqueeze(1)).flatten(2)


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
    """Critic, and if `train_actor` actors and targets, on one batch, as in Algorithm 1 of [MADDPG]."""
    discrete, reward = batch.avail_actions is not None, args.reward_scale * batch.reward  # (B,) or (B, N)
    actions = encode(actor, batch.actions)  # (B, N, D)
    obs, next_obs, next_state = merge(batch.obs, batch.next_obs, batch.next_state)  # (U, ...), U = B or 1

    # critic
    with torch.no_grad():
        next_actions = actor_target(next_obs, batch.next_avail_actions)  # (U, N, D), with a mask (B, N, D)
        if discrete:
            next_actions = gumbel_softmax(next_actions, generator)
        next_joint = next_actions.flatten(1).unsqueeze(1).expand(-1, critic.groups, -1)  # (U, G, N * D)
        next_q = critic_target(next_state, next_joint).expand(len(actions), -1)  # (B, G)
        reward, terminated = (x.view(len(x), -1).expand_as(next_q) for x in (reward, batch.terminated))
        td_target = td_targets(reward, terminated, next_q, args.gamma)  # (B, G)
    joint_actions = actions.flatten(1).unsqueeze(1).expand(-1, critic.groups, -1)  # (B, G, N * D)
    q_taken = critic(batch.state, joint_actions)  # (B, G)
    assert td_target.shape == q_taken.shape
    # Eq. 6 of [MADDPG]: L = E[(Q(x, a_1..a_N) - y)^2]
    critic_loss = critic.groups * F.mse_loss(q_taken, td_target)
    grad_norm_critic = descend(optimizers[1], critic_loss, args.max_grad_norm)
    losses = {"critic_loss": critic_loss.detach(), "q_taken": q_taken.detach().mean()}
    losses |= {"td_target": td_target.mean(), "grad_norm_critic": grad_norm_critic}
    if not train_actor:
        return losses

    # actor
    policy = actor(obs, batch.avail_actions).expand_as(actions)  # (B, N, D)
    own = gumbel_softmax(policy, generator) if discrete else policy
    others = actions if args.others_actions == "replayed" else own.detach()
    # Eq. 5 of [MADDPG]: grad J_i = E[grad mu_i(o_i) grad_{a_i} Q(x, a_1..a_N)] at a_i = mu_i(o_i)
    actor_loss = -critic(batch.state, own_in_joint(own, others)).mean(0).sum()
    if discrete:
        logits = policy.masked_fill(~batch.avail_actions, 0.0)
        actor_loss = actor_loss + args.logit_penalty * logits.square().mean((0, 2)).sum()
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
    actor, critic = Actor(env, args).to(env.device), Critic(env, args).to(env.device)
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
        if args.critic_per_agent:
            reward = info.get("agent_rewards", reward)
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
