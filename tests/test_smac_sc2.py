"""StarCraft II as an engine, against a stand-in (fake_sc2.py): the embedded engine's battles, all trouble."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_sc2
import pytest
import torch
from PIL import Image
from programs import EPISODE, checkpoint

import envs
from benchmark import fidelity
from envs import make
from envs.smac_sc2 import TYPES

pytest.importorskip("websocket", reason="pip install -r requirements-sc2.txt")
HERE = Path(__file__).resolve().parent
STOP, EAST, FIRST_TARGET = 1, 4, 6
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    return fake_sc2.install(tmp_path_factory.mktemp("StarCraft II"))


@pytest.fixture(scope="session")
def hall(tmp_path_factory):
    """The socket of a process that forks clients, so that they start at once."""
    path = str(tmp_path_factory.mktemp("hall") / "door")
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, fake_sc2.__file__, "hall", path]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout.readline() == b"open\n"
        yield path
        process.kill()


@pytest.fixture
def game(installed, hall, monkeypatch, tmp_path):
    """game(CRASH=3) makes trouble in clients that start from now on; temporary files are in tmp_path."""

    def trouble(**options):
        for name, value in options.items():
            monkeypatch.setenv(f"FAKE_SC2_{name}", str(value))

    monkeypatch.setenv("SC2PATH", str(installed))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trouble(LOG=tmp_path / "log", MARK=tmp_path, HALL=hall)
    yield trouble
    wait_until(lambda: not processes(tmp_path))
    assert not list(tmp_path.glob("sc2_*"))


@pytest.fixture
def build(game):
    """make() whose environments are closed after the test."""
    built = []

    def build(*args, **kwargs):
        built.append(make(*args, **kwargs))
        return built[-1]

    yield build
    for env in built:
        env.close()


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def processes(mark, word=""):
    """Process ids of workers and clients that a test has started: they inherit its mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"FAKE_SC2_MARK={mark}\0".encode() in folder.joinpath("environ").read_bytes()
            line = folder.joinpath("cmdline").read_bytes().decode()
        except OSError:  # it has just ended
            continue
        if marked and word in line and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return sorted(found)


def launches(tmp_path):
    """Of every launch: process id, port, seed, difficulty and race of the computer."""
    return [tuple(map(int, line.split())) for line in (tmp_path / "log").read_text().splitlines()]


def fight(avail_actions, generator):
    """Attack or heal whom one can, mostly; else walk east or anywhere."""
    taste = torch.rand(avail_actions.shape, generator=generator)
    taste[..., FIRST_TARGET:] += 1
    taste[..., EAST] += 0.7
    return taste.masked_fill(~avail_actions, -1).argmax(-1)


def embedded(name, games, seed):
    """The same games in the embedded engine, each with the random stream that its client has."""
    return [make(name, seed=seed + game) for game in range(games)]


def join(parts):
    return torch.cat(parts)


def assert_same(real, ours):
    """Two results of step() or tuples of features."""
    for x, y in zip(real, ours, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, **CLOSE)


def shown(env):
    return env._obs, env.state(), env.avail_actions()


def outcome(result):
    """What a step brought, as a list of tensors."""
    _, reward, terminated, truncated, info = result
    names = ("final_obs", "final_state", "final_avail_actions", "episode_return", "episode_length")
    names += ("battle_won", "dead_allies", "dead_enemies", "broken")
    return [reward, terminated, truncated, *(info[name] for name in names)]


def play_beside(real, ours, generator, steps=10**6, episodes=10**6):
    """Both engines with the same actions, equal in all that they show -> the steps that ended episodes."""
    ends = []
    for step in range(steps):
        actions = fight(real.avail_actions(), generator)
        results = real.step(actions), [env.step(actions[i : i + 1]) for i, env in enumerate(ours)]
        assert_same(outcome(results[0]), map(join, zip(*map(outcome, results[1]), strict=True)))
        assert_same(shown(real), map(join, zip(*map(shown, ours), strict=True)))
        ends += [step] * (results[0][2] | results[0][3]).sum().item()
        if len(ends) >= episodes:
            break
    return ends


