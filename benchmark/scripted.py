"""Scripted teams on SMAC maps or particle tasks: what does each win, for how much return? A sanity check.

    python benchmark/scripted.py
    python benchmark/scripted.py --maps MMM --games 2048
    python benchmark/scripted.py --rules
    python benchmark/scripted.py --particles

They see what learning agents see: masks and observations; but for `closest` and `rest`, which know where
all enemies are. A result is over the first episode of every parallel game, so that short episodes do not
count more often. Writes docs/results/scripted/battles.json, rules.json or particles.json; report.py writes
the page.
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import common
from benchmark.common import ENGINE, ROOT, describe, markdown_table, metadata, new_parser, write_json
from benchmark.stats import wilson
from envs import make
from envs.mpe import PAID_SPEED

MAPS = ["MMM", "3m", "8m", "2s3z", "3s5z", "1c3s5z", "10m_vs_11m", "so_many_baneling"]
MAPS += ["2m_vs_1z", "2s_vs_1sc", "3s_vs_3z", "3s_vs_5z", "2c_vs_64zg"]
TEAMS = {
    "random": "a random legal action",
    "stop": "never moves, never shoots",
    "nearest": "attacks the nearest enemy in reach, else walks to where the enemies began",
    "weakest": "attacks the enemy in reach with the least hp and shield, else walks as nearest does",
    "kite": "as weakest, but walks away from an enemy that is nearer than 3, aslant by a quarter",
}
# SMAC's own team without learning, and its win rate in StarCraft II
REST = """as closest, but whoever has lost its shield walks out of reach until nine tenths of it are back, as
long as the enemies have 100 of life left"""
CLOSEST = "an attack on the closest enemy, however far, until it is dead (`heuristic_ai` of SMAC)"
GAME = {"2s3z": 0.90, "3s5z": 0.42, "10m_vs_11m": 0.12} | dict.fromkeys(
    ("5m_vs_6m", "2s_vs_1sc", "3s_vs_5z", "6h_vs_8z", "corridor", "27m_vs_30m"), 0.0
)
TEAMS_OF_RULES = ["closest", "kite", "rest"]
RULES = [*GAME, "3s_vs_3z", "2m_vs_1z"]
NO_OP, STOP, FIRST_MOVE, FIRST_TARGET = 0, 1, 2, 6
MOVES = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]])  # north, south, east, west
RULES_OF = {"": "", ",chase=false": " without chase", ",ladder=true": " with the ladder's weapons"}
SIDES = ("enemy", "ally")
SIGHT = 9.0  # tiles
TOO_NEAR, SLANT = 3.0, 0.25  # of kite: tiles, and how far it turns right; of a coarse search on its maps
FAR, RESTED, LAST = 10.5, 0.9, 100.0  # of rest: tiles, share of the shield, life and shields of all enemies
RADII = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of aggregation
PARALLEL = 50_000  # games of a particle task


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
        sides = (torch.tensor([spawn["point"] for spawn in facts[f"{side}_spawns"]]) for side in SIDES)
        enemies, agents = (points.mean(0) for points in sides)
        self.forward = FIRST_MOVE + int((MOVES @ (enemies - agents)).argmax())  # the move to the enemies

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
    if team != "nearest":
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
    walk = torch.where(avail_actions[..., layout.forward], layout.forward, idle)
    actions = torch.where(has_target, FIRST_TARGET + target, walk)
    if team == "kite":
        gap, nearest = distance.where(distance > 0, float("inf")).min(-1)  # (B, N), 0: not seen
        x, y = rows[..., 2:4].gather(2, nearest[..., None, None].expand(-1, -1, 1, 2)).squeeze(2).unbind(-1)
        away = torch.stack([SLANT * y - x, -SLANT * x - y], -1)  # (B, N, 2)
        can_move = avail_actions[..., FIRST_MOVE:FIRST_TARGET]  # (B, N, 4)
        move = FIRST_MOVE + (away @ MOVES.T).masked_fill(~can_move, -float("inf")).argmax(-1)
        actions = torch.where((SIGHT * gap < TOO_NEAR) & can_move.any(-1), move, actions)
    return actions


def closest(env, target):
    """Actions (B, N) of SMAC's own team, and its targets (B, N) for the next; at first -1. No medivacs."""
    n, units = env.n_agents, env.units
    alive = units.hp > 0  # (B, U)
    place = torch.stack([units.x, units.y], -1)  # (B, U, 2)
    distance = torch.cdist(place[:, :n], place[:, n:]).masked_fill(~alive[:, None, n:], float("inf"))
    keeps = (target >= 0) & alive[:, n:].gather(1, target.clamp_min(0))
    target = torch.where(keeps, target, distance.argmin(-1))
    return torch.where(alive[:, :n], FIRST_TARGET + target, NO_OP), target


