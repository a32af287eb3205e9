"""Learning curves of sets of runs: interquartile mean over seeds, its 95% interval, each seed as a thin line.

    python benchmark/plot.py docs/results/fig3/dop_mmm.json
    python benchmark/plot.py docs/results/fig3/{dop,coma}_mmm.json --labels DOP COMA --out both.png

One colour per file, one panel per environment and engine. The interval is a bootstrap over seeds
(benchmark/stats.py) at each step where every seed is still running; with one seed there is none.
"""

import itertools
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import stats
from benchmark.common import new_parser

AXES = {"step": "environment steps", "hours": "hours of training", "minutes": "minutes of training"}
NAMES = {
    "eval/win_rate": "greedy win rate",
    "eval/episodic_return": "greedy return",
    "charts/win_rate": "win rate while training",
    "charts/episodic_return": "return while training",
}


def parse_args(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="result files of run_seeds.py")
    parser.add_argument("--labels", nargs="+", help="one per file instead of its name")
    parser.add_argument("--tag", default="eval/win_rate", help="which curve")
    parser.add_argument("--x", choices=AXES, default="step", help="horizontal axis")
    parser.add_argument("--until", type=float, help="where the horizontal axis ends")
    parser.add_argument("--hline", type=float, help="a dashed line at this height, such as a paper's number")
    parser.add_argument("--out", type=Path, help="PNG file; default: beside the first file, under its name")
    args = parser.parse_args(argv)
    if args.labels and len(args.labels) != len(args.files):
        parser.error(f"{len(args.files)} files need as many --labels, got {len(args.labels)}")
    if args.out and args.out.suffix != ".png":
        parser.error(f"--out must end in .png, got {args.out}")
    return args


def load(path):
    """The content of a file of run_seeds.py; SystemExit where it is none."""
    try:
        report = json.loads(path.read_text())
        if not report.get("runs"):
            raise ValueError("no runs in it")
    except (OSError, ValueError) as error:
        raise SystemExit(f"plot.py: {path} is no result file of run_seeds.py: {error}") from error
    return report


def curves_of(report, tag, x):
    """[(x, value)] per seed as arrays; x in steps, or in hours or minutes of training at these steps."""
    curves = []
    for run in report["runs"]:
        if tag not in run["curves"]:
            raise SystemExit(
                f"plot.py: {report['name']} has no curve {tag!r}, only {', '.join(run['curves'])}"
            )
        steps, values = (np.array(run["curves"][tag][key], dtype=float) for key in ("step", "value"))
        if x != "step":
            clock = run["curves"].get("charts/train_seconds")
            if clock is None:
                raise SystemExit(f"plot.py: {report['name']} has no charts/train_seconds for --x {x}")
            steps = np.interp(steps, clock["step"], clock["value"]) / {"hours": 3600, "minutes": 60}[x]
        curves.append((steps, values))
    return curves


def draw(axes, curves, colour):
    """One setting: all seeds thin, interquartile mean and interval on top."""
    start, end = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    longest = max((steps for steps, _ in curves), key=len)
    grid = longest[(longest >= start) & (longest <= end)]
    mean, limits = stats.estimate(stats.iqm, np.stack([np.interp(grid, *curve) for curve in curves])[:, None])
    for curve in curves:
        axes.plot(*curve, color=colour, linewidth=0.6, alpha=0.45)
    axes.fill_between(grid, *limits, color=colour, alpha=0.15, linewidth=0)
    axes.plot(grid, mean, color=colour, linewidth=2.0)


def draw_panels(panels, out, tag="eval/win_rate", labels=None, x="step", until=None, hline=None):
    """A PNG of learning curves; panels: {title: {label: report}}, labels: their order, so their colours."""
    labels = [x for x in labels or {} if any(x in panel for panel in panels.values())]
    labels = labels or list(dict.fromkeys(label for panel in panels.values() for label in panel))
    palette = [*plt.get_cmap("tab10").colors, *plt.get_cmap("tab20").colors[1::2]]  # full, then pale
    colours = dict(zip(labels, itertools.cycle(palette), strict=False))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = (2.4 + 4.4 * columns, 0.6 + 3.4 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for (title, panel), axes in zip(panels.items(), grid.flat, strict=False):
        for label, report in panel.items():
            draw(axes, curves_of(report, tag, x), colours[label])
        if hline is not None:
            axes.axhline(hline, color="grey", linestyle="--", linewidth=1)
        if tag.endswith("win_rate"):
            axes.set_ylim(-0.03, 1.03)
        if until:
            axes.set_xlim(0, until)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(AXES[x])
        if x == "step":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel(NAMES.get(tag, tag))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = []
    for label in labels:
        seeds = sorted({len(panel[label]["runs"]) for panel in panels.values() if label in panel})
        text = f"{label} ({' to '.join(map(str, seeds[:1] + seeds[1:][-1:]))} seed{'s' * (seeds != [1])})"
        handles.append(plt.Line2D([], [], color=colours[label], linewidth=2.0, label=text))
    note = "bold: interquartile mean, band: 95% bootstrap interval over seeds"
    style = dict(frameon=False, fontsize=9, title=note, title_fontsize=7)
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns - 1, **style)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(f"written: {out}")


def draw_profile(scores, out, label):
    """A PNG of performance profiles; scores: {label: (R, M)}, `label` names the score."""
    levels = np.linspace(0, 1, 101)
    shares, limits = stats.profile(scores, levels)
    figure, axes = plt.subplots(figsize=(5.6, 4.0), layout="constrained")
    for name, share in shares.items():
        axes.step(levels, share, where="post", linewidth=2.0, label=name)
        axes.fill_between(levels, *limits[name], step="post", alpha=0.15, linewidth=0)
    axes.set_xlabel(f"{label} above this")
    axes.set_ylabel("share of runs")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(f"written: {out}")


def main(argv=None):
    args = parse_args(argv)
    reports = [load(path) for path in args.files]
    labels = args.labels or [report["name"] for report in reports]
    panels = {}
    for report, label in zip(reports, labels, strict=True):
        title = ", ".join(filter(None, [report["env"] or "?", report["engine"]]))
        if label in panels.get(title, {}):
            raise SystemExit(f"plot.py: two files with the label {label} in one panel; give --labels")
        panels.setdefault(title, {})[label] = report
    out = args.out or args.files[0].with_suffix(".png")
    try:
        draw_panels(panels, out, args.tag, list(dict.fromkeys(labels)), args.x, args.until, args.hline)
    except OSError as error:
        raise SystemExit(f"plot.py: --out cannot be written: {error}") from None
    return out


if __name__ == "__main__":
    main()
