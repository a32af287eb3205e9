"""Learning tests: minutes each, so marked slow. Run them with `python -m pytest -m slow`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_stochastic_dop_learns_to_win_mmm(tmp_path):
    flags = "--env mmm --total-timesteps 160000 --eval-every 20000 --seed 6".split()
    command = [sys.executable, str(ROOT / "dop_stochastic.py"), *flags, "--run-dir", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    win_rates = [float(x) for x in re.findall(r"win_rate (\d\.\d+)", out)]
    assert len(win_rates) == 8 and max(win_rates) >= 0.9  # random and idle teams never win
