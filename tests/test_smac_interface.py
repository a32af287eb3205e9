"""SMAC's interface against outputs of the original code, its table of sizes and a slow loop of its rules."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
import warp as wp
from battles import DEVICE, FIELDS, Staged, Units
from battles import make as real

import envs

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "smac_golden.json").read_text())["maps"]
MAPS = json.loads((HERE.parent / "envs" / "smac_maps.json").read_text())["maps"]
STATS = json.loads((HERE.parent / "envs" / "smac_units.json").read_text())["units"]
STOP, NORTH, WEST, ATTACK = 1, 2, 5, 6
CLOSE = {"atol": 2e-6, "rtol": 2e-6}  # the outputs are rounded to 6 decimals
# map: agents, enemies, episode limit, actions, observation, state, maximal reward (computed by the original)
SIZES = {
    "3m": (3, 3, 60, 9, 30, 48, 365),
    "8m": (8, 8, 120, 14, 80, 168, 640),
    "25m": (25, 25, 150, 31, 250, 950, 1575),
    "5m_vs_6m": (5, 6, 70, 12, 55, 98, 530),
    "8m_vs_9m": (8, 9, 120, 15, 85, 179, 695),
    "10m_vs_11m": (10, 11, 150, 17, 105, 243, 805),
    "27m_vs_30m": (27, 30, 180, 36, 285, 1170, 1850),
    "MMM": (10, 10, 150, 16, 160, 290, 1015),
    "MMM2": (10, 12, 180, 18, 176, 322, 1205),
    "2s3z": (5, 5, 120, 11, 80, 120, 1020),
    "3s5z": (8, 8, 150, 14, 128, 216, 1510),
    "3s5z_vs_3s6z": (8, 9, 170, 15, 136, 230, 1670),
    "3s_vs_3z": (3, 3, 150, 9, 36, 54, 680),
    "3s_vs_4z": (3, 4, 200, 10, 42, 61, 840),
    "3s_vs_5z": (3, 5, 250, 11, 48, 68, 1000),
    "1c3s5z": (9, 9, 180, 15, 162, 270, 1870),
    "2m_vs_1z": (2, 1, 150, 7, 16, 26, 360),
    "corridor": (6, 24, 400, 30, 156, 282, 1280),
    "6h_vs_8z": (6, 8, 150, 14, 78, 140, 1480),
    "2s_vs_1sc": (2, 1, 300, 7, 17, 27, 510),
    "so_many_baneling": (7, 32, 100, 38, 202, 397, 1480),
    "bane_vs_bane": (24, 24, 200, 30, 336, 984, 1260),
    "2c_vs_64zg": (2, 64, 400, 70, 332, 342, 3080),
}


make = functools.partial(real, cls=Staged)


def place(env, **fields):
    """Give every game the unit arrays `fields`, each (U,) or (B, U), and show the result as after a step."""
    Units.of(env.units)._replace(**fields).write_to(env.units)
    return env.show()


def move_unit(env, unit, **fields):
    """Change single values of one unit in every game."""
    for name, value in fields.items():
        getattr(env.units, name)[:, unit] = value
    return env.show()


def play(env, after, actions=None):
    """One env.step() whose battle is replaced by the outcome `after`, Units of (B, U)."""
    env.after = after
    return env.step(idle(env) if actions is None else actions)


def idle(env):
    """Actions (B, N): stop, or no-op for the dead."""
    return env.avail_actions()[:, :, STOP].long()


def arrays_of(record):
    """A golden record -> unit arrays (U,), agents first."""
    units = record["agents"] + record["enemies"]
    names = {
        "x": "x",
        "y": "y",
        "hp": "hp",
        "shield": "shield",
        "cooldown": "cooldown_loops",
        "energy": "energy",
    }
    return {field: [unit[name] for unit in units] for field, name in names.items()}


def killed(env, *units, **fields):
    """The current units with some of them dead."""
    now = Units.of(env.units)
    hp = now.hp.clone()
    hp[:, list(units)] = 0.0
    return now._replace(hp=hp, **fields)


def random_battle(env, least, most, generator):
    """Unit arrays (B, U) anywhere between two coordinates, some dead, cooldowns beyond their limits too."""

    def draw(low, high):
        return low + (high - low) * torch.rand(env.units.hp.shape, generator=generator)

    alive = draw(0, 1) > 0.2
    return {
        "x": draw(least, most),
        "y": draw(least, most),
        "hp": draw(0.1, 1) * torch.tensor(env.sim.kinds["hp_max"]) * alive,
        "shield": draw(0, 1) * torch.tensor(env.sim.kinds["shield_max"]),
        "cooldown": draw(0, 40),
        "energy": draw(0, 200),
    }


def slow_features(name, env, game, last_actions):
    """One game by the rules of get_obs_agent and get_state, unit by unit in Python -> obs, state, avail."""
    battle, n, m = MAPS[name], env.n_agents, env.n_enemies
    field = {
        key: getattr(env.units, key)[game].tolist()
        for key in ("x", "y", "hp", "shield", "cooldown", "energy")
    }
    types, walkable = env.sim.types, env.sim.walkable.tolist()
    periods = dict(
        marine=15, marauder=25, stalker=35, zealot=22, colossus=24, hydralisk=10, zergling=11, baneling=1
    )
    shields = dict(stalker=80, zealot=50, colossus=150)
    kinds = {
        "stalkers_and_zealots": ["stalker", "zealot"],
        "colossi_stalkers_zealots": ["colossus", "stalker", "zealot"],
        "MMM": ["marauder", "marine", "medivac"],
        "bane": ["baneling", "zergling"],
    }.get(battle["map_type"], [])

    def bits(i):
        reverse = i >= n and battle["map_type"] == "stalkers_and_zealots"
        return [float(kind == types[i]) for kind in (kinds[::-1] if reverse else kinds)]

    def body(i):
        race = battle["ally_race"] if i < n else battle["enemy_race"]
        shield = [field["shield"][i] / shields[types[i]]] if race == "P" else []
        return shield + bits(i)

    def life(i):
        return field["hp"][i] / STATS[types[i]]["hp"]

    def gap(i, j):
        return math.hypot(field["x"][i] - field["x"][j], field["y"][i] - field["y"][j])

    def can_move(i, dx, dy):
        x, y = int(field["x"][i] + dx), int(field["y"][i] + dy)
        return 0 <= x < 32 and 0 <= y < 32 and walkable[x][y]

    def can_target(i, k):
        if types[i] == "medivac" and battle["map_type"] == "MMM":
            return k < n and types[k] != "medivac" and field["hp"][k] > 0 and gap(i, k) <= 6
        return field["hp"][n + k] > 0 and gap(i, n + k) <= 6

    avail = []
    for i in range(n):
        if field["hp"][i] <= 0:
            avail.append([True] + [False] * (5 + m))
            continue
        moves = [can_move(i, dx, dy) for dx, dy in ((0, 1), (0, -1), (1, 0), (-1, 0))]
        avail.append([False, True] + moves + [can_target(i, k) for k in range(m)])

    def row(i, j, first):
        seen = field["hp"][i] > 0 and field["hp"][j] > 0 and gap(i, j) < 9
        offset = [(field[axis][j] - field[axis][i]) / 9 for axis in "xy"]
        return [value * seen for value in [first, gap(i, j) / 9, *offset, life(j), *body(j)]]

    obs = []
    for i in range(n):
        features = [float(flag) for flag in avail[i][2:6]]
        for k in range(m):
            features += row(i, n + k, float(avail[i][6 + k]))
        for j in range(n):
            features += row(i, j, 1.0) if j != i else []
        obs.append(features + [value * (field["hp"][i] > 0) for value in [life(i), *body(i)]])

    state = []
    for i in range(n + m):
        charge = []
        if i < n:
            charge = [
                field["energy"][i] / 200
                if types[i] == "medivac"
                else field["cooldown"][i] / periods[types[i]]
            ]
        place = [(field["x"][i] - 16) / 32, (field["y"][i] - 16) / 32]
        state += [value * (field["hp"][i] > 0) for value in [life(i), *charge, *place, *body(i)]]
    for action in last_actions:
        state += [float(action == k) for k in range(6 + m)]
    return torch.tensor(obs), torch.tensor(state), torch.tensor(avail)


# ---- the original's outputs ----
@pytest.mark.parametrize("name", GOLDEN)
def test_features_equal_the_original(name):
    record, env = GOLDEN[name], make(name, num_envs=2)
    env.reset()
    assert [unit["unit"].lower() for unit in record["agents"] + record["enemies"]] == env.sim.types
    env._games.actions.copy_(torch.tensor(record["last_actions"]))
    for moment in (record, record["after"]):
        obs, state, avail_actions = place(env, **arrays_of(moment))
        for game in range(2):
            torch.testing.assert_close(obs[game], torch.tensor(moment["obs"]), **CLOSE)
            torch.testing.assert_close(state[game], torch.tensor(moment["state"]), **CLOSE)
            assert torch.equal(avail_actions[game], torch.tensor(moment["avail"]).bool())


@pytest.mark.parametrize("name", GOLDEN)
def test_reward_and_ends_equal_the_original(name):
    record, env = GOLDEN[name], make(name, num_envs=2)
    env.reset()
    place(env, **arrays_of(record["after"]))
    after = Units.of(env.units)
    place(env, **arrays_of(record))
    _, reward, terminated, truncated, info = play(env, after)
    expected = record["after"]["scaled_step_reward"]
    torch.testing.assert_close(reward, torch.full((2,), expected), atol=2e-5, rtol=1e-5)
    assert record["after"]["end_code"] is None and not terminated.any() and not truncated.any()
    assert info["dead_allies"].tolist() == [sum(unit["hp"] == 0 for unit in record["after"]["agents"])] * 2
    assert info["dead_enemies"].tolist() == [sum(unit["hp"] == 0 for unit in record["after"]["enemies"])] * 2


@pytest.mark.parametrize("name", SIZES)
def test_features_equal_a_slow_loop(name):
    env = make(name, num_envs=4)
    env.reset()
    n_actions = SIZES[name][3]
    for low, high in ((9.0, 21.0), (0.1, 31.9)):
        generator = torch.Generator().manual_seed(5)
        last_actions = torch.randint(0, n_actions, (4, env.n_agents), generator=generator)  # (B, N)
        env._games.actions.copy_(last_actions)
        obs, state, avail_actions = place(env, **random_battle(env, low, high, generator))
        for game in range(4):
            slow = slow_features(name, env, game, last_actions[game].tolist())
            torch.testing.assert_close(obs[game], slow[0], **CLOSE)
            torch.testing.assert_close(state[game], slow[1], **CLOSE)
            assert torch.equal(avail_actions[game], slow[2])


# ---- sizes, order, type bits ----
def test_sizes_of_all_maps():
    assert set(SIZES) <= set(envs.list_ids())
    for name, (n_agents, n_enemies, limit, n_actions, obs_dim, state_dim, max_reward) in SIZES.items():
        env = make(name.upper(), num_envs=2)
        obs, _ = env.reset()
        assert (env.n_agents, env.n_enemies, env.episode_limit) == (n_agents, n_enemies, limit), name
        assert (env.obs_dim, env.state_dim) == (obs_dim, state_dim), name
        assert env.single_action_space.nvec.tolist() == [n_actions] * n_agents, name
        assert obs.shape == (2, n_agents, obs_dim) and obs.dtype == torch.float32, name
        assert env.state().shape == (2, state_dim) and env.state().dtype == torch.float32, name
        assert (
            env.avail_actions().shape == (2, n_agents, n_actions) and env.avail_actions().dtype == torch.bool
        ), name
        stock = sum(STATS[kind]["hp"] + STATS[kind]["shield"] for kind in env.sim.types[n_agents:])
        assert max_reward == 10 * n_enemies + 200 + stock, name
        assert obs[:, :, 4:].abs().max() <= 1 and torch.isfinite(env.state()).all(), name
        reward = play(env, killed(env, *range(n_agents, n_agents + n_enemies)))[1]
        assert reward.tolist() == pytest.approx([20, 20]), name  # all of max_reward at once


def test_order_of_agents():
    for name, kinds in {
        "MMM": ["marauder"] * 2 + ["marine"] * 7 + ["medivac"],
        "2s3z": ["stalker"] * 2 + ["zealot"] * 3,
        "1c3s5z": ["colossus"] + ["stalker"] * 3 + ["zealot"] * 5,
        "bane_vs_bane": ["baneling"] * 4 + ["zergling"] * 20,
    }.items():
        env = make(name)
        env.reset()
        n = env.n_agents
        assert env.sim.types[:n] == kinds
        keys = list(zip(kinds, env.units.x[0, :n].tolist(), env.units.y[0, :n].tolist(), strict=True))
        assert keys == sorted(keys)  # these types happen to be in the order of the alphabet


def test_type_bits():
    """One agent's view of the enemy's types and of its own; 2s3z has the enemy's the other way round."""
    for name, own, seen_types in (
        ("2s3z", [1.0, 0.0], {"stalker": [0.0, 1.0], "zealot": [1.0, 0.0]}),
        ("1c3s5z", [1.0, 0.0, 0.0], {"colossus": [1.0, 0, 0], "stalker": [0, 1.0, 0], "zealot": [0, 0, 1.0]}),
        ("MMM2", [1.0, 0.0, 0.0], {"marauder": [1.0, 0, 0], "marine": [0, 1.0, 0], "medivac": [0, 0, 1.0]}),
        ("bane_vs_bane", [1.0, 0.0], {"baneling": [1.0, 0.0], "zergling": [0.0, 1.0]}),
    ):
        env = make(name)
        env.reset()
        obs, state, _ = place(env, x=16.0, y=16.0)
        n, m, bits = env.n_agents, env.n_enemies, len(own)
        assert obs[0, 0, -bits:].tolist() == own
        part = MAPS[name]["sizes"]
        rows = obs[0, 0, 4 : 4 + m * part["enemy_feats"][1]].view(m, -1)
        state_rows = state[0, n * part["state_ally_feats"] :][: m * part["state_enemy_feats"]].view(m, -1)
        for k, kind in enumerate(env.sim.types[n:]):
            assert rows[k, -bits:].tolist() == state_rows[k, -bits:].tolist() == seen_types[kind], (
                name,
                kind,
            )


