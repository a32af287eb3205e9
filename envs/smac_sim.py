"""Embedded engine for SMAC: the rules of its battles, for one unit of one game, as NVIDIA Warp functions.

It is a simulator of SMAC's battles, not StarCraft II, with the numbers of the game's own data files
(`smac_units.json`) and of the map archives (`smac_maps.json`): docs/envs.md lists every rule with its value,
its source and whether it was read or is our choice.

An env step is eight game loops of 1/16 s, and a game loop has two phases. Within a phase the order of the
units does not matter, so a GPU plays all of them at once and a CPU one after the other, from the same source:

    decide   a unit looks at the battle and chooses target, shot, heal and step. It writes only its own plan.
    resolve  a unit bears what all others decided: hits, heals, pushes. It reads the plans and writes itself.

Letters: B games, N agents, M enemies, U = N + M units (agents first, in id order), C terrain cells (32 x 32);
w the map's constants, u the units of one game, i the unit that acts, j another one, `target` whom it acts on.
Distances are in tiles, times in game loops; a "gap" is the distance between the edges of two units.
In these functions a number that changes in a loop begins as wp.float32() or wp.int32(), and the innermost
loops are written with `while`: `range` costs three branches more a turn, together half of the engine's time.
"""

import numpy as np
import warp as wp

MAP_SIZE = 32  # tiles, each way
LOOPS_PER_STEP = 8
LOOPS_PER_SECOND = 16
MOVE_DISTANCE = wp.constant(2.0)  # tiles that a move order asks for (starcraft2.py, move_amount)
SHIELD_DELAY = wp.constant(160.0)  # loops without damage before shields return
SHIELD_REGEN = wp.constant(2.0 / LOOPS_PER_SECOND)
MIN_DAMAGE = wp.constant(0.5)  # of a hit on life, after armour
RESPONSE_RANGE = wp.constant(21.0)  # gap at which an enemy still answers whoever hurt it last, or chases
CALL_FOR_HELP_RANGE = wp.constant(4.0)  # tiles within which it also answers whoever hurt a comrade
HEAL_SCAN_RANGE = wp.constant(6.0)  # gap at which the enemy medivac notices a wounded unit
HEAL_MIN_ENERGY = wp.constant(5.0)  # energy that the enemy medivac needs to begin a heal
ARRIVAL_RANGE = 1.5  # an enemy this close to its attack point stops walking
LANCE_LENGTH = wp.constant(1.4)  # half extents of the colossus's splash, before the victim's radius
LANCE_WIDTH = wp.constant(0.15)
BURST_RADIUS = wp.constant(2.2)  # of a baneling's splash, before the victim's radius
SIDESTEP = wp.constant(1.0)  # share of a push that is added sideways, so that a blocked unit walks round
MAX_PUSH = wp.constant(0.25)  # tiles per loop
FAR = wp.constant(1000.0)  # the gap to whom a unit cannot act on
GROUND, CLIFF, AIR = range(3)  # layers of the terrain: where who stands


@wp.struct
class Unit:
    """A unit of a battle. It lives while hp > 0; the dead keep what they had last."""

    x: float
    y: float
    hp: float
    shield: float
    energy: float
    cooldown: float  # loops until the weapon is ready
    speed: float  # tiles per loop at which it walked in the last loop
    since_hit: float  # loops since the last damage
    second_hit: float  # loops until the second hit of a double swing lands, 0 = none under way
    second_target: int  # whom that hit was meant for
    target: int  # the unit being attacked or healed, -1 = none
    attacker: int  # whoever hurt it last, -1 = nobody yet
    goal_x: float  # where it walks while it has no target
    goal_y: float
    walks: bool  # whether it does
    dying: bool  # a baneling that was killed in the last loop and bursts in this one
    # how this loop found it, and its plan
    alive: bool
    at: wp.vec2
    step: wp.vec2
    acts: bool  # strikes, bursts or heals
    dose: float  # life that it gives to its target
    health: float  # life and shield before this env step, for the reward


