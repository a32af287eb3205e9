"""docs/results/diffs/README.md: how many lines two algorithm files share, and how many each has alone.

python benchmark/diffs.py
"""

import difflib
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import ROOT, markdown_table, no_arguments, write_page

CLAIM = "Ours: files of one family differ in the algorithm, and share the frame line by line."
FAMILIES = {
    "whole episodes": ["dop_stochastic.py", "coma.py", "qmix.py"],
    "single steps": ["maddpg.py", "dop_deterministic.py", "maac.py", "masql.py"],
}


def row(one, other):
    """The command, the lines that only the first or only the second file has, and the lines of both."""
    texts = [(ROOT / name).read_text().splitlines() for name in (one, other)]
    matcher = difflib.SequenceMatcher(None, *texts, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    return [f"`diff {one} {other}`", len(texts[0]) - same, len(texts[1]) - same, same]


def main(argv=None):
    no_arguments(__doc__, argv)
    parts, shared = [], []
    for family, names in FAMILIES.items():
        rows = [row(one, other) for one, other in itertools.combinations(names, 2)]
        shared += [cells[-1] for cells in rows]
        lengths = ", ".join(f"{name} {len((ROOT / name).read_text().splitlines())} lines" for name in names)
        table = markdown_table(["", "only in the first", "only in the second", "in both"], rows)
        parts += [f"Learning from {family}: {lengths}.", table]
    parts.append(
        "Counted by Python's difflib in the files of this commit; `diff` may count a few lines otherwise."
    )
    parts.append("Written by `python benchmark/diffs.py`.")
    answer = f"Two files of a family have {min(shared)} to {max(shared)} lines in common."
    write_page("diffs", "What the diff of two files shows", CLAIM, answer, *parts)


if __name__ == "__main__":
    main()
