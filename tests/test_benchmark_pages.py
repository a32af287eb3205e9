"""The pages of docs/results, written from made-up files: claim, answer, tables, index."""

import json

import pytest
from PIL import Image

from benchmark import cdm, common, default, diffs, quadratic, report, sequential, settings, smac, stats

pytest.importorskip("rliable", reason="pip install -r requirements-benchmark.txt")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results, and few bootstrap samples."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(stats, "REPS", 50)
    return tmp_path


def write_set(folder, name, *runs, env="3m", engine=common.ENGINE, **more):
    """A file as run_seeds.py writes it; a run is {tag: (steps, values)}."""
    curves = [{tag: {"step": x, "value": y} for tag, (x, y) in run.items()} for run in runs]
    steps = [max(x[-1] for x, _ in run.values()) for run in runs]
    entries = [
        {"seed": i + 1, "commit": "abc", "wall_seconds": 20.0 + i, "curves": x} for i, x in enumerate(curves)
    ]
    for entry, step in zip(entries, steps, strict=True):
        entry["summary"] = {"steps": step, "last_fifth_return": 12.34}
    facts = dict(name=f"{folder.name}/{name}", command=f"python {name}", env=env, engine=engine, date="today")
    facts |= dict(metric="eval/win_rate", target=0.9)
    facts |= dict(
        workers=2,
        hardware={"cpu": "x", "threads": 1},
        seeds=list(range(1, len(runs) + 1)),
        failed={},
        runs=entries,
    )
    facts |= {"summary": {"steps": {"min": min(steps)}}}
    common.write_json(folder / f"{name}.json", facts | more)


