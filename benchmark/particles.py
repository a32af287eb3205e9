"""docs/results/particles.md: who learns aggregation, mill and spread, and how stable it is.

    python benchmark/particles.py

Reads the files <algorithm>_<task>.json, and the variants in TASKS, that run_seeds.py wrote (docs/benchmark.md
has the commands); sets that are missing are left out. On spread it adds teams that play by hand-written
rules, and returns of known implementations in the unit of this repository.
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021, section 5.2.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import RESULTS, last_fifth, markdown_table, median_worst, source, success_rate
from benchmark.plot import interval
from envs import make

ALGORITHMS = {"dop": "deterministic DOP", "maddpg": "MADDPG", "maac": "MAAC"}
# task -> more sets of runs -> their labels
TASKS = {
    "aggregation": {"dop_aggregation_replay_10k": "deterministic DOP, replay of 10,000"},
    "mill": {"dop_mill_replay_10k": "deterministic DOP, replay of 10,000"},
    "spread": {
        "dop_spread_discount": "deterministic DOP, slower actors",
        "dop_spread_actors": "deterministic DOP, discount 0.99",
        "dop_spread_neither": "deterministic DOP, slower actors and discount 0.99",
        "maddpg_spread_long": "MADDPG, longer",
        "maac_spread_published_rates": "MAAC, discount and rates of its code",
    },
}
SOLVED = 0.95  # greedy win rate
AGENTS, STEPS = 3, 25  # of spread
STIFFNESS, BRAKE = 8.0, 2.0  # of the assigned team's steering, the best of a coarse search


# ---- runs ----
def mean_interval(values, scale=1.0):
    """'-5.86 +- 0.14': mean over seeds with its 95% t interval; of one seed the value alone."""
    mean, half = (scale * x.item() for x in interval(np.array(values, dtype=float)[:, None]))
    return f"{mean:.2f} ± {half:.2f}" if len(values) > 1 else f"{mean:.2f}"


def facts(label, report):
    """The first three cells of a row: name, seeds, environment steps."""
    failed = f" ({len(report['failed'])} failed)" if report["failed"] else ""
    steps = statistics.median(run["summary"]["steps"] for run in report["runs"])
    return [label, f"{len(report['runs'])}{failed}", f"{steps:,.0f}"]


def winning_table(reports):
    """A row per set of runs on a task that can be won."""
    header = ["algorithm", "seeds", "steps", "final win rate", "last fifth", "ever solved"]
    header += ["solved at the end", "solved throughout the last fifth", "final return"]
    rows = []
    for label, report in reports.items():
        curves = [run["curves"]["eval/win_rate"] for run in report["runs"]]
        ends = [curve["value"][-1] for curve in curves]
        fifths = [last_fifth(curve["step"], curve["value"]) for curve in curves]
        counts = [
            [max(curve["value"]) >= SOLVED for curve in curves],
            [end >= SOLVED for end in ends],
            [min(fifth) >= SOLVED for fifth in fifths],
        ]
        rates = [median_worst(ends), median_worst([statistics.fmean(fifth) for fifth in fifths])]
        returns = mean_interval(final_returns(report))
        rows.append([*facts(label, report), *rates, *map(success_rate, counts), returns])
    return markdown_table(header, rows)


def final_returns(report):
    """Greedy return of each run's last evaluation."""
    return [run["curves"]["eval/episodic_return"]["value"][-1] for run in report["runs"]]


def spread_table(reports):
    """A row per set of runs and per reference team on spread."""
    rows = []
    for label, report in reports.items():
        ends = final_returns(report)
        curves = [run["curves"]["eval/episodic_return"] for run in report["runs"]]
        fifth = [statistics.fmean(last_fifth(curve["step"], curve["value"])) for curve in curves]
        cells = [mean_interval(ends), median_worst(ends), mean_interval(fifth)]
        rows.append([*facts(label, report), *cells, mean_interval(ends, AGENTS)])
    for name, value in reference_returns().items():
        rows.append([name, "-", "-", f"{value:.2f}", "-", "-", f"{AGENTS * value:.2f}"])
    header = ["team", "seeds", "steps", "final return", "median (worst)", "last fifth"]
    return markdown_table([*header, "final return, sum over agents"], rows)


