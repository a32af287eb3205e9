"""PettingZoo environments as they are in the wild: what they may show, what they do wrong, where they run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv

from envs import make
from envs.pettingzoo import NO_LIMIT, _build, _cores, _picture

WILD = "pettingzoo:test_pettingzoo_wild"  # this file: a worker calls parallel_env() below
ROOT = Path(__file__).parents[1]
BOX = spaces.Box(-np.inf, np.inf, (2,), np.float32)
ODD = {
    "discrete": spaces.Discrete(3, start=1),
    "binary": spaces.MultiBinary(2),
    "multi": spaces.MultiDiscrete([2, 3]),
    "tuple": spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (2, 1))]),
    "dict": spaces.Dict({"x": spaces.Box(-1, 1, (1,)), "y": spaces.Dict({"z": spaces.Discrete(2)})}),
    "image": spaces.Box(0, 255, (1, 2, 1), np.uint8),
    "obs": spaces.Dict({"obs": spaces.Box(-1, 1, (2,)), "action_mask": spaces.MultiBinary(3)}),
    "masked": spaces.Dict({"near": spaces.Box(-1, 1, (1,)), "far": spaces.Discrete(2), "action_mask": BOX}),
}
SHOWN = {
    "discrete": (3, [0, 0, 1]),
    "binary": (np.int8([1, 0]), [1, 0]),
    "multi": (np.array([1, 2]), [0, 1, 0, 0, 1]),
    "tuple": ((np.int64(1), [[0.5], [0.25]]), [0, 1, 0.5, 0.25]),
    "dict": ({"x": [0.5], "y": {"z": np.array([1])}}, [0.5, 0, 1]),
    "image": (np.uint8([[[200], [255]]]), [200, 255]),
    "obs": ({"obs": np.float32([0.5, -1]), "action_mask": np.int8([0, 1, 0])}, [0.5, -1]),
    "masked": ({"near": [1], "far": 0, "action_mask": [0, 1, 1]}, [1, 0, 1]),
}
VOID = ({}, {})

# what step 2 does wrong to (obs, rewards, terminations, truncations, infos): the change and the sentence
WRONG = {
    "short": (lambda parts: parts[:4], "it returned \\(.*not a tuple of observations, rewards, terminat"),
    "infos": (lambda parts: [*parts[:4], None], "it returned \\[.*, not a tuple"),
    "no infos": (lambda parts: (*parts[:4], None), "infos are None, not a dict by agent"),
    "info list": (lambda parts: (*parts[:4], [{}]), "infos are \\[\\{\\}\\], not a dict by agent"),
    "info": (lambda parts: (*parts[:4], {"b": None}), "its info is None, not a dict"),
    "flags": (lambda parts: (*parts[:2], True, *parts[3:]), "terminations are True, not a dict by agent"),
    "mask": (lambda parts: (*parts[:4], {"b": {"action_mask": [1, 0]}}), r"its action_mask is \[1, 0\], for"),
    "no reward": (lambda parts: _at(parts, 1, None), "its reward is None, not a finite number"),
    "rewards": (lambda parts: _at(parts, 1, np.ones(2)), r"its reward is array.*shape \(2,\), not a"),
    "nan reward": (lambda parts: _at(parts, 1, np.nan), "its reward is nan, not a finite number"),
    "word": (lambda parts: _at(parts, 1, "much"), "its reward is 'much', not a finite number"),
    "nan": (lambda parts: _at(parts, 0, np.float32([1, np.nan])), "its observation array.* is not finite"),
    "huge": (lambda parts: _at(parts, 0, np.float64([1, 1e300])), "its observation array.* is not finite"),
    "long": (lambda parts: _at(parts, 0, np.ones(3)), r"its observation array.* shape \(3,\) does not fit"),
    "none": (lambda parts: _at(parts, 0, None), "its observation None does not fit Box"),
    "missing": (lambda parts: ({"a": parts[0]["a"]}, *parts[1:]), "it is not in observations"),
}  # fmt: skip
STATES = {
    "state none": (None, "state\\(\\) returned None, not 2 finite numbers"),
    "state long": (np.ones(3), r"state\(\) returned array.* of shape \(3,\), not 2 finite numbers"),
    "state nan": (np.float32([np.nan, 0]), "state\\(\\) returned array.*, not 2 finite numbers"),
    "state error": (AttributeError("no hull"), "state\\(\\) fails \\(AttributeError: no hull\\)"),
}
RESETS = {
    "reset obs": "reset\\(\\): it returned {'a': array.*, not a tuple of observations, infos",
    "reset none": "reset\\(\\): infos are None, not a dict by agent",
    "reset old": "reset\\(\\): TypeError: .*unexpected keyword argument 'seed'",
    "reset empty": "reset\\(\\): it has no agents",
}


def _at(parts, which, value):
    return (*parts[:which], parts[which] | {"b": value}, *parts[which + 1 :])


class Wild(ParallelEnv):
    """`a` and `b` see (seed, clock) and have two and three actions, or what `kind` says."""

    metadata = {"name": "wild"}
    possible_agents = ["a", "b"]

    def __init__(self, kind, render_mode=None, **kwargs):
        self.kind, self.kwargs, self.agents = kind, kwargs, []
        self.acts = {"a": spaces.Discrete(2), "b": spaces.Discrete(3)}
        if kind == "flat":
            self.acts["b"] = spaces.Box(np.float64([-2, 0.1, 0]), np.float64([2, 0.1, 1]), dtype=np.float64)
        if kind == "wide":
            self.acts["b"] = spaces.Box(-3e38, 3e38, (1,))
        if kind in ("flat", "wide"):
            self.acts["a"] = spaces.Box(-1, 1, (1,))

    def observation_space(self, agent):
        return ODD.get(self.kind, BOX) if agent == "b" else BOX

    def action_space(self, agent):
        return self.acts[agent]

    def reset(self, seed=None, options=None):
        assert seed is None or 0 <= seed < 2**32
        self.start = self.start if seed is None else seed % 1000
        self.agents, self.clock = [] if self.kind == "reset empty" else list("ab"), 0
        obs, infos = self.show(), {}
        return {"reset obs": obs, "reset none": (obs, None)}.get(self.kind, (obs, infos))

    def show(self):
        shown = {"a": np.float32([self.start, self.clock]), "b": np.float32([self.start, self.clock])}
        return shown | ({"b": SHOWN[self.kind][0]} if self.kind in SHOWN else {})

    def step(self, actions):
        self.clock += 1
        rewards = {"a": np.ones((1, 1)), "b": 2}  # an array of one number is a number
        if self.kind == "flat":
            assert self.acts["b"].contains(actions["b"])
            rewards["b"] = actions["b"] @ [1, 10, 100]
        flags = dict.fromkeys(self.agents, False)
        parts = (self.show(), rewards, flags, flags, {})
        return WRONG[self.kind][0](parts) if self.kind in WRONG and self.clock == 2 else parts

    def state(self):
        if self.kind == "no method":
            nothing = {}
            return nothing()
        if self.kind not in STATES and self.kind != "state":
            return None
        state = STATES[self.kind][0] if self.clock == 2 and self.kind != "state" else np.ones((1, 2))
        if isinstance(state, Exception):
            raise state
        return state


class OldReset(Wild):
    def reset(self):
        return super().reset()[0]


def parallel_env(kind="plain", **kwargs):
    return OldReset(kind) if kind == "reset old" else Wild(kind, **kwargs)


def told(render_mode=None, **kwargs):
    """Another name than parallel_env, which tells what it was given."""
    env = Wild("plain")
    env.max_cycles = len(str(kwargs))
    return env


@pytest.fixture
def build():
    """make() whose environments are closed after the test."""
    built = []

    def build(env_id, processes=1, **kwargs):
        built.append(make(env_id, processes=processes, **kwargs))
        return built[-1]

    yield build
    for env in built:
        env.close()


def play(env):
    return env.step(torch.zeros(env.num_envs, *env.single_action_space.shape, dtype=torch.int64))


def sentence(caught, expected):
    """One line; `match` of pytest.raises would search the worker's traceback too, which is in the notes."""
    assert re.match(f"{WILD}: {expected}", str(caught.value)) and "\n" not in str(caught.value)
    assert "Traceback" in caught.value.__notes__[0]


