"""Embedded engine for SMAC: a batched battle simulator in torch, eight game loops of 1/16 s per env step.

It plays the battles of SMAC's 23 maps with the numbers of the game's own data files (`smac_units.json`: the
Liberty base values that the maps load; `smac_maps.json`: terrain, spawns and orders from the map archives).
It is a simulator of SMAC's battles, not StarCraft II: docs/envs.md lists every rule with its value, its
source and whether it was read or is our choice.

Letters: B games, N agents, M enemies, U = N + M units (agents first, in id order), C terrain cells (32 x 32).
Distances are in tiles, times in game loops; a "gap" is the distance between the edges of two units.
"""

import functools
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

_DATA = Path(__file__).parent
LOOPS_PER_STEP = 8
LOOPS_PER_SECOND = 16
MAP_SIZE = 32
MOVE_DISTANCE = 2.0  # tiles that a move order asks for (starcraft2.py, move_amount)
SHIELD_DELAY = 160  # loops without damage before shields return
SHIELD_REGEN = 2.0 / LOOPS_PER_SECOND
MIN_DAMAGE = 0.5  # of a hit on life, after armour
SCAN_RANGE = 5.0  # gap at which an enemy notices a target, unless its weapon reaches further
RESPONSE_RANGE = 21.0  # gap at which an enemy still answers whoever hurt it last
CALL_FOR_HELP_RANGE = 4.0  # tiles within which it also answers whoever hurt a comrade
HEAL_SCAN_RANGE = 6.0  # gap at which the enemy medivac notices a wounded unit
HEAL_MIN_ENERGY = 5.0  # energy that the enemy medivac needs to begin a heal
ARRIVAL_RANGE = 1.5  # an enemy this close to its attack point stops walking
SECOND_HIT_DELAY = {"zealot": 4, "colossus": 1}  # loops between the two hits of one swing
LANCE_LENGTH, LANCE_WIDTH = 1.4, 0.15  # half extents of the colossus's splash, before the victim's radius
BURST_RADIUS = 2.2  # of a baneling's splash, before the victim's radius
SIDESTEP = 1.0  # share of a push that is added sideways, so that a blocked unit walks round its blocker
MAX_PUSH = 0.25  # tiles per loop
FAR = 1000.0  # where the dead are put before distances are measured


class Units(NamedTuple):
    """Both teams of every game, fields (B, U). A unit lives while hp > 0; the dead keep the rest."""

    x: torch.Tensor
    y: torch.Tensor
    speed: torch.Tensor  # tiles per loop at which the unit walked in the last loop
    hp: torch.Tensor
    shield: torch.Tensor
    energy: torch.Tensor
    cooldown: torch.Tensor  # loops until the weapon is ready
    since_hit: torch.Tensor  # loops since the last damage
    second_hit: torch.Tensor  # loops until the second hit of a double swing lands, 0 = none under way
    second_target: torch.Tensor  # int64, whom that hit was meant for
    target: torch.Tensor  # int64 index into U of the unit being attacked or healed, -1 = none
    attacker: torch.Tensor  # int64 index of whoever hurt the unit last, -1 = nobody yet
    dying: torch.Tensor  # bool, a baneling that was killed in the last loop and is about to burst
    goal_x: torch.Tensor  # where the unit walks while it has no target
    goal_y: torch.Tensor
    walks: torch.Tensor  # bool, whether it does


