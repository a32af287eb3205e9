"""docs/results/quadratic.md: who finds the better optimum of the quadratic game, and what annealing changes.

    python benchmark/quadratic.py

Reads the files that run_seeds.py wrote for masql.py and maddpg.py with `--env quadratic` (docs/benchmark.md
has the commands) and writes a table of both algorithms and one over annealing schedules and temperatures. The
reward is 10 at the better optimum and 0 at the other. A run is counted as converged to the better one by two
measures: the mean training reward of its last five epochs, or the reward of its last greedy evaluation, above
9. The exploration noise of MADDPG keeps the first below 9 wherever its policies are.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maddpg
from benchmark.common import RESULTS, markdown_table, source, success_rate
from envs import make

EPOCH, LAST, THRESHOLD = 100, 5, 9.0  # steps, epochs, reward
PAPER = {"masql": "72% of 50", "maddpg": "0 of 50"}


def final_reward(run):
    """Mean reward of a run's last epochs, from the return of each."""
    return statistics.fmean(run["curves"]["charts/episodic_return"]["value"][-LAST:]) / EPOCH


def greedy_reward(run):
    """Reward of a run's last evaluation."""
    return run["curves"]["eval/episodic_return"]["value"][-1] / EPOCH


def rate(report, measure=final_reward):
    """How many runs of a file converged by a measure, with the interval."""
    return success_rate([measure(run) > THRESHOLD for run in report["runs"]])


def reward_under_noise(games=512):
    """Mean reward of an epoch with both policies at the better optimum, under MADDPG's exploration noise."""
    args, env = maddpg.Args(**maddpg.PRESETS["quadratic"]), make("quadratic", num_envs=games)
    generator, noise, rewards = torch.Generator().manual_seed(0), torch.zeros(games, 2, 1), []
    for _ in range(EPOCH):
        noise = maddpg.noise_step(noise, args.noise_theta, args.noise_sigma, generator)  # (B, 2, 1)
        rewards.append(env.reward((5 + 10 * noise).clamp(-10, 10)).mean().item())
    return statistics.fmean(rewards)


def algorithms(reports):
    """A row per algorithm."""
    rows = []
    for report in reports:
        rewards = sorted(greedy_reward(run) for run in report["runs"])
        seconds = [run["wall_seconds"] for run in report["runs"]]
        command, name = report["command"], report["name"].split("_")[0]
        spread = f"{rewards[0]:.2f} / {statistics.median(rewards):.2f} / {rewards[-1]:.2f}"
        wall = f"{statistics.median(seconds):.1f} ({max(seconds):.1f})"
        rows.append([f"`{command}`", rate(report), rate(report, greedy_reward), PAPER[name], spread, wall])
    header = [
        "command",
        "by training reward",
        "by greedy reward",
        "paper",
        "greedy reward: min / median / max",
    ]
    header += ["seconds per run"]
    return markdown_table(header, rows)


def annealing(reports):
    """Schedules by starting temperatures."""
    cells = {(r["settings"]["annealing"], r["settings"]["alpha_start"]): rate(r) for r in reports}
    starts = sorted({start for _, start in cells}, reverse=True)
    schedules = [name for name in ("exponential", "linear", "instant") if any(name == x for x, _ in cells)]
    rows = [[name, *(cells.get((name, start), "-") for start in starts)] for name in schedules]
    return markdown_table(["annealing", *(f"alpha from {start:g}" for start in starts)], rows)


def main(argv=None):
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*_quadratic*.json"))}
    both = [reports[name] for name in ("masql_quadratic", "maddpg_quadratic") if name in reports]
    cells = [report for name, report in reports.items() if name.startswith("masql_quadratic")]
    if not both:
        sys.exit("quadratic.py: docs/results has no masql_quadratic.json or maddpg_quadratic.json yet")
    text = f"""# The quadratic game

Written by `python benchmark/quadratic.py`. Runs that converged to the better optimum (reward 10; 0 at the
other), with Wilson's 95% interval: by the mean training reward of the last {LAST} epochs and by the last
greedy evaluation, each above {THRESHOLD:g}. MADDPG cannot by the first: with policies held at the better
optimum its noise would leave a training reward of {reward_under_noise():.1f}. Seconds: median (slowest), from
launch to exit.

{algorithms(both)}
![reward over epochs](quadratic.png)

Annealing of MASQL's temperature to 0.001 from step 10,000 on, over 1,500 steps unless instant; by training
reward:

{annealing(cells)}
Sources:

"""
    text += "\n".join(source(report) for report in reports.values()) + "\n"
    (RESULTS / "quadratic.md").write_text(text)
    print(f"written: {RESULTS / 'quadratic.md'}")


if __name__ == "__main__":
    main()
