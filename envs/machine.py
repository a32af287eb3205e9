"""What a long run needs of the machine: a folder of its own, whole files, memory, signals, an open output.

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

import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

_LOCKS = []  # open files, whose locks end with this process


def fail(reason):
    """Leave with an exit code, or with one sentence on stderr and exit code 1."""
    sys.exit(reason if type(reason) is int else f"{Path(sys.argv[0]).name}: {' '.join(str(reason).split())}")


class Stream(torch.Generator):
    """A random stream that is saved and restored as networks are."""

    def state_dict(self):
        return {"state": self.get_state()}

    def load_state_dict(self, state):
        if state["state"].shape == self.get_state().shape:  # else it comes from another kind of device
            self.set_state(state["state"].cpu())


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
        (folder / "args.json").write_text(json.dumps(settings, indent=2))
    except BlockingIOError:
        fail(f"another process is writing to {folder}")
    except OSError as error:
        fail(f"cannot write the run folder: {error}")
    say(f"{json.dumps(settings, indent=2)}\nrun folder {folder}")
    return folder


def _new_folder(run_dir, name):
    for attempt in itertools.count():  # runs that start in the same second have the same name
        with contextlib.suppress(FileExistsError):
            folder = Path(run_dir, f"{name}_{attempt}" if attempt else name)
            folder.mkdir(parents=True)
            return folder


def read(folder, device="meta"):
    """The checkpoint of a run folder; "meta" leaves out the numbers of its tensors."""
    path = Path(folder, "model.pt")
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
    written, as on a full disk, the former one stays.
    """
    path, new = Path(folder, "model.pt"), Path(folder, "model.pt.tmp")
    checkpoint = {"program": Path(sys.argv[0]).stem, "args": settings} | progress
    checkpoint |= {name: part.state_dict() for name, part in parts.items()}
    try:
        torch.save(checkpoint, new)
        new.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own, which does not tell the reason
        new.unlink(missing_ok=True)
        why = "no space left" if shutil.disk_usage(folder).free < 2**20 else error
        kept = f"is of step {read(folder)['global_step']}" if path.exists() else "does not exist yet"
        fail(f"cannot save: {why}; {path} {kept}")


def load(folder, parts, progress, device):
    """Put model.pt back into `parts`, of which `buffer` may be missing; returns its numbers of `progress`."""
    checkpoint = read(folder, device)
    try:
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):  # learning rates are settings, not progress
                checkpoint[name]["param_groups"] = part.state_dict()["param_groups"]
            if name != "buffer" or name in checkpoint:
                part.load_state_dict(checkpoint[name])
        progress = {name: checkpoint[name] for name in progress}
    except (KeyError, RuntimeError, ValueError) as error:
        fail(f"{folder}/model.pt does not fit: {error}")
    anew = (
        ""
        if "buffer" in parts.keys() & checkpoint.keys()
        else "; the replay fills anew, as it was not saved (--save-replay)"
    )
    say(f"resumed at step {progress['global_step']}{anew}")
    return progress


# ---- settings ----
def peek(**defaults):
    """The values of a few flags of the command line, before all of it can be read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_known_args()[0]


def settings_of(folder, program, names):
    """The settings of a run of `program`, which must be those `names`, in any order."""
    checkpoint = read(folder)
    if checkpoint["program"] != program:
        fail(f"{folder} is a run of {checkpoint['program']}.py, not of {program}.py")
    if odd := checkpoint["args"].keys() ^ names:
        fail(f"{folder} was made by another version of {program}.py: {', '.join(sorted(odd))}")
    return checkpoint["args"]


def check_numbers(settings, limits):
    """ValueError for a number out of its limits: at least 1 for integers, 0 to 1 for others, unless given."""
    for name, value in settings.items():
        low, high = limits.get(name, (1, math.inf) if type(value) is int else (0, 1))
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


# ---- the machine ----
def require_memory(n_bytes, device, advice):
    """Fail with both sizes and `advice` where `n_bytes` more do not fit: else a killer comes hours later."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if n_bytes > free:
        sizes = f"{n_bytes / 2**30:.1f} GiB of memory on {device}, where {free / 2**30:.1f} GiB are free"
        fail(f"this needs {sizes}; {advice}")


def free_memory():
    """Bytes that this process may still take: of the machine, and of the container where there is one."""
    free = []
    with contextlib.suppress(OSError, ValueError):
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, AttributeError):
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free.append(1024 * int(available[1]))
    groups = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit, which reads "max"
            statistics = (groups / limit).with_name("memory.stat").read_text()
            cached = sum(
                int(x) for x in re.findall(r"^(?:total_)?inactive_file (\d+)$", statistics, re.M)[-1:]
            )
            free.append(int((groups / limit).read_text()) - int((groups / used).read_text()) + cached)
    return max(0, min(free, default=2**62))


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