def rest(env, resting):
    """Actions (B, N) of the team that rests, and who does (B, N), 1 or not, for the next; at first -1."""
    n, units = env.n_agents, env.units
    actions, target = closest(env, torch.full_like(resting, -1))
    place = torch.stack([units.x, units.y], -1)  # (B, U, 2)
    away = place[:, :n] - place[:, n:].gather(1, target[..., None].expand(-1, -1, 2))  # (B, N, 2)
    shield, full = units.shield[:, :n], torch.tensor(env.sim.kinds["shield_max"][:n])
    resting = torch.where(resting == 1, shield < RESTED * full, (shield <= 0) & (full > 0))
    resting = resting & ((units.hp + units.shield)[:, n:].sum(1, keepdim=True) >= LAST)
    can_move = env.avail_actions()[..., FIRST_MOVE:FIRST_TARGET]  # (B, N, 4)
    move = FIRST_MOVE + (away @ MOVES.T).masked_fill(~can_move, -float("inf")).argmax(-1)
    move = torch.where((away.norm(dim=-1) < FAR) & can_move.any(-1), move, STOP)
    return torch.where(resting & (units.hp[:, :n] > 0), move, actions), resting.long()


KNOWING = {"closest": closest, "rest": rest}  # teams that know where all enemies are


def play(map_name, team, games, seed):
    """Win rate, return, length and share of timeouts over the first episode of each game."""
    env = make(map_name, num_envs=games, seed=seed, validate=team not in KNOWING)  # these ignore the mask
    layout, memory = Layout(map_name.split(",")[0]), torch.full((games, env.n_agents), -1)
    generator = torch.Generator().manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    running = torch.ones(games, dtype=torch.bool)
    won, total, length, timeout = (torch.zeros(games) for _ in range(4))
    while running.any():
        if team in KNOWING:
            actions, memory = KNOWING[team](env, memory)
        else:
            actions = actions_of(team, obs, env.avail_actions(), layout, generator)
        obs, _, terminated, truncated, info = env.step(actions)
        memory = memory.where(~(terminated | truncated)[:, None], -1)
        ended = running & (terminated | truncated)
        won[ended] = info["battle_won"][ended].float()
        total[ended], length[ended] = info["episode_return"][ended], info["episode_length"][ended].float()
        timeout[ended] = truncated[ended].float()
        running &= ~ended
    means = {"win_rate": won, "return": total, "length": length, "timeouts": timeout}
    return {name: round(value.mean().item(), 4) for name, value in means.items()}


def battles(maps, teams, games, seed):
    """Results of every team on every map."""
    results = []
    for map_name in maps:
        for team in teams:
            start = time.perf_counter()
            results.append({"map": map_name, "team": team, **play(map_name, team, games, seed)})
            print(results[-1], f"{time.perf_counter() - start:.1f} s", flush=True)
    return results


def battles_section(report):
    """What battles.json says, in Markdown."""
    results = report["results"]
    maps, teams = (list(dict.fromkeys(x[key] for x in results)) for key in ("map", "team"))
    cells = {
        (x["map"], x["team"]): f"{x['win_rate']:.2f} / {x['return']:.1f} / {x['length']:.0f}" for x in results
    }
    table = markdown_table(["map", *teams], [[name, *(cells[name, team] for team in teams)] for name in maps])
    legend = "".join(f"- **{team}**: {TEAMS[team]}\n" for team in teams)
    return f"""## SMAC maps

Win rate / return / length over {report["games"]} games, {report["engine"]} (not StarCraft II).

{table}
{legend}
Medivacs of the last three teams heal the most hurt agent in reach, else fly ahead. Battles of a map begin
alike and differ only by the weapons' random delays, so a scripted team tends to win nearly always or nearly
never, and a small change of a rule can turn a map over: a fingerprint of this simulator, no measure of a
map's difficulty in the game.

{describe(report)}
"""


