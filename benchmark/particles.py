"""docs/results/fig4 and spread: who learns aggregation, mill and spread, and how stable it is.

    python benchmark/particles.py

Reads the files <algorithm>_<task>.json in fig4 and <algorithm>.json in spread that run_seeds.py wrote, and
the variants in TASKS; sets that are missing are left out. On spread it adds teams that play by hand-written
rules, and returns of known implementations in the unit of this repository.
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021, section 5.2.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import common, credit
from benchmark.common import last_fifth, load_sets, markdown_table, no_arguments, sources, write_page
from benchmark.plot import draw_panels
from benchmark.stats import NOTE, iqm_of, success_rate
from envs import make

ALGORITHMS = {"dop": "deterministic DOP", "maddpg": "MADDPG", "maac": "MAAC"}
# ends of names of further sets of fig4
VARIANTS = {
    ("dop", "replay_10k"): "deterministic DOP, replay of 10,000",
    ("maac", "no_delay"): "MAAC, no delay",
}
# task -> sets of runs -> their labels
TASKS = {
    task: {f"{name}_{task}": label for name, label in ALGORITHMS.items()}
    | {f"{name}_{task}_{variant}": label for (name, variant), label in VARIANTS.items()}
    for task in ("aggregation", "mill")
}
TASKS["spread"] = ALGORITHMS | {
    "dop_discount": "deterministic DOP, slower actors",
    "dop_actors": "deterministic DOP, discount 0.99",
    "dop_neither": "deterministic DOP, slower actors and discount 0.99",
    "maac_published_rates": "MAAC, discount and rates of its code",
}
SOLVED = 0.95  # greedy win rate
AGENTS, STEPS = 3, 25  # of spread
DELAY = """No delay: policies and targets move at every critic update, elsewhere at every second, as in
Appendix G.2 of [DOP] (`--policy-delay`). These sets were made at an older commit, so the delay is not all
that differs. Games: 32 at once here, where the paper's Appendix G.2 has one for all algorithms."""
STIFFNESS, BRAKE = 8.0, 2.0  # of the assigned team's steering, the best of a coarse search


# ---- runs ----
def facts(label, report):
    """The first three cells of a row: name, seeds, environment steps."""
    failed = f" ({len(report['failed'])} failed)" if report["failed"] else ""
    return [label, f"{len(report['runs'])}{failed}", f"{report['runs'][0]['summary']['steps']:,}"]


def outcomes(report):
    """Of each run, whether it solved the task in some evaluation, the last one, and all of the last fifth."""
    curves = [run["curves"]["eval/win_rate"] for run in report["runs"]]
    fifths = [last_fifth(curve["step"], curve["value"]) for curve in curves]
    ever, end = ([f(x["value"]) >= SOLVED for x in curves] for f in (max, lambda values: values[-1]))
    return ever, end, [min(fifth) >= SOLVED for fifth in fifths]


def last_fifths(report, tag):
    """Mean of each run's evaluations after 80% of its steps."""
    curves = [run["curves"][tag] for run in report["runs"]]
    return [statistics.fmean(last_fifth(curve["step"], curve["value"])) for curve in curves]


def winning_table(reports):
    """A row per set of runs on a task that can be won."""
    header = ["algorithm", "seeds", "steps", "win rate", "worst", "return", "ever solved"]
    header += ["solved at the end", "solved throughout the last fifth"]
    rows = []
    for label, report in reports.items():
        rates, returns = (last_fifths(report, f"eval/{x}") for x in ("win_rate", "episodic_return"))
        cells = [iqm_of(rates), f"{min(rates):.2f}", iqm_of(returns), *map(success_rate, outcomes(report))]
        rows.append([*facts(label, report), *cells])
    return markdown_table(header, rows)


def returns_at(report, step):
    """Greedy return of each run's last evaluation until a step."""
    curves = [run["curves"]["eval/episodic_return"] for run in report["runs"]]
    return [[y for x, y in zip(c["step"], c["value"], strict=True) if x <= step][-1] for c in curves]


def spread_table(reports, teams):
    """A row per set of runs and per reference team on spread, at equal steps and at a set's own end."""
    steps = min(run["summary"]["steps"] for report in reports.values() for run in report["runs"])
    rows = []
    for label, report in reports.items():
        end = returns_at(report, float("inf"))
        cells = [iqm_of(returns_at(report, steps)), iqm_of(end), f"{min(end):.2f}"]
        rows.append([*facts(label, report), *cells, iqm_of([AGENTS * x for x in end])])
    for name, value in teams.items():
        rows.append([name, "-", "-", f"{value:.2f}", f"{value:.2f}", "-", f"{AGENTS * value:.2f}"])
    header = ["team", "seeds", "steps", f"return at {steps:,} steps", "at its own end", "worst"]
    return markdown_table([*header, "sum over agents"], rows)


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


