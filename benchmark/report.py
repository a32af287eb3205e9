"""docs/results/README.md from docs/results/*.json: each set of runs with command, commit, seeds and hardware.

python benchmark/report.py
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import RESULTS, markdown_table

HEADER = """# Results

Written by `python benchmark/report.py` from the JSON files beside it; [docs/benchmark.md](../benchmark.md)
tells how they were made. Best, final and last fifth are of the figure under "metric": greedy win rates mostly
(last fifth: mean over the points after 80% of the steps). Steps and minutes to target: at the first point at
or above the target; minutes since the launch of the process, compilation and evaluations included. MiB: peak
resident memory. In the first table: median over seeds (worst seed); a seed that never got there counts as the
latest.
"""
OTHER = {
    "throughput": "Environment steps per second, beside SMAX",
    "throughput_one_core": "Environment steps per second on one core, beside the torch engine",
    "throughput_compiled": "The same beside the torch engine compiled, on one core and two",
    "training_speed": "Wall-clock of a training run beside the torch engine's commit",
    "throughput_particles": "Environment steps per second of particle tasks, beside mpe2 and vmas",
    "update_speed": "Seconds of a training iteration, beside stand-ins of the official updates",
    "scripted": "Scripted teams on six maps",
    "scripted_particles": "Random and scripted teams on particle tasks",
    "saturation": "How sharp the policies have become",
    "cdm": "Who finds and who holds the optimum of the mismatch game",
    "smac": "Win rates on SMAC maps at equal environment steps",
    "particles": "Who learns aggregation, mill and spread, beside published returns",
    "credit_mill": "What deterministic DOP credits each agent of the mill with",
    "diffs": "How many lines two algorithm files share",
    "quadratic": "Who finds the better optimum of the quadratic game, and what annealing changes",
}


def number(value, digits=2):
    return "-" if value is None else f"{value:,.{digits}f}"


def cell(report, key, worst, scale=1.0, digits=2):
    """Median (worst) of one figure over the seeds; "-" where a seed has none."""
    figure = report["summary"][key]
    values = [figure["median"], figure.get(worst) if figure["n"] == len(report["runs"]) else None]
    median, extreme = (number(None if value is None else value / scale, digits) for value in values)
    return f"{median} ({extreme})"


def overview(report):
    """One row of the first table."""
    fractions = [cell(report, key, "min") for key in ("best", "final", "last_fifth")]
    steps = cell(report, "step_to_target", "max", digits=0)
    minutes = cell(report, "wall_seconds_to_target", "max", scale=60, digits=1)
    length = number(report["summary"]["steps"]["median"], 0)
    anchor = report["name"].lower().replace(".", "")  # as GitHub makes it from the heading
    name = f"[{report['name']}](#{anchor})"
    metric = [report["metric"], *fractions, f"{report['target']:g}"]
    return [name, report["env"], len(report["runs"]), length, *metric, steps, minutes]


def section(report):
    """Heading, facts, picture and a row per seed of one set of runs."""
    name, target = report["name"], report["target"]
    commits = sorted({(run["commit"] or "unknown")[:10] + "*" * bool(run["dirty"]) for run in report["runs"]})
    hardware = ", ".join(f"{key} {value}" for key, value in report["hardware"].items())
    games = report["settings"].get("eval_episodes", "?")
    facts = f"{report['engine']}; " if report["engine"] else ""
    facts += f"evaluation over {games} games; commit {', '.join(commits)} (*: changed); "
    facts += f"{report['date']}; {report['workers']} runs at a time; {hardware}."
    failed = [f"Without a result: {report['failed']}."] if report["failed"] else []
    picture = [f"![{name}]({name}.png)"] if (RESULTS / f"{name}.png").exists() else []
    header = [
        "seed",
        "steps",
        "best",
        "final",
        "last fifth",
        "return",
        f"steps to {target}",
        "minutes",
        "MiB",
    ]
    rows = []
    for run in report["runs"]:
        summary = run["summary"]
        minutes = summary["wall_seconds_to_target"] and summary["wall_seconds_to_target"] / 60
        figures = [number(summary[key]) for key in ("best", "final", "last_fifth", "final_return")]
        steps = [number(summary["steps"], 0), *figures, number(summary["step_to_target"], 0)]
        rows.append([run["seed"], *steps, number(minutes, 1), number(run.get("peak_memory_mib"), 0)])
    table = markdown_table(header, rows).strip()
    return "\n\n".join([f"## {name}", f"    {report['command']}", facts, *failed, *picture, table])


def main(argv=None):
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    reports = [report for report in reports if "runs" in report]
    header = ["runs", "environment", "seeds", "steps", "metric", "best", "final", "last fifth", "target"]
    header += ["steps to target", "minutes"]
    table = markdown_table(header, [overview(report) for report in reports]).strip()
    links = [f"- [{text}]({name}.md)" for name, text in OTHER.items() if (RESULTS / f"{name}.md").exists()]
    parts = [HEADER.strip(), table, "\n".join(links), *(section(report) for report in reports)]
    (RESULTS / "README.md").write_text("\n\n".join(parts) + "\n")
    print(f"written: {RESULTS / 'README.md'}")


if __name__ == "__main__":
    main()