# ---- battles ----
@pytest.mark.parametrize("name", envs._SMAC_MAPS)
def test_battles_equal_the_embedded_engines(name, build):
    real, ours = build(f"sc2:{name.swapcase()}", seed=5), embedded(name, 1, 5)
    assert_same([real.reset()[0]], [ours[0].reset()[0]])
    assert real.single_action_space == ours[0].single_action_space
    ends = play_beside(real, ours, torch.Generator().manual_seed(1), episodes=2)
    assert len(ends) == 2 and 0 < ends[0] < ends[1]


def test_games_have_clients_ports_and_seeds_of_their_own(build, tmp_path):
    real, ours = build("sc2:3s_vs_3z", num_envs=3, seed=7), embedded("3s_vs_3z", 3, 7)
    assert not processes(tmp_path)  # sizes are known without the game
    real.reset()
    for env in ours:
        env.reset()
    play_beside(real, ours, torch.Generator().manual_seed(1), steps=30)
    facts = launches(tmp_path)
    assert len({port for _, port, *_ in facts}) == 3
    assert sorted(fact[2:] for fact in facts) == [(7, 7, 3), (8, 7, 3), (9, 7, 3)]  # very hard, protoss
    workers = processes(tmp_path, "smac_sc2_worker")
    assert len(workers) == 3
    for worker in workers:
        assert os.getpgid(worker) == worker  # Ctrl-C does not reach it
        status = Path(f"/proc/{worker}/status").read_text()
        assert int(status.split("VmHWM:")[1].split()[0]) < 60_000, status
        assert "libtorch" not in Path(f"/proc/{worker}/maps").read_text()
    real.reset(seed=100)  # as every evaluation does
    assert len(launches(tmp_path)) == 3
    real.close()
    assert not processes(tmp_path)
    with pytest.raises(RuntimeError, match="sc2:3s_vs_3z is closed"):
        real.reset()


def test_units_reach_kernels_that_read_other_memory(build):
    real, ours = build("sc2:3m", seed=5), embedded("3m", 1, 5)
    real._memory = real._games.units.clone()  # as beside a GPU
    real._rows = real._memory.numpy().view(real._rows.dtype)[..., 0]
    real.reset(), ours[0].reset()
    assert len(play_beside(real, ours, torch.Generator().manual_seed(1), episodes=2)) == 2


def test_options_of_the_game(build, tmp_path):
    build("sc2:2s_vs_1sc,difficulty=a,seed_of_game=11,timeout=100", seed=7).reset()
    assert launches(tmp_path)[0][2:] == (11, 10, 2)  # cheats, zerg


def test_enemies_keep_the_games_own_order(build, game):
    game(REVERSED=1)
    real, ours = build("sc2:MMM", seed=2), embedded("MMM", 1, 2)[0]
    n, m, generator = real.n_agents, real.n_enemies, torch.Generator().manual_seed(3)
    medics = torch.tensor([name == "medivac" for name in ours.sim.types[:n]])

    def turn_actions(values):
        """Masks (..., N, A) with the enemies from the last to the first; a medivac's targets are agents."""
        attack = torch.cat([values[..., :FIRST_TARGET], values[..., FIRST_TARGET:].flip(-1)], -1)
        return torch.where(medics[:, None], values, attack)

    def turn(obs, state, avail_actions):
        obs, state = obs.clone(), state.clone()
        seen, avail_actions = (
            obs[..., 4 : 4 + 8 * m].unflatten(-1, (m, 8)).flip(-2),
            turn_actions(avail_actions),
        )
        seen[..., 0] = avail_actions[..., FIRST_TARGET:] & (seen[..., 1] > 0)
        obs[..., 4 : 4 + 8 * m] = seen.flatten(-2)
        rows = state[:, 7 * n : 7 * n + 6 * m].unflatten(-1, (m, 6)).flip(-2)
        state[:, 7 * n : 7 * n + 6 * m] = rows.flatten(-2)
        last = state[:, 7 * n + 6 * m :].unflatten(-1, (n, -1))
        state[:, 7 * n + 6 * m :] = turn_actions(last).flatten(-2)
        return obs, state, avail_actions

    real.reset(), ours.reset()
    ends = 0
    while ends < 2:
        assert_same(shown(real), turn(*shown(ours)))
        actions = fight(real.avail_actions(), generator)
        one_hot = torch.nn.functional.one_hot(actions, real.avail_actions().shape[-1])
        result, other = real.step(actions), ours.step(turn_actions(one_hot).argmax(-1))
        assert_same(result[1:4], other[1:4])
        ends += (result[2] | result[3]).item()


