"""docs/results/quadratic.md: who finds the better optimum of the quadratic game, and what annealing changes.

    python benchmark/quadratic.py

Reads the files that run_seeds.py wrote for masql.py and maddpg.py with `--env quadratic` (docs/benchmark.md
has the commands) and writes a table of both algorithms and one over annealing schedules and temperatures. A
run has converged to the better optimum if the training reward of its last five epochs is above 9 on average:
it is 10 there and 0 at the other.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import RESULTS, markdown_table, source, success_rate

EPOCH, LAST, THRESHOLD = 100, 5, 9.0  # steps, epochs, reward
PAPER = {"masql": "72% of 50", "maddpg": "0 of 50"}


def final_reward(run):
    """Mean reward of a run's last epochs, from the return of each."""
    return statistics.fmean(run["curves"]["charts/episodic_return"]["value"][-LAST:]) / EPOCH


def rate(report):
    """How many runs of a file converged, with the interval."""
    return success_rate([final_reward(run) > THRESHOLD for run in report["runs"]])


def algorithms(reports):
    """A row per algorithm."""
    rows = []
    for report in reports:
        rewards = sorted(final_reward(run) for run in report["runs"])
        seconds = [run["wall_seconds"] for run in report["runs"]]
        command, name = report["command"], report["name"].split("_")[0]
        spread = f"{rewards[0]:.2f} / {statistics.median(rewards):.2f} / {rewards[-1]:.2f}"
        wall = f"{statistics.median(seconds):.1f} ({max(seconds):.1f})"
        rows.append([f"`{command}`", rate(report), PAPER[name], spread, wall])
    header = [
        "command",
        "converged (95% Wilson)",
        "paper",
        "final reward: min / median / max",
        "seconds per run",
    ]
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

Written by `python benchmark/quadratic.py`. Converged: mean training reward of the last {LAST} epochs above
{THRESHOLD:g} (10 at the better optimum, 0 at the other). Seconds: median (slowest), from launch to exit.

{algorithms(both)}
![reward over epochs](quadratic.png)

Annealing of MASQL's temperature to 0.001 from step 10,000 on, over 1,500 steps unless instant:

{annealing(cells)}
Sources:

"""
    text += "\n".join(source(report) for report in reports.values()) + "\n"
    (RESULTS / "quadratic.md").write_text(text)
    print(f"written: {RESULTS / 'quadratic.md'}")


if __name__ == "__main__":
    main()
