"""Every program on every kind of environment that it takes: a few updates, then an evaluation of the run."""

import re
import runpy
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EPISODE = "--num-envs 4 --total-timesteps 240 --eval-every 120 --eval-episodes 3 --log-every 40".split()
STEP = "--num-envs 2 --total-timesteps 40 --eval-every 20 --eval-episodes 3 --warmup-steps 10".split()
STEP += "--update-every 10 --batch-size 6 --buffer-size 30 --hidden-dim 8".split()
SMALL = {
    "dop_stochastic": "--off-policy-size 9 --off-policy-batch 4 --on-policy-size 8 --on-policy-batch 2",
    "coma": "--batch-size 2",
    "qmix": "--buffer-size 30 --batch-size 4",
    "maddpg": "",
    "dop_deterministic": "",
    "masql": "--particles 4",
    "maac": "--critic-dim 8",
}
STEPPING = ("maddpg", "dop_deterministic", "masql", "maac")
DISCRETE = ["3m", "cdm,guided_share=0.5,guided_steps=20", "cdm,first_action=0.8,n_agents=3"]
DISCRETE += ["spread,discrete=True", "aggregation,discrete=True", "mill,discrete=True"]
CONTINUOUS = ["quadratic", "spread", "aggregation", "mill"]
CASES = [(name, env) for name in SMALL if name != "masql" for env in DISCRETE]
CASES += [(name, env) for name in STEPPING for env in CONTINUOUS]


def call(name, flags, monkeypatch, capsys):
    """Exit code, or message, and the output of a program in this process."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    try:
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, handler)
    return leaving.value.code, capsys.readouterr().out


@pytest.mark.parametrize(("name", "env"), CASES)
def test_runs_and_evaluates(name, env, monkeypatch, capsys, tmp_path):
    flags = [*(STEP if name in STEPPING else EPISODE), *SMALL[name].split()]
    code, out = call(name, ["--env", env, *flags, "--run-dir", str(tmp_path)], monkeypatch, capsys)
    assert code == 0 and len(re.findall(r"step \d+, .*greedy episodic_return", out)) == 2
    run = re.search(r"run folder (.+)", out)[1]
    code, out = call(name, ["--evaluate", run], monkeypatch, capsys)
    assert code is None and "episodic_return" in out


@pytest.mark.parametrize(
    ("name", "env", "message"),
    [
        ("masql", "3m", "discrete actions; this algorithm needs continuous ones"),
        ("coma", "quadratic", "continuous actions; this algorithm needs discrete ones"),
        ("qmix", "mill", "continuous actions; this algorithm needs discrete ones"),
        ("dop_stochastic", "spread", "continuous actions; this algorithm needs discrete ones"),
        ("maddpg", "quadratic,hight=1", "quadratic has no argument 'hight'; it has validate,"),
        ("maddpg", "aggregations", "did you mean aggregation"),
    ],
)
def test_wrong_environments_get_a_sentence(name, env, message, monkeypatch, capsys, tmp_path):
    code, _ = call(name, ["--env", env, "--run-dir", str(tmp_path)], monkeypatch, capsys)
    assert message in code and code.startswith(f"{name}.py: ") and not list(tmp_path.iterdir())
