"""The battle simulator against numbers worked out by hand from smac_units.json and smac_maps.json.

Nothing is imported from the simulator but the simulator itself: every expected number stands in a comment
with its arithmetic. A scene is a real map on which all but the named units are dead; delays are mostly zero.

When shot k (k = 0, 1, ...) of a weapon falls: the weapon is ready at k * period, and loop t fires whatever is
ready before t + 1, so it falls in loop floor(k * period), after which floor(k * period) + 1 loops are over.
"""

import math

import pytest
import torch
from battles import DEVICE, Battles, make

import envs

MAPS = (
    "3m 8m 25m 5m_vs_6m 8m_vs_9m 10m_vs_11m 27m_vs_30m MMM MMM2 2s3z 3s5z 3s5z_vs_3s6z 3s_vs_3z 3s_vs_4z "
    "3s_vs_5z 1c3s5z 2m_vs_1z corridor 6h_vs_8z 2s_vs_1sc so_many_baneling bane_vs_bane 2c_vs_64zg"
).split()
ZERG_REGEN = 0.2734 / 16  # life per loop
NEVER = 1e6  # a cooldown that outlasts every test
_SIMS = {}


def battle(name):
    """One simulator per map for the whole file."""
    if name not in _SIMS:
        _SIMS[name] = Battles(name)
    return _SIMS[name]


def start(name, num_envs=1, seed=0):
    sim = battle(name)
    return sim, sim.spawn(num_envs, torch.Generator().manual_seed(seed))


def change(units, field, index, value):
    values = getattr(units, field).clone()
    values[:, index] = value
    return units._replace(**{field: values})


def scene(name, **placed):
    """`u3=(x, y)` or `u3=(x, y, {"hp": 8})`: unit 3 stands there, all others are dead. -> sim, units."""
    sim, units = start(name)
    units = units._replace(hp=torch.zeros_like(units.hp), walks=torch.zeros_like(units.walks))
    for key, (x, y, *fields) in placed.items():
        index = int(key[1:])
        everything = {"x": x, "y": y, "hp": float(sim.hp_max[index]), **(fields[0] if fields else {})}
        for field, value in everything.items():
            units = change(units, field, index, value)
    return sim, units


def play(sim, units, loops, hold=False, delay=0.0):
    """`loops` game loops; with `hold` everybody is put back after each of them."""
    if not hold:
        return sim.game_loops(units, torch.full((loops, *units.hp.shape), delay))
    x, y = units.x, units.y
    for _ in range(loops):
        units = sim.game_loop(units, torch.full_like(units.hp, delay))._replace(x=x, y=y)
    return units


def order(sim, units, **actions):
    """`u2=8`: agent 2 gets SMAC's action 8; everybody else stops."""
    chosen = torch.ones(units.hp.shape[0], sim.n_agents, dtype=torch.int64)
    for key, action in actions.items():
        chosen[:, int(key[1:])] = action
    return sim.obey(units, chosen)


def attack(sim, enemy):
    """The action that attacks unit `enemy` (an index among all units)."""
    return 6 + enemy - sim.n_agents


def loops_until(sim, units, condition, at_most, hold=False):
    for loop in range(1, at_most + 1):
        units = play(sim, units, 1, hold)
        if condition(units):
            return loop
    raise AssertionError(f"not within {at_most} loops")


def dead(index):
    return lambda units: float(units.hp[0, index]) <= 0


def types_are(sim, **expected):
    for key, name in expected.items():
        assert sim.types[int(key[1:])] == name


# ---- the ten unit types ----


def test_marine_two_of_them_kill_a_marauder():
    sim, units = scene("MMM", u2=(10, 16), u3=(10, 17), u17=(14, 16, {"cooldown": NEVER}))
    types_are(sim, u2="marine", u3="marine", u17="marauder")
    units = order(sim, units, u2=attack(sim, 17), u3=attack(sim, 17))
    # 6 - 1 armour = 5 each, 10 a volley, 125 life: 13 volleys; the 13th at 12 * 13.7728 = 165.27 -> 166 loops
    assert float(play(sim, units, 1, hold=True).hp[0, 17]) == 115
    assert loops_until(sim, units, dead(17), 200, hold=True) == 166


def test_marine_of_the_enemy_kills_a_passive_marine():
    sim, units = scene("3m", u0=(10, 16), u3=(15, 16))
    # 45 life, 6 a hit: 8 hits; the 8th at 7 * 13.7728 = 96.41 -> 97 loops
    assert loops_until(sim, units, dead(0), 120) == 97


def test_marauder_has_a_bonus_against_armored():
    sim, units = scene("MMM", u0=(10, 16), u17=(14, 16, {"cooldown": NEVER}))
    units = order(sim, units, u0=attack(sim, 17))
    # marauder is armored: 10 + 10 - 1 = 19; 125 life: 7 hits, the 7th at 6 * 24 = 144 -> 145 loops
    assert float(play(sim, units, 1, hold=True).hp[0, 17]) == 106
    assert loops_until(sim, units, dead(17), 200, hold=True) == 145


def test_marauder_hits_a_marine_without_bonus():
    sim, units = scene("MMM", u0=(10, 16), u10=(14, 16, {"cooldown": NEVER}))
    types_are(sim, u0="marauder", u10="marine")
    # marine is light, no armour: 10; 45 life: 5 hits, the 5th at 4 * 24 = 96 -> 97 loops
    assert loops_until(sim, order(sim, units, u0=attack(sim, 10)), dead(10), 120, hold=True) == 97


def test_marauder_cannot_hit_a_medivac_but_a_marine_can():
    sim, units = scene("MMM", u0=(10, 16), u2=(10, 17), u19=(13, 16))
    types_are(sim, u0="marauder", u2="marine", u19="medivac")
    assert float(play(sim, order(sim, units, u0=attack(sim, 19)), 40, hold=True).hp[0, 19]) == 150
    after = play(sim, order(sim, units, u2=attack(sim, 19)), 1, hold=True)
    assert float(after.hp[0, 19]) == 145  # 6 - 1 armour
    # and an enemy marauder does not even turn to an allied medivac
    sim, units = scene("MMM", u9=(10, 16), u17=(13, 16))
    after = play(sim, units, 40)
    assert float(after.hp[0, 9]) == 150 and int(after.target[0, 17]) == -1 and float(after.x[0, 17]) == 13


def test_stalker_shoots_a_zealot_through_its_shield():
    sim, units = scene("2s3z", u0=(10, 16), u7=(14, 16, {"cooldown": NEVER}))
    types_are(sim, u0="stalker", u7="zealot")
    units = order(sim, units, u0=attack(sim, 7))
    # shield 50 takes 5 hits of 10 unreduced, life 100 then 12 of 10 - 1 = 9;
    # the 17th at 16 * 23.04 = 368.64 -> 369 loops
    after = play(sim, units, 1 + 92, hold=True)  # 5th hit at 4 * 23.04 = 92.16
    assert (float(after.shield[0, 7]), float(after.hp[0, 7])) == (0, 100)
    after = play(sim, after, 23, hold=True)  # 6th at 115.2
    assert float(after.hp[0, 7]) == 91
    assert loops_until(sim, units, dead(7), 400, hold=True) == 369