# ---- masks ----
def test_dead_agents_have_only_no_op():
    env = make("3m", num_envs=2)
    env.reset()
    obs, _, avail_actions = move_unit(env, 1, hp=0.0)
    assert avail_actions[0, 1].tolist() == [True] + [False] * 8
    assert (obs[:, 1] == 0).all()
    assert not avail_actions[:, [0, 2], 0].any() and avail_actions[:, [0, 2], STOP].all()
    with pytest.raises(ValueError, match="game 0, agent 1: action 1 is not allowed; available: \\[0\\]"):
        env.step(torch.ones(2, 3, dtype=torch.int64))


def test_masked_actions_are_refused():
    env = make("mmm", num_envs=3)
    env.reset()
    actions = idle(env)
    actions[2, 4] = ATTACK + 3  # nobody is in reach at the start
    with pytest.raises(ValueError, match="game 2, agent 4: action 9 is not allowed"):
        env.step(actions)
    with pytest.raises(ValueError, match="game 0, agent 0: action 16 is not allowed"):
        env.step(torch.full((3, 10), 16))


def test_reach_is_six_inclusive_and_sight_nine_exclusive():
    env = make("3m")
    env.reset()
    n = env.n_agents
    for distance, reached, seen in (
        (6.0, True, True),
        (6.001, False, True),
        (8.999, False, True),
        (9.0, False, False),
    ):
        place(env, x=[10.0, 10.0, 10.0] + [10.0 + distance] * 3, y=16.0)
        assert env.avail_actions()[0, :, ATTACK:].eq(reached).all(), distance
        rows = env._obs[0, :, 4:19].view(n, 3, 5)
        assert rows[:, :, 0].eq(float(reached)).all() and rows[:, :, 4].eq(float(seen)).all(), distance
    place(env, x=[10.0, 19.0, 18.9] + [30.0] * 3, y=16.0)  # sight of friends is the same circle
    assert env._obs[0, 0, 19:29].view(2, 5)[:, 0].tolist() == [0.0, 1.0]
    move_unit(env, 2, hp=0.0)
    assert env._obs[0, 0, 24:29].tolist() == [0.0] * 5