def test_life_and_reward_are_scaled_by_the_games_own_numbers(build, game):
    game(LIFE=55)  # of the first enemy, 45 elsewhere
    real, ours = build("sc2:3m", seed=2), embedded("3m", 1, 2)[0]
    real.reset(), ours.reset()
    first = 4 * 3  # where the enemies' rows begin
    assert real.state()[0, first : first + 9 : 3].tolist() == pytest.approx([45 / 100, 1, 1])
    total, expected = 0, 0
    while not total:
        actions = fight(real.avail_actions(), torch.Generator().manual_seed(3))
        total, expected = real.step(actions)[1].item(), ours.step(actions)[1].item()
    assert total == pytest.approx(expected * 365 / (365 + 55))


def test_units_may_come_late_but_must_come(build, game):
    game(LATE=7)
    real, ours = build("sc2:3m", seed=5), embedded("3m", 1, 5)
    real.reset(), ours[0].reset()
    assert len(play_beside(real, ours, torch.Generator().manual_seed(1), episodes=2)) == 2
    game(LATE=10**6)
    real = build("sc2:3m", seed=5)
    with pytest.raises(RuntimeError, match="3 times in a row sc2:3m.* a battle of 3 agents and 0 enemies$"):
        real.reset()


def test_a_worker_that_cannot_start_and_a_strange_enemy_end_the_run(build, game, monkeypatch):
    real = build("sc2:3m", seed=5)
    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen", lambda *_, **__: open("/nowhere/at/all"))
        with pytest.raises(RuntimeError, match="^sc2:3m, game 0: no worker: .*No such file"):
            real.reset()
    assert real.closed
    real = build("sc2:3m", seed=5)
    monkeypatch.delitem(TYPES, 48)
    with pytest.raises(RuntimeError, match="^sc2:3m: enemies of types .* are not this map's"):
        real.reset()
    assert real.closed


def test_a_tie_ends_the_episode_and_a_fresh_battle_follows(build, game):
    game(TIE=4)
    real = build("sc2:3m", seed=5)
    fresh, _ = real.reset()
    for step in range(1, 5):
        obs, reward, terminated, truncated, info = real.step(real.avail_actions()[..., STOP].long())
        assert terminated.item() == (step == 4) and not truncated.item()
    assert not info["battle_won"] and not info["broken"]
    assert info["dead_allies"].item() == info["dead_enemies"].item() == 3
    assert reward.item() > 3 * 10 / 18.25
    assert not info["final_obs"].any() and info["episode_length"].item() == 4
    torch.testing.assert_close(obs, fresh)  # not the battle that followed by itself, one step old
    _, reward, terminated, _, info = real.step(real.avail_actions()[..., STOP].long())
    assert not terminated and info["episode_length"].item() == 1


def test_pictures_show_the_games_units_and_shots(build):
    real, ours = build("sc2:3m", seed=5), embedded("3m", 1, 5)
    real.reset(), ours[0].reset()
    play_beside(real, ours, torch.Generator().manual_seed(1), steps=12)
    assert real.units.target[0, :3].max() >= 3
    picture, other = real.render(), ours[0].render()
    assert picture.shape == other.shape
    assert (picture != other).mean() < 0.02  # where enemies shoot is not told


def test_replays_of_all_games(build, tmp_path):
    folder = tmp_path / "replays"
    for _ in range(2):
        real = build(f"sc2:3m,save_replay={folder}", num_envs=2)
        real.reset()
        real.close()
    real = make(f"sc2:8m,save_replay={folder}")
    real.reset()
    del real  # as at the end of a program that closes nothing
    gc.collect()
    wait_until(lambda: not processes(tmp_path))
    names = sorted(path.name.rsplit("_", 1)[0] for path in folder.iterdir())
    assert names == ["3m_0", "3m_0", "3m_1", "3m_1", "8m_0"]
    assert all(path.read_bytes().startswith(b"replay of") for path in folder.glob("*.SC2Replay"))


