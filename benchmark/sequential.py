"""docs/results/masql_sequential/README.md: MASQL beside MADDPG on particle tasks, with more and more agents.

    python benchmark/sequential.py

Reads the files <algorithm>_<task>_<agents>.json there that run_seeds.py wrote for masql.py and maddpg.py.
[MASQL] Wei et al., "Multiagent Soft Q-Learning", AAAI Spring Symposium 2018.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import common
from benchmark.common import load_sets, markdown_table, no_arguments, sources, write_page
from benchmark.particles import last_fifths
from benchmark.plot import draw_panels
from benchmark.stats import NOTE, between, improvement, iqm_of
from envs import make

ALGORITHMS = {"masql": "MASQL", "maddpg": "MADDPG"}
CLAIM = """The paper leaves open how its sampler of joint actions does in sequential games, and expects that
the dimension of the joint action, which grows with the agents, will be its limit."""
LEGEND = f"""Returns and win rates are greedy (zero noise), means over the evaluations after 80% of the steps,
as IQM over seeds. Random: uniform forces, mean of 1024 games. P: the probability that a run of MASQL has a
higher return than one of MADDPG. Both have the settings of their `PRESETS` for the task, whatever the number
of agents; MASQL's are no more than a guess, as no paper has any, and it makes a third of MADDPG's updates or
less, each of which costs ten of them.

{NOTE}"""


def random_return(env, games=1024):
    """Mean return of uniform forces."""
    env, generator = make(env, games, seed=0, actions="continuous", validate=False), torch.Generator()
    generator.manual_seed(0)
    env.reset()
    returns, first = torch.zeros(games), torch.ones(games, dtype=torch.bool)  # of each game's first episode
    while first.any():
        forces = 2 * torch.rand(games, *env.single_action_space.shape, generator=generator) - 1
        _, _, terminated, truncated, info = env.step(forces)
        ended = (terminated | truncated) & first
        returns[ended] = info["episode_return"][ended].float()
        first &= ~ended
    return returns.mean().item()


def main(argv=None):
    no_arguments(__doc__, argv)
    reports, tasks = load_sets("masql_sequential"), {}
    for name, report in reports.items():
        algorithm, task, agents = name.split("_")
        tasks.setdefault((task, int(agents)), {})[algorithm] = report
    if not tasks:
        sys.exit("sequential.py: docs/results/masql_sequential has no <algorithm>_<task>_<agents>.json yet")
    panels, rows, ahead = {}, [], {}
    for (task, agents), sets in sorted(tasks.items()):
        panels[f"{task}, {agents} agents"] = {ALGORITHMS[x]: sets[x] for x in ALGORITHMS if x in sets}
        env = next(iter(sets.values()))["env"]
        row, returns = [task, agents], {}
        for algorithm in ALGORITHMS:
            if algorithm not in sets:
                row += ["-"] * 4
                continue
            returns[algorithm] = last_fifths(sets[algorithm], "eval/episodic_return")
            rates = "-" if task == "spread" else iqm_of(last_fifths(sets[algorithm], "eval/win_rate"))
            facts = sets[algorithm]["runs"]
            row += [len(facts), f"{facts[0]['summary']['steps']:,}", iqm_of(returns[algorithm]), rates]
        row.insert(2, f"{random_return(env):.1f}")
        if len(returns) == 2:
            both = [np.array(returns[x])[:, None] for x in ALGORITHMS]
            row.append(between(improvement, *both))
            ahead.setdefault(improvement(*both)[0] > 0.5, []).append(f"{task} with {agents}")
        else:
            row.append("-")
        rows.append(row)
    draw_panels(panels, common.RESULTS / "masql_sequential" / "return.png", "eval/episodic_return")
    columns = [f"{label}: {x}" for label in ALGORITHMS.values() for x in ("seeds", "steps", "return", "wins")]
    answer = f"""MASQL is more often ahead of MADDPG on {", ".join(ahead.get(True, ["no task"]))}; it is not on
{", ".join(ahead.get(False, ["no task"]))} (agents)."""
    table = markdown_table(["task", "agents", "random", *columns, "P"], rows)
    title = "MASQL in sequential games"
    command = "Written by `python benchmark/sequential.py`."
    parts = ["![greedy return](return.png)", table, LEGEND, command, sources("masql_sequential", reports)]
    write_page("masql_sequential", title, CLAIM, answer, *parts)


if __name__ == "__main__":
    main()
