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
    env: str = "quadratic"
    """environment id, in any case, arguments behind commas (cdm,n_agents=5); its PRESETS beat defaults"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where everything lives; auto takes cuda if there is one"""
    total_timesteps: int = 100_000
    """environment steps of the run; one step of one game counts as 1"""
    num_envs: int = 1
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
    actor_lr: float = 1e-4
    """learning rate of the samplers (appendix of [SQL])"""
    critic_lr: float = 1e-3
    """learning rate of the critic (appendix of [SQL])"""
    gamma: float = 0.99
    """discount (section 7 of [DDPG])"""
    hidden_dim: int = 100
    """units of the two hidden layers (Experiments of [MASQL])"""
    max_grad_norm: float = 0.0
    """norm that gradients are clipped to (0: no clipping)"""
    batch_size: int = 64
    """transitions per update (appendix of [SQL])"""
    buffer_size: int = 1_000_000
    """transitions in the replay buffer (appendix of [SQL])"""
    warmup_steps: int = 1_000
    """environment steps before the first update, by the untrained samplers (Experiments of [MASQL])"""
    update_every: int = 1
    """environment steps per update (appendix of [SQL])"""
    target_period: int = 1_000
    """updates between two copies to the target critic (appendix of [SQL])"""
    alpha_start: float = 1.0
    """temperature until the annealing (Experiments of [MASQL])"""
    alpha_end: float = 1e-3
    """temperature after the annealing (Experiments of [MASQL])"""
    annealing: Literal["exponential", "linear", "instant"] = "exponential"
    """how alpha falls (exponentially in the appendix of [SQL]; [MASQL] leaves it open)"""
    anneal_start: int = 60_000
    """environment step at which alpha begins to fall"""
    anneal_steps: int = 20_000
    """environment steps that its fall takes, unless instant"""
    value_samples: int = 50
    """uniform joint actions per state in the soft value (appendix of [SQL])"""
    particles: int = 32
    """particles that attract, and as many that move, per state and agent (appendix of [SQL])"""
    reward_scale: float = 1.0
    """factor on rewards in the critic's targets; logged returns are without it"""


# environment id -> what differs from the defaults
PRESETS = {
    # [MASQL]: 150 epochs of 100 steps, alpha falls in epochs 100 to 115, reward x 0.1
    "quadratic": dict(
        total_timesteps=15_000, num_envs=1, log_every=100, eval_every=1_000, eval_episodes=1, save_every=0,
        anneal_start=10_000, anneal_steps=1_500, reward_scale=0.1,
    ),
}  # fmt: skip
# of numbers, where an integer may be less than 1 or another number may leave 0 to 1
LIMITS = dict.fromkeys(("seed", "eval_every", "save_every", "warmup_steps", "anneal_start"), (0, math.inf))
LIMITS |= dict.fromkeys(("reward_scale", "max_grad_norm"), (0, math.inf)) | {"particles": (2, math.inf)}
LIMITS |= dict.fromkeys(("alpha_start", "alpha_end"), (1e-6, math.inf))


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
    """A sampler of joint actions per agent: the energy-based policy of [SQL], on the agent's observation."""

    def __init__(self, groups, *sizes, low, high):
        super().__init__(groups, *sizes)
        self.register_buffer("low", low)  # (N, D), the environment's bounds
        self.register_buffer("high", high)

    def forward(self, obs, noise):
        """obs (B, N, O), noise (B, K, N, J) -> K joint actions per agent, in -1..1 (B, K, N, J)."""
        obs = obs.unsqueeze(1).expand(-1, noise.shape[1], -1, -1)  # (B, K, N, O)
        return super().forward(torch.cat([obs, noise], -1)).tanh()


class Critic(Perceptrons):
    """Q(s, a_1..a_N), one for the team or one for each agent."""

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
    difference = fixed.unsqueeze(2) - updated.unsqueeze(1)  # (B, K, K, J)
    distance = difference.square().sum(-1)  # (B, K, K), squared
    # section 5 of Liu and Wang 2016, "Stein Variational Gradient Descent": h = median / log K
    width = (distance.flatten(1).median(1).values / math.log(fixed.shape[1])).clamp_min(1e-3)[:, None, None]
    kernel = (-distance / width).exp()  # (B, K, K), k(fixed, updated)
    kernel_gradient = (-2 / width * kernel).unsqueeze(-1) * difference  # (B, K, K, J), by fixed
    # Eq. 13 of [SQL] over alpha, as Eq. 3 of [MASQL]: E_{a ~ pi}[k(a, f) grad_a Q / alpha + grad_a k(a, f)]
    return (kernel.unsqueeze(-1) * score.unsqueeze(2) + kernel_gradient).mean(1)


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
    """Actions (B, N, D) of one step, each agent's part of its own sample; zero noise without a generator."""
    (B, N, _), (_, D) = obs.shape, actor.high.shape
    noise = obs.new_zeros(B, 1, N, N * D)
    if generator is not None:
        noise.normal_(generator=generator)
    joint = actor(obs, noise).view(B, N, N, D)
    own = joint.diagonal(dim1=1, dim2=2).transpose(1, 2)  # (B, N, D)
    return torch.lerp(actor.low, actor.high, (own + 1) / 2), memory


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
    actions = actor(obs, noise).transpose(1, 2)  # (U, N, 2 K, J), each agent's apart
    fixed, updated = actions[:, :, :K].detach().requires_grad_(), actions[:, :, K:]  # (U, N, K, J)
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
    if not isinstance(space, gymnasium.spaces.Box):
        fail(f"{args.env} has discrete actions; this algorithm needs continuous ones")
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)  # (N, D)
    if not (low.isfinite() & high.isfinite()).all():
        fail(f"{args.env} has actions without finite bounds; this algorithm needs bounds to scale them")
    joint_dim = low.numel()
    actor_sizes = (env.obs_dim + joint_dim, args.hidden_dim, args.hidden_dim, joint_dim)
    actor = Actor(n_agents, *actor_sizes, low=low, high=high).to(device)
    if run := args.evaluate:
        global_step = load(run, {"actor": actor})["global_step"]
        results = evaluate(actor, eval_env, Path(run, "evaluate.gif") if args.capture_video else None)
        print("run | step |", " | ".join(results))
        print(run, "|", global_step, "|", " | ".join(f"{x:.3f}" for x in results.values()))
        sys.exit()
    critic = Critic(1, env.state_dim + joint_dim, args.hidden_dim, args.hidden_dim, 1).to(device)
    critic_target = copy.deepcopy(critic)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.actor_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_lr, fused=True)
    optimizers = (actor_optimizer, critic_optimizer)
    parts = {"actor": actor, "critic": critic, "critic_target": critic_target}
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
    memory, recent, losses, new_steps = None, [], {}, 0
    start_step, start_seconds = global_step, train_seconds
    bar = tqdm(total=args.total_timesteps, initial=global_step, disable=not sys.stderr.isatty())
    while global_step < args.total_timesteps and not stop:
        # act, step
        started = time.perf_counter()
        anneal = (args.anneal_start, args.anneal_steps, args.alpha_start, args.alpha_end, args.annealing)
        alpha = annealed_alpha(global_step, *anneal)
        schedule = {"alpha": alpha}
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
            losses = update(args, actor, critic, critic_target, optimizers, batch, alpha, generator)
            if iteration % args.target_period == 0:
                follow(critic_target, critic, tau=1.0)
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