def test_stalker_has_a_bonus_against_a_stalker():
    sim, units = scene("2s3z", u0=(10, 16), u5=(14, 16, {"cooldown": NEVER}))
    types_are(sim, u5="stalker")
    # armored: 14 a hit; shield 80: 5 hits leave 10; the 6th spends 10 there and 4 - 1 = 3 on life; then 13
    # each: 77 / 13 -> 6 more; the 12th hit at 11 * 23.04 = 253.44 -> 254 loops
    units = order(sim, units, u0=attack(sim, 5))
    after = play(sim, units, 116, hold=True)  # 6th hit at 115.2
    assert (float(after.shield[0, 5]), float(after.hp[0, 5])) == (0, 77)
    assert loops_until(sim, units, dead(5), 300, hold=True) == 254


def test_stalker_gets_its_shield_back_after_160_loops():
    sim, units = scene("2s3z", u0=(10, 16, {"shield": 5.0, "since_hit": 0.0}))
    units = play(sim, units, 159)
    assert float(units.shield[0, 0]) == 5
    units = play(sim, units, 1)
    assert float(units.shield[0, 0]) == 5.125  # 2 per second / 16
    assert float(play(sim, units, 8).shield[0, 0]) == 6.125
    assert float(play(sim, units, 1000).shield[0, 0]) == 80


def test_a_hit_starts_the_160_loops_anew_and_life_never_returns_to_protoss():
    sim, units = scene("2s3z", u2=(10, 16, {"shield": 30.0}), u5=(14, 16))
    types_are(sim, u2="zealot", u5="stalker")
    units = play(sim, units, 1, hold=True)
    assert float(units.shield[0, 2]) == 20
    units = change(units, "cooldown", 5, NEVER)
    assert float(play(sim, units, 159, hold=True).shield[0, 2]) == 20
    assert float(play(sim, units, 160, hold=True).shield[0, 2]) == 20.125
    _, units = scene("2s3z", u2=(10, 16, {"hp": 30.0}))
    assert float(play(sim, units, 100).hp[0, 2]) == 30


def test_zealot_hits_twice_per_swing():
    sim, units = scene("2m_vs_1z", u0=(13, 12), u2=(13.9, 12))
    types_are(sim, u0="marine", u2="zealot")
    # swings at 0, 19.2, 38.4 and each second hit 4 loops later: life 45 falls in loops 0, 4, 19, 23, 38, 42
    history = []
    for _ in range(43):
        units = play(sim, units, 1, hold=True)
        history.append(float(units.hp[0, 0]))
    falls = [t for t in range(43) if history[t] < ([45.0] + history)[t]]
    assert falls == [0, 4, 19, 23, 38, 42]
    assert history[3] == 37 and history[4] == 29 and history[41] == 5 and history[42] == 0


def test_zealot_against_zealot_pays_armour_on_every_hit():
    sim, units = scene("2s3z", u2=(10, 16), u7=(10.8, 16, {"cooldown": NEVER, "shield": 10.0}))
    units = order(sim, units, u2=attack(sim, 7))
    # 8 on shield 10, then 2 on shield and 6 - 1 = 5 on life, then 8 - 1 = 7
    units = play(sim, units, 1, hold=True)
    assert (float(units.shield[0, 7]), float(units.hp[0, 7])) == (2, 100)
    units = play(sim, units, 4, hold=True)
    assert (float(units.shield[0, 7]), float(units.hp[0, 7])) == (0, 95)
    assert float(play(sim, units, 15, hold=True).hp[0, 7]) == 88


@pytest.mark.parametrize("distance, hits", [(1.8, 2), (1.99, 1)])
def test_zealot_loses_its_second_hit_when_the_target_leaves(distance, hits):
    # reach 0.1 + slop 1 + radii 0.5 + 0.375 = 1.975 between centres once the swing has begun
    sim, units = scene("2m_vs_1z", u0=(13, 12), u2=(13.9, 12))
    units = play(sim, units, 1, hold=True)
    units = change(units, "x", 0, 13.9 - distance)
    assert float(play(sim, units, 4, hold=True).hp[0, 0]) == 45 - 8 * hits


def test_zealot_loses_its_second_hit_when_it_turns_to_another_or_moves_away():
    sim, units = scene(
        "2s3z", u2=(10, 16), u7=(10.8, 16, {"cooldown": NEVER}), u8=(9.2, 16, {"cooldown": NEVER})
    )
    units = play(sim, order(sim, units, u2=attack(sim, 7)), 2, hold=True)
    other = play(sim, order(sim, units, u2=attack(sim, 8)), 10, hold=True)
    assert other.shield[0, 7:9].tolist() == [42, 50]  # one hit of 8, and the swing is used up
    away = play(sim, order(sim, units, u2=5), 10, hold=True)
    assert away.shield[0, 7:9].tolist() == [42, 50]
    kept = play(sim, order(sim, units, u2=attack(sim, 7)), 10, hold=True)  # the same order again does no harm
    assert kept.shield[0, 7:9].tolist() == [34, 50]


def test_zergling_gnaws_at_a_passive_zealot():
    sim, units = scene("corridor", u0=(19, 19), u6=(19.9, 19))
    types_are(sim, u0="zealot", u6="zergling")
    # shield 50: 10 hits of 5; life 100: 25 of 5 - 1; the 35th at 34 * 11.136 = 378.62 -> 379 loops
    assert loops_until(sim, units, dead(0), 400, hold=True) == 379


def test_zergling_regenerates():
    sim, units = scene("corridor", u6=(19.9, 19, {"hp": 10.0}))
    assert float(play(sim, units, 80).hp[0, 6]) == pytest.approx(
        10 + 80 * ZERG_REGEN, abs=1e-3
    )  # 10 + 5 s * 0.2734
    assert float(play(sim, change(units, "hp", 6, 34.99), 80).hp[0, 6]) == 35


def test_hydralisk_kills_a_zealot():
    sim, units = scene("6h_vs_8z", u0=(14, 10), u6=(14, 15, {"cooldown": NEVER}))
    types_are(sim, u0="hydralisk", u6="zealot")
    # shield 50: 4 hits of 12 leave 2; the 5th puts 10 - 1 = 9 on life; 91 / 11 -> 9 more;
    # the 14th at 13 * 13.28 = 172.64 -> 173 loops
    units = order(sim, units, u0=attack(sim, 6))
    assert loops_until(sim, units, dead(6), 200, hold=True) == 173
    # range 5 + radii 0.625 + 0.5 = 6.125: at 6.1 at once, at 6.2 only after a step
    for y, shield in ((16.1, 38), (16.2, 50)):
        after = play(sim, order(sim, change(units, "y", 6, y), u0=attack(sim, 6)), 1)
        assert float(after.shield[0, 6]) == shield


def test_hydralisk_regenerates():
    sim, units = scene("6h_vs_8z", u0=(14, 10, {"hp": 40.0}))
    assert float(play(sim, units, 16).hp[0, 0]) == pytest.approx(40.2734, abs=1e-4)


