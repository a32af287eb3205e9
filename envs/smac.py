"""SMAC's interface, exact: masks, observations, state, reward and ends of the 23 maps, batched in torch.

Source: smac/env/starcraft2/starcraft2.py of oxwhirl/smac d6aab33 with default arguments. The functions below
name the method that they follow; the tests compare them with its outputs. The battle itself comes from an
engine (`smac_sim.py`) that fills (B, U) arrays of units; nothing here depends on which one.

    env = make("mmm", num_envs=32, device="cuda", seed=1)

Letters: B games, N agents, M enemies, U = N + M units (agents first, both in id order), A = 6 + M actions,
O observation, S state, F features of one unit in a row, K type bits.

Kept, though odd: the team is paid |net change| of the enemies' hp and shields, so their healing pays too;
type bits of enemy stalkers and zealots are reversed; a medivac's first feature about enemy k is whether
agent k can be healed; the cooldown feature may exceed 1; MMM is lost once only the medivac is left, or both
sides are dead.
Differs from the original, where it has plain bugs:
1. max_reward is counted once (there, once for every pass of the loop that waits for units).
2. A tie ends the episode and a fresh battle follows (there, the battle respawned within the step goes on).
3. `truncated` tells a timeout from an end (there, one flag for both).
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces

from envs.base import VecEnv
from envs.smac_sim import LOOPS_PER_STEP, BattleSim

_DATA = Path(__file__).parent
NO_OP, STOP, NORTH, SOUTH, EAST, WEST, FIRST_TARGET = range(7)  # 6 + k attacks enemy k, or heals agent k
SIGHT = 9.0  # tiles between centres, exclusive (unit_sight_range)
REACH = 6.0  # tiles between centres, inclusive, whatever the weapon (unit_shoot_range)
DEATH_VALUE, WIN_VALUE, SCALE_RATE = 10.0, 200.0, 20.0  # reward_death_value, reward_win, reward_scale_rate
NO_ACTION = -1  # last action of an episode that has just begun: a one-hot of zeros
GLYPHS = {"marine": "M", "marauder": "D", "stalker": "S", "zealot": "Z", "colossus": "C"}
GLYPHS |= {"zergling": "z", "hydralisk": "H", "baneling": "b", "spinecrawler": "X", "medivac": "+"}


class Facts(NamedTuple):
    """Constants of one map that the functions below need."""

    n_agents: int
    ally_shields: bool  # rows about agents have a slot for the shield: their race is P
    enemy_shields: bool
    is_mmm: bool  # map type MMM: medivacs heal, and do not hold a battle alone
    reward_scale: float
    hp_max: torch.Tensor  # (U,)
    shield_max: torch.Tensor  # (U,), at least 1
    charge_max: torch.Tensor  # (U,) weapon period in loops by SMAC's own table; a medivac's energy
    medivac: torch.Tensor  # (U,) bool
    type_bits: torch.Tensor  # (U, K) float
    target_unit: torch.Tensor  # (N, M) int64, the unit that action 6 + k is about; the agent itself: none
    has_target: torch.Tensor  # (N, M) bool
    free_moves: torch.Tensor  # (32 * 32, 4) bool, the cell north, south, east, west of each is walkable
    obs_index: torch.Tensor  # (N * O,) int64, where `observations` finds each entry
    actions: torch.Tensor  # (A,) int64, 0 ... A - 1


# ---- the interface, as pure functions ----
def features(units, last_actions, facts):
    """What a battle shows: obs (B, N, O), state (B, S), avail_actions (B, N, A); last_actions (B, N)."""
    n = facts.n_agents
    away_x = units.x[:, None] - units.x[:, :n, None]  # (B, N, U) from agent to unit
    away_y = units.y[:, None] - units.y[:, :n, None]
    distance = torch.sqrt(away_x * away_x + away_y * away_y)  # (B, N, U)
    alive = units.hp > 0  # (B, U)
    both_alive = alive[:, :n, None] & alive[:, None]  # (B, N, U)
    avail_actions = available_actions(units, alive, both_alive & (distance <= REACH), facts)
    seen = both_alive & (distance < SIGHT)
    obs = observations(units, away_x, away_y, distance, seen, avail_actions, facts)
    return obs, global_state(units, alive, last_actions, facts), avail_actions


def available_actions(units, alive, in_reach, facts):
    """Masks (B, N, A) from alive (B, U), in_reach (B, N, U). starcraft2.py get_avail_agent_actions, can_move.

    A move is tested one cell away, for flyers too, although the order goes two; units do not block it.
    """
    n = facts.n_agents
    living = alive[:, :n, None]  # (B, N, 1)
    column, line = units.x[:, :n].clamp(0, 31).long(), units.y[:, :n].clamp(0, 31).long()  # (B, N)
    moves = facts.free_moves[column * 32 + line] & living  # (B, N, 4)
    targets = in_reach.gather(2, facts.target_unit.expand(len(living), -1, -1))  # (B, N, M)
    return torch.cat([~living, living, moves, targets & facts.has_target], 2)


def observations(units, away_x, away_y, distance, seen, avail_actions, facts):
    """Observations (B, N, O) from pair features (B, N, U). starcraft2.py get_obs_agent.

    Each feature of all pairs of agent and unit is one sheet (B, N, U); a fixed index then picks SMAC's rows
    from the sheets. An agent's pair with itself serves as its own block.
    """
    life, shield = units.hp / facts.hp_max, units.shield / facts.shield_max  # (B, U)
    to_enemies = avail_actions[:, :, FIRST_TARGET:].float()  # (B, N, M), for a medivac: who can be healed
    first = torch.cat([torch.ones_like(distance[:, :, : facts.n_agents]), to_enemies], 2)  # (B, N, U)
    sheets = [first, distance / SIGHT, away_x / SIGHT, away_y / SIGHT, life[:, None].expand_as(distance)]
    if facts.ally_shields or facts.enemy_shields:
        sheets.append(shield[:, None].expand_as(distance))
    sheets += [bit.expand_as(distance) for bit in facts.type_bits.unbind(1)]
    rows = torch.stack(sheets, 1) * seen[:, None]  # (B, F, N, U)
    moves = avail_actions[:, :, NORTH:FIRST_TARGET].flatten(1)  # (B, N * 4)
    obs = torch.cat([moves.float(), rows.flatten(1)], 1).index_select(1, facts.obs_index)  # (B, N * O)
    return obs.view(*avail_actions.shape[:2], -1)


def global_state(units, alive, last_actions, facts):
    """State (B, S): rows of the agents, rows of the enemies, last actions. starcraft2.py get_state."""
    n = facts.n_agents
    life, shield = units.hp / facts.hp_max, units.shield / facts.shield_max  # (B, U)
    charge = torch.where(facts.medivac, units.energy, units.cooldown) / facts.charge_max  # (B, U)
    east, north = (units.x - 16) / 32, (units.y - 16) / 32  # (B, U), from the centre in map sizes
    bits = [bit.expand_as(life) for bit in facts.type_bits.unbind(1)]
    # (B, U, F)
    ally_rows = torch.stack([life, charge, east, north] + [shield] * facts.ally_shields + bits, 2)
    enemy_rows = torch.stack([life, east, north] + [shield] * facts.enemy_shields + bits, 2)  # (B, U, F)
    ally_rows, enemy_rows = (ally_rows * alive[:, :, None])[:, :n], (enemy_rows * alive[:, :, None])[:, n:]
    one_hot = last_actions[:, :, None] == facts.actions  # (B, N, A)
    return torch.cat([ally_rows.flatten(1), enemy_rows.flatten(1), one_hot.flatten(1).float()], 1)


def judge(before, after, facts):
    """Reward, battle_won, terminated, dead allies, dead enemies, (B,) each. reward_battle, get_game_code."""
    n = facts.n_agents
    alive = after.hp > 0  # (B, U)
    was_alive = before.hp[:, n:] > 0  # (B, M)
    health_before = (before.hp + before.shield)[:, n:] * was_alive  # (B, M)
    health_after = (after.hp + after.shield)[:, n:] * (was_alive & alive[:, n:])
    deaths = was_alive & ~alive[:, n:]  # (B, M)
    # the original takes |.| of the sum over all enemies: what heals more than it loses is paid for it
    damage = (health_before - health_after + DEATH_VALUE * deaths).sum(1).abs()  # (B,)

    fighting = alive & ~facts.medivac if facts.is_mmm else alive  # (B, U)
    allies_left, enemies_left = alive[:, :n].any(1), alive[:, n:].any(1)  # (B,)
    lost = ~fighting[:, :n].any(1) & (enemies_left | facts.is_mmm)
    won = ~lost & allies_left & ~fighting[:, n:].any(1)
    tied = ~allies_left & ~enemies_left  # on MMM this is lost already
    reward = (damage + WIN_VALUE * won) / facts.reward_scale
    return reward, won, lost | won | tied, (~alive[:, :n]).sum(1), (~alive[:, n:]).sum(1)


# ---- environment ----
class Smac(VecEnv):
    """B battles of one SMAC map. `info` adds `battle_won`, `dead_allies` and `dead_enemies`, each (B,)."""

    def __init__(self, map_name, num_envs, device, seed, validate=True, compile=False):
        battle = json.loads((_DATA / "smac_maps.json").read_text())["maps"][map_name]
        self.map_name = map_name
        self.n_enemies = battle["n_enemies"]
        # `compile` is for the game loop: `features` got slower by it on a CPU (MMM, B = 256: 0.9 -> 2.1 ms)
        self._sim = BattleSim(map_name, torch.device(device), compile)
        self._facts = _facts(battle, self._sim)
        n_agents, n_actions = battle["n_agents"], FIRST_TARGET + battle["n_enemies"]
        # every battle of a map begins alike, as far as can be seen: its first features are constants
        first = self._sim.spawn(1, torch.Generator(device))
        nothing = torch.full((1, n_agents), NO_ACTION, device=device)  # (1, N)
        self._first = features(first, nothing, self._facts)
        obs_dim, state_dim = self._first[0].shape[2], self._first[1].shape[1]
        space = spaces.MultiDiscrete([n_actions] * n_agents)
        super().__init__(
            num_envs, n_agents, obs_dim, state_dim, battle["episode_limit"], space, device, seed, validate
        )
        self._units = self._sim.spawn(num_envs, torch.Generator(device))  # reset() draws anew
        self._last_actions = nothing.expand(num_envs, -1)  # (B, N)
        self._picture = None

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        nobody = torch.zeros_like(self._episode_length).bool()  # (B,)
        self._picture = (self._units, self._episode_length, self._episode_return, nobody, nobody)
        return obs, info

    def _restart(self, done):
        fresh = self._sim.spawn(self.num_envs, self.generator)
        ended = done[:, None]  # (B, 1)
        pairs = zip(fresh, self._units, strict=True)
        self._units = fresh._make(torch.where(ended, new, old) for new, old in pairs)
        self._last_actions = torch.where(ended, NO_ACTION, self._last_actions)

    def _advance(self, actions):
        before, self._last_actions = self._units, actions
        self._units = self._sim.step(before, actions, self.generator)
        reward, won, terminated, dead_allies, dead_enemies = judge(before, self._units, self._facts)
        length, episode_return = self._episode_length + 1, self._episode_return + reward  # (B,)
        self._picture = (self._units, length, episode_return, won, terminated)
        info = {"battle_won": won, "dead_allies": dead_allies, "dead_enemies": dead_enemies}
        return reward, terminated, info

    def _observe(self):
        return features(self._units, self._last_actions, self._facts)

    def _observe_restarted(self, done, final):
        obs, state, avail_actions = final
        first_obs, first_state, first_avail_actions = self._first
        game = done[:, None]  # (B, 1)
        return (
            torch.where(game[:, None], first_obs, obs),
            torch.where(game, first_state, state),
            torch.where(game[:, None], first_avail_actions, avail_actions),
        )

    def render(self):
        """(H, 640, 3) uint8: game 0 from above as the latest step left it, even if that ended the battle."""
        if self._picture is None:
            raise RuntimeError("call env.reset() before env.render()")
        units, *record = self._picture
        units = units._make(field[0].cpu() for field in units)  # (U,) each
        length, episode_return, won, terminated = (entry[0].item() for entry in record)
        outcome = "time out" if length >= self.episode_limit else ""
        if terminated:
            tied = not (units.hp > 0).any() and not self._facts.is_mmm
            outcome = "won" if won else "tied" if tied else "lost"
        title = f"{self.map_name}   step {length}   return {episode_return:.1f}"
        return _draw(self._sim, units, title, outcome)


def _facts(battle, sim):
    """The constants of a map; `battle` is its entry in smac_maps.json."""
    types, n, m = sim.types, battle["n_agents"], battle["n_enemies"]
    is_mmm = battle["map_type"] == "MMM"
    medivac = torch.tensor([name == "medivac" for name in types])  # (U,)
    periods = json.loads((_DATA / "smac_units.json").read_text())["smac_cooldown_normaliser"]
    periods["medivac"] = 200  # of energy

    # get_unit_type_id: the agents' types in id order; those of enemy stalkers and zealots the other way round
    order = [group["unit"].lower() for group in battle["agent_id_order"]]
    enemy_order = order[::-1] if battle["map_type"] == "stalkers_and_zealots" else order
    bits = [[name == bit for bit in order] for name in types[:n]]
    bits += [[name == bit for bit in enemy_order] for name in types[n:]]

    target_unit = torch.arange(n, n + m).repeat(n, 1)  # (N, M)
    for i in range(n):
        if is_mmm and medivac[i]:
            target_unit[i] = torch.tensor([k if k < n and not medivac[k] else i for k in range(m)])

    wide = torch.nn.functional.pad(sim.walkable.cpu(), (1, 1, 1, 1))  # (34, 34), the edge is a wall
    moves = [wide[1:-1, 2:], wide[1:-1, :-2], wide[2:, 1:-1], wide[:-2, 1:-1]]  # north, south, east, west

    # where an agent's moves, enemy rows, ally rows and own row lie in the moves and sheets of `observations`
    shields = [battle["ally_race"] == "P", battle["enemy_race"] == "P"]
    sheets = ["first", "distance", "x", "y", "hp"] + ["shield"] * any(shields)
    sheets += ["bit"] * battle["unit_type_bits"]
    ally, enemy = ([f for f, name in enumerate(sheets) if name != "shield" or slot] for slot in shields)
    place = 4 * n + torch.arange(len(sheets) * n * (n + m)).view(len(sheets), n, n + m)  # (F, N, U)
    index = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        index += [torch.arange(4 * i, 4 * i + 4), place[enemy, i, n:].T]
        index += [place[ally, i][:, others].T, place[ally[4:], i, i]]

    facts = Facts(
        n_agents=n,
        ally_shields=shields[0],
        enemy_shields=shields[1],
        is_mmm=is_mmm,
        reward_scale=battle["max_reward"] / SCALE_RATE,
        hp_max=sim.hp_max,
        shield_max=sim.shield_max.clamp(min=1),
        charge_max=torch.tensor([float(periods.get(name, periods["other"])) for name in types]),
        medivac=medivac,
        type_bits=torch.tensor(bits)[:, : battle["unit_type_bits"]].float(),
        target_unit=target_unit,
        has_target=target_unit != torch.arange(n)[:, None],
        free_moves=torch.stack(moves, 2).flatten(0, 1),
        obs_index=torch.cat([part.flatten() for part in index]),
        actions=torch.arange(FIRST_TARGET + m),
    )
    return Facts(*(fact.to(sim.walkable.device) if torch.is_tensor(fact) else fact for fact in facts))


# ---- picture ----
def _draw(sim, units, title, outcome):
    """Picture of one battle, `units` (U,): blue agents, red enemies, shots and heals of this step."""
    from PIL import Image, ImageDraw, ImageFont  # only pictures need Pillow

    fine, header = 2, 32  # drawn at twice the size, then shrunk; pixels
    cells = sim.walkable.nonzero().tolist()
    west, south = min(x for x, _ in cells) - 0.5, min(y for _, y in cells) - 0.5
    width, height = max(x for x, _ in cells) + 1.5 - west, max(y for _, y in cells) + 1.5 - south  # tiles
    tile = fine * 640 / width
    size = (fine * 640, fine * 2 * round((header + 640 * height / width) / 2))  # even, for video codecs
    image = Image.new("RGB", size, (38, 40, 44))
    draw = ImageDraw.Draw(image, "RGBA")

    def at(x, y):
        return (x - west) * tile, size[1] - (y - south) * tile

    def box(x, y, half):
        return [*at(x - half, y + half), *at(x + half, y - half)]

    for x, y in cells:
        draw.rectangle(box(x + 0.5, y + 0.5, 0.5), fill=(92, 96, 88) if (x + y) % 2 else (88, 92, 84))
    life, shield = (units.hp / sim.hp_max.cpu()).tolist(), (units.shield / sim.shield_max.cpu()).tolist()
    shot = (units.cooldown > sim.period.cpu() - LOOPS_PER_STEP).tolist()  # within this step
    spots = list(zip(units.x.tolist(), units.y.tolist(), sim.radius.tolist(), sim.types, strict=True))
    tall = ("medivac", "colossus")
    for i in sorted(range(len(spots)), key=lambda i: (life[i] > 0, sim.types[i] in tall, -spots[i][1])):
        (x, y, radius, name), side = spots[i], (64, 128, 245) if i < sim.n_agents else (228, 66, 56)
        if life[i] <= 0:
            left, top, right, bottom = box(x, y, 0.6 * radius)
            draw.line([left, top, right, bottom], (*side, 80), 2 * fine)
            draw.line([left, bottom, right, top], (*side, 80), 2 * fine)
            continue
        lift, opacity = (0.3, 150) if name == "medivac" else (0.07, 255)
        draw.ellipse(box(x + lift, y - lift, radius), fill=(0, 0, 0, 70))
        draw.ellipse(box(x, y, radius), fill=(*side, opacity), outline=(20, 20, 24), width=fine)
        font = ImageFont.load_default(1.25 * radius * tile)
        draw.text(at(x, y), GLYPHS[name], fill=(255, 255, 255), font=font, anchor="mm")
        health = (96, 224, 92) if life[i] > 0.5 else (245, 200, 60) if life[i] > 0.25 else (255, 110, 70)
        left, base = at(x - radius, y + radius + 0.06)
        for share, colour in ((life[i], health), (shield[i], (130, 210, 255))):
            if share == share:  # not 0 / 0, a unit without shields
                for part, paint in ((1, (15, 15, 18, 200)), (share, colour)):
                    draw.rectangle([left, base - 2 * fine, left + 2 * radius * tile * part, base], fill=paint)
                base -= 3.5 * fine
    for i, j in enumerate(units.target.tolist()):
        heals = sim.types[i] == "medivac"
        if life[i] > 0 and j >= 0 and (shot[i] or heals):
            colour = (80, 255, 120) if heals else (255, 236, 120) if i < sim.n_agents else (255, 160, 90)
            draw.line([*at(*spots[i][:2]), *at(*spots[j][:2])], (*colour, 210), 3 * fine // 2)
            draw.ellipse(box(*spots[j][:2], 0.09), fill=colour)

    draw.rectangle([0, 0, size[0], fine * header], fill=(24, 25, 28))
    font, middle, margin = ImageFont.load_default(15 * fine), fine * header / 2, 10 * fine
    draw.text((margin, middle), title, fill=(225, 225, 225), font=font, anchor="lm")
    colour = {"won": (110, 220, 120), "lost": (240, 100, 90)}.get(outcome, (230, 200, 110))
    draw.text((size[0] - margin, middle), outcome, fill=colour, font=font, anchor="rm")
    return np.array(image.resize((size[0] // fine, size[1] // fine), Image.Resampling.LANCZOS))
