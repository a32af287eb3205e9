"""Seconds of a training iteration of each learner, beside stand-ins of the reference implementations.

    python benchmark/update_speed.py

The data are random. Learners from whole episodes get episodes of 60 steps with MMM's shapes, 16 on-policy
and 32 off-policy ones for dop_stochastic.py, their default batch for the others. Learners from single steps
get 10 agents of spread and batches of 1024. The peers are our own code with the structure of the reference
implementations, so that both run in the same minute on the same machine: standins.py has those of maddpg.py
and maac.py. That of dop_stochastic.py has a shared critic on [state, obs, agent id] with two layers of 256,
one optimiser step of critic and mixer for each time step over all 48 episodes, and an agent unrolled cell by
cell. The ways of a table take turns, and a number is the median of the turns. "Products alone" is what the
matrix products of the first way of a table would take if each ran as fast as the machine's best batched
product of MAAC's sizes in the same run (floating point operations counted by PyTorch, which counts no GRU):
nothing that computes the same in the same precision is faster. Writes docs/results/engine/update_speed.json;
report.py writes the page.
"""

import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import coma
import dop_deterministic
import maac
import maddpg
import qmix
from benchmark import standins
from benchmark.common import RESULTS, describe, markdown_table, metadata, new_parser, write_json
from dop_stochastic import (
    PRESETS,
    Actor,
    Args,
    Batch,
    DecomposedCritic,
    epsilon_policy,
    td_lambda_targets,
    tree_backup_targets,
    update,
)
from envs import make

N, A, OBS, S = 10, 16, 160, 290  # MMM: agents, actions, observation, state
MMM = SimpleNamespace(n_agents=N, n_actions=A, obs_dim=OBS, state_dim=S, action_bias=None)
ON, OFF, T = 16, 32, 60  # episodes and their length
AGENTS, TRANSITIONS = 10, 1024  # of the learners from single steps
KINDS = {False: "2-d continuous actions", True: "5 discrete actions"}


def random_batch(generator, B):
    """Batch of B episodes, each of T steps; about half the actions are legal."""
    shape = dict(generator=generator)
    avail_actions = torch.rand(B, T + 1, N, A, **shape) < 0.5
    avail_actions[..., 1] = True
    return Batch(
        obs=torch.rand(B, T + 1, N, OBS, **shape) * 2 - 1,
        state=torch.rand(B, T + 1, S, **shape) * 2 - 1,
        avail_actions=avail_actions,
        actions=(torch.rand(B, T, N, A, **shape) + avail_actions[:, :-1]).argmax(-1),
        reward=torch.rand(B, T, **shape),
        terminated=(torch.arange(T) == T - 1).expand(B, T),
        mask=torch.ones(B, T, dtype=torch.bool),
        length=[T] * B,
    )


# ---- ours ----
def ours(setting, batch, generator):
    """A function that does one iteration of dop_stochastic.py."""
    args = Args(**PRESETS.get(setting, {}))
    actor = Actor(MMM, args)
    critic, critic_target = (DecomposedCritic(MMM, args) for _ in range(2))
    optimizers = [
        torch.optim.RMSprop(actor.parameters(), lr=args.actor_lr, alpha=0.99, eps=1e-5),
        torch.optim.RMSprop(critic.parameters(), lr=args.critic_lr, alpha=0.99, eps=1e-5),
    ]
    return lambda: update(args, actor, critic, critic_target, optimizers, batch, 0.3, generator, True)


def ours_coma(generator):
    """The same of coma.py, with its default batch."""
    args = coma.Args()
    batch = random_batch(generator, args.batch_size)
    actor = coma.Actor(MMM, args)
    critic, critic_target = (coma.CounterfactualCritic(MMM, args) for _ in range(2))
    optimizers = [torch.optim.RMSprop(x.parameters(), lr=5e-4, alpha=0.99, eps=1e-5) for x in (actor, critic)]
    return lambda: coma.update(args, actor, critic, critic_target, optimizers, batch, 0.3, generator)


