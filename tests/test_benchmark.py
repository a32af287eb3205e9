"""The benchmark scripts: what is run, collected, kept and drawn. Nothing here trains or times anything."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmark import common, plot, run_seeds, scripted, standins, throughput, training_speed
from benchmark import update_speed as speed
from benchmark.collect import summarise, thin
from envs import make

# stands for an algorithm: logs a little, then exits with the code that it finds in a file, or with 0
FAKE = """
import argparse, json, os, pathlib, signal, sys, time
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter
parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int)
parser.add_argument("--exp-name")
parser.add_argument("--run-dir")
parser.add_argument("--resume", type=pathlib.Path)
parser.add_argument("--code", default="")
parser.add_argument("--scale", type=float, default=1)
parser.add_argument("--gate", type=pathlib.Path)  # where it waits, after its checkpoint
parser.add_argument("--fatal", action="store_true")
args = parser.parse_args()
folder = args.resume or pathlib.Path(args.run_dir) / f"mmm__{args.exp_name}__{args.seed}__0"
writer = EventFileWriter(str(folder))
(folder / "args.json").write_text(json.dumps({"env": "mmm", "seed": args.seed}))
print("threads", os.environ["OMP_NUM_THREADS"], "in", os.getcwd(), flush=True)
for step in range(4 if args.resume else 1, 6):
    for tag, value in (("eval/win_rate", args.scale * args.seed * step / 10), ("losses/critic_loss", 1.0)):
        summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(event_pb2.Event(wall_time=time.time(), step=100 * step, summary=summary))
    if step == 3 and args.gate:
        writer.flush()
        (folder / "model.pt").write_text("3")
        while not args.gate.exists():
            time.sleep(0.1)
writer.close()
if args.fatal:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
code = pathlib.Path(args.code)
sys.exit(int(code.read_text()) if args.code and code.exists() else 0)
"""

# an algorithm that waits behind every checkpoint until there is a file, or Ctrl-C
GATED = """
import runpy, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import machine
save = machine.save
def gated(*words):
    save(*words)
    while not Path({gate!r}).exists() and signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        time.sleep(0.1)
machine.save, sys.argv[0] = gated, "coma.py"
runpy.run_path({root!r} + "/coma.py", run_name="__main__")
"""
BUSY = "Ray gave up starting, this machine is too busy"


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of Ray on this machine, with room for a run each."""
    pytest.importorskip("ray", reason="Ray is missing (requirements-benchmark.txt)")
    from ray.cluster_utils import Cluster

    # a node that is gone is noticed soon, one that is slow is not taken for it
    health = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 500}
    small = {"num_cpus": 1, "object_store_memory": 2**27, "include_log_monitor": False}
    cluster = Cluster()
    try:
        first = {"include_dashboard": False, "no_monitor": True, "_system_config": health}
        cluster.add_node(**small, **first)
        cluster.add_node(**small)
        yield cluster
    except Exception as error:
        if "timed out" not in str(error):
            raise
        pytest.skip(BUSY)
    finally:
        cluster.shutdown()


@pytest.fixture
def bench(tmp_path, monkeypatch, cluster):
    """A function that calls the runner with `more` on the fake algorithm with `extra`, on the cluster."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def call(seeds, *more, extra=(), script=script):
        places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        words = ["--name", "x", "--seeds", seeds, "--address", cluster.address, *places, *more]
        return run_seeds.main([*words, "--", "python", str(script), *extra])

    monkeypatch.setattr(run_seeds, "commit", lambda: {"commit": "abc", "dirty": False})
    call.tmp_path = tmp_path
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if run_seeds.ray.is_initialized():
        run_seeds.ray.shutdown()


def processes(text):
    """Those with a text in their command or their environment, which children inherit."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (path / "cmdline").read_bytes() + (path / "environ").read_bytes():
                yield path.name


