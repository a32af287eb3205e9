"""docs/results/smac.md: win rates of the EPISODE family on SMAC maps, at equal environment steps.

    python benchmark/smac.py

Reads the files that run_seeds.py wrote (docs/benchmark.md has the commands). Curves are cut to the steps that
all methods of a map have; longer runs stand apart, uncut. Best, final, last fifth (mean over the evaluations
after 80% of these steps) are greedy win rates; training is the win rate of the exploring policies in the same
last fifth. Battles of a map begin alike, so that greedy teams often win nearly all or nearly none; training
shows the trend.
"""

import argparse
import bisect
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import RESULTS, last_fifth, markdown_table, median_worst, source

# map -> file of DOP; the other methods' files are <method>_<map>
MAPS = {
    "3m": "dop_3m_long",
    "3s_vs_3z": "dop_3s_vs_3z",
    "8m": "dop_8m",
    "2s3z": "dop_2s3z",
    "mmm": "dop_mmm_torch",
}
METHODS = {
    "dop_on_policy": "DOP, on-policy only (`--tree-backup none`)",
    "dop_sampled": "DOP, undecomposed tree backup (`--tree-backup sampled`)",
    "coma": "COMA",
    "qmix": "QMIX",
}
LONGER = {
    "dop_2s3z_500k": "DOP on 2s3z",
    "coma_2s3z_500k": "COMA on 2s3z",
    "dop_on_policy_3m_500k": "DOP, on-policy only, on 3m",
}
TARGET = 0.9
LOSSES = {"losses/entropy": "entropy", "losses/grad_norm_actor": "actor's gradient"}  # where collected


def until(run, tag, limit):
    """Steps and values of a run's curve within `limit` steps; none where the tag was not collected."""
    curve = run["curves"].get(tag, {"step": [], "value": []})
    length = bisect.bisect_right(curve["step"], limit)
    return curve["step"][:length], curve["value"][:length]


def row(method, report, limit):
    """Cells of one method: medians over its seeds, the worst seed in brackets."""
    curves = [until(run, "eval/win_rate", limit) for run in report["runs"]]
    training = [until(run, "charts/win_rate", limit) for run in report["runs"]]
    columns = [
        [max(values) for _, values in curves],
        [values[-1] for _, values in curves],
        [statistics.fmean(last_fifth(*curve, limit)) for curve in curves],
        [statistics.fmean(last_fifth(*curve, limit)) for curve in training if curve[0]],
    ]
    points = [zip(*curve, strict=True) for curve in curves]
    first = [next((step for step, value in curve if value >= TARGET), None) for curve in points]
    reached = ", ".join("-" if step is None else f"{step / 1000:.0f}k" for step in first)
    losses = [[until(run, tag, limit) for run in report["runs"]] for tag in LOSSES]
    ends = [", ".join(f"{values[-1]:.1g}" if values else "-" for _, values in x) for x in losses]
    return [method, len(curves), *map(median_worst, columns), reached, *ends]


def main(argv=None):
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    parts = ["# SMAC maps at equal environment steps"]
    parts += [
        "Written by `python benchmark/smac.py`; its docstring says what the columns mean. Not StarCraft II:\n"
        "the engine stands under a map's name, and a table has sets of one engine only.\n"
        f"Median over seeds (worst seed); of every seed the first evaluation of at least {TARGET:g}, and at\n"
        "the end entropy and norm of the actor's gradient. Training: win rate of the exploring policies.\n"
        "Battles of a map begin alike, so that greedy teams often win nearly all or nearly none; training\n"
        "shows the trend."
    ]
    sources = []
    header = ["method", "seeds", "best", "final", "last fifth", "training", f"steps to {TARGET:g}"]
    header += LOSSES.values()
    for name, dop in MAPS.items():
        files = {"DOP": dop} | {title: f"{method}_{name}" for method, title in METHODS.items()}
        paths = {title: RESULTS / f"{file}.json" for title, file in files.items()}
        reports = {title: json.loads(path.read_text()) for title, path in paths.items() if path.exists()}
        if len(reports) < 2:
            continue
        engines = {report["engine"] for report in reports.values()}
        if len(engines) > 1:
            sys.exit(f"smac.py: the sets of {name} come from different engines: {', '.join(sorted(engines))}")
        lengths = [report["summary"]["steps"]["min"] for report in reports.values()]
        rows = [row(title, report, min(lengths)) for title, report in reports.items()]
        parts += [f"## {name}, {min(lengths):,} steps", engines.pop(), markdown_table(header, rows).strip()]
        for picture in (f"smac_{name}", f"smac_{name}_training"):
            parts += [f"![{picture}]({picture}.png)"] if (RESULTS / f"{picture}.png").exists() else []
        sources += [source(report) for report in reports.values()]
    longer = {title: RESULTS / f"{name}.json" for name, title in LONGER.items()}
    longer = {title: json.loads(path.read_text()) for title, path in longer.items() if path.exists()}
    rows = [
        row(f"{title}, {(steps := report['summary']['steps']['min']):,} steps", report, steps)
        for title, report in longer.items()
    ]
    engines = sorted({report["engine"] for report in longer.values()})
    parts += ["## Longer runs", ", ".join(engines), markdown_table(header, rows).strip()] if rows else []
    sources += [source(report) for report in longer.values()]
    if not sources:
        sys.exit("smac.py: docs/results has no two sets of runs of one map to compare yet")
    parts += ["Sources:", "\n".join(sources)]
    (RESULTS / "smac.md").write_text("\n\n".join(parts) + "\n")
    print(f"written: {RESULTS / 'smac.md'}")


if __name__ == "__main__":
    main()
