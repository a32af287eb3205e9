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
3. replayed observations and states that stay within about 1 are in half precision, to halve the memory.

Without `--setting paper` also, to win in less time (docs/qmix.md):
4. 16 games, not 1, with a gradient step per finished episode as there.
"""

import copy
import math
import time
from dataclasses import dataclass
from functools import partial
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
    setting: Literal["default", "paper"] = "default"  # entry of PRESETS to start from; flags win
    hidden_dim: int = 64  # units of the agents' layers (official code)
    embed_dim: int = 32  # units of the mixing network's hidden layer (official code)
    hyper_dim: int = 64  # units of the layers that make its weights from the state (official code)
    lr: float = 5e-4  # learning rate of all networks (official code)
    gamma: float = 0.99  # discount (official code)
    epsilon_start: float = 1.0  # share of random actions at the start (official code)
    epsilon_end: float = 0.05  # the same after the decay (official code)
    epsilon_steps: int = 50_000  # environment steps of the linear decay (official code)
    buffer_size: int = 5_000  # latest episodes in the replay buffer (official code)
    batch_size: int = 32  # episodes per gradient step (official code)
    episodes_per_iteration: int = 1  # finished episodes per gradient step (official code)
    target_period: int = 200  # gradient steps between two copies to the targets (official code)

    def __post_init__(self):
        machine.check_numbers(vars(self))
        if self.buffer_size < max(self.batch_size, self.num_envs):
            raise ValueError("--buffer-size is less than --batch-size or --num-envs")


# setting or environment id -> what differs from the defaults
PRESETS = {
    "paper": dict(
        num_envs=1, episodes_per_iteration=1, target_period=200, epsilon_steps=50_000,
        total_timesteps=2_000_000,
    ),
    "cdm": dict(
        total_timesteps=10_000, epsilon_steps=5_000, episodes_per_iteration=4, target_period=50,
        eval_every=500, eval_episodes=1, log_every=100,
    ),
}  # fmt: skip
# what cannot change in a resumed run: it decides shapes and meaning of what was saved
FIXED = ("env", "seed", "setting", "num_envs", "buffer_size", "hidden_dim", "embed_dim", "hyper_dim")


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


class Mixer(nn.Module):
    """Q_tot from the agents' values by two layers, whose weights and biases come from the state."""

    def __init__(self, env, args):
        super().__init__()
        # w_1, b_1, w_2, b_2 begin with a layer on the state each: one product makes all of them
        self.first_dims = [args.hyper_dim, args.embed_dim] * 2
        self.first = nn.Linear(env.state_dim, sum(self.first_dims))
        self.w_1 = nn.Linear(args.hyper_dim, env.n_agents * args.embed_dim)
        self.w_2 = nn.Linear(args.hyper_dim, args.embed_dim)
        self.b_2 = nn.Linear(args.embed_dim, 1)

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
    q_values, hidden = actor(obs.unsqueeze(1), last_actions.unsqueeze(1), hidden)  # (B, 1, N, A), (B, N, H)
    pi = epsilon_greedy(q_values.squeeze(1), avail_actions, epsilon)  # (B, N, A)
    actions = pi.argmax(-1) if generator is None else sample_actions(pi, generator)
    return actions, (actions, hidden)


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
    actor, mixer = Actor(env, args).to(env.device), Mixer(env, args).to(env.device)
    actor_target, mixer_target = copy.deepcopy(actor), copy.deepcopy(mixer)
    actor_target.gru.flatten_parameters()  # a copy's weights lie apart: cuDNN would join them at each call
    parameters = [*actor.parameters(), *mixer.parameters()]
    optimizer = torch.optim.RMSprop(parameters, lr=args.lr, alpha=0.99, eps=1e-5)
    needed = args.batch_size  # episodes
    buffer = EpisodeBuffer(args.buffer_size, env, "lower --buffer-size")
    parts = dict(actor=actor, mixer=mixer, actor_target=actor_target, mixer_target=mixer_target)
    parts |= dict(optimizer=optimizer)
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
            batch = buffer.sample([(args.batch_size, args.buffer_size)], generator)
            losses = update(args, actor, mixer, actor_target, mixer_target, optimizer, batch)
            if iteration % args.target_period == 0:
                actor_target.load_state_dict(actor.state_dict())
                mixer_target.load_state_dict(mixer.state_dict())
        train_seconds += time.perf_counter() - started

        # log, evaluate, save
        last = global_step >= args.total_timesteps or bool(stop)
        if machine.due(args.log_every, global_step, args.num_envs, last):
            log.training(global_step, train_seconds, losses, epsilon=epsilon)
        if machine.due(args.eval_every, global_step, args.num_envs, last):
            video = run / f"{global_step}.gif" if args.capture_video else None
            log.evaluation(global_step, train_seconds, evaluate(eval_env, partial(act, actor), video, stop))
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