class BattleSim:
    """The rules of one map: an object of constants; `spawn` and `step` are pure functions of tensors."""

    def __init__(self, map_name, device="cpu", compile=False):
        facts = json.loads((_DATA / "smac_maps.json").read_text())
        stats = json.loads((_DATA / "smac_units.json").read_text())["units"]
        battle = facts["maps"][map_name]
        self.device = torch.device(device)
        if compile and self.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise ValueError(
                "compiling for the CPU needs a C++ compiler: install g++ or set CXX, or do not compile"
            )
        self.n_agents, self.n_enemies = battle["n_agents"], battle["n_enemies"]
        self.n_units = self.n_agents + self.n_enemies
        self._order = battle["enemy_order"]
        walkable = _walkable(battle["terrain"])
        self.walkable = torch.tensor(walkable, device=self.device)  # (32, 32) [x, y]

        # spawn points: agents by type in the map's order, then by x and y; enemies as created
        placed = _pack(battle["ally_spawns"] + battle["enemy_spawns"], stats, walkable)
        rank = {group["unit"].lower(): i for i, group in enumerate(battle["agent_id_order"])}
        agents = sorted(placed[: self.n_agents], key=lambda unit: (rank[unit[0]], unit[1], unit[2]))
        placed = agents + placed[self.n_agents :]
        self.types = [name for name, _, _ in placed]
        kinds = [stats[name] for name in self.types]
        weapons = [
            kind["weapon"] or {"range": kind["heal"]["range"], "damage": 0, "targets": []} for kind in kinds
        ]

        def per_unit(values):
            return torch.tensor(values, dtype=torch.float32, device=self.device)  # (U,)

        self._spawn_x, self._spawn_y = (
            per_unit([x for _, x, _ in placed]),
            per_unit([y for _, _, y in placed]),
        )
        self.radius = per_unit([kind["radius"] for kind in kinds])
        self.hp_max = per_unit([kind["hp"] for kind in kinds])
        self.shield_max = per_unit([kind["shield"] for kind in kinds])
        self.period = per_unit([weapon.get("period_loops", 0) for weapon in weapons])
        self._reach = per_unit([weapon["range"] for weapon in weapons])
        self._slop = per_unit([weapon.get("range_slop", 0) for weapon in weapons])
        self._speed = per_unit([kind["move"]["speed_per_normal_second"] / LOOPS_PER_SECOND for kind in kinds])
        self._acceleration = per_unit(
            [kind["move"].get("acceleration", 1) / LOOPS_PER_SECOND**2 for kind in kinds]
        )
        self._life_regen = per_unit(
            [kind.get("life_regen_per_normal_second", 0) / LOOPS_PER_SECOND for kind in kinds]
        )
        self._second_delay = per_unit([SECOND_HIT_DELAY.get(name, 0) for name in self.types])
        self._armed = per_unit([kind["weapon"] is not None for kind in kinds]).bool()
        self._movable = self._speed > 0
        # (U,), left or right
        self._preference = 1.0 - 2.0 * (torch.arange(self.n_units, device=self.device) % 2)
        self._index = torch.arange(self.n_units, device=self.device)
        hunts = self._order["kind"] == "attack_unit_group"
        reach = self._reach[self.n_agents :]
        self._scan = torch.full_like(reach, 2 * MAP_SIZE) if hunts else reach.clamp(min=SCAN_RANGE)  # (M,)
        is_enemy = self._index >= self.n_agents
        self._arrival = torch.where(is_enemy, ARRIVAL_RANGE, 0.0)  # (U,)
        self._far = FAR + 50.0 * self._index  # (U,), apart from each other

        # who can hit, hurt and push whom
        def pairs(rule):
            return torch.tensor(
                [[rule(i, j) for j in range(self.n_units)] for i in range(self.n_units)], device=device
            )

        def bonus(i, j):
            by_attribute = weapons[i].get("bonus") or {}
            return sum(
                extra for attribute, extra in by_attribute.items() if attribute in kinds[j]["attributes"]
            )

        foe = pairs(lambda i, j: (i < self.n_agents) != (j < self.n_agents))
        hits = pairs(lambda i, j: bool(set(weapons[i]["targets"]) & set(kinds[j]["planes"]))) & foe
        self._can_hit = hits  # (U, U) attacker, target
        self._foe = foe.float()  # (U, U)
        # (U, U), before armour
        self._raw_damage = pairs(lambda i, j: float(weapons[i]["damage"] + bonus(i, j)))
        armor = per_unit([kind["life_armor"] for kind in kinds])
        self._net_damage = (self._raw_damage - armor).clamp(min=MIN_DAMAGE)
        self._armor = armor
        self._radii = self.radius[:, None] + self.radius  # (U, U)
        agents, enemies = slice(0, self.n_agents), slice(self.n_agents, None)
        offset = torch.where(hits, -self._radii, FAR)  # (U, U), keeps whom the weapon cannot hit out of range
        self._gap_offset = offset[enemies, agents]  # (M, N)
        # air and ground do not collide; a colossus stands above ground units, in the way of flyers only
        high = [kind["flying"] or "air" in kind["planes"] for kind in kinds]
        size = [kind["separation_radius"] for kind in kinds]
        # (U, U)
        self._separation = pairs(lambda i, j: size[i] + size[j] if i != j and high[i] == high[j] else 0.0)

        # what only some maps need
        def where_type(*names):
            return torch.tensor([i for i, name in enumerate(self.types) if name in names], device=self.device)

        self._colossi, self._banelings = where_type("colossus"), where_type("baneling")
        self._has_colossi, self._has_banelings = len(self._colossi) > 0, len(self._banelings) > 0
        self._has_shields = bool((self.shield_max > 0).any())
        self._has_double_hits = bool((self._second_delay > 0).any())
        self._medic = per_unit(["heal" in kind for kind in kinds]).bool()
        self._enemy_medics = torch.nonzero(self._medic[enemies]).flatten()  # ids among the M enemies
        self._has_medics = bool(self._medic.any())
        self._has_enemy_medics = len(self._enemy_medics) > 0
        self._biological = per_unit(["biological" in kind["attributes"] for kind in kinds]).bool()
        if self._has_medics:
            medivac = stats["medivac"]
            self._heal_rate = medivac["heal"]["rate_hp_per_loop"]
            self._heal_cost = medivac["heal"]["energy_per_hp"]
            self._energy_start, self._energy_max = medivac["energy"]["start"], medivac["energy"]["max"]
            self._energy_regen = medivac["energy"]["regen_per_loop"]

        # terrain: a box needs two clamps; anything else a grid per kind of unit and waypoints for the ground
        xs, ys = np.nonzero(walkable)
        box = (xs.min(), xs.max() + 1, ys.min(), ys.max() + 1)
        self._is_box = bool(walkable[box[0] : box[1], box[2] : box[3]].all())
        flying = per_unit([kind["flying"] for kind in kinds]).bool()
        edge = 1e-3
        self._low_x, self._high_x, self._low_y, self._high_y = (
            torch.where(flying, air, float(ground))
            for air, ground in zip((0.0, 32.0, 0.0, 32.0), box, strict=True)
        )
        self._high_x, self._high_y = self._high_x - edge, self._high_y - edge
        if not self._is_box:
            climbable = _climbable(battle["terrain"])
            grids = np.stack([walkable, walkable if climbable is None else climbable, np.ones_like(walkable)])
            # (3 * C,) ground, colossus, air
            self._grids = torch.tensor(grids.reshape(-1), device=self.device)
            layer = [
                2 if kind["flying"] else 1 if name == "colossus" else 0
                for kind, name in zip(kinds, self.types, strict=True)
            ]
            self._layer = torch.tensor(layer, device=self.device)  # (U,)
            self._waypoints = torch.tensor(_waypoints(battle["terrain"]), device=self.device)  # (C * C,)

        self._loop = torch.compile(self.game_loop, dynamic=False) if compile else self.game_loop

    def spawn(self, num_envs, generator):
        """Fresh battles: Units of (B, U). Only 2m_vs_1z draws from `generator` (the enemy's attack point)."""
        shape = (num_envs, self.n_units)
        zeros = torch.zeros(shape, device=self.device)
        none = torch.full(shape, -1, device=self.device)
        is_enemy = (self._index >= self.n_agents).expand(shape)
        goal_x, goal_y = zeros, zeros
        if self._order["kind"] == "attack_move_point":
            goal_x, goal_y = (torch.full_like(zeros, coordinate) for coordinate in self._order["point"])
        elif self._order["kind"] == "attack_move_point_random":
            (x0, y0), (x1, y1) = self._order["between"]
            share = torch.rand(num_envs, 1, generator=generator, device=self.device).expand(shape)  # (B, U)
            goal_x, goal_y = share * x0 + (1 - share) * x1, share * y0 + (1 - share) * y1
        return Units(
            x=self._spawn_x.expand(shape),
            y=self._spawn_y.expand(shape),
            speed=zeros,
            hp=self.hp_max.expand(shape),
            shield=self.shield_max.expand(shape),
            energy=torch.where(self._medic, self._energy_start, 0.0).expand(shape)
            if self._has_medics
            else zeros,
            cooldown=zeros,
            since_hit=zeros + SHIELD_DELAY,
            second_hit=zeros,
            second_target=none,
            target=none,
            attacker=none,
            dying=zeros.bool(),
            goal_x=goal_x,
            goal_y=goal_y,
            walks=is_enemy & self._order["kind"].startswith("attack_move"),
        )

    def step(self, units, actions, generator):
        """Obey actions (B, N) for 8 loops: 0 no-op, 1 stop, 2-5 north south east west, 6+k attack or heal k.

        Weapon delays are drawn from `generator` first; all that follows is a pure function of tensors.
        """
        shape = (LOOPS_PER_STEP, *units.hp.shape)
        # (8, B, U) uniform in [-1, 2]
        delays = torch.rand(shape, generator=generator, device=self.device) * 3 - 1
        units = self.obey(units, actions)
        for delay in delays.unbind():
            units = self._loop(units, delay)
        return units

    def obey(self, units, actions):
        """Units whose agents have actions (B, N) as their orders; the enemies keep theirs."""
        n = self.n_agents
        move_x = (actions == 4).float() - (actions == 5).float()  # (B, N)
        move_y = (actions == 2).float() - (actions == 3).float()  # (B, N)
        chosen = actions - 6  # enemy id; for a medivac the id of an agent
        target = torch.where(self._medic[:n], chosen, chosen + n)  # (B, N)
        # the game refuses an attack on what the weapon cannot hit (marauder, medivac): the unit stands
        possible = self._medic[:n] | self._can_hit[self._index[:n], target.clamp(min=0)]  # (B, N)
        target = torch.where((chosen >= 0) & possible, target, -1)
        return units._replace(
            target=torch.cat([target, units.target[:, n:]], 1),
            goal_x=torch.cat([units.x[:, :n] + MOVE_DISTANCE * move_x, units.goal_x[:, n:]], 1),
            goal_y=torch.cat([units.y[:, :n] + MOVE_DISTANCE * move_y, units.goal_y[:, n:]], 1),
            walks=torch.cat([(actions >= 2) & (actions <= 5), units.walks[:, n:]], 1),
        )

    def game_loop(self, units, delay):
        """One game loop: acquire, strike and heal, walk and push, recover. delay (B, U) in [-1, 2] loops."""
        alive = units.hp > 0  # (B, U)
        x, y = torch.where(alive, units.x, self._far), torch.where(alive, units.y, self._far)
        off_x, off_y = x[:, None] - x[:, :, None], y[:, None] - y[:, :, None]  # (B, U, U) from i to j
        distance = (off_x * off_x + off_y * off_y).sqrt()  # (B, U, U)

        target = self._acquire(units, distance)  # (B, U)
        aimed = target.clamp(min=0)
        gap = distance.gather(2, aimed[:, :, None])[:, :, 0] - self.radius - self.radius[aimed]  # (B, U)
        engaged = (target >= 0) & (gap < FAR / 2)  # False where either is dead
        in_reach = engaged & (gap <= self._reach)

        fires = in_reach & self._armed & (units.cooldown < 1)  # ready within this loop
        strikes, second_hit, second_target = self._second_hits(units, fires, target, engaged, gap)
        life_loss, shield = self._damage(units, x, y, strikes, target, second_target)
        healed, energy = self._heal(units, in_reach, aimed)
        hp = units.hp - life_loss
        dying = units.dying
        if self._has_banelings:
            suicide = torch.zeros_like(fires).index_copy(1, self._banelings, fires[:, self._banelings])
            hp = torch.where(suicide, 0.0, hp)
            killed = alive & (hp <= 0) & ~suicide
            dying = torch.zeros_like(killed).index_copy(1, self._banelings, killed[:, self._banelings])
        hp = torch.where(hp > 0, torch.minimum(hp + healed + self._life_regen, self.hp_max), 0.0)  # (B, U)

        moves = alive & torch.where(engaged, ~in_reach, units.walks)  # (B, U)
        new_x, new_y, speed = self._walk(units, x, y, moves, engaged, aimed)
        push_x, push_y = self._push(off_x, off_y, distance, speed > 0, new_x - x, new_y - y)
        new_x, new_y = self._stay_on_terrain(units.x, units.y, new_x + push_x, new_y + push_y)

        hurt = (life_loss > 0) | (shield < units.shield)  # (B, U)
        aimed = torch.where(strikes & (target >= 0), target, self.n_units)  # (B, U), the last column: nobody
        nobody = torch.full_like(aimed[:, :1], self.n_units).expand(-1, self.n_units + 1)
        striker = nobody.scatter_reduce(1, aimed, self._index.expand_as(aimed), "amin")[:, :-1]  # (B, U)
        attacker = torch.where(striker < self.n_units, striker, units.attacker)  # of several the first
        since_hit = torch.where(hurt, 0.0, units.since_hit + 1)
        if self._has_shields:
            shield = torch.where(since_hit >= SHIELD_DELAY, shield + SHIELD_REGEN, shield)
            shield = torch.minimum(shield, self.shield_max)
        return units._replace(
            x=torch.where(alive, new_x, units.x),
            y=torch.where(alive, new_y, units.y),
            speed=speed,
            hp=hp,
            shield=shield,
            energy=energy,
            cooldown=(units.cooldown + torch.where(fires, self.period + delay, 0.0) - 1).clamp(min=0),
            since_hit=since_hit,
            second_hit=second_hit,
            second_target=second_target,
            target=torch.where(engaged, target, -1),
            attacker=attacker,
            dying=dying,
        )

    def _acquire(self, units, distance):
        """Whom each unit goes for (B, U). Agents: whom they were told. Enemies: keep whom the weapon reaches,
        else the nearest in scan range, else who hurt them or a comrade; a medivac keeps its patient, else the
        weakest."""
        n = self.n_agents
        gaps = distance[:, n:, :n] + self._gap_offset  # (B, M, N)
        nearest_gap, nearest = gaps.min(2)  # (B, M)

        def gap_to(target):
            # (B, M)
            return torch.where(target >= 0, gaps.gather(2, target.clamp(0, n - 1)[:, :, None])[:, :, 0], FAR)

        target, attacker = units.target[:, n:], units.attacker[:, n:]  # (B, M)
        comrade = distance[:, n:, n:] <= CALL_FOR_HELP_RANGE  # (B, M, M)
        # (B, M), against whom a comrade calls for help
        called = torch.where(comrade, attacker[:, None], -1).amax(2)
        attacker = torch.where(gap_to(attacker) <= RESPONSE_RANGE, attacker, called)
        second_choice = torch.where(gap_to(attacker) <= RESPONSE_RANGE, attacker, -1)
        fresh = torch.where(nearest_gap <= self._scan, nearest, second_choice)
        chosen = torch.where(gap_to(target) <= self._reach[n:], target, fresh)
        if self._has_enemy_medics:
            medics = self._enemy_medics
            gaps = distance[:, n:, n:][:, medics] - self._radii[n:, n:][medics]  # (B, medics, M)
            life = units.hp[:, n:] / self.hp_max[n:]  # (B, M)
            wounded = (life > 0) & (life < 1) & self._biological[n:]
            patients = wounded[:, None] & (gaps <= HEAL_SCAN_RANGE)  # (B, medics, M)
            need, weakest = torch.where(patients, life[:, None] + 1e-3 * gaps, FAR).min(2)  # (B, medics)
            begins = (need < FAR) & (units.energy[:, n + medics] >= HEAL_MIN_ENERGY)
            patient = target[:, medics] - n
            keeps = (patient >= 0) & patients.gather(2, patient.clamp(min=0)[:, :, None])[:, :, 0]
            treated = torch.where(keeps, patient + n, torch.where(begins, weakest + n, -1))
            chosen = chosen.index_copy(1, medics, treated)
        return torch.cat([units.target[:, :n], chosen], 1)

    def _second_hits(self, units, fires, target, engaged, gap):
        """Zealots and colossi hit twice per swing; the second is lost if the target changes or gets away."""
        if not self._has_double_hits:
            return fires, units.second_hit, units.second_target
        held = engaged & (target == units.second_target) & (gap <= self._reach + self._slop)  # (B, U)
        if self._has_colossi:  # a beam sweeps its line whatever becomes of the target
            held = held.index_fill(1, self._colossi, True) & (units.hp > 0)
        lands = (units.second_hit == 1) & held
        waiting = torch.where(held, (units.second_hit - 1).clamp(min=0), 0.0)
        second_hit = torch.where(fires, self._second_delay, waiting)
        return fires | lands, second_hit, torch.where(fires, target, units.second_target)

    def _damage(self, units, x, y, strikes, target, second_target):
        """Hits of this loop -> life lost (B, U) and shields left (B, U)."""
        hits = torch.where(strikes, target, -1)[:, :, None] == self._index  # (B, U, U) striker, victim
        if self._has_colossi:
            hits = hits.index_copy(1, self._colossi, self._lance(units, x, y, strikes, second_target))
        if self._has_banelings:
            hits = hits.index_copy(1, self._banelings, self._burst(units, x, y, strikes))
        if self._has_shields:
            raw = hits * self._raw_damage  # (B, U, U)
            # before each hit, in unit order
            shield_left = (units.shield[:, None] - (raw.cumsum(1) - raw)).clamp(min=0)
            leak = raw - shield_left
            life = torch.where(leak > 0, (leak - self._armor).clamp(min=MIN_DAMAGE), 0.0).sum(1)  # (B, U)
            shield = (units.shield - raw.sum(1)).clamp(min=0)
        else:
            life = (hits * self._net_damage).sum(1)  # (B, U)
            shield = units.shield
        return life, shield

    def _lance(self, units, x, y, strikes, target):
        """Victims (B, colossi, U) of the colossi's beams: a line through the target, across the fire."""
        rows = self._colossi
        aimed = target[:, rows].clamp(min=0)  # (B, colossi)
        target_x, target_y = units.x.gather(1, aimed), units.y.gather(1, aimed)  # even if it is dead
        fire_x, fire_y = target_x - x[:, rows], target_y - y[:, rows]
        length = torch.hypot(fire_x, fire_y).clamp(min=1e-6)
        fire_x, fire_y = (fire_x / length)[:, :, None], (fire_y / length)[:, :, None]
        off_x, off_y = x[:, None] - target_x[:, :, None], y[:, None] - target_y[:, :, None]  # (B, colossi, U)
        along = (off_x * fire_x + off_y * fire_y).abs()
        across = (off_y * fire_x - off_x * fire_y).abs()
        in_line = (along <= LANCE_WIDTH + self.radius) & (across <= LANCE_LENGTH + self.radius)
        return strikes[:, rows, None] & in_line & self._can_hit[rows]

    def _burst(self, units, x, y, strikes):
        """Victims (B, banelings, U) of banelings that burst on a target or because they were killed."""
        rows = self._banelings
        off_x, off_y = x[:, None] - units.x[:, rows, None], y[:, None] - units.y[:, rows, None]
        near = torch.hypot(off_x, off_y) <= BURST_RADIUS + self.radius  # the dead are far away
        return (strikes | units.dying)[:, rows, None] & near & self._can_hit[rows]

    def _heal(self, units, in_reach, aimed):
        """Life given to each unit (B, U) by medivacs in reach of a wounded biological unit; energy left."""
        if not self._has_medics:
            return 0.0, units.energy
        missing = (self.hp_max - units.hp).gather(1, aimed)  # (B, U), of the patient
        able = in_reach & self._medic & self._biological[aimed]
        dose = torch.minimum(missing, units.energy / self._heal_cost).clamp(max=self._heal_rate) * able
        energy = units.energy - dose * self._heal_cost + torch.where(self._medic, self._energy_regen, 0.0)
        return torch.zeros_like(dose).scatter_add(1, aimed, dose), energy.clamp(max=self._energy_max)

    def _walk(self, units, x, y, moves, engaged, aimed):
        """Positions after walking towards the target or the goal, and the speed (B, U) reached."""
        goal_x = torch.where(engaged, x.gather(1, aimed), units.goal_x)  # (B, U)
        goal_y = torch.where(engaged, y.gather(1, aimed), units.goal_y)
        away = torch.hypot(goal_x - units.x, goal_y - units.y)  # (B, U), as the crow flies
        moves = moves & (engaged | (away > self._arrival))
        # brakes at once
        speed = torch.minimum(units.speed + self._acceleration, self._speed).minimum(away) * moves
        if not self._is_box:
            goal_x, goal_y = self._next_waypoint(units, goal_x, goal_y)
            away = torch.hypot(goal_x - units.x, goal_y - units.y)
        stride = speed / away.clamp(min=1e-6)
        return units.x + (goal_x - units.x) * stride, units.y + (goal_y - units.y) * stride, speed

    def _next_waypoint(self, units, goal_x, goal_y):
        """Where a ground unit heads to reach its goal round the terrain: the goal itself if it is open."""
        goal_cell = _cell(goal_x, goal_y)  # (B, U)
        # (B, U), -1 = straight on
        waypoint = self._waypoints[goal_cell * MAP_SIZE**2 + _cell(units.x, units.y)].long()
        detour = (waypoint >= 0) & (self._layer == 0)
        column = torch.div(waypoint, MAP_SIZE, rounding_mode="floor")
        return (
            torch.where(detour, column + 0.5, goal_x),
            torch.where(detour, waypoint - column * MAP_SIZE + 0.5, goal_y),
        )

    def _push(self, off_x, off_y, distance, moves, step_x, step_y):
        """Displacement (B, U) that undoes overlaps. Friends share it evenly; of two foes the one that walks
        gives way. Whoever walks slides round, on the side to which its step (B, U) already leads."""
        walking = moves.float()  # (B, U)
        share = 1 + self._foe * (walking[:, :, None] - walking[:, None])  # (B, U, U), twice i's share
        # (B, U, U)
        apart = (self._separation - distance).clamp(min=0) / distance.clamp(min=1e-3) * share / -2
        push_x, push_y = (apart * off_x).sum(2), (apart * off_y).sum(2)  # (B, U)
        left = step_y * push_x - step_x * push_y  # (B, U), > 0 where the step leads to the left of the push
        unclear = left.abs() < 0.1 * (step_x * push_x + step_y * push_y).abs()
        aside = SIDESTEP * walking * torch.where(unclear, self._preference, left.sign())
        push_x, push_y = push_x - aside * push_y, push_y + aside * push_x
        limit = MAX_PUSH * self._movable
        return push_x.clamp(-limit, limit), push_y.clamp(-limit, limit)

    def _stay_on_terrain(self, x, y, new_x, new_y):
        """Clamp a step to the walkable ground; along a wall the free part of the step is kept."""
        new_x = torch.minimum(torch.maximum(new_x, self._low_x), self._high_x)
        new_y = torch.minimum(torch.maximum(new_y, self._low_y), self._high_y)
        if self._is_box:
            return new_x, new_y
        layer = self._layer * MAP_SIZE**2
        free = self._grids[layer + _cell(new_x, new_y)]  # (B, U)
        free_x = self._grids[layer + _cell(new_x, y)]
        free_y = self._grids[layer + _cell(x, new_y)]
        return torch.where(free | free_x, new_x, x), torch.where(free | (free_y & ~free_x), new_y, y)