def test_can_move_tests_one_cell():
    env = make("mmm")  # walkable: 2 <= x < 30, 7 <= y < 25
    env.reset()
    corners = {
        (2.0, 16.0): [1, 1, 1, 0],
        (3.0, 16.0): [1, 1, 1, 1],
        (2.99, 7.0): [1, 0, 1, 0],
        (2.99, 8.0): [1, 1, 1, 0],
        (29.0, 24.0): [0, 1, 0, 1],
        (28.99, 23.99): [1, 1, 1, 1],
        (1.5, 16.0): [0, 0, 1, 0],  # a medivac over the void: only its eastern cell is ground
    }
    for (x, y), moves in corners.items():
        _, _, avail_actions = move_unit(env, 9, x=x, y=y)
        assert avail_actions[0, 9, NORTH : WEST + 1].int().tolist() == moves, (x, y)
        assert env._obs[0, 9, :4].int().tolist() == moves
    env = make("2c_vs_64zg")  # the ledge is for the ground: row y = 12 is closed to the colossi's mask too
    env.reset()
    _, _, avail_actions = move_unit(env, 0, x=16.0, y=13.5)
    assert avail_actions[0, 0, NORTH : WEST + 1].tolist() == [True, False, True, True]


def test_medivac_heals_agents():
    env = make("MMM2")
    env.reset()
    place(env, x=16.0, y=16.0)
    assert (
        env.avail_actions()[0, 9, ATTACK:].tolist() == [True] * 9 + [False] * 3
    )  # unhurt agents too, not itself
    assert env.avail_actions()[0, :9, ATTACK:].all()
    x = torch.full((22,), 16.0)
    x[[1, 10]] = 22.5
    place(env, x=x, y=16.0)
    move_unit(env, 0, hp=0.0)
    assert env.avail_actions()[0, 9, ATTACK:].tolist() == [False] * 2 + [True] * 7 + [False] * 3
    assert env.avail_actions()[0, 2, ATTACK:].tolist() == [False] + [True] * 11
    rows = env._obs[0, 9, 4:100].view(
        12, 8
    )  # what the medivac sees of the enemies: whether it may heal agent k
    assert rows[:, 0].tolist() == [0.0] * 2 + [1.0] * 7 + [0.0] * 3


