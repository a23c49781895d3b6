"""The bench: protocols that do not leak, records that survive, comparisons that are paired; mutations of each."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from missingbook.foundations.data import Table
from missingbook.practice import bench as module
from missingbook.practice.bench import (
    PROTOCOLS,
    Job,
    Workers,
    bench,
    column_errors,
    compare,
    emflow_split,
    is_done,
    markdown,
    mean_of,
    mean_ranks,
    overview,
    paired_test,
    plan,
    plot_report,
    read_data,
    read_records,
    report,
    run_job,
    vaeac_split,
    write_record,
)
from missingbook.practice.cli import METHODS, app

JOB = Job("vaeac", "iris", "mean", "mcar", 0.5, 0)


@pytest.fixture(scope="module")
def split():
    return vaeac_split(read_data("iris"), "mcar", 0.5, 0)


def leaks(table: Table, split) -> bool:
    """True where junk in the test rows changes what the training rows look like."""
    before = split(table, "mcar", 0.2, 0)
    frame = table.frame.copy()
    frame.iloc[before.test.index] = frame.iloc[before.test.index] * 1000.0
    after = split(Table(frame, table.kinds, table.target), "mcar", 0.2, 0)
    return not np.allclose(before.holes_train, after.holes_train, equal_nan=True)


def wines() -> Table:
    features = read_data("wine").features.frame.astype("float64")
    return Table(features, dict.fromkeys(features, "number"))


def test_the_scale_of_emflow_does_not_look_at_test_rows():
    assert not leaks(wines(), emflow_split)


def test_a_leaking_scale_is_found():
    def by_all_rows(table, *args):
        frame = table.frame
        scaled = Table((frame - frame.min()) / (frame.max() - frame.min()), table.kinds, table.target)
        return vaeac_split(scaled, *args)

    assert leaks(wines(), by_all_rows)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("mechanism", ["mcar", "mar", "mnar"])
def test_splits(name, mechanism):
    table, rate = read_data("wine"), 0.3
    s = PROTOCOLS[name].split(table, mechanism, rate, 0)
    assert set(s.train.index).isdisjoint(s.test.index) and len(s.train) + len(s.test) == len(table.frame)
    hidden = pd.concat([s.holes_train, s.holes_test]).isna()
    columns = hidden.columns[hidden.any()]
    assert abs(hidden[columns].to_numpy().mean() - rate) < 0.08
    seen = s.holes_test.notna()
    pd.testing.assert_frame_equal(s.holes_test.where(seen), s.test.where(seen))
    again = PROTOCOLS[name].split(table, mechanism, rate, 0)
    pd.testing.assert_frame_equal(again.holes_train, s.holes_train)
    assert not PROTOCOLS[name].split(table, mechanism, rate, 1).holes_train.equals(s.holes_train)


def test_cells_that_were_missing_are_not_scored():
    table = read_data("iris")
    frame = table.frame.copy()
    frame.iloc[::2, 0] = np.nan
    s = vaeac_split(Table(frame, table.kinds, table.target), "mcar", 0.5, 0)
    assert not s.heldout.iloc[:, 0].to_numpy()[s.test.iloc[:, 0].isna().to_numpy()].any()
    imputed = s.test.fillna(0.0)
    assert np.isfinite(column_errors(s, imputed)["nrmse"])


def test_a_level_that_only_test_rows_hold_and_a_target_of_whole_numbers():
    frame = pd.DataFrame({"c": ["x", "y"] * 20, "d": ["u", "v", "w", "u"] * 10, "y": np.arange(40) % 5})
    kinds = {"c": "category", "d": "category", "y": "number"}
    test = vaeac_split(Table(frame, kinds, "y"), "mcar", 0.3, 0).test.index
    frame.loc[test[0], "c"] = "rare"
    split = vaeac_split(Table(frame, kinds, "y"), "mcar", 0.3, 0)
    imputer = METHODS["mean"].make(0, {"kinds": split.kinds}).fit(split.holes_train)
    assert imputer.transform(split.holes_test).notna().all(axis=None)
    assert split.task == "regression"


def test_column_errors_by_hand(split):
    zero = split.test.assign(**{c: 0.0 for c in split.test})
    held = split.heldout.to_numpy()
    both = pd.concat([split.train, split.test])
    by_hand = [np.sqrt((split.test.iloc[:, j][held[:, j]] ** 2).mean()) / both.iloc[:, j].std(ddof=0) for j in range(4)]
    assert np.isclose(column_errors(split, zero)["nrmse"], np.mean(by_hand))


def test_votes_and_means():
    draws = [pd.DataFrame({"n": [1.0], "c": pd.Categorical([c], ["x", "y"])}) for c in "xyy"]
    out = mean_of(draws, {"n": "number", "c": "category"})
    assert out["c"].tolist() == ["y"] and out["c"].dtype == draws[0]["c"].dtype


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(name):
    quick = {"missforest": {"n_estimators": 3, "max_rounds": 1}, "trees": {"n_estimators": 3, "max_rounds": 1},
             "autoencoder": {"max_epochs": 3}}.get(name, {})
    record = run_job(Job("vaeac", "iris", name, "mcar", 0.5, 0, json.dumps(quick)))
    assert record["status"] == "done", record.get("error")
    assert 0 < record["metrics"]["nrmse"] < 2 and 0 <= record["metrics"]["r2_or_accuracy"] <= 1


@pytest.mark.parametrize("change, words", [
    ({"data": "no such table"}, "no such table"), ({"mechanism": "magic"}, "magic"), ({"rate": 7.0}, "rate"),
    ({"parameters": '{"n_trees": 3}'}, "n_trees"),
])
def test_a_run_that_fails_is_a_record(change, words, tmp_path):
    job = Job(**(vars(JOB) | change))
    records = bench([job, JOB], tmp_path, verbose=False, run=run_job)
    assert list(records["status"]) == ["failed", "done"] and words in records["error"][0]
    assert not is_done(job, tmp_path) and is_done(JOB, tmp_path)


def test_finished_runs_are_skipped_and_others_are_not(tmp_path):
    calls = []

    def count(job):
        calls.append(job)
        return run_job(job)

    bench([JOB], tmp_path, verbose=False, run=count)
    bench([JOB], tmp_path, verbose=False, run=count)
    assert len(calls) == 1
    path = JOB.path(tmp_path)
    for damage in ("", "{", path.read_text()[:40], path.read_text().replace('"done"', '"failed"'),
                   path.read_text().replace('"rate": 0.5', '"rate": 0.4')):
        path.write_text(damage)
        bench([JOB], tmp_path, verbose=False, run=count)
        assert is_done(JOB, tmp_path)
    assert len(calls) == 6


def test_writing_leaves_the_old_record_whole(tmp_path, monkeypatch):
    path = tmp_path / "a" / "r.json"
    write_record({"status": "done"}, path)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(OSError):
        write_record({"status": "new"}, path)
    assert json.loads(path.read_text()) == {"status": "done"} and [p.name for p in path.parent.iterdir()] == ["r.json"]


def die(job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_takes_only_its_own_job(monkeypatch):
    workers = Workers()
    try:
        monkeypatch.setattr(module, "run_job", die)
        assert "died" in workers(JOB)["error"]
        monkeypatch.undo()
        assert workers(JOB)["status"] == "done"
    finally:
        workers.close()


LONG = textwrap.dedent("""
    import sys
    from pathlib import Path
    from missingbook.practice.bench import bench, plan, run_job
    def slow(job):
        import time
        time.sleep(0.02)
        return run_job(job)
    bench(plan("vaeac", ["iris", "diabetes"], ["mean", "median"], seeds=5), Path(sys.argv[1]), verbose=False, run=slow)
