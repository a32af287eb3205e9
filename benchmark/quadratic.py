"""docs/results/masql_fig3/README.md: who finds the better optimum of the quadratic game, with which
annealing.

    python benchmark/quadratic.py

Reads the files there that run_seeds.py wrote for masql.py and maddpg.py with `--env quadratic`, and writes a
table of both algorithms and one over annealing schedules and temperatures. The reward is 10 at the better
optimum and 0 at the other. A run is counted as converged to the better one by two measures: the mean training
reward of its last five epochs, or the reward of its last greedy evaluation, above 9.
[MASQL] Wei et al., "Multiagent Soft Q-Learning", AAAI Spring Symposium 2018.
"""

import re
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maddpg
from benchmark import common
from benchmark.common import load_sets, markdown_table, no_arguments, sources, write_page
from benchmark.plot import draw_panels
from benchmark.stats import success_rate, wilson
from envs import make

SCHEDULE = r"masql(_(exponential|linear|instant)_[\d.]+)?"  # sets of the table of schedules
EPOCH, LAST, THRESHOLD = 100, 5, 9.0  # steps, epochs, reward
FEWEST = 20  # runs of a set whose interval says something for or against the paper's 72%
PAPER = {"masql": "72% of 50", "maddpg": "0 of 50"}
CLAIM = """The paper: its sampler of joint actions finds the better of two optima in 72% of 50 runs, once the
temperature is annealed, where MADDPG never does."""
ANSWER = """Yes, and more often: MASQL in {masql}, MADDPG in {maddpg} by greedy reward. The paper's 72% lies
in the intervals, by training reward, of {fits}."""

READINGS = """Where the paper is silent it can be read in other ways; those that were tried:"""


def final_reward(run):
    """Mean reward of a run's last epochs, from the return of each."""
    return statistics.fmean(run["curves"]["charts/episodic_return"]["value"][-LAST:]) / EPOCH


def greedy_reward(run):
    """Reward of a run's last evaluation."""
    return run["curves"]["eval/episodic_return"]["value"][-1] / EPOCH


def converged(report, measure=final_reward):
    """A bool for each run of a file: whether it converged by a measure."""
    return [measure(run) > THRESHOLD for run in report["runs"]]


def rate(report, measure=final_reward):
    """How many runs of a file converged by a measure, with the interval."""
    return success_rate(converged(report, measure))


def reward_under_noise(games=512):
    """Mean reward of an epoch with both policies at the better optimum, under MADDPG's exploration noise."""
    args, env = maddpg.Args(**maddpg.PRESETS["quadratic"]), make("quadratic", num_envs=games)
    generator, noise, rewards = torch.Generator().manual_seed(0), torch.zeros(games, 2, 1), []
    for _ in range(EPOCH):
        noise = maddpg.noise_step(noise, args.noise_theta, args.noise_sigma, generator)  # (B, 2, 1)
        rewards.append(env.reward((5 + 10 * noise).clamp(-10, 10)).mean().item())
    return statistics.fmean(rewards)


def algorithms(reports):
    """A row per algorithm of {name: report}."""
    rows = []
    for name, report in reports.items():
        rewards = sorted(greedy_reward(run) for run in report["runs"])
        seconds = [run["wall_seconds"] for run in report["runs"]]
        spread = f"{rewards[0]:.2f} / {statistics.median(rewards):.2f} / {rewards[-1]:.2f}"
        wall = f"{statistics.median(seconds):.1f} ({max(seconds):.1f})"
        rows.append(
            [f"`{report['command']}`", rate(report), rate(report, greedy_reward), PAPER[name], spread, wall]
        )
    header = ["command", "by training reward", "by greedy reward", "paper"]
    return markdown_table([*header, "greedy reward: min / median / max", "seconds per run"], rows)


def readings(reports):
    """A row per set that reads the paper's settings in another way than the preset."""
    rows = [[f"`{x['command']}`", rate(x), rate(x, greedy_reward)] for x in reports]
    return markdown_table(["command", "by training reward", "by greedy reward"], rows)


def fitting(reports):
    """Words for the sets of FEWEST runs or more whose interval, by training reward, holds the paper's 72%."""
    found = []
    for report in reports:
        low, high = wilson(sum(converged(report)), len(report["runs"]))
        if len(report["runs"]) >= FEWEST and low <= 0.72 <= high:
            found.append(f"`{report['command']}`, {rate(report)}")
    return "; ".join(found) or "no set here"


def annealing(reports):
    """Schedules by starting temperatures."""
    cells = {(r["settings"]["annealing"], r["settings"]["alpha_start"]): rate(r) for r in reports}
    starts = sorted({start for _, start in cells}, reverse=True)
    schedules = [name for name in ("exponential", "linear", "instant") if any(name == x for x, _ in cells)]
    rows = [[name, *(cells.get((name, start), "-") for start in starts)] for name in schedules]
    return markdown_table(["annealing", *(f"alpha from {start:g}" for start in starts)], rows)


def main(argv=None):
    no_arguments(__doc__, argv)
    reports = load_sets("masql_fig3")
    both = {name: reports[name] for name in ("masql", "maddpg") if name in reports}
    if not both:
        sys.exit("quadratic.py: docs/results/masql_fig3 has no masql.json or maddpg.json yet")
    panel = {name.upper(): report for name, report in both.items()}
    draw_panels({"quadratic": panel}, common.RESULTS / "masql_fig3" / "reward.png", "charts/episodic_return")
    found = {name: "not run" for name in PAPER} | {name: rate(x, greedy_reward) for name, x in both.items()}
    cells = [report for name, report in reports.items() if re.fullmatch(SCHEDULE, name)]
    others = [report for name, report in reports.items() if not re.fullmatch(f"maddpg|{SCHEDULE}", name)]
    legend = f"""Runs that converged to the better optimum (reward 10; 0 at the other), with Wilson's 95%
interval: by the mean training reward of the last {LAST} epochs and by the last greedy evaluation, each above
{THRESHOLD:g}. MADDPG cannot by the first: with policies held at the better optimum its noise would leave a
training reward of {reward_under_noise():.1f}. Seconds: median (slowest), from launch to exit."""
    schedules = """Annealing of MASQL's temperature to 0.001 from step 10,000 on, over 1,500 steps unless
instant, by training reward; the paper asks for annealing methods that converge more often:"""
    parts = [
        "![return of an epoch of 100 steps](reward.png)",
        algorithms(both),
        legend,
        schedules,
        annealing(cells),
    ]
    if others:
        parts += [READINGS, readings(others)]
    command = "Written by `python benchmark/quadratic.py`."
    title = "Fig. 3 of MASQL: the quadratic game"
    answer = ANSWER.format(**found, fits=fitting([*cells, *others]))
    write_page("masql_fig3", title, CLAIM, answer, *parts, command, sources("masql_fig3", reports))


if __name__ == "__main__":
    main()