def rules_section(report):
    """What rules.json says, in Markdown."""
    rates = {(x["map"], x["team"]): f"{x['win_rate']:.2f}" for x in report["results"]}
    rows = []
    for name in dict.fromkeys(x["map"].split(",")[0] for x in report["results"]):
        game = f"{GAME[name]:.2f}" if name in GAME else "-"
        rows.append([name, game, *(rates[name + rule, team] for team in TEAMS_OF_RULES for rule in RULES_OF)])
    header = ["map", "closest in the game"]
    header += [team + words for team in TEAMS_OF_RULES for words in RULES_OF.values()]
    return f"""## SMAC's own team

Win rates over {report["games"]} games. **closest**: {CLOSEST}; the game's are of the appendix of Rashid et
al., JMLR 2020, as a public repository quotes them. **kite**: as above. **rest**: {REST}.
Without chase: the maps with `,chase=false`; with the ladder's weapons: with `,ladder=true`
([rules](../../envs.md#rules-of-the-simulator)).

{markdown_table(header, rows)}
{describe(report)}
"""


# ---- particle tasks ----
def steer(team, obs, generator):
    """Forces (B, N, 2) on aggregation from obs (B, N, O); "mixed": agent 0 is random, the others greedy."""
    random = 2 * torch.rand(*obs.shape[:2], 2, generator=generator) - 1
    landmark = obs[..., 4:6]  # relative to oneself; velocity and position are before it
    greedy = landmark / landmark.norm(dim=-1, keepdim=True).clamp_min(1)
    return {"random": random, "greedy": greedy, "mixed": torch.cat([random[:, :1], greedy[:, 1:]], 1)}[team]


def gather(team, games, seed):
    """The first step (B, R) at which all agents are within each of RADII of the landmark; 26: never."""
    env = make("aggregation", num_envs=games, seed=seed, validate=False, radius=1e-9)  # so nobody ends early
    # not the seed of the scenes, which would draw the same numbers
    generator, n = torch.Generator().manual_seed(seed + 1), env.n_agents
    obs, _ = env.reset(seed=seed)
    arrived = torch.full((games, len(RADII)), env.episode_limit + 1)
    for step in range(1, env.episode_limit + 1):
        obs, _, _, _, info = env.step(steer(team, obs, generator))
        offsets = info["final_state"][:, 2 * n : 4 * n].unflatten(1, (n, 2))  # from the landmark
        farthest = torch.hypot(*offsets.unbind(2)).amax(1)  # (B,)
        inside = farthest[:, None] < torch.tensor(RADII)  # (B, R)
        arrived = torch.where(inside, arrived.clamp_max(step), arrived)
    return arrived


def push(forces, **options):
    """Play forces (B, 10, N) on the mill -> omega (B, 10), step of the win (B,), 0: none, and return (B,)."""
    env = make("mill", num_envs=len(forces), validate=False, **options)
    env.reset()
    speeds, total = [], torch.zeros(len(forces))
    step_won, running = torch.zeros(len(forces), dtype=torch.int64), torch.ones(len(forces), dtype=torch.bool)
    for step in range(env.episode_limit):
        _, _, terminated, _, info = env.step(forces[:, step].unsqueeze(2))
        speeds.append(100 * info["final_obs"][:, 0, 0])
        step_won[info["battle_won"] & (step_won == 0) & running] = step + 1
        total = torch.where(running & terminated, info["episode_return"], total)
        running &= ~terminated
    return torch.stack(speeds, 1), step_won, total


