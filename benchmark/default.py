"""docs/results/default/README.md: how DOP's pull to uniform policies, actor's rate, scale of the loss and
average of actors were chosen.

    python benchmark/default.py

Reads the sets <name>_<map>.json there that run_seeds.py wrote, average_<map>.json with the present default
among them, and of fig3 dop_<map>.json, which have the same settings but that evaluations play the latest
actor, and dop_<map>_bonus_no_chase.json and dop_mmm_no_bonus_no_chase.json, the former defaults; the names
of sets of battles without chase end with _no_chase.
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import common
from benchmark.common import load_sets, markdown_table, no_arguments, set_on, sources, task_of, write_page
from benchmark.plot import draw_panels
from benchmark.smac import LEGEND, READ, TARGET, columns, length, reached, table_of
from benchmark.stats import between, improvement

CLAIM = """Ours: a pull to uniform policies in the actor's loss, with a quicker actor, wins sooner than
[DOP]'s loss; on 3m fewer teams get stuck in a way that loses than with an entropy bonus, and 2s3z is won
later; averaging that loss over steps, as here, or over agents too, as in the official code, matters
little; an average of the latest actors falls back less often in evaluations than the latest one."""
HOW = """Trials without chase, by which the choice was made, on seeds 201 to 205 (one of MMM on another);
sets with fewer were cut off when it had been made, so it rests on few seeds. Those with chase came later, on
seeds 201 to 203: whether a stronger pull would help on 3m, where the default takes longer than it did. The
chosen settings are shown by [fig3's sets](../fig3/README.md), whose seeds no trial had used but for seed 1
of MMM, on 8m as a map that no trial had used. Average: its share of the old (`--averaging`) was chosen among
0.95, 0.98 and 0.99 on seeds 201 and 202 of 3m, 2s3z and MMM, in trials that were not kept; the table's seeds
are others. Pull: the weight of KL(uniform, softmax policy) in the loss; bonus: that of the policies'
entropy, which was the default before; with neither and a rate of 5e-4 the loss is [DOP]'s, which was the
default before that."""
AVERAGE = """By default evaluations, and `play.py`, play an average of the actors of the latest iterations,
which does not change the training. Beside the latest actor, in the same runs but for that (seeds that both
sets have, on one kind of processor, never interrupted) and evaluated as often; "below it later": of the
evaluations that follow a seed's first of at least {target:g}, those below {target:g}; lowest later: of all
seeds. P: that a run with the average has the higher greedy score at the end."""


def settings(report):
    """Pull, bonus, rate of the actor and what the loss is a mean over; a run without a setting had none."""
    found = {"uniform_coef": 0.0, "entropy_coef": 0.0, "actor_loss_mean": "steps"} | report["settings"]
    return tuple(found[name] for name in ("uniform_coef", "entropy_coef", "actor_lr", "actor_loss_mean"))


def label(report):
    """'pull 0.005, bonus 0, rate 0.001, mean over steps'."""
    pull, bonus, rate, mean = settings(report)
    over = "steps" if mean == "steps" else "steps and agents"
    share = report["settings"].get("averaging")
    average = f", average of actors ({share:g})" if share else ""
    trial = ", trial seeds" if report["seeds"][0] > 200 else ""
    return f"pull {pull:g}, bonus {bonus:g}, rate {rate:g}, mean over {over}{average}{trial}"


def same_training(*reports):
    """The reports with the runs that are the same but for their evaluations, as exploring curves tell.

    Seeds that one of them lacks are left out, and so are those that went on from a checkpoint or ran on
    unlike processors, whose rounding battles blow up into other runs.
    """
    one, other = ({run["seed"]: run["curves"]["charts/win_rate"] for run in x["runs"]} for x in reports)
    same = {seed for seed, curve in one.items() if curve == other.get(seed)}
    return [x | {"runs": [run for run in x["runs"] if run["seed"] in same]} for x in reports]


def later(report):
    """The evaluations that follow the first of at least TARGET of every run, in one list."""
    found = []
    for run in report["runs"]:
        values = run["curves"]["eval/win_rate"]["value"]
        first = next((i for i, value in enumerate(values) if value >= TARGET), len(values))
        found += values[first + 1 :]
    return found


def fallen(values):
    """'2 of 30', of evaluations that are below TARGET."""
    return f"{sum(value < TARGET for value in values)} of {len(values)}"


def average_table(pairs):
    """Two rows per map of {map: (set with the average, set with the latest actor)}."""
    rows = []
    for name, both in pairs.items():
        limits = [min(map(length, both))]
        for kind, report in zip(("average", "latest"), both, strict=True):
            after = later(report)
            lowest = f"{min(after):.2f}" if after else "-"
            rows.append([name, kind, len(report["runs"]), *reached(report), fallen(after), lowest, ""])
        rows[-2][-1] = between(improvement, *(columns([x], "greedy", limits) for x in both))
    header = f"map, actor, seeds, reached {TARGET:g}, median steps, below it later, lowest later"
    return markdown_table([*header.split(", "), "P(average is better)"], rows)


def rivals(maps):
    """(map, steps set, agents set) where both have the settings that this was measured with."""
    for name, sets in maps.items():
        by_mean = {}
        for report in sets.values():
            *rest, mean = settings(report)
            if rest == [0.0, 0.05, 1e-3]:
                by_mean[mean] = report
        if len(by_mean) == 2:
            yield name, by_mean["steps"], by_mean["agents"]


def scale_table(maps):
    """Steps against steps and agents, a row per map and one across them; and P of the last row in words."""
    pairs, rows = list(rivals(maps)), []
    for names, chosen in [*((name, [pair]) for name, *pair in pairs), ("all", [x[1:] for x in pairs])]:
        limits = [min(map(length, pair)) for pair in chosen]
        cells = []
        for kind in ("greedy", "exploring"):
            cells.append(between(improvement, *(columns(x, kind, limits) for x in zip(*chosen, strict=True))))
        rows.append([names, *cells])
    header = ["map", "P(mean over steps is better), greedy", "P, exploring"]
    return markdown_table(header, rows), rows[-1][1:]


def main(argv=None):
    no_arguments(__doc__, argv)
    reports, fig3, maps = load_sets("default"), load_sets("fig3"), {}
    for name, report in reports.items():
        sets = maps.setdefault(task_of(name, report), {})
        if label(report) in sets:
            sys.exit(f"default.py: docs/results/default has two sets of the settings of {name}")
        sets[label(report)] = report
    names = ("dop_mmm", "dop_mmm_bonus", "dop_mmm_no_bonus", "dop_3m_bonus", "dop_3m", "dop_2s3z")
    names = [name + common.NO_CHASE for name in names]
    wanted = [f"bonus_0.05_rate_1e-3_{name}{common.NO_CHASE}" for name in ("3m", "2s3z")]
    needed = (*wanted, "average_mmm")
    if missing := [x for x in names if x not in fig3] + [x for x in needed if x not in reports]:
        sys.exit(f"default.py: docs/results has no {', '.join(missing)} yet")
    trials = [reports[name] for name in wanted]
    chosen, bonus, former, bonus_3m, *own = (fig3[name] for name in names)
    rest = {label(report): report for report in (chosen, bonus, former)}
    maps.setdefault(task_of(names[0], chosen), {}).update(rest)
    if not list(rivals(maps)):
        sys.exit("default.py: docs/results/default has no sets of both means yet")
    table, (greedy, exploring) = scale_table(maps)
    averaged = {task_of(name, x): x for name, x in reports.items() if name.startswith("average_")}
    if missing := [x for x in (set_on("dop", task) for task in averaged) if x not in fig3]:
        sys.exit(f"default.py: docs/results/fig3 has no {', '.join(missing)} yet")
    pairs = {task: same_training(x, fig3[set_on("dop", task)]) for task, x in sorted(averaged.items())}
    pairs = {task: pair for task, pair in pairs.items() if pair[0]["runs"]}
    falls = [f"{name} {fallen(later(new))} ({fallen(later(old))})" for name, (new, old) in pairs.items()]
    on_3m, with_bonus, tried = (reached(x)[0].split(" (")[0] for x in (own[0], bonus_3m, trials[0]))
    on_2s3z, trial_2s3z = (reached(x)[1] for x in (own[1], trials[1]))
    text = f"""After a seed's first evaluation of {TARGET:g} or more, this many of its later ones are below,
    average of actors (latest actor): {"; ".join(falls)}. All else is of the latest actor, without chase. Half
    of the seeds reach a greedy win rate of {TARGET:g} on MMM by {reached(chosen)[1]} steps with the default,
    {reached(bonus)[1]} with an entropy bonus instead, {reached(former)[1]} with neither; on 3m {on_3m} seeds
    reach it, {with_bonus} with the bonus (and {tried} trial seeds); on 2s3z half by {on_2s3z} steps,
    {trial_2s3z} with the bonus (trial seeds). A run with the mean over steps is better than one with the mean
    over steps and agents with probability {greedy} by the greedy win rate, {exploring} by the exploring one
    (with the bonus)."""
    parts = [READ, "## Average of actors"]
    curves = {name: {"average of actors": new, "latest actor": old} for name, (new, old) in pairs.items()}
    without = {task: curves.pop(task) for task in list(curves) if set_on("", task).endswith(common.NO_CHASE)}
    for end, panels in (("", curves), (common.NO_CHASE, without)):
        draw_panels(panels, common.RESULTS / "default" / f"average{end}.png", "eval/win_rate")
        parts.append(f"![average of actors and latest actor](average{end}.png)")
    parts += [AVERAGE.format(target=TARGET), average_table(pairs)]
    parts += ["## Scale of the actor's loss", table]
    for name, sets in sorted(maps.items()):
        parts += [f"## {name}", table_of(dict(sorted(sets.items())))]
    parts += ["## How to read", HOW, LEGEND, "Written by `python benchmark/default.py`."]
    write_page("default", "DOP's default settings", CLAIM, text, *parts, sources("default", reports))


if __name__ == "__main__":
    main()