# ---- common.py ----
def test_seeds_in_short():
    assert common.ranges([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10"


def test_commands_of_sets(results):
    write_set(results / "fig1", "a", {"eval/win_rate": ([1], [0.5])})
    write_set(results / "fig1", "b", {"eval/win_rate": ([1], [0.5])}, metric="eval/episodic_return", target=9)
    common.write_json(results / "fig1" / "credit.json", {"checkpoints": []})  # of another script
    sets = common.load_sets("fig1")
    assert list(sets) == ["a", "b"]
    text = common.sources("fig1", sets)
    assert (
        "- `python benchmark/run_seeds.py --name fig1/a --seeds 1 --workers 2 -- python a`: commit abc"
        in text
    )
    assert "--name fig1/b --seeds 1 --metric eval/episodic_return --target 9 --workers 2 -- python b`" in text


# ---- smac.py ----
def smac_run(*values, exploring=None):
    """An evaluation per 1000 steps."""
    steps = [1000 * (i + 1) for i in range(len(values))]
    run = {"eval/win_rate": (steps, list(values))}
    return run | ({"charts/win_rate": (steps, [exploring] * len(steps))} if exploring is not None else {})


def test_smac_cuts_curves_to_equal_steps(results, capsys):
    with pytest.raises(SystemExit, match="no <method>_<map>.json"):
        smac.main([])
    fig3, entropy = results / "fig3", {"losses/entropy": ([1500, 2000], [1.0, 0.04])}
    write_set(fig3, "coma_3m", *[smac_run(0.5, 0.25, exploring=0.125) | entropy] * 3)
    low = smac_run(0.0, 0.25, 0.5)
    write_set(fig3, "dop_3m", smac_run(0.95, 0.5, 1.0), low, low, failed={"4": 1})
    smac.main([])
    text = (fig3 / "README.md").read_text()
    header = "|  | seeds | greedy at 2,000 steps | exploring | its own end | greedy | exploring | worst |"
    assert header in text
    # at 2000 steps the last fifth is the evaluation at 2000, of the whole run that at 3000
    (line,) = [line for line in text.splitlines() if line.startswith("| DOP |")]
    one = stats.success_rate([True, False, False])
    assert line.startswith(
        "| DOP | 3 (1 failed) | 0.33 [0.25, 0.50] | - | 3,000 | 0.67 [0.50, 1.00] | - | 0.50 |"
    )
    assert line.endswith(
        f"| {one} | - | - | {one} | 12.3 | - | 0 |"
    )  # less than half of the seeds: no median
    none, quarter, eighth = stats.success_rate([False] * 3), "0.25 [0.25, 0.25]", "0.12 [0.12, 0.12]"
    line = f"| COMA | 3 | {quarter} | {eighth} | 2,000 | {quarter} | {eighth} | 0.25 | {none}"
    assert f"{line} | - | - | {none} | 12.3 | 0.04 | 0 |" in text
    # one map: P(DOP is better) at the 2000 steps of both: one of three seeds beats COMA, the others tie
    assert f"| COMA | 1 | 2,000 to 2,000 | 3 and 3 | 0.33 [0.25, 0.50] | {quarter} | 0.67 " in text
    assert not (fig3 / "profile.png").exists() and (fig3 / "greedy.png").exists()
    write_set(fig3, "odd", {"eval/episodic_return": ([1000], [0.5])}, env="spread")  # nothing is won
    smac.main([])
    line = f"| odd (spread, {common.ENGINE}) | 1 | - | - | - | - | - | - | - | 12.3 | - | 0 |"
    assert line in (fig3 / "README.md").read_text()


def test_the_average_of_actors_is_compared_in_equal_runs():
    def of(curves):
        return {"runs": [{"seed": s, "curves": {"charts/win_rate": x}} for s, x in curves.items()]}

    one, other = default.same_training(of({1: "a", 2: "b", 3: "c"}), of({1: "a", 2: "x", 4: "c"}))
    assert one == other == of({1: "a"})


def test_smac_keeps_long_runs_and_other_engines_apart(results, capsys):
    fig3 = results / "fig3"
    for name, level in (("mmm", 0.75), ("8m", 0.5)):
        for method, score in (("dop", level), ("qmix", level - 0.25)):
            runs = [smac_run(0.0, score, exploring=score) for _ in range(3)]
            write_set(fig3, f"{method}_{name}_long", *runs, env=name)
    write_set(fig3, "dop_mmm", smac_run(0.0, 1.0, exploring=0.5), env="mmm")
    write_set(fig3, "coma_mmm", smac_run(0.0, 0.5, exploring=0.5), env="mmm", engine="another")
    write_set(fig3, "dop_mmm_paper", smac_run(0.0, 0.125, exploring=0.0), env="mmm")
    write_set(fig3, "dop_mmm_no_chase", smac_run(0.0, 0.25, exploring=0.0), env="mmm,chase=false")
    write_set(fig3, "dop_3m", smac_run(0.0, 1.0, exploring=0.0), env="3m,chase=true")
    write_set(fig3, "dop_8m", smac_run(0.0, 0.25, exploring=0.0), env="8m,chase=false")
    smac.main([])
    text = (fig3 / "README.md").read_text()
    heads = ("## Short runs\n", "### 3m\n", "### mmm\n", "## Long runs\n", "### mmm, long\n")
    heads += ("## Short runs without chase", "### mmm, without chase\n", "## Other sets")
    order = [text.index(head) for head in heads]
    assert order == sorted(order)
    short, _, _, long, _, without, _, others = order
    assert "| DOP | 1 | 1.00 | 0.50 |" in text[short:long] and "### 8m" not in text[short:long]
    assert "| DOP | 1 | 0.25 | 0.00 |" in text[without:others]
    assert "| dop_8m (8m,chase=false, " in text[others:]
    assert "QMIX" not in text[short:long] and "_long" not in text[short:long]
    assert "| QMIX | 2 | 2,000 to 2,000 | 3 and 3 | 0.62 [0.62, 0.62] |" in text[long:without]
    assert "Long runs (2,000 steps): DOP is better than QMIX (1.00 [1.00, 1.00], 2 maps)" in text[:short]
    assert "Short runs: too few for a comparison (3m, mmm)" in text[:short]
    for name, score in {"8m": 0.5, "mmm": 0.25, "3m": 0.75}.items():
        for method, level in (("dop", 0.5), ("coma", score)):
            runs = [smac_run(0.0, level, exploring=0.5)] * (2 if name == "mmm" else 1)
            write_set(fig3, f"{method}_{name}_long", *runs, env=name)
    smac.main([])
    said = "Long runs: DOP wins more (by over 0.05) than COMA on mmm and less on 3m, of 3 maps"
    assert f"{said} (1 to 2 runs of each)" in (fig3 / "README.md").read_text()
    for name in ("8m", "mmm", "3m"):
        write_set(fig3, f"coma_{name}_long", smac_run(0.0, 0.5, exploring=0.5), env=name)
    smac.main([])
    said = "Long runs: DOP wins as much as COMA (within 0.05) on 3 maps (1 to 2 runs of each)"
    assert said in (fig3 / "README.md").read_text()
    assert "| coma_mmm (mmm, another) | 1 | 0.50 |" in text[others:]
    assert f"| dop_mmm_paper (mmm, {common.ENGINE}) | 1 | 0.12 | 0.00 |" in text[others:]
    for name in ("profile_long", "greedy_long", "exploring_long", "greedy", "exploring"):
        with Image.open(fig3 / f"{name}.png") as image:
            assert image.width > 500
        assert f"({name}.png)" in text


def test_sets_without_chase_are_told_by_their_names():
    for env, name, task in (("3m", "dop_3m", "3m"), ("3m,chase=true", "dop_3m", "3m"),
                            ("3m,chase=false", "dop_3m_no_chase", "3m, without chase")):  # fmt: skip
        assert common.task_of(name, {"env": env}) == task and common.set_on("dop", task) == name


def test_profiles_need_maps_that_all_have():
    def of(*values):
        runs = [{"curves": {"eval/win_rate": {"step": [10], "value": [x]}}} for x in values]
        return {"runs": runs, "summary": {"steps": {"min": 10}}}

    maps = {
        "a": {"DOP": of(0.1, 0.2, 0.3), "COMA": of(0.4, 0.5), "QMIX": of(0.0)},
        "b": {"DOP": of(0.6, 0.7), "COMA": of(0.8, 0.9)},
    }
    runs, shared = smac.profiled(maps)  # QMIX has one map, and DOP as many seeds as its set of fewest
    assert shared == ["a", "b"] and {label: x.tolist() for label, x in runs.items()} == {
        "DOP": [[0.1, 0.6], [0.2, 0.7]],
        "COMA": [[0.4, 0.8], [0.5, 0.9]],
    }
    assert smac.profiled({"a": maps["a"]}) == ({}, [])


# ---- cdm.py, quadratic.py, diffs.py ----
def test_cdm_counts_found_held_and_lost(results, capsys):
    curves = [
        [10.0] * 6,
        [10.0, -10, 10, 10, 10, 10],
        [-10.0] * 6,
    ]  # held and never left; lost within the last five; neither
    with pytest.raises(SystemExit, match="no <protocol>"):
        cdm.main([])
    runs = [{"eval/episodic_return": (list(range(6)), x)} for x in curves]
    write_set(results / "fig1", "guided_coma", *runs, env="cdm", engine=None)
    cdm.main([])
    held, found, lost, kept = (stats.success_rate([i < n for i in range(3)]) for n in (1, 2, 1, 1))
    text = (results / "fig1" / "README.md").read_text()
    assert f"| COMA | {held} | {found} | {lost} | {kept} |" in text and "MAAC: not run" in text
    assert "COMA in 1 of 3 (in the others" in text and (results / "fig1" / "guided.png").exists()


def test_quadratic_tables(results, capsys):
    def write(name, finals, **settings):
        steps = list(range(100, 1600, 100))
        runs = [
            {
                "charts/episodic_return": (steps, [-500.0] * 10 + [100 * x] * 5),
                "eval/episodic_return": ([100, 1500], [1e3, 98 * x]),
            }
            for x in finals
        ]
        write_set(results / "masql_fig3", name, *runs, env="quadratic", engine=None, settings=settings)

    with pytest.raises(SystemExit, match="no masql.json"):
        quadratic.main([])
    write("masql", [9.9, 9.5, 0.1], annealing="exponential", alpha_start=1.0)
    write("masql_linear_0.2", [9.9, 8.9], annealing="linear", alpha_start=0.2)
    write("maddpg", [-0.5, 0.0])
    quadratic.main([])
    text = (results / "masql_fig3" / "README.md").read_text()
    two, none, one = (stats.success_rate([i < n for i in range(k)]) for n, k in ((2, 3), (0, 2), (1, 2)))
    assert f"| {two} | {two} | 72% of 50 | 0.10 / 9.31 / 9.70 | 21.0 (22.0) |" in text
    assert f"| {none} | {none} | 0 of 50 |" in text and f"MASQL in {two}, MADDPG in {none}" in text
    assert "| annealing | alpha from 1 | alpha from 0.2 |" in text
    assert f"| exponential | {two} | - |" in text and f"| linear | - | {one} |" in text
    assert "by training reward, of no set here." in text
    write("masql_exponential_0.3", [9.9] * 15 + [0.1] * 5, annealing="exponential", alpha_start=0.3)
    quadratic.main([])
    fits = f"`, {stats.success_rate([i < 15 for i in range(20)])}."
    assert fits in (results / "masql_fig3" / "README.md").read_text()


def test_quadratic_readings_have_a_table_of_their_own(results, capsys):
    run = {"charts/episodic_return": ([100], [990.0]), "eval/episodic_return": ([100], [990.0])}
    settings = dict(annealing="exponential", alpha_start=1.0)
    for name in ("masql", "masql_bound_20"):
        write_set(results / "masql_fig3", name, run, env="quadratic", engine=None, settings=settings)
    quadratic.main([])
    text, one = (results / "masql_fig3" / "README.md").read_text(), stats.success_rate([True])
    assert f"| `python masql_bound_20` | {one} | {one} |" in text and f"| exponential | {one} |" in text


def test_sequential_counts_seeds_that_win_at_the_end(results, capsys):
    def write(name, env, *ends):
        runs = [{"eval/episodic_return": ([5, 10], [0.0, 40 * x]), "eval/win_rate": ([5, 10], [0.0, x])}
                for x in ends]  # fmt: skip
        write_set(results / "masql_sequential", name, *runs, env=env, engine=None)

    with pytest.raises(SystemExit, match="no <algorithm>_<task>_<agents>"):
        sequential.main([])
    write("masql_mill_2", "mill,n_agents=2,mass=0.2", 1.0, 0.5)
    write("maddpg_mill_2", "mill,n_agents=2,mass=0.2", 1.0)
    write("masql_mill_10", "mill", 0.0)
    write("masql-updates_mill_10", "mill", 1.0, 1.0)
    write("maddpg_mill_10", "mill", 1.0)
    sequential.main([])
    text = (results / "masql_sequential" / "README.md").read_text()
    two, one = stats.success_rate([True, False]), stats.success_rate([True])
    assert "2 agents on mill: 1 of 2 (1 of 1); 10 agents" in text
    assert "on mill: 0 of 1 (1 of 1), with MADDPG's number of updates 2 of 2.\n" in text
    assert text.index("| mill | 2 | MADDPG |") < text.index("| mill | 10 | MASQL |")
    assert f"| mill | 2 | MASQL | 2 | 10 | 30.00 [20.00, 40.00] | {two} |" in text
    assert f"| mill | 2 | MADDPG | 1 | 10 | 40.00 | {one} |" in text
    assert "| mill | 2 | random forces |" in text


def test_what_follows_a_first_success(results):
    runs = [smac_run(0.0, 0.95, 0.5, 1.0), smac_run(0.5, 0.25), smac_run(0.0, 0.0, 0.0, 0.9)]
    for name in ("average_3m", "dop_3m"):
        write_set(results / "default", name, *runs[: 2 + (name == "dop_3m")])
    new, old = common.load_sets("default").values()
    assert default.later(new) == default.later(old) == [0.5, 1.0]
    table = default.average_table({"3m": (new, old)})
    half, third = stats.success_rate([True, False]), stats.success_rate([True, False, True])
    assert f"| 3m | average | 2 | {half} | - | 1 of 2 | 0.50 | 0." in table
    assert f"| 3m | latest | 3 | {third} | 4,000 | 1 of 2 | 0.50 |  |" in table


def test_settings_stand_beside_the_defaults(results, capsys):
    with pytest.raises(SystemExit, match="no <setting>_<algorithm>_<task>"):
        settings.main([])
    write_set(results / "settings", "paper_dop_3m", smac_run(0.0, 0.95, 0.7, 1.0, 0.9, exploring=0.5))
    write_set(results / "settings", "paper_dop_deterministic_mill", smac_run(0.0, exploring=0.0), env="mill")
    write_set(results / "fig3", "dop_3m", smac_run(0.95, 1.0, exploring=0.5))
    facts = dict(command="x", commit="abc", dirty=False, date="today", hardware={"cpu": "y"})
    facts |= {"results": [dict(run="z", probability=0.9996, agreement=0.25)]}
    common.write_json(results / "settings" / "saturation.json", facts)
    write_set(results / "fig4", "dop_mill", smac_run(1.0, exploring=0.5), env="mill")
    settings.main([])
    text = (results / "settings" / "README.md").read_text()
    assert "## Do the actors still follow their critics?" in text and "| z | 1.000 | 0.25 |" in text
    once = "DOP, paper, on 3m: 1 of 1 within 5,000 steps, after 2,000 steps (and stays there from 4,000); "
    assert once in text
    assert "deterministic DOP, paper, on mill: 0 of 1 within 1,000 steps." in text
    assert "| DOP, default | 1 | 1.00 | 0.50 | 2,000 |" in text
    assert text.index("## mill") < text.index("| deterministic DOP, default | 1 | 1.00 |")
    write_set(results / "settings", "other_dop_3m", smac_run(0.0))
    with pytest.raises(SystemExit, match="other_dop_3m.json is no"):
        settings.main([])


def test_diffs_count_lines(results, monkeypatch, capsys):
    monkeypatch.setattr(diffs, "ROOT", results)
    monkeypatch.setattr(diffs, "FAMILIES", {"single steps": ["one.py", "two.py"]})
    (results / "one.py").write_text("a\nb\nc\n")
    (results / "two.py").write_text("a\nx\ny\nc\n")
    diffs.main([])
    assert "| `diff one.py two.py` | 1 | 2 | 2 |" in (results / "diffs" / "README.md").read_text()


def test_page_of_diffs_is_of_these_files(monkeypatch):
    """A file that was changed: python benchmark/diffs.py."""
    pages = []
    monkeypatch.setattr(diffs, "write_page", lambda folder, *parts: pages.extend(parts))
    diffs.main([])
    text = (common.RESULTS / "diffs" / "README.md").read_text()
    assert all(table in text for table in pages if table.startswith("|"))


# ---- report.py ----
def test_index_has_a_line_per_page(results, capsys):
    common.write_page("fig9", "Fig. 9", "All\nis well.", "Is\nit.", "more\n")
    report.main(["--index"])
    assert (results / "fig9" / "README.md").read_text() == (
        "# Fig. 9\n\n**Claim.** All is well.\n\n**Answer.** Is it.\n\nmore\n"
    )
    assert (
        (results / "README.md").read_text().endswith("| [Fig. 9](fig9/README.md) | All is well. | Is it. |\n")
    )


def test_pages_of_speed_and_teams(results, capsys):
    facts = dict(command="x", commit="abc", dirty=False, date="today", hardware={"cpu": "y"})
    ways = {"ours": {"steps_per_second": 300.0}, "smax": {"steps_per_second": 200.0}}
    result = {"env": "3m", "num_envs": 4, "threads": 1, "ways": ways}
    run = {"seconds": 10.0, "step_seconds": 1.0}
    files = {
        "throughput": facts | {"results": [result], "peer": "SMAX"},
        "training_speed": facts | {"results": {"this commit": run, "earlier commit": run}, "earlier": "def"},
        "other": {"results": []},
    }
    report.engine(files)
    text = (results / "engine" / "README.md").read_text()
    assert "1.5 to 1.5 times smax; env.step takes 10.0% of a training run." in text
    assert "Beside SMAX." in text and "[other.json](other.json)" in text and "(def)" in text
    battles = [{"map": "3m", "team": "stop", "win_rate": x, "return": 1.0, "length": 9.0} for x in (0.25,)]
    report.teams({"battles": facts | {"results": battles, "games": 2, "engine": "e"}})
    assert "stop 0.25 to 0.25." in (results / "scripted" / "README.md").read_text()


def test_page_of_the_game(results, capsys):
    facts = dict(command="x", commit="abc", dirty=False, date="today", hardware={"cpu": "y"})
    row = {"games": 8, "step of all games": 80.0, "learner and workers": 1.07, "stand-in": 1.5}
    files = {"speed": facts | {"steps": 20, "FAKE_SC2_SLEEP": "5", "results": [row]}}
    report.game(files)
    text = (results / "sc2" / "README.md").read_text()
    assert "were not compared" in text and "1.1 ms of CPU per game and step with 8 (client: stand-in)" in text
    assert "20 steps of random agents, FAKE_SC2_SLEEP=5." in text and "| 8 | 80 | 1.07 | 1.5 |" in text
    measure = dict(team="stop", measure="return", embedded=1.0, sc2=2.0, standard_errors=4.0)
    report.game(files | {"3m": facts | dict(games=2, rounds=3, verdict="unequal", results=[measure])})
    text = (results / "sc2" / "README.md").read_text()
    assert "3m: unequal; learner" in text and "not compared" not in text
    assert (
        "6 episodes of each team in each engine; unequal." in text and "| stop | return | 1 | 2 | 4 |" in text
    )


def test_published_sets_are_on_their_pages():
    """A set of runs that was added or taken away: python benchmark/report.py."""
    for path in common.RESULTS.glob("*/*.json"):
        if "runs" in json.loads(path.read_text()):
            name = f"{path.parent.name}/{path.stem}"
            assert f"--name {name} " in (path.parent / "README.md").read_text(), name