# ---- what they show and take ----
@pytest.mark.parametrize("kind", list(SHOWN))
def test_observations_of_every_flat_space(build, kind):
    env, expected = build(WILD, kind=kind), SHOWN[kind][1]
    obs, _ = env.reset()
    assert env.obs_dim == max(2, len(expected)) == obs.shape[2]
    assert obs[0, 1, : len(expected)].tolist() == expected and not obs[0, 1, len(expected) :].any()
    if kind == "obs":
        assert env.avail_actions()[0].tolist() == [[True, True, False], [False, True, False]]


def test_a_dimension_with_equal_bounds_plays_its_only_value(build):
    env = build(WILD, kind="flat")
    env.reset()
    assert env.single_action_space.low.tolist() == [[-1, -1, -1], [-2, -1, 0]]
    assert env.single_action_space.high.tolist() == [[1, 1, 1], [2, 1, 1]]
    *_, info = env.step(torch.tensor([[[0.5, 0, 0], [-2.0, -1.0, 0.25]]]))
    assert info["agent_rewards"].tolist() == [[1, 24]]


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        (f"{WILD},kind=wide", r"b acts in Box.*, whose bounds are too wide for float32$"),
        (f"{WILD}:missing", r"has no missing\(\), in which all agents act at once"),
    ],
)
def test_refused_at_the_start(env_id, message):
    with pytest.raises(ValueError, match=message):
        make(env_id)


