"""What runs need of the machine: folders, locks, files, memory, signals, outputs; evaluations that end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import EPISODE, LOW, MODULES, Aim, Toy, same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import machine
from envs import Stream, evaluate, make
from envs.base import NO_LIMIT
from envs.evaluation import STEPS

SETTINGS = {"env": "aim", "exp_name": "x", "seed": 1, "resume": None}


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.5)
    folders = [machine.open_folder(SETTINGS | {"run_dir": str(tmp_path)}) for _ in range(3)]
    assert [folder.name for folder in folders] == [f"aim__x__1__1000{end}" for end in ("", "_1", "_2")]
    assert all((folder / "args.json").exists() for folder in folders)


@pytest.mark.parametrize("env", ["3m ", "pettingzoo:mpe2.simple_v3,layout='a/b'", "cdm,n_agents=5", "../UP"])
def test_names_of_folders_are_valid_everywhere(tmp_path, env):
    folder = machine.open_folder(SETTINGS | {"run_dir": str(tmp_path), "env": env})
    assert folder.parent == tmp_path and re.fullmatch(r"[\w.-]+", folder.name)
    assert not re.search(r"-_|\.\.", folder.name)


def test_an_empty_run_dir_is_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / machine.open_folder(SETTINGS | {"run_dir": ""})).is_dir()


def test_out_of_memory_is_one_sentence(capsys):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")):
        machine._uncaught(type(error), error, None)
        assert capsys.readouterr().err.splitlines()[0].endswith("--num-envs or sizes of networks")
    machine._uncaught(RuntimeError, RuntimeError("a bug"), None)
    assert capsys.readouterr().err == "RuntimeError: a bug\n"


def test_runs_compute_without_denormal_numbers():
    """The optimisers' memories of vanished gradients end among them, where a CPU is slow."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush them")
    tiny = torch.full((64,), 1e-38)
    assert (tiny / 8 > 0).all()
    with machine.set_up():
        assert (tiny / 8 == 0).all()
    torch.set_flush_denormal(False)


def test_a_run_dir_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "runs").symlink_to("nowhere")
    with pytest.raises(SystemExit, match="cannot write the run folder: "):
        machine.open_folder(SETTINGS | {"run_dir": str(tmp_path / "runs")})


def test_curves_that_cannot_be_written_end_no_run(tmp_path, capsys):
    log = machine.Log(tmp_path, SimpleNamespace(total_timesteps=9, eval_every=3), 0, {})
    log.writer.add_scalar = log.writer.close = lambda *_: os.stat(tmp_path / "gone")
    for step in (1, 2):
        log.evaluation(step, 1.0, {"win_rate": 0.5})
        log.flush()
    log.close()
    assert capsys.readouterr().out.count("curves end here, as they cannot be written: ") == 1


def test_a_folder_that_is_gone_is_told_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="cannot save: .*gone/model.pt does not exist yet"):
        machine.save(tmp_path / "gone", {}, {}, {"global_step": 7})


def test_a_folder_has_one_writer(tmp_path):
    folder = machine.open_folder(SETTINGS | {"run_dir": str(tmp_path)})
    other = f"import machine; machine.open_folder({SETTINGS | {'resume': str(folder)}!r})"
    process = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
    assert process.returncode == 1 and f"another process is writing to {folder}" in process.stderr


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch, error):
    machine.save(tmp_path, {}, {}, {"global_step": 7})
    before = (tmp_path / "model.pt").read_bytes()

    def fail(checkpoint, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(SystemExit, match=rf"cannot save: .*; {tmp_path}/model.pt is of step 7"):
        machine.save(tmp_path, {}, {}, {"global_step": 8})
    assert (tmp_path / "model.pt").read_bytes() == before and not (tmp_path / "model.pt.tmp").exists()
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("", (), {"free": 0}))
    with pytest.raises(SystemExit, match="cannot save: no space left"):
        machine.save(tmp_path, {}, {}, {"global_step": 8})