UNIT = np.dtype(Unit.numpy_dtype())
Game = wp.array(dtype=Unit)  # (U,)


@wp.struct
class Kind:
    """Constants of unit i of a map."""

    radius: float
    hp_max: float
    shield_max: float
    armor: float
    period: float  # loops between two shots
    reach: float  # gap
    slop: float  # how much further than `reach` the target may get before a second hit is lost
    scan: float  # gap at which it notices a target by itself
    second_delay: float
    life_regen: float  # per loop
    speed: float  # tiles per loop
    acceleration: float
    low: wp.vec2  # corners of where it may stand
    high: wp.vec2
    layer: int
    medic: bool
    biological: bool
    colossus: bool
    baneling: bool


@wp.struct
class Pair:
    """Constants of unit i with unit j."""

    separation: float  # distance of centres below which they overlap, 0: they never do
    raw_damage: float  # of a hit of i on j, before armour
    can_hit: bool


@wp.struct
class World:
    """Constants of a map."""

    n_agents: int
    n_units: int
    is_box: bool  # the ground is a rectangle: neither walls nor detours inside
    heal_rate: float  # life per loop
    heal_cost: float  # energy per life
    energy_max: float
    energy_regen: float
    chase: bool  # an enemy goes after whoever hurt it, then after its target, before it looks for the nearest
    draws_goal: bool  # the enemies' attack point lies anew between two points in every battle
    goal_from: wp.vec2
    goal_to: wp.vec2
    fresh: Game  # (U,), the start of a battle
    kind: wp.array(dtype=Kind)  # (U,)
    pair: wp.array2d(dtype=Pair)  # (U, U)
    walkable: wp.array2d(dtype=wp.bool)  # (3, C), by layer
    waypoints: wp.array2d(dtype=wp.int16)  # (C, C) cell to head for, by goal and place, -1 = straight on


# ---- distances ----
@wp.func
def place_of(u: Game, i: int):
    return wp.vec2(u[i].x, u[i].y)


@wp.func
def distance(u: Game, i: int, j: int):
    return wp.length(place_of(u, j) - place_of(u, i))


@wp.func
def gap_to(w: World, u: Game, i: int, j: int):
    """The gap from i to a living j, else FAR."""
    if j < 0 or u[j].hp <= 0.0:
        return FAR
    return distance(u, i, j) - (w.kind[i].radius + w.kind[j].radius)


@wp.func
def gap_to_victim(w: World, u: Game, i: int, j: int):
    """The gap to a living j that the weapon of i can hit, else FAR."""
    if j < 0 or not w.pair[i, j].can_hit:
        return FAR
    return gap_to(w, u, i, j)


@wp.func
def cell_of(place: wp.vec2):
    edge = float(MAP_SIZE - 1)
    return int(wp.clamp(place[0], 0.0, edge)) * MAP_SIZE + int(wp.clamp(place[1], 0.0, edge))


# ---- orders ----
@wp.func
def begin(w: World, u: Game, i: int, share: float):
    """Unit i at the start of a battle; `share` in [0, 1) decides the attack point where it is drawn anew."""
    u[i] = w.fresh[i]
    if w.draws_goal:
        u[i].goal_x = share * w.goal_from[0] + (1.0 - share) * w.goal_to[0]
        u[i].goal_y = share * w.goal_from[1] + (1.0 - share) * w.goal_to[1]


@wp.func
def obey(w: World, u: Game, i: int, action: int):
    """An agent's order: 0 no-op, 1 stop, 2-5 north south east west, 6 + k attack enemy k or heal agent k."""
    u[i].walks = 2 <= action <= 5
    u[i].goal_x = u[i].x + MOVE_DISTANCE * (float(action == 4) - float(action == 5))
    u[i].goal_y = u[i].y + MOVE_DISTANCE * (float(action == 2) - float(action == 3))
    u[i].target = -1
    if action >= 6 and w.kind[i].medic:
        u[i].target = action - 6
    elif action >= 6 and w.pair[i, w.n_agents + action - 6].can_hit:
        # the game refuses an attack on what the weapon cannot hit (marauder, medivac): the unit stands
        u[i].target = w.n_agents + action - 6


