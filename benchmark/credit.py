"""docs/results/fig4/credit.*: what deterministic DOP credits each agent of the mill with, over training.

    python benchmark/credit.py --seed 1
    python benchmark/credit.py --seed 1 --runs runs/fig4/dop_mill/seed_*/mill__*

trains `dop_deterministic.py --env mill` in a process of its own and reads model.pt whenever it has been
replaced. Of each checkpoint it evaluates agent i's part of the critic, k_i(s) Q_i(s, a_i), for forces a_i
from -1 (counter-clockwise) to 1 (clockwise), averaged over the states that its greedy policy meets in 64
games of fixed seeds: Fig. 4, right, of [DOP], which has Q_i. `--runs` adds finished runs to the table.
What stands behind ` -- ` goes to the program. particles.py writes the page.
[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import machine
from benchmark import common
from benchmark.common import ROOT, describe, markdown_table, metadata, new_parser, write_json
from dop_deterministic import Actor, DecomposedCritic, act
from envs import evaluate, make
from envs.evaluation import SEED

FORCES = torch.linspace(-1, 1, 21)  # (F,)
GAMES = 64


def train(seed, save_every, extra):
    """Checkpoints of a new run, in the order of their steps."""
    checkpoints, stamp, running = {}, None, True
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(ROOT / "dop_deterministic.py"), "--env", "mill", "--seed", str(seed)]
        words += ["--save-every", str(save_every), "--run-dir", folder, *extra]
        with subprocess.Popen(words, cwd=ROOT) as process:
            while running:
                running = process.poll() is None  # before the look at the file, so as not to miss the last
                for path in Path(folder).glob("*/model.pt"):
                    if stamp != (stamp := path.stat().st_mtime_ns):
                        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                        checkpoints[checkpoint["global_step"]] = checkpoint
                time.sleep(0.05)
        if process.returncode:
            sys.exit(f"credit.py: {shlex.join(words)} ended with exit code {process.returncode}")
    return list(checkpoints.values())


@torch.no_grad()
def measure(checkpoint):
    """Step, win rate and, per agent: mean greedy force, k_i, Q_i and k_i Q_i over FORCES, as lists.

    Raises SystemExit for a checkpoint of another program or environment.
    """
    args = types.SimpleNamespace(**checkpoint["args"])
    if (checkpoint["program"], args.env) != ("dop_deterministic", "mill"):
        sys.exit(f"credit.py: needs dop_deterministic on mill, got {checkpoint['program']} on {args.env}")
    env = make("mill", GAMES, validate=False)
    actor, critic = Actor(env, args), DecomposedCritic(env, args)
    actor.load_state_dict(checkpoint["actor"])
    critic.load_state_dict(checkpoint["critic"])
    win_rate = evaluate(env, partial(act, actor))["win_rate"]

    states, pushes = [], []
    obs, _ = env.reset(seed=SEED)
    for _ in range(env.episode_limit):
        states.append(env.state())
        pushes.append(act(actor, obs, None)[0])  # (B, N, 1)
        obs, *_ = env.step(pushes[-1])
    state = torch.cat(states)  # (M, S), all steps of all games
    q, credit = [], []
    for force in FORCES:
        # an agent's value depends on no other's action: all can be tried at once
        q_force, k, _ = critic(state, force.expand(len(state), env.n_agents, 1))  # (M, N)
        q.append(q_force.mean(0))
        credit.append((k * q_force).mean(0))
    return {
        "step": checkpoint["global_step"],
        "seed": args.seed,
        "win_rate": win_rate,
        "force": rounded(torch.cat(pushes).mean((0, 2))),  # (N,)
        "k": rounded(k.mean(0)),  # (N,)
        "q": rounded(torch.stack(q, 1)),  # (N, F)
        "credit": rounded(torch.stack(credit, 1)),  # (N, F)
    }


def rounded(x):
    return x.double().mul(1e4).round().div(1e4).tolist()


def differences(measured, key):
    """Clockwise minus counter-clockwise at full force, one per agent."""
    return [curve[-1] - curve[0] for curve in measured[key]]


def draw(checkpoints, out):
    """A panel per agent: its part of Q_tot minus the mean over forces, by own force and training step."""
    credit = torch.tensor([x["credit"] for x in checkpoints])  # (C, N, F)
    credit = credit - credit.mean(2, keepdim=True)
    push = torch.tensor([x["force"] for x in checkpoints])  # (C, N)
    steps, limit = [x["step"] for x in checkpoints], credit.abs().max().item()
    columns = 5
    rows = -(-credit.shape[1] // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(10.4, 2.6 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for i, axes in enumerate(grid.flat[: credit.shape[1]]):
        values = FORCES.numpy(), steps, credit[:, i].numpy()
        picture = axes.pcolormesh(*values, cmap="RdBu_r", vmin=-limit, vmax=limit, shading="nearest")
        axes.plot(push[:, i].tolist(), steps, color="black", linewidth=1.2)
        axes.set_title(f"agent {i + 1}", fontsize=9)
        axes.set_xticks([-1, 0, 1])
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel("own force (clockwise is positive); black: mean of the greedy policy", fontsize=9)
    figure.supylabel("environment steps", fontsize=9)
    figure.colorbar(picture, ax=grid, label=r"$k_i Q_i$ minus its mean over forces", fraction=0.02)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def section(content):
    """What credit.json says, as a section of fig4/README.md."""
    checkpoints, finished = content["checkpoints"], content["finished"]
    last = checkpoints[-1]
    columns = [last["force"], last["k"], differences(last, "q"), differences(last, "credit")]
    rows = [[i + 1, *(f"{x:.3f}" for x in row)] for i, row in enumerate(zip(*columns, strict=True))]
    header = ["agent", "greedy force", "k_i", "Q_i: clockwise minus counter-clockwise", "the same of k_i Q_i"]
    text = f"""## Credit on the mill (Fig. 4, right)