@pytest.mark.parametrize("program", EPISODE)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells what is resident")
def test_a_replay_takes_memory_as_it_fills(program):
    """On the CPU: of 1 GiB for episodes, what was not played yet does not become resident."""
    env = Toy(2, "cpu", 0)
    buffer = MODULES[program].EpisodeBuffer(2**19 // env.episode_limit, env, "")
    step = {"obs": torch.zeros(2, 1024, dtype=torch.half)}
    before = resident()
    buffer.add(step, {"episode_length": torch.ones(2, dtype=torch.int64)}, ended=[])
    assert buffer.steps["obs"].nbytes > 2**30 and resident() - before < 2**27


def resident():
    """Bytes of memory that this process has at present."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_free_memory_where_nobody_tells(monkeypatch):
    """As on Windows: no sysconf; and as where /proc/meminfo lacks what it should tell."""
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(
        Path, "read_text", lambda self: "MemTotal: 8 kB\n" if self.name == "meminfo" else "max"
    )
    assert machine.free_memory() == 2**62


def test_free_memory_of_a_container(monkeypatch):
    """The limit of its group, less what it uses, of which idle pages of files are given back first."""
    texts = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 600\ninactive_file 300\n"}
    monkeypatch.setattr(Path, "read_text", lambda self: texts.get(self.name, "max"))
    assert machine.free_memory() == 400


def test_free_memory_is_less_than_what_the_machine_has():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < machine.free_memory() <= total
    machine.require_memory(2**20, torch.device("cpu"), "")
    with pytest.raises(SystemExit, match=r"this needs 1048576.0 GiB of memory on cpu, where .*; buy some"):
        machine.require_memory(2**50, torch.device("cpu"), "buy some")


def test_signals_are_caught_once_and_hangups_stay_ignored_under_nohup():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = machine.catch_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == [130] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_closed_output_ends_nothing(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        for _ in range(3):
            machine.say("x" * 100_000)
        monkeypatch.undo()


def test_streams_are_saved_and_a_state_of_another_device_is_left_alone():
    stream, other = (Stream("cpu").manual_seed(seed) for seed in (3, 4))
    state = stream.state_dict()
    drawn = torch.rand(3, generator=stream)
    other.load_state_dict({"state": torch.zeros(16, dtype=torch.uint8)})
    assert torch.equal(torch.rand(3, generator=other), torch.rand(3, generator=Stream("cpu").manual_seed(4)))
    other.load_state_dict(state)
    assert torch.equal(torch.rand(3, generator=other), drawn)


def test_a_point_of_the_charts_is_of_the_episodes_since_the_former_one(tmp_path):
    log, points = machine.Log(tmp_path, SimpleNamespace(total_timesteps=9, eval_every=3), 0, {}), []
    log.writer.add_scalar = lambda *point: points.append(point)
    for step, value in ((1, 2.0), (2, 4.0)):
        log.add(1, {"win_rate": torch.tensor([9.0, value])}, torch.tensor([1]))
        log.training(step, 0.5, {})
    log.close()
    values = {tag: [y for x, y, _ in points if x == tag] for tag, *_ in points}
    assert values["charts/win_rate"] == [2, 4] and values["charts/SPS"] == [2, 4]


def test_a_resumed_run_keeps_the_points_up_to_its_step(tmp_path):
    args = SimpleNamespace(total_timesteps=9, eval_every=3)
    log = machine.Log(tmp_path, args, 0, {})
    for step in (3, 6, 9):
        log.evaluation(step, 1.0, {"win_rate": 0.5})
    log.close()
    machine.Log(tmp_path, args, 6, {}).close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in events.Scalars("eval/win_rate")] == [3, 6]


# ---- evaluations ----
def never(env):
    """The games of an environment, without an end."""
    env.episode_limit, env.pass_time = NO_LIMIT, lambda reward, chance: (reward, torch.zeros(2).bool())
    return env


def test_an_evaluation_of_endless_games_ends():
    results = evaluate(
        never(Aim(2, "cpu", 0)), lambda obs, avail_actions, memory: (LOW.expand(2, 3, 2), memory)
    )
    assert results["episodic_length"] == STEPS


def test_an_evaluation_stops_when_told_to():
    stop = []

    def policy(obs, avail_actions, memory):
        if memory == 5:
            stop.append(130)
        return torch.ones(2, 3, dtype=torch.int64), (memory or 0) + 1

    assert evaluate(never(Toy(2, "cpu", 0)), policy, None, stop) == {}


def test_an_evaluation_counts_the_first_episode_of_each_game():
    env = Toy(64, "cpu", 0)
    results = evaluate(env, lambda obs, avail_actions, memory: (torch.ones(64, 3, dtype=torch.int64), memory))
    again = evaluate(env, lambda obs, avail_actions, memory: (torch.ones(64, 3, dtype=torch.int64), memory))
    env.reset(seed=1_000_000, options={"evaluation": True})
    running, total, length = torch.ones(64, dtype=torch.bool), torch.zeros(64), torch.zeros(64)
    while running.any():
        _, reward, terminated, truncated, _ = env.step(torch.ones(64, 3, dtype=torch.int64))
        total, length = total + reward * running, length + running
        running = running & ~(terminated | truncated)
    expected = {"episodic_return": total.mean().item(), "episodic_length": length.mean().item()}
    assert results == again and {name: results[name] for name in expected} == pytest.approx(expected)
    assert 0 < results["win_rate"] < 1


# ---- environments ----
@pytest.mark.parametrize(
    "env_id",
    [
        "quadratic",
        "spread",
        "aggregation",
        "mill,discrete=True",
        "cdm,guided_share=0.5,guided_steps=80",
        "3m",
    ],
)
def test_games_go_on_where_others_were(env_id, tmp_path):
    def draw():
        if env.n_actions:
            return env.avail_actions().float().flatten(0, 1).multinomial(1).view(4, -1)
        return torch.rand(4, *env.single_action_space.shape) * 2 - 1

    torch.manual_seed(0)
    env, other = (make(env_id, 4, seed=seed) for seed in (3, 4))
    env.reset(), other.reset()
    for _ in range(13):
        env.step(draw())
    torch.save(env.state_dict(), tmp_path / "games.pt")
    other.load_state_dict(torch.load(tmp_path / "games.pt", weights_only=True))
    assert torch.equal(env.obs(), other.obs())
    for _ in range(40):
        actions = draw()
        one, two = env.step(actions), other.step(actions)
        assert all(map(torch.equal, one[:4], two[:4])) and torch.equal(env.state(), other.state())
        assert same(one[4], two[4])


def test_games_of_other_sizes_are_no_place_to_go_on_from():
    state = make("cdm,n_agents=5").state_dict()
    with pytest.raises(ValueError, match=r"sizes are \{'n_agents': 10, .* those of the run \{'n_agents': 5"):
        make("cdm").load_state_dict(state)
    with pytest.raises(ValueError, match="3 games cannot go on where 1 were"):
        make("cdm,n_agents=5", 3).load_state_dict(state)


def test_make_refuses_what_the_caller_cannot_play():
    for env_id, other in (("quadratic", "discrete"), ("cdm", "continuous")):
        make(env_id, actions={"discrete": "continuous", "continuous": "discrete"}[other])
        with pytest.raises(ValueError, match=rf"{env_id} has \w+ actions; this algorithm needs {other} ones"):
            make(env_id, actions=other)


def test_a_game_that_breaks_in_an_evaluation_ends_the_run_as_in_a_step():
    def policy(*_):
        raise RuntimeError("game 1, step 7: it broke")

    env, stop = make("cdm", num_envs=2), []
    assert evaluate(env, policy, stop=stop) == {} and str(stop[0]) == "game 1, step 7: it broke"
    with pytest.raises(RuntimeError, match="it broke"):  # where nobody would look into a list
        evaluate(env, policy)


def test_a_gif_that_cannot_be_written_ends_the_run_as_a_game_that_breaks(tmp_path):
    env, stop = Toy(2, "cpu", 0), []
    video, policy = tmp_path / "gone" / "1.gif", lambda *_: (torch.ones(2, 3, dtype=torch.int64), None)
    assert evaluate(env, policy, video, stop) == {} and isinstance(stop[0], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        evaluate(env, policy, video)
