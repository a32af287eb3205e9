"""Does the actor still follow its critic? Greedy play of a run, softmax policies beside the critic's values.

    python benchmark/saturation.py RUN [RUN ...]

For each run folder of dop_stochastic.py: the mean probability of the greedy action without exploration, and
how often it is also the critic's best, over agents that have a choice in the first 20 steps of 256 games. A
softmax near 1 has nearly no gradient: where the two disagree then, the critic cannot pull the actor away.
Prints a Markdown table; --out docs/results/settings/saturation writes a file for the page there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import machine
from benchmark.common import describe, markdown_table, metadata, new_parser, write_json
from dop_stochastic import Actor, Args, DecomposedCritic, epsilon_policy
from envs import make


@torch.no_grad()
def measure(run, games=256, steps=20):
    """Run folder -> (mean greedy probability, share of greedy actions that maximise Q_i)."""
    args = Args(**machine.settings_of(run, "dop_stochastic", Args.__annotations__))
    state = machine.read(run, "cpu")
    env = make(args.env, games, seed=0, validate=False)
    actor, critic = Actor(env, args), DecomposedCritic(env, args)
    actor.load_state_dict(state["actor"])
    critic.load_state_dict(state["critic"])
    obs, _ = env.reset()
    actions, hidden = torch.full((games, env.n_agents), -1), None  # (B, N)
    probabilities, agreements = [], []
    for _ in range(steps):
        avail_actions = env.avail_actions()  # (B, N, A)
        choosing = avail_actions.sum(-1) > 1  # (B, N), the dead have one legal action
        logits, hidden = actor(obs.unsqueeze(1), actions.unsqueeze(1), hidden)
        probability, actions = epsilon_policy(logits.squeeze(1), avail_actions, 0.0).max(-1)  # (B, N)
        best = critic(env.state())[0].masked_fill(~avail_actions, -torch.inf).argmax(-1)  # (B, N)
        probabilities.append(probability[choosing])
        agreements.append((best == actions)[choosing].float())
        obs, _, terminated, truncated, _ = env.step(actions)
        done = terminated | truncated  # (B,)
        actions, hidden = actions.masked_fill(done[:, None], -1), hidden * ~done[:, None, None]
    return torch.cat(probabilities).mean().item(), torch.cat(agreements).mean().item()


def section(report):
    """The table of a report, in Markdown."""
    rows = [[x["run"], f"{x['probability']:.3f}", f"{x['agreement']:.2f}"] for x in report["results"]]
    table = markdown_table(["run", "greedy action's probability", "it is the critic's best"], rows)
    return f"{table}\n{describe(report)}\n"


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, help="result file, without suffix")
    args, results = parser.parse_args(argv), []
    for run in args.runs:
        probability, agreement = measure(run)
        results.append(dict(run=Path(run).name, probability=probability, agreement=agreement))
    report = metadata(__file__, argv, threads=torch.get_num_threads()) | {"results": results}
    print(section(report))
    if args.out:
        write_json(Path(f"{args.out}.json"), report)


if __name__ == "__main__":
    main()