# ---- reward ----
def test_reward_is_the_absolute_net_change():
    env = make("3s_vs_3z", num_envs=1)
    env.reset()
    scale = SIZES["3s_vs_3z"][6] / 20
    before = Units.of(env.units)
    hurt = before._replace(shield=before.shield - 10.0, hp=before.hp - 5.0)
    reward = play(env, hurt)[1]  # the agents' own losses cost nothing
    assert reward.item() == pytest.approx(3 * 15 / scale)
    reward = play(env, before)[1]
    assert reward.item() == pytest.approx(3 * 15 / scale)  # growing back pays as much as the wound did
    mixed = before._replace(shield=before.shield - torch.tensor([0, 0, 0, 40.0, 0, 0]))
    play(env, mixed)
    other = before._replace(shield=before.shield - torch.tensor([0, 0, 0, 0, 30.0, 0]))
    assert play(env, other)[1].item() == pytest.approx(10 / scale)  # 40 back, 30 lost


def test_kills_and_victory_pay():
    env = make("3m", num_envs=1)
    env.reset()
    scale = 365 / 20
    total = reward = play(env, killed(env, 3))[1].item()
    assert reward == pytest.approx((45 + 10) / scale)
    reward = play(env, killed(env))[1].item()
    assert reward == 0  # the dead pay once
    _, reward, terminated, truncated, info = play(env, killed(env, 3, 4, 5))
    assert reward.item() == pytest.approx((2 * 55 + 200) / scale)
    assert terminated.all() and not truncated.any() and info["battle_won"].all()
    assert info["episode_return"].item() == pytest.approx(total + reward.item()) == pytest.approx(20.0)
    assert info["episode_length"].item() == 3