def test_spine_crawler_kills_a_stalker():
    sim, units = scene("2s_vs_1sc", u0=(13.92, 12.54), u2=(13.92, 20.04))
    types_are(sim, u0="stalker", u2="spinecrawler")
    # 25 + 5 armored: shield 80 -> 50 -> 20 -> 0 and 10 - 1 = 9 on life, then 29 each: 71 -> 42 -> 13 -> dead.
    # hits in loops 0, 25 (25.6), 51 (51.2), 76 (76.8), 102 (102.4), 128 (128.0, so rounding may make it 127)
    wanted = {25: (50, 80), 26: (20, 80), 51: (20, 80), 52: (0, 71), 77: (0, 42), 103: (0, 13), 127: (0, 13)}
    for loop in range(1, 128):
        units = play(sim, units, 1, hold=True)
        if loop in wanted:
            assert (float(units.shield[0, 0]), float(units.hp[0, 0])) == wanted[loop]
    assert loops_until(sim, units, dead(0), 2, hold=True) <= 2


def test_spine_crawler_reaches_7_tiles_between_edges_and_never_moves():
    # 7 + 0.875 + 0.625 = 8.5 between centres
    for distance, shield in ((8.49, 50), (8.51, 80)):
        sim, units = scene("2s_vs_1sc", u0=(13.92, 20.04 - distance), u2=(13.92, 20.04))
        assert float(play(sim, units, 1).shield[0, 0]) == shield
    after = play(sim, units, 200)
    assert float(after.y[0, 2]) == pytest.approx(20.04) and float(after.shield[0, 0]) == 80
    # nor does a stalker that presses against it move it
    sim, units = scene("2s_vs_1sc", u0=(13.92, 18.3), u2=(13.92, 20.04, {"cooldown": NEVER}))
    after = play(sim, order(sim, units, u0=2), 16)
    assert (float(after.x[0, 2]), float(after.y[0, 2])) == pytest.approx((13.92, 20.04))


def test_spine_crawler_armour_and_regeneration():
    sim, units = scene("2s_vs_1sc", u0=(13.92, 15), u2=(13.92, 20.04, {"cooldown": NEVER}))
    units = play(sim, order(sim, units, u0=attack(sim, 2)), 1, hold=True)
    assert float(units.hp[0, 2]) == pytest.approx(300 - 12 + ZERG_REGEN, abs=1e-4)  # 10 + 4 armored - 2
    units = play(sim, order(sim, units, u0=1), 160, hold=True)
    assert float(units.hp[0, 2]) == pytest.approx(288 + 161 * ZERG_REGEN, abs=1e-3)


def test_baneling_that_is_killed_hurts_its_neighbours_once():
    # 2.2 + the zealot's radius 0.5 = 2.7 between centres; 20 + 15 to light
    sim, units = scene(
        "so_many_baneling",
        u0=(10, 10),
        u1=(10.8 + 2.69, 10),
        u2=(10.8, 12.71),
        u7=(10.8, 10, {"hp": 8.0, "cooldown": NEVER}),
    )
    types_are(sim, u0="zealot", u7="baneling")
    units = play(sim, order(sim, units, u0=attack(sim, 7)), 1, hold=True)
    assert float(units.hp[0, 7]) == 0 and units.shield[0, :3].tolist() == [50, 50, 50]
    units = play(sim, units, 1, hold=True)
    assert units.shield[0, :3].tolist() == [15, 15, 50]
    units = play(sim, units, 50, hold=True)
    assert units.shield[0, :3].tolist() == [15, 15, 50]


def test_baneling_bursts_on_its_target_only_once():
    sim, units = scene("so_many_baneling", u0=(10, 10), u1=(12, 10), u7=(11.1, 10), u8=(20, 22))
    # gap 1.1 - 0.875 = 0.225 <= 0.25
    units = play(sim, units, 1, hold=True)
    assert float(units.hp[0, 7]) == 0 and units.shield[0, :2].tolist() == [15, 15]
    units = play(sim, units, 20, hold=True)
    assert units.shield[0, :2].tolist() == [15, 15] and float(units.hp[0, 8]) == 30


def test_baneling_that_bursts_in_the_loop_of_its_death_bursts_once():
    sim, units = scene("so_many_baneling", u0=(10, 10), u7=(11, 10, {"hp": 8.0}))
    units = play(sim, order(sim, units, u0=attack(sim, 7)), 10, hold=True)
    assert float(units.hp[0, 7]) == 0 and float(units.shield[0, 0]) == 15


def test_banelings_chain_between_the_sides_without_friendly_fire():
    sim, units = scene(
        "bane_vs_bane",
        u0=(16, 16, {"hp": 20.0}),  # allied baneling beside the first victim
        u1=(15, 16),  # a healthy one
        u4=(16, 15),  # allied zergling
        u24=(17, 16),  # enemy zergling
        u44=(16.8, 16.5, {"hp": 5.0, "cooldown": NEVER}),
        u45=(17.5, 16.5, {"cooldown": NEVER}),
    )
    types_are(sim, u0="baneling", u4="zergling", u24="zergling", u44="baneling")
    units = change(units, "cooldown", 24, NEVER)
    units = play(sim, order(sim, units, u4=attack(sim, 44)), 1, hold=True)  # 1.7 - 0.75 = 0.95 away: not yet
    assert float(units.hp[0, 44]) > 0
    units = change(change(units, "x", 4, 16.4), "y", 4, 15.8)
    units = play(sim, order(sim, units, u4=attack(sim, 44)), 1, hold=True)  # gap 0.81 - 0.75 = 0.06: bites 5
    assert float(units.hp[0, 44]) > 0  # 5.02 after a loop of regeneration
    units = change(units, "hp", 44, 5.0)
    units = change(units, "cooldown", 4, 0.0)
    units = play(sim, units, 1, hold=True)
    assert float(units.hp[0, 44]) == 0  # killed: bursts in the next loop
    units = play(sim, units, 1, hold=True)
    # 20 to banelings, 35 to light zerglings, nothing to its own side
    assert float(units.hp[0, 0]) <= 0.1 and float(units.hp[0, 1]) == pytest.approx(10 + ZERG_REGEN, abs=0.1)
    assert float(units.hp[0, 4]) == 0 and float(units.hp[0, 24]) == 35 and float(units.hp[0, 45]) == 30


def test_baneling_chain_goes_on_one_loop_later():
    sim, units = scene(
        "bane_vs_bane",
        u0=(16, 16, {"hp": 15.0}),
        u24=(17, 16),
        u44=(17, 17, {"hp": 5.0, "cooldown": NEVER}),
        u45=(18, 16),
    )
    units = change(change(units, "cooldown", 45, NEVER), "cooldown", 24, NEVER)
    units = change(units, "dying", 44, True)
    units = change(units, "hp", 44, 0.0)
    units = play(sim, units, 1, hold=True)
    assert float(units.hp[0, 0]) == 0  # 15 - 20
    assert float(units.hp[0, 24]) == 35
    units = play(sim, units, 1, hold=True)
    assert float(units.hp[0, 24]) == 0  # the allied baneling answers: 35 to the zergling, 20 to the baneling
    assert float(units.hp[0, 45]) == pytest.approx(10 + ZERG_REGEN, abs=1e-4)


def test_colossus_kills_a_zealot():
    sim, units = scene("1c3s5z", u4=(10, 16), u9=(15, 16))
    types_are(sim, u4="zealot", u9="colossus")
    # two beams of 20, one loop apart: shield 50 -> 30 -> 10 -> 0 and 10 - 1 = 9 on life, then 19 each:
    # 91 -> 72 -> 53 -> 34 -> 15 -> dead with the 8th beam, in loop floor(3 * 35.2) + 1 = 106 -> 107 loops
    assert float(play(sim, units, 2, hold=True).shield[0, 4]) == 10
    assert float(play(sim, units, 37, hold=True).hp[0, 4]) == 72
    assert loops_until(sim, units, dead(4), 150, hold=True) == 107


