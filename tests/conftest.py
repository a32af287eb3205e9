"""Settings of the whole test run, and fixtures that run a program."""

import functools
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch

import envs
import machine

torch.set_num_threads(1)  # the tensors of tests are tiny: more threads only wait for each other


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests of the battle engine play: cpu or cuda")


def pytest_configure(config):
    os.environ["TEST_DEVICE"] = config.getoption("--device")  # for battles.py


@pytest.fixture
def program(request):
    """Name of the program: a test file is called after the one that it tests, or parametrises this."""
    return request.module.__name__.removeprefix("test_")


@pytest.fixture
def parse(program, monkeypatch):
    """Flags -> the settings that the program makes of them."""

    import programs  # here, so that the engine's tests need nothing but the engine

    def parse(*flags):
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *flags])
        module = programs.MODULES[program]
        return machine.parse_args(module.Args, module.PRESETS, module.FIXED, module.__doc__)

    return parse


@pytest.fixture
def run(program, script, tmp_path):
    """Run the program in this process: flags -> exit code or message, stdout, and its newest run folder.

    The flags follow those of a small run on `env`, the program's toy unless told; None: they stand alone.
    """
    import programs

    toy = programs.toy_of(program)

    def run(*flags, env=toy):
        small = [] if env is None else ["--env", env, *programs.SMALL[program].split()]
        code, out = script(program, *small, "--run-dir", tmp_path, *flags)
        folders = sorted(tmp_path.glob("*__*"), key=lambda folder: folder.stat().st_mtime)
        return code, out, folders[-1] if folders else None

    return run


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a file of the repository in this process: name and words -> exit code or message, and stdout."""
    import programs

    for name, (cls, arguments) in programs.TOYS.items():
        monkeypatch.setitem(envs._REGISTRY, name, ("programs", cls, arguments))

    def script(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup, or behind &
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 0
        try:
            runpy.run_path(str(Path(programs.__file__).parents[1] / f"{name}.py"), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        output = capsys.readouterr()
        if code == 2:  # tyro explains in a box
            code = re.sub(r"[\s─│╭╮╰╯]+|--+(?!\w)", " ", output.err + output.out)
        return code, output.out

    return script


@pytest.fixture
def play(script):
    """Run play.py: a run folder and flags -> exit code or message, and stdout."""
    return functools.partial(script, "play")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