# ---- trouble ----
def one_breaks(real, ours, step, generator):
    """Play until a game breaks, at `step` of the episode: which one it was."""
    for number in range(1, step + 1):
        before = shown(real)
        actions = real.avail_actions()[..., STOP].long()
        obs, reward, terminated, truncated, info = real.step(actions)
        whole = [env.step(actions[i : i + 1]) for i, env in enumerate(ours)]
        if number < step:
            assert not info["broken"].any()
    assert info["broken"].sum() == 1
    broken = info["broken"].nonzero().item()
    assert not terminated.any() and truncated[broken] and reward[broken] == 0
    assert not truncated[1 - broken] and not info["battle_won"].any()
    torch.testing.assert_close(info["final_obs"][broken], before[0][broken])
    torch.testing.assert_close(info["final_avail_actions"][broken], before[2][broken])
    assert info["episode_length"].tolist() == [step, step]
    torch.testing.assert_close(obs[1 - broken], whole[1 - broken][0][0])  # the other one was not disturbed
    return broken


@pytest.mark.parametrize("trouble", ["CRASH", "HANG", "END", "ERROR"])
def test_a_game_that_breaks_starts_anew(trouble, build, game, tmp_path, capfd):
    game(ONCE=tmp_path / "once", **{trouble: 4})
    timeout = 15 if trouble == "HANG" else 300
    real, ours = build("sc2:3m", num_envs=2, seed=3, timeout=timeout), embedded("3m", 2, 3)
    fresh, _ = real.reset()
    for env in ours:
        env.reset()
    broken = one_breaks(real, ours, 4, torch.Generator().manual_seed(1))
    torch.testing.assert_close(shown(real)[0][broken], fresh[broken])  # the battle begins anew
    reason = {
        "CRASH": "StarCraft II hung up: .+",
        "HANG": "StarCraft II has not answered within its timeout",
        "END": "StarCraft II answers step with an error: step { } status: ended",
        "ERROR": 'StarCraft II answers step with an error: step { } error: "out of order" status: in_game',
    }[trouble]
    told = rf"^sc2:3m, game {broken} broke; its log ends: {reason}; it starts anew\n$"
    assert re.search(told, capfd.readouterr().err, re.M)
    seeds = [fact[2] for fact in launches(tmp_path)]
    assert len(seeds) == 3 and seeds[2] not in seeds[:2]
    ours[broken] = make("3m", seed=seeds[2])
    ours[broken].reset()
    play_beside(real, ours, torch.Generator().manual_seed(1), episodes=2)


@pytest.mark.parametrize("victim", ["smac_sc2_worker", "fake_sc2"])
def test_who_kills_a_worker_or_a_game_loses_one_step(victim, build, tmp_path, capfd):
    real, ours = build("sc2:3m", num_envs=2, seed=3), embedded("3m", 2, 3)
    real.reset()
    for env in ours:
        env.reset()
    mates = processes(tmp_path)
    os.kill(processes(tmp_path, victim)[0], signal.SIGKILL)
    if victim == "fake_sc2":  # its fork in the hall, which plays, ends a moment later
        wait_until(lambda: not all(Path(f"/proc/{pid}").exists() for pid, *_ in launches(tmp_path)))
    one_breaks(real, ours, 1, torch.Generator().manual_seed(1))
    assert len(processes(tmp_path)) == len(mates) and len(set(processes(tmp_path)) & set(mates)) == 2
    assert "starts anew" in capfd.readouterr().err


def test_games_that_cannot_start_end_the_run(build, game):
    game(LAUNCH=1)
    real = build("sc2:3m", num_envs=2)
    sentence = r"3 times in a row sc2:3m, game [01] broke; its log ends: no graphics here "
    with pytest.raises(RuntimeError, match=rf"^{sentence}StarCraft II ended at once \(exit code 1\)$"):
        real.reset()
    with pytest.raises(RuntimeError, match="is closed"):
        real.reset()


def test_breaks_count_from_the_last_whole_episode(build, game, tmp_path):
    game(CRASH=90)  # an episode has at most 60 steps, so every client ends one
    real, broken = build("sc2:3m", seed=5), 0
    real.reset()
    while broken < 4:
        *_, info = real.step(real.avail_actions()[..., STOP].long())
        broken += info["broken"].item()
    assert len(launches(tmp_path)) == 5


