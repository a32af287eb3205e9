"""Four scripted teams on SMAC maps: what does each win, for how much return? A sanity check of the battles.

    python benchmark/scripted.py
    python benchmark/scripted.py --maps MMM --games 2048

They see what learning agents see: masks and observations. A result is over the first episode of every
parallel game, so that short episodes do not count more often. Writes docs/results/scripted.json and .md.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import ENGINE, RESULTS, ROOT, describe, markdown_table, metadata, write_json
from envs import make

MAPS = ["MMM", "3m", "8m", "2s3z", "3s5z", "10m_vs_11m"]
TEAMS = {
    "random": "a random legal action",
    "stop": "never moves, never shoots",
    "nearest": "attacks the nearest enemy in reach, else walks east",
    "weakest": "attacks the enemy in reach with the least hp and shield, else walks east",
}
NO_OP, STOP, EAST, FIRST_TARGET = 0, 1, 4, 6


class Layout:
    """Where the observation of a map holds what a script needs; from the map's public facts."""

    def __init__(self, map_name):
        facts = json.loads((ROOT / "envs" / "smac_maps.json").read_text())["maps"]
        facts = {name.lower(): value for name, value in facts.items()}[map_name.lower()]
        units = json.loads((ROOT / "envs" / "smac_units.json").read_text())["units"]
        self.n_enemies, self.enemy_features = facts["sizes"]["enemy_feats"]
        self.n_allies, self.ally_features = facts["sizes"]["ally_feats"]  # the others, N - 1
        self.enemy_shields = facts["enemy_race"] == "P"
        order = [group["unit"].lower() for group in facts["agent_id_order"] for _ in range(*ids(group))]
        self.medivac = torch.tensor([name == "medivac" for name in order])  # (N,)
        life = [
            units[spawn["unit"].lower()] for spawn in facts["enemy_spawns"] for _ in range(spawn["count"])
        ]
        self.hp_max = torch.tensor([float(unit["hp"]) for unit in life])  # (M,)
        self.shield_max = torch.tensor([float(unit["shield"]) for unit in life])  # (M,)

    def enemies(self, obs):
        """Rows about the enemies (B, N, M, F) of obs (B, N, O)."""
        return obs[..., 4 : 4 + self.n_enemies * self.enemy_features].unflatten(-1, (self.n_enemies, -1))

    def ally_life(self, obs):
        """Health (B, N, N) of agent j as agent i sees it; 0 where it does not, and for itself."""
        start = 4 + self.n_enemies * self.enemy_features
        rows = obs[..., start : start + self.n_allies * self.ally_features].unflatten(-1, (self.n_allies, -1))
        n = self.n_allies + 1
        others = ~torch.eye(n, dtype=torch.bool)
        life = obs.new_zeros(len(obs), n, n)
        life[:, others] = rows[..., 4].flatten(1)
        return life


def ids(group):
    """Range bounds of the agent ids of one entry of agent_id_order."""
    return group["agent_ids"][0], group["agent_ids"][1] + 1


def actions_of(team, obs, avail_actions, layout, generator):
    """Actions (B, N) of one scripted team from obs (B, N, O), avail_actions (B, N, A)."""
    if team == "random":
        noise = torch.rand(avail_actions.shape, generator=generator)
        return (noise + avail_actions).argmax(-1)
    dead = avail_actions[..., NO_OP]  # (B, N)
    idle = torch.where(dead, NO_OP, STOP)
    if team == "stop":
        return idle
    rows = layout.enemies(obs)  # (B, N, M, F)
    in_reach = avail_actions[..., FIRST_TARGET:]  # (B, N, M), for a medivac: agents that it can heal
    cost = distance = rows[..., 1]
    if team == "weakest":
        shield = rows[..., 5] * layout.shield_max if layout.enemy_shields else 0.0
        cost = rows[..., 4] * layout.hp_max + shield + 0.01 * distance  # the nearer of two equals
    target = cost.masked_fill(~in_reach, float("inf")).argmin(-1)  # (B, N)
    has_target = in_reach.any(-1)
    if layout.medivac.any():
        n = layout.n_allies + 1
        life = layout.ally_life(obs)
        can_heal = in_reach[..., :n] & (life < 1)  # (B, N, N)
        patient = life.masked_fill(~can_heal, float("inf")).argmin(-1)
        target = torch.where(layout.medivac, patient, target)
        has_target = torch.where(layout.medivac, can_heal.any(-1), has_target)
    east = torch.where(avail_actions[..., EAST], EAST, idle)
    return torch.where(has_target, FIRST_TARGET + target, east)


def play(map_name, team, games, seed):
    """Win rate, return, length and share of timeouts over the first episode of each game."""
    env, layout = make(map_name, num_envs=games, seed=seed), Layout(map_name)
    generator = torch.Generator().manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    running = torch.ones(games, dtype=torch.bool)
    won, total, length, timeout = (torch.zeros(games) for _ in range(4))
    while running.any():
        actions = actions_of(team, obs, env.avail_actions(), layout, generator)
        obs, _, terminated, truncated, info = env.step(actions)
        ended = running & (terminated | truncated)
        won[ended] = info["battle_won"][ended].float()
        total[ended], length[ended] = info["episode_return"][ended], info["episode_length"][ended].float()
        timeout[ended] = truncated[ended].float()
        running &= ~ended
    means = {"win_rate": won, "return": total, "length": length, "timeouts": timeout}
    return {name: round(value.mean().item(), 4) for name, value in means.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maps", nargs="+", default=MAPS, help="SMAC maps")
    parser.add_argument("--teams", nargs="+", default=list(TEAMS), choices=TEAMS, help="scripted teams")
    parser.add_argument("--games", type=int, default=512, help="parallel games of each")
    parser.add_argument("--seed", type=int, default=1, help="seed of the games and of random actions")
    parser.add_argument("--out", type=Path, default=RESULTS / "scripted", help="result files, without suffix")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "benchmark/scripted.py", *(sys.argv[1:] if argv is None else argv)])
    about = metadata(command, threads=torch.get_num_threads())
    about |= {"engine": ENGINE, "games": args.games, "seed": args.seed}
    results = []
    for map_name in args.maps:
        for team in args.teams:
            start = time.perf_counter()
            results.append({"map": map_name, "team": team, **play(map_name, team, args.games, args.seed)})
            print(results[-1], f"{time.perf_counter() - start:.1f} s", flush=True)
    write_json(args.out.with_suffix(".json"), {**about, "results": results})
    cells = {
        (x["map"], x["team"]): f"{x['win_rate']:.2f} / {x['return']:.1f} / {x['length']:.0f}" for x in results
    }
    table = markdown_table(
        ["map", *args.teams], [[name, *(cells[name, team] for team in args.teams)] for name in args.maps]
    )
    teams = "".join(f"- **{team}**: {TEAMS[team]}\n" for team in args.teams)
    text = f"""# Scripted teams

Win rate / return / length over {args.games} games, {ENGINE} (not StarCraft II).

{table}
{teams}
Medivacs of the last two teams heal the most hurt agent in reach, else fly east.

{describe(about)}
"""
    args.out.with_suffix(".md").write_text(text)
    print(f"\n{table}\nwritten: {args.out}.json and .md")


if __name__ == "__main__":
    main()
