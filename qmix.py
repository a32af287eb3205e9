"""QMIX: Q-learning for cooperative games, with a joint value that is monotone in the agents' own values.

A mixing network, whose weights come from the state, turns the agents' recurrent values into Q_tot. It rises
with each of them, so that the best joint action is every agent's own best one.
[QMIX] Rashid et al., "QMIX: Monotonic Value Function Factorisation for Deep Multi-Agent Reinforcement
Learning", ICML 2018.

    python qmix.py --env mmm
    python qmix.py --env mmm --setting paper

B games or episodes, T time, N agents, A actions, O observation, S state, H hidden, E embedding,
M transitions.

Differs from the paper, as the official code (oxwhirl/pymarl) does:
1. double Q-learning: the live network chooses the next actions, the target network values them;
2. the weights of the mixing network come from two layers with ReLU, not from one linear layer.

Differs from both:
3. replayed observations and states are in half precision, to halve the memory.

Without `--setting paper` also, to win in less time (docs/qmix.md):
4. 16 games, not 1, with a gradient step per finished episode as there;
5. target networks copied every 50 gradient steps, not every 200.
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
    lr: float = 5e-4
    """learning rate of all networks (official code)"""
    gamma: float = 0.99
    """discount (official code)"""
    epsilon_start: float = 1.0
    """share of random actions at the start (official code)"""
    epsilon_end: float = 0.05
    """the same after the decay (official code)"""
    epsilon_steps: int = 50_000
    """environment steps of the linear decay (official code)"""
    buffer_size: int = 5_000
    """latest episodes in the replay buffer (official code)"""
    batch_size: int = 32
    """episodes per gradient step (official code)"""
    episodes_per_iteration: int = 1
    """finished episodes per gradient step (official code)"""
    target_period: int = 50
    """gradient steps between two copies to the target networks (200 in the official code)"""


# setting or environment id -> what differs from the defaults
PRESETS = {
    "paper": dict(num_envs=1, target_period=200, total_timesteps=2_000_000),
    "cdm": dict(
        total_timesteps=10_000, epsilon_steps=5_000, episodes_per_iteration=4, eval_every=500,
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


class Mixer(nn.Module):
    """Q_tot from the agents' values by two layers, whose weights and biases come from the state."""

    def __init__(self, state_dim, n_agents, embed_dim, hyper_dim):
        super().__init__()
        # w_1, b_1, w_2, b_2 begin with a layer on the state each: one product makes all of them
        self.first_dims = [hyper_dim, embed_dim, hyper_dim, embed_dim]
        self.first = nn.Linear(state_dim, sum(self.first_dims))
        self.w_1 = nn.Linear(hyper_dim, n_agents * embed_dim)
        self.w_2 = nn.Linear(hyper_dim, embed_dim)
        self.b_2 = nn.Linear(embed_dim, 1)

    def forward(self, q, state):
        """q (..., N) of the agents, state (..., S) -> Q_tot (...)."""
        w_1, b_1, w_2, b_2 = self.first(state).split(self.first_dims, -1)  # b_1: (..., E)
        # Eq. 5 of [QMIX]: dQ_tot / dQ_i >= 0, as no weight is negative and ELU rises
        w_1 = self.w_1(F.relu(w_1)).abs().unflatten(-1, (q.shape[-1], -1))  # (..., N, E)
        w_2 = self.w_2(F.relu(w_2)).abs()  # (..., E)
        x = F.elu((q.unsqueeze(-2) @ w_1).squeeze(-2) + b_1)  # (..., E)
        return (x * w_2).sum(-1) + self.b_2(F.relu(b_2)).squeeze(-1)


# ---- equations ----
def greedy(q_values, avail_actions):
    """The best legal actions (...) by q_values (..., A)."""
    return q_values.masked_fill(~avail_actions, -1e9).argmax(-1)


def epsilon_greedy(q_values, avail_actions, epsilon):
    """pi (..., A) = (1 - epsilon) greedy + epsilon uniform, both over legal actions; 0 on illegal ones."""
    best = F.one_hot(greedy(q_values, avail_actions), q_values.shape[-1])  # (..., A)
    return (1 - epsilon) * best + epsilon * avail_actions / avail_actions.sum(-1, keepdim=True)


