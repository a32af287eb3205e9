"""Learning tests: minutes each, so marked slow. Run them with `python -m pytest -m slow`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def output(command, folder):
    """What `python <command>` prints, run in a folder of its own, with one thread, as the recorded runs."""
    name, *flags = command.split()
    words = [sys.executable, str(ROOT / name), *flags, "--run-dir", str(folder)]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=one, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_stochastic_dop_learns_to_win_mmm(tmp_path):
    out = output("dop_stochastic.py --env mmm --total-timesteps 300000", tmp_path)
    win_rates = [float(x) for x in re.findall(r"win_rate (\d\.\d+)", out)]
    assert len(win_rates) == 15 and min(win_rates[-5:]) >= 0.9  # random and idle teams never win


@pytest.mark.slow
def test_masql_finds_the_better_optimum_and_maddpg_the_other(tmp_path):
    for name, low, high in (("masql.py", 900, 1000), ("maddpg.py", -100, 0)):
        out = output(f"{name} --env quadratic", tmp_path)
        assert low < float(re.findall(r"episodic_return (-?\d+\.\d+)", out)[-1]) <= high


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "dop_stochastic.py --env 3m",
        "coma.py --env mmm --total-timesteps 500000",
        "qmix.py --env mmm --total-timesteps 300000",
    ],
)
def test_learns_to_win(command, tmp_path):
    name, flags = command.split(maxsplit=1)
    out = output(f"{name} --total-timesteps 200000 --eval-every 10000 {flags}", tmp_path)
    win_rates = [float(x) for x in re.findall(r"win_rate (\d\.\d+)", out)]
    assert max(win_rates) >= 0.9  # random and idle teams never win


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dop_deterministic.py", "maddpg.py", "maac.py"])
def test_learns_to_turn_the_mill(name, tmp_path):
    out = output(f"{name} --env mill", tmp_path)
    assert float(re.findall(r"win_rate (\d\.\d+)", out)[-1]) >= 0.95  # random teams never win


@pytest.mark.slow
def test_deterministic_dop_learns_to_meet(tmp_path):
    out = output("dop_deterministic.py --env aggregation", tmp_path)
    assert float(re.findall(r"win_rate (\d\.\d+)", out)[-1]) >= 0.95  # random teams: 0.02
