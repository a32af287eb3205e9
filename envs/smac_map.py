"""SMAC's maps in numbers, as the rules of smac_sim.py need them: units, spawn points, walls, ways round them.

Worked out once per map with NumPy, from the data of the game (`smac_units.json`: the Liberty base values that
the maps load, or the ladder's) and of the map archives (`smac_maps.json`); docs/envs.md has the rules.
Letters: N agents, U units, agents first; C terrain cells (32 x 32), a cell is x * 32 + y; K walkable ones.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
import warp as wp

from envs import smac_sim as rules
from envs.smac_sim import LOOPS_PER_SECOND, MAP_SIZE, Kind, Pair, Unit, World

_DATA = Path(__file__).parent
SCAN_RANGE = 5.0  # gap at which an enemy notices a target, unless its weapon reaches further
SECOND_HIT_DELAY = {"zealot": 4, "colossus": 1}  # loops between the two hits of one swing
EDGE = 1e-3  # tiles that a unit keeps from the outermost edge


class BattleSim:
    """A map as the rules need it: its `world` on a device, and `fresh` (U,), the units as they begin; `chase`
    is one of the rules (smac_sim.py, `acquire`), `ladder` takes the weapons of the multiplayer ladder.

    `kinds` (U,) and `pairs` (U, U) are structured arrays with the fields of Kind and Pair, `types` the names
    of the units' types, `walkable` (32, 32) [x, y], `battle` the map's entry in smac_maps.json.
    """

    def __init__(self, map_name, device="cpu", chase=True, ladder=False):
        battle = self.battle = json.loads((_DATA / "smac_maps.json").read_text())["maps"][map_name]
        data = json.loads((_DATA / "smac_units.json").read_text())
        stats = data["units"]
        for name, weapon in data["ladder"]["weapons"].items() if ladder else ():
            stats[name]["weapon"] |= weapon
        n = self.n_agents = battle["n_agents"]
        self.n_enemies, self.n_units = battle["n_enemies"], n + battle["n_enemies"]
        self.walkable = walkable_cells(battle["terrain"])
        cells, order, medivac = np.argwhere(self.walkable), battle["enemy_order"], stats["medivac"]
        low, high = cells.min(0), cells.max(0) + 1  # the ground's corners

        # spawn points: agents by type in the map's order, then by x and y; enemies as created
        placed = place_units(battle["ally_spawns"] + battle["enemy_spawns"], stats, self.walkable)
        rank = {group["unit"].lower(): i for i, group in enumerate(battle["agent_id_order"])}
        placed[:n] = sorted(placed[:n], key=lambda unit: (rank[unit[0]], unit[1], unit[2]))
        self.types, x, y = map(list, zip(*placed, strict=True))
        units = [stats[name] for name in self.types]

        self.kinds = np.zeros(self.n_units, Kind.numpy_dtype())
        for kind, name, unit in zip(self.kinds, self.types, units, strict=True):
            weapon, move, flies = unit["weapon"] or unit["heal"], unit["move"], unit["flying"]
            kind["radius"], kind["hp_max"], kind["shield_max"] = unit["radius"], unit["hp"], unit["shield"]
            kind["armor"] = unit["life_armor"]
            kind["life_regen"] = unit.get("life_regen_per_normal_second", 0) / LOOPS_PER_SECOND
            kind["reach"], kind["slop"] = weapon["range"], weapon.get("range_slop", 0)
            kind["period"] = weapon.get("period_loops", 0)
            kind["second_delay"] = SECOND_HIT_DELAY.get(name, 0)
            hunts = order["kind"] == "attack_unit_group"  # the enemies notice everybody
            kind["scan"] = 2 * MAP_SIZE if hunts else max(kind["reach"], SCAN_RANGE)
            kind["speed"] = move["speed_per_normal_second"] / LOOPS_PER_SECOND
            kind["acceleration"] = move.get("acceleration", 1) / LOOPS_PER_SECOND**2
            kind["layer"] = rules.AIR if flies else rules.CLIFF if name == "colossus" else rules.GROUND
            kind["low"], kind["high"] = (0, MAP_SIZE - EDGE) if flies else (low, high - EDGE)
            kind["medic"], kind["biological"] = name == "medivac", "biological" in unit["attributes"]
            kind["colossus"], kind["baneling"] = name == "colossus", name == "baneling"

        # air and ground do not collide; a colossus stands above ground units, in the way of flyers only
        self.pairs = np.zeros((self.n_units, self.n_units), Pair.numpy_dtype())
        tall = [unit["flying"] or "air" in unit["planes"] for unit in units]
        for i, one in enumerate(units):
            weapon = one["weapon"] or {"damage": 0, "targets": []}
            bonus = weapon.get("bonus") or {}
            for j, other in enumerate(units):
                pair = self.pairs[i, j]
                if i != j and tall[i] == tall[j]:
                    pair["separation"] = one["separation_radius"] + other["separation_radius"]
                pair["raw_damage"] = weapon["damage"] + sum(bonus.get(x, 0) for x in other["attributes"])
                pair["can_hit"] = (i < n) != (j < n) and bool({*weapon["targets"]} & {*other["planes"]})

        self.fresh = np.zeros(self.n_units, rules.UNIT)
        self.fresh["x"], self.fresh["y"], self.fresh["since_hit"] = x, y, rules.SHIELD_DELAY
        self.fresh["hp"], self.fresh["shield"] = self.kinds["hp_max"], self.kinds["shield_max"]
        self.fresh["energy"] = np.where(self.kinds["medic"], medivac["energy"]["start"], 0)
        self.fresh["second_target"] = self.fresh["target"] = self.fresh["attacker"] = -1
        self.fresh["walks"][n:] = order["kind"].startswith("attack_move")
        self.fresh["goal_x"], self.fresh["goal_y"] = order.get("point", (0, 0))

        w = self.world = World()
        w.n_agents, w.n_units = n, self.n_units
        w.heal_rate, w.heal_cost = medivac["heal"]["rate_hp_per_loop"], medivac["heal"]["energy_per_hp"]
        w.energy_max, w.energy_regen = medivac["energy"]["max"], medivac["energy"]["regen_per_loop"]
        w.chase = chase
        if "between" in order:
            w.draws_goal, (w.goal_from, w.goal_to) = True, order["between"]
        w.fresh = wp.array(self.fresh, dtype=Unit, device=device)
        w.kind = wp.array(self.kinds, dtype=Kind, device=device)
        w.pair = wp.array(self.pairs, dtype=Pair, device=device)
        w.is_box = bool(self.walkable[low[0] : high[0], low[1] : high[1]].all())
        if not w.is_box:
            layers = [self.walkable, climbable_cells(battle["terrain"]), np.ones_like(self.walkable)]
            w.walkable = wp.array(np.stack(layers).reshape(3, -1), dtype=wp.bool, device=device)
            w.waypoints = wp.array(find_waypoints(battle["terrain"]), dtype=wp.int16, device=device)


# ---- the ground ----
@functools.cache
def _terrain(name):
    return json.loads((_DATA / "smac_maps.json").read_text())["terrains"][name]


def walkable_cells(terrain):
    """(32, 32) bool [x, y]: where ground units may stand; the data has rows of '.' and '#', top row first."""
    rows = _terrain(terrain)["pathing_rows_top_to_bottom"]
    return np.array([[cell == "." for cell in row] for row in reversed(rows)]).T


def climbable_cells(terrain):
    """(32, 32) bool [x, y]: where a colossus may stand; on maps without ledges as the others."""
    if "cliff_level_rows_top_to_bottom" not in _terrain(terrain):
        return walkable_cells(terrain)
    rows = _terrain(terrain)["cliff_level_rows_top_to_bottom"]
    levels = np.array([[int(level) for level in row.split()] for row in reversed(rows)]).T
    columns, lines = np.indices(levels.shape)
    inside = (columns >= 2) & (columns <= 29) & (lines >= 2) & (lines <= 29)
    return (levels > 0) & inside


def place_units(groups, stats, walkable):
    """Place units one by one, each on the free spot nearest to its group's point -> list of (type, x, y)."""
    offsets = [(i / 8, j / 8) for i in range(-64, 65) for j in range(-64, 65)]
    offsets.sort(key=lambda offset: (round(math.hypot(*offset), 6), math.atan2(offset[1], offset[0])))
    placed, taken = [], []
    for group in groups:
        name = group["unit"].lower()
        kind = stats[name]
        high, size = kind["flying"] or "air" in kind["planes"], kind["separation_radius"]
        for _ in range(group["count"]):
            for offset_x, offset_y in offsets:
                x, y = group["point"][0] + offset_x, group["point"][1] + offset_y
                inside = 0 <= x < MAP_SIZE and 0 <= y < MAP_SIZE
                stands = inside and (kind["flying"] or walkable[int(x), int(y)])
                if stands and all(
                    h != high or math.hypot(x - tx, y - ty) >= size + s for tx, ty, h, s in taken
                ):
                    break
            placed.append((name, x, y))
            taken.append((x, y, high, size))
    return placed


