"""How often Python waits for the device: once per environment step and once per training iteration."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from programs import EPISODE, STEP, Troubled
from torch.utils._python_dispatch import TorchDispatchMode

from envs import make

# operators whose result or its size Python needs; others wait only where they select by a boolean mask
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "_unique2"}
WAITING |= {"unique_consecutive", "unique_dim"}
SELECTING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Counts what would make Python wait for a GPU, among the operators that run on a CPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("tolist", "cpu", "numpy", "__array__"):  # on a CPU these reach no operator
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))
        # on a CPU alone it looks at the numbers
        monkeypatch.setattr(F, "one_hot", lambda x, n: (x.unsqueeze(-1) == torch.arange(n)).long())

    def counted(self, method):
        def call(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = args[1] if name in SELECTING else []
        self.count += name in WAITING or any(x is not None and x.dtype == torch.bool for x in masks)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("waits", "work"),
    [
        (1, lambda x: x[x > 1]),
        (1, lambda x: x.index_put((x > 1,), x.new_zeros(()))),
        (1, lambda x: x.masked_select(x > 1)),
        (1, lambda x: (x > 1).nonzero()),
        (1, lambda x: bool((x > 1).any())),
        (1, lambda x: x.tolist()),
        (1, lambda x: x.cpu()),
        (2, lambda x: (float(x[0]), x[1].item())),
        (0, lambda x: x[torch.tensor([0, 2])] + F.one_hot(torch.arange(2), 2).sum()),
        (0, lambda x: (x > 1).nonzero_static(size=1)),
    ],
)
def test_the_counter_counts(monkeypatch, waits, work):
    x = torch.arange(3.0)
    with Waits(monkeypatch) as mode:
        work(x)
    assert mode.count == waits


@pytest.mark.parametrize(
    ("program", "env", "flags"),
    [(name, "toy", "") for name in EPISODE]
    + [
        ("dop_stochastic", "toy", "--tree-backup sampled --actor-gradient sampled --separate-critics"),
        ("dop_stochastic", "toy", "--tree-backup none"),
    ]
    + [(name, env, "") for name in STEP for env in ("toy", "aim") if (name, env) != ("masql", "toy")],
)
def test_one_wait_per_step_and_one_per_iteration(run, monkeypatch, program, env, flags):
    """Without evaluations, logs and checkpoints, each of which has its own."""
    seen, step = [], Troubled.step

    def spy(self, actions):
        frame = sys._getframe(1)
        while "iteration" not in frame.f_globals:  # Aim has a step of its own
            frame = frame.f_back
        seen.append((mode.count, frame.f_globals["iteration"]))
        return step(self, actions)

    monkeypatch.setattr(Troubled, "step", spy)
    monkeypatch.setattr(Troubled, "_check", lambda *_: None)  # toys look at actions, which costs a wait
    with Waits(monkeypatch) as mode:
        rare = "--eval-every 0 --log-every 1000000"
        assert run(*rare.split(), *flags.split(), env=env)[0] == 0
    steps = [(y[0] - x[0], y[1] - x[1]) for x, y in itertools.pairwise(seen)]
    assert len(steps) == 99 and max(iterations for _, iterations in steps) > 0
    assert [waits for waits, _ in steps] == [1 + iterations for _, iterations in steps]


@pytest.mark.parametrize(
    ("env_id", "waits"), {"quadratic": 0, "cdm": 0, "3m": 0, "spread": 1, "aggregation": 1, "mill": 1}.items()
)
def test_waits_of_an_environments_step(monkeypatch, env_id, waits):
    """The particles' one saves a third of their step; see envs/mpe.py."""
    env = make(env_id, num_envs=3, validate=False)
    obs, _ = env.reset()
    discrete = env.avail_actions() is not None
    actions = torch.zeros(3, *env.single_action_space.shape, dtype=torch.int64 if discrete else None)
    with Waits(monkeypatch) as mode:
        for _ in range(2 * env.episode_limit):
            env.step(actions)
    assert mode.count == waits * 2 * env.episode_limit