def test_a_kill_takes_the_shield_along():
    env = make("2s3z", num_envs=1)
    env.reset()
    zealot = 9
    assert env.sim.types[zealot] == "zealot"
    reward = play(env, killed(env, zealot))[1].item()  # its record keeps 50 of shield, which is void
    assert reward == pytest.approx((100 + 50 + 10) / (1020 / 20))
    assert play(env, killed(env))[1].item() == 0


# ---- ends ----
ALLIES, ENEMIES = list(range(10)), list(range(10, 20))
MMM_ENEMY_MEDIVAC = 19


@pytest.mark.parametrize(
    ("name", "dead", "won", "terminated"),
    [
        ("3m", [0, 1], False, False),
        ("3m", [0, 1, 2], False, True),
        ("3m", [0, 1, 3, 4, 5], True, True),
        ("3m", [0, 1, 2, 3, 4, 5], False, True),  # a tie
        ("MMM", ALLIES[:8], False, False),
        ("MMM", ALLIES[:9], False, True),  # the medivac alone does not hold
        ("MMM", ENEMIES[:9], True, True),
        ("MMM", [*ENEMIES[:8], MMM_ENEMY_MEDIVAC], False, False),
        ("MMM", ALLIES[:9] + ENEMIES[:9], False, True),  # both medivacs alone: defeat comes first
        ("MMM", ALLIES[:9] + ENEMIES, False, True),
        ("MMM", ALLIES + ENEMIES, False, True),
        ("MMM", ENEMIES, True, True),
    ],
)
def test_ends(name, dead, won, terminated):
    env = make(name, num_envs=2)
    env.reset()
    _, reward, ended, truncated, info = play(env, killed(env, *dead))
    assert ended.tolist() == [terminated] * 2 and not truncated.any()
    assert info["battle_won"].tolist() == [won] * 2
    n = env.n_agents
    fallen = [unit for unit in dead if unit >= n]
    assert info["dead_allies"].tolist() == [len(dead) - len(fallen)] * 2
    assert info["dead_enemies"].tolist() == [len(fallen)] * 2
    value = 200 * won + sum(10 + STATS[env.sim.types[unit]]["hp"] for unit in fallen)
    assert reward.tolist() == pytest.approx([value / (SIZES[name][6] / 20)] * 2)