def _cell(x, y):
    return x.clamp(0, MAP_SIZE - 1).long() * MAP_SIZE + y.clamp(0, MAP_SIZE - 1).long()


@functools.cache
def _terrain(name):
    return json.loads((_DATA / "smac_maps.json").read_text())["terrains"][name]


def _walkable(terrain):
    """(32, 32) bool [x, y] from rows of '.' and '#', the top row first."""
    rows = _terrain(terrain)["pathing_rows_top_to_bottom"]
    return np.array([[cell == "." for cell in row] for row in reversed(rows)]).T


def _climbable(terrain):
    """(32, 32) bool [x, y]: where a colossus may stand, None where the map has no ledges."""
    if "cliff_level_rows_top_to_bottom" not in _terrain(terrain):
        return None
    rows = _terrain(terrain)["cliff_level_rows_top_to_bottom"]
    levels = np.array([[int(level) for level in row.split()] for row in reversed(rows)]).T
    columns, lines = np.indices(levels.shape)
    inside = (columns >= 2) & (columns <= 29) & (lines >= 2) & (lines <= 29)
    return (levels > 0) & inside


def _pack(groups, stats, walkable):
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
                if not (0 <= x < MAP_SIZE and 0 <= y < MAP_SIZE) or not (
                    kind["flying"] or walkable[int(x), int(y)]
                ):
                    continue
                if all(h != high or math.hypot(x - tx, y - ty) >= size + s for tx, ty, h, s in taken):
                    break
            placed.append((name, x, y))
            taken.append((x, y, high, size))
    return placed


@functools.cache
def _waypoints(terrain):
    """Way-finding table, flat (C * C,) int16: entry goal * C + cell is the farthest cell on the shortest path
    from cell to goal in a straight open line, or -1 where the goal itself is. A cell is x * 32 + y."""
    walkable = _walkable(terrain)
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
        side, front = (
            padded[cells[:, 0] + 1 + i, cells[:, 1] + 1],
            padded[cells[:, 0] + 1, cells[:, 1] + 1 + j],
        )
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
    climbable = _climbable(terrain)
    for goal in [] if climbable is None else np.argwhere(climbable & ~walkable):
        beside = np.hypot(*(cells - goal).T)  # (K,)
        doors = np.flatnonzero(beside <= beside.min() + 0.5)
        door = doors[length[doors].argmin(0)]  # (K,), of every cell
        onward = table[flat[door], flat]  # (K,)
        onward = np.where((onward < 0) & (door != here[0]), flat[door], onward)
        table[goal[0] * MAP_SIZE + goal[1], flat] = onward
    return table.reshape(-1)
