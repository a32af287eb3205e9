"""The ground of SMAC's maps: where units may stand, where they begin, and how they walk round walls.

Worked out once per map with NumPy, from the archives' data in `smac_maps.json`; docs/envs.md has the rules.
Letters: C terrain cells (32 x 32), a cell is x * 32 + y; K walkable ones.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np

_DATA = Path(__file__).parent
MAP_SIZE = 32


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