def ours_qmix(generator):
    """The same of qmix.py, with its default batch."""
    args = qmix.Args()
    batch = random_batch(generator, args.batch_size)
    actor, actor_target = (qmix.Actor(MMM, args) for _ in range(2))
    mixer, mixer_target = (qmix.Mixer(MMM, args) for _ in range(2))
    parameters = [*actor.parameters(), *mixer.parameters()]
    optimizer = torch.optim.RMSprop(parameters, lr=args.lr, alpha=0.99, eps=1e-5)
    return lambda: qmix.update(args, actor, mixer, actor_target, mixer_target, optimizer, batch)


def random_transitions(generator, discrete):
    """Batch of TRANSITIONS of AGENTS agents with the shapes of spread, and its environment."""
    env, shape = make(f"spread,n_agents={AGENTS},discrete={discrete}"), dict(generator=generator)
    B, legal = TRANSITIONS, torch.ones(TRANSITIONS, AGENTS, 5, dtype=torch.bool) if discrete else None
    actions = torch.rand(B, AGENTS, 2, **shape) * 2 - 1
    if discrete:
        actions = torch.randint(5, (B, AGENTS), **shape)
    obs, next_obs = torch.randn(2, B, AGENTS, env.obs_dim, **shape)
    state, next_state = torch.randn(2, B, env.state_dim, **shape)
    reward, terminated = torch.randn(B, **shape), torch.zeros(B, dtype=torch.bool)
    now, then = (obs, state, legal), (next_obs, next_state, legal)
    return maddpg.Batch(*now, actions, reward, terminated, *then), env


def ours_step(program, args, critic, generator, discrete):
    """A function that does one update, actors and targets included, of a learner from single steps."""
    batch, env = random_transitions(generator, discrete)
    actor, actor_target = (program.Actor(env, args) for _ in range(2))
    critic, critic_target = (critic(env, args) for _ in range(2))
    optimizer = partial(torch.optim.Adam, fused=True)
    if program is dop_deterministic:
        optimizer = partial(torch.optim.RMSprop, alpha=0.99, eps=1e-5)
    rates = ((actor, args.actor_lr), (critic, args.critic_lr))
    optimizers = [optimizer(network.parameters(), lr=lr) for network, lr in rates]
    networks = (actor, critic, actor_target, critic_target)
    return lambda: program.update(args, *networks, optimizers, batch, generator)


def ours_maddpg(generator, discrete, critic_per_agent):
    """The same of maddpg.py with its defaults."""
    args = maddpg.Args(critic_per_agent=critic_per_agent)
    return ours_step(maddpg, args, maddpg.Critic, generator, discrete)


def ours_maac(generator):
    """The same of maac.py with its defaults, for discrete actions."""
    return ours_step(maac, maac.Args(), maac.AttentionCritic, generator, True)


def ours_dop_deterministic(generator, discrete):
    """The same of the paper's dop_deterministic.py."""
    args = dop_deterministic.Args(**dop_deterministic.PRESETS["paper"])
    return ours_step(dop_deterministic, args, dop_deterministic.DecomposedCritic, generator, discrete)


# ---- a stand-in of the official update ----
class SharedCritic(nn.Module):
    """Q of all own actions from [state, obs, agent id], as a value plus an advantage per action."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(S + OBS + N, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.value, self.advantage = nn.Linear(256, 1), nn.Linear(256, A)

    def forward(self, inputs):
        x = self.body(inputs)
        return self.value(x) + self.advantage(x)


class Mixer(nn.Module):
    """Weights k (..., N) from the state, as a product of two one-layer hypernetworks (embed 32)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(S, N * 32), nn.Linear(S, 32)

    def forward(self, state):
        first = self.first(state).abs().unflatten(-1, (N, 32))  # (..., N, 32)
        k = (first * self.second(state).abs().unsqueeze(-2)).sum(-1)  # (..., N)
        return k / k.sum(-1, keepdim=True)


class CellAgent(nn.Module):
    """Logits from [obs, last action, agent id], one GRU cell call for each time step."""

    def __init__(self):
        super().__init__()
        self.fc, self.cell, self.head = nn.Linear(OBS + A + N, 64), nn.GRUCell(64, 64), nn.Linear(64, A)

    def forward(self, inputs):
        B, steps = inputs.shape[:2]
        hidden, logits = inputs.new_zeros(B * N, 64), []
        for t in range(steps):
            hidden = self.cell(F.relu(self.fc(inputs[:, t].reshape(B * N, -1))), hidden)
            logits.append(self.head(hidden).view(B, N, A))
        return torch.stack(logits, 1)  # (B, T + 1, N, A)