def sample_actions(pi, generator):
    """Actions (...) from pi (..., A) as argmax(pi / Exp(1)), which never picks a zero probability."""
    noise = torch.empty_like(pi).exponential_(generator=generator).clamp_min(torch.finfo(pi.dtype).tiny)
    return (pi / noise).argmax(-1)


def double_q(q_values, q_values_target, avail_actions):
    """The target network's values (...) of the actions that the live one prefers; all in (..., A)."""
    # max_u' of Eq. 6 of [QMIX] for each agent on its own, which maximises Q_tot by Eq. 4
    return q_values_target.gather(-1, greedy(q_values, avail_actions).unsqueeze(-1)).squeeze(-1)


def td_targets(reward, terminated, next_q_tot, gamma):
    """One-step targets, all (...); an episode cut by the clock bootstraps from its last observation."""
    assert reward.shape == terminated.shape == next_q_tot.shape
    # Eq. 6 of [QMIX]: y = r + gamma max_u' Q_tot(s', u')
    return reward + gamma * (1 - terminated.to(reward.dtype)) * next_q_tot


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
    q_values, hidden = actor(obs, last_actions, hidden)  # (B, N, A), (B, N, H)
    pi = epsilon_greedy(q_values, avail_actions, epsilon)  # (B, N, A)
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
def descend(optimizer, loss, max_norm):
    """One step down the gradient, clipped at `max_norm`; returns its norm before."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    optimizer.step()
    return grad_norm


def update(args, actor, mixer, actor_target, mixer_target, optimizer, batch):
    """One gradient step on whole episodes."""
    valid = batch.mask.nonzero_static(size=sum(batch.length)).unbind(1)  # (M,), (M,)
    q_values = actor.unroll(batch)  # (B, T + 1, N, A)
    q_taken = q_values[:, :-1].gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)  # (B, T, N)
    q_tot = mixer(q_taken[valid], batch.state[:, :-1][valid])  # (M,), no padding from here on
    with torch.no_grad():
        # from t = 0 on as well: the memory that values t + 1 has seen all steps before
        q_values_target = actor_target.unroll(batch)  # (B, T + 1, N, A)
        next_q = double_q(q_values[:, 1:], q_values_target[:, 1:], batch.avail_actions[:, 1:])  # (B, T, N)
        next_q_tot = mixer_target(next_q[valid], batch.state[:, 1:][valid])  # (M,)
        td_target = td_targets(batch.reward[valid], batch.terminated[valid], next_q_tot, args.gamma)
    assert td_target.shape == q_tot.shape
    # Eq. 6 of [QMIX]: L = (y - Q_tot)^2, a mean over the transitions
    critic_loss = (td_target - q_tot).square().mean()
    grad_norm = descend(optimizer, critic_loss, 10.0)  # official code
    logs = {"critic_loss": critic_loss.detach(), "grad_norm_critic": grad_norm}
    return logs | {"q_taken": q_tot.detach().mean(), "td_target": td_target.mean()}


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
    mixer = Mixer(env.state_dim, n_agents, embed_dim=32, hyper_dim=64).to(device)
    actor_target, mixer_target = copy.deepcopy(actor), copy.deepcopy(mixer)
    actor_target.gru.flatten_parameters()  # a copy's weights lie apart: cuDNN would join them at each call
    parameters = [*actor.parameters(), *mixer.parameters()]
    optimizer = torch.optim.RMSprop(parameters, lr=args.lr, alpha=0.99, eps=1e-5)
    parts = {"actor": actor, "mixer": mixer, "actor_target": actor_target, "mixer_target": mixer_target}
    parts |= {"optimizer": optimizer}
    if args.buffer_size < max(args.batch_size, args.num_envs):
        fail("--buffer-size is less than --batch-size or --num-envs")
    sizes = (env.episode_limit, n_agents, env.obs_dim, env.state_dim, n_actions)
    try:
        buffer = EpisodeBuffer(args.buffer_size, args.num_envs, *sizes, device)
    except RuntimeError:
        fail(f"no memory for {args.buffer_size} x {env.episode_limit} steps; lower --buffer-size")

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
            if buffer.n_episodes < args.batch_size:
                continue
            iteration += 1
            batch = buffer.sample([(args.batch_size, args.buffer_size)], generator)
            losses = update(args, actor, mixer, actor_target, mixer_target, optimizer, batch)
            if iteration % args.target_period == 0:
                actor_target.load_state_dict(actor.state_dict())
                mixer_target.load_state_dict(mixer.state_dict())
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
