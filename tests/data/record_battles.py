"""Battles of the torch engine (commit cd8fb3c), step by step, for the tests of its successor; see README.md.

    python tests/data/record_battles.py

Plays eight or ten games of every map and keeps WINDOW consecutive steps of each: from its first wound on, or
up to its first end and a few steps into the next battle. Goes together with the engine that it records.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from envs import make
from envs.smac_sim import Units

ROOT = Path(__file__).resolve().parent.parent.parent
WINDOW = 42  # steps of one recording
APPROACH = 4  # of them before the first wound
AFTERMATH = 6  # of them after the first end
TIME_LEFT = 3  # steps from the first wound to the time-out of a shortened game
SAMPLES = 12  # transitions of which the features are kept


class Game(NamedTuple):
    style: str  # random legal actions; fight: attack the nearest enemy; focus: only the one of the last id
    agents: float  # share of life, shield and energy that the agents begin with
    enemies: float
    part: str  # what is kept: the steps around the first wound or end; time-out: an end by a shortened clock
    few: bool = False  # only the last quarter of the enemies is alive, for wins on every map


GAMES = [
    Game("random", 1.0, 1.0, "wound"),
    Game("fight", 1.0, 1.0, "wound"),
    Game("random", 0.4, 1.0, "end"),
    Game("focus", 1.0, 0.4, "end", few=True),
    Game("random", 1.0, 0.15, "end"),
    Game("fight", 0.3, 0.3, "time-out"),
    Game("random", 0.1, 1.0, "end"),
    Game("focus", 1.0, 0.15, "end"),
    # not on large maps
    Game("random", 0.6, 0.3, "wound"),
    Game("focus", 1.0, 1.0, "end"),
]
LARGE = 30  # units
TRANSITION = ("actions", "delays", "reward", "battle_won", "terminated", "truncated")
TRANSITION += ("dead_allies", "dead_enemies")
FEATURES = ("obs", "state", "avail_actions")


def random_actions(env, generator):
    """Uniform over the legal actions (B, N)."""
    return torch.rand(env.avail_actions().shape, generator=generator).mul(env.avail_actions()).argmax(-1)


def fight_actions(env, focus):
    """Walk to the nearest enemy, with focus (B, 1) to the living one of the last id, and attack it as soon as
    that is legal. A medivac rather heals the most wounded legal agent. Returns actions (B, N)."""
    units, legal, n = env._units, env.avail_actions(), env.n_agents
    off_x = units.x[:, None, n:] - units.x[:, :n, None]  # (B, N, M)
    off_y = units.y[:, None, n:] - units.y[:, :n, None]
    cost = torch.where(focus[:, :, None], -torch.arange(env.n_enemies), torch.hypot(off_x, off_y))
    enemy = cost.masked_fill(units.hp[:, None, n:] <= 0, 1e6).argmin(2, keepdim=True)  # (B, N, 1)
    off_x, off_y = off_x.gather(2, enemy)[:, :, 0], off_y.gather(2, enemy)[:, :, 0]  # (B, N)

    # medivacs: 6 + k is about agent k
    medivac = env._facts.medivac[:n, None]  # (N, 1)
    life = (units.hp / env._facts.hp_max)[:, None].expand(-1, n, -1)  # (B, N, U)
    life = life.gather(2, env._facts.target_unit.expand(len(life), -1, -1))  # (B, N, M)
    can_heal = legal[:, :, 6:] & (life < 1)
    aim = torch.where(medivac, life.masked_fill(~can_heal, 1e6).argmin(2, keepdim=True), enemy)  # (B, N, 1)
    can_aim = torch.where(medivac, can_heal, legal[:, :, 6:]).gather(2, aim)[:, :, 0]  # (B, N)

    gain = torch.stack([off_y, -off_y, off_x, -off_x], 2).masked_fill(~legal[:, :, 2:6], -1e6)  # (B, N, 4)
    idle = 1 - legal[:, :, 0].long()  # (B, N), stop, or no-op for the dead
    walk = torch.where(gain.amax(2) > 0, 2 + gain.argmax(2), idle)
    return torch.where(can_aim, 6 + aim[:, :, 0], walk)


def play(map_name, games, seed):
    """Every step of `games`, played side by side: a list of dicts of (B, ...); and the first features."""
    env = make(map_name, num_envs=len(games), device="cpu", seed=seed)
    sim, generator = env._sim, torch.Generator().manual_seed(seed)
    played = {}

    def step(units, actions, _):
        """Like BattleSim.step, with weapon delays from a grid of 256 values."""
        shape = (len(games), 8, sim.n_units)
        grid = torch.randint(256, shape, generator=generator) * (units.hp > 0)[:, None]  # 0 for the dead
        units = sim.obey(units, actions)
        for numbers in grid.unbind(1):
            units = sim.game_loop(units, numbers.float() / 255 * 3 - 1)
        played["delays"] = grid.to(torch.uint8)
        return units

    sim.step = step
    env.reset()
    life = torch.tensor([[game.agents, game.enemies] for game in games])  # (B, 2)
    life = life.repeat_interleave(torch.tensor([sim.n_agents, sim.n_enemies]), 1)  # (B, U)
    few = torch.tensor([game.few for game in games])  # (B,)
    life[few, sim.n_agents : sim.n_agents + 3 * sim.n_enemies // 4] = 0
    units = env._units
    env._units = units._replace(hp=units.hp * life, shield=units.shield * life, energy=units.energy * life)
    env._avail_actions = env._observe()[2]  # none of the dead

    random, focus = (torch.tensor([[game.style == style] for game in games]) for style in ("random", "focus"))
    shortened = torch.tensor([game.part == "time-out" for game in games])  # (B,)
    wounded, record = torch.zeros(len(games), dtype=torch.bool), []
    for _ in range(env.episode_limit + AFTERMATH):
        before = env._units
        actions = torch.where(random, random_actions(env, generator), fight_actions(env, focus))
        _, reward, terminated, truncated, info = env.step(actions)
        after = env._picture[0]  # before any restart
        wound = (after.hp + after.shield < before.hp + before.shield).any(1) & ~wounded
        env._episode_length[wound & shortened] = env.episode_limit - TIME_LEFT
        wounded = wounded | wound
        entry = {"units": (before, after), "wounded": wounded, "ended": terminated | truncated, **played}
        entry |= {"actions": actions, "reward": reward, "terminated": terminated, "truncated": truncated}
        entry |= {name: info[name] for name in ("battle_won", "dead_allies", "dead_enemies")}
        record.append(entry | {name: info[f"final_{name}"] for name in FEATURES})
    first = {f"first_{name}": value[0] for name, value in zip(FEATURES, env._first, strict=True)}
    return record, first


def window(record, game, part):
    """The steps of a game that are kept."""
    wounded, ended = (torch.stack([entry[name][game] for entry in record]) for name in ("wounded", "ended"))
    start = int(wounded.long().argmax()) - APPROACH  # from the first one; 0 if there is none
    if part != "wound":
        start = int(ended.long().argmax()) + 1 + AFTERMATH - WINDOW
    start = min(max(start, 0), len(record) - WINDOW)
    return record[start : start + WINDOW]


def save(map_name, path):
    facts = json.loads((ROOT / "envs" / "smac_maps.json").read_text())["maps"][map_name]
    games = GAMES[:8] if facts["n_agents"] + facts["n_enemies"] >= LARGE else GAMES
    record, data = play(map_name, games, seed=1)
    moments, before, kept = [], [], []  # Units of one game; the moment before each transition; transitions
    for game, (_, _, _, part, _) in enumerate(games):
        chained = False  # whether the last moment is what the next transition starts from
        for entry in window(record, game, part):
            first, then = (units._make(field[game] for field in units) for units in entry["units"])
            moments += [then] if chained else [first, then]
            before.append(len(moments) - 2)
            chained = not entry["ended"][game]
            kept.append({name: value[game] for name, value in entry.items() if name != "units"})
    data |= {name: torch.stack([getattr(units, name) for units in moments]) for name in Units._fields}
    data |= {name: torch.stack([entry[name] for entry in kept]) for name in TRANSITION}
    # features of transitions spread over all games, three ends among them
    ends = [i for i, entry in enumerate(kept) if entry["ended"]]
    ends = ends[:: max(1, len(ends) // 3)][:3]
    sample = sorted({*torch.linspace(0, len(kept) - 1, SAMPLES - len(ends)).long().tolist(), *ends})
    data |= {name: torch.stack([kept[i][name] for i in sample]) for name in FEATURES}
    small = {name: value.to(torch.int8) for name, value in data.items() if value.dtype == torch.int64}
    data |= small | {"before": torch.tensor(before).short(), "sample": torch.tensor(sample).short()}
    np.savez_compressed(path, **{name: value.numpy() for name, value in data.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(__file__).parent / "battles"
    folder.mkdir(exist_ok=True)
    for name in json.loads((ROOT / "envs" / "smac_maps.json").read_text())["maps"]:
        save(name, folder / f"{name}.npz")
        print(name, (folder / f"{name}.npz").stat().st_size, flush=True)
