"""All pages of docs/results from the files beside them, and their index: each with claim, answer and link.

    python benchmark/report.py

Calls the scripts of the figures (cdm.py, smac.py, default.py, settings.py, particles.py, quadratic.py,
sequential.py) and diffs.py, writes the pages of engine/, scripted/ and sc2/ from what throughput.py,
training_speed.py, update_speed.py, scripted.py and fidelity.py measured, and README.md from the first lines
of every page; `--index` writes README.md only."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import (
    cdm,
    common,
    default,
    diffs,
    fidelity,
    particles,
    quadratic,
    scripted,
    sequential,
    settings,
    smac,
    throughput,
    training_speed,
    update_speed,
)
from benchmark.common import load, markdown_table, new_parser, write_page

HEADER = """# Results

What the papers claim, what we find, and a page for each with figure, tables, commands, commits, seeds and
hardware. Written by `python benchmark/report.py`; [docs/benchmark.md](../benchmark.md) tells how to run
them. [DOP]: Wang et al., ICLR 2021; [MASQL]: Wei et al., AAAI Spring Symposium 2018.

Begin with [Fig. 3](fig3/README.md) and [Fig. 4](fig4/README.md) of DOP. Numbers in square brackets are 95%
intervals over seeds. Most runs are far shorter than the papers', and battles are those of this repository's
own simulator.
"""
ENGINE_TITLES = {
    "throughput": "Steps per second beside SMAX",
    "throughput_one_core": "Steps per second beside the torch engine, one core",
    "throughput_compiled": "Steps per second beside the torch engine compiled, one core and two",
    "throughput_1024_games": "Steps per second of many games beside the torch engine, two cores",
    "throughput_1024_games_passive": "The same where torch's idle threads sleep",
    "training_speed": "A training run beside the torch engine's commit",
    "update_speed": "A training iteration beside stand-ins of the official updates",
    "throughput_particles": "Steps per second of particle tasks, beside mpe2 and vmas",
}
SCRIPTS = {"training_speed": training_speed, "update_speed": update_speed}
ENGINE_CLAIM = """Ours: a step of the environment costs little beside the learning, and on a CPU the battles
are faster than SMAX's at the sizes that are trained with."""
SCRIPTED_CLAIM = """Ours, a check of the simulator's sense: idle teams never win, random ones only against
banelings, which scattered zealots survive; simple rules of shooting win some maps, giving way others."""

GAME_CLAIM = """Ours: beside the game's own time, wrapper and workers cost little, and games step at the same
time."""


def engine(files):
    """The page of everything that measures speed."""
    ratios, parts = {}, []
    for name in sorted(files, key=lambda name: (*ENGINE_TITLES, name).index(name)):
        script = throughput if name.startswith("throughput") else SCRIPTS.get(name)
        text = script.section(files[name]) if script else f"[{name}.json]({name}.json)"
        parts += [f"## {ENGINE_TITLES.get(name, name)}", text]
        for result in files[name]["results"] if script is throughput else []:
            speeds = {way: x["steps_per_second"] for way, x in result["ways"].items()}
            for peer in speeds.keys() - {"ours", "mpe2"}:  # mpe2 has no batch
                name = peer.replace("torch", "our former torch engine").replace("_", " ")
                ratios.setdefault(name, []).append(speeds["ours"] / speeds[peer])
    told = [f"{min(x):.1f} to {max(x):.1f} times {peer}" for peer, x in sorted(ratios.items())]
    answer = f"Steps per second: {', '.join(told)}"
    if "training_speed" in files:
        run = files["training_speed"]["results"]["this commit"]
        answer += f"; env.step takes {run['step_seconds'] / run['seconds']:.1%} of a training run"
    write_page("engine", "Speed", ENGINE_CLAIM, f"{answer}.", *parts)


def teams(files):
    """The page of scripted teams."""
    parts, answer = [], "Not measured"
    if "battles" in files:
        parts.append(scripted.battles_section(files["battles"]))
        rates = {}
        for x in files["battles"]["results"]:
            rates.setdefault(x["team"], []).append(x["win_rate"])
        told = [f"{team} {min(x):.2f} to {max(x):.2f}" for team, x in rates.items()]
        answer = f"Win rates over the maps: {', '.join(told)}"
    if "rules" in files:
        parts.append(scripted.rules_section(files["rules"]))
    if "particles" in files:
        parts.append(scripted.particles_section(files["particles"]))
    write_page("scripted", "Scripted teams", SCRIPTED_CLAIM, f"{answer}.", *parts)


def game(files):
    """The page of StarCraft II beside the embedded engine."""
    parts, told = [], [f"{name}: {x['verdict']}" for name, x in files.items() if "verdict" in x]
    told = told or ["The engines were not compared, as StarCraft II was not at hand"]
    for name, report in files.items():
        parts += [f"## {name.replace('_', ' ')}", fidelity.section(report)]
        if name == "speed":
            (*_, ours, client), rows = report["results"][0], report["results"]
            costs = [f"{row[ours]:.1f} ms of CPU per game and step with {row['games']}" for row in rows]
            told.append(f"{ours} take {', '.join(costs)} (client: {client})")
    write_page("sc2", "StarCraft II through SMAC's interface", GAME_CLAIM, f"{'; '.join(told)}.", *parts)


def index():
    """README.md: a line per page."""
    rows = []
    for page in sorted(common.RESULTS.glob("*/README.md")):
        head = re.findall(r"^(?:# |\*\*Claim\.\*\* |\*\*Answer\.\*\* )(.*)$", page.read_text(), re.MULTILINE)
        rows.append([f"[{head[0]}]({page.parent.name}/README.md)", *head[1:3]])
    path = common.RESULTS / "README.md"
    path.write_text(f"{HEADER}\n{markdown_table(['page', 'claim', 'answer'], rows)}")
    print(f"written: {path}")


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--index", action="store_true", help="write README.md only")
    if not parser.parse_args(argv).index:
        for script in (cdm, smac, default, settings, particles, quadratic, sequential, diffs):
            script.main([])
        engine(load("engine"))
        teams(load("scripted"))
        game(load("sc2"))
    index()


if __name__ == "__main__":
    main()
