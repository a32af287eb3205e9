"""How far the embedded engine is from StarCraft II: the same teams play a map in both, measure by measure.

    python benchmark/fidelity.py --env mmm
    python benchmark/fidelity.py --env mmm --games 8 --rounds 10 --runs runs/A runs/B
    python benchmark/fidelity.py --env mmm --speed      # instead of all that: what a step costs, and whom

Needs StarCraft II (docs/envs.md). Plays the five teams of scripted.py and the greedy policies of run folders,
whichever engine these were trained in. Damage: life and shield that the units of a type lose in an episode,
without what they regain; hits: how often a unit of it has less of both after a step than before. Writes
docs/results/sc2/<map>.json: means over episodes, and their difference in standard errors, which is by chance
beyond 3 once in 400 times; --speed writes speed.json. report.py makes a page of them.
"""

import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import RESULTS, ROOT, describe, markdown_table, metadata, new_parser, write_json
from benchmark.scripted import TEAMS, Layout, actions_of
from envs import make
from play import greedy, open_run

LIMIT = 3.0  # standard errors within which both engines count as equal
FEWEST = 0.01  # life that makes a hit


class Singles:
    """Games of an environment of their own each, with the random streams that clients of the game have."""

    def __init__(self, env_id, games, seed):
        self.games = [make(env_id, seed=seed + game, validate=False) for game in range(games)]
        self.num_envs, self.n_agents, self.map_name = games, self.games[0].n_agents, self.games[0].map_name
        self.device = self.games[0].device

    def reset(self):
        return torch.cat([game.reset()[0] for game in self.games]), {}

    def step(self, actions):
        parts = [game.step(actions[i : i + 1]) for i, game in enumerate(self.games)]
        *tensors, infos = zip(*parts, strict=True)
        keys = infos[0].keys() - {"episode"}  # which repeats others
        return *map(torch.cat, tensors), {key: torch.cat([info[key] for info in infos]) for key in keys}

    def state(self):
        return torch.cat([game.state() for game in self.games])

    def avail_actions(self):
        return torch.cat([game.avail_actions() for game in self.games])


class Lives:
    """Life and shield of all units, as the state of a map shows them."""

    def __init__(self, map_name):
        facts = json.loads((ROOT / "envs" / "smac_maps.json").read_text())["maps"][map_name]
        stats = json.loads((ROOT / "envs" / "smac_units.json").read_text())["units"]
        allies, enemies = ([spawn["unit"].lower() for spawn in facts[f"{side}_spawns"]] for side in SIDES)
        order = [group["unit"].lower() for group in facts["agent_id_order"]]
        reverse = facts["map_type"] == "stalkers_and_zealots"  # a quirk of SMAC's
        self.n_bits, self.counts = facts["unit_type_bits"], (facts["n_agents"], facts["n_enemies"])
        self.shields = [facts[f"{side}_race"] == "P" for side in SIDES]
        self.names = [order, order[::-1] if reverse else order] if self.n_bits else [allies[:1], enemies[:1]]
        self.most = [
            torch.tensor([[stats[x]["hp"], stats[x]["shield"]] for x in names]) for names in self.names
        ]

    def read(self, state):
        """state (B, S) -> for each side life (B, U, T) of its units in the column of their type."""
        sides, start = [], 0
        for side, count in enumerate(self.counts):
            width = 4 - side + self.shields[side] + self.n_bits
            rows = state[:, start : start + count * width].unflatten(1, (count, width))  # (B, U, F)
            start += count * width
            shield = rows[..., 4 - side] if self.shields[side] else torch.zeros_like(rows[..., 0])
            shares = torch.stack([rows[..., 0], shield], -1)  # (B, U, 2), of the most
            types = rows[..., width - self.n_bits :] if self.n_bits else torch.ones_like(rows[..., :1])
            sides.append((shares @ self.most[side].T.float()) * types)
        return sides


SIDES = ("ally", "enemy")


def play(env, choose, rounds):
    """Measure -> its values in all episodes, the first of every game in each round."""
    lives, episodes = Lives(env.map_name), {}
    for _ in range(rounds):
        obs, _ = env.reset()
        running, memory, lost = torch.ones(env.num_envs, dtype=torch.bool), None, {}
        while running.any():
            before = lives.read(env.state())
            actions, memory = choose(obs, env.avail_actions(), memory)
            obs, _, terminated, truncated, info = env.step(actions)
            for side, (old, new) in enumerate(zip(before, lives.read(info["final_state"]), strict=True)):
                loss = (old - new).clamp_min(0)  # (B, U, T)
                for column, name in enumerate(lives.names[side]):
                    for measure, x in (("damage to", loss), ("hits on", (loss > FEWEST).float())):
                        key = f"{measure} {SIDES[side]} {name}s"
                        lost[key] = lost.get(key, 0) + x[..., column].sum(1) * running  # (B,)
            ended = running & (terminated | truncated)
            running = running & ~ended
            ended = ended & ~info["broken"]  # what a game did not survive tells nothing
            names = {"win rate": "battle_won", "return": "episode_return", "length": "episode_length"}
            for key, value in [(key, info[name]) for key, name in names.items()] + list(lost.items()):
                episodes.setdefault(key, []).extend(value[ended].double().tolist())
    return episodes


def scripted(team, map_name, seed):
    """A team of scripted.py with random actions of its own, as a policy of evaluate()."""
    layout, generator = Layout(map_name), torch.Generator().manual_seed(seed)
    return lambda obs, avail_actions, memory: (actions_of(team, obs, avail_actions, layout, generator), None)


