"""PettingZoo in: next to mpe2 by hand, padding, masks, ends, workers, errors. Out: PettingZoo's own tests."""

import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv

from envs import list_ids, make
from envs.pettingzoo import NO_LIMIT, _build, to_pettingzoo

TOY = "pettingzoo:test_pettingzoo"  # this file: a worker calls parallel_env() below
BOX = spaces.Box(-1, 1, (2,), np.float32)


class Toy(ParallelEnv):
    """`a` and `b` play 4 steps, `c` two. Observations tell agent and step, the infos what was played.

    a: 2 actions, no mask. b: actions 1 to 4, a mask in its observation. c: 3 actions, a mask in its info.
    """

    metadata = {"name": "toy"}
    possible_agents = ["a", "b", "c"]

    def __init__(self, kind, length=4):
        self.kind, self.length = kind, length
        box = {
            "a": BOX,
            "b": spaces.Box(0, 255, (2, 2), np.uint8),
            "c": spaces.Box(-np.inf, np.inf, (3,), np.float32),
        }
        mask = spaces.Box(0, 1, (4,), np.int8)
        self.observed = box | {"b": spaces.Dict({"observation": box["b"], "action_mask": mask})}
        self.acts = {"a": spaces.Discrete(2), "b": spaces.Discrete(4, start=1), "c": spaces.Discrete(3)}
        if kind in ("continuous", "mixed"):
            self.acts["b"] = spaces.Box(0, 0.1, (1, 3), np.float64)
        if kind == "continuous":
            self.acts |= {"a": BOX, "c": BOX}
        if kind == "multi":
            self.acts["a"] = spaces.MultiDiscrete([2, 2])
        if kind == "unbounded":
            self.acts = dict.fromkeys("abc", spaces.Box(-np.inf, np.inf, (2,)))
        if kind == "sequence":
            self.observed["c"] = spaces.Sequence(BOX)

    def observation_space(self, agent):
        return self.observed[agent]

    def action_space(self, agent):
        return self.acts[agent]

    def reset(self, seed=None, options=None):
        if self.kind == "lost" and seed is None:
            raise KeyError("map")
        self.rng = np.random.default_rng(seed) if seed is not None else self.rng
        self.agents, self.clock = list("abc"), 0
        self.start = self.rng.integers(100)
        return self.show()

    def show(self):
        shown = {
            "a": np.float32([self.start, self.clock]),
            "b": {"observation": np.full((2, 2), 10 + self.clock, np.uint8)},
            "c": np.float32([3, 3, self.clock]),
        }
        shown["b"]["action_mask"] = np.int8([0, self.clock != 1, 0, self.clock != 1])  # at 1 nothing is legal
        infos = {"a": {}, "b": {}, "c": {"action_mask": np.int8([1, 0, 1])}}
        return {agent: shown[agent] for agent in self.agents}, {agent: infos[agent] for agent in self.agents}

    def step(self, actions):
        assert list(actions) == self.agents
        if self.kind == "crash" and self.clock == 1:
            raise ZeroDivisionError("no ground")
        if self.kind == "hangup" and self.clock == 1:
            raise ConnectionResetError("the game\n hung up")
        if self.kind == "death" and self.clock == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.clock += 1
        assert all(space.contains(actions[a]) for a, space in self.acts.items() if a in actions), actions
        rewards = {agent: float(np.sum(actions[agent])) for agent in self.agents}
        terminated = {agent: agent == "c" and self.clock == 2 for agent in self.agents}
        truncated = dict.fromkeys(self.agents, self.clock == self.length)
        if self.kind == "win" and self.clock == self.length:
            terminated = dict.fromkeys(self.agents, True)
        obs, infos = self.show()
        self.agents = [agent for agent in self.agents if not (terminated[agent] or truncated[agent])]
        return obs, rewards, terminated, truncated, infos

    def render(self):
        if self.kind == "blind":
            raise OSError("no display")
        picture = np.full((4, 6, 3), self.clock, np.uint8)
        return {"continuous": None, "state": "x.o"}.get(self.kind, picture)


