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
4. observations and states that stay within about 1 are stored in half precision.

Without `--setting paper` also, to win in less time (docs/coma.md):
5. 16 games, not 8; 16 critic minibatches per iteration, not about 60; a target copied every 5
   iterations, not 3.
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
    hidden_dim: int = 64  # units of the policies' layers (authors' code)
    critic_hidden_dim: int = 128  # units of the critic's two hidden layers (authors' code)
    actor_lr: float = 5e-4  # learning rate of the actor (authors' code)
    critic_lr: float = 5e-4  # learning rate of the critic (authors' code)
    gamma: float = 0.99  # discount (authors' code)
    td_lambda: float = 0.8  # lambda of the critic's targets (authors' code)
    epsilon_start: float = 0.5  # share of uniform exploration at the start (authors' code)
    epsilon_end: float = 0.01  # the same after the decay (authors' code)
    epsilon_steps: int = 100_000  # environment steps of the linear decay (authors' code)
    batch_size: int = 8  # new episodes that start an iteration (8 parallel games in the authors' code)
    critic_updates: int = 16  # minibatches of an iteration's transitions (one per time step in [COMA])
    target_period: int = 5  # training iterations between two copies to the target critic

    def __post_init__(self):
        machine.check_numbers(vars(self))


# setting or environment id -> what differs from the defaults
PRESETS = {
    # the authors' code steps its critic once per time step, 60 times and more on most maps, and copies the
    # target after 200 of these
    "paper": dict(
        num_envs=8, critic_updates=60, target_period=3, epsilon_steps=100_000, total_timesteps=2_000_000
    ),
    "cdm": dict(
        num_envs=8, critic_updates=1, total_timesteps=10_000, epsilon_steps=5_000, eval_every=500,
        eval_episodes=1, log_every=100,
    ),
}  # fmt: skip
# what cannot change in a resumed run: it decides shapes and meaning of what was saved
FIXED = ("env", "seed", "setting", "num_envs", "batch_size", "hidden_dim", "critic_hidden_dim")


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


class CounterfactualCritic(nn.Module):
    """Q of each own action beside the others' actions, in one pass (authors' code); shared by agents."""

    def __init__(self, env, args):
        super().__init__()
        joint_dim = env.n_agents * env.n_actions
        self.in_dims = [env.state_dim, env.obs_dim, joint_dim, joint_dim, env.n_agents]
        self.fc1 = nn.Linear(sum(self.in_dims), args.critic_hidden_dim)
        self.fc2 = nn.Linear(args.critic_hidden_dim, args.critic_hidden_dim)
        self.head = nn.Linear(args.critic_hidden_dim, env.n_actions)
        self.register_buffer("others", 1 - torch.eye(env.n_agents), persistent=False)  # (N, N)

    def forward(self, state, obs, actions, last_actions):
        """state (..., S), obs (..., N, O), actions, last_actions (..., N), -1: none -> Q (..., N, A)."""
        w_state, w_obs, w_actions, w_last, w_agent = self.fc1.weight.split(self.in_dims, dim=1)
        # a product with exact zeros keeps an agent's own action out, to the last digit
        x = self.others @ self.columns(w_actions, actions)  # (..., N, H)
        x = x + F.linear(obs.to(w_obs.dtype), w_obs, self.fc1.bias) + w_agent.t()
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


def epsilon_policy(logits, avail_actions, epsilon):
    """pi = (1 - epsilon) softmax + epsilon uniform, both over legal actions, (..., A); 0 on illegal ones."""
    softmax = logits.masked_fill(~avail_actions, -1e9).softmax(-1)
    n_legal = avail_actions.sum(-1, keepdim=True).clamp_min(1).to(logits.dtype)  # (..., 1)
    return ((1 - epsilon) * softmax + epsilon / n_legal) * avail_actions


def sample_actions(pi, generator):
    """Actions (...) from pi (..., A) as argmax(pi / Exp(1)), which never picks a zero probability."""
    noise = torch.empty_like(pi).exponential_(generator=generator).clamp_min(torch.finfo(pi.dtype).tiny)
    return (pi / noise).argmax(-1)


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
    actor, critic = Actor(env, args).to(env.device), CounterfactualCritic(env, args).to(env.device)
    critic_target = copy.deepcopy(critic)
    actor_optimizer = torch.optim.RMSprop(actor.parameters(), lr=args.actor_lr, alpha=0.99, eps=1e-5)
    critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=args.critic_lr, alpha=0.99, eps=1e-5)
    optimizers = (actor_optimizer, critic_optimizer)
    needed = args.batch_size  # episodes
    # what an iteration takes at most: all games may end in the step that starts it
    buffer = EpisodeBuffer(args.batch_size + args.num_envs, env, "lower --batch-size or --num-envs")
    parts = dict(actor=actor, critic=critic, critic_target=critic_target)
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
        if new_episodes >= args.batch_size:
            iteration += 1
            batch, new_episodes = buffer.sample([(new_episodes, new_episodes)], generator), 0
            losses = update(args, actor, critic, critic_target, optimizers, batch, epsilon, generator)
            if iteration % args.target_period == 0:
                critic_target.load_state_dict(critic.state_dict())
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