# ---- phase 1: decide ----
@wp.func
def acquire(w: World, u: Game, i: int):
    """Whom enemy i goes for: its target while the weapon reaches it, else whoever hurt it, else its target as
    long as that lives, else the nearest that it notices, else whoever hurt a comrade nearby. Without `chase`
    a target out of reach is forgotten, and the nearest comes before whoever hurt it."""
    if gap_to_victim(w, u, i, u[i].target) <= w.kind[i].reach:
        return u[i].target
    if w.chase:
        if gap_to_victim(w, u, i, u[i].attacker) <= RESPONSE_RANGE:
            return u[i].attacker
        if gap_to_victim(w, u, i, u[i].target) <= RESPONSE_RANGE:
            return u[i].target
    nearest, least, j = wp.int32(-1), float(FAR), wp.int32(0)
    while j < w.n_agents:
        gap = gap_to_victim(w, u, i, j)
        if gap < least:
            nearest, least = j, gap
        j += 1
    if least <= w.kind[i].scan:
        return nearest
    if gap_to_victim(w, u, i, u[i].attacker) <= RESPONSE_RANGE:
        return u[i].attacker
    called = wp.int32(-1)  # of several the one with the highest index
    for j in range(w.n_agents, w.n_units):
        if u[j].hp > 0.0 and u[j].attacker > called and distance(u, i, j) <= CALL_FOR_HELP_RANGE:
            called = u[j].attacker
    if gap_to_victim(w, u, i, called) <= RESPONSE_RANGE:
        return called
    return -1


@wp.func
def is_patient(w: World, u: Game, i: int, j: int):
    """Whether enemy medivac i notices that j needs it."""
    wounded = u[j].hp < w.kind[j].hp_max and w.kind[j].biological
    return wounded and gap_to(w, u, i, j) <= HEAL_SCAN_RANGE


@wp.func
def acquire_patient(w: World, u: Game, i: int):
    """Whom enemy medivac i heals: its patient, else the weakest that it notices, of equals the nearest."""
    if u[i].target >= w.n_agents and is_patient(w, u, i, u[i].target):
        return u[i].target
    weakest, least = wp.int32(-1), float(FAR)
    if u[i].energy >= HEAL_MIN_ENERGY:
        for j in range(w.n_agents, w.n_units):
            if is_patient(w, u, i, j):
                need = u[j].hp / w.kind[j].hp_max + 1.0e-3 * gap_to(w, u, i, j)
                if need < least:
                    weakest, least = j, need
    return weakest


@wp.func
def shoot(w: World, u: Game, i: int, target: int, gap: float, delay: float):
    """A ready weapon strikes at once whom it reaches, and is ready again a period and `delay` loops later.

    Zealots and colossi hit twice per swing. The second hit is lost if the target changes or gets away, but a
    colossus's beam sweeps its line whatever becomes of the target.
    """
    fires = gap <= w.kind[i].reach and u[i].cooldown < 1.0  # ready within this loop
    follows = target == u[i].second_target and gap <= w.kind[i].reach + w.kind[i].slop
    holds = follows or w.kind[i].colossus
    u[i].acts = fires or (holds and u[i].second_hit == 1.0)
    cooldown = u[i].cooldown - 1.0
    if fires:
        cooldown += w.kind[i].period + delay
        u[i].second_hit = w.kind[i].second_delay
        u[i].second_target = target
    else:
        u[i].second_hit = wp.where(holds, wp.max(u[i].second_hit - 1.0, 0.0), 0.0)
    u[i].cooldown = wp.max(cooldown, 0.0)


@wp.func
def heal(w: World, u: Game, i: int, target: int, gap: float):
    """A medivac gives life for energy to a wounded biological unit in reach."""
    if gap <= w.kind[i].reach and w.kind[target].biological:
        missing = w.kind[target].hp_max - u[target].hp
        u[i].dose = wp.min(wp.min(missing, u[i].energy / w.heal_cost), w.heal_rate)
    u[i].acts = u[i].dose > 0.0
    u[i].energy = wp.min(u[i].energy - u[i].dose * w.heal_cost + w.energy_regen, w.energy_max)


