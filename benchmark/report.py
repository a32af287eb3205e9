"""docs/results/README.md from docs/results/*.json: each set of runs with command, commit, seeds and hardware.

python benchmark/report.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import RESULTS

HEADER = """# Results

Written by `python benchmark/report.py` from the JSON files beside it;
[docs/benchmark.md](../benchmark.md) tells how they were made. `best`, `final` and `last fifth` are
greedy win rates over 128 games (last fifth: mean of the evaluations after 80% of the steps). `to 0.9` is
the first evaluation at a win rate of 0.90 or more: environment steps, and minutes since the launch of
the process, compilation and evaluations included. Median over seeds (worst seed); a seed that never got
there counts as later than all others and is shown as "-".
"""
OTHER = {
    "throughput": "Environment steps per second, beside SMAX",
    "update_speed": "Seconds of a training iteration",
    "scripted": "Scripted teams on six maps",
}


def cell(summary, key, worst, scale=1.0, digits=2):
    """Median (worst) of one figure; the worst of a time is missing if one seed never got there."""
    figure = summary[key]
    if figure["n"] == 0:
        return "-"
    everybody = figure["n"] == summary["steps"]["n"]
    values = [figure["median"], figure[worst] if everybody or worst == "min" else None]
    shown = ["-" if value is None else f"{value / scale:.{digits}f}" for value in values]
    return f"{shown[0]} ({shown[1]})"


def section(report):
    """Heading, facts and a table with a line per seed for one set of runs."""
    summary, name = report["summary"], report["name"]
    facts = ", ".join(f"{key} {value}" for key, value in report["hardware"].items())
    commit = report["commit"][:10] + (" with uncommitted changes" if report["dirty"] else "")
    lines = [f"## {name}", "", f"    {report['command']}", ""]
    workers = f"{report['workers']} runs at a time"
    lines += [f"{report['engine']}; commit {commit}; {report['date']}; {workers}; {facts}.", ""]
    if report["failed"]:
        lines += [f"Without a result: {report['failed']}.", ""]
    if (RESULTS / f"{name}.png").exists():
        lines += [f"![{name}]({name}.png)", ""]
    keys = (
        "steps",
        "best",
        "final",
        "last_fifth",
        "final_return",
        "step_to_target",
        "wall_seconds_to_target",
    )
    lines += [
        "| seed | " + " | ".join(key.replace("_", " ") for key in keys) + " |",
        "|---" * (len(keys) + 1) + "|",
    ]
    for run in report["runs"]:
        values = [run["summary"][key] for key in keys]
        shown = ["-" if value is None else f"{value:.2f}".removesuffix(".00") for value in values]
        lines.append(f"| {run['seed']} | " + " | ".join(shown) + " |")
    row = [
        f"[{name}](#{name})",
        report["env"],
        str(len(report["runs"])),
        f"{summary['steps']['median']:,.0f}",
    ]
    row += [cell(summary, key, "min") for key in ("best", "final", "last_fifth")]
    row += [
        cell(summary, "step_to_target", "max", 1e3, 0) + "k",
        cell(summary, "wall_seconds_to_target", "max", 60, 1),
    ]
    return "| " + " | ".join(row) + " |", "\n".join(lines)


def main():
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    rows, sections = zip(*(section(report) for report in reports if "runs" in report), strict=True)
    table = [
        "| runs | env | seeds | steps | best | final | last fifth | to 0.9, steps | to 0.9, min |",
        "|---" * 9 + "|",
    ]
    links = [f"- [{text}]({name}.md)" for name, text in OTHER.items() if (RESULTS / f"{name}.md").exists()]
    parts = [HEADER, "\n".join([*table, *rows]), "\n".join(links), *sections]
    (RESULTS / "README.md").write_text("\n\n".join(part.strip("\n") for part in parts) + "\n")
    print(f"written: {RESULTS / 'README.md'}")


if __name__ == "__main__":
    main()
