"""Siblings are equal to the byte where the algorithm is equal, so that `diff` shows the algorithm only."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAMILIES = {
    "EPISODE": ["dop_stochastic", "coma", "qmix"],
    "STEP": ["maddpg", "masql", "dop_deterministic", "maac"],
}
FILES = [name for family in FAMILIES.values() for name in family]
TEXT = {name: (ROOT / f"{name}.py").read_text() for name in FILES}
# what an evaluation plays is the algorithm's: DOP averages its actors
TEXT["dop_stochastic"] = TEXT["dop_stochastic"].replace("partial(act, average)", "partial(act, actor)")
# names that stand for another thing in each file of a family; all other names that two files share are equal
DIFFERENT = {
    "EPISODE": {"Args", "PRESETS", "FIXED", "update", "act"},
    "STEP": {"Args", "MPE", "PRESETS", "FIXED", "update", "act", "td_targets", "encode"},
}
DIFFERENT["STEP"] |= {"Actor", "Actor.forward", "Critic"}
BANNERS = "settings networks equations storage acting update run".split()
BANNERS += ["networks and storage", "loop", "close"]
# parts of main: from the first line that starts with this to the first that starts with that
EVERYWHERE_IN_MAIN = [
    ("    args = ", "        options"),  # which kind of actions an algorithm plays
    ("        env = make", "    # ---- networks and storage ----"),
    ("    if args.resume:", "    global_step, "),
    ("    log = ", "        # act, step"),
    ("        train_seconds += ", "            log.training("),  # charts of schedules
    ("        if machine.due(args.eval_every", "        progress |= "),
    ("        if machine.due(args.save_every", "END"),
]
FAMILY_IN_MAIN = {
    "EPISODE": [("        # act, step", "        # update"), ("    progress = ", "        # act, step")],
    "STEP": [("        final = ", "        done = "), ("        ended = (done", "            losses |= ")],
}
FAMILY_IN_MAIN["STEP"].append(("    progress = ", "        # act, step"))


def part(name, start, end):
    """The lines of a file from one that begins with `start` to the last before one that begins with `end`."""
    lines = TEXT[name].splitlines() + ["END"]
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    last = next(i for i, line in enumerate(lines[first + 1 :], first + 1) if line.startswith(end))
    return "\n".join(lines[first:last])


def definitions(name):
    """Name -> source of functions, classes, constants; of networks also methods, but for `__init__`."""
    text, found = TEXT[name], {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(x.lineno for x in node.decorator_list)]) - 1
            found[node.name] = "\n".join(text.splitlines()[first : node.end_lineno])
            if isinstance(node, ast.ClassDef) and node.bases:
                methods = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name != "__init__"]
                found |= {f"{node.name}.{x.name}": ast.get_source_segment(text, x) for x in methods}
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.get_source_segment(text, node)
    return found


def shared_settings(name):
    """Names, types and help of the settings that all files have; defaults are each file's own."""
    fields = part(name, "@dataclass", "    # Algorithm specific arguments")
    return re.sub(r"^(    \w+: [^=]+) = .*?(  # |$)", r"\1\2", fields, flags=re.MULTILINE)


def pairs(names):
    return list(itertools.pairwise(names))


@pytest.mark.parametrize(("one", "other"), pairs(FILES))
def test_all_files_share_their_frame(one, other):
    assert shared_settings(one) == shared_settings(other)
    for start, end in EVERYWHERE_IN_MAIN:
        assert part(one, start, end) == part(other, start, end)


@pytest.mark.parametrize(("family", "one", "other"), [(f, *p) for f, n in FAMILIES.items() for p in pairs(n)])
def test_a_family_shares_what_it_can(family, one, other):
    mine, yours = definitions(one), definitions(other)
    for name in (mine.keys() & yours.keys()) - DIFFERENT[family]:
        assert mine[name] == yours[name], name
    for start, end in FAMILY_IN_MAIN[family]:
        assert part(one, start, end) == part(other, start, end)


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_the_same_order(name):
    assert re.findall(r"^ *# ---- (.+) ----$", TEXT[name], flags=re.MULTILINE) == BANNERS
    local = re.findall(r"^(?:from|import) (?:machine|envs|tests).*$", TEXT[name], flags=re.MULTILINE)
    assert local == ["import machine", "from envs import Stream, evaluate, make"]
    # --help would take the comment above for a part of the first setting's own, which has to follow it
    assert re.search(r"    # Algorithm specific arguments\n    \w+: .*  # ", TEXT[name])


# ---- the frame must not drown the algorithm ----
# lines of the file at most, and where its first equation stands at the latest
SHORT = {"qmix": (425, 170), "coma": (470, 170), "masql": (470, 170), "maddpg": (500, 200)}
SHORT |= {"dop_deterministic": (510, 200), "maac": (545, 170), "dop_stochastic": (560, 200)}
ALGORITHM = {"networks", "equations", "storage", "acting", "update", "networks and storage"}


@pytest.mark.parametrize("name", FILES)
def test_files_are_short_and_come_to_the_point(name):
    lines, section, frame = TEXT[name].splitlines(), "top", 0
    for line in lines:
        if banner := re.fullmatch(r" *# ---- (.+) ----", line):
            section = banner[1]
        frame += section not in ALGORITHM
    first = next(n for n, line in enumerate(lines, 1) if re.match(r" +# (Eq\. \d+|Lemma \d+) of \[", line))
    assert len(lines) <= SHORT[name][0] and first <= SHORT[name][1]
    assert frame <= 200, "all of the loop counted, which acts, stores and updates too"
