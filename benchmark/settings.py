"""docs/results/settings/README.md: settings of the papers and of their authors' codes at full length.

    python benchmark/settings.py

Reads the sets <setting>_<algorithm>_<task>.json there that run_seeds.py wrote (of battles without chase
..._no_chase.json), and of fig3 and fig4 the sets of the same algorithm and task with its default settings.
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import common, saturation
from benchmark.common import load, load_sets, no_arguments, set_on, sources, task_of, write_page
from benchmark.plot import draw_panels
from benchmark.smac import LEGEND, READ, TAGS, TARGET, length, reached, table_of

# the beginning of a set's name: words for it
SETTINGS = {name: name for name in ("paper", "official", "appendix", "published", "default")}
SETTINGS["official-50k"] = "official with epsilon over 50,000 steps"
ALGORITHMS = {
    "dop": "DOP", "coma": "COMA", "qmix": "QMIX", "maac": "MAAC", "dop_deterministic": "deterministic DOP",
}  # fmt: skip
CLAIM = """The papers: their settings, and those of their authors' codes (`--setting`; for MAAC flags,
below), learn; on SMAC within some millions of steps of StarCraft II."""
SATURATION = """At the end of runs of DOP: the mean softmax probability of the greedy action, and how often it
is the best by the agent's own critic. Near 1 a softmax has nearly no gradient: where the two disagree then,
the critic cannot move the policy."""
HOW = """A figure's curve of one seed has no band. The other defaults are sets of [fig3](../fig3/README.md)
and [fig4](../fig4/README.md)."""


def defaults(task):
    """{algorithm: report} of the default settings on a task, where there is a set."""
    fig3, fig4 = load_sets("fig3"), load_sets("fig4")
    found = {name: fig3.get(set_on(name, task)) for name in ("dop", "coma", "qmix")}
    found |= {"maac": fig4.get(f"maac_{task}"), "dop_deterministic": fig4.get(f"dop_{task}")}
    return {name: report for name, report in found.items() if report}


def main(argv=None):
    no_arguments(__doc__, argv)
    reports, tasks = load_sets("settings"), {}
    for name, report in reports.items():
        setting, _, rest = name.partition("_")
        task = task_of(name, report)
        algorithm = rest.removesuffix(set_on("", task))
        if setting not in SETTINGS or algorithm not in ALGORITHMS:
            sys.exit(f"settings.py: docs/results/settings/{name}.json is no <setting>_<algorithm>_<task>")
        tasks.setdefault(task, {}).setdefault(algorithm, {})[setting] = report
    if not tasks:
        sys.exit("settings.py: docs/results/settings has no <setting>_<algorithm>_<task>.json yet")
    panels, tables, told = {}, [], []
    for task, algorithms in tasks.items():
        beside, rows = defaults(task), {}
        for algorithm, sets in sorted(algorithms.items()):
            label = ALGORITHMS[algorithm]
            found = {f"{label}, {SETTINGS[name]}": sets[name] for name in SETTINGS if name in sets}
            for name, report in found.items():
                seeds, median = reached(report)
                after = f", after {median} steps" if median != "-" else ""
                after += " in the median" if after and len(report["runs"]) > 1 else ""
                since = reached(report, stays=True)[1]
                after += f" (and stays there from {since})" if since not in ("-", median) else ""
                told.append(
                    f"{name}, on {task}: {seeds.split(' (')[0]} within {length(report):,} steps{after}"
                )
            rows |= found | ({f"{label}, default": beside[algorithm]} if algorithm in beside else {})
        tables += [f"## {task}", table_of(rows)]
        panels[task] = rows
    parts = [READ]
    for kind, tag in TAGS.items():
        draw_panels(panels, common.RESULTS / "settings" / f"{kind}.png", tag)
        parts.append(f"![win rates, {kind}]({kind}.png)")
    text = f"Seeds that reach a greedy win rate of {TARGET:g}: {'; '.join(told)}."
    measured = [report for name, report in load("settings").items() if name.startswith("saturation")]
    if measured:
        tables += ["## Do the actors still follow their critics?", SATURATION]
        tables += map(saturation.section, measured)
    parts += [*tables, "## How to read", HOW, LEGEND, "Written by `python benchmark/settings.py`."]
    title = "Settings of the papers and of their authors' codes"
    write_page("settings", title, CLAIM, text, *parts, sources("settings", reports))


if __name__ == "__main__":
    main()