def wait_for(condition):
    """For what another process does, some minutes at most."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)


def test_scripts_find_the_repository_before_they_import_from_it():
    own = "|".join(["benchmark", "envs", *(path.stem for path in common.ROOT.glob("*.py"))])
    for path in (common.ROOT / "benchmark").glob("*.py"):
        head, found, _ = path.read_text().partition("sys.path.insert(")
        assert not found or not re.search(rf"^(import|from) ({own})\b", head, re.MULTILINE), path


def test_a_ray_that_ends_with_another_script_is_left_alone(monkeypatch):
    pytest.importorskip("ray", reason="Ray is missing (requirements-benchmark.txt)")
    monkeypatch.setattr(run_seeds.ray, "init", lambda **_: None)
    monkeypatch.setattr(run_seeds.ray, "cluster_resources", lambda: {"CPU": 2, run_seeds.PRIVATE: 1})
    with pytest.raises(SystemExit, match="this Ray ends with another run_seeds.py; start a cluster"):
        run_seeds.start_ray(SimpleNamespace(address="auto", threads=1, gpus=0))


def test_parse_seeds():
    assert run_seeds.parse_seeds("1-3,7, 2") == [1, 2, 3, 7]
    for wrong in ("", "a", "1-", "3-1", "1-3,8-5", "1;2"):
        with pytest.raises(Exception, match="seed"):
            run_seeds.parse_seeds(wrong)


def test_summary_by_hand():
    steps = list(range(100, 1100, 100))
    win = [0.0, 0.1, 0.3, 0.95, 0.5, 0.9, 1.0, 0.8, 0.9, 0.7]
    curves = {
        "eval/win_rate": [steps, win, [50.0 + step for step in steps]],
        "eval/episodic_return": [steps, [float(step) for step in steps], steps],
        "charts/train_seconds": [[150, 350, 550], [1.0, 3.0, 9.0], [0, 0, 0]],
    }
    summary = summarise(curves, start=20.0, metric="eval/win_rate", target=0.90)
    assert summary == {
        "best": 1.0,
        "final": 0.7,
        "last_fifth": 0.8,  # of 0.9 and 0.7, at 900 and 1000: later than step 800
        "step_to_target": 400,
        "train_seconds_to_target": 4.5,  # a quarter of the way from 350 to 550
        "wall_seconds_to_target": 430.0,  # 50 + 400 - 20
        "final_return": 1000.0,
        "last_fifth_return": 950.0,
        "steps": 1000,
    }
    never = summarise(curves, 20.0, "eval/win_rate", 1.5)
    assert never["step_to_target"] is never["wall_seconds_to_target"] is None and never["best"] == 1.0
    assert set(summarise({}, 0.0, "eval/win_rate", 0.9).values()) == {None}


def test_thin_keeps_means_and_ends():
    steps, values = thin(list(range(1, 11)), [float(x) for x in range(1, 11)], max_points=4)
    assert steps == [3, 6, 9, 10] and values == [2.0, 5.0, 8.0, 10.0]
    assert thin([1, 2], [5.0, 6.0], max_points=2) == ([1, 2], [5.0, 6.0])


def test_runs_and_collects(bench, capfd):
    assert bench("1-3", "--workers", "2", "--threads", "1") == 0
    report = json.loads((bench.tmp_path / "results" / "x.json").read_text())
    assert report["seeds"] == [1, 2, 3] and report["failed"] == {} and report["env"] == "mmm"
    assert report["engine"] == "embedded simulator, Warp kernels" and report["hardware"]["threads"] == 1
    assert report["commit"] == "abc" and not report["dirty"] and "fake.py" in report["command"]
    curves = report["runs"][1]["curves"]
    assert set(curves) == {"eval/win_rate"}  # no losses unless asked for
    assert curves["eval/win_rate"]["step"] == [100, 200, 300, 400, 500]
    assert curves["eval/win_rate"]["value"] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert report["summary"]["final"] == {"median": 1.0, "n": 3, "min": 0.5, "max": 1.5}
    # seed 1 never gets to 0.9, seed 2 at 500, seed 3 at 300: the median counts seed 1 as the latest
    assert report["summary"]["step_to_target"] == {
        "median": 500,
        "n": 2,
        "min": 300,
        "max": 500,
    }  # 0.9 in single precision counts
    with open(bench.tmp_path / "results" / "x.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["final"] for row in rows] == ["0.5", "1.0", "1.5"] and rows[0]["step_to_target"] == ""
    log = (bench.tmp_path / "runs" / "x" / "seed_2" / "log.txt").read_text()
    assert "--seed 2" in log and "threads 1" in log
    assert f"in {common.ROOT}" not in log  # but in a folder of the cluster, to which the code was sent


def test_relative_runs_are_below_the_current_folder(bench, monkeypatch):
    """The runs are in another folder, that of the repository."""
    monkeypatch.chdir(bench.tmp_path)
    assert bench("1", "--runs", "here") == 0
    assert next(bench.tmp_path.glob("here/x/seed_1/mmm__x__1__0/events.*"))
    assert json.loads((bench.tmp_path / "results" / "x.json").read_text())["runs"][0]["curves"]


def test_runs_that_log_nothing_fail(bench, capfd):
    assert bench("1", "--tags", "eval/nothing") == 1
    assert "without a result: seed 1 (it logged nothing)" in capfd.readouterr().out
    assert not (bench.tmp_path / "results").exists()


def test_finished_runs_are_not_repeated(bench, capfd):
    assert bench("1") == 0
    done = bench.tmp_path / "runs" / "x" / "seed_1" / "done.json"
    before = done.stat().st_mtime_ns
    assert bench("1-2") == 0
    assert done.stat().st_mtime_ns == before
    assert "1 of 2 seeds are already finished" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="another --name"):
        bench("1-2", extra=["--scale", "2"])


def test_published_results_are_not_replaced(bench, capfd):
    """As in a fresh clone: the result files are there, the folder of the runs is not."""
    assert bench("1-2") == 0
    results = [bench.tmp_path / "results" / f"x.{kind}" for kind in ("json", "csv")]
    before, clone = [file.read_bytes() for file in results], ["--runs", str(bench.tmp_path / "clone")]
    with pytest.raises(SystemExit, match=r"x.json is of '.*fake.py'; take another --name or delete the file"):
        bench("1-2", *clone, extra=["--scale", "1"])
    with pytest.raises(SystemExit, match=r"has more seeds than --seeds asks for \(1\); .* delete the file"):
        bench("2-3", *clone)
    assert not (bench.tmp_path / "clone").exists() and [file.read_bytes() for file in results] == before
    assert bench("1-3", *clone) == 0 and json.loads(results[0].read_text())["seeds"] == [1, 2, 3]
    shutil.rmtree(bench.tmp_path / "clone" / "x" / "seed_2")
    with pytest.raises(SystemExit, match=r"x.json has seeds without a finished run folder: 2; nothing is"):
        bench("1-3", *clone, "--collect-only")
    assert bench("2", "--collect-only") == 0 and json.loads(results[0].read_text())["seeds"] == [2]
    results[0].write_text(json.dumps({"results": []}))  # of another script
    with pytest.raises(SystemExit, match="x.json is of None"):
        bench("1-3")


def test_published_results_are_extended(bench, capfd):
    """Seeds of a result file whose run folders are gone are kept as they are, beside new ones."""
    assert bench("2") == 0
    file, clone = bench.tmp_path / "results" / "x.json", ["--runs", str(bench.tmp_path / "clone"), "--extend"]
    old = json.loads(file.read_text())
    old["hardware"]["cpu"] = old["runs"][0]["cpu"] = "another"
    file.write_text(json.dumps(old | {"failed": {"3": 1, "4": 1}}))
    with pytest.raises(SystemExit, match="x.json is about --metric eval/win_rate --target 0.9"):
        bench("1", *clone, "--target", "0.5", "--collect-only")
    with pytest.raises(SystemExit, match="take another --name"):
        bench("1", *clone, extra=["--scale", "1"])
    kept = file.read_text()
    file.write_text(json.dumps(old | {"settings": old["settings"] | {"batch": 1}}))
    with pytest.raises(SystemExit, match="seed_1 has another batch than the seeds of .*x.json; nothing is"):
        bench("1", *clone)
    file.write_text(kept)
    assert bench("1,3", *clone) == 0
    assert "2 of 3 seeds are already finished" in capfd.readouterr().out
    new = json.loads(file.read_text())
    assert new["seeds"] == [1, 2, 3] and new["runs"][1] == old["runs"][0] and new["failed"] == {"4": 1}
    assert f"cpu {' and '.join(sorted({'another', new['hardware']['cpu']}))}" in common.sources(
        "", {"x": new}
    )
    assert bench("1", *clone) == 0  # nothing is left to run, also where all folders are gone
    assert bench("2", "--runs", str(bench.tmp_path / "third"), "--extend") == 0
    assert json.loads(file.read_text()) | {"date": 0} == new | {"date": 0}


def test_seeds_of_another_commit_are_named(bench, monkeypatch, capfd):
    assert bench("1-2") == 0 and bench("1-2") == 0
    assert "another commit" not in capfd.readouterr().out
    monkeypatch.setattr(run_seeds, "commit", lambda: {"commit": "def", "dirty": False})
    assert bench("1-3") == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "another commit" in line]
    folder = bench.tmp_path / "runs" / "x" / "seed_<n>"
    assert lines == [
        "finished at another commit than the present def: seed 1 (abc), seed 2 (abc); "
        f"to run one anew, remove its folder {folder}"
    ]


def test_failed_run_is_kept_and_tried_again(bench, capfd):
    code = bench.tmp_path / "code"
    code.write_text("3")
    assert bench("1", extra=["--code", str(code)]) == 1
    folder = bench.tmp_path / "runs" / "x" / "seed_1"
    assert json.loads((folder / "failed.json").read_text())["exit_code"] == 3
    assert not (folder / "done.json").exists() and not (bench.tmp_path / "results" / "x.json").exists()
    assert "FAILED with exit code 3" in capfd.readouterr().out
    code.unlink()
    assert bench("1", extra=["--code", str(code)]) == 0
    assert (folder.with_name("seed_1.old_1") / "failed.json").exists() and (folder / "done.json").exists()


def test_a_killed_machines_run_goes_on_elsewhere(bench, cluster):
    gate = bench.tmp_path / "gate"
    *_, second = cluster.worker_nodes

    def kill():
        wait_for(lambda: len([*bench.tmp_path.glob("runs/x/seed_*/*/model.pt")]) == 2)  # one on each machine
        cluster.remove_node(second, allow_graceful=False)
        wait_for(lambda: len([*processes(f"{bench.tmp_path}/fake.py")]) == 1)
        gate.touch()

    killer = threading.Thread(target=kill)
    killer.start()
    assert bench("1-2", extra=["--gate", str(gate)]) == 0
    killer.join()
    runs = json.loads((bench.tmp_path / "results" / "x.json").read_text())["runs"]
    assert sorted(run["restarts"] for run in runs) == [0, 1]
    assert all(run["curves"]["eval/win_rate"]["step"] == [100, 200, 300, 400, 500] for run in runs)
    lost = next(run["seed"] for run in runs if run["restarts"])
    log = (bench.tmp_path / "runs" / "x" / f"seed_{lost}" / "log.txt").read_text().splitlines()
    assert "--resume" not in log[0] and "--resume" in log[2]


def test_a_run_that_always_loses_its_worker_fails(bench, monkeypatch, capfd):
    monkeypatch.setattr(run_seeds, "LOSSES", 2)
    assert bench("1", extra=["--fatal"]) == 1
    assert "x, without a result: seed 1 (it lost 2 workers)" in capfd.readouterr().out
    assert (bench.tmp_path / "runs" / "x" / "seed_1.old_1").exists()  # there was no checkpoint to go on from
    wait_for(lambda: not [*processes(f"{bench.tmp_path}/fake.py")])


def test_no_room_and_no_cluster(bench, capfd):
    with pytest.raises(SystemExit, match="Ray has . cores and 0 GPUs, a run takes 1 and 0.5"):
        bench("1", "--gpus", "0.5")
    run_seeds.ray.shutdown()
    with pytest.raises(SystemExit, match="cannot use Ray at 127.0.0.1:9: .*refused"):
        bench("1", "--address", "127.0.0.1:9")
    assert not (bench.tmp_path / "runs").exists()


def test_sweep(bench, capfd):
    name, places = ["--name", "fig/x", "--sweep", "scale=1,2"], bench.tmp_path / "results" / "fig"
    assert bench("1-2", *name) == 0
    reports = [json.loads((places / f"x_scale_{scale}.json").read_text()) for scale in (1, 2)]
    assert [report["command"].split()[-2:] for report in reports] == [["--scale", "1"], ["--scale", "2"]]
    assert [report["summary"]["best"]["max"] for report in reports] == [1.0, 2.0]
    text = (places / "x_sweep.md").read_text()
    assert "| scale | seeds | best |" in text and "| 2 | 2 | 1.5 (1 to 2) |" in text
    assert text.splitlines()[-1] in capfd.readouterr().out
    assert next(bench.tmp_path.glob("runs/fig/x_scale_2/seed_1/mmm__x_scale_2__1__0"))
    assert bench("1", *name, "--sweep", "code=a,b", "--collect-only") == 1  # four sets, none of them finished


def test_interrupted_runs_save_and_go_on(bench, monkeypatch):
    """Ctrl-C on this machine, with Ray started here; then the same command on the cluster."""
    monkeypatch.undo()  # the same commit in both
    script, gate, runs = (bench.tmp_path / name for name in ("gated.py", "gate", "runs"))
    script.write_text(GATED.format(root=str(common.ROOT), gate=str(gate)))
    command = f"python {script} --env cdm --total-timesteps 120 --save-every 40 --eval-every 40".split()
    words = [sys.executable, "benchmark/run_seeds.py", "--name", "x", "--seeds", "1-2", "--runs", str(runs)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    env = os.environ | {"MARK": str(bench.tmp_path)}
    process = subprocess.Popen([*words, "--", *command], cwd=common.ROOT, env=env, process_group=0, **pipes)
    try:
        wait_for(lambda: process.poll() is not None or [*runs.glob("x/seed_1/*/model.pt")])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # a terminal tells Ray's processes too
        out, _ = process.communicate()
    finally:
        process.kill()
    if "timed out during startup" in out:
        pytest.skip(BUSY)
    assert process.returncode == 130 and "stopping 1 runs" in out
    wait_for(lambda: not [*processes(f"MARK={bench.tmp_path}")])
    folder, log = runs / "x" / "seed_1", runs / "x" / "seed_1" / "log.txt"
    assert "model.pt of step 40" in log.read_text() and not (runs / "x" / "seed_2").exists()
    assert {path.name for path in folder.glob("*.json")} == {"started.json"}
    gate.touch()
    assert bench("1-2", extra=command[2:], script=script) == 0
    assert "resumed at step 40" in log.read_text()
    report = json.loads((bench.tmp_path / "results" / "x.json").read_text())
    assert [(run["seed"], run["restarts"], run["summary"]["steps"]) for run in report["runs"]] == [
        (1, 1, 120),
        (2, 0, 120),
    ]


def test_command_line_errors(monkeypatch, capsys):
    monkeypatch.setattr(run_seeds, "ray", None)
    for words, message in (
        (["--name", "x", "--seeds", "1"], "command to repeat is missing"),
        (["--name", "a/b/c", "--seeds", "1", "--", "true"], "--name may have"),
        (["--name", "../x", "--seeds", "1", "--", "true"], "--name may have"),
        (["--name", "x", "--seeds", "1", "--sweep", "lr", "--", "true"], "is no flag with values"),
        (["--name", "x", "--seeds", "one", "--", "true"], "is no list of seeds"),
        (["--name", "x", "--seeds", "1", "--workers", "0", "--", "true"], "must be at least 1"),
        (["--name", "x", "--seeds", "1", "--", "coma.py"], "Python files need 'python' before them"),
        (["--name", "x", "--seeds", "1", "--", "./coma.py"], "'./coma.py' is no program"),
        (["--name", "x", "--seeds", "1", "--", "true"], "-m pip install -r requirements-benchmark.txt"),
    ):
        with pytest.raises(SystemExit) as error:
            run_seeds.main(words)
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_plot_writes_a_picture(tmp_path, capsys):
    pytest.importorskip("rliable", reason="pip install -r requirements-benchmark.txt")
    files = []
    for k, env in enumerate(("mmm", "mmm", "3m")):
        runs = []
        for seed in range(1, 4 - k):
            steps = list(range(0, 1000 + 100 * seed, 100))
            curve = {"step": steps, "value": [min(1.0, step / (600 + 200 * k + 50 * seed)) for step in steps]}
            clock = {"step": [0, 2000], "value": [0.0, 7200.0]}
            runs.append({"seed": seed, "curves": {"eval/win_rate": curve, "charts/train_seconds": clock}})
        files.append(tmp_path / f"set_{k}.json")
        report = {"name": f"set_{k}", "env": env, "engine": "embedded simulator", "runs": runs}
        files[-1].write_text(json.dumps(report))
    words = [str(file) for file in files]
    out = tmp_path / "pictures" / "p.png"
    assert plot.main([*words, "--out", str(out), "--hline", "0.9", "--until", "900"]) == out
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width > 800 and image.height > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100  # something is drawn
    steps, _ = plot.curves_of(json.loads(files[0].read_text()), "eval/win_rate", "minutes")[0]
    assert steps[10] == 60.0  # half of 7200 s at half of 2000 steps
    plot.main([words[0], "--out", str(tmp_path / "minutes.png"), "--x", "minutes"])
    with pytest.raises(SystemExit, match="plot.py: --out cannot be written: .*File exists"):
        plot.main([words[0], "--out", words[0] + "/p.png"])
    with pytest.raises(SystemExit, match="has no curve 'eval/nothing'"):
        plot.main([words[0], "--tag", "eval/nothing"])


def test_plot_refuses_other_files(tmp_path):
    for content, message in ((None, "No such file"), ("{", "Expecting"), ("{}", "no runs in it")):
        if content:
            (tmp_path / "x.json").write_text(content)
        with pytest.raises(SystemExit, match=f"x.json is no result file of run_seeds.py: .*{message}"):
            plot.main([str(tmp_path / "x.json")])


def test_json_survives_a_round_trip(tmp_path):
    content = {"a": [1, 2.5, None], "b": [{"c": {}, "d": []}], "e": {"f": "\"'ü"}, "g": True}
    common.write_json(tmp_path / "new" / "x.json", content)
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == content


def test_a_target_is_met_in_the_precision_of_the_curves():
    curves = {"eval/win_rate": [[100], [torch.tensor(0.9).item()], [50.0]]}  # a little less than 0.9
    assert summarise(curves, 0.0, "eval/win_rate", 0.9)["step_to_target"] == 100


def test_returns_are_those_of_evaluations_where_there_are_some():
    curves = {f"{x}/episodic_return": [[1], [value], [0.0]] for x, value in (("charts", 5.0), ("eval", 7.0))}
    assert summarise(curves, 0.0, "eval/win_rate", 0.9)["final_return"] == 7
    del curves["eval/episodic_return"]
    assert summarise(curves, 0.0, "eval/win_rate", 0.9)["last_fifth_return"] == 5


# ---- scripted teams ----
def test_scripted_layout_matches_the_observation():
    """What a script reads is where the environment puts it, with and without shields and types."""
    for name in ("MMM", "3m", "2s3z", "10m_vs_11m", "2m_vs_1z"):
        env, layout = make(name, num_envs=2), scripted.Layout(name)
        obs, _ = env.reset()
        rows = layout.enemies(obs)
        assert rows.shape == (2, env.n_agents, env.n_enemies, layout.enemy_features)
        start = 4 + layout.n_enemies * layout.enemy_features + layout.n_allies * layout.ally_features
        assert 1 <= env.obs_dim - start <= 5  # the own block is left
        life = layout.ally_life(obs)
        seen = life > 0
        assert (life[seen] == 1).all() and not seen.diagonal(dim1=1, dim2=2).any()
        assert seen.sum() == 2 * env.n_agents * (env.n_agents - 1)  # at the start everybody is near and whole


def test_scripted_targets():
    actions_of, FIRST_TARGET = scripted.actions_of, scripted.FIRST_TARGET
    STOP, NO_OP, NORTH, SOUTH, EAST, WEST = scripted.STOP, scripted.NO_OP, 2, 3, 4, 5
    layout = scripted.Layout("3m")
    assert layout.forward == EAST and scripted.Layout("2m_vs_1z").forward == NORTH
    obs, avail = torch.zeros(1, 3, 30), torch.zeros(1, 3, 9, dtype=torch.bool)
    avail[0, 0, [STOP, EAST, FIRST_TARGET, FIRST_TARGET + 2]] = True
    avail[0, 1, [STOP]] = True
    avail[0, 2, NO_OP] = True
    rows = layout.enemies(obs)
    rows[0, 0, :, 1] = torch.tensor([0.6, 0.1, 0.5])  # distance; enemy 1 is near but not in reach
    rows[0, 0, :, 4] = torch.tensor([0.2, 0.1, 0.9])  # health
    assert actions_of("nearest", obs, avail, layout, None).tolist() == [[FIRST_TARGET + 2, STOP, NO_OP]]
    assert actions_of("weakest", obs, avail, layout, None).tolist() == [[FIRST_TARGET, STOP, NO_OP]]
    assert actions_of("stop", obs, avail, layout, None).tolist() == [[STOP, STOP, NO_OP]]
    avail[0, 1, EAST] = True
    assert actions_of("nearest", obs, avail, layout, None)[0, 1] == EAST
    # kite: enemy 1 stands 0.9 east, where weakest would shoot at enemy 0, agent 1 sees nobody
    rows[0, 0, 1, 2:4] = torch.tensor([0.1, 0.0])
    avail[0, 0, [NORTH, SOUTH, WEST]] = True
    assert actions_of("kite", obs, avail, layout, None).tolist() == [[WEST, EAST, NO_OP]]
    avail[0, 0, WEST] = False
    assert actions_of("kite", obs, avail, layout, None)[0, 0] == SOUTH  # to its right, seen from the enemy
    avail[0, 0, [NORTH, SOUTH]] = False
    rows[0, 0, 1, 1] = 0.34  # 3.06 tiles
    assert actions_of("kite", obs, avail, layout, None)[0, 0] == FIRST_TARGET
    random = torch.stack([actions_of("random", obs, avail, layout, None) for _ in range(200)])
    assert set(random[:, 0, 0].tolist()) == {STOP, EAST, FIRST_TARGET, FIRST_TARGET + 2}


def test_smacs_own_team_keeps_the_closest_enemy_until_it_is_dead():
    env, target = make("3m", num_envs=2, validate=False), torch.full((2, 3), -1)
    env.reset()
    units = env.units
    units.x[:] = torch.tensor([9.0, 9, 9, 20, 22, 24])
    units.y[:] = torch.tensor([10.0, 14, 18, 18, 14, 10])
    actions, target = scripted.closest(env, target)
    assert actions.tolist() == [[6] * 3] * 2 and target.tolist() == [[0] * 3] * 2
    units.x[:, 3], units.hp[0, 3], units.hp[0, 1] = 30.0, 0.0, 0.0
    actions, target = scripted.closest(env, target)
    assert actions.tolist() == [[7, scripted.NO_OP, 7], [6, 6, 6]]


def test_gathering_agrees_with_the_rewards_of_aggregation():
    """The scripts measure all radii in one game that never ends early: the task itself has to agree."""
    arrived = scripted.gather("mixed", 300, seed=1)  # (B, R)
    env, generator = make("aggregation", num_envs=300, seed=1), torch.Generator().manual_seed(2)
    obs, _ = env.reset(seed=1)
    running, won = torch.ones(300, dtype=torch.bool), torch.full((300,), 26)
    for step in range(1, 26):
        obs, _, terminated, _, info = env.step(scripted.steer("mixed", obs, generator))
        won[running & info["battle_won"]] = step
        running &= ~terminated
    assert torch.equal(won, arrived[:, scripted.RADII.index(0.8)]) and 90 < (won < 26).sum() < 210
    assert (arrived.diff(dim=1) <= 0).all()  # a wider circle is reached no later
    greedy = scripted.gather("greedy", 300, seed=1)[:, -1]
    assert (greedy <= 25).all()


def test_pushing_by_hand():
    forces = torch.ones(3, 10, 10)
    forces[1] = 0.8
    forces[2, 1:] = 0.0
    speeds, step_won, total = scripted.push(forces)
    torch.testing.assert_close(speeds[:, :4], torch.tensor([[40, 70, 92.5, 109.375], [32, 56, 74, 87.5],
                                                            [40, 30, 22.5, 16.875]]))  # fmt: skip
    assert step_won.tolist() == [4, 6, 0] and total.tolist() == [40, 40, 3 - 10]
    _, step_won, total = scripted.push(forces, end_on_win=True)
    assert step_won.tolist() == [4, 6, 0] and total.tolist() == [4 * 3 + 10, 6 * 3 + 10, 3 - 10]


def test_scripted_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    scripted.main(["--particles", "--episodes", "200"])
    report = json.loads((tmp_path / "scripted" / "particles.json").read_text())
    assert {(x["radius"], x["team"]) for x in report["results"]["aggregation"]} == {
        (radius, team) for radius in scripted.RADII for team in ("random", "greedy", "mixed")
    }
    mill = report["results"]["mill"]
    assert [x["force"] for x in mill["constant"]] == [1.0, 0.9, 0.8, 0.7, 0.67, 0.66]
    assert mill["tolerated"] == 1 and mill["constant"][-1]["step_won"] == mill["wins"] == 0
    text = scripted.particles_section(report)
    assert (
        "| 0.66 | never | 17.0 | 17.0 |" in text and "200 episodes of uniformly random forces, 10 of" in text
    )
    monkeypatch.setattr(scripted, "RULES", ["2m_vs_1z"])
    scripted.main("--rules --games 2".split())
    report = json.loads((tmp_path / "scripted" / "rules.json").read_text())
    assert "| 2m_vs_1z | - | 0.00 |" in scripted.rules_section(report)
    scripted.main("--maps 3m --teams stop --games 2".split())
    report = json.loads((tmp_path / "scripted" / "battles.json").read_text())
    assert "| 3m | 0.00 / 0.0 / 2" in scripted.battles_section(report)


def test_a_team_that_rests_wins_where_shooting_on_the_spot_loses(monkeypatch):
    assert scripted.play("2s_vs_1sc", "rest", 4, 1)["win_rate"] >= 0.75
    monkeypatch.setattr(scripted, "RESTED", 0.0)  # back at once
    assert scripted.play("2s_vs_1sc", "rest", 4, 1)["win_rate"] == 0.0


# ---- speed: only that the scripts run and write what they say ----
def test_throughput_writes_its_file(tmp_path, capsys):
    throughput.main(
        ["--envs", "3m", "--num-envs", "4", "8", "--threads", "1", "--seconds", "0.01", "--repeats", "2"]
        + ["--out", str(tmp_path / "t")]
    )
    report = json.loads((tmp_path / "t.json").read_text())
    assert [x["num_envs"] for x in report["results"]] == [4, 8]
    turns = [x["ways"]["ours"]["turns"] for x in report["results"]]
    assert all(len(x) == 2 and min(x) > 0 for x in turns)
    assert "3m, 1 thread:\n\n| games | ours |" in throughput.section(report)


def test_throughput_table_names_the_ratios():
    ways = {"ours": 300.0, "mpe2": 200.0, "vmas": 600.0}
    ways = {name: {"steps_per_second": speed} for name, speed in ways.items()}
    results = [{"env": "2s3z", "num_envs": 4, "threads": 1, "ways": ways}]
    table = throughput.table_of(results, "2s3z", 1)
    assert "| ours / mpe2 | ours / vmas |" in table
    assert table.endswith("| 4 | 300 | 200 | 600 | 1.50 | 0.50 |\n")


def test_throughput_beside_a_peer(tmp_path, monkeypatch, capfd):
    words = "--envs aggregation mill --num-envs 2 --threads 1 --seconds 0.01 --repeats 2".split()
    words += ["--out", str(tmp_path / "t")]
    throughput.main([*words, "--peer", "mpe2"])
    report = json.loads((tmp_path / "t.json").read_text())
    assert report["peer"].startswith("simple_spread of mpe2 1.")
    assert [list(x["ways"]) for x in report["results"]] == [["ours", "mpe2"], ["ours"]]
    assert min(report["results"][0]["ways"]["mpe2"]["turns"]) > 0
    monkeypatch.setitem(throughput.PEERS, "smax", ("throughput_smax.py", "nothing", "1.0", ()))
    with pytest.raises(SystemExit, match="has no nothing, install it with: .* -m pip install nothing==1.0"):
        throughput.main([*words, "--peer", "smax"])


def test_training_speed_runs_two_trees(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    flags = "dop_stochastic.py --env cdm --total-timesteps 40 --eval-every 0".split()
    training_speed.main(["--tree", str(common.ROOT), "--", *flags])
    report = json.loads((tmp_path / "engine" / "training_speed.json").read_text())
    assert all(x["steps"] == 10 and 0 < x["step_seconds"] < x["seconds"] for x in report["results"].values())
    assert "| this commit | " in training_speed.section(report)


def test_update_speed_runs_all_ways(tmp_path, monkeypatch, capsys):
    for name, value in {"ON": 2, "OFF": 3, "T": 3, "TRANSITIONS": 20}.items():
        monkeypatch.setattr(speed, name, value)
    speed.main(["--threads", "1", "--repeats", "1", "--out", str(tmp_path / "u")])
    report = json.loads((tmp_path / "u.json").read_text())
    results = report["results"]
    assert [x["way"] for x in results[:5]] == ["default", "paper", "official stand-in", "coma.py", "qmix.py"]
    tasks = " ".join(dict.fromkeys(x["task"].split(",")[0] for x in results))
    assert all(x["seconds"] > 0 and len(x["turns"]) == 1 for x in results)
    for name in ("maddpg.py", "maac.py", "dop_deterministic.py"):
        assert name in tasks
    assert "| critic per agent faster by |" in speed.section(report)


def test_update_speed_table_divides_by_the_stand_in():
    seconds = {"default": 0.1, "paper": 0.5, "official stand-in": 1.0}
    results = [{"threads": 2, "way": way, "seconds": x} for way, x in seconds.items()]
    table = speed.table_of(results)
    assert table.endswith("| 2 | 0.1000 | 0.5000 | 1.0000 | 10.0x | 2.0x |\n")
    assert "faster by" not in speed.table_of(results[:2])
    results[0]["products_alone"] = 0.025
    table = speed.table_of(results)
    assert "| products of default alone |" in table and table.endswith("| 10.0x | 2.0x | 0.0250 |\n")


@pytest.mark.parametrize("name, discrete", [("maddpg", False), ("maddpg", True), ("maac", True)])
def test_stand_ins_learn(monkeypatch, name, discrete):
    """Action 0, or a large force, pays: what is timed beside our updates does the work of a learner."""
    monkeypatch.setattr(speed, "AGENTS", 2)
    monkeypatch.setattr(speed, "TRANSITIONS", 64)
    torch.manual_seed(0)
    batch, _ = speed.random_transitions(torch.Generator().manual_seed(0), discrete)
    good = (batch.actions == 0).float() if discrete else batch.actions.mean(2)
    ended = torch.ones_like(batch.terminated)
    update, actors = getattr(standins, name)(batch._replace(reward=good.mean(1), terminated=ended))
    for _ in range(120):
        update()
    outputs = torch.stack([actor(x) for actor, x in zip(actors, batch.obs.unbind(1), strict=True)])
    assert ((outputs.argmax(-1) == 0) if discrete else (outputs.mean(-1) > 0)).float().mean() > 0.9