def compare(ours, theirs):
    """Mean in both engines, and the difference in standard errors."""
    x, y = (torch.tensor(values, dtype=torch.double) for values in (ours, theirs))
    error = math.sqrt(sum(values.var(correction=0).item() / len(values) for values in (x, y)))
    difference = y.mean().item() - x.mean().item()
    off = 0.0 if abs(difference) < 1e-6 else math.copysign(math.inf, difference)
    return x.mean().item(), y.mean().item(), difference / error if off and error else off


def cpu_seconds(pids):
    """What processes have used until now; Linux."""
    words = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(x[11]) + int(x[12]) for x in words) / os.sysconf("SC_CLK_TCK")


def speed(env_id, games, seed, steps):
    """Milliseconds of a step of all games (median), and CPU ms per game and step of us and of the clients."""
    env = make(env_id, games, seed=seed, validate=False)
    choose = scripted("random", env.map_name, seed)
    obs, _ = env.reset()
    workers = [worker.process.pid for worker in env._workers]
    clients = [Path(f"/proc/{pid}/task/{pid}/children").read_text().split() for pid in workers]
    name = (
        "stand-in" if b"fake_sc2" in Path(f"/proc/{clients[0][0]}/cmdline").read_bytes() else "StarCraft II"
    )
    parts = {"learner and workers": [os.getpid(), *workers], name: sum(clients, [])}
    before, times = {name: cpu_seconds(pids) for name, pids in parts.items()}, []
    for _ in range(steps):
        actions, _ = choose(obs, env.avail_actions(), None)
        start = time.perf_counter()
        obs = env.step(actions)[0]
        times.append(time.perf_counter() - start)
    per = 1000 / (games * steps)
    used = {name: (cpu_seconds(pids) - before[name]) * per for name, pids in parts.items()}
    env.close()
    return {"games": games, "step of all games": 1000 * statistics.median(times)} | used


def speed_table(report):
    """What --speed measured, as a Markdown table under the variables of the stand-in."""
    rows = report["results"]
    extra = [f", {name}={value}" for name, value in report.items() if name.startswith("FAKE_SC2_")]
    header = ["games", "step of all games, ms (median)"]
    header += [f"{name}, CPU ms per game and step" for name in list(rows[0])[2:]]
    table = markdown_table(header, [[f"{x:.3g}" for x in row.values()] for row in rows])
    return f"{report['steps']} steps of random agents{''.join(extra)}.\n\n{table}"


def comparison_table(report):
    """Measure by measure, as a Markdown table under the verdict."""
    numbers = ("embedded", "sc2", "standard_errors")
    rows = [[x["team"], x["measure"], *(f"{x[name]:.3g}" for name in numbers)] for x in report["results"]]
    header = ["team", "mean per episode", "embedded engine", "StarCraft II", "difference in standard errors"]
    episodes = f"{report['games'] * report['rounds']} episodes of each team in each engine"
    return f"{episodes}; {report['verdict']}.\n\n{markdown_table(header, rows)}"


def write(out, argv, **facts):
    """Write a file, and print what it says."""
    report = metadata(__file__, argv, threads=torch.get_num_threads()) | facts
    write_json(Path(f"{out}.json"), report)
    print(f"{section(report)}\nwritten: {out}.json")


def section(report):
    """What a file of this script says, in Markdown."""
    return f"{(comparison_table if 'verdict' in report else speed_table)(report)}\n{describe(report)}\n"


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--env", default="mmm", help="map, without sc2: (arguments of sc2: behind commas)")
    parser.add_argument("--games", type=int, default=8, help="parallel games, about 1 GB of memory each")
    parser.add_argument("--rounds", type=int, default=4, help="episodes of each game and team")
    parser.add_argument("--teams", nargs="*", default=list(TEAMS), choices=TEAMS, help="scripted teams")
    parser.add_argument("--runs", nargs="*", default=[], help="run folders whose policies play, too")
    parser.add_argument("--seed", type=int, default=1, help="seed of the games and of random actions")
    parser.add_argument("--speed", action="store_true", help="only measure the time of a step")
    parser.add_argument("--steps", type=int, default=300, help="of --speed")
    parser.add_argument("--out", type=Path, help="result file, without suffix")
    args = parser.parse_args(argv)
    try:
        if args.speed:
            rows = [speed(f"sc2:{args.env}", games, args.seed, args.steps) for games in (1, args.games)]
            extra = {name: value for name, value in os.environ.items() if name.startswith("FAKE_SC2_")}
            return write(args.out or RESULTS / "sc2" / "speed", argv, steps=args.steps, **extra, results=rows)
        real = make(f"sc2:{args.env}", args.games, seed=args.seed, validate=False)
    except ValueError as error:
        sys.exit(f"fidelity.py: {error}")
    learnt = {run: greedy(*open_run(run), real, args.env) for run in args.runs}
    ours = Singles(real.map_name, args.games, args.seed)
    results = []
    for name in [*args.teams, *args.runs]:
        sides = []
        for env in (ours, real):
            choose = learnt.get(name) or scripted(name, real.map_name, args.seed)
            sides.append(play(env, choose, args.rounds))
        for measure, values in sides[0].items():
            mean, other, off = compare(values, sides[1][measure])
            results.append(dict(team=name, measure=measure, embedded=mean, sc2=other, standard_errors=off))
    real.close()
    different = [result for result in results if abs(result["standard_errors"]) > LIMIT]
    verdict = f"{len(different)} of {len(results)} measures differ by more than {LIMIT:g} standard errors"
    if not different:
        verdict = f"equal: none of {len(results)} measures differs by more than {LIMIT:g} standard errors"
    facts = dict(games=args.games, rounds=args.rounds, seed=args.seed, verdict=verdict)
    write(args.out or RESULTS / "sc2" / real.map_name, argv, **facts, results=results)


if __name__ == "__main__":
    main()
