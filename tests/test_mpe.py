"""The particle tasks: `spread` beside mpe2, `aggregation` and `mill` by their rules and numbers."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from mpe2 import simple_spread_v3
from mpe2._mpe_utils.core import Agent
from mpe2._mpe_utils.core import World as ReferenceWorld

from envs import make
from envs.mpe import PUSHES, TURNS, Aggregation, Mill, Spread, World, _Canvas, contact_forces, move

TASKS = [Spread, Aggregation, Mill]
CLOSE = {"atol": 1e-5, "rtol": 0}


def build(task, num_envs=1, seed=0, **kwargs):
    return task(num_envs=num_envs, device="cpu", seed=seed, **kwargs)


def random_actions(env, generator):
    """Joint actions of all games, drawn uniformly."""
    shape = (env.num_envs, *env.single_action_space.shape)
    if isinstance(env.single_action_space, spaces.MultiDiscrete):
        return torch.randint(int(env.single_action_space.nvec[0]), shape, generator=generator)
    return 2 * torch.rand(shape, generator=generator) - 1


def shove(env, force):
    """Actions (B, N, 1) of `force` each, or of each game's or agent's own."""
    return torch.as_tensor(force, dtype=torch.float32).expand(env.num_envs, env.n_agents).unsqueeze(2)


def reference_actions(actions, names):
    """One game's actions as mpe2's: nothing, -x, +x, -y, +y from 0 to 1, or the same discrete choice."""
    if actions.dtype == torch.int64:
        return dict(zip(names, actions.tolist(), strict=True))
    rows = [[0, max(-x, 0), max(x, 0), max(-y, 0), max(y, 0)] for x, y in actions.tolist()]
    return {name: np.array(row, np.float32) for name, row in zip(names, rows, strict=True)}


def greedy(env):
    """Full force towards the landmark, less within a distance of 1."""
    away = env._scene.landmark - env._scene.pos  # (B, N, 2)
    return away / away.norm(dim=2, keepdim=True).clamp_min(1)


# ---- the particle world beside mpe2 ----
@pytest.mark.parametrize(
    "starts, n_agents, local_ratio, discrete",
    [(100, 3, 0.5, False), (20, 5, 0.2, False), (20, 3, 0.5, True)],
)
def test_spread_equals_mpe2(starts, n_agents, local_ratio, discrete):
    generator = torch.Generator().manual_seed(5)
    env = build(Spread, starts, 3, n_agents=n_agents, local_ratio=local_ratio, discrete=discrete)
    first_obs, _ = env.reset()
    first = env._scene
    actions = [random_actions(env, generator) for _ in range(25)]
    steps = [env.step(joint) for joint in actions]

    peer = simple_spread_v3.parallel_env(
        N=n_agents, local_ratio=local_ratio, max_cycles=25, continuous_actions=not discrete
    )
    names, collided = peer.possible_agents, 0
    for game in range(starts):
        peer.reset(seed=0)
        world, touched = peer.unwrapped.world, False
        for i in range(n_agents):
            world.agents[i].state.p_pos = first.pos[game, i].numpy().copy()
            world.landmarks[i].state.p_pos = first.landmark[game, i].numpy().copy()
        torch.testing.assert_close(first_obs[game].flatten(), torch.tensor(peer.state()), **CLOSE)
        for joint, (_, reward, terminated, truncated, info) in zip(actions, steps, strict=True):
            obs, rewards, ends, cuts, _ = peer.step(reference_actions(joint[game], names))
            obs = torch.tensor(np.stack([obs[name] for name in names]))  # (N, O)
            rewards = torch.tensor([rewards[name] for name in names], dtype=torch.float32)  # (N,)
            points = [agent.state.p_vel for agent in world.agents]
            points += [entity.state.p_pos for entity in world.entities]
            state = torch.tensor(np.concatenate(points), dtype=torch.float32)
            torch.testing.assert_close(info["final_obs"][game], obs, **CLOSE)
            torch.testing.assert_close(info["final_state"][game], state, **CLOSE)
            torch.testing.assert_close(info["agent_rewards"][game], rewards, **CLOSE)
            torch.testing.assert_close(reward[game], rewards.mean(), **CLOSE)
            assert cuts[names[0]] == truncated[game] and ends[names[0]] == terminated[game]
            touched |= any(
                peer.unwrapped.scenario.is_collision(a, b) for a, b in combinations(world.agents, 2)
            )
        collided += touched
    assert truncated.all() and collided >= 0.3 * starts


def test_points_without_a_radius_move_as_in_mpe2():
    generator = torch.Generator().manual_seed(1)
    peer = ReferenceWorld()
    peer.agents = [Agent() for _ in range(5)]
    pos = torch.rand(1, 5, 2, generator=generator)
    for i, agent in enumerate(peer.agents):
        agent.collide, agent.silent = False, True
        agent.state.p_pos, agent.state.p_vel = pos[0, i].double().numpy(), np.zeros(2)
    world = World(pos, torch.zeros(1, 5, 2), torch.zeros(1, 1, 2))
    for _ in range(25):
        actions = 2 * torch.rand(1, 5, 2, generator=generator) - 1
        for i, agent in enumerate(peer.agents):
            agent.action.u = 5.0 * actions[0, i].double().numpy()
        peer.step()
        world = move(world, actions)
        for ours, theirs in ((world.pos, "p_pos"), (world.vel, "p_vel")):
            values = np.stack([getattr(agent.state, theirs) for agent in peer.agents])
            torch.testing.assert_close(ours[0], torch.tensor(values, dtype=torch.float32), **CLOSE)


def test_contact_forces_are_opposite_and_finite():
    pos = torch.tensor([[[0.0, 0.0], [0.2, 0.0], [3.0, 3.0]], [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]])
    forces = contact_forces(pos, 0.15)
    # 0.1 deep, times the stiffness; far away nothing; at the very same point there is no direction
    expected = torch.tensor([[[-10.0, 0.0], [10.0, 0.0], [0.0, 0.0]], [[0.0, 0.0]] * 3])
    torch.testing.assert_close(forces, expected, **CLOSE)


# ---- aggregation ----
def test_aggregation_observations_and_state():
    env = build(Aggregation, 3, 7)
    env.reset()
    for step in range(1, 5):
        *_, info = env.step(greedy(env))
        pos, vel, landmark = (field.tolist() for field in env._scene)
        for game in range(3):
            for i in range(5):
                x, y = pos[game][i]
                seen = [landmark[game][0]] + [pos[game][j] for j in range(5) if j != i]
                row = [*vel[game][i], x, y] + [c for u, v in seen for c in (u - x, v - y)] + [1 - step / 25]
                torch.testing.assert_close(info["final_obs"][game, i], torch.tensor(row), **CLOSE)
            goal = landmark[game][0]
            relative = [[u - v for u, v in zip(point, goal, strict=True)] for point in pos[game]]
            points = [c for point in [*vel[game], *relative, goal] for c in point]
            torch.testing.assert_close(env.state()[game], torch.tensor([*points, 1 - step / 25]), **CLOSE)


@pytest.mark.parametrize("radius, steps", [(0.5, 9.5), (0.3, 10.8)])
def test_aggregation_greedy_controller_succeeds(radius, steps):
    env = build(Aggregation, 2000, 1, radius=radius)
    env.reset()
    lengths = torch.zeros(2000)
    for _ in range(25):
        _, reward, terminated, truncated, info = env.step(greedy(env))
        first = terminated & (lengths == 0)
        assert not truncated.any() and (reward == 10.0 * terminated).all()
        assert (info["battle_won"] == terminated).all()
        lengths = torch.where(first, info["episode_length"], lengths)
    assert (lengths > 0).all() and abs(lengths.mean() - steps) < 0.2


def test_aggregation_random_team_rarely_succeeds():
    env = build(Aggregation, 20_000, 2)
    generator = torch.Generator().manual_seed(0)
    env.reset()
    first_episode, won = torch.ones(20_000, dtype=torch.bool), 0
    for _ in range(25):
        _, _, terminated, _, info = env.step(random_actions(env, generator))
        won += (info["battle_won"] & first_episode).sum()
        first_episode &= ~terminated
    assert 360 <= won <= 560  # 23 in 1000 episodes


def test_aggregation_ends():
    env = build(Aggregation, 4, 3)
    env.reset()
    landmark = env._scene.landmark
    for step in range(1, 26):
        pos = landmark + torch.tensor([0.79, 0.0])
        pos = pos.expand(-1, 5, -1).clone()
        pos[1:, 4, 0] += 0.02  # one agent is outside in all games but 0
        pos[3] -= 0.1 * (step == 25)  # game 3 makes it with the last step
        env._scene = env._scene._replace(pos=pos, vel=torch.zeros(4, 5, 2))
        obs, reward, terminated, truncated, info = env.step(torch.zeros(4, 5, 2))
        assert not truncated.any()
        if step == 1:
            assert terminated.tolist() == [True, False, False, False]
            assert reward.tolist() == [10.0, 0.0, 0.0, 0.0] and info["battle_won"].tolist()[0]
            torch.testing.assert_close(obs[:, 0, -1], torch.tensor([1.0, 0.96, 0.96, 0.96]))
            torch.testing.assert_close(info["final_obs"][:, 0, -1], torch.full((4,), 0.96))
            assert not env._scene.vel[0].any() and (env._scene.landmark[0] != landmark[0]).all()
        elif step < 25:
            assert terminated.tolist() == [True, False, False, False] and not reward[1:].any()
        else:
            assert terminated.tolist() == [True] * 4 and reward.tolist() == [10.0, -10.0, -10.0, 10.0]
            assert info["battle_won"].tolist() == [True, False, False, True]
            assert info["episode_return"].tolist() == reward.tolist()
            assert (info["final_obs"][1:, :, -1] == 0).all() and (obs[:, :, -1] == 1).all()
        landmark = env._scene.landmark


# ---- mill ----
def test_mill_full_force():
    env = build(Mill, 2)
    obs, _ = env.reset()
    angle = torch.atan2(obs[:, 0, 1], obs[:, 0, 2])
    speeds = []
    for step in range(1, 11):
        assert (obs[:, :, 3] == torch.tensor((step - 1) / 10)).all()
        obs, reward, terminated, truncated, info = env.step(shove(env, 1.0))
        final = info["final_obs"]
        speeds.append(100 * final[0, 0, 0].item())
        angle = angle + 0.1 * speeds[-1]
        torch.testing.assert_close(
            final[:, 0, 1:3], torch.stack([angle.sin(), angle.cos()], 1), atol=1e-3, rtol=0
        )
        assert torch.equal(final[:, :, 4:], torch.eye(10).expand(2, -1, -1))
        assert torch.equal(info["final_state"][:, :4], final[:, 3, :4])
        assert info["final_state"][:, 4].tolist() == [float(step >= 4)] * 2
        assert reward.tolist() == [13.0 if step == 10 else 3.0] * 2
        assert terminated.tolist() == [step == 10] * 2 and not truncated.any()
    assert speeds[:4] == pytest.approx([40, 70, 92.5, 109.375]) and speeds[9] == pytest.approx(
        150.99, abs=0.01
    )
    assert info["episode_return"].tolist() == [40.0] * 2 and info["battle_won"].all()
    assert (obs[:, :, [0, 3]] == 0).all() and not env.state()[:, 4].any()


@pytest.mark.parametrize(
    "force, kwargs, length, episode_return, won",
    [
        (0.8, {}, 10, 40, True),
        (0.67, {}, 10, 37, True),  # 26.8 after the first step: not paid
        (0.75, {}, 10, 37, True),  # 30, which is not above 30: not paid either
        (0.65, {}, 10, 17, False),
        ([1.0] * 9 + [-1.0], {}, 10, 40, True),
        ([1.0] * 8 + [-1.0] * 2, {}, 10, 17, False),
        (0.0, {}, 10, -10, False),
        (-1.0, {}, 10, -10, False),
        (1.0, {"end_on_win": True}, 4, 22, True),
        (1.0, {"end_on_win": True, "n_agents": 25}, 2, 16, True),  # 100 after the first step: not won yet
        (0.8, {"end_on_win": True}, 6, 28, True),
        (0.5, {"end_on_win": True}, 10, 17, False),
        (1.0, {"end_on_win": True, "radius": 0.325}, 6, 28, True),
        (1.0, {"end_on_win": True, "mass": 1.3}, 6, 28, True),
        (1.0, {"n_agents": 4, "mass": 0.25}, 10, 40, True),
    ],
)
def test_mill_returns(force, kwargs, length, episode_return, won):
    env = build(Mill, **kwargs)
    env.reset()
    for step in range(1, length + 1):
        _, _, terminated, truncated, info = env.step(shove(env, force))
        assert terminated.item() == (step == length) and not truncated.item()
    assert info["episode_length"].item() == length and info["episode_return"].item() == episode_return
    assert info["battle_won"].item() == won


def test_mill_remembers_that_it_was_fast():
    env = build(Mill)
    env.reset()
    for step in range(10):
        *_, info = env.step(shove(env, 1.0 if step < 4 else -1.0))
    assert info["battle_won"].item() and info["final_obs"][0, 0, 0] < 0
    # 40, 70, 92.5, 109.4, 42.0 and then less than 30
    assert info["episode_return"].item() == 5 * 3 + 10


def test_mill_random_team_never_wins():
    env = build(Mill, 5000, 4)
    generator = torch.Generator().manual_seed(0)
    env.reset()
    paid = torch.zeros(5000, dtype=torch.bool)
    for _ in range(10):
        *_, info = env.step(random_actions(env, generator))
        paid |= info["final_obs"][:, 0, 0] > 0.3
    assert not info["battle_won"].any() and 0.008 < paid.float().mean() < 0.025


def test_mill_by_discrete_actions():
    env = build(Mill, 3, discrete=True)
    env.reset()
    *_, info = env.step(torch.tensor([[0], [1], [2]]).expand(3, 10))
    # counter-clockwise, nothing, and clockwise, which is positive
    torch.testing.assert_close(info["final_obs"][:, 0, 0], torch.tensor([-0.4, 0.0, 0.4]))


# ---- all tasks ----
@pytest.mark.parametrize("task", [Spread, Aggregation])
def test_everybody_begins_in_the_square_from_minus_1_to_1(task):
    env = build(task, 5000)
    env.reset()
    for points in (env._scene.pos, env._scene.landmark):
        assert -1 <= points.min() < -0.99 and 0.99 < points.max() <= 1 and abs(points.mean()) < 0.02


def test_bounds_of_arguments_are_allowed():
    assert make("mill,n_agents=1000").n_agents == 1000
    assert [make(f"spread,local_ratio={x}")._local_ratio for x in (0, 1)] == [0, 1]


def test_seed_0_is_a_seed_too():
    env = build(Aggregation, 3, 5)
    env.reset()
    assert torch.equal(env.reset(seed=0)[0], build(Aggregation, 3, 0).reset()[0])


def test_a_picture_of_the_mill_turns_clockwise():
    env = build(Mill, n_agents=1)
    env.reset()
    env._scene = env._scene._replace(angle=torch.full((1,), math.pi / 2))

    def pixels(force, *points):
        env.step(shove(env, force))
        picture = env.render()
        return [
            picture[round((1.3 - y) * 480 / 2.6) + 32, round((x + 1.3) * 480 / 2.6)].tolist()
            for x, y in points
        ]

    mark, stone, arrow = [38, 40, 44], [120, 116, 110], [96, 224, 92]
    assert pixels(0.0, (0.4, 0), (-0.4, 0)) == [mark, stone]  # a quarter from the top
    assert pixels(1.0, (0.12, 0.66), (-0.12, 0.66)) == [arrow, [38, 40, 44]]  # at the top, to the right


def test_who_touch_each_other_are_red_in_a_picture():
    env = build(Spread)
    env.reset()
    pos = torch.tensor([[[0.0, 0.0], [0.2, 0.0], [0.8, 0.8]]], dtype=torch.float64)
    env._scene = env._scene._replace(pos=pos, landmark=torch.full((1, 3, 2), -0.9, dtype=torch.float64))
    env.step(torch.zeros(1, 3, 2))
    picture = env.render()
    colours = [
        picture[round((1.2 - y) * 200) + 32, round((x + 1.2) * 200)].tolist() for x, y in pos[0].tolist()
    ]
    assert colours == [[228, 66, 56], [228, 66, 56], [64, 128, 245]]


def test_pictures_tell_how_it_ended(monkeypatch):
    monkeypatch.setattr(_Canvas, "picture", lambda self, *words: words)
    env = build(Mill)
    env.reset()
    for force, told in ((1.0, ("return 40.0", "won")), (-1.0, ("return -10.0", "lost"))):
        for _ in range(10):
            env.step(shove(env, force))
        assert env.render() == (f"mill   step 10   {told[0]}", told[1])


@pytest.mark.parametrize(
    "task, n_agents, obs_dim, state_dim, limit, dims, choices",
    [(Spread, 3, 18, 18, 25, 2, 5), (Aggregation, 5, 15, 23, 25, 2, 5), (Mill, 10, 14, 5, 10, 1, 3)],
)
def test_sizes_and_spaces(task, n_agents, obs_dim, state_dim, limit, dims, choices):
    env = build(task, 4)
    obs, _ = env.reset()
    assert (env.n_agents, env.obs_dim, env.state_dim, env.episode_limit) == (
        n_agents,
        obs_dim,
        state_dim,
        limit,
    )
    assert obs.shape == (4, n_agents, obs_dim) and env.state().shape == (4, state_dim)
    assert obs.dtype == env.state().dtype == torch.float32 and env.avail_actions() is None
    assert env.single_action_space == spaces.Box(-1.0, 1.0, (n_agents, dims), np.float32)
    _, reward, *_ = env.step(torch.zeros(4, n_agents, dims))
    assert reward.dtype == torch.float32
    with pytest.raises(ValueError, match="game 1, agent 2"):
        actions = torch.zeros(4, n_agents, dims)
        actions[1, 2, 0] = 1.01
        env.step(actions)

    env = build(task, 4, discrete=True)
    env.reset()
    assert env.single_action_space == spaces.MultiDiscrete([choices] * n_agents)
    assert env.avail_actions().shape == (4, n_agents, choices) and env.avail_actions().all()
    with pytest.raises(ValueError, match="game 0, agent 1"):
        env.step(torch.tensor([0, choices, 0, 0, 0, 0, 0, 0, 0, 0])[:n_agents].expand(4, -1))


@pytest.mark.parametrize("task, table", [(Spread, PUSHES), (Aggregation, PUSHES), (Mill, TURNS)])
def test_discrete_actions_are_forces(task, table):
    discrete, continuous = build(task, 6, 5, discrete=True), build(task, 6, 5)
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(discrete.reset()[0], continuous.reset()[0])
    for _ in range(30):
        choices = random_actions(discrete, generator)
        for ours, theirs in zip(
            discrete.step(choices)[:4], continuous.step(torch.tensor(table)[choices])[:4], strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_games(task):
    def play(env, **kwargs):
        generator = torch.Generator().manual_seed(9)
        shown = [env.reset(**kwargs)[0]]
        for _ in range(60):
            obs, reward, *_ = env.step(random_actions(env, generator))
            shown += [obs, reward, env.state()]
        return torch.cat([part.flatten() for part in shown])

    env = build(task, 3, 11)
    first = play(env)
    assert torch.equal(first, play(build(task, 3, 11))) and torch.equal(first, play(env, seed=11))
    assert not torch.equal(first, play(env)) and not torch.equal(first, play(build(task, 3, 12)))


@pytest.mark.parametrize("task", TASKS)
def test_games_of_a_batch_do_not_meet(task):
    many, one = build(task, 8, 1), build(task, 1, 2)
    generator = torch.Generator().manual_seed(4)
    many.reset(), one.reset()
    one._scene = many._scene._make(field[5:6] for field in many._scene)
    for _ in range(5):
        actions = random_actions(many, generator)
        *_, info = many.step(actions)
        *_, alone = one.step(actions[5:6])
        for key in ("final_obs", "final_state", "episode_return"):
            torch.testing.assert_close(info[key][5:6], alone[key], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_a_new_episode_follows_in_the_same_step(task):
    env = build(task, 2, 6)
    env.reset()
    generator = torch.Generator().manual_seed(8)
    for step in range(1, env.episode_limit + 1):
        obs, _, terminated, truncated, info = env.step(random_actions(env, generator))
        ended = step == env.episode_limit
        assert (terminated | truncated).tolist() == [ended] * 2 and truncated.tolist() == [
            ended and task is Spread
        ] * 2
        assert torch.equal(obs, info["final_obs"]) != ended
        assert torch.equal(env.state(), info["final_state"]) != ended
    moving = 0 if task is Mill else slice(0, 2)  # speeds are zero again
    assert not obs[:, :, moving].any() and info["final_obs"][:, :, moving].any()
    *_, info = env.step(random_actions(env, generator))
    assert info["episode_length"].tolist() == [1, 1]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("discrete", [False, True])
def test_pictures(task, discrete):
    env = build(task, 2, 1, discrete=discrete)
    with pytest.raises(RuntimeError, match="reset"):
        env.render()
    env.reset()
    pictures = [env.render()]
    generator = torch.Generator().manual_seed(1)
    for _ in range(env.episode_limit):
        env.step(random_actions(env, generator))
        pictures.append(env.render())
    for picture, following in zip(pictures, pictures[1:], strict=False):
        assert picture.shape == (512, 480, 3) and picture.dtype == np.uint8
        assert (picture != following).any()


@pytest.mark.parametrize(
    "task, kwargs",
    [
        (Spread, {"n_agents": 0}),
        (Spread, {"local_ratio": 1.5}),
        (Aggregation, {"radius": 0.0}),
        (Aggregation, {"radius": math.nan}),
        (Mill, {"mass": -1.0}),
        (Mill, {"n_agents": 0}),
    ],
)
def test_bad_arguments(task, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        build(task, **kwargs)


@pytest.mark.parametrize(
    "env_id, sentence",
    [
        ("spread,n_agents=abc", "n_agents must be a whole number, at least 1 and at most 1,000, got 'abc'"),
        ("mill,n_agents=2.0", "n_agents must be a whole number, at least 1 and at most 1,000, got 2.0"),
        ("mill,n_agents=True", "n_agents must be a whole number, at least 1 and at most 1,000, got True"),
        (
            "aggregation,n_agents=1e9",
            "n_agents must be a whole number, at least 1 and at most 1,000, got 1000000000.0",
        ),
        (
            "spread,n_agents=99999999",
            "n_agents must be a whole number, at least 1 and at most 1,000, got 99999999",
        ),
        ("spread,local_ratio=abc", "local_ratio must be a number from 0 to 1, got 'abc'"),
        ("spread,local_ratio=true", "local_ratio must be a number from 0 to 1, got True"),
        ("aggregation,radius=abc", "radius must be a number from 1e-09 to 1e+06, got 'abc'"),
        ("mill,radius=[1]", "radius must be a number from 1e-09 to 1e+06, got [1]"),
        ("mill,radius=1e400", "radius must be a number from 1e-09 to 1e+06, got inf"),
        ("mill,mass=abc", "mass must be a number from 1e-09 to 1e+06, got 'abc'"),
        ("mill,radius=1e-200", "radius must be a number from 1e-09 to 1e+06, got 1e-200"),
        ("mill,mass=True", "mass must be a number from 1e-09 to 1e+06, got True"),
    ],
)
def test_arguments_of_the_wrong_type(env_id, sentence):
    with pytest.raises(ValueError) as caught:
        make(env_id)
    assert str(caught.value) == sentence


def test_one_agent_alone():
    for task in TASKS:
        env = build(task, 2, n_agents=1)
        env.reset()
        obs, *_ = env.step(torch.zeros(2, *env.single_action_space.shape))
        assert obs.isfinite().all()


def test_ids_take_the_arguments_of_programs_and_users():
    for env_id in ("spread", "aggregation", "aggregation_hard", "mill"):
        env = make(env_id, num_envs=2, validate=False)
        assert env.reset()[0].shape == (2, env.n_agents, env.obs_dim)
        assert isinstance(make(f"{env_id},discrete=True").single_action_space, spaces.MultiDiscrete)
    assert make("aggregation_hard")._radius == 0.5 and make("aggregation,radius=0.4")._radius == 0.4
    with pytest.raises(ValueError, match="mill has no argument 'omega'; it has discrete, n_agents,"):
        make("mill,omega=3")