def test_colossus_lance_is_a_line_across_the_fire():
    # half length 1.4 + 0.375 = 1.775 across the fire, half width 0.15 + 0.375 = 0.525 along it
    places = {
        "u2": (15, 17),
        "u3": (15, 18.7),
        "u4": (15, 15.3),
        "u5": (15, 18.8),
        "u6": (14.45, 17),
        "u7": (15.55, 17),
        "u8": (15.5, 16.5),
    }
    sim, units = scene("2c_vs_64zg", u0=(10, 17), **places)
    types_are(sim, u0="colossus", u2="zergling")
    units = order(sim, units, u0=attack(sim, 2))
    units = play(sim, units, 1, hold=True)
    hit = [15, 15, 15, 35, 35, 35, 15]  # 35 - 20
    assert units.hp[0, 2:9].tolist() == pytest.approx(hit, abs=0.1)
    units = play(sim, units, 1, hold=True)  # the second beam takes 20 more: all in the line are dead
    assert units.hp[0, 2:9].tolist() == pytest.approx([0, 0, 0, 35, 35, 35, 0], abs=0.1)


def test_colossus_sweeps_its_second_beam_although_the_first_killed_the_target():
    # the two beams of one volley sweep one line, and each touches whoever stands there
    sim, units = scene("2c_vs_64zg", u0=(10, 17), u2=(15, 17, {"hp": 10.0}), u3=(15, 18))
    units = play(sim, order(sim, units, u0=attack(sim, 2)), 2, hold=True)
    assert units.hp[0, 2:4].tolist() == [0, 0]
    # its own death, however, ends the volley
    _, units = scene("2c_vs_64zg", u0=(10, 17), u2=(15, 17), u3=(15, 18))
    units = play(sim, order(sim, units, u0=attack(sim, 2)), 1, hold=True)
    units = play(sim, change(units, "hp", 0, 0.0), 3, hold=True)
    assert units.hp[0, 2:4].tolist() == pytest.approx([15, 15], abs=0.1)


def test_colossus_reaches_6_tiles_between_edges():
    for distance, hit in ((7.37, True), (7.39, False)):  # 6 + 1.0 + 0.375
        sim, units = scene("2c_vs_64zg", u0=(10, 17), u2=(10 + distance, 17))
        after = play(sim, order(sim, units, u0=attack(sim, 2)), 1)
        assert (float(after.hp[0, 2]) < 30) == hit


def test_colossus_can_be_hit_by_ground_weapons():
    sim, units = scene("2c_vs_64zg", u0=(10, 17), u2=(11.4, 17))
    assert float(play(sim, units, 1).shield[0, 0]) == 145  # 5, unreduced by the life's armour


# ---- medivac ----


def test_medivac_heals():
    sim, units = scene("MMM", u2=(10, 16, {"hp": 20.0}), u9=(12, 16))
    units = order(sim, units, u9=6 + 2)
    after = play(sim, units, 16)
    # 0.5625 life a loop; energy 50 - 16 * 0.5625 * 0.33 + 16 * 0.03515625
    assert float(after.hp[0, 2]) == pytest.approx(29)
    assert float(after.energy[0, 9]) == pytest.approx(50 - 2.97 + 0.5625, abs=1e-4)
    # 25 missing: 45 loops at 0.5625 are 25.3, so full after 45, and nothing is spent on a full unit
    after = play(sim, units, 45)
    assert float(after.hp[0, 2]) == 45
    later = play(sim, after, 16)
    assert float(later.energy[0, 9] - after.energy[0, 9]) == pytest.approx(0.5625, abs=1e-4)


def test_medivac_heals_marauders_and_stops_without_energy():
    sim, units = scene("MMM", u0=(10, 16, {"hp": 20.0}), u9=(12, 16, {"energy": 0.0}))
    types_are(sim, u0="marauder")
    after = play(sim, order(sim, units, u9=6), 100)
    # lives on its regeneration: 0.03515625 / 0.33 life a loop, one loop late
    assert float(after.hp[0, 0]) == pytest.approx(20 + 99 * 0.03515625 / 0.33, abs=0.2)
    assert float(after.energy[0, 9]) >= 0


def test_medivac_energy_is_bounded():
    sim, units = scene("MMM", u9=(12, 16, {"energy": 199.9}))
    assert float(play(sim, units, 10).energy[0, 9]) == 200
    _, units = start("MMM")
    assert units.energy[0, [9, 19]].tolist() == [50, 50] and float(units.energy.sum()) == 100


def test_medivac_does_not_heal_a_medivac():
    sim, units = scene("MMM", u9=(10, 16, {"hp": 20.0}), u19=(12, 16, {"hp": 20.0}))
    after = play(sim, units, 30)
    assert float(after.hp[0, 9]) == 20 and float(after.hp[0, 19]) == 20


@pytest.mark.parametrize("distance, heals", [(5.12, True), (5.14, False)])
def test_medivac_heals_at_4_tiles_between_edges(distance, heals):
    sim, units = scene("MMM", u2=(10, 16, {"hp": 20.0}), u9=(10 + distance, 16))  # 4 + 0.75 + 0.375 = 5.125
    after = play(sim, order(sim, units, u9=6 + 2), 1)
    assert (float(after.hp[0, 2]) > 20) == heals
    if not heals:  # it flies in, then heals
        assert float(play(sim, after, 8).hp[0, 2]) > 20


def test_medivac_of_the_agents_heals_only_when_told():
    sim, units = scene("MMM", u2=(10, 16, {"hp": 20.0}), u9=(12, 16))
    assert float(play(sim, units, 80).hp[0, 2]) == 20


def test_medivac_of_the_enemy_takes_the_weakest_within_6():
    # life fractions: marauder 60/125 = 0.48, marine 20/45 = 0.44, a marine at 5/45 but 6.01 + 1.125 away
    sim, units = scene(
        "MMM",
        u10=(22, 16, {"hp": 20.0}),
        u17=(21, 16, {"hp": 60.0}),
        u11=(20 + 7.14, 16, {"hp": 5.0}),
        u19=(20, 16),
    )
    types_are(sim, u17="marauder", u19="medivac")
    after = play(sim, units, 8, hold=True)
    assert after.hp[0, [10, 17, 11]].tolist() == pytest.approx([24.5, 60, 5])
    # it keeps its patient while another falls below, and turns to the next when that one is whole
    after = change(after, "hp", 17, 10.0)
    after = play(sim, after, 8, hold=True)
    assert after.hp[0, [10, 17]].tolist() == pytest.approx([29, 10])
    after = play(sim, after, 40, hold=True)
    assert float(after.hp[0, 10]) == 45 and float(after.hp[0, 17]) > 10
    # within 6 (edge to edge) it notices, and flies to the one at 7.1 between centres
    after = play(sim, change(units, "x", 11, 20 + 7.1), 1)
    assert int(after.target[0, 19]) == 11 and float(after.x[0, 19]) > 20