def test_timeout_is_truncation():
    env = make("3m", num_envs=2)
    env.reset()
    for step in range(60):
        after = Units.of(env.units)
        if step == 59:
            hp = after.hp.clone()
            hp[1, 3:] = 0.0
            after = after._replace(hp=hp)
        _, _, terminated, truncated, info = play(env, after)
        assert truncated.tolist() == [step == 59, False]
        assert terminated.tolist() == [False, step == 59]  # a win on the last step is a win
        assert info["episode_length"].tolist() == [step + 1] * 2
    assert info["battle_won"].tolist() == [False, True]


def test_auto_reset_keeps_the_last_sight():
    env = make("MMM", num_envs=3)
    first_obs, _ = env.reset()
    first = first_obs.clone(), env.state().clone(), env.avail_actions().clone()
    hp = env.units.hp.cpu().clone()
    hp[1, 10:] = 0.0
    now = Units.of(env.units)
    after = now._replace(hp=hp - torch.tensor(1.0) * (hp > 0), x=now.x + 0.25)
    obs, _, terminated, _, info = play(env, after)
    assert terminated.tolist() == [False, True, False]
    got = obs, env.state(), env.avail_actions()
    final = info["final_obs"], info["final_state"], info["final_avail_actions"]
    for fresh, now, last in zip(first, got, final, strict=True):
        assert torch.equal(now[1], fresh[1])
        assert torch.equal(now[[0, 2]], last[[0, 2]])
    assert (
        not torch.equal(final[0][1], first[0][1]) and (final[1][1, 70:130] == 0).all()
    )  # no enemy is left there
    assert (final[1][:, 130:].view(3, 10, 16)[:, :, STOP] == 1).all()  # the last actions of the ended episode
    assert (env.state()[1, 130:] == 0).all()


