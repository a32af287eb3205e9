"""docs/results/cdm.md: who finds the optimum of the mismatch game and who holds it, per exploration protocol.

    python benchmark/cdm.py

Reads the files cdm_<protocol>_<method>.json that run_seeds.py wrote (docs/benchmark.md has the commands and
the protocols). An evaluation returns 10 or -10. Found: 10 in at least one evaluation. Held: 10 in
each of the last five. Lost: found and not held. Never left: 10 in each evaluation after the first with 10.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import RESULTS, markdown_table, source, success_rate

METHODS = {
    "dop": "DOP", "dop_on_policy": "DOP, on-policy only", "coma": "COMA", "maddpg": "MADDPG",
    "dop_deterministic": "deterministic DOP", "maac": "MAAC", "qmix": "QMIX",
    "coma_4": "COMA, an iteration per 4 games, not 8", "maddpg_128": "MADDPG, replay of 128 steps",
}  # fmt: skip
LAST = 5  # evaluations


def outcomes(report):
    """(found, held, never left) per run."""
    for run in report["runs"]:
        optimal = [value > 9 for value in run["curves"]["eval/episodic_return"]["value"]]
        first = optimal.index(True) if any(optimal) else None
        yield any(optimal), all(optimal[-LAST:]), first is not None and all(optimal[first:])


def main(argv=None):
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("cdm_*.json"))}
    protocols = {}
    for name, report in reports.items():
        protocol, method = re.fullmatch(r"cdm_([^_]+)_(.+)", name).groups()
        protocols.setdefault(protocol, {})[method] = report
    if not protocols:
        sys.exit("cdm.py: docs/results has no cdm_<protocol>_<method>.json yet")
    parts = [
        "# The mismatch game",
        "Written by `python benchmark/cdm.py`; its docstring says what the columns mean. Rates with Wilson's "
        "95% interval.",
    ]
    for protocol, methods in protocols.items():
        env = next(iter(methods.values()))["env"]
        rows = []
        for method in (name for name in METHODS if name in methods):
            results = list(outcomes(methods[method]))
            found, held, kept = zip(*results, strict=True)
            lost = [found and not held for found, held, _ in results]
            rows.append([METHODS[method], *map(success_rate, (held, found, lost, kept))])
        picture = [f"![{protocol}](cdm_{protocol}.png)"] if (RESULTS / f"cdm_{protocol}.png").exists() else []
        table = markdown_table(["", "held", "found", "lost", "never left"], rows).strip()
        parts += [f"## {protocol}: `{env}`", table, *picture]
    parts += ["Sources:", "\n".join(source(report) for report in reports.values())]
    (RESULTS / "cdm.md").write_text("\n\n".join(parts) + "\n")
    print(f"written: {RESULTS / 'cdm.md'}")


if __name__ == "__main__":
    main()