def test_three_clients_are_tried(build, game, tmp_path):
    game(CRASH=1)
    real = build("sc2:3m", seed=5)
    real.reset()
    with pytest.raises(RuntimeError, match="3 times in a row sc2:3m, game 0 broke"):
        for _ in range(9):
            real.step(real.avail_actions()[..., STOP].long())
    assert len(launches(tmp_path)) == 3


def test_a_new_client_may_have_another_order(build, game):
    real = build("sc2:MMM", seed=2)
    real.reset()
    n, before = real.n_agents, real.sim.types
    game(REVERSED=1)
    real._workers[0].process.kill()
    *_, info = real.step(real.avail_actions()[..., STOP].long())
    assert info["broken"].all() and real.sim.types == before[:n] + before[: n - 1 : -1]


def test_clients_are_replaced_before_their_last_loop(build, game, tmp_path):
    game(LOOP=2**19 - 8 * 400 - 250)  # the longest battle may just begin
    real = build("sc2:3m", seed=5)
    real.reset()
    for n_clients in (2, 3):
        done = torch.zeros(1, dtype=torch.bool)
        while not done:
            _, _, terminated, truncated, info = real.step(real.avail_actions()[..., STOP].long())
            assert not info["broken"]
            done = terminated | truncated
        assert len(launches(tmp_path)) == n_clients
    assert len({fact[2] for fact in launches(tmp_path)}) == 3


# ---- nothing is left ----
LEARNER = """
import signal
from envs import make
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run behind &, where it is ignored
env = make("sc2:3m", num_envs=2, seed=1)
obs, _ = env.reset()
print("ready", flush=True)
while True:
    env.step(env.avail_actions()[..., 1].long())
"""