Agent i's part of Q_tot = sum_i k_i Q_i + b, by its own force and over training: k_i Q_i, as Q_i alone cannot
be compared between agents of different k_i. Averages over the states that the greedy policy of each
checkpoint meets in {GAMES} games with fixed seeds. Only clockwise wins: a team that spins the stone the
other way gets -10. One agent may push the wrong way while nine win, two may not.

![what each agent is credited with](credit.png)

At the last of {len(checkpoints)} checkpoints (step {last["step"]:,}, seed {last["seed"]}) the greedy win rate
is {last["win_rate"]:.2f}, and {above(last)} agents have clockwise above counter-clockwise. Force and k_i are
means over the same states.

{markdown_table(header, rows)}"""
    if finished:
        rows = [[x["seed"], f"{x['step']:,}", f"{x['win_rate']:.2f}", above(x)] for x in finished]
        header = ["seed", "steps", "greedy win rate", "agents with clockwise above"]
        text += f"\nOther finished runs, at their end:\n\n{markdown_table(header, rows)}"
    return f"{text}\n{describe(content)}"


def above(measured):
    """'9 of 10': agents whose value of full force clockwise is above that of counter-clockwise."""
    greater = [x > 0 for x in differences(measured, "q")]
    return f"{sum(greater)} of {len(greater)}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = new_parser(__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of the run")
    parser.add_argument("--save-every", type=int, default=2000, help="environment steps between checkpoints")
    parser.add_argument("--runs", nargs="+", default=[], type=Path, help="run folders of finished runs")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    out, finished = common.RESULTS / "fig4" / "credit.json", []
    recorded = len(json.loads(out.read_text())["finished"]) if out.exists() else 0
    if args.save_every < 1 or recorded > len(args.runs):
        parser.error(
            f"--save-every must be at least 1, and --runs name {recorded} runs, as many as {out} has"
        )
    for run in args.runs:
        finished.append(measure(machine.read(run, "cpu")))
    finished.sort(key=lambda measured: measured["seed"])
    checkpoints = [measure(x) for x in train(args.seed, args.save_every, argv[cut + 1 :])]
    facts = metadata(__file__, argv, threads=torch.get_num_threads())
    content = facts | {"forces": rounded(FORCES), "checkpoints": checkpoints, "finished": finished}
    write_json(out, content)
    draw(checkpoints, out.with_suffix(".png"))
    print(f"{above(checkpoints[-1])} agents have clockwise above; written: {out} and .png")


if __name__ == "__main__":
    main()
