"""docs/results/masql_sequential/README.md: MASQL beside MADDPG on particle tasks, with more and more agents.

    python benchmark/sequential.py

Reads the files <algorithm>_<task>_<agents>.json there that run_seeds.py wrote for masql.py and maddpg.py.
[MASQL] Wei et al., "Multiagent Soft Q-Learning", AAAI Spring Symposium 2018.
"""

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

ALGORITHMS = {"masql": "MASQL", "maddpg": "MADDPG"}
CLAIM = """The paper leaves open how its sampler of joint actions does in sequential games, and expects that
the dimension of the joint action, which grows with the agents, will be its limit."""
LEGEND = f"""Returns are greedy (zero noise), means over the evaluations after 80% of the steps, as IQM over
seeds; a seed wins at the end if its last evaluation wins {SOLVED:g} of the games. Random: uniform forces.
Both algorithms have the settings of their `PRESETS` for the task, whatever the number of agents. MASQL's are
no more than a guess, as no paper has any: a third of MADDPG's updates, which are dearer. The stone of the
mill weighs a tenth per agent, so that all teams together are equally strong.

{NOTE}"""


def random_return(env):
    """Mean return of uniform forces in 1024 games."""
    env, generator = make(env, 1024, actions="continuous", validate=False), torch.Generator().manual_seed(0)

    def forces(*_):
        shape = (env.num_envs, *env.single_action_space.shape)  # (B, N, D)
        return 2 * torch.rand(shape, generator=generator) - 1, None

    return evaluate(env, forces)["episodic_return"]


def cells(report):
    """Seeds, return, and how many seeds win at the end, of a set of runs that may be missing."""
    if report is None:
        return ["-"] * 3
    won = success_rate(outcomes(report)[1]) if "eval/win_rate" in report["runs"][0]["curves"] else "-"
    return [len(report["runs"]), iqm_of(last_fifths(report, "eval/episodic_return")), won]


def main(argv=None):
    no_arguments(__doc__, argv)
    reports, tasks = load_sets("masql_sequential"), {}
    for name, report in reports.items():
        algorithm, task, agents = name.split("_")
        tasks.setdefault((task, int(agents)), {})[algorithm] = report
    if not tasks:
        sys.exit("sequential.py: docs/results/masql_sequential has no <algorithm>_<task>_<agents>.json yet")
    panels, rows, told = {}, [], []
    for (task, agents), sets in sorted(tasks.items()):
        panels[f"{task}, {agents} agents"] = {ALGORITHMS[x]: sets[x] for x in ALGORITHMS if x in sets}
        masql, maddpg = (cells(sets.get(x)) for x in ALGORITHMS)
        known = next(iter(sets.values()))
        steps = f"{min(x['summary']['steps']['min'] for x in sets.values()):,}"
        rows.append([task, agents, steps, f"{random_return(known['env']):.1f}", *masql, *maddpg])
        if "-" not in (masql[2], maddpg[2]):
            ours, theirs = (x.split(" (")[0] for x in (masql[2], maddpg[2]))
            told.append(f"{agents} agents on {task}: {ours} ({theirs})")
    draw_panels(panels, common.RESULTS / "masql_sequential" / "return.png", "eval/episodic_return")
    answer = f"Seeds of MASQL that win at the end, and of MADDPG in brackets: {'; '.join(told) or 'not run'}."
    columns = [f"{name}: {x}" for name in ALGORITHMS.values() for x in ("seeds", "return", "win at the end")]
    table = markdown_table(["task", "agents", "steps", "random", *columns], rows)
    command = "Written by `python benchmark/sequential.py`."
    parts = ["![greedy return](return.png)", table, LEGEND, command, sources("masql_sequential", reports)]
    write_page("masql_sequential", "MASQL in sequential games", CLAIM, answer, *parts)


if __name__ == "__main__":
    main()
