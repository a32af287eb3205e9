"""Seconds of a training iteration of dop_stochastic.py at MMM's shapes, beside a stand-in of the original.

    python benchmark/update_speed.py

The data are random: 16 on-policy and 32 off-policy episodes of 60 steps. The peer is our own code with the
structure of the official update, so that both run in the same minute on the same machine: a shared critic on
[state, obs, agent id] with two layers of 256, one optimiser step of critic and mixer for each time step over
all 48 episodes, an agent unrolled cell by cell. The ways take turns, and a number is the median of the turns.
Writes docs/results/update_speed.json and update_speed.md.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import nn

from benchmark.common import RESULTS, describe, markdown_table, metadata, write_json
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

N, A, OBS, S = 10, 16, 160, 290  # MMM: agents, actions, observation, state
ON, OFF, T = 16, 32, 60  # episodes and their length


def random_batch(generator):
    """Batch of ON + OFF episodes, each of T steps; about half the actions are legal."""
    B = ON + OFF
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
    )


# ---- ours ----
def ours(setting, batch, generator):
    """A function that does one iteration of dop_stochastic.py."""
    args = Args(**PRESETS.get(setting, {}))
    sizes = (S, N, A, 256, args.separate_critics)
    actor = Actor(OBS, N, A, 64)
    critic, critic_target = DecomposedCritic(*sizes), DecomposedCritic(*sizes)
    optimizers = [
        torch.optim.RMSprop(actor.parameters(), lr=args.actor_lr, alpha=0.99, eps=1e-5),
        torch.optim.RMSprop(critic.parameters(), lr=args.critic_lr, alpha=0.99, eps=1e-5),
    ]
    return lambda: update(args, actor, critic, critic_target, optimizers, batch, 0.3, generator, True)


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


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count()}))
    parser.add_argument("--repeats", type=int, default=15, help="turns of each way")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "update_speed", help="result files, without suffix"
    )
    args = parser.parse_args(argv)
    command = shlex.join(["python", "benchmark/update_speed.py", *(sys.argv[1:] if argv is None else argv)])
    about = metadata(command) | {"episodes": [ON, OFF], "steps": T, "results": []}
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    batch = random_batch(generator)
    ways = {"default": ours("default", batch, generator), "paper": ours("paper", batch, generator)}
    ways["official stand-in"] = official(batch)
    for threads in args.threads:
        torch.set_num_threads(threads)
        turns = {name: [] for name in ways}
        for _ in range(args.repeats + 2):
            for name, iteration in ways.items():
                start = time.perf_counter()
                iteration()
                turns[name].append(round(time.perf_counter() - start, 4))
        for name, values in turns.items():
            median = statistics.median(values[2:])  # without the two turns that warm up
            about["results"].append({"threads": threads, "way": name, "seconds": median, "turns": values[2:]})
            print(f"threads {threads}  {name:18}{median:.3f} s", flush=True)
    write_json(args.out.with_suffix(".json"), about)
    seconds = {(x["threads"], x["way"]): x["seconds"] for x in about["results"]}
    peer = "official stand-in"
    rows = [[threads, *(f"{seconds[threads, way]:.3f}" for way in ways),
             *(f"{seconds[threads, peer] / seconds[threads, way]:.1f}x" for way in list(ways)[:2])]
            for threads in args.threads]  # fmt: skip
    table = markdown_table(["threads", *ways, "default faster by", "paper faster by"], rows)
    args.out.with_suffix(".md").write_text(f"""# Training iteration

Seconds of one training iteration of `dop_stochastic.py` at MMM's shapes: {ON} on-policy and {OFF} off-policy
episodes of {T} steps, random data. The stand-in is our code with the structure of the official update.

{table}
{describe(about)}
""")
    print(f"\n{table}\nwritten: {args.out}.json and .md")


if __name__ == "__main__":
    main()