def test_medivac_of_the_enemy_needs_5_energy_to_begin():
    for energy, heals in ((4.9, False), (5.0, True)):
        sim, units = scene("MMM", u10=(22, 16, {"hp": 20.0}), u19=(20, 16, {"energy": energy}))
        assert (float(play(sim, units, 1).hp[0, 10]) > 20) == heals


def test_medivac_accelerates():
    sim, units = scene("MMM", u9=(5, 16))
    units = order(sim, units, u9=4)
    assert float(units.x[0, 9]) == 5
    a = 2.3125 / 256  # tiles per loop, each loop
    travelled = 0.0
    for loop in range(1, 9):
        units = play(sim, units, 1)
        travelled += min(loop * a, 0.171875)
        assert float(units.x[0, 9]) == pytest.approx(5 + travelled, abs=1e-4)
    # full speed 2.75 / 16 after ceil(0.171875 / 0.00903) = 20 loops; a new order keeps the speed
    units = play(sim, order(sim, units, u9=4), 8)
    units = play(sim, order(sim, units, u9=4), 8)
    before = float(units.x[0, 9])
    units = play(sim, order(sim, units, u9=4), 8)
    assert float(units.x[0, 9]) - before == pytest.approx(8 * 0.171875, abs=1e-4)  # 1.375 per step
    assert float(play(sim, order(sim, units, u9=1), 1).x[0, 9]) == float(units.x[0, 9])  # brakes at once


# ---- movement and orders ----


@pytest.mark.parametrize(
    "name, unit, step",  # 8 loops of speed / 16
    [("3m", 0, 1.125), ("MMM", 0, 1.125), ("2s3z", 0, 1.47655), ("2s3z", 2, 1.125), ("1c3s5z", 0, 1.125)]
    + [("bane_vs_bane", 0, 1.25), ("bane_vs_bane", 4, 1.47655), ("6h_vs_8z", 0, 1.125)],
)
@pytest.mark.parametrize("action, way", [(2, (0, 1)), (3, (0, -1)), (4, (1, 0)), (5, (-1, 0))])
def test_ground_units_walk_at_full_speed_at_once(name, unit, step, action, way):
    sim, units = scene(name, **{f"u{unit}": (15, 14)})
    units = order(sim, units, **{f"u{unit}": action})
    after = play(sim, units, 8)
    moved = (float(after.x[0, unit]) - 15, float(after.y[0, unit]) - 14)
    assert moved == pytest.approx((way[0] * step, way[1] * step), abs=1e-4)
    after = play(sim, units, 40)  # the order goes 2 tiles and no further
    moved = (float(after.x[0, unit]) - 15, float(after.y[0, unit]) - 14)
    assert moved == pytest.approx((2 * way[0], 2 * way[1]), abs=1e-4)


def test_agents_never_shoot_unless_told():
    sim, units = scene("3m", u0=(10, 16), u3=(14, 16, {"cooldown": NEVER}))
    for action in (1, 2, 3, 4, 5):
        assert float(play(sim, order(sim, units, u0=action), 40).hp[0, 3]) == 45
    assert float(play(sim, units, 40).hp[0, 3]) == 45
    # told once, it goes on until the target is dead, then idles although another enemy is near
    sim, units = scene(
        "3m", u0=(10, 16), u3=(14, 16, {"hp": 6.0, "cooldown": NEVER}), u4=(14, 17, {"cooldown": NEVER})
    )
    units = play(sim, order(sim, units, u0=attack(sim, 3)), 60)
    assert float(units.hp[0, 3]) == 0 and float(units.hp[0, 4]) == 45 and int(units.target[0, 0]) == -1


def test_an_attack_order_walks_into_reach():
    sim, units = scene("3m", u0=(10, 16), u3=(16, 16, {"cooldown": NEVER}))  # marines reach 5 + 0.75 = 5.75
    after = play(sim, order(sim, units, u0=attack(sim, 3)), 2, hold=False)
    assert float(after.x[0, 0]) > 10 and float(after.hp[0, 3]) == 45
    after = play(sim, order(sim, units, u0=attack(sim, 3)), 8)
    assert float(after.hp[0, 3]) < 45


# ---- what the enemy does ----


@pytest.mark.parametrize("distance, notices", [(5.86, True), (5.89, False)])
def test_enemy_notices_at_5_tiles_between_edges(distance, notices):
    sim, units = scene("2m_vs_1z", u0=(13, 12), u2=(13 + distance, 12))  # 5 + 0.5 + 0.375 = 5.875
    assert (int(play(sim, units, 1).target[0, 2]) == 0) == notices


@pytest.mark.parametrize("distance, goes", [(21.85, True), (21.9, False)])
def test_enemy_lets_go_at_21_tiles_between_edges(distance, goes):
    """Of its target, and of whoever hurt it, with chase or without."""
    sim, units = scene("2m_vs_1z", u0=(4, 12), u2=(4 + distance, 12))  # 21 + 0.5 + 0.375 = 21.875
    for field, rules in (
        ("target", sim),
        ("attacker", sim),
        ("attacker", Battles("2m_vs_1z").without_chase()),
    ):
        after = play(rules, change(units, field, 2, 0), 1)
        assert int(after.target[0, 2]) == (0 if goes else -1)


def test_a_far_attacker_comes_before_a_nearer_target():
    sim, units = scene("2m_vs_1z", u0=(13, 12), u1=(23, 15), u2=(13, 15))
    units = change(change(units, "target", 2, 0), "attacker", 2, 1)  # 10 away, beyond its scan range of 5
    assert int(play(sim, units, 1).target[0, 2]) == 1


def test_enemy_notices_as_far_as_its_weapon_reaches():
    sim, units = scene("2s3z", u2=(10, 16), u5=(17.11, 16))  # stalker 6 + 0.625 + 0.5 = 7.125
    assert float(play(sim, units, 1).shield[0, 2]) == 40
    sim, units = scene("2s3z", u2=(10, 16), u5=(17.14, 16))
    assert int(play(sim, units, 1).target[0, 5]) == -1


def test_enemy_takes_the_nearest_and_keeps_it_while_its_weapon_reaches():
    sim, units = scene("3m", u0=(10, 16), u1=(11, 16), u3=(15, 16))
    units = play(sim, units, 1, hold=True)
    assert int(units.target[0, 3]) == 1
    units = change(units, "x", 0, 13.0)  # nearer now, but the old target is still in reach (5.75)
    units = play(sim, units, 20, hold=True)
    assert int(units.target[0, 3]) == 1 and float(units.hp[0, 0]) == 45
    far = change(units, "x", 1, 9.2)  # out of reach: it goes after it
    assert int(play(sim, far, 1).target[0, 3]) == 1
    assert int(play(Battles("3m").without_chase(), far, 1).target[0, 3]) == 0  # the nearest again


def test_without_chase_an_enemy_in_melee_turns_to_the_nearest():
    _, units = scene("2m_vs_1z", u0=(13, 12), u1=(17, 15), u2=(13, 15))
    sim = Battles("2m_vs_1z").without_chase()
    units = play(sim, units, 1)
    assert int(units.target[0, 2]) == 0
    assert int(play(sim, change(units, "x", 1, 15.0), 1).target[0, 2]) == 1