# ---- the real engine behind it ----
@pytest.mark.parametrize("name", ["MMM", "2m_vs_1z", "2c_vs_64zg", "bane_vs_bane"])
def test_a_battle_that_ends_begins_anew_as_by_reset(name):
    env = real(name, num_envs=2, seed=3)
    obs, _ = env.reset()
    first, units = (obs, env.state(), env.avail_actions()), Units.of(env.units)
    for limit in (100, 1):  # the first step ends nothing
        env._episode_length += env.episode_limit - limit
        actions = env.avail_actions()[:, :, 2].long() + 1  # north where that is free, else stop
        asked = actions.clone()
        obs, *_, info = env.step(actions)
        assert torch.equal(actions, asked)
        if limit == 100:
            assert torch.equal(obs, info["final_obs"])
            assert not torch.equal(obs, first[0]) and not torch.equal(env.units.x.cpu(), units.x)
            env._episode_length -= env.episode_limit - limit + 1
    for fresh, now in zip(first, (obs, env.state(), env.avail_actions()), strict=True):
        assert torch.equal(fresh, now)
    for field in set(FIELDS) - {"goal_x"}:  # drawn anew on 2m_vs_1z
        assert torch.equal(getattr(units, field), getattr(env.units, field).cpu()), field
    if name == "2m_vs_1z":
        assert (units.goal_x[:, 2] != env.units.goal_x[:, 2].cpu()).all()
    assert env._episode_length.tolist() == [0, 0] and env._episode_return.tolist() == [0, 0]


def random_actions(env, generator):
    weights = env.avail_actions().flatten(0, 1).float().cpu()
    return torch.multinomial(weights, 1, generator=generator).view(env.num_envs, -1)


def into_reach(env):
    """Move the enemies so that they fight; the masks follow with a step in which everybody stops."""
    x, n = env.units.x, env.n_agents
    x[:, n:] -= x[:, n:].mean() - x[:, :n].mean() - 3.0
    return env.step(idle(env))


def tensors(step):
    """All that a step returned, its info by key."""
    *arrays, info = step
    info = info | info["episode"]
    return arrays + [info[key] for key in sorted(info.keys() - {"episode"})]


def assert_same_step(many, one, games):
    """`many`, a step of many games, holds in `games` what `one`, a step of these alone, returned."""
    arrays, alone = tensors(many), tensors(one)
    for together, single in zip(arrays, alone, strict=True):
        assert torch.equal(together[games], single)


