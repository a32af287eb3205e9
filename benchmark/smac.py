"""docs/results/fig3/README.md: win rates of DOP, its ablations, COMA and QMIX on SMAC maps.

    python benchmark/smac.py

Reads the files <method>_<map>.json there that run_seeds.py wrote, of any number of seeds and steps, and
<method>_<map>_long.json, which are compared apart, as are those of battles without chase,
..._no_chase.json, and with the ladder's weapons, ..._ladder.json.
Other files get a row in a last table.
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021, section 5.1.
"""

import bisect
import itertools
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import common
from benchmark.common import ENGINE, last_fifth, load_sets, markdown_table, no_arguments, sources, write_page
from benchmark.plot import draw_panels, draw_profile
from benchmark.stats import NOTE, between, estimate, improvement, iqm, iqm_of, success_rate

METHODS = {
    "dop": "DOP",
    "coma": "COMA",
    "qmix": "QMIX",
    "dop_on_policy": "on-policy DOP",
    "dop_sampled": "undecomposed backup",
    "qmix_50": "QMIX with targets every 50",  # `--target-period 50`, which was the default before 200
}
TAGS = {"greedy": "eval/win_rate", "exploring": "charts/win_rate"}
WITHOUT = """Of an earlier rule, which `--env MAP,chase=false` still plays: an enemy whose target is out of
reach turns to the nearest, which is [farther from the game](../../envs.md#how-far-is-the-simulator)."""
LADDER = """`--env MAP,ladder=true`: stalkers, colossi and crawlers have the multiplayer ladder's weapons,
which the maps do not name and the game [may use nevertheless](../../envs.md#how-far-is-the-simulator)."""
# by the end of a set's name: rule of its id, words of its headings, what its section begins with
RULES = {
    "": ("chase=true", "", []),
    common.NO_CHASE: ("chase=false", " without chase", [WITHOUT]),
    "_ladder": ("ladder=true", " with the ladder's weapons", [LADDER]),
}
LENGTHS = {"": ("Short runs", ""), "_long": ("Long runs", ", long")}
ROW = 5  # evaluations in a row that tell whether a seed stays at TARGET
TARGET, GAP = 0.9, 0.05  # of a greedy win rate: a map is won, a method wins more than another
FEW = 2  # runs per map and method, which tell no probability
READ = "What the columns mean: [how to read](#how-to-read)."
CLAIM = """The paper, section 5.1: on SMAC's maps stochastic DOP outperforms COMA and QMIX by a wide margin;
replay and the decomposed tree backup each matter, the undecomposed backup falls behind on-policy DOP as
agents grow (12 seeds, nine maps, millions of steps of StarCraft II)."""
ACROSS = """Across maps: IQM over all seeds and maps, each map with the same weight, and the probability
that a run of DOP is better than one of the other method on the same map, at the steps that both have
there:"""
LEGEND = f"""A score is the mean win rate of a seed after 80% of the steps: of greedy evaluations, or of the
exploring policies while they train (each method explores in its own way, so that compares a method with
itself). First at the steps that all sets of a table have; then, where some are longer, at a set's own end.
Worst: the lowest greedy score of a seed at its end. Reached: seeds with an evaluation of at least
{TARGET:g}, and the median of the steps that it took, where over half of them got there. Stays from: the same
of the first such evaluation from which on no {ROW} in a row have a mean below that. At {TARGET:g} to the end:
seeds whose greedy score at the end is at least that. Numbers of seeds with Wilson's 95% interval.
Return: greedy, after 80% of the steps, median of seeds; on SMAC a win is worth about 20, and where nobody
wins it tells how much damage is done. Entropy: of the policies at the end, median. Minutes: of a run on
one core, evaluations included, median; the machine's other core was mostly busy too. They compare only
between sets of one processor (below, beside the commands). Battles of a map begin alike, so that greedy teams
often win nearly all or nearly none; the exploring rate shows the trend. The battles are those of this
repository's embedded simulator, not StarCraft II.

{NOTE}"""