def test_an_enemy_goes_after_whoever_hurt_it_then_after_its_target():
    sim, units = scene("2m_vs_1z", u0=(13, 12), u1=(17, 15), u2=(13, 15))
    units = play(sim, units, 1)
    assert int(units.target[0, 2]) == 0
    units = change(units, "x", 1, 15.0)  # nearer than agent 0, but no target and no attacker
    assert int(play(sim, units, 1).target[0, 2]) == 0
    far = change(change(units, "x", 0, 1.0), "y", 0, 1.0)  # beyond its scan range of 5
    assert int(play(sim, far, 1).target[0, 2]) == 0
    assert int(play(sim, change(units, "attacker", 2, 1), 1).target[0, 2]) == 1
    dead = change(change(units, "attacker", 2, 1), "hp", 1, 0.0)
    assert int(play(sim, dead, 1).target[0, 2]) == 0
    near = change(change(units, "y", 0, 14.2), "attacker", 2, 1)  # its weapon reaches agent 0
    assert int(play(sim, near, 1).target[0, 2]) == 0
    neither = change(change(units, "hp", 0, 0.0), "x", 1, 16.0)
    assert int(play(sim, neither, 1).target[0, 2]) == 1  # the nearest


def test_chase_is_an_argument_of_the_id():
    for words, chase in (("", True), (",chase=false", False)):
        assert envs.make(f"3m{words}", device=DEVICE).sim.world.chase is chase


def test_ladder_weapons_by_hand():
    # 13 + 5 a shot against armour and shields, every 1.34 s of 22.4 loops; 2 x 15 of the colossus for zealots
    sim = envs.make("1c3s5z,ladder=true", device=DEVICE).sim
    stalker, zealot, colossus = (sim.types.index(name) for name in ("stalker", "zealot", "colossus"))
    foe = {name: sim.n_agents + sim.types[sim.n_agents :].index(name) for name in ("stalker", "zealot")}
    assert sim.pairs["raw_damage"][stalker, foe["stalker"]] == 18
    assert sim.pairs["raw_damage"][stalker, foe["zealot"]] == 13
    assert sim.pairs["raw_damage"][colossus, foe["zealot"]] == 15
    assert sim.pairs["raw_damage"][colossus, foe["stalker"]] == 10
    assert sim.kinds["reach"][colossus] == 7
    assert sim.kinds["period"][[stalker, colossus]] == pytest.approx([30.016, 23.968])
    crawler = envs.make("2s_vs_1sc,ladder=true", device=DEVICE).sim
    assert crawler.kinds["period"][2] == pytest.approx(29.568)
    usual = envs.make("1c3s5z", device=DEVICE).sim  # and the others are as ever
    assert usual.pairs["raw_damage"][stalker, foe["stalker"]] == 14
    assert (usual.kinds[zealot] == sim.kinds[zealot]).all()


def test_enemy_answers_whoever_hurt_it_from_beyond_its_scan_range():
    # a marauder shoots 6 + 0.5625 + 0.375 = 6.9375 far; a marine notices at 5.75
    sim, units = scene("MMM", u0=(10, 16), u10=(16.9, 16))
    assert int(play(sim, units, 10).target[0, 10]) == -1
    units = play(sim, order(sim, units, u0=attack(sim, 10)), 2)
    assert float(units.hp[0, 10]) == 35 and int(units.target[0, 10]) == 0
    units = change(units, "x", 10, 22.0)
    after = play(sim, order(sim, units, u0=1), 60)
    assert float(after.x[0, 10]) < 17 and float(after.hp[0, 0]) < 125  # it came and shot


def test_without_chase_an_enemy_prefers_the_near_one_to_the_far_attacker_and_forgets_the_dead():
    sim, units = scene("MMM", u0=(10, 16), u2=(12, 16), u10=(16.9, 16))
    sim, units = Battles("MMM").without_chase(), change(units, "attacker", 10, 0)
    assert int(play(sim, units, 1).target[0, 10]) == 2
    units = change(units, "hp", 2, 0.0)
    assert int(play(sim, units, 1).target[0, 10]) == 0
    assert int(play(sim, change(units, "hp", 0, 0.0), 1).target[0, 10]) == -1


def test_enemy_marches_to_its_attack_point_and_stops_there():
    sim, units = scene("3m", u3=(23, 16))
    units = change(units, "walks", 3, True)
    assert float(play(sim, units, 8).x[0, 3]) == pytest.approx(23 - 1.125, abs=1e-4)
    units = play(sim, units, 200)
    assert 8.9 < float(units.x[0, 3]) <= 10.5 and float(units.y[0, 3]) == 16  # within 1.5 of (9, 16)
    assert torch.equal(play(sim, units, 8).x, units.x)


def test_a_group_comes_to_rest_around_its_attack_point():
    sim, units = start("8m")
    units = units._replace(hp=torch.where(torch.arange(16) < 8, 0.0, units.hp))
    units = play(sim, units, 240)
    away = torch.hypot(units.x[0, 8:] - 9, units.y[0, 8:] - 16)
    assert float(away.max()) < 3
    later = play(sim, units, 16)
    assert float((later.x - units.x).abs().max()) < 0.3 and float((later.y - units.y).abs().max()) < 0.3


def test_enemies_in_2c_vs_64zg_hunt_from_anywhere():
    sim, units = scene("2c_vs_64zg", u0=(28, 17), u2=(3, 8))
    assert int(play(sim, units, 1).target[0, 2]) == 0


def test_enemy_in_2s_vs_1sc_has_no_order():
    sim, units = start("2s_vs_1sc")
    assert not units.walks.any()
    after = play(sim, units, 50)
    assert torch.equal(after.x, units.x) and torch.equal(after.hp, units.hp)


# ---- weapon timing ----


@pytest.mark.parametrize("delay", [-1.0, 0.0, 0.6, 2.0])
def test_delay_shifts_the_next_shot_without_rounding_bias(delay):
    sim, units = scene("3m", u0=(10, 16), u3=(15, 16))
    shots = []
    for loop in range(1500):
        units = play(sim, units, 1, hold=True, delay=delay)
        if float(units.hp[0, 0]) < 45:
            shots.append(loop)
        units = change(units, "hp", 0, 45.0)
    assert shots[:4] == [math.floor(k * (13.7728 + delay)) for k in range(4)]
    mean = (shots[-1] - shots[0]) / (len(shots) - 1)
    assert mean == pytest.approx(13.7728 + delay, abs=1 / (len(shots) - 1))


def test_random_delays_have_the_right_mean_and_range():
    # 200 marines shoot at 200 immortal ones for 60 steps: gaps are 13.7728 + U(-1, 2), mean 14.2728
    env = make("3m", num_envs=200, seed=1)
    env.reset()
    _, units = scene("3m", u0=(10, 16), u3=(15, 16))
    units.write_to(env.units)
    env.validate = False
    stop = torch.ones(200, 3, dtype=torch.int64)
    seen, shots = [], torch.zeros(200)
    for _ in range(60):
        *_, info = env.step(stop)
        seen.append(env._games.delays.cpu() * 3 - 1)
        shots += (info["final_state"][:, 0] < 1).float()  # at most one shot in 8 loops
        env.units.hp[:, 0] = 45.0
    delays = torch.cat(seen)
    assert (
        delays.shape == (480, 200, 6)
        and -1 <= float(delays.min()) < -0.99
        and 1.99 < float(delays.max()) <= 2
    )
    assert float(delays.mean()) == pytest.approx(0.5, abs=0.01)
    # shots in 480 loops: the first in loop 0, then one per 14.2728: about 1 + 479 / 14.2728 - 0.5 = 34.1
    assert float(shots.mean()) == pytest.approx(34.1, abs=0.25)