def official(batch):
    """A function that does one iteration with the structure of the official code."""
    args = Args()
    critic, critic_target, mixer, mixer_target, agent = (
        SharedCritic(), SharedCritic(), Mixer(), Mixer(), CellAgent()
    )  # fmt: skip
    critic_params, mixer_params = list(critic.parameters()), list(mixer.parameters())
    optimizers = [
        torch.optim.RMSprop(params, lr=lr, alpha=0.99, eps=1e-5)
        for params, lr in ((critic_params, 1e-4), (mixer_params, 1e-4), (agent.parameters(), 5e-4))
    ]

    def iteration():
        ids = torch.eye(N).expand(ON + OFF, T + 1, N, N)
        state = batch.state.unsqueeze(2).expand(-1, -1, N, -1)
        inputs = torch.cat([state, batch.obs, ids], -1)  # (B, T + 1, N, S + OBS + N)
        last_actions = F.pad(F.one_hot(batch.actions, A).float(), (0, 0, 0, 0, 1, 0))
        agent_inputs = torch.cat([batch.obs, last_actions, ids], -1)
        actions = batch.actions.unsqueeze(-1)  # (B, T, N, 1)

        # targets
        with torch.no_grad():
            pi = epsilon_policy(agent(agent_inputs), batch.avail_actions, 0.3)  # (B, T + 1, N, A)
            q_values, k = critic_target(inputs), mixer_target(batch.state)
            q_tot = (q_values[:, :-1].gather(-1, actions).squeeze(-1) * k[:, :-1]).sum(-1)  # (B, T)
            v = ((q_values * pi).sum(-1) * k).sum(-1)  # (B, T + 1)
            pi_joint = pi[:, :-1].gather(-1, actions).squeeze(-1).prod(-1)
            step = (batch.reward, batch.terminated, batch.mask, q_tot)
            next_q = F.pad(q_tot[:, 1:], (0, 1))
            on = td_lambda_targets(*(x[:ON] for x in (*step, next_q)), args.gamma, args.td_lambda)
            off_step = (x[ON:] for x in (*step, v[:, 1:], pi_joint))
            off = tree_backup_targets(*off_step, args.gamma, args.tb_lambda, args.n_steps)
            td_target = torch.cat([on, off])  # (B, T)

        # critic and mixer, a step for each time step
        for t in range(T):
            q_taken = critic(inputs[:, t]).gather(-1, actions[:, t]).squeeze(-1)  # (B, N)
            loss = ((q_taken * mixer(batch.state[:, t])).sum(-1) - td_target[:, t]).square().mean()
            for optimizer in optimizers[:2]:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(critic_params + mixer_params, 20)
            for optimizer in optimizers[:2]:
                optimizer.step()

        # actor, on the on-policy episodes
        with torch.no_grad():
            q_values, k = critic(inputs[:ON, :-1]), mixer(batch.state[:ON, :-1])
        pi = epsilon_policy(agent(agent_inputs[:ON]), batch.avail_actions[:ON], 0.3)[:, :-1]  # (ON, T, N, A)
        q_taken = q_values.gather(-1, actions[:ON]).squeeze(-1)
        advantage = k * (q_taken - (pi.detach() * q_values).sum(-1))  # (ON, T, N)
        actor_loss = -(advantage * pi.gather(-1, actions[:ON]).squeeze(-1).log()).mean()
        optimizers[2].zero_grad()
        actor_loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 20)
        optimizers[2].step()

    return iteration


# ---- tables ----
def episode_tasks(generator):
    """Title -> the ways of one table; the last is the peer of the others if it is a stand-in."""
    batch = random_batch(generator, ON + OFF)
    dop = {setting: ours(setting, batch, generator) for setting in ("default", "paper")}
    return {
        f"dop_stochastic.py at MMM's shapes, {ON} on-policy and {OFF} off-policy episodes of {T} steps": dop
        | {"official stand-in": official(batch)},
        f"coma.py and qmix.py at MMM's shapes, {coma.Args.batch_size} and {qmix.Args.batch_size} episodes": {
            "coma.py": ours_coma(generator),
            "qmix.py": ours_qmix(generator),
        },
    }