LATEST = """Every method is evaluated by its latest network: DOP too (`--averaging 0`, as it was when its sets
were made). Its default plays an [average of actors](../default/README.md#average-of-actors), which does not
change the training and jumps less."""
# win rates in StarCraft II (NOTE_ON_GAME): IQL, QMIX, COMA of PyMARL, QMIX of Yu et al., MATWM, QMIX with it
GAME = {
    "mmm": ("-", "1", "0.1", "-", "0.05", "0.00"),
    "3s5z": ("0.10", "0.97", "0", "0.88", "-", "-"),
    "1c3s5z": ("0.21", "0.97", "-", "-", "-", "-"),
    "3m": ("-", "-", "-", "0.97", "0.83", "0.61"),
    "8m": ("-", "-", "-", "-", "0.67", "0.60"),
    "2s3z": ("0.75", "0.99", "-", "0.95", "0.80", "0.17"),
    "10m_vs_11m": ("0.34", "0.97", "-", "0.95", "-", "-"),
    "so_many_baneling": ("-", "-", "-", "-", "0.86", "0.40"),
    "2m_vs_1z": ("-", "-", "-", "-", "0.98", "0.62"),
    "2s_vs_1sc": ("1", "1", "-", "0.97", "0.96", "0.04"),
    "3s_vs_3z": ("-", "-", "-", "-", "0.87", "0.00"),
    "2c_vs_64zg": ("0.07", "0.58", "-", "-", "-", "-"),
}
EARLY = 50_000  # steps of the last two
NOTE_ON_GAME = f"""Win rates in StarCraft II. PyMARL: of its authors, after 2,000,000 steps, without seeds and
intervals, as [SAC-QMIX](https://github.com/FlickerNiko/SAC-QMIX) quotes them; MMM, and COMA, as
[DI-engine](https://github.com/opendilab/DI-engine/blob/main/dizoo/smac/README.md) does. Yu et al.
([arXiv 2103.01955](https://arxiv.org/abs/2103.01955)): medians. MATWM, which learns a model of the game, and
QMIX beside it, both within {EARLY:,} steps: medians of Table 2 of
[arXiv 2506.18537](https://arxiv.org/abs/2506.18537); those of 2s3z are taken for what the copy has as
deviations, as a median of 9% with a deviation of 80 cannot be. The last two papers as public repositories
quote them; we had no access to them. QMIX here: greedy, mean of our seeds in their latest evaluation until
then; its settings are not theirs.

This simulator is not the game, and 2s_vs_1sc most of all seems harder:
[what is known of why](../../envs.md#how-far-is-the-simulator)."""


# ---- scores ----
def scores(report, kind, limit):
    """Mean of each run's win rate in the last fifth of its first `limit` steps; [] where one has none."""
    curves = [run["curves"].get(TAGS[kind]) for run in report["runs"]]
    if not all(curves):
        return []
    cuts = [bisect.bisect_right(curve["step"], limit) for curve in curves]
    if not all(cuts):
        return []
    parts = [(c["step"][:cut], c["value"][:cut], limit) for c, cut in zip(curves, cuts, strict=True)]
    return [statistics.fmean(last_fifth(*part) or part[1][-1:]) for part in parts]


def length(report):
    """Environment steps that all runs of a set have."""
    return report["summary"]["steps"]["min"]


def falls(values):
    """Whether ROW evaluations in a row, or all where there are fewer, have a mean below TARGET."""
    rows = (values[k : k + ROW] for k in range(max(1, len(values) - ROW + 1)))
    return min(map(statistics.fmean, rows)) < TARGET


def reached(report, stays=False):
    """'2 of 3 (21 to 94%)' and the median steps to the first evaluation of at least TARGET; '-' of none.

    stays: to the first such one after which nothing `falls`.
    """
    if not scores(report, "greedy", np.inf):
        return "-", "-"
    first = []
    for run in report["runs"]:
        steps, values = run["curves"]["eval/win_rate"].values()
        good = [x >= TARGET and not (stays and falls(values[k:])) for k, x in enumerate(values)]
        first.append(steps[good.index(True)] if True in good else np.inf)
    median = statistics.median(first)
    return success_rate([step < np.inf for step in first]), f"{median:,.0f}" if median < np.inf else "-"


def table_of(reports):
    """A row per set of runs of {label: report}, at equal steps and, where some are longer, at their ends."""
    limit, end = min(map(length, reports.values())), max(map(length, reports.values()))
    header = ["", "seeds", f"greedy at {limit:,} steps", "exploring"]
    header += ["its own end", "greedy", "exploring"] if end > limit else []
    more = f"worst, reached {TARGET:g}, median steps, stays from"
    more += f", at {TARGET:g} to the end, return, entropy, minutes"
    header += more.split(", ")
    return markdown_table(header, [row(label, x, limit, end > limit) for label, x in reports.items()])


