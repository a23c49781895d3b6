"The command line on real files with holes: every cell that can be filled is, none that was there changes."

import os
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from missingbook.practice.cli import app

DATA = Path(os.environ.get("MISSINGBOOK_DATA", "")) / "uci"


def command(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def as_text(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def compare(before: pd.DataFrame, after: pd.DataFrame) -> tuple[int, int, int]:
    "Holes in the first, observed cells that differ in the second, holes left in the second."
    hole = before.isin(["", "?"])
    return (
        int(hole.to_numpy().sum()),
        int(((before != after) & ~hole).to_numpy().sum()),
        int(after.isin(["", "?"]).to_numpy().sum()),
    )


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the development data: set MISSINGBOOK_DATA")
@pytest.mark.parametrize(("name", "holes"), [("air_quality", 16_701), ("mushroom", 2_480)])
def test_real_files(tmp_path, name, holes):
    source, target = DATA / f"{name}.csv", tmp_path / "filled.csv"
    result = command("impute", source, "-o", target, "--method", "mean")
    assert result.exit_code == 0, result.output
    assert compare(as_text(source), as_text(target)) == (holes, 0, 0)


def test_compare_sees_a_changed_cell():
    before, after = pd.DataFrame({"a": ["1.50", ""]}), pd.DataFrame({"a": ["1.5", "2.00"]})
    assert compare(before, after) == (1, 1, 0)


MIXED = """id,town,age,smokes,born,empty,level
a1,Rome,31,yes,1990-02-03,,3.50
a2,,45,no,1985-11-30,,
a3,Oslo,?,,1970-01-01,,2.25
a4,Rome,28,yes,,,4.00
a5,Oslo,,no,1999-09-09,,1.75
a6,Rome,39,NA,2001-05-06,,3.00
"""


@pytest.mark.parametrize("method", ["mean", "median", "knn", "ice", "mice", "missforest", "trees", "softsvd"])
def test_every_method_on_a_mixed_table(tmp_path, method):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(MIXED)
    result = command("impute", source, "-o", target, "--method", method)
    assert result.exit_code == 0, result.output
    before, after = as_text(source), as_text(target)
    hole = before.isin(["", "?", "NA"])
    assert (after == before)[~hole].where(~hole, True).all().all()
    assert (after["empty"] == "").all() and after.loc[3, "born"] == ""  # nothing to learn from; a date
    assert after.loc[1, "town"] in {"Rome", "Oslo"} and after.loc[[2, 5], "smokes"].isin(["yes", "no"]).all()
    assert after.loc[[2, 4], "age"].str.fullmatch(r"\d+").all()  # whole numbers stay whole
    assert after.loc[1:1, "level"].str.fullmatch(r"\d\.\d\d").all()
    assert "no value to learn from" in result.output and "a date" in result.output


def test_same_seed_same_file_and_draws_differ(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text(MIXED)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            command(
                "impute", source, "-o", tmp_path / f"{name}.csv", "--method", "mice", "--n-samples", 2, "--seed", seed
            ).exit_code
            == 0
        )
    text = {f"{n}{i}": (tmp_path / f"{n}_{i}.csv").read_text() for n in "abc" for i in (1, 2)}
    assert text["a1"] == text["b1"] and text["a2"] == text["b2"]
    assert text["a1"] != text["a2"] and text["a1"] != text["c1"]


def test_nothing_to_fill(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("a,b\n1,x\n2,y\n3,x\n")
    result = command("impute", source, "-o", target)
    assert result.exit_code == 0 and "nothing to fill" in result.output and target.read_text() == source.read_text()


def test_help_answers():
    for words in ([], ["impute"], ["run"], ["site"]):
        result = command(*words, "--help")
        assert result.exit_code == 0 and "--help" in result.output
    assert "OUT.csv" in command("impute", "--help").output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2,9\n3,,8\n4,5\n", "line 2: 3 cells where the header has 2"),
        ("a;b\n1,5;2\n;3\n", "cells where the header has 1"),
        ("a;b\n1;2\n;3\n", "separated by ';'"),
        ("a\tb\n1\t\n", "separated by"),
        ("a,b\n", "no rows"),
        ("", "is empty"),
        ('a,b\n1,"x\n2,y\n', "in.csv"),
        (b"a,b\n\xe9,1\n", "not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, content, message):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = command("impute", source, "-o", target, "--method", "mean")
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert not target.exists() and [p.name for p in tmp_path.iterdir()] == ["in.csv"]


@pytest.mark.parametrize(
    ("content", "filled"),
    [
        ("a,a,b\n1,2,3\n,4,5\n3,6,7\n", "a,a,b\n1,2,3\n2,4,5\n3,6,7\n"),  # like names stay as they are
        (",x\n0,1\n1,\n2,3\n", ",x\n0,1\n1,2\n2,3\n"),  # a column without a name, as pandas writes its index
        ("x\n1\n\n3\n", "x\n1\n2\n3\n"),  # in one column a blank line is the missing cell
        ("code,x\n007,1.50\n012,\n031,2.50\n", "code,x\n007,1.50\n012,2.00\n031,2.50\n"),
    ],
)
def test_spelling_is_kept(tmp_path, content, filled):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(content)
    assert command("impute", source, "-o", target, "--method", "mean").exit_code == 0
    assert target.read_text() == filled


def test_a_code_with_leading_zeros_is_no_quantity(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("zip,x\n01234,1\n02139,2\n,3\n01234,4\n")
    assert command("impute", source, "-o", target, "--method", "mean").exit_code == 0
    assert as_text(target).loc[2, "zip"] in {"01234", "02139"}


def test_blank_lines_are_told(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("a,b\n1,2\n\n3,\n\n")
    result = command("impute", source, "-o", target, "--method", "mean")
    assert result.exit_code == 0 and "2 blank lines of in.csv were left out" in result.output
    assert target.read_text() == "a,b\n1,2\n3,2\n"