def gather_all(episodes, seed):
    """Results of aggregation: a dict for each radius and team; scripted teams play a twentieth."""
    results = []
    for team in ("random", "greedy", "mixed"):
        games = episodes if team == "random" else max(1, episodes // 20)
        starts = range(0, games, PARALLEL)
        arrived = torch.cat([gather(team, min(PARALLEL, games - i), seed + i) for i in starts])  # (E, R)
        for radius, steps in zip(RADII, arrived.unbind(1), strict=True):
            won = steps[steps <= 25]
            result = {"radius": radius, "team": team, "episodes": games, "successes": len(won)}
            results.append(result | {"steps": round(won.float().mean().item(), 2) if len(won) else None})
    return results


def push_all(episodes, seed):
    """Results of the mill: a random team, teams of one constant force, teams that push against each other."""
    generator, fast, wins = torch.Generator().manual_seed(seed), 0, 0
    for start in range(0, episodes, PARALLEL):
        shape = (min(PARALLEL, episodes - start), 10, 10)
        speeds, step_won, _ = push(2 * torch.rand(shape, generator=generator) - 1)
        fast, wins = fast + int((speeds > PAID_SPEED).any(1).sum()), wins + int((step_won > 0).sum())
    force = torch.arange(1, 101) / 100  # (100,)
    forces = force[:, None, None].expand(-1, 10, 10)
    (speeds, step_won, total), (_, _, early) = push(forces), push(forces, end_on_win=True)
    smallest = int((step_won > 0).nonzero()[0])
    constant = [
        {"force": round(force[i].item(), 2), "step_won": int(step_won[i]), "return": total[i].item()}
        | {"return_end_on_win": early[i].item(), "omega": [round(x, 1) for x in speeds[i].tolist()]}
        for i in (99, 89, 79, 69, smallest, smallest - 1)
    ]
    wrong = torch.where(torch.arange(10) < torch.arange(11)[:, None], -1.0, 1.0)  # (11, N): 0 to 10 agents
    tolerated = int((push(wrong[:, None].expand(-1, 10, -1))[1] > 0).sum()) - 1
    return {"episodes": episodes, "fast": fast, "wins": wins, "constant": constant, "tolerated": tolerated}


def rate(successes, n):
    """A share with Wilson's 95% interval."""
    low, high = wilson(successes, n)
    return f"{successes / n:.3g} ({low:.3g} to {high:.3g})"


def particles_section(report):
    """What particles.json says, in Markdown."""
    gathered, mill = report["results"]["aggregation"], report["results"]["mill"]
    rows = []
    for radius in dict.fromkeys(x["radius"] for x in gathered):
        random, greedy, mixed = (x for x in gathered if x["radius"] == radius)
        share = mixed["successes"] / mixed["episodes"]
        row = [radius, f"{random['successes']:,}", rate(random["successes"], random["episodes"])]
        row += [rate(greedy["successes"], greedy["episodes"]), greedy["steps"]]
        rows.append([*row, rate(mixed["successes"], mixed["episodes"]), f"{20 * share - 10:.1f}"])
    header = ["radius", "random: successes", "rate", "greedy: rate", "its mean steps", "one random: rate"]
    aggregation = markdown_table([*header, "its mean return"], rows)
    rows = []
    for x in mill["constant"]:
        row = [x["force"], x["step_won"] or "never", x["return"], x["return_end_on_win"]]
        rows.append([*row, ", ".join(f"{omega:g}" for omega in x["omega"])])
    header = ["force of all", "step of the win", "return", "with `end_on_win`", "omega after each step"]
    return f"""## Aggregation

{gathered[0]["episodes"]:,} episodes of uniformly random forces, {gathered[-1]["episodes"]:,} of the other
teams. Rates with Wilson's 95% interval. Greedy: full force towards the landmark, less within a distance of
1. One random: four greedy agents and a random one. Steps: of the episodes that succeed.

{aggregation}
## Mill

{mill["episodes"]:,} episodes of uniformly random forces: omega exceeds {PAID_SPEED:g} at some step in a
share of {rate(mill["fast"], mill["episodes"])}; wins: {mill["wins"]}. At full force {mill["tolerated"]} of
the 10 agents may push the wrong way. Below: constant forces in steps of 0.01, the last two rows around the
smallest that wins.

{markdown_table(header, rows)}
{describe(report)}
"""


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--maps", nargs="+", default=MAPS, help="SMAC maps")
    parser.add_argument("--teams", nargs="+", default=list(TEAMS), choices=TEAMS, help="scripted teams")
    parser.add_argument("--games", type=int, default=512, help="parallel games of each")
    parser.add_argument("--rules", action="store_true", help="SMAC's own team, kite and rest, by all rules")
    parser.add_argument("--particles", action="store_true", help="aggregation and mill instead of SMAC maps")
    parser.add_argument("--episodes", type=int, default=2_000_000, help="of a random team on these two")
    parser.add_argument("--seed", type=int, default=1, help="seed of the games and of random actions")
    args = parser.parse_args(argv)
    about = metadata(__file__, argv, threads=torch.get_num_threads()) | {"seed": args.seed}
    if args.particles:
        results = {
            "aggregation": gather_all(args.episodes, args.seed),
            "mill": push_all(args.episodes, args.seed),
        }
    else:
        about |= {"engine": ENGINE, "games": args.games}
        maps, teams = args.maps, args.teams
        if args.rules:
            maps, teams = [name + rule for name in RULES for rule in RULES_OF], TEAMS_OF_RULES
        try:
            results = battles(maps, teams, args.games, args.seed)
        except ValueError as error:  # of a map or a number of games
            sys.exit(f"scripted.py: {error}")
    about |= {"results": results}
    name, section = "battles", battles_section
    if args.particles or args.rules:
        name, section = ("particles", particles_section) if args.particles else ("rules", rules_section)
    out = common.RESULTS / "scripted" / f"{name}.json"
    write_json(out, about)
    print(f"\n{section(about)}\nwritten: {out}")


if __name__ == "__main__":
    main()