def test_a_weapon_reloads_while_nobody_is_near_and_then_shoots_at_once():
    sim, units = scene("3m", u0=(10, 16), u3=(15, 16))
    units = play(sim, units, 1, hold=True)
    units = play(sim, change(units, "x", 3, 25.0), 100, hold=True)
    assert float(units.cooldown[0, 3]) == 0
    units = play(sim, change(units, "x", 3, 15.0), 1, hold=True)
    assert float(units.hp[0, 0]) == 45 - 12


def test_both_sides_strike_in_the_same_loop():
    sim, units = scene("3m", u0=(10, 16, {"hp": 6.0}), u3=(14, 16, {"hp": 6.0}))
    units = play(sim, order(sim, units, u0=attack(sim, 3)), 1)
    assert units.hp[0, [0, 3]].tolist() == [0, 0]


# ---- collisions ----


def separation(units, i, j):
    return math.hypot(float(units.x[0, i] - units.x[0, j]), float(units.y[0, i] - units.y[0, j]))


def test_overlapping_ground_units_part():
    sim, units = scene("3m", u0=(10, 16), u1=(10.2, 16.1))
    units = play(sim, units, 40)
    assert separation(units, 0, 1) == pytest.approx(0.75, abs=0.02)  # 2 * 0.375
    sim, units = scene("2s3z", u0=(10, 16), u5=(10.5, 16, {"cooldown": NEVER}))
    units = play(sim, units, 40)
    assert separation(units, 0, 5) == pytest.approx(1.25, abs=0.02)  # 2 * 0.625


def test_flyers_pass_over_the_ground_and_colossi_over_zerglings():
    sim, units = scene("MMM", u2=(12, 16), u9=(12, 16))
    after = play(sim, units, 20)
    assert after.x[0, [2, 9]].tolist() == [12, 12]
    sim, units = scene("2c_vs_64zg", u0=(12, 17), u2=(12, 17, {"cooldown": NEVER}))
    after = play(sim, units, 20)
    assert after.x[0, [0, 2]].tolist() == [12, 12] and after.y[0, [0, 2]].tolist() == [17, 17]
    sim, units = scene("2c_vs_64zg", u0=(12, 17), u1=(12.5, 17))
    assert separation(play(sim, units, 40), 0, 1) == pytest.approx(1.5, abs=0.02)  # 2 * 0.75


def test_a_standing_foe_is_not_moved_by_a_walking_foe():
    sim, units = scene("3m", u0=(10, 16), u3=(11, 16, {"cooldown": NEVER}))
    for _ in range(5):  # beyond its reach it would go after it
        units = play(sim, order(sim, units, u0=4), 8)
        assert units.x[0, 3] == 11 and units.y[0, 3] == 16
        assert separation(units, 0, 3) > 0.5
    assert float(units.x[0, 0]) > 13  # it walked round


def test_nobody_overlaps_much_in_a_crowd():
    sim, units = start("25m")
    for _ in range(25):
        units = play(sim, order(sim, units), 8)
    alive = torch.nonzero(units.hp[0] > 0).flatten()
    gaps = torch.hypot(*(c[:, None] - c for c in (units.x[0, alive], units.y[0, alive])))
    gaps += 10 * torch.eye(len(alive))
    # separation is 0.75, but pushing is soft: they crowd around one point, and the tightest pair is closer
    assert len(alive) >= 25 and float(gaps.min()) > 0.25 and float(gaps.amin(1).median()) > 0.45


# ---- terrain ----


def walk_enemy(name, unit, x, y, goal, loops):
    sim, units = scene(name, **{f"u{unit}": (x, y)})
    units = units._replace(goal_x=torch.full_like(units.x, goal[0]), goal_y=torch.full_like(units.y, goal[1]))
    return sim, play(sim, change(units, "walks", unit, True), loops)


@pytest.mark.parametrize(
    "name, goal",
    [("corridor", (4.47, 4.3298)), ("so_many_baneling", (4.47, 4.3298)), ("2c_vs_64zg", (16.0, 16.0))],
)
def test_every_walkable_spot_leads_to_the_attack_point(name, goal):
    """Five spots in every cell, each walked from by an enemy that nobody pushes."""
    sim = Battles(name).without_collisions()  # so that all enemies of a game can walk on their own
    spots = torch.tensor([[0.5, 0.5], [0.01, 0.01], [0.99, 0.01], [0.01, 0.99], [0.99, 0.99]])
    places = (torch.nonzero(sim.walkable).float()[:, None] + spots).reshape(-1, 2)  # (5 K, 2)
    games = math.ceil(len(places) / sim.n_enemies)
    places = places.repeat(2, 1)[: games * sim.n_enemies].reshape(games, sim.n_enemies, 2)
    units = sim.spawn(games, torch.Generator())
    is_enemy = torch.arange(sim.n_units) >= sim.n_agents
    nowhere = torch.zeros(games, sim.n_agents)
    units = units._replace(
        x=torch.cat([nowhere, places[..., 0]], 1),
        y=torch.cat([nowhere, places[..., 1]], 1),
        hp=units.hp * is_enemy,
        goal_x=torch.full_like(units.hp, goal[0]),
        goal_y=torch.full_like(units.hp, goal[1]),
        walks=is_enemy.expand(games, -1),
    )
    units = play(sim, units, 350)  # the longest way is less than 45 tiles, at 0.156 or 0.185 a loop
    away = torch.hypot(units.x - goal[0], units.y - goal[1])[:, sim.n_agents :]
    assert float(away.max()) <= 1.5, places[away > 1.5][:5]


def test_colossi_cross_the_ledge_and_zerglings_do_not():
    sim, units = scene("2c_vs_64zg", u0=(16, 15))
    assert not bool(sim.walkable[16, 12]) and bool(sim.walkable[16, 11]) and bool(sim.walkable[16, 13])
    for _ in range(5):
        units = play(sim, order(sim, units, u0=3), 8)
    assert float(units.y[0, 0]) < 10
    for _ in range(5):
        units = play(sim, order(sim, units, u0=2), 8)
    assert float(units.y[0, 0]) > 14
    # a zergling below needs 1.7 s to y 16 as the crow flies, but has to go round by x < 4 or x > 27
    sim, units = walk_enemy("2c_vs_64zg", 2, 16, 9, (16, 16), 60)
    assert float(units.y[0, 2]) < 13 and abs(float(units.x[0, 2]) - 16) > 5


def test_zerglings_reach_a_colossus_wherever_it_stands():
    # in every cell that only a colossus may enter; from both levels; 16 s is enough for the longest way
    sim = battle("2c_vs_64zg")
    ground, cliff, _ = sim.layers()
    places = torch.nonzero(cliff & ~ground).float() + 0.5  # (K, 2)
    assert len(places) == 38  # 24 in the wall, 14 on the rims
    for x, y in ((16.0, 9.0), (16.0, 16.0)):
        units = sim.spawn(len(places), torch.Generator())
        one_each = torch.tensor([0, 2])
        hp, xs, ys = torch.zeros_like(units.hp), units.x.clone(), units.y.clone()
        hp[:, one_each] = sim.hp_max[one_each]
        xs[:, 0], ys[:, 0], xs[:, 2], ys[:, 2] = places[:, 0], places[:, 1], x, y
        units = play(sim, units._replace(hp=hp, x=xs, y=ys), 256)
        assert (units.shield[:, 0] < 150).all(), places[units.shield[:, 0] == 150]


