"""docs/results/masql_sequential/README.md: MASQL beside MADDPG on particle tasks, with more and more agents.

    python benchmark/sequential.py

Reads the files <algorithm>_<task>_<agents>.json there that run_seeds.py wrote for masql.py and maddpg.py.
[MASQL] Wei et al., "Multiagent Soft Q-Learning", AAAI Spring Symposium 2018.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import common
from benchmark.common import load_sets, markdown_table, no_arguments, sources, write_page
from benchmark.particles import SOLVED, last_fifths, outcomes
from benchmark.plot import draw_panels
from benchmark.stats import NOTE, iqm_of, success_rate
from envs import evaluate, make

MORE = "MASQL, MADDPG's number of updates"
ALGORITHMS = {"masql": "MASQL", "masql-updates": MORE, "maddpg": "MADDPG"}
CLAIM = """The paper leaves open how its sampler of joint actions does in sequential games, and expects that
the dimension of the joint action, which grows with the agents, will be its limit."""
LEGEND = f"""Returns are greedy (zero noise), means over the evaluations after 80% of the steps, as IQM over
seeds; a seed wins at the end if its last evaluation wins {SOLVED:g} of the games. Random: uniform forces.
Seconds: of a run on one core of a busy machine, median.
Both algorithms have the settings of their `PRESETS` for the task, whatever the number of agents. MASQL's are
no more than a guess, as no paper has any: a third of MADDPG's updates (a sixth on aggregation), which are
dearer; a row says where they are as many. The stone of the mill weighs a tenth per agent, so that all teams
together are equally strong.

{NOTE}"""


def random_return(env):
    """Mean return of uniform forces in 1024 games."""
    env, generator = make(env, 1024, actions="continuous", validate=False), torch.Generator().manual_seed(0)

    def forces(*_):
        shape = (env.num_envs, *env.single_action_space.shape)  # (B, N, D)
        return 2 * torch.rand(shape, generator=generator) - 1, None

    return evaluate(env, forces)["episodic_return"]


def main(argv=None):
    no_arguments(__doc__, argv)
    reports, tasks = load_sets("masql_sequential"), {}
    for name, report in reports.items():
        algorithm, _, rest = name.partition("_")
        task, _, agents = rest.rpartition("_")
        if algorithm not in ALGORITHMS or not agents.isdecimal():
            sys.exit(f"sequential.py: masql_sequential/{name} is no <algorithm>_<task>_<agents>")
        tasks.setdefault((task, int(agents)), {})[algorithm] = report
    if not tasks:
        sys.exit("sequential.py: docs/results/masql_sequential has no <algorithm>_<task>_<agents>.json yet")
    panels, rows, told = {}, [], []
    for (task, agents), sets in sorted(tasks.items()):
        sets = {label: sets[name] for name, label in ALGORITHMS.items() if name in sets}
        panels[f"{task}, {agents} agents"], ends = sets, {}
        for label, report in sets.items():
            curves, won = report["runs"][0]["curves"], "-"
            mean = ends[label] = iqm_of(last_fifths(report, "eval/episodic_return"))
            if "eval/win_rate" in curves:
                won = success_rate(outcomes(report)[1])
                ends[label] = won.split(" (")[0]
            steps = f"{report['summary']['steps']['min']:,}"
            seconds = statistics.median(run["wall_seconds"] for run in report["runs"])
            rows.append([task, agents, label, len(report["runs"]), steps, mean, won, f"{seconds:.0f}"])
        random = random_return(next(iter(sets.values()))["env"])
        rows.append([task, agents, "random forces", "-", "-", f"{random:.2f}", "-", "-"])
        if {"MASQL", "MADDPG"} <= ends.keys():
            more = f", with MADDPG's number of updates {ends[MORE]}" if MORE in ends else ""
            told.append(f"{agents} agents on {task}: {ends['MASQL']} ({ends['MADDPG']}){more}")
    draw_panels(panels, common.RESULTS / "masql_sequential" / "return.png", "eval/episodic_return")
    answer = f"""Seeds of MASQL that win at the end (on spread, where nobody wins, the return), and of MADDPG
    in brackets: {"; ".join(told) or "not run"}."""
    table = markdown_table(
        ["task", "agents", "", "seeds", "steps", "return", "win at the end", "seconds"], rows
    )
    command = "Written by `python benchmark/sequential.py`."
    parts = ["![greedy return](return.png)", table, LEGEND, command, sources("masql_sequential", reports)]
    write_page("masql_sequential", "MASQL in sequential games", CLAIM, answer, *parts)


if __name__ == "__main__":
    main()
