"""docs/results/fig1/README.md: who finds the optimum of the mismatch game and who holds it, per protocol.

    python benchmark/cdm.py

Reads the files <protocol>_<method>.json there that run_seeds.py wrote (docs/benchmark.md has the protocols).
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021, section 3.1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import common
from benchmark.common import load_sets, markdown_table, no_arguments, sources, write_page
from benchmark.plot import plt
from benchmark.stats import success_rate, wilson

METHODS = {
    "dop": "DOP", "dop_on_policy": "DOP, on-policy only", "coma": "COMA", "maddpg": "MADDPG",
    "dop_deterministic": "deterministic DOP", "maac": "MAAC", "qmix": "QMIX",
    "coma_4": "COMA, an iteration per 4 games, not 8", "maddpg_128": "MADDPG, replay of 128 steps",
}  # fmt: skip
PROTOCOLS = {
    "guided": "every method with its preset",
    "equal": "replay of 5,000 steps and learning rates of 5e-4 in all, a reading of Appendix G.1 of [DOP]",
}
LAST = 5  # evaluations
CLAIM = """The paper, section 3.1: with a joint critic, COMA, MADDPG and MAAC explore the optimum of this
game (10 agents, 10 actions, +10 if all take the first, else -10) but cannot learn it; DOP converges to it
with the same replay."""
ANSWER = """In part: DOP holds the optimum at the end in {dop} seeds, COMA in {coma} (in the others it misses
or loses it), but MADDPG with its replay holds it as well ({maddpg}; with a replay of 128 steps {maddpg_128};
with DOP's replay and rates {equal_maddpg}, deterministic DOP with them {equal_dop_deterministic}); MAAC:
{maac}, with DOP's replay and rates {equal_maac}."""
READING = """Under protocol guided either is nearly enough: a decomposed critic, even with next to no replay
(on-policy DOP draws from the latest 32 episodes), or replay, even without decomposition (MADDPG). Without
both (COMA, also with as many iterations as DOP; MADDPG with a replay of 128 steps) the optimum is missed or
lost in a quarter of the seeds and more. Under protocol guided DOP's critics and QMIX's mixing hardly ever
leave it once found, nor does MAAC. But with equal replay and rates MADDPG never leaves it in at least as many
seeds as deterministic DOP, whose preset has slower actors: between these two replay and rates, which were
changed together, seem to decide, not the decomposition. Networks, batches, discount, policy delay and the
targets' share are each method's own. Under "equal" DOP, QMIX and COMA, which has no replay, would have what
their presets say, so that their sets of "guided" stand for both. The paper's MAAC learns by Gumbel-softmax
samples, ours, as in its own paper, by the score function. Episodes have one step, so tree backup and
TD(lambda) are not exercised."""
LEGEND = f"""An evaluation returns 10 or -10. Found: 10 in at least one. Held: 10 in each of the last {LAST}.
Lost: found and not held. Never left: 10 in each evaluation after the first with 10. Numbers of seeds, with
Wilson's 95% interval; so are the bands in the figure."""


def outcomes(report):
    """(found, held, never left) per run."""
    for run in report["runs"]:
        optimal = [value > 9 for value in run["curves"]["eval/episodic_return"]["value"]]
        first = optimal.index(True) if any(optimal) else None
        yield any(optimal), all(optimal[-LAST:]), first is not None and all(optimal[first:])


def held(report):
    """'30 of 30': seeds that hold the optimum at the end."""
    results = [x for _, x, _ in outcomes(report)]
    return f"{sum(results)} of {len(results)}"


def draw(methods, out):
    """Over steps, the share of seeds whose greedy play is the optimum, with Wilson's interval."""
    figure, axes = plt.subplots(figsize=(8.0, 4.0), layout="constrained")
    for name, report in methods.items():
        curves = [run["curves"]["eval/episodic_return"] for run in report["runs"]]
        found = [
            sum(value > 9 for value in values) for values in zip(*(x["value"] for x in curves), strict=True)
        ]
        low, high = zip(*(wilson(x, len(curves)) for x in found), strict=True)
        axes.plot(curves[0]["step"], [x / len(curves) for x in found], label=name, linewidth=2)
        axes.fill_between(curves[0]["step"], low, high, alpha=0.08, linewidth=0)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("share of seeds at the optimum")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(argv=None):
    no_arguments(__doc__, argv)
    reports, protocols = load_sets("fig1"), {}
    for name, report in reports.items():
        protocol, _, method = name.partition("_")
        if method not in METHODS:
            sys.exit(f"cdm.py: fig1/{name} is no <protocol>_<method>")
        protocols.setdefault(protocol, {})[method] = report
    if not protocols:
        sys.exit("cdm.py: docs/results/fig1 has no <protocol>_<method>.json yet")
    parts, cells = [], {}
    for protocol, methods in protocols.items():
        prefix = "" if protocol == "guided" else f"{protocol}_"
        cells |= {prefix + name: held(report) for name, report in methods.items()}
        methods = {METHODS[name]: methods[name] for name in METHODS if name in methods}
        rows = []
        for name, report in methods.items():
            found, kept, never_left = zip(*outcomes(report), strict=True)
            lost = [a and not b for a, b in zip(found, kept, strict=True)]
            rows.append([name, *map(success_rate, (kept, found, lost, never_left))])
        env = next(iter(methods.values()))["env"]
        draw(methods, common.RESULTS / "fig1" / f"{protocol}.png")
        table = markdown_table(["", "held", "found", "lost", "never left"], rows)
        told = PROTOCOLS.get(protocol, "settings as in the commands below")
        parts += [f"## Protocol {protocol}", f"`{env}`; {told}.", f"![{protocol}]({protocol}.png)", table]
    names = [*METHODS, *(f"equal_{name}" for name in METHODS)]
    answer = ANSWER.format(**dict.fromkeys(names, "not run") | cells)
    command = "Written by `python benchmark/cdm.py`."
    title = "Fig. 1 of DOP: the mismatch game"
    write_page("fig1", title, CLAIM, answer, *parts, LEGEND, READING, command, sources("fig1", reports))


if __name__ == "__main__":
    main()