def row(label, report, limit, with_end):
    """Cells of one set of runs."""
    end, ends = length(report), []
    for run in report["runs"]:
        ends += run["curves"].get("losses/entropy", {"value": []})["value"][-1:]
    failed = f" ({len(report['failed'])} failed)" if report["failed"] else ""
    cells = [label, f"{len(report['runs'])}{failed}"]
    cells += [iqm_of(scores(report, kind, limit)) for kind in TAGS]
    cells += [f"{end:,}", *(iqm_of(scores(report, kind, end)) for kind in TAGS)] if with_end else []
    last = scores(report, "greedy", end)
    cells += [f"{min(last):.2f}" if last else "-", *reached(report), reached(report, stays=True)[1]]
    cells.append(success_rate([x >= TARGET for x in last]) if last else "-")
    returns = [run["summary"]["last_fifth_return"] for run in report["runs"]]
    cells.append("-" if None in returns else f"{statistics.median(returns):.1f}")
    minutes = statistics.median(run["wall_seconds"] for run in report["runs"]) / 60
    return [*cells, f"{statistics.median(ends):.2f}" if ends else "-", f"{minutes:.0f}"]


def columns(reports, kind, limits):
    """Scores of one method on M maps: a list of M arrays, one number per seed."""
    return [np.array(scores(report, kind, limit)) for report, limit in zip(reports, limits, strict=True)]


# ---- parts of a section ----
def duels(maps):
    """DOP against each other method on the maps of both: (label, their names, {kind: columns}, steps)."""
    for label in list(METHODS.values())[1:]:
        found = {name: (x["DOP"], x[label]) for name, x in maps.items() if "DOP" in x and label in x}
        pairs, limits = {}, []
        for name, pair in found.items():
            limit = min(map(length, pair))
            if all(scores(report, "greedy", limit) for report in pair):
                pairs[name] = pair
                limits.append(limit)
        if pairs:
            ours, theirs = zip(*pairs.values(), strict=True)
            both = {kind: (columns(ours, kind, limits), columns(theirs, kind, limits)) for kind in TAGS}
            yield label, list(pairs), both, limits


def counts(both):
    """The least and the largest number of runs that a map has of either method."""
    numbers = [len(seeds) for x in both["greedy"] for seeds in x]
    return min(numbers), max(numbers)


def duel_table(maps):
    """A row per method that DOP is compared with."""
    rows = []
    for label, names, both, limits in duels(maps):
        if counts(both)[0] <= FEW:
            continue
        numbers = [sorted({len(x) for x in maps}) for maps in both["greedy"]]
        seeds = " and ".join(f"{x[0]} to {x[-1]}" if x[1:] else f"{x[0]}" for x in numbers)
        cells = [between(iqm, x) for x in both["greedy"]]
        cells += [between(improvement, *both[kind]) for kind in TAGS]
        rows.append([label, len(names), f"{min(limits):,} to {max(limits):,}", seeds, *cells])
    head = ["DOP against", "maps", "steps", "seeds", "DOP, greedy", "the other, greedy"]
    return markdown_table([*head, "P(DOP is better), greedy", "P, exploring"], rows) if rows else ""


def answer(title, maps):
    """What the duels say, in words."""
    said, steps, runs = {"better than": [], "worse than": [], "not told apart from": []}, set(), []
    for label, names, both, limits in duels(maps):
        count = f"{len(names)} map{'s' * (len(names) > 1)}"
        fewest, most = counts(both)
        if fewest <= FEW:
            ours, theirs = (np.array([x.mean() for x in side]) for side in both["greedy"])
            more, less = (np.array(names)[gap > GAP] for gap in (ours - theirs, theirs - ours))
            where = f"{', '.join(more) or 'none'} and less on {', '.join(less) or 'none'}, of {count}"
            than = f"wins more (by over {GAP:g}) than {label} on {where}"
            if not (len(more) or len(less)):
                than = f"wins as much as {label} (within {GAP:g}) on {count}"
            each = f"{fewest} to {most} runs" if fewest < most else f"{most} run{'s' * (most > 1)}"
            runs.append(f"{title}: DOP {than} ({each} of each)")
            continue
        steps |= set(limits)
        low, high = estimate(improvement, *both["greedy"])[1][:, 0]
        word = "better than" if low > 0.5 else "worse than" if high < 0.5 else "not told apart from"
        said[word].append(f"{label} ({between(improvement, *both['greedy'])}, {count})")
    if not steps:
        return ". ".join(runs) or f"{title}: too few for a comparison ({', '.join(maps)})"
    words = "; ".join(f"{word} {', '.join(labels)}" for word, labels in said.items() if labels)
    lengths = " to ".join(f"{step:,}" for step in sorted({min(steps), max(steps)}))
    return ". ".join([f"{title} ({lengths} steps): DOP is {words}", *runs])