@functools.cache
def find_waypoints(terrain):
    """Way-finding table (C, C) int16: entry (goal, cell) is the farthest cell on the shortest path from cell
    to goal in a straight open line, or -1 where the goal itself is."""
    walkable = walkable_cells(terrain)
    cells = np.argwhere(walkable)  # (K, 2)
    count = len(cells)
    number = np.full(walkable.shape, -1)
    number[tuple(cells.T)] = np.arange(count)

    # neighbours in 8 directions, no cutting of corners
    neighbours = np.full((8, count), -1)
    steps = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    padded = np.pad(number, 1, constant_values=-1)
    for row, (i, j) in enumerate(steps):
        there = padded[cells[:, 0] + 1 + i, cells[:, 1] + 1 + j]
        side = padded[cells[:, 0] + 1 + i, cells[:, 1] + 1]
        front = padded[cells[:, 0] + 1, cells[:, 1] + 1 + j]
        neighbours[row] = np.where((side >= 0) & (front >= 0), there, -1)
    cost = np.array([math.hypot(*step) for step in steps])

    # shortest distances between all cells by relaxation, then the best neighbour towards each goal
    far = 1e6
    length = np.where(np.eye(count, dtype=bool), 0.0, far)  # (K goals, K cells)
    while True:
        through = np.stack(
            [np.where(n >= 0, length[:, n] + c, far) for n, c in zip(neighbours, cost, strict=True)]
        )
        shorter = np.minimum(length, through.min(0))
        if np.array_equal(shorter, length):
            break
        length = shorter
    onward = neighbours[through.argmin(0), np.arange(count)]  # (K goals, K cells)

    # straight open lines between cell centres, sampled four times per tile
    centres = cells + 0.5
    open_line = np.ones((count, count), dtype=bool)
    for share in np.linspace(0, 1, 4 * MAP_SIZE + 1):
        points = (1 - share) * centres[:, None] + share * centres[None]
        open_line &= walkable[points[..., 0].astype(int), points[..., 1].astype(int)]

    here = np.broadcast_to(np.arange(count), (count, count))
    goals = np.arange(count)[:, None]
    waypoint = np.where(here == goals, goals, onward)
    for _ in range(2 * MAP_SIZE):
        further = np.where(waypoint == goals, goals, onward[goals, waypoint])
        waypoint = np.where(open_line[here, further], further, waypoint)
    flat = cells[:, 0] * MAP_SIZE + cells[:, 1]
    table = np.full((MAP_SIZE**2, MAP_SIZE**2), -1, dtype=np.int16)
    table[np.ix_(flat, flat)] = np.where(waypoint == goals, -1, flat[waypoint])
    # a goal inside a wall is approached like the walkable cell nearest to it
    everywhere = np.argwhere(np.ones_like(walkable))
    nearest = flat[((everywhere[:, None] - cells[None]) ** 2).sum(-1).argmin(1)]
    table = table[nearest]
    # where only a colossus may stand, by way of the cell beside it that is nearest on foot
    climbable = climbable_cells(terrain)
    for goal in np.argwhere(climbable & ~walkable):
        beside = np.hypot(*(cells - goal).T)  # (K,)
        doors = np.flatnonzero(beside <= beside.min() + 0.5)
        door = doors[length[doors].argmin(0)]  # (K,), of every cell
        onward = table[flat[door], flat]  # (K,)
        onward = np.where((onward < 0) & (door != here[0]), flat[door], onward)
        table[goal[0] * MAP_SIZE + goal[1], flat] = onward
    return table