def test_pictures():
    red = np.zeros((2, 5, 3), np.uint8)
    red[..., 0] = 255
    assert np.array_equal(_picture(red), red)
    assert np.array_equal(_picture(np.moveaxis(red, 2, 0)), red)
    assert np.array_equal(_picture(red / 255), red) and np.array_equal(_picture(red.astype(float)), red)
    assert np.array_equal(_picture(np.concatenate([red, red[..., :1]], 2)), red)
    for grey in (red[..., :1], red[..., 0], red[..., 0] > 0):
        assert _picture(grey).shape == (2, 5, 3) and _picture(grey).min() == 255


# ---- what they do wrong ----
@pytest.mark.parametrize("kind", list(WRONG))
def test_what_step_returns_wrongly(build, kind):
    env = build(WILD, kind=kind, num_envs=2)
    env.reset()
    _, reward, *_ = play(env)
    assert reward.tolist() == [1.5, 1.5]
    with pytest.raises(RuntimeError) as caught:
        play(env)
    sentence(caught, f"game 0(, agent b)?, step 2: {WRONG[kind][1]}")
    assert (", agent b" in str(caught.value)) == ("it" in WRONG[kind][1] and "tuple" not in WRONG[kind][1])
    assert env.closed


@pytest.mark.parametrize("kind", list(STATES))
def test_a_state_that_changes(build, kind):
    env = build(WILD, kind=kind, num_envs=2)
    env.reset()
    assert env.state_dim == 2 and env.state().tolist() == [[1, 1]] * 2
    play(env)
    with pytest.raises(RuntimeError) as caught:
        play(env)
    hint = "; use_state=false takes the observations in its place$"
    sentence(caught, f"game 0, step 2: {STATES[kind][1]}{hint}")
    env = build(f"{WILD},kind={kind},use_state=false", num_envs=2)
    env.reset()
    play(env)
    obs, *_ = play(env)
    assert env.state_dim == 4 and torch.equal(env.state(), obs.flatten(1))


@pytest.mark.parametrize("kind", ["plain", "no method"])
def test_without_a_state_at_the_first_reset(build, kind):
    """None, or rps_v2 of pettingzoo.classic, whose wrapper calls a dict."""
    env = build(WILD, kind=kind)
    assert env.state_dim == 4
    obs, _ = env.reset()
    assert torch.equal(env.state(), obs.flatten(1))


@pytest.mark.parametrize("kind", list(RESETS))
def test_what_reset_returns_wrongly(kind):
    with pytest.raises(RuntimeError) as caught:
        make(f"{WILD},kind={kind}")
    sentence(caught, f"game 0, {RESETS[kind]}")