# ---- pages ----
LEGEND = f"""Win rates and returns are greedy, over {{games}} games with fixed seeds, and means over the
evaluations after 80% of the steps. Solved: a win rate of at least {SOLVED:g} in an evaluation; numbers of
seeds with Wilson's 95% interval.

{NOTE}"""
CLAIM_4 = """The paper, section 5.2 (curves of 12 seeds): on aggregation MADDPG and MAAC find rewarding
configurations but quickly diverge, where deterministic DOP converges with stability; on the mill it
outperforms both, because it learns to credit pushing clockwise."""
ANSWER_4 = """In part: deterministic DOP keeps aggregation solved throughout the last fifth in
{dop_aggregation} seeds and the mill in {dop_mill}, MADDPG does in {maddpg_aggregation} and {maddpg_mill};
MAAC in {maac_aggregation} and {maac_mill}, but without the delay of policies and targets, at an older
commit, in {maac_aggregation_no_delay} and {maac_mill_no_delay}; {credit}."""
CLAIM_SPREAD = """Ours, as spread is no task of the papers: on mpe2's simple_spread MADDPG reaches what other
libraries publish for it."""
ANSWER_SPREAD = """MADDPG ends at {maddpg}, within the range of other libraries ({worst:.1f} to {best:.1f} in
our unit, the nearer to 0 the better); deterministic DOP, with MADDPG's discount and speed of the actors,
reaches {dop} and MAAC {maac}, in fewer steps (see the table)."""
WRITTEN = "Written by `python benchmark/particles.py`."
UNIT = """Returns: greedy, of one evaluation, in our unit: the reward of a step is the *mean* over agents,
local_ratio is 0.5. The last column is mpe2's sum over agents."""


def load_tasks(*names):
    """{task: {label: report}} of those tasks that have sets of runs."""
    tasks = {}
    for task in names:
        reports = load_sets("spread" if task == "spread" else "fig4")
        tasks[task] = {label: reports[name] for name, label in TASKS[task].items() if name in reports}
    return {task: reports for task, reports in tasks.items() if reports}


def write_fig4(tasks):
    """Fig. 4 of [DOP]: left, middle, and the credit on the right."""
    reports = load_sets("fig4")
    counts = {name: outcomes(report)[-1] for name, report in reports.items()}
    counts = {name: f"{sum(x)} of {len(x)}" for name, x in counts.items()}
    place = common.RESULTS / "fig4"
    draw_panels(tasks, place / "win_rate.png")
    parts = ["![greedy win rate](win_rate.png)"]
    for task, sets in tasks.items():
        parts += [f"## {task}", winning_table(sets)]
    games = {str(report["settings"]["eval_episodes"]) for report in reports.values()}
    parts += [LEGEND.format(games=" or ".join(sorted(games))), DELAY]
    credited = "credit was not measured"
    if (place / "credit.json").exists():
        content = json.loads((place / "credit.json").read_text())
        parts.append(credit.section(content))
        right = credit.above(content["checkpoints"][-1])
        credited = f"the critic credits {right} agents of the mill with pushing clockwise (seed 1)"
    names = [name for sets in TASKS.values() for name in sets]
    answer = ANSWER_4.format(**dict.fromkeys(names, "not run") | counts, credit=credited)
    parts += [WRITTEN, sources("fig4", reports)]
    write_page("fig4", "Fig. 4 of DOP: aggregation and mill", CLAIM_4, answer, *parts)


def write_spread(reports):
    """The page of spread, from {label: report}."""
    panel = {label: report for label, report in reports.items() if label in ALGORITHMS.values()}
    draw_panels({"spread": panel}, common.RESULTS / "spread" / "return.png", "eval/episodic_return")
    ends = {label: iqm_of(returns_at(report, float("inf"))) for label, report in reports.items()}
    ends = {name: ends.get(label, "not run") for name, label in ALGORITHMS.items()}
    published = [row[-1] for row in PUBLISHED if "random" not in row[0]]
    answer = ANSWER_SPREAD.format(**ends, worst=min(published), best=max(published))
    parts = ["![return](return.png)", spread_table(reports, reference_returns()), UNIT, NOTE]
    parts += ["## Known implementations", published_table(), COUNTED, WRITTEN]
    parts.append(sources("spread", load_sets("spread")))
    write_page("spread", "Spread, beside other libraries", CLAIM_SPREAD, answer, *parts)


def main(argv=None):
    no_arguments(__doc__, argv)
    tasks, spread = load_tasks("aggregation", "mill"), load_tasks("spread")
    if not tasks and not spread:
        sys.exit("particles.py: docs/results has no sets of runs in fig4 or spread yet")
    if tasks:
        write_fig4(tasks)
    if spread:
        write_spread(spread["spread"])


if __name__ == "__main__":
    main()