class ToyWithState(Toy):
    max_cycles = 7  # longer than it really plays, unless told otherwise

    def state(self):
        return np.float64([[self.start, self.clock]])


def parallel_env(kind="discrete", **kwargs):
    if kind in list_ids():
        return to_pettingzoo(kind)
    return ToyWithState(kind, **kwargs) if kind in ("state", "win") else Toy(kind, **kwargs)


def seeds(seed, num_envs):
    """Those of the games' first episodes."""
    return torch.randint(2**31, (num_envs,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def build():
    """make() whose environments are closed after the test."""
    built = []

    def build(*args, processes=1, **kwargs):
        built.append(make(*args, processes=processes, **kwargs))
        return built[-1]

    yield build
    for env in built:
        env.close()


# ---- in ----
@pytest.mark.parametrize("continuous", [False, True])
def test_spread_is_that_of_mpe2(build, continuous):
    from mpe2 import simple_spread_v3

    arguments = dict(N=2, continuous_actions=continuous, max_cycles=6)
    env_id = f"PettingZoo:mpe2.simple_spread_v3,N=2,continuous_actions={continuous}"
    env = build(env_id, num_envs=3, seed=5, processes=2, max_cycles=6)
    assert (env.n_agents, env.obs_dim, env.state_dim, env.episode_limit) == (2, 12, 24, 6)
    if continuous:
        assert env.single_action_space == spaces.Box(0, 1, (2, 5)) and env.avail_actions() is None
    else:
        assert env.single_action_space == spaces.MultiDiscrete([5, 5])
    theirs = [simple_spread_v3.parallel_env(**arguments) for _ in range(3)]
    seen = [each.reset(seed=seed)[0] for seed, each in zip(seeds(5, 3), theirs, strict=True)]
    obs, info = env.reset()
    assert obs.dtype == env.state().dtype == torch.float32 and info == {}
    env.action_space.seed(1)
    for step in range(1, 15):  # more than two episodes
        assert np.array_equal(obs, np.array([list(game.values()) for game in seen]))
        assert np.array_equal(env.state(), np.array([each.state() for each in theirs]))
        actions = env.action_space.sample()
        obs, reward, terminated, truncated, info = env.step(torch.from_numpy(actions))
        for game, each in enumerate(theirs):
            seen[game], rewards, *_ = each.step(dict(zip(each.agents, actions[game], strict=True)))
            assert np.array_equal(info["final_obs"][game], np.array(list(seen[game].values())))
            assert np.array_equal(info["final_state"][game], each.state())
            rewards = torch.tensor(list(rewards.values()), dtype=torch.float32)
            assert torch.equal(info["agent_rewards"][game], rewards)
            torch.testing.assert_close(reward[game], rewards.mean())
            if step % 6 == 0:
                seen[game] = each.reset()[0]
        assert reward.dtype == torch.float32 and not terminated.any() and truncated.dtype == torch.bool
        assert truncated.tolist() == [step % 6 == 0] * 3
        assert info["episode_length"].tolist() == [(step - 1) % 6 + 1] * 3
        assert (info["final_avail_actions"] is None) == continuous
    again, first = env.reset(seed=7)[0], theirs[2].reset(seed=seeds(7, 3)[2])[0]
    assert np.array_equal(again[2], np.array(list(first.values())))
    assert env.render().shape == (700, 700, 3) and env.render().dtype == np.uint8


def test_padding_masks_and_agents_that_leave(build):
    env = build(TOY, num_envs=2, seed=3, team_reward="sum")
    assert (env.n_agents, env.obs_dim, env.state_dim, env.episode_limit) == (3, 4, 12, NO_LIMIT)
    assert env.single_action_space == spaces.MultiDiscrete([4, 4, 4])
    obs, _ = env.reset()
    start = [np.random.default_rng(seed).integers(100) for seed in seeds(3, 2)]
    a, c = [1, 1, 0, 0], [1, 0, 1, 0]
    nothing = [1, 0, 0, 0]
    # before each step: what agents see, what they may do
    expected = [
        ([[-1, 0, 0, 0], [10] * 4, [3, 3, 0, 0]], [a, [0, 1, 0, 1], c]),
        ([[-1, 1, 0, 0], [11] * 4, [3, 3, 1, 0]], [a, nothing, c]),
        ([[-1, 2, 0, 0], [12] * 4, [0] * 4], [a, [0, 1, 0, 1], nothing]),
        ([[-1, 3, 0, 0], [13] * 4, [0] * 4], [a, [0, 1, 0, 1], nothing]),
        ([[-1, 4, 0, 0], [14] * 4, [0] * 4], [a, [0, 1, 0, 1], nothing]),
    ]

    def check(obs, state, avail_actions, step):
        for game in range(2):
            shown = torch.tensor(expected[step][0], dtype=torch.float32)
            shown[0, 0] = start[game]
            assert torch.equal(obs[game], shown) and torch.equal(state[game], shown.flatten())
            assert torch.equal(avail_actions[game], torch.tensor(expected[step][1]).bool())

    for step in range(4):
        check(obs, env.state(), env.avail_actions(), step)
        with pytest.raises(ValueError, match=f"game 1, agent 1: action {[0, 1, 2, 2][step]} is not allowed"):
            env.step(torch.tensor([[1, [1, 0, 1, 1][step], 0], [1, [0, 1, 2, 2][step], 0]]))
        action = env.avail_actions().float().argmax(2)  # (2, 3)
        action[:, 0] = 1
        obs, reward, terminated, truncated, info = env.step(action)
        # the last action of b, who counts from 1, and none of c, who left
        played = torch.tensor([1.0, [2, 1, 2, 2][step], 0.0])
        assert torch.equal(info["agent_rewards"], played.expand(2, -1))
        assert torch.equal(reward, played.sum().expand(2)) and not terminated.any()
        assert truncated.tolist() == [step == 3] * 2
        check(info["final_obs"], info["final_state"], info["final_avail_actions"], step + 1)
    assert info["episode_return"].tolist() == [11, 11] and info["episode_length"].tolist() == [4, 4]
    assert "battle_won" not in info
    start = [np.random.default_rng(seed).integers(100, size=2)[1] for seed in seeds(3, 2)]
    check(obs, env.state(), env.avail_actions(), 0)  # the next episode of the same random stream


def test_seed_0_is_a_seed_too(build):
    env = build(TOY, num_envs=2, seed=3)
    env.reset()
    start = [np.random.default_rng(seed).integers(100) for seed in seeds(0, 2)]
    assert env.reset(seed=0)[0][:, 0, 0].tolist() == start


def test_continuous_actions_are_padded_and_in_their_true_bounds(build):
    env = build(TOY, kind="continuous")
    low = [[-1, -1, -1], [0, 0, 0], [-1, -1, -1]]
    high = [[1, 1, 1], np.float32([0.1, 0.1, 0.1]), [1, 1, 1]]
    assert env.single_action_space == spaces.Box(np.float32(low), np.float32(high))
    env.reset()
    # 0.1 is more in float32 than in the float64 of b, whose space is asked for it by the toy
    *_, info = env.step(torch.from_numpy(np.float32(high))[None])
    torch.testing.assert_close(info["agent_rewards"], torch.tensor([[2, 0.3, 2]]))
    with pytest.raises(ValueError, match="game 0, agent 1"):
        env.step(torch.full((1, 3, 3), -0.5))
    with pytest.raises(RuntimeError, match=r"draws no picture \(H, W, 3\): render\(\) returned NoneType"):
        env.render()


def test_state_clock_and_ends(build):
    env = build(TOY, num_envs=2, kind="state", episode_limit=3)
    env.reset()
    assert env.state_dim == 2 and env.state()[:, 1].tolist() == [0, 0]
    for step in range(1, 5):  # our clock ends it after 3 of its 4 steps
        _, _, terminated, truncated, info = env.step(env.avail_actions().float().argmax(2))
        assert not terminated.any() and truncated.tolist() == [step == 3] * 2
        assert info["final_state"][:, 1].tolist() == [(step - 1) % 3 + 1] * 2
        assert env.state()[:, 1].tolist() == [step % 3] * 2
    with pytest.raises(RuntimeError, match=r"draws no picture \(H, W, 3\): render\(\) returned str"):
        env.render()
    env = build(TOY, kind="win")
    env.reset()
    assert env.episode_limit == 7
    for step in range(1, 9):  # terminated at step 4 of 7, though truncated at once
        *_, terminated, truncated, info = env.step(env.avail_actions().float().argmax(2))
        assert terminated.tolist() == [step % 4 == 0] and not truncated.any()
        # game 0 as the step left it, once somebody looks on
        assert step < 5 or env.render().tolist() == np.full((4, 6, 3), (step - 1) % 4 + 1).tolist()
        _ = step == 4 and env.render()
    env.reset()
    assert env.render().max() == 0


def test_clock_by_the_default_of_max_cycles(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "parallel_env", lambda max_cycles=9: Toy("discrete"))
    assert _build(__name__, {}, False)[1] == 9


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("pettingzoo:mpe0.simple_v3", "cannot be imported .*'mpe0'.* pip install .* like pettingzoo:mpe2"),
        ("pettingzoo:", "cannot be imported .* reads like pettingzoo:mpe2.simple_spread_v3"),
        ("pettingzoo:pettingzoo.classic.tictactoe_v3", "has no parallel_env.* AEC-only, its agents act in"),
        ("pettingzoo:math", "math has no parallel_env.*once$"),
        (f"{TOY},kind=mixed", "some agents act discretely and some continuously, which is not supported"),
        (f"{TOY},kind=multi", "a acts in MultiDiscrete.* only Discrete and bounded float Box are supported"),
        (f"{TOY},kind=unbounded", "a acts in Box"),
        (f"{TOY},kind=sequence", "c observes Sequence.*, of which gymnasium.spaces.flatten makes no array"),
        (f"{TOY},map_name=3", r"parallel_env\(map_name=3\) fails: TypeError: .*'map_name'"),
        (f"{TOY},size=3", r"parallel_env\(size=3\) fails: TypeError: .*'size'"),
        (f"{TOY},seed=3", "has no argument 'seed'; .* to pass the module's own, write seed_$"),
        (f"{TOY},validate=0", "has no argument 'validate'; .* to pass the module's own, write validate_$"),
        (f"{TOY},team_reward=max", "team_reward must be 'mean' or 'sum', got 'max'"),
        (f"{TOY},processes=0", "processes must be a whole number, at least 1, got 0"),
    ],
)  # fmt: skip
def test_environments_that_do_not_fit(env_id, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(env_id)
    assert "\n" not in str(caught.value)


def test_without_pettingzoo(monkeypatch):
    monkeypatch.delitem(sys.modules, "envs.pettingzoo")
    monkeypatch.setitem(sys.modules, "pettingzoo", None)
    with pytest.raises(ValueError, match="PettingZoo is not installed: pip install"):
        make("pettingzoo:mpe2.simple_spread_v3")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("crash", "pettingzoo:test_pettingzoo: game 0, step 2: ZeroDivisionError: no ground"),
        ("hangup", "pettingzoo:test_pettingzoo: game 0, step 2: ConnectionResetError: the game hung up"),
        ("death", "pettingzoo:test_pettingzoo: worker process 0 died (exit code -9)"),
    ],
)
def test_workers_that_fail_end_all(build, kind, message):
    env = build(TOY, num_envs=3, processes=2, kind=kind)
    with pytest.raises(RuntimeError, match="reset"):
        env.render()
    env.reset()
    workers = env._workers
    env.step(env.avail_actions().float().argmax(2))
    with pytest.raises(RuntimeError) as caught:
        env.step(env.avail_actions().float().argmax(2))
    assert str(caught.value) == message
    assert kind == "death" or "in step" in caught.value.__notes__[0]
    assert not any(worker.is_alive() for worker in workers) and env.closed
    with pytest.raises(RuntimeError, match="is closed"):
        env.reset()


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("lost", lambda env: (env.reset(), env.reset()), "game 0, reset(): KeyError: 'map'"),
        (
            "blind",
            lambda env: (env.reset(), env.render()),
            "game 0, reset(): no picture, as render() fails (OSError: no display)",
        ),
    ],
)
def test_reset_and_render_that_fail(build, kind, call, message):
    env = build(TOY, num_envs=2, processes=2, kind=kind)
    with pytest.raises(RuntimeError) as caught:
        call(env)
    assert str(caught.value) == f"pettingzoo:test_pettingzoo: {message}" and env.closed