@pytest.mark.parametrize("case", ["KILL", "TERM", "INT", "everybody", "workers and learner", "in a hang"])
def test_nothing_is_left_whoever_dies(case, game, tmp_path):
    if case == "in a hang":
        game(HANG=5)
    environ = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(HERE.parent)}
    options = dict(env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    learner = subprocess.Popen([sys.executable, "-c", LEARNER], text=True, **options)
    try:
        assert learner.stdout.readline() == "ready\n"
        assert len(processes(tmp_path)) == 5
        time.sleep(1)
        victims, name = [learner.pid], signal.SIGKILL
        if case in ("TERM", "INT"):
            name = getattr(signal, f"SIG{case}")
        elif case == "everybody":
            victims = processes(tmp_path)
        elif case == "workers and learner":
            victims += processes(tmp_path, "smac_sc2_worker")
        for victim in victims:
            os.kill(victim, name)
        learner.wait(30)
        wait_until(lambda: not processes(tmp_path))
    finally:
        learner.kill()
        learner.wait()
    if case in ("everybody", "workers and learner"):  # nobody was left to clean up
        for folder in tmp_path.glob("sc2_*"):
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


# ---- sentences ----
def refuse(match, env_id="sc2:3m", **arguments):
    with pytest.raises(ValueError, match=match) as error:
        make(env_id, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["s2clientprotocol", "websocket"])
def test_a_missing_package_is_named(missing, game, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)
    packages = "pys2clientprotocol and websocket-client"
    refuse(f"^sc2:3m needs the packages {packages}: pip install -r requirements-sc2.txt$")


def test_what_is_missing_is_said(game, monkeypatch, tmp_path, installed):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SC2PATH")
    program = r"Versions/Base\*/SC2_x64"
    advice = "set it to the folder of StarCraft II, or install that as docs/envs.md says"
    refuse(f"^sc2:3m finds no {tmp_path}/StarCraftII/{program}, and SC2PATH is not set: {advice}$")
    for folder in (tmp_path / "nowhere", tmp_path):
        monkeypatch.setenv("SC2PATH", str(folder))
        refuse(f"^sc2:3m finds no {folder}/{program}, and SC2PATH is {folder}: {advice}$")
    program = tmp_path / "Versions/Base7/SC2_x64"
    program.parent.mkdir(parents=True)
    refuse(f"finds no {program}, and SC2PATH is")
    program.touch()
    refuse(rf"finds no {tmp_path}/Maps/SMAC_Maps/3m.SC2Map: unpack SMAC_Maps.zip .* in {tmp_path}/Maps$")
    monkeypatch.setattr("sys.platform", "win32")
    refuse("needs Linux or macOS")


def test_the_newest_version_is_taken(game, monkeypatch, tmp_path):
    from envs.smac_sc2 import find_game

    for name in ("Base9", "Base10", "Base8.old"):
        program = tmp_path / "Versions" / name / "SC2_x64"
        program.parent.mkdir(parents=True)
        program.touch()
    (tmp_path / "Maps/SMAC_Maps").mkdir(parents=True)
    (tmp_path / "Maps/SMAC_Maps/3m.SC2Map").touch()
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    assert find_game("3m")[0][2] == f"{tmp_path}/Versions/Base10/SC2_x64"


def test_wrong_names_and_values_are_refused(game, monkeypatch):
    refuse(r"unknown environment 'sc2:mm': did you mean .*sc2:MMM", "sc2:mm")
    refuse(r"unknown environment 'sc2:'", "sc2:")
    refuse(r"sc2:3m has no argument 'colour'; it has .*difficulty, seed_of_game, timeout", "sc2:3m,colour=1")
    for value in (0, 10, "b", "", "12"):
        refuse("difficulty must be 1 to 9 or A", difficulty=value)
    refuse("timeout must be a whole number, at least 1", timeout=0)
    refuse("seed_of_game must be a whole number, at least 0", seed_of_game=-1)
    refuse("save_replay must be an absolute folder, got 'replays'", save_replay="replays")
    refuse("save_replay can be no folder: .*Not a directory", save_replay=f"{__file__}/replays")
    first = make("sc2:3m", num_envs=2)
    monkeypatch.setattr("envs.smac_sc2.free_memory", lambda: 4 * 2**30)
    second = make("sc2:3m", num_envs=2)
    refuse(
        "5 clients of StarCraft II, .* need about 1 GB each, and 4.0 GB of memory are free: lower --num-envs"
    )
    del first, second


def test_numbers_of_games_that_a_machine_bears():
    assert envs.settings_for("SC2:mmm,difficulty=3") == {"num_envs": 8, "eval_episodes": 16}
    assert envs.settings_for("mmm") == {}
    assert not any(name.startswith("sc2") for name in envs.list_ids())


def test_embedded_environments_load_nothing_of_it():
    code = (
        "import sys, envs; envs.make('3m'); print([x for x in sys.modules if 'sc2' in x or 'websocket' in x])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


# ---- training and transfer ----
RUN = "--num-envs 2 --total-timesteps 300 --eval-every 150 --eval-episodes 2".split()


@pytest.mark.parametrize("program", EPISODE)
def test_programs_learn_in_it(run, program, game):
    code, out, folder = run(*RUN, env="sc2:3m")
    gc.collect()  # in a program of its own the evaluation's games end with it
    assert code == 0 and "greedy" in out and checkpoint(folder)["iteration"] > 0


@pytest.mark.parametrize("program", EPISODE[:1])
def test_a_run_survives_a_crash_and_is_saved_before_it_gives_up(run, program, game, tmp_path):
    game(CRASH=50, ONCE=tmp_path / "once")
    code, _, folder = run(*RUN, env="sc2:3m")
    assert code == 0 and checkpoint(folder)["global_step"] == 300
    game(CRASH=12)
    (tmp_path / "once").unlink()
    del os.environ["FAKE_SC2_ONCE"]
    code, stdout, folder = run(*RUN, "--seed", 2, env="sc2:3m")
    gc.collect()
    assert "3 times in a row sc2:3m" in code and "StarCraft II hung up" in code
    assert f"saved {folder}/model.pt" in stdout
    assert checkpoint(folder)["global_step"] > 0


@pytest.mark.parametrize("program", EPISODE[:1])
@pytest.mark.parametrize("trained, played", [("3m", "sc2:3m"), ("sc2:3m", "3m")])
def test_policies_go_from_one_engine_to_the_other(trained, played, run, play, program, game, tmp_path):
    code, _, folder = run("--num-envs", 2, "--total-timesteps", 100, "--eval-every", 0, env=trained)
    assert code == 0
    gc.collect()
    started = len(launches(tmp_path)) if (tmp_path / "log").exists() else 0
    code, out = play(folder, "--env", played, "--episodes", 2, "--video")
    gc.collect()
    names, values = (line.split(" | ") for line in out.splitlines()[-2:])
    row = dict(zip(names, values, strict=True))
    assert code == 0 and row["run"] == str(folder) and 5 < float(row["episodic_length"]) <= 60
    assert len(launches(tmp_path)) == started + 2 * played.startswith("sc2")
    with Image.open(folder / "play.gif") as video:
        assert 5 < video.n_frames <= 60 and video.size[0] == 640
    code, _ = play(folder, "--env", played.replace("3m", "8m"), "--episodes", 1)
    assert code.startswith(f"play.py: {played.replace('3m', '8m')} has the sizes ") and "\n" not in code


@pytest.mark.parametrize("name", ["3m", "2s3z", "MMM2", "2s_vs_1sc", "6h_vs_8z", "bane_vs_bane", "1c3s5z"])
def test_lives_are_read_from_the_state(name):
    env, lives = make(name, num_envs=3, seed=1), fidelity.Lives(name)
    env.reset()
    for _ in range(25):
        env.step(fight(env.avail_actions(), torch.Generator().manual_seed(2)))
    life = (env.units.hp + env.units.shield) * (env.units.hp > 0)  # (B, U)
    for side, units in enumerate([range(env.n_agents), range(env.n_agents, env.sim.n_units)]):
        shown = lives.read(env.state())[side]
        for column, kind in enumerate(lives.names[side]):
            index = [i for i in units if env.sim.types[i] == kind]
            torch.testing.assert_close(shown[..., column].sum(1), life[:, index].sum(1), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("program", EPISODE[:1])
def test_the_transfer_sheet_tells_equal_from_different(run, game, tmp_path, capsys):
    code, _, folder = run("--total-timesteps", 40, "--eval-every", 0, env="3m")
    assert code == 0
    words = ["--env", "3m", "--games", "2", "--rounds", "2", "--out", str(tmp_path / "sheet")]
    fidelity.main([*words, "--teams", "random", "nearest", "--runs", str(folder)])
    sheet = json.loads((tmp_path / "sheet.json").read_text())
    assert sheet["verdict"].startswith("equal: none of 21 measures differs")
    assert all(x["embedded"] == pytest.approx(x["sc2"], rel=1e-5) for x in sheet["results"])
    assert {x["team"] for x in sheet["results"]} == {"random", "nearest", str(folder)}
    values = {x["measure"]: x["sc2"] for x in sheet["results"] if x["team"] == "nearest"}
    assert values["length"] > 5 and 45 <= values["damage to enemy marines"] <= 3 * 45 + 1
    assert 1 <= values["hits on enemy marines"] <= 3 * values["length"]
    game(LIFE=200)
    fidelity.main([*words, "--rounds", "30", "--teams", "nearest"])
    assert "| nearest | return |" in capsys.readouterr().out
    sheet = json.loads((tmp_path / "sheet.json").read_text())
    assert "measures differ by more than 3" in sheet["verdict"]
    (off,) = [x["standard_errors"] for x in sheet["results"] if x["measure"] == "return"]
    assert off < -3


def test_broken_episodes_do_not_count(game, tmp_path):
    game(CRASH=5, ONCE=tmp_path / "once")
    real = make("sc2:3m", num_envs=2, seed=1)
    episodes = fidelity.play(real, fidelity.scripted("stop", "3m", 1), 1)
    real.close()
    assert {len(values) for values in episodes.values()} == {1}
    assert episodes["length"][0] > 5


def test_a_step_is_timed(game, tmp_path):
    fidelity.main(
        ["--speed", "--env", "3m", "--games", "2", "--steps", "5", "--out", str(tmp_path / "speed")]
    )
    report = json.loads((tmp_path / "speed.json").read_text())
    assert (
        report["steps"] == 5 and report["FAKE_SC2_LOG"] and [x["games"] for x in report["results"]] == [1, 2]
    )
    assert all(x["step of all games"] > 0 and x["learner and workers"] >= 0 for x in report["results"])
    assert "| 2 |" in (text := fidelity.section(report)) and "| stand-in, CPU ms" in text
