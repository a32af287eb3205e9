"""What a long run needs besides games: settings, a folder of its own, whole files, memory, signals, curves.

Nothing here knows what is learnt. What goes wrong ends the program with one sentence.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from envs import free_memory, settings_for

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

_LOCKS = []  # open files, whose locks end with this process


def fail(reason):
    """Leave with an exit code, or with one sentence on stderr and exit code 1."""
    sys.exit(reason if type(reason) is int else f"{Path(sys.argv[0]).name}: {' '.join(str(reason).split())}")


@contextlib.contextmanager
def set_up():
    """What a wrong setting breaks within ends the program with one sentence, and so does Ctrl-C."""
    # TF32 on a GPU, for matrix products and recurrent layers alike: faster, and three digits are enough here
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.fp32_precision = "tf32"
    # on a CPU nothing below 1e-38, where the optimisers' memories of vanished gradients end: it is slow there
    torch.set_flush_denormal(True)
    sys.excepthook = _uncaught
    try:
        yield
    except (RuntimeError, ValueError) as error:
        fail(error)
    except KeyboardInterrupt:
        say("stopped before the first step: there is nothing to save")
        fail(130)


def _uncaught(kind, error, trace):
    """An error that ends the program: one sentence where memory ran out, else where it was."""
    if issubclass(kind, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        name = Path(sys.argv[0]).name
        print(f"{name}: out of memory; lower --batch-size, --num-envs or sizes of networks", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def seeds(seed, n):
    """n numbers from one, for random streams of their own; 31 bits, as some games take no more."""
    return (np.random.SeedSequence(seed).generate_state(n) // 2).tolist()


# ---- run folders ----
def open_folder(settings):
    """The run folder, new or `settings["resume"]`, with args.json in it; no other process writes to it."""
    parts = settings["env"].lower(), settings["exp_name"], settings["seed"], int(time.time())
    name = "__".join(re.sub(r"[^\w.-]+", "-", str(part)).strip("-.") for part in parts)
    try:
        resumed = settings["resume"] and Path(settings["resume"])
        folder = resumed or _new_folder(settings["run_dir"], name)
        _LOCKS.append(open(folder / ".lock", "w"))
        if fcntl:
            fcntl.lockf(_LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "args.json.tmp").write_text(json.dumps(settings, indent=2))
        (folder / "args.json.tmp").replace(folder / "args.json")
    except BlockingIOError:
        fail(f"another process is writing to {folder}")
    except OSError as error:
        fail(f"cannot write the run folder: {error}")
    say(f"{json.dumps(settings, indent=2)}\nrun folder {folder}")
    return folder


def _new_folder(run_dir, name):
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count():  # runs that start in the same second have the same name
        with contextlib.suppress(FileExistsError):
            folder = Path(run_dir, f"{name}_{attempt}" if attempt else name)
            folder.mkdir()
            return folder


def read(folder, device="meta"):
    """The checkpoint of a run folder; "meta" leaves out the numbers of its tensors."""
    path = Path(folder, "model.pt")
    if Path(folder).is_file():
        fail(f"{folder} is a file: give the run folder, {Path(folder).parent}")
    if not path.exists():
        fail(f"{folder} has no model.pt: it is no run folder, or its run ended before the first checkpoint")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        checkpoint["program"], checkpoint["global_step"]
    except Exception as error:  # a broken file may fail anywhere in the unpickler
        fail(f"{path} is broken or was not made by this version ({type(error).__name__})")
    return checkpoint


def save(folder, settings, parts, progress):
    """Write model.pt under another name, then rename it: no crash leaves half a checkpoint.

    It holds the program's name, its settings and progress, and the state of every part. Where it cannot be
    written, as on a full disk, or the latest losses are no numbers, the former one stays.
    """
    path, new = Path(folder, "model.pt"), Path(folder, "model.pt.tmp")
    for name, value in progress.get("losses", {}).items():
        if not math.isfinite(value):
            fail(f"{name} is {value:g}, so nothing is saved; {_of_step(path)}")
    checkpoint = {"program": Path(sys.argv[0]).stem, "args": settings} | progress
    checkpoint |= {name: part.state_dict() for name, part in parts.items()}
    try:
        torch.save(checkpoint, new)
        new.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own, which does not tell the reason
        new.unlink(missing_ok=True)
        full = Path(folder).exists() and shutil.disk_usage(folder).free < 2**20
        why = "no space left" if full else error
        fail(f"cannot save: {why}; {_of_step(path)}")


def _of_step(path):
    if not path.exists():
        return f"{path} does not exist yet"
    return f"{path} is of step {read(path.parent)['global_step']}"


def load(folder, parts, progress, device):
    """Put model.pt back into `parts`, of which `buffer` may be missing; returns its numbers of `progress`."""
    checkpoint = read(folder, device)
    try:
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):  # learning rates are settings, not progress
                checkpoint[name]["param_groups"] = part.state_dict()["param_groups"]
            if name != "buffer" or name in checkpoint:
                part.load_state_dict(checkpoint[name])
        progress = {name: checkpoint.get(name, value) for name, value in progress.items()}
    except (KeyError, RuntimeError, ValueError) as error:
        fail(f"{folder}/model.pt does not fit: {error}")
    saved = "buffer" in parts.keys() & checkpoint.keys()
    anew = "" if saved else "; the replay fills anew (--save-replay keeps it)"
    say(f"resumed at step {progress['global_step']}{anew}")
    return progress


# ---- settings ----
def parse_args(Args, presets, fixed, description):
    """The program's settings: flags over `presets` over defaults, or over the settings of a run to resume.

    `presets`: environment id or choice of --setting, which wins -> what differs from the defaults of `Args`;
    `fixed`: names of what cannot change in a resumed run.
    """
    import tyro  # here, as `import envs` shall stay fast

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("env", "setting", "resume"):  # they decide the defaults of all others
        default = getattr(Args, name, None)
        parser.add_argument(f"--{name}", nargs="?", default=default, const=default)  # tyro misses a value
    first = parser.parse_known_args()[0]
    env_id = first.env.lower().split(",")[0].strip().removeprefix("sc2:")
    settings = settings_for(first.env) | presets.get(env_id, {}) | presets.get(first.setting, {})
    if first.resume is not None:
        settings = settings_of(first.resume, Path(sys.argv[0]).stem, Args.__annotations__)
    which = f"--resume {first.resume}" if first.resume else f"--env {first.env}"
    which += f" --setting {first.setting}" if first.setting not in (None, "default") else ""
    shown = f"The defaults shown are those of {which}."
    args = tyro.cli(Args, default=Args(**settings), description=f"{description}\n{shown}")
    if args.capture_video and not args.eval_every:
        fail("--capture-video saves games of evaluations, which --eval-every 0 leaves out")
    check_resumed(vars(args), fixed)
    return args


def settings_of(folder, program, names):
    """The settings of a run of `program`, which must be those `names`, in any order."""
    checkpoint = read(folder)
    if checkpoint["program"] != program:
        fail(f"{folder} is a run of {checkpoint['program']}.py, not of {program}.py")
    if odd := checkpoint["args"].keys() ^ names:
        fail(f"{folder} was made by another version of {program}.py: {', '.join(sorted(odd))}")
    return checkpoint["args"]


def check_numbers(settings, **least):
    """ValueError for integers below 1 and other numbers out of 0 to 1; by name, for those below `least`."""
    least = dict(seed=0, eval_every=0, save_every=0) | least
    for name, value in settings.items():
        low, high = (1, math.inf) if type(value) is int else (0, 1)
        if name in least:
            low, high = least[name], math.inf
        if type(value) in (int, float) and not (low <= value <= high and math.isfinite(value)):
            wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, got {value}")


def check_resumed(settings, fixed):
    """Fail where a run is to be resumed with other values of the `fixed` settings, or is done already."""
    if not (folder := settings["resume"]):
        return
    checkpoint = read(folder)
    for name in fixed:
        old, new = checkpoint["args"][name], settings[name]
        if str(old).lower() != str(new).lower():
            fail(f"{folder} has the {name} {old}, which cannot become {new}")
    if (step := checkpoint["global_step"]) >= settings["total_timesteps"]:
        fail(f"{folder} is at step {step} already; raise --total-timesteps to go on")


# ---- logging ----
def due(every, step, num_envs, last=False):
    """Whether an interval of `every` steps (0: never) ended within the latest `num_envs`, or the run does."""
    return every > 0 and (step % every < num_envs or last)


class Log:
    """What a run tells: curves in TensorBoard, a progress bar and, where nothing else prints, lines.

    NaN or infinity in a curve ends the run, before it would be saved. Curves that cannot be written, as on a
    full disk, end with a sentence, and the run goes on.
    """

    def __init__(self, folder, args, step, recent):
        from torch.utils.tensorboard import SummaryWriter  # here, as it takes seconds to load

        self.writer = None
        try:
            self.writer = SummaryWriter(folder, purge_step=step + 1)
        except OSError as error:
            say(f"no curves, as they cannot be written: {error}")
        self.bar = tqdm(total=args.total_timesteps, initial=step, disable=None)  # None: without a terminal
        self.prints = self.bar.disable and not args.eval_every
        self.recent = recent  # name -> of episodes that ended since the last point of charts, list of (E,)

    def add(self, num_envs, episode, ended):
        """Count a step of `num_envs` games, which ended the episodes of the games `ended` (E,)."""
        self.bar.update(num_envs)
        if len(ended):
            for name, values in episode.items():  # (B,)
                self.recent.setdefault(name, []).append(values[ended])

    def training(self, step, seconds, losses, **charts):
        """A point of all losses and charts: means over the recent episodes, speed, and those of `charts`."""
        numbers = torch.stack([*losses.values()]).tolist() if losses else ()  # all in one wait
        means = {name: torch.cat(x).double().mean().item() for name, x in self.recent.items()}
        charts = means | {"SPS": step / seconds} | charts
        self._write(step, "losses", dict(zip(losses, numbers, strict=True)))
        self._write(step, "charts", charts | {"train_seconds": seconds})
        self.bar.set_postfix(charts)
        if self.prints:
            say(f"step {step}, {_line(charts)}")
        self.recent.clear()

    def evaluation(self, step, seconds, results):
        """A point and a line of what an evaluation gave; nothing after Ctrl-C."""
        if results:
            self._write(step, "eval", results)
            say(f"step {step}, {step / seconds:.0f} steps/s, greedy {_line(results)}")

    def _write(self, step, group, numbers):
        for name, value in numbers.items():
            if not math.isfinite(value):
                self._curves("close")
                fail(f"{name} is {value} at step {step}; model.pt, if there, is from before")
            self._curves("add_scalar", f"{group}/{name}", value, step)

    def _curves(self, method, *values):
        try:
            if self.writer:
                getattr(self.writer, method)(*values)
        except OSError as error:
            self.writer = None
            say(f"curves end here, as they cannot be written: {error}")

    def flush(self):
        """Put down what was written so far."""
        self._curves("flush")

    def close(self):
        """End the bar and the curves."""
        self.bar.close()
        self._curves("close")


def _line(numbers):
    return ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())


# ---- the machine ----
def require_memory(n_bytes, device, advice):
    """Fail with both sizes and `advice` where `n_bytes` more do not fit: else a killer comes hours later."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if n_bytes > free:
        sizes = f"{n_bytes / 2**30:.1f} GiB of memory on {device}, where {free / 2**30:.1f} GiB are free"
        fail(f"this needs {sizes}; {advice}")


def catch_signals():
    """A list that Ctrl-C, kill or a closed terminal puts exit code 130 into; the second one ends at once."""
    stop = []

    def catch(number, _):
        stop.append(130)
        signal.signal(number, signal.SIG_DFL)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # as nohup asks
            signal.signal(number, catch)
    return stop


def say(text):
    """Print above the progress bar; an output that is gone, as of `| head`, ends no run."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