def test_a_worker_that_dies_within_a_message(build, monkeypatch):
    env = build(TOY)

    def recv():
        raise OSError("got end of file during message")  # as multiprocessing has it

    monkeypatch.setattr(env._pipes[0], "recv", recv)
    env._workers[0].kill()
    with pytest.raises(RuntimeError, match="worker process 0 died"):
        env.reset()


@pytest.mark.parametrize("env_id", ["pettingzoo:math", f"{TOY},kind=sequence"])
def test_no_worker_of_an_unfit_environment_prints(env_id):
    # A program of its own: the server that starts the workers keeps the stderr that it was born with.
    code = (
        f"import envs\ntry: envs.make({env_id!r}, num_envs=4, processes=4)\nexcept ValueError as e: print(e)"
    )
    root = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (root, root / "tests")))
    command, variables = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": path}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith("pettingzoo:") and ended.stdout.count("\n") == 1
    assert "Traceback" not in ended.stderr


def test_workers_end_with_close_and_with_the_environment(build):
    env = build(TOY, num_envs=3, processes=2)
    assert len(env._workers) == 2
    env.reset()  # by now both are there to listen
    env.close()
    assert [worker.exitcode for worker in env._workers] == [0, 0]
    env = make(TOY, processes=1)
    (worker,) = env._workers
    del env
    assert worker.exitcode == 0