def profiled(maps):
    """{label: scores (R, M)} of methods on the maps that all of them have, and these; few maps: left out.

    Of each method the first seeds, as many as it has on all of these maps.
    """
    covered = {label: {name for name, x in maps.items() if label in x} for label in METHODS.values()}
    while covered and len(shared := set.intersection(*covered.values())) < 2:
        del covered[min(covered, key=lambda label: len(covered[label]))]
    if len(covered) < 2:
        return {}, []
    shared = [name for name in maps if name in shared]
    limits, runs = [min(length(maps[name][label]) for label in covered) for name in shared], {}
    for label in covered:
        found = columns([maps[name][label] for name in shared], "greedy", limits)
        runs[label] = np.stack([x[: min(map(len, found))] for x in found], axis=1)
    return runs, shared


def section(suffix, title, begin, words, maps):
    """Figures, the table across maps and a table per map of the sets whose names end with `suffix`."""
    parts = [f"## {title}", *begin]
    for kind, tag in TAGS.items():
        panels = {
            name: {x: y for x, y in sets.items() if scores(y, kind, np.inf)} for name, sets in maps.items()
        }
        draw_panels(panels, common.RESULTS / "fig3" / f"{kind}{suffix}.png", tag, list(METHODS.values()))
        parts.append(f"![win rates, {kind}]({kind}{suffix}.png)")
    if table := duel_table(maps):
        parts += [ACROSS, table]
    runs, shared = profiled(maps)
    if runs:
        draw_profile(runs, common.RESULTS / "fig3" / f"profile{suffix}.png", "greedy win rate")
        maps_of = f"Performance profile over {', '.join(shared)}, at the steps that all have there"
        parts.append(f"{maps_of}, of each method's first seeds, as many as it has on each of these:")
        parts.append(f"![performance profile](profile{suffix}.png)")
    for name, reports in maps.items():
        parts += [f"### {name}{words}", table_of(reports)]
    return parts


def game_table(maps):
    """Published win rates, and those of our QMIX after as many steps."""
    header = "map, IQL PyMARL, QMIX PyMARL, COMA PyMARL, QMIX Yu et al., MATWM 50k, QMIX 50k, QMIX 50k here"
    rows = []
    for name, cells in GAME.items():
        ours = []
        for run in maps.get(name, {}).get("QMIX", {"runs": []})["runs"]:
            curve = run["curves"]["eval/win_rate"]
            ours += curve["value"][: bisect.bisect_right(curve["step"], EARLY)][-1:]
        rows.append([name, *cells, f"{statistics.fmean(ours):.2f}" if ours else "-"])
    return markdown_table(header.split(", "), rows)


def main(argv=None):
    no_arguments(__doc__, argv)
    reports, parts, answers = load_sets("fig3"), [], []
    others, here = dict(reports), {}
    for (end, (rule, by, begin)), (long, (title, run)) in itertools.product(RULES.items(), LENGTHS.items()):
        suffix, maps = f"{long}{end}", {}
        for method, label in METHODS.items():
            for name, report in reports.items():
                played, _, found = report["env"].partition(",")
                fits = report["engine"] == ENGINE and found in ("", rule)
                if fits and name == f"{method}_{played}{suffix}":
                    maps.setdefault(played, {})[label] = others.pop(name)
        if maps:
            maps = dict(sorted(maps.items()))
            here[suffix] = maps
            said = answer(title + by, maps)
            if end:
                begin = [*begin, f"{said}."]
            else:
                answers.append(said)
            parts += section(suffix, title + by, begin, run + f",{by}" * bool(by), maps)
    if not parts:
        sys.exit("smac.py: docs/results/fig3 has no <method>_<map>.json yet")
    text = (
        ". ".join(answers)
        + ". (In brackets: the probability that a run of DOP has the higher greedy win rate.)"
    )
    if others:
        labels = {f"{name} ({x['env']}, {x['engine']})": x for name, x in others.items()}
        parts += ["## Other sets", table_of(labels)]
    parts += ["## Published for the game", game_table(here.get("", {})), NOTE_ON_GAME]
    command = "Written by `python benchmark/smac.py`."
    title = "Fig. 3 of DOP: SMAC maps"
    parts += ["## How to read", LATEST, LEGEND, command, sources("fig3", reports)]
    write_page("fig3", title, CLAIM, text, READ, *parts)


if __name__ == "__main__":
    main()