def test_zerglings_on_the_ledge_reach_a_colossus_that_stands_in_its_wall():
    # 2.5 tiles away, reach 0.1 + 1 + 0.375: a second is plenty; the way by the ramps takes ten times that
    for y in (15.0, 10.0):
        sim, units = scene("2c_vs_64zg", u0=(16, 12.5), u2=(16, y))
        assert float(play(sim, units, 32).shield[0, 0]) < 150


def test_walls_hold_walking_agents():
    sim, units = scene("corridor", u0=(12.5, 20.5))
    for action, (x, y) in ((5, (11.0, 20.5)), (2, (11.0, 21.999))):
        for _ in range(8):
            units = play(sim, order(sim, units, u0=action), 8)
        assert (float(units.x[0, 0]), float(units.y[0, 0])) == pytest.approx((x, y), abs=0.2)


def random_orders(sim, units, generator):
    """Random actions, legal but for the terrain (B, N); medivacs heal anybody but themselves."""
    shape = (units.hp.shape[0], sim.n_agents)
    last = 6 + sim.n_enemies
    actions = torch.randint(1, last, shape, generator=generator)
    for agent in range(sim.n_agents):
        if sim.types[agent] == "medivac":
            actions[:, agent] = torch.randint(1, 6 + agent, shape[:1], generator=generator)
    return torch.where(units.hp[:, : sim.n_agents] > 0, actions, 0)


def test_random_play_stays_on_the_ground_and_in_bounds():
    for name in MAPS:
        sim = battle(name)
        generator = torch.Generator().manual_seed(3)
        units = sim.spawn(4, generator)
        low = torch.tensor([kind not in ("medivac", "colossus") for kind in sim.types])
        for _ in range(30):
            units = sim.step(units, random_orders(sim, units, generator), generator)
            for field in units:
                assert field.shape == (4, sim.n_units) and torch.isfinite(field).all()
            assert (units.hp >= 0).all() and (units.hp <= sim.hp_max).all()
            assert (units.shield >= 0).all() and (units.shield <= sim.shield_max).all()
            assert (units.energy >= 0).all() and (units.energy <= 200).all()
            assert (units.cooldown >= 0).all() and (units.cooldown <= sim.period + 2).all()
            assert ((units.x >= 0) & (units.x < 32) & (units.y >= 0) & (units.y < 32)).all()
            assert ((units.target >= -1) & (units.target < sim.n_units)).all()
            on_ground = sim.walkable[units.x.long(), units.y.long()]
            assert (on_ground | ~low | (units.hp <= 0)).all(), name


def test_a_medivac_flies_where_no_ground_is():
    sim, units = scene("MMM", u9=(2.5, 16))  # the ground begins at x = 2
    for _ in range(5):
        units = play(sim, order(sim, units, u9=5), 8)  # west
    assert 0 <= float(units.x[0, 9]) < 1


# ---- spawn ----


@pytest.mark.parametrize("name", MAPS)
def test_spawn_places_everybody_apart_on_the_ground(name):
    sim, units = start(name, num_envs=2)
    assert units.hp.shape == (2, sim.n_units) and torch.equal(units.hp[0], sim.hp_max)
    x, y = units.x[0], units.y[0]
    size = {
        "marine": 0.375,
        "marauder": 0.5,
        "medivac": 0.75,
        "stalker": 0.625,
        "zealot": 0.375,
        "colossus": 0.75,
    }
    size |= {"zergling": 0.375, "hydralisk": 0.5, "baneling": 0.375, "spinecrawler": 0.875}
    for i in range(sim.n_units):
        if sim.types[i] != "medivac":
            assert sim.walkable[int(x[i]), int(y[i])]
        for j in range(i):
            high = [sim.types[k] in ("medivac", "colossus") for k in (i, j)]
            if high[0] == high[1]:
                apart = math.hypot(float(x[i] - x[j]), float(y[i] - y[j]))
                assert apart >= size[sim.types[i]] + size[sim.types[j]] - 1e-4


def test_spawn_orders_agents_by_type_then_place():
    sim, units = start("MMM")
    assert sim.types == ["marauder"] * 2 + ["marine"] * 7 + ["medivac"] + ["marine"] * 7 + [
        "marauder"
    ] * 2 + ["medivac"]
    places = list(zip(units.x[0].tolist(), units.y[0].tolist(), strict=True))
    assert places[:2] == sorted(places[:2]) and places[2:9] == sorted(places[2:9])
    assert battle("1c3s5z").types[:9] == ["colossus"] + ["stalker"] * 3 + ["zealot"] * 5
    assert battle("bane_vs_bane").types == (["baneling"] * 4 + ["zergling"] * 20) + (
        ["zergling"] * 20 + ["baneling"] * 4
    )
    # the first unit of a call stands on its point
    assert (9.0, 16.0) in places[2:9] and places[10] == (23.0, 16.0)
    sim, units = start("2m_vs_1z")
    assert units.x[0].tolist() == [13, 19, 16] and units.y[0].tolist() == [12, 12, 19]
    sim, units = start("27m_vs_30m")
    spread = torch.hypot(units.x[0, 27:] - 23, units.y[0, 27:] - 16)
    assert float(spread.max()) < 3.5


def test_goal_of_2m_vs_1z_is_random_on_its_segment():
    _, units = start("2m_vs_1z", num_envs=2000)
    goal_x, goal_y = units.goal_x[:, 2], units.goal_y[:, 2]
    assert (goal_y == 12).all() and 13 <= float(goal_x.min()) < 13.1 and 18.9 < float(goal_x.max()) <= 19
    assert float(goal_x.mean()) == pytest.approx(16, abs=0.2)
    assert units.walks[:, 2].all() and not units.walks[:, :2].any()


# ---- a pure function of units, actions and delays ----


def middle_of_battle(name, num_envs, steps=14, seed=0):
    sim, units = start(name, num_envs, seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        units = sim.step(units, random_orders(sim, units, generator), generator)
    return sim, units


def test_same_generator_same_battle():
    runs = [middle_of_battle("MMM", 4, 20, seed) for seed in (5, 5, 6)]
    for first, second in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(runs[0][1].hp, runs[2][1].hp)


@pytest.mark.parametrize("name", ["MMM", "2c_vs_64zg", "bane_vs_bane", "3s5z"])
def test_games_do_not_influence_each_other(name):
    sim, units = middle_of_battle(name, 3, 8)
    generator = torch.Generator().manual_seed(9)
    for _ in range(10):
        actions = random_orders(sim, units, generator)
        delays = torch.rand(8, *units.hp.shape, generator=generator) * 3 - 1
        together = sim.game_loops(sim.obey(units, actions), delays)
        for g in range(3):
            game = slice(g, g + 1)
            alone = sim.game_loops(sim.obey(units[game], actions[game]), delays[:, game])
            assert all(torch.equal(one, all_[game]) for one, all_ in zip(alone, together, strict=True))
        units = together
