"""docs/results/smac.md: win rates of the EPISODE family on SMAC maps, at equal environment steps.

    python benchmark/smac.py

Reads the files that run_seeds.py wrote (docs/benchmark.md has the commands). Curves are cut to the steps that
all methods of a map have. Best, final, last fifth (mean over the evaluations after 80% of these steps) are
greedy win rates.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import ENGINE, RESULTS, markdown_table, source

# map -> file of DOP; the other methods' files are <method>_<map>
MAPS = {"3m": "dop_3m_long", "2s3z": "dop_2s3z", "mmm": "dop_mmm"}
METHODS = {
    "dop_on_policy": "DOP, on-policy only (`--tree-backup none`)",
    "dop_sampled": "DOP, undecomposed tree backup (`--tree-backup sampled`)",
    "coma": "COMA",
    "qmix": "QMIX",
}
TARGET = 0.9
LOSSES = {"losses/entropy": "entropy", "losses/grad_norm_actor": "actor's gradient"}  # where collected


def curve_until(run, limit):
    """Steps and win rates of a run's evaluations within `limit` steps."""
    curve = run["curves"]["eval/win_rate"]
    points = zip(curve["step"], curve["value"], strict=True)
    return [(step, value) for step, value in points if step <= limit]


def row(method, report, limit):
    """Cells of one method: medians over its seeds, the worst seed in brackets."""
    curves = [curve_until(run, limit) for run in report["runs"]]
    best = [max(value for _, value in curve) for curve in curves]
    final = [curve[-1][1] for curve in curves]
    fifth = [statistics.fmean(value for step, value in curve if step > 0.8 * limit) for curve in curves]
    cells = [f"{statistics.median(values):.2f} ({min(values):.2f})" for values in (best, final, fifth)]
    first = [next((step for step, value in curve if value >= TARGET), None) for curve in curves]
    reached = ", ".join("-" if step is None else f"{step / 1000:.0f}k" for step in first)
    ends = [
        ", ".join(
            f"{run['curves'][tag]['value'][-1]:.1g}" if tag in run["curves"] else "-"
            for run in report["runs"]
        )
        for tag in LOSSES
    ]
    return [method, len(curves), *cells, reached, *ends]


def main(argv=None):
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    parts = ["# SMAC maps at equal environment steps"]
    parts += [
        "Written by `python benchmark/smac.py`; its docstring says what the columns mean. "
        f"{ENGINE.capitalize()}: not StarCraft II.\nMedian over seeds (worst seed); of every seed the first "
        f"evaluation of at least {TARGET:g}, and at the end entropy and norm of the actor's gradient."
    ]
    sources = []
    for name, dop in MAPS.items():
        files = {"DOP": dop} | {title: f"{method}_{name}" for method, title in METHODS.items()}
        paths = {title: RESULTS / f"{file}.json" for title, file in files.items()}
        reports = {title: json.loads(path.read_text()) for title, path in paths.items() if path.exists()}
        if len(reports) < 2:
            continue
        lengths = [report["summary"]["steps"]["min"] for report in reports.values()]
        rows = [row(title, report, min(lengths)) for title, report in reports.items()]
        header = ["method", "seeds", "best", "final", "last fifth", f"steps to {TARGET:g}", *LOSSES.values()]
        parts += [f"## {name}, {min(lengths):,} steps", markdown_table(header, rows).strip()]
        parts += [f"![{name}](smac_{name}.png)"] if (RESULTS / f"smac_{name}.png").exists() else []
        sources += [source(report) for report in reports.values()]
    if not sources:
        sys.exit("smac.py: docs/results has no two sets of runs of one map to compare yet")
    parts += ["Sources:", "\n".join(sources)]
    (RESULTS / "smac.md").write_text("\n\n".join(parts) + "\n")
    print(f"written: {RESULTS / 'smac.md'}")


if __name__ == "__main__":
    main()