# ---- out ----
@pytest.mark.parametrize("env_id", ["3m", "spread", "aggregation", "mill", "quadratic", "cdm"])
def test_pettingzoo_tests_of_ours(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # here, because it is slow to import and no worker needs it
        from pettingzoo.test import parallel_api_test, parallel_seed_test

        warnings.simplefilter("error")
        parallel_api_test(to_pettingzoo(env_id), num_cycles=150)
        parallel_seed_test(lambda: to_pettingzoo(env_id))


def sample(env):
    """Random legal actions of a batch."""
    if env.avail_actions() is None:
        return torch.from_numpy(env.action_space.sample())
    return (torch.rand(env.avail_actions().shape) + env.avail_actions()).argmax(2)


@pytest.mark.parametrize("env_id", ["3m", "spread", "aggregation", "mill", "quadratic", "cdm"])
def test_ours_out_is_ours(env_id):
    """A whole episode, next to the batched game: the seed test of PettingZoo stops after one step."""
    ours, out = make(env_id, seed=4), to_pettingzoo(env_id, seed=4)
    agents = [f"agent_{i}" for i in range(ours.n_agents)]
    (obs, infos), expected = out.reset(), [ours.reset()[0], ours.state(), ours.avail_actions()]
    assert out.possible_agents == out.agents == agents
    assert out.max_cycles == ours.episode_limit and out.metadata["name"] == env_id
    ours.action_space.seed(0)
    while True:
        assert np.array_equal([obs[agent] for agent in agents], expected[0][0])
        assert np.array_equal(out.state(), expected[1][0]) and out.state_space.contains(out.state())
        if expected[2] is not None:
            assert np.array_equal([infos[agent]["action_mask"] for agent in agents], expected[2][0])
        if not out.agents:
            break
        actions = sample(ours)
        for i, agent in enumerate(agents):
            assert out.observation_space(agent).contains(obs[agent])
            assert out.action_space(agent).contains(actions[0, i].numpy())
        _, reward, *ends, info = ours.step(actions)
        obs, rewards, *flags, infos = out.step(dict(zip(agents, actions[0].numpy(), strict=True)))
        expected = [info[f"final_{name}"] for name in ("obs", "state", "avail_actions")]
        team = reward.expand(1, len(agents))
        assert rewards == dict(zip(agents, info.get("agent_rewards", team)[0].tolist(), strict=True))
        assert flags == [dict.fromkeys(agents, bool(flag)) for flag in ends]
        assert out.agents == ([] if any(ends) else agents)
        assert infos["agent_1"].get("battle_won") == info.get("battle_won")
    assert out.render().dtype == np.uint8
    out.close()
    with pytest.raises(RuntimeError, match="no episode is running"):
        out.step({})


def test_a_masked_action_is_played_as_the_first_legal_one():
    env, same = to_pettingzoo("3m"), to_pettingzoo("3m")
    _, infos = env.reset()
    same.reset()
    assert infos["agent_0"]["action_mask"][:2].tolist() == [0, 1]  # the living may not do nothing
    after, *_ = env.step(dict.fromkeys(env.agents, 0))
    expected, *_ = same.step(dict.fromkeys(env.agents, 1))
    assert all(np.array_equal(after[agent], expected[agent]) for agent in env.agents)
    with pytest.raises(ValueError, match="game 0, agent 0: action 9 is not allowed"):
        env.step(dict.fromkeys(env.agents, 9))
    for wrong in (1.7, None, [1, 2], math.nan):
        with pytest.raises(ValueError, match=r"agent_1: .* is no action of Discrete\(9\)"):
            env.step({"agent_0": 1, "agent_1": wrong, "agent_2": 1})


@pytest.mark.parametrize("env_id", ["3m", "mill"])
def test_out_and_in_again(build, env_id):
    ours, back = make(env_id, seed=seeds(2, 1)[0]), build(TOY, seed=2, kind=env_id)
    for name in ("n_agents", "obs_dim", "state_dim", "episode_limit", "single_action_space"):
        assert getattr(ours, name) == getattr(back, name)
    obs, again, done = ours.reset()[0], back.reset()[0], False
    ours.action_space.seed(0)
    while not done:
        assert torch.equal(obs, again) and torch.equal(ours.state(), back.state())
        actions = sample(ours)
        if ours.avail_actions() is not None:
            assert torch.equal(ours.avail_actions(), back.avail_actions())
        obs, *one, info = ours.step(actions)
        again, *two, info_again = back.step(actions)
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
        done = one[1] or one[2]
    assert torch.equal(info["final_obs"], info_again["final_obs"])
    assert torch.equal(info["final_state"], info_again["final_state"])
    assert back.render().shape == ours.render().shape


def test_who_writes_into_what_it_got_changes_no_game():
    env = to_pettingzoo("3m")
    _, infos = env.reset()
    infos["agent_0"]["action_mask"][:] = 1
    env.step(dict.fromkeys(env.agents, 0))  # not allowed, so others are played in its place
    env = to_pettingzoo("quadratic")
    obs, _ = env.reset()
    obs["agent_0"] += 5
    env.state()[:] = 5
    assert env.reset()[0]["agent_0"] == 0 and env.state().tolist() == [0, 1]


def test_options_of_a_reset_go_in():
    env = to_pettingzoo("cdm,guided_share=1.0,guided_steps=1000")
    env.reset(options={"evaluation": True})
    assert set(env.step(dict.fromkeys(env.agents, 1))[1].values()) == {-10}  # not guided
