"""The first start on a machine, which compiles the kernels, the next one, and machines that make it hard."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warp as wp

from envs import smac

STEP = """
import torch
import envs
env = envs.make("3m", num_envs=2)
env.reset()
env.step(torch.ones(2, 3, dtype=torch.int64))
"""


def start(folder):
    """A process that plays a step with its kernel cache in `folder` -> stdout, and the lines of stderr."""
    environ = os.environ | {"WARP_CACHE_PATH": str(folder)}
    root = Path(__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", STEP], cwd=root, env=environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr.splitlines()


def test_only_the_first_start_compiles_and_says_so(tmp_path):
    stdout, lines = start(tmp_path / "cache")
    assert stdout == "" and len(lines) == 1
    assert "compiling the battle engine for cpu" in lines[0] and lines[0].endswith(" s")
    assert start(tmp_path / "cache") == ("", [])  # no greetings of Warp's, no warning of a missing GPU


def test_a_cache_folder_that_cannot_be_written_costs_a_line(tmp_path):
    (tmp_path / "cache").write_text("a file, since root may write into any folder")
    stdout, lines = start(tmp_path / "cache")
    assert stdout == ""
    assert len(lines) == 1 and "in every run until WARP_CACHE_PATH is a folder" in lines[0]
    assert "compiling the battle engine" in lines[0] and str(tmp_path) in lines[0]


def test_a_gpu_that_warp_cannot_use_is_an_error(monkeypatch):
    monkeypatch.setattr(wp, "is_cuda_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    smac.start_warp.cache_clear()
    with pytest.raises(RuntimeError, match="Warp cannot use this machine's CUDA driver"):
        smac.Smac("3m", 2, "cuda", 0)
    smac.start_warp.cache_clear()