# ---- what to compare spread with ----
class Assigned:
    """A team for one episode: the assignment of landmarks with the least sum of distances, then steering."""

    def __init__(self):
        self.goals = None  # (B, N, 2)

    def __call__(self, state):
        """state (B, S) of spread -> forces (B, N, 2)."""
        vel, pos, landmark = state.view(len(state), -1, 2).split(AGENTS, 1)  # (B, N, 2) each
        if self.goals is None:
            orders = torch.tensor(list(itertools.permutations(range(AGENTS))))  # (P, N)
            distance = torch.cdist(pos, landmark)  # (B, N, L)
            lengths = distance[:, torch.arange(AGENTS), orders].sum(2)  # (B, P)
            chosen = orders[lengths.argmin(1)]  # (B, N)
            self.goals = landmark.gather(1, chosen.unsqueeze(2).expand(-1, -1, 2))
        return (STIFFNESS * (self.goals - pos) - BRAKE * vel).clamp(-1, 1)


def reference_returns(games=4096):
    """Name -> mean return of teams that do not learn."""
    generator = torch.Generator().manual_seed(0)
    teams = {
        "random forces": lambda _: 2 * torch.rand(games, AGENTS, 2, generator=generator) - 1,
        "random choices, discrete": lambda _: torch.randint(5, (games, AGENTS), generator=generator),
        "each to a landmark of its own": Assigned(),
    }
    returns = {}
    for name, team in teams.items():
        env = make("spread", games, seed=0, discrete="discrete" in name, validate=False)
        env.reset()
        for _ in range(STEPS):
            *_, info = env.step(team(env.state()))
        returns[name] = info["episode_return"].mean().item()
    return returns


def from_shared_sum(value):
    """Our unit from returns of the original particle environments, summed over agents once.

    There a step pays each agent -distances - contacts, an agent being in contact with itself as well, and
    everybody the sum: N D - C - N T in an episode of T steps. Ours is the mean of (D - C_i) / 2.
    """
    return (value + AGENTS * STEPS) / (2 * AGENTS)


def from_early_pettingzoo(value):
    """Our unit from an agent's mean return in PettingZoo before its pull request 894 (March 2023).

    local_ratio is 0.5 as here, and an agent was in contact with itself at each of the T steps.
    """
    return value + STEPS / 2


GITHUB = "https://github.com"
# who, where, environment steps, as published, how it is counted, in our unit
PUBLISHED = [
    ("MADDPG of EPyMARL, discrete", "[Papoudakis et al. 2021](https://arxiv.org/abs/2006.07869), Table 3",
     "2M", "-141.70 ± 1.74", "a", from_shared_sum(-141.70)),
    ("QMIX of EPyMARL, the best there", "the same", "2M", "-126.62 ± 2.96", "a", from_shared_sum(-126.62)),
    ("random team in EPyMARL", f"[a user, issue 29]({GITHUB}/uoe-agents/epymarl/issues/29)",
     "-", "about -700", "b", from_shared_sum(-700 / AGENTS)),
    ("MADDPG of its authors, discrete", f"[a user]({GITHUB}/marwanihab/RL_Testing_Noise_ASRN)",
     "1.5M", "about -416", "b", from_shared_sum(-416 / AGENTS)),
    ("MADDPG of Mava, continuous", f"[a maintainer, issue 315]({GITHUB}/instadeepai/Mava/issues/315)",
     "3M", "about -25", "c", from_early_pettingzoo(-25)),
    ("MAD4PG of Mava, continuous", "the same", "-", "about -20", "c", from_early_pettingzoo(-20)),
]  # fmt: skip
COUNTED = f"""Counted: (a) the best evaluation of a run, mean over 5 seeds, in the original particle
environments, where every agent gets the sum of the rewards of all and an agent touches itself; divided
by the {AGENTS} agents, as [an author says]({GITHUB}/uoe-agents/epymarl/issues/29). (b) The same of one
run, not divided. (c) Mean over agents in PettingZoo of 2021, where an agent touched itself too
([corrected in 2023]({GITHUB}/Farama-Foundation/PettingZoo/pull/894)).

An agent that touches itself loses 1 a step (c: 0.5) whatever it does; the last column takes that out,
and turns sums over agents with weights of 1 into our mean with weights of 0.5. For {AGENTS} agents and
{STEPS} steps, which all have, it is (a + 75) / 6, (b / 3 + 75) / 6 and c + 12.5. The random team, which
learns nothing, checks (a) and (b) against the table above. What stays different: an action of the
original environments shows in the positions a step earlier than in mpe2; settings, budgets and seeds. For
(c) we take PettingZoo's default weights and length."""


