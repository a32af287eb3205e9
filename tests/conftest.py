"""Settings of the whole test run, and fixtures that run a program."""

import os
import runpy
import signal
import sys

import pytest
import torch

import envs

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
        return programs.MODULES[program].parse_args()

    return parse


@pytest.fixture
def run(program, monkeypatch, tmp_path, capsys):
    """Run the program in this process: flags -> exit code or message, stdout, and its newest run folder.

    The flags follow those of a small run on `env`, the program's toy unless told; None: they stand alone.
    """
    import programs

    for name, (cls, arguments) in programs.TOYS.items():
        monkeypatch.setitem(envs._REGISTRY, name, ("programs", cls, arguments))

    toy = programs.toy_of(program)

    def run(*flags, env=toy):
        small = [] if env is None else ["--env", env, *programs.SMALL[program].split()]
        argv = [f"{program}.py", *small, "--run-dir", tmp_path, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as leaving:
                runpy.run_path(programs.MODULES[program].__file__, run_name="__main__")
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
        folders = sorted(tmp_path.glob("*__*"), key=lambda folder: folder.stat().st_mtime)
        return leaving.value.code, capsys.readouterr().out, folders[-1] if folders else None

    return run


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