@wp.func
def walk(w: World, u: Game, i: int, goal: wp.vec2):
    """A step towards a goal, round the terrain: on the ground by the farthest waypoint in a straight line."""
    way = goal - u[i].at  # as the crow flies
    u[i].speed = wp.min(wp.min(u[i].speed + w.kind[i].acceleration, w.kind[i].speed), wp.length(way))
    if not w.is_box and w.kind[i].layer == GROUND:
        waypoint = int(w.waypoints[cell_of(goal), cell_of(u[i].at)])
        if waypoint >= 0:
            way = wp.vec2(float(waypoint / MAP_SIZE) + 0.5, float(waypoint % MAP_SIZE) + 0.5) - u[i].at
    u[i].step = way * (u[i].speed / wp.max(wp.length(way), 1.0e-6))


@wp.func
def decide(w: World, u: Game, i: int, delay: float):
    """The plan of unit i for this loop. Writes only unit i, and nothing that others read in this phase."""
    u[i].alive = u[i].hp > 0.0
    u[i].at = place_of(u, i)
    u[i].acts = u[i].dying
    u[i].dose = 0.0
    u[i].step = wp.vec2()
    target = wp.int32(-1)
    if u[i].alive:
        target = u[i].target  # an agent: whom it was told
        if i >= w.n_agents:
            target = acquire_patient(w, u, i) if w.kind[i].medic else acquire(w, u, i)
        gap = gap_to(w, u, i, target)
        if w.kind[i].medic:
            heal(w, u, i, target, gap)
        else:
            shoot(w, u, i, target, gap, delay)
        goal = wp.vec2(u[i].goal_x, u[i].goal_y)
        walks = u[i].walks and wp.length(goal - u[i].at) > wp.where(i < w.n_agents, 0.0, ARRIVAL_RANGE)
        if gap < FAR:  # towards the target, until it is in reach
            goal = place_of(u, target)
            walks = gap > w.kind[i].reach
        else:
            target = -1
        if walks:
            walk(w, u, i, goal)
        else:
            u[i].speed = 0.0  # brakes at once
    u[i].target = target


# ---- phase 2: resolve ----
@wp.func
def lance_hits(w: World, u: Game, i: int, j: int):
    """A colossus's beam: a line through the target, across the fire, even if the target is dead by now."""
    target = u[i].second_target
    fire = u[target].at - u[i].at
    fire /= wp.max(wp.length(fire), 1.0e-6)
    off = u[j].at - u[target].at
    along = wp.abs(wp.dot(off, fire))
    across = wp.abs(off[1] * fire[0] - off[0] * fire[1])
    return along <= LANCE_WIDTH + w.kind[j].radius and across <= LANCE_LENGTH + w.kind[j].radius


@wp.func
def burst_hits(w: World, u: Game, i: int, j: int):
    """A baneling hurts whom its splash touches."""
    return wp.length(u[j].at - u[i].at) <= BURST_RADIUS + w.kind[j].radius


@wp.func
def hits(w: World, u: Game, i: int, j: int):
    """Whether what i does in this loop hurts j; a medivac's "hit" has no damage."""
    if w.kind[i].colossus:
        return w.pair[i, j].can_hit and lance_hits(w, u, i, j)
    if w.kind[i].baneling:
        return w.pair[i, j].can_hit and burst_hits(w, u, i, j)
    return u[i].target == j