# ---- clocks, seeds, arguments ----
@pytest.mark.parametrize("module", ["pettingzoo.sisl.pursuit_v5", "pettingzoo.butterfly.cooperative_pong_v6"])
def test_limits_inside_environments_made_from_aec_ones(monkeypatch, module):
    """Stand-ins with the layers of these two, whose games need more packages than our tests install."""
    inner = type("Game", (), {"max_cycles": 900})()
    raw = type("Raw", (Wild,), {"env": inner})("plain")
    wrapper = type("Wrapper", (Wild,), {"unwrapped": raw, "aec_env": raw})("plain")
    monkeypatch.setattr(sys.modules[__name__], "parallel_env", lambda **kwargs: wrapper)
    assert _build(__name__, {}, False)[1] == 900
    assert _build(__name__, {"max_cycles": 50}, False)[1] == 50
    inner.max_cycles = None
    assert _build(__name__, {}, False)[1] == NO_LIMIT


def test_seeds_go_on_with_the_generator(build):
    env, again, resumed = (build(WILD, num_envs=2, seed=2**40) for _ in range(3))
    first = env.reset()[0][:, 0, 0].tolist()
    assert first == again.reset()[0][:, 0, 0].tolist() and first[0] != first[1]
    resumed.generator.set_state(env.generator.get_state())  # as --resume does
    assert set(first).isdisjoint(resumed.reset()[0][:, 0, 0].tolist())
    assert env.reset(seed=2**40)[0][:, 0, 0].tolist() == first


def test_arguments_of_the_modules_own(build):
    given = {"seed": 3, "layout": (3, 4), "deep": [(1, 2), {"x": 5}]}
    env = build(f"{WILD}:told,seed_=3,layout=(3,4), deep=[(1,2), {{'x': 5}}]")
    assert env.episode_limit == len(str(given))
    assert build(f"{WILD}:told", seed_=3, layout=(3, 4)).episode_limit == len("{'seed': 3, 'layout': (3, 4)}")


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    quotas = {}

    def read_text(path):
        if str(path) not in quotas:
            raise FileNotFoundError(path)
        return quotas[str(path)]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert _cores() == 3
    quotas["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert _cores() == 3
    quotas["/sys/fs/cgroup/cpu.max"] = "150000 100000\n"
    assert _cores() == 2
    v1 = "/sys/fs/cgroup/cpu/cpu.cfs_{}_us"
    quotas |= {v1.format("quota"): "50000\n", v1.format("period"): "100000\n"}
    assert _cores() == 1
    quotas[v1.format("quota")] = "-1\n"
    assert _cores() == 2


# ---- where they run ----
def program(tmp_path, code, path=(), **variables):
    """What a program prints that runs in `tmp_path`, and its exit code: the server of workers is its own."""
    file = tmp_path / "program.py"
    file.write_text(code)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", *path)))
    variables = os.environ | {"PYTHONPATH": path} | variables
    command = [sys.executable, file]
    return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)


def test_nothing_depends_on_the_current_folder(tmp_path):
    """Another folder `envs` there; a module of the user's in one of that name; torch in the server."""
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").touch()
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong one')")
    mine = tmp_path / "lib" / "envs"
    mine.mkdir(parents=True)
    (mine / "my_env.py").write_text("from test_pettingzoo_wild import parallel_env")
    code = """
import sys
sys.path.remove(sys.path[0])
from multiprocessing import forkserver
from envs import make
if __name__ == "__main__":
    env = make("pettingzoo:envs.my_env")
    env.reset()
    print(env.n_agents, "torch" in open(f"/proc/{forkserver._forkserver._forkserver_pid}/maps").read())
"""
    ended = program(tmp_path, code, path=[tmp_path / "lib"])
    assert ended.stdout == "2 True\n", ended.stderr


def test_a_tmpdir_too_long_for_a_socket(tmp_path):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    code = f"from envs import make\ntry: make({WILD!r})\nexcept ValueError as error: print(error)"
    ended = program(tmp_path, code, TMPDIR=str(long))
    assert ended.stdout.startswith(f"{WILD}: no worker process starts (AF_UNIX path too long)")
    assert ended.stdout.endswith(f"; take a shorter TMPDIR than {long}\n")


def test_a_program_without_a_main_guard(tmp_path):
    ended = program(tmp_path, f"from envs import make\nmake({WILD!r})")
    assert ended.stderr.splitlines()[-1].endswith(
        f"RuntimeError: {WILD}: worker process 0 died (exit code 1) with no game built: "
        'is make() called outside of `if __name__ == "__main__":`?'
    )