def published_table():
    header = ["who", "where", "steps", "as published", "counted", "in our unit"]
    return markdown_table(header, [[*row[:-1], f"{row[-1]:.1f}"] for row in PUBLISHED])


# ---- page ----
LEGEND = """Win rates are greedy, over {games} evaluation games with fixed seeds: median over seeds
(worst seed), at the end and as mean over the evaluations after 80% of the steps. Solved: at least
{solved:g} in an evaluation; numbers of seeds with Wilson's 95% interval. Returns: greedy, mean over
seeds with Student's 95% interval."""
CLAIMS = {
    "aggregation": """[DOP] (Wang et al., ICLR 2021, section 5.2) has curves only (Fig. 4), of 12 seeds. It
says that MADDPG and MAAC find rewarding configurations but quickly diverge, and that deterministic DOP
converges with stability.""",
    "mill": """[DOP] has curves only (Fig. 4), of 12 seeds. It says that deterministic DOP
outperforms MADDPG and MAAC.""",
    "spread": """Not a task of [DOP]. Greedy return per episode in our unit: the reward of a step is
the *mean* over agents, local_ratio is 0.5. The last column is mpe2's sum over agents.""",
}


def section(task, reports):
    """Heading, claim, table, pictures of one task."""
    parts = [f"## {task}", CLAIMS[task]]
    if task == "spread":
        parts += [spread_table(reports).strip()]
        parts += ["Known implementations:", published_table().strip(), COUNTED]
    else:
        parts.append(winning_table(reports).strip())
    for name in (task, f"{task}_return"):
        if (RESULTS / f"{name}.png").exists():
            parts.append(f"![{name}]({name}.png)")
    return parts


def main(argv=None):
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    parts, games, sources = [], set(), []
    for task, variants in TASKS.items():
        names = {f"{algorithm}_{task}": label for algorithm, label in ALGORITHMS.items()} | variants
        paths = {label: RESULTS / f"{name}.json" for name, label in names.items()}
        reports = {label: json.loads(path.read_text()) for label, path in paths.items() if path.exists()}
        parts += section(task, reports) if reports else []
        games |= {report["settings"]["eval_episodes"] for report in reports.values()}
        sources += [source(report) for report in reports.values()]
    if not sources:
        sys.exit("particles.py: docs/results has no <algorithm>_<task>.json of the particle tasks yet")
    legend = LEGEND.format(games=" or ".join(map(str, sorted(games))), solved=SOLVED)
    head = ["# The particle tasks", f"Written by `python benchmark/particles.py`.\n{legend}"]
    parts = [*head, *parts, "Sources:", "\n".join(sources)]
    (RESULTS / "particles.md").write_text("\n\n".join(parts) + "\n")
    print(f"written: {RESULTS / 'particles.md'}")


if __name__ == "__main__":
    main()