def step_tasks(generator):
    """The same of the learners from single steps."""
    found = {}
    for discrete, kind in KINDS.items():
        found[f"maddpg.py, {AGENTS} agents, {kind}"] = {
            "default": ours_maddpg(generator, discrete, False),
            "critic per agent": ours_maddpg(generator, discrete, True),
            "stand-in": standins.maddpg(random_transitions(generator, discrete)[0])[0],
        }
    found[f"maac.py, {AGENTS} agents, 5 discrete actions"] = {
        "maac.py": ours_maac(generator),
        "stand-in": standins.maac(random_transitions(generator, True)[0])[0],
    }
    found[f"dop_deterministic.py --setting paper, {AGENTS} agents"] = {
        kind: ours_dop_deterministic(generator, discrete) for discrete, kind in KINDS.items()
    }
    return found


def measure(ways, repeats):
    """Way -> seconds of its turns."""
    turns = {name: [] for name in ways}
    for _ in range(repeats + 2):
        for name, iteration in ways.items():
            start = time.perf_counter()
            iteration()
            turns[name].append(round(time.perf_counter() - start, 5))
    return {name: values[2:] for name, values in turns.items()}  # without the two turns that warm up


def product_rate():
    """Floating point operations per second of this machine's best product of batched matrices."""
    x, y = torch.randn(AGENTS, TRANSITIONS, 128), torch.randn(AGENTS, 128, 128)
    turns = []
    for _ in range(50):
        start = time.perf_counter()
        torch.bmm(x, y)
        turns.append(time.perf_counter() - start)
    return 2 * x.numel() * 128 / min(turns)


def operations(iteration):
    """Floating point operations of the products in one iteration."""
    with FlopCounterMode(display=False) as counter:
        iteration()
    return counter.get_total_flops()


def table_of(results):
    """A line per number of threads, for the results of one task."""
    seconds = {(x["threads"], x["way"]): x["seconds"] for x in results}
    ways = list(dict.fromkeys(x["way"] for x in results))
    *mine, peer = ways if ways[-1].endswith("stand-in") else (None,)
    rows = [
        [threads, *(f"{seconds[threads, way]:.4f}" for way in ways)]
        + [f"{seconds[threads, peer] / seconds[threads, way]:.1f}x" for way in mine]
        for threads in dict.fromkeys(x["threads"] for x in results)
    ]
    header = ["threads", *ways, *(f"{way} faster by" for way in mine)]
    if floors := [x["products_alone"] for x in results if "products_alone" in x]:
        header.append(f"products of {ways[0]} alone")
        rows = [[*row, f"{floor:.4f}"] for row, floor in zip(rows, floors, strict=True)]
    return markdown_table(header, rows)


def section(report):
    """What a file of this script says, in Markdown."""
    text = f"Seconds of one training iteration on random data; batches of single steps hold {TRANSITIONS}.\n"
    text += "A stand-in is our code with the structure of the reference implementation.\n"
    for title in dict.fromkeys(x["task"] for x in report["results"]):
        text += f"\n{title}:\n\n{table_of([x for x in report['results'] if x['task'] == title])}"
    return f"{text}\n{describe(report)}"


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count()}))
    parser.add_argument("--repeats", type=int, default=15, help="turns of each way")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "engine" / "update_speed", help="result file, without suffix"
    )
    args = parser.parse_args(argv)
    if args.repeats < 1 or min(args.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    about = metadata(__file__, argv) | {"steps": T, "results": []}
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    steps = step_tasks(generator)
    for title, ways in (episode_tasks(generator) | steps).items():
        results = []
        for threads in args.threads:
            torch.set_num_threads(threads)
            for name, turns in measure(ways, args.repeats).items():
                result = {"task": title, "threads": threads, "way": name}
                if title in steps and name == next(iter(ways)):
                    result["products_alone"] = operations(ways[name]) / product_rate()
                results.append(result | {"seconds": statistics.median(turns), "turns": turns})
                print(f"threads {threads}  {title}, {name}: {results[-1]['seconds']:.4f} s", flush=True)
        about["results"] += results
    write_json(Path(f"{args.out}.json"), about)
    print(f"{section(about)}\nwritten: {args.out}.json")


if __name__ == "__main__":
    main()