@wp.func
def suffer(w: World, u: Game, j: int):
    """All hits and heals of this loop on unit j, in unit order -> life lost, shield left, life given.

    A hit goes on the shield first; what it leaves hurts life, less the armour.
    """
    life, shield, healed, striker = wp.float32(0.0), float(u[j].shield), wp.float32(0.0), wp.int32(-1)
    i = wp.int32(0)
    while i < w.n_units:
        if u[i].acts:
            if hits(w, u, i, j):
                raw = w.pair[i, j].raw_damage
                leak = raw - shield
                if leak > 0.0:
                    life += wp.max(leak - w.kind[j].armor, MIN_DAMAGE)
                shield = wp.max(shield - raw, 0.0)
            if u[i].target == j:
                healed += u[i].dose
                if striker < 0 and not w.kind[i].medic:
                    striker = i  # of several the first
        i += 1
    if striker >= 0:
        u[j].attacker = striker
    return life, shield, healed


@wp.func
def push_apart(w: World, u: Game, i: int):
    """The push that undoes overlaps: friends share it evenly, of two foes the one that walks gives way.
    Whoever walks slides round, on the side to which its step already leads."""
    push, j = wp.vec2(), wp.int32(0)
    while j < w.n_units:
        way = u[j].at - u[i].at
        square = wp.length_sq(way)
        room = w.pair[i, j].separation
        if square < room * room and u[j].alive:
            away = wp.sqrt(square)
            share = wp.float32(1.0)
            if (i < w.n_agents) != (j < w.n_agents):
                share = 1.0 + float(u[i].speed > 0.0) - float(u[j].speed > 0.0)
            push += (room - away) / wp.max(away, 1.0e-3) * share / -2.0 * way
        j += 1
    if u[i].speed > 0.0:
        left = u[i].step[1] * push[0] - u[i].step[0] * push[1]  # > 0: the step leads to the left of the push
        aside = wp.float32(0.0)
        if wp.abs(left) < 0.1 * wp.abs(wp.dot(u[i].step, push)):
            aside = SIDESTEP * (1.0 - 2.0 * float(i % 2))  # where both sides are as good
        elif left != 0.0:
            aside = SIDESTEP * wp.sign(left)
        push += aside * wp.vec2(-push[1], push[0])
    limit = wp.where(w.kind[i].speed > 0.0, MAX_PUSH, 0.0)
    return wp.vec2(wp.clamp(push[0], -limit, limit), wp.clamp(push[1], -limit, limit))


@wp.func
def stay_on_terrain(w: World, u: Game, i: int, goal: wp.vec2):
    """Move unit i to a goal, as far as the terrain lets it: along a wall the free part of a step is kept."""
    place = wp.min(wp.max(goal, w.kind[i].low), w.kind[i].high)
    if not w.is_box:
        along_x = wp.vec2(place[0], u[i].at[1])
        along_y = wp.vec2(u[i].at[0], place[1])
        layer = w.kind[i].layer
        if not w.walkable[layer, cell_of(place)]:
            if w.walkable[layer, cell_of(along_x)]:
                place = along_x
            elif w.walkable[layer, cell_of(along_y)]:
                place = along_y
            else:
                place = u[i].at
    u[i].x = place[0]
    u[i].y = place[1]


@wp.func
def recover_shield(w: World, u: Game, j: int, shield: float, hurt: bool):
    """Shields return from SHIELD_DELAY loops after the last damage on."""
    u[j].since_hit = wp.where(hurt, 0.0, u[j].since_hit + 1.0)
    regen = wp.where(u[j].since_hit >= SHIELD_DELAY, SHIELD_REGEN, 0.0)
    u[j].shield = wp.min(shield + regen, w.kind[j].shield_max)


@wp.func
def resolve(w: World, u: Game, j: int):
    """What this loop does to unit j. Reads the plans of others, and writes only unit j."""
    u[j].dying = False
    if u[j].alive:
        life, shield, healed = suffer(w, u, j)
        recover_shield(w, u, j, shield, life > 0.0 or shield < u[j].shield)
        hp = u[j].hp - life
        suicide = w.kind[j].baneling and u[j].acts
        if hp > 0.0 and not suicide:
            u[j].hp = wp.min(hp + healed + w.kind[j].life_regen, w.kind[j].hp_max)
        else:
            u[j].hp = 0.0
            u[j].dying = w.kind[j].baneling and not suicide
        stay_on_terrain(w, u, j, u[j].at + u[j].step + push_apart(w, u, j))