""")


def test_killed_at_random_moments_it_loses_nothing(tmp_path):
    rng, kept = random.Random(), 0
    for _ in range(int(os.environ.get("MISSINGBOOK_KILLS", "3"))):
        process = subprocess.Popen([sys.executable, "-c", LONG, str(tmp_path)], start_new_session=True)
        began = time.monotonic()
        while process.poll() is None and len([*tmp_path.glob("*/*/*.json")]) <= kept and time.monotonic() - began < 60:
            time.sleep(0.05)
        time.sleep(rng.random() / 3)
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
        for path in tmp_path.glob("*/*/*.json"):
            json.loads(path.read_text())  # every file that is there is whole
        now = int((read_records(tmp_path)["status"] == "done").sum())
        assert now >= kept
        kept = now
    assert kept > 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the workers in /proc")
def test_workers_end_with_the_bench_that_started_them(tmp_path):
    "Killed without a word, the bench leaves no process behind that goes on computing."
    code = ("from missingbook.practice.bench import Job, Workers; import os, sys; w = Workers();"
            "w(Job('vaeac', 'iris', 'mean', 'mcar', 0.5, 0)); pool = w.pools[0]; print(*pool._processes, flush=True);"
            "w(Job('vaeac', 'digits', 'missforest', 'mcar', 0.5, 0))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    process.kill()
    process.wait()
    began = time.monotonic()
    while Path(f"/proc/{worker}").exists() and time.monotonic() - began < 10:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_a_draft_that_was_left_is_swept_away(tmp_path):
    old, new = (tmp_path / "vaeac" / "iris" / f".mean-mcar-0.5-{k}.json.1.tmp" for k in (0, 1))
    old.parent.mkdir(parents=True)
    for draft in (old, new):
        draft.write_text("{")
    os.utime(old, (0, 0))
    bench([], tmp_path, verbose=False)
    assert [p.name for p in old.parent.iterdir()] == [new.name]


def test_plans():
    jobs = plan("vaeac", ["iris"], ["mean", "knn"], seeds=2)
    assert [j.seed for j in jobs] == [0, 1, 0, 1] and {j.rate for j in jobs} == {0.5}
    assert plan("emflow", ["letter"], ["mean"], "mar")[0].rate == 0.57
    assert len({j.path(Path("x")) for j in jobs}) == 4
    assert plan("vaeac", ["iris"], ["knn"], parameters={"n_neighbors": 3})[0].path(Path("x")) != jobs[2].path(Path("x"))
    for wrong in (dict(protocol="ours"), dict(methods=["magic"]), dict(mechanism="fate"),
                  dict(protocol="emflow", seeds=6)):
        with pytest.raises(ValueError, match="there are|five folds"):
            plan(**(dict(protocol="vaeac", data=["iris"], methods=["mean"]) | wrong))


def records(values: dict) -> pd.DataFrame:
    return pd.DataFrame([{"protocol": "vaeac", "data": d, "method": m, "mechanism": "mcar", "rate": 0.5, "seed": s,
                          "status": "done", "nrmse": v} for (d, m), vs in values.items() for s, v in enumerate(vs)])


def test_compare_ranks_and_pairs():
    runs = records({("iris", "mice"): [0.58, 0.60], ("iris", "missforest"): [0.9, 1.0], ("yeast", "mice"): [1.0, 1.0],
                    ("yeast", "missforest"): [0.9, 0.8], ("zoo", "mice"): [0.1, 0.1]})
    table = compare(runs, "vaeac")
    within = table["within_2sd"]
    assert within["iris · mice · nrmse"] and not within["iris · missforest · nrmse"]
    ranks = mean_ranks(runs, "nrmse")
    assert ranks["mean rank"].tolist() == [1.5, 1.5] and ranks["data sets"].eq(2).all()  # zoo lacks a method
    assert 0 < paired_test(runs, "iris", "mice", "missforest", "nrmse") < 0.2
    assert np.isnan(paired_test(records({("a", "x"): [1.0], ("a", "y"): [2.0]}), "a", "x", "y", "nrmse"))
    with pytest.raises(ValueError, match="no finished run"):
        compare(runs[runs["data"] == "nothing"], "vaeac")


def test_a_csv_of_ones_own(tmp_path):
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 3)), columns=list("abc")).assign(id=range(60))
    frame.to_csv(tmp_path / "mine.csv", index=False)
    jobs = plan("vaeac", [str(tmp_path / "mine.csv")], ["mean"], rate=0.2, seeds=1)
    records = bench(jobs, tmp_path / "out", verbose=False, run=run_job)
    assert records["status"].tolist() == ["done"] and [*tmp_path.glob("out/vaeac/mine-*")]
    calls, other = [], tmp_path / "b"
    other.mkdir()
    (frame * 2).to_csv(other / "mine.csv", index=False)
    jobs += plan("vaeac", [str(other / "mine.csv")], ["mean"], rate=0.2, seeds=1)

    def count(job):
        calls.append(job.data)
        return run_job(job)

    bench(jobs, tmp_path / "out", verbose=False, run=count)
    assert calls == [jobs[1].data] and len(read_records(tmp_path / "out")) == 2  # one name, two files
    frame.assign(a=frame["b"]).to_csv(tmp_path / "mine.csv", index=False)
    bench(jobs, tmp_path / "out", verbose=False, run=count)
    assert calls == [jobs[1].data, jobs[0].data]  # another content is another examination


def test_names_are_checked_before_anything_runs(tmp_path):
    for data, words in (("iriss", "no data set 'iriss'"), ("../evil", "no data set"), ("none.csv", "no file none")):
        with pytest.raises(ValueError, match=words):
            plan("vaeac", [data], ["mean"])
    wrong = (("a,b\n1,2\n", "1 rows"), ("a,b\n1,inf\n", "infinite"), ("a\n" + "1\n" * 12, "two different"))
    for content, words in wrong:
        (tmp_path / "t.csv").write_text(content)
        assert words in run_job(Job("vaeac", str(tmp_path / "t.csv"), "mean", "mcar", 0.5, 0))["error"]


def test_files_that_are_no_records_are_passed_over(tmp_path):
    bench([JOB], tmp_path, verbose=False, run=run_job)
    path = JOB.path(tmp_path)
    good = path.read_text()
    damaged = ("[]", "{}", "null", "1", '"x"', '{"job": 1, "status": "done"}', '{"job": {}, "status": "done"}',
               good.replace('"metrics": {', '"metrics": null, "m": {'),
               good.replace('"nrmse": ', '"nrmse": "x", "n": '))
    for content in damaged:
        path.write_text(content)
        assert not is_done(JOB, tmp_path) and read_records(tmp_path).empty, content


def test_where_a_report_may_lie(tmp_path):
    out, folder = tmp_path / "r.md", tmp_path / "records"
    write_record({"job": vars(JOB), "status": "failed", "error": "no memory"}, JOB.path(folder))
    ask = lambda *words: CliRunner().invoke(app, ["report", "--records", str(folder), *map(str, words)])  # noqa: E731
    assert ask("-o", out).exit_code == 0 and [p.name for p in tmp_path.glob("r.*")] == ["r.md"]  # nothing to draw
    bench([JOB], folder, verbose=False, run=run_job)
    (tmp_path / "s.png").write_text("mine")
    wrong = (("s.md", "s.png exists"), ("x.png", ".md"), ("no/r.md", "no folder"), (JOB.path(folder), ".md"))
    for name, words in wrong:
        said = ask("-o", tmp_path / name)
        assert said.exit_code == 1 and isinstance(said.exception, SystemExit) and words in said.stderr, said.output
    assert (tmp_path / "s.png").read_text() == "mine" and not (tmp_path / "s.md").exists()


def test_a_report_holds_every_run_and_every_failure():
    runs = records({("iris", "mice"): [0.58, 0.60], ("iris", "knn"): [0.7, 0.8], ("yeast", "knn"): [1.0]})
    broken = records({("zoo", "mice"): [np.nan]}).assign(status="failed", error="no memory")
    runs = pd.concat([runs, broken], ignore_index=True)
    text = report(runs, "vaeac")
    assert "3 finished" not in text and "5 finished runs" in text
    assert "| iris | 0.750 ± 0.071 | 0.590 ± 0.014 |" in text and "| yeast | 1.000 |  |" in text
    assert "no memory" in text and "iris · mice · nrmse" in text
    assert overview(runs, "nrmse").loc["yeast", "knn"] == "1.000"
    labels = [t.get_text() for t in plot_report(runs).get_yticklabels()]
    assert labels == ["yeast", "iris"]
    with pytest.raises(ValueError, match="no run of emflow"):
        report(runs, "emflow")


def test_markdown_has_one_line_a_row():
    table = pd.DataFrame({"a": [1.0, np.nan], "b": ["x", "y"]}, index=pd.Index(["p", "q"], name="n"))
    lines = markdown(table).splitlines()
    assert lines == ["| n | a | b |", "| --- | --- | --- |", "| p | 1.000 | x |", "| q |  | y |"]