@pytest.mark.parametrize("name", ["MMM", "3s_vs_3z", "corridor"])
def test_games_do_not_influence_each_other(name, monkeypatch):
    """Three games side by side go like the same three alone, the random delays being equal."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, out: out.fill_(0.5))
    together, alone = real(name, num_envs=3), [real(name, num_envs=1) for _ in range(3)]
    for env in (together, *alone):
        env.reset()
        into_reach(env)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        actions = random_actions(together, generator)
        step = together.step(actions)
        for game, env in enumerate(alone):
            one = env.step(actions[game : game + 1])
            assert_same_step(step, one, slice(game, game + 1))
            assert torch.equal(together.state()[game], env.state()[0])
            assert torch.equal(together.avail_actions()[game], env.avail_actions()[0])


@pytest.mark.parametrize("num_envs, threads", [(1, 1), (64, 2), (97, 2)])
def test_a_batch_of_any_size_and_on_any_threads_plays_the_same(num_envs, threads, monkeypatch):
    """The first games of 130 go like those of smaller batches, which one or two threads play."""
    draws = torch.Generator()

    def first(shape, generator, out):
        """Delays that do not depend on the size of the batch."""
        full = torch.empty(8, 130, out.shape[-1]).uniform_(generator=draws)
        return out.copy_(full[:, : out.shape[1]])

    monkeypatch.setattr(torch, "rand", first)
    steps, before = [], torch.get_num_threads()
    for games, count in ((130, 1), (num_envs, threads)):
        draws.manual_seed(4)
        generator = torch.Generator().manual_seed(2)
        torch.set_num_threads(count)
        env = real("2s3z", num_envs=games)
        torch.set_num_threads(before)
        assert env.device.type == "cuda" or len(env._play) == count
        env.reset()
        steps.append([into_reach(env)])
        for _ in range(25):
            noise = torch.empty(130, 5, 11).uniform_(generator=generator)
            noise[:, :, ATTACK:] += 0.5
            steps[-1].append(env.step((env.avail_actions() * (1 + noise[:games])).argmax(2)))
    for many, few in zip(*steps, strict=True):
        assert_same_step(many, few, slice(num_envs))
    assert sum(int(step[4]["dead_enemies"].sum()) for step in steps[0]) > 0  # there was something to see


@pytest.mark.parametrize("name", ["MMM", "2m_vs_1z"])  # on the latter the enemy's goal is drawn
def test_same_seed_same_battle(name):
    records, goals = [], []
    for _ in range(2):
        env, generator = real(name, num_envs=2, seed=7), torch.Generator().manual_seed(7)
        env.reset()
        records.append(torch.stack([env.step(random_actions(env, generator))[0] for _ in range(20)]))
        goals.append(env.units.goal_x.clone())
    assert torch.equal(*records) and torch.equal(*goals)


def test_render():
    env = real("2s3z", num_envs=2)
    with pytest.raises(RuntimeError, match="reset"):
        env.render()
    env.reset()
    before = env.render()
    assert before.shape[1:] == (640, 3) and before.dtype.name == "uint8" and before.shape[0] % 2 == 0
    now = Units.of(env.units)
    now._replace(x=torch.linspace(12, 20, 10), y=16.0, target=[5] * 5 + [0] * 5, cooldown=30.0).write_to(
        env.units
    )
    env.step(idle(env))
    assert (env.render() != before).any()


@pytest.mark.parametrize("name", list(SIZES))
def test_battles_run_to_their_end_with_features_in_range(name):
    env = real(name, num_envs=2, seed=1)
    env.reset()
    ended, generator = torch.zeros(2, dtype=torch.bool), torch.Generator().manual_seed(1)
    for _ in range(env.episode_limit):
        avail_actions = env.avail_actions()
        actions = (avail_actions + torch.rand(avail_actions.shape, generator=generator)).argmax(2)
        _, reward, terminated, truncated, info = env.step(actions)
        assert info["final_obs"].abs().max() <= 1 and info["final_state"].abs().max() <= 2
        assert torch.isfinite(reward).all() and reward.min() >= 0
        ended |= terminated | truncated
        if ended.all():
            break
    assert ended.all()


# ---- what a step costs and returns ----
@pytest.mark.parametrize("name", ["mmm", "2m_vs_1z"])
def test_a_step_takes_two_launches(name, monkeypatch):
    env = real(name, num_envs=4)
    env.reset()
    actions, launched = idle(env), []
    launch = wp.Launch.launch
    monkeypatch.setattr(wp.Launch, "launch", lambda *args: (launched.append(args[0]), launch(*args)))
    monkeypatch.setattr(wp, "launch", None)  # nothing is launched in another way
    for steps in (1, 2, 3):
        env.step(actions)
        assert len(launched) == 2 * steps


def test_what_a_step_returned_stays_as_it_was():
    env, generator = envs.make("3m", num_envs=3, device=DEVICE), torch.Generator().manual_seed(0)

    returned = [env.reset()[0], env.state(), env.avail_actions()]
    copies = [tensor.clone() for tensor in returned]
    for step in range(70):  # the clock ends every battle in between
        now = tensors(env.step(random_actions(env, generator).to(DEVICE)))
        now += [env.state(), env.avail_actions()]
        if step in (0, 1, 58, 59):
            returned += now
            copies += [tensor.clone() for tensor in now]
    for tensor, copy in zip(returned, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_it_runs_under_any_guard_and_on_any_device_string():
    devices = ["cpu", torch.device("cpu")] + (["cuda", "cuda:0"] if torch.cuda.is_available() else [])
    for device in devices:
        env = envs.make("MMM", num_envs=2, device=device)
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                env.reset()
                actions = torch.ones(2, 10, dtype=torch.int64, device=device)
                obs, reward, *_ = env.step(actions)
            for tensor in (obs, reward, env.units.hp):
                assert tensor.device.type == torch.device(device).type and not tensor.requires_grad
