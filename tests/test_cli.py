"The command line on real files with holes: every cell that can be filled is, none that was there changes."

import os
import subprocess
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import missingbook
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


@pytest.mark.parametrize(
    "method", ["mean", "median", "knn", "ice", "mice", "missforest", "trees", "softsvd", "autoencoder"]
)
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
    for words in ([], ["impute"], ["describe"], ["run"], ["site"]):
        result = command(*words, "--help")
        assert result.exit_code == 0 and "--help" in result.output
    assert "OUT.csv" in command("impute", "--help").output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2,9\n3,,8\n4,5\n", "line 2: 3 cells where the header has 2"),
        ("a;b\n1,5;2\n;3\n", "separated by ';'"),
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


@pytest.mark.parametrize(
    ("content", "filled"),
    [
        ('a,b\n1,"x\ry"\n,"x\ry"\n', '"a","b"\n"1","x\ry"\n"1","x\ry"\n'),  # a line end within a cell
        ('a,b\r\n1,"x\ry"\r\n,z\r\n', 'a,b\r\n1,"x\ry"\r\n1,z\r\n'),  # lines end as they did
        ('"a,b"\n1\n\n3\n', '"a,b"\n1\n2\n3\n'),  # one column, with a comma in its name
        ("a,b\n" + "x" * 200_000 + ",1\n,1\n", "a,b\n" + "x" * 200_000 + ",1\n" + "x" * 200_000 + ",1\n"),
        ("a\n-1\n\n0\n0\n0\n", "a\n-1\n0\n0\n0\n0\n"),  # not -0
        ("a,b\n9223372036854775809,1\n,1\n", "a,b\n9223372036854775809,1\n9223372036854775809,1\n"),  # beyond 2^63
    ],
)
@pytest.mark.parametrize("name", ["in.csv", "in.zip"])  # text, whatever its name
def test_no_cell_is_split_or_misread(tmp_path, content, filled, name):
    source, target = tmp_path / name, tmp_path / "out.csv"
    source.write_bytes(content.encode())
    result = command("impute", source, "-o", target, "--method", "mean")
    assert result.exit_code == 0, result.output
    assert target.read_bytes() == filled.encode()


def test_a_line_of_spaces_is_told(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("a,b\n1,2\n   \n,3\n")
    assert "1 blank lines" in command("impute", source, "-o", tmp_path / "out.csv", "--method", "mean").output


def test_odd_names_can_be_said(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text('"a,b", c,d=e\n1,7,1\n,,\n2,9,2\n')
    told = ["--ignore", '"a,b"," c"', "--ordered", "d=e=1<2", "--method", "mean"]
    assert command("impute", source, "-o", target, *told).exit_code == 0
    assert target.read_text().splitlines()[2] == ",,1"
    assert refused(command("describe", source, "--ignore", "c"), '"a,b", " c"')
    assert refused(command("describe", source, "--ordered", "d=e=1<2", "--ordered", "d=e=2<1"), "named twice")
    assert refused(command("describe", source, "--ordered", "d=e=None<1<2"), "'None' counts as missing")
    source.write_text("imputation,b\n1,\n2,3\n")
    long = ["--method", "knn", "--n-samples", 2, "--long"]
    assert refused(command("impute", source, "-o", tmp_path / "l.csv", *long), "'imputation'", "rename it")


# --- bad input: one line, exit code 1, no traceback, nothing written --------------------------------------------------


def refused(result, *words) -> bool:
    "One line on the error, naming what is meant, and no traceback."
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert len(result.stderr.strip().splitlines()) == 1 and all(w in result.output for w in words), result.output
    return True


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["in.csv", "empty"]),
        ("\n", ["in.csv"]),
        ("a,b\n", ["in.csv", "no rows"]),
        ("a,b\n1,inf\n2,\n3,4\n", ["column 'b'", "row 1", "'inf'", "--ignore b"]),
        ("a,b\n1,-Infinity\n2,\n3,4\n", ["column 'b'", "infinite"]),
        ('a,b\n1,"1,234.50"\n2,\n3,"2,000.00"\n', ["column 'b'", "row 1", "'1,234.50'", "thousands separators"]),
        ('a,b\n1,7\n2,"1,234"\n3,\n', ["column 'b'", "row 2", "'1,234'"]),
        ('a,b\n1,"1,5"\n2,\n3,"2,25"\n', ["column 'b'", "row 1", "'1,5'", "--decimal ,"]),
        ("a,b\n1,1 234\n2,\n3,2 000\n", ["column 'b'", "'1 234'", "thousands"]),
        ("a,b\n1,7\n2,x7\n3,\n4,8\n", ["column 'b'", "row 2", "'x7'", "--categorical b"]),
        ('a,b\n1,"x\n2,y\n', ["in.csv", "quotation mark"]),
        ('a,b\n1,"x\n2,"y\n3,z\n', ["in.csv, line 3", "quotation mark"]),
        ('"a";"b"\n1,5;2\n', ["separated by ';'", "--decimal ,"]),
        ("é,b\n1,2\n".encode("latin-1"), ["not UTF-8"]),
        ("a,b\n1,\n".encode("utf-16"), ["not UTF-8", "zero bytes"]),
        (bytes(range(256)) * 40, ["in.csv", "no text"]),
        (bytes(range(1, 256)) * 40, ["in.csv"]),
    ],
)
@pytest.mark.parametrize("verb", ["impute", "describe"])
def test_bad_content(tmp_path, content, words, verb):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = source.read_bytes()
    more = ["-o", target, "--method", "mean"] if verb == "impute" else []
    assert refused(command(verb, source, *more), *words)
    assert source.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["in.csv"]


def test_a_mixed_column_is_not_passed_over(tmp_path, monkeypatch):
    "The mutation: nobody complains. The table above must notice."
    monkeypatch.setattr("missingbook.practice.cli._complain", lambda *a: None)
    with pytest.raises(AssertionError):
        test_bad_content(tmp_path, "a,b\n1,7\n2,x7\n3,\n4,8\n", ["column 'b'"], "impute")


def test_bad_paths(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("a,b\n1,\n2,3\n")
    (tmp_path / "folder").mkdir()
    assert refused(command("impute", tmp_path / "none.csv", "-o", target), "no file none.csv")
    assert refused(command("describe", tmp_path / "none.csv"), "no file none.csv")
    assert refused(command("impute", tmp_path / "folder", "-o", target), "folder is a folder")
    assert refused(command("impute", source, "-o", tmp_path / "folder", "--force"), "folder is a folder")
    assert refused(command("impute", source, "-o", tmp_path / "x" / "out.csv"), "no folder")
    assert refused(command("impute", source), "-o OUT.csv")
    target.write_text("mine")
    assert refused(command("impute", source, "-o", target), "exists already", "--force")
    assert refused(command("impute", source, "-o", source, "--force"), "is the input")
    assert refused(command("impute", source, "-o", tmp_path / "new.csv", "--report", target), "out.csv exists already")
    twice = command("impute", source, "-o", tmp_path / "new.csv", "--report", tmp_path / "new.csv")
    assert refused(twice, "new.csv is named twice")
    assert target.read_text() == "mine" and source.read_text() == "a,b\n1,\n2,3\n"
    assert command("impute", source, "-o", target, "--method", "mean", "--force").exit_code == 0
    assert target.read_text() == "a,b\n1,3\n2,3\n"


def test_nothing_of_value_is_overwritten(tmp_path):
    source, target, model = numbers_file(tmp_path / "in.csv"), tmp_path / "out.csv", tmp_path / "m.model"
    mean = ["--method", "mean", "--force"]
    for path in (".", "/", ""):
        assert refused(command("impute", path, "--dry-run"), "is a folder")
    for name in ("out.csv.gz", "out.xlsx"):
        assert refused(command("impute", source, "-o", tmp_path / name, *mean), ".csv or .tsv")
    os.mkfifo(tmp_path / "pipe.csv")
    assert refused(command("impute", source, "-o", tmp_path / "pipe.csv", *mean), "pipe")
    (tmp_path / "sub").mkdir()
    again = tmp_path / "sub" / ".." / "out.csv"
    assert refused(command("impute", source, "-o", target, "--report", again, *mean), "named twice")
    model.write_bytes(b"a model")
    assert refused(command("impute", source, "-o", model, "--model", model, "--force"), "named twice")
    assert refused(command("impute", source, "-o", target, "--report", model, "--model", model, "--force"), "two names")
    hidden = numbers_file(tmp_path / ".out.csv.tmp")  # the name under which out.csv is written
    assert refused(command("impute", hidden, "-o", target, *mean), "overwrites it") and hidden.exists()
    assert model.read_bytes() == b"a model" and (tmp_path / "pipe.csv").is_fifo() and not target.exists()


ODD = {
    "empty column": ("a,b\n2,\n2,\n,\n", "a,b\n2,\n2,\n2,\n"),
    "empty row": ("a,b\n1,x\n,\n1,x\n", "a,b\n1,x\n1,x\n1,x\n"),
    "constant": ("a,b\n5,1\n5,2\n,3\n", "a,b\n5,1\n5,2\n5,3\n"),
    "one row": ("a,b\n1,\n", "a,b\n1,\n"),
    "nothing seen": ("a,b\n,\n,\n", "a,b\n,\n,\n"),
    "seen once": ("a,b\nred,1\nblue,2\nblue,\n,2\nblue,\n", None),
}


@pytest.mark.parametrize("method", ["mean", "knn", "mice", "trees", "softsvd", "autoencoder"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_tables(tmp_path, method, odd):
    (content, wanted), source, target = ODD[odd], tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(content)
    result = command("impute", source, "-o", target, "--method", method)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output and source.read_text() == content
    if result.exit_code:  # a method may decline; it says so, and leaves nothing behind
        assert odd == "nothing seen" and not target.exists() and refused(result)
        return
    holes, changed, left = compare(as_text(source), as_text(target))
    assert changed == 0 and (wanted is None or method == "autoencoder" or target.read_text() == wanted)
    assert left == {"empty column": 3, "one row": 1, "nothing seen": 4}.get(odd, 0)
    if left:
        assert "no value to learn from" in result.output


def test_five_thousand_columns(tmp_path):
    source, target = tmp_path / "wide.csv", tmp_path / "out.csv"
    wide = pd.DataFrame(np.random.default_rng(0).integers(0, 99, (12, 5_000)).astype(str)).add_prefix("c")
    wide.iloc[3, ::7] = ""
    wide.to_csv(source, index=False)
    result = command("impute", source, "-o", target, "--method", "mean")
    assert result.exit_code == 0, result.output
    assert compare(as_text(source), as_text(target)) == (715, 0, 0) and "… and 4,960 more" in result.output
    result = command("impute", source, "-o", tmp_path / "b.csv")
    assert refused(result, "5,000 columns", "--method softsvd", "--ignore") and not (tmp_path / "b.csv").exists()
    wide.iloc[:, :101].to_csv(source, index=False)
    result = command("describe", source)
    assert result.exit_code == 0 and "101 number columns are too many" in result.output


# --- types and formats ------------------------------------------------------------------------------------------------


def test_tsv_keeps_tabs_and_spelling(tmp_path):
    source, target = tmp_path / "in.tsv", tmp_path / "out.tsv"
    source.write_text("a\tb, c\n1.50\tx,y\n\tx,y\n2.50\t\n")
    assert command("impute", source, "-o", target, "--method", "mean").exit_code == 0
    assert target.read_text() == "a\tb, c\n1.50\tx,y\n2.00\tx,y\n2.50\tx,y\n"


@pytest.mark.parametrize("name", ["in.csv", "in.tsv"])
def test_decimal_comma(tmp_path, name):
    source, target = tmp_path / name, tmp_path / f"out{name[2:]}"
    mark = ";" if name == "in.csv" else "\t"
    source.write_text("a;b\n1,50;3\n;4\n2,50;\n".replace(";", mark))
    assert command("impute", source, "-o", target, "--method", "mean", "--decimal", ",").exit_code == 0
    assert target.read_text() == "a;b\n1,50;3\n2,00;4\n2,50;4\n".replace(";", mark)
    assert refused(command("impute", source, "-o", target, "--force", "--decimal", "x"), "--decimal is . or ,")
    source.write_text("a;b\n1.234,50;3\n;4\n2,50;\n".replace(";", mark))
    assert refused(command("describe", source, "--decimal", ","), "column 'a'", "'1.234,50'")
    source.write_text("a;b\n1.50;3\n;4\n2.25;\n".replace(";", mark))  # words, if nobody complained
    assert refused(command("describe", source, "--decimal", ","), "column 'a'", "'1.50'", "--decimal .")


def test_kinds_as_told(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("code,zip,note\n1,01,5\n1,02,\n4,,6\n,03,7\n")
    told = ["--categorical", "code", "--numeric", "zip", "--ignore", "note", "--method", "mean"]
    dry = command("impute", source, "--dry-run", *told)
    assert (
        dry.exit_code == 0 and "ignored, as asked" in dry.output and [p.name for p in tmp_path.iterdir()] == ["in.csv"]
    )
    assert "category" in dry.output.split("code")[1].splitlines()[0]
    assert command("impute", source, "-o", target, *told).exit_code == 0
    assert target.read_text() == "code,zip,note\n1,01,5\n1,02,\n4,2,6\n1,03,7\n"
    assert refused(command("impute", source, "--dry-run", "--ignore", "nota"), "'nota'", "code, zip, note")
    assert refused(command("impute", source, "--dry-run", "--ignore", "zip", "--numeric", "zip"), "named twice")
    source.write_text("a,b\n1,x\n2,y\n")
    result = command("impute", source, "--dry-run", "--numeric", "b")
    assert refused(result, "column 'b'", "'x'", "said to hold numbers")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_ordered_levels_as_told(tmp_path, suffix):
    rng = np.random.default_rng(0)
    x = rng.normal(size=120)
    table = pd.DataFrame({"x": x.round(3), "size": np.array(["S", "M", "L"])[np.digitize(x, [-0.5, 0.5])]})
    holes = table.mask(rng.random(table.shape) < [0.0, 0.3])
    source, out, model = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", tmp_path / "a.model"
    write = holes.to_parquet if suffix == ".parquet" else partial(holes.to_csv, sep="\t" if suffix == ".tsv" else ",")
    write(source, index=False)
    read = pd.read_parquet if suffix == ".parquet" else partial(pd.read_csv, sep="\t" if suffix == ".tsv" else ",")
    missing = holes["size"].isna()
    for words in (["--method", "knn"], ["--method", "autoencoder", "--save", model], ["--model", model]):
        told = [] if "--model" in words else ["--ordered", "size=S<M<L"]
        result = command("impute", source, "-o", out, "--force", *words, *told)
        assert result.exit_code == 0 and "ordered" in result.output, result.output
        filled = read(out)["size"]
        assert (filled[~missing] == holes.loc[~missing, "size"]).all() and filled[missing].isin(["S", "M", "L"]).all()
        codes, truth = (s[missing].map({"S": 0, "M": 1, "L": 2}) for s in (filled, table["size"]))
        assert (codes - truth).abs().max() <= 1  # neighbours of the truth at worst: the order was used
    for words, said in ((["size=S<M"], ["row", "'L'", "--ordered"]), (["siz=S<M<L"], ["'siz'", "lacks"]),
                        (["size"], ["LOWEST"]), (["size=S<S"], ["each level once"])):
        assert refused(command("impute", source, "-o", tmp_path / f"b{suffix}", "--ordered", *words), *said)


def test_describe_shows_patterns_and_little(tmp_path):
    rng = np.random.default_rng(0)
    x = pd.DataFrame(rng.normal(size=(300, 3)), columns=list("abc"))
    x.loc[x["a"] > 0.5, "b"] = np.nan  # missing by another column: the test must see it
    x.to_csv(tmp_path / "mar.csv", index=False)
    x["b"] = np.where(rng.random(300) < 0.3, np.nan, rng.normal(size=300))
    x.to_csv(tmp_path / "mcar.csv", index=False)
    mar, mcar = command("describe", tmp_path / "mar.csv"), command("describe", tmp_path / "mcar.csv")
    assert ": not missing completely at random" in mar.output and "no sign against" in mcar.output
    assert "rows lack b" in mar.output and "rows lack nothing" in mar.output
    (tmp_path / "words.csv").write_text("a,b\nx,\ny,z\n")
    assert "Little's test: not done" in command("describe", tmp_path / "words.csv").output


def arrow_table() -> pa.Table:
    "Twelve rows of every type that a Parquet file brings here, with holes."
    rows = range(12)
    levels = pd.Categorical(["low", "mid", "high"] * 4, categories=["low", "mid", "high"], ordered=True)
    return pa.table(
        {
            "big": pa.array([2**60 + i if i % 4 else None for i in rows], pa.int64()),
            "small": pa.array([i % 5 if i % 3 else None for i in rows], pa.int8()),
            "x": pa.array([i / 3 if i % 5 else None for i in rows], pa.float32()),
            "word": pa.array(["red" if i % 2 else "blue" if i else None for i in rows]),
            "level": pa.array(pd.Series(levels).where(pd.Series(rows) != 4), from_pandas=True),
            "price": pa.array([Decimal(f"{i}.{i:02d}") if i != 9 else None for i in rows], pa.decimal128(6, 2)),
            "yes": pa.array([bool(i % 2) if i != 7 else None for i in rows]),
            "when": pa.array([pd.Timestamp("2020-01-01") if i else None for i in rows], pa.timestamp("ms")),
        }
    ).replace_schema_metadata({"origin": "a probe"})


def same_where_seen(before: pa.Table, after: pa.Table) -> bool:
    "Equal schemas, and every cell that was there as it was."
    return before.schema.equals(after.schema, check_metadata=True) and all(
        b is None or a == b
        for name in before.column_names
        for b, a in zip(before[name].to_pylist(), after[name].to_pylist(), strict=True)
    )


def test_parquet_keeps_types(tmp_path):
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(arrow_table(), source)
    result = command("impute", source, "-o", target, "--method", "median")
    assert result.exit_code == 0, result.output
    after = pq.read_table(target)
    assert same_where_seen(pq.read_table(source), after) and after["when"].null_count == 1
    assert all(after[c].null_count == 0 for c in after.column_names if c != "when")
    command("impute", source, "-o", tmp_path / "long.parquet", "--method", "knn", "--n-samples", 2, "--long")
    assert pq.read_table(tmp_path / "long.parquet")["imputation"].to_pylist() == [1] * 12 + [2] * 12


def test_parquet_fills_within_the_type(tmp_path):
    rows, source, target = range(60), tmp_path / "in.parquet", tmp_path / "out.parquet"
    line = pa.table(
        {
            "x": pa.array(map(float, rows)),
            "small": pa.array([5 * i if i < 51 else None for i in rows], pa.uint8()),  # the line goes on to 295
            "price": pa.array([Decimal(i) / 5 if i < 50 else None for i in rows], pa.decimal128(3, 2)),
            "big": pa.array([2**63 - 1 if i else None for i in rows], pa.int64()),
            "code": pa.array([i % 3 if i else None for i in rows]),
            "word": pa.array(["1"] * 60),
        }
    )
    pq.write_table(line, source)
    told = ["--method", "ice", "--ordered", "code=0<1<2"]
    result = command("impute", source, "-o", target, *told)
    assert result.exit_code == 0, result.output
    after = pq.read_table(target)
    assert same_where_seen(line, after) and not any(c.null_count for c in after.columns)
    assert after["small"].to_pylist()[-1] == 255 and after["price"].to_pylist()[-1] == Decimal("9.99")
    assert refused(command("describe", source, "--numeric", "word"), "column 'word' is of type string")


def test_same_where_seen_sees_a_rounded_cell():
    table = arrow_table()
    rounded = pa.array([None if v is None else int(float(v)) for v in table["big"].to_pylist()], pa.int64())
    assert not same_where_seen(table, table.set_column(0, "big", rounded))


def test_bad_parquet(tmp_path):
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    for content in (b"PAR1 no more", b"a,b\n1,2\n", b"\0" * 500):
        source.write_bytes(content)
        assert refused(command("impute", source, "-o", target), "in.parquet", "Parquet")
    pq.write_table(arrow_table(), source)
    source.write_bytes(source.read_bytes()[:-40])
    assert refused(command("describe", source), "in.parquet")
    pq.write_table(pa.table({"a": [1.0, float("inf"), None]}), source)
    assert refused(command("impute", source, "-o", target), "in.parquet", "column 'a'", "row 1", "infinite")
    pq.write_table(pa.Table.from_arrays([pa.array([1.0, None])] * 2, names=["a", "a"]), source)
    assert refused(command("impute", source, "-o", target), "in.parquet", "two columns named 'a'")
    pq.write_table(arrow_table()[:0], source)
    assert refused(command("impute", source, "-o", target), "no rows")
    assert refused(command("impute", source, "-o", tmp_path / "out.csv"), "written as .parquet")
    assert not target.exists()


# --- draws, models, reports -------------------------------------------------------------------------------------------


def test_long_file(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(MIXED)
    assert refused(command("impute", source, "-o", target, "--long"), "--n-samples")
    assert command("impute", source, "-o", target, "--method", "mice", "--n-samples", 3, "--long").exit_code == 0
    long = as_text(target)
    assert list(long.columns) == ["imputation", *MIXED.splitlines()[0].split(",")]
    assert long["imputation"].tolist() == [k for k in "123" for _ in range(6)] and long.loc[6, "level"] == "3.50"


def numbers_file(path: Path, rows: int = 60, seed: int = 0) -> Path:
    "A table of three related numbers, a code and a word, with holes, as CSV or Parquet by the suffix."
    rng = np.random.default_rng(seed)
    a = rng.normal(size=rows)
    frame = pd.DataFrame({"a": a, "b": 2 * a + 0.1 * rng.normal(size=rows), "c": rng.normal(size=rows)}).round(3)
    frame = frame.mask(rng.random(frame.shape) < 0.2).assign(
        code=rng.integers(1, 4, rows).astype(str), word=rng.choice(["u", "v"], rows)
    )
    frame.loc[3, ["code", "word"]] = None
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False, row_group_size=25)
    else:
        frame.to_csv(path, index=False)
    return path


def test_a_saved_model_fills_other_files(tmp_path):
    source, model = numbers_file(tmp_path / "in.csv"), tmp_path / "m.model"
    first = command(
        "impute", source, "-o", tmp_path / "a.csv", "--method", "autoencoder", "--save", model, "--categorical", "code"
    )
    assert first.exit_code == 0 and model.stat().st_size < 3e6, first.output
    assert command("impute", source, "-o", tmp_path / "b.csv", "--model", model).exit_code == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()  # the same model, the same file
    other = numbers_file(tmp_path / "new.csv", 7, seed=1)
    assert command("impute", other, "-o", tmp_path / "c.csv", "--model", model).exit_code == 0
    assert compare(as_text(other), as_text(tmp_path / "c.csv"))[1:] == (0, 0)
    assert refused(
        command("impute", source, "-o", tmp_path / "d.csv", "--method", "trees", "--save", tmp_path / "n"),
        "nothing is pickled",
    )
    assert refused(
        command("impute", source, "-o", tmp_path / "d.csv", "--model", model, "--save", tmp_path / "n"),
        "leave --save out",
    )
    other.write_text(other.read_text().replace("word", "term", 1))
    assert refused(
        command("impute", other, "-o", tmp_path / "d.csv", "--model", model), "another table", "'word'", "'term'"
    )
    source.write_text(source.read_text().replace(",u\n", ",w\n"))
    assert refused(command("impute", source, "-o", tmp_path / "d.csv", "--model", model), "'word'", "'w'")
    for content in (b"", b"no model", b"\x10\0\0\0\0\0\0\0{}"):
        model.write_bytes(content)
        assert refused(command("impute", other, "-o", tmp_path / "d.csv", "--model", model), "m.model")
    assert refused(command("impute", other, "-o", tmp_path / "d.csv", "--model", tmp_path / "none"), "no model file")
    assert not (tmp_path / "d.csv").exists() and not (tmp_path / "n").exists()


def test_a_model_fills_columns_that_are_empty_in_the_new_file(tmp_path):
    source, model, new = tmp_path / "in.csv", tmp_path / "m.model", tmp_path / "new.csv"
    source.write_text(MIXED)
    assert (
        command("impute", source, "-o", tmp_path / "a.csv", "--method", "autoencoder", "--save", model).exit_code == 0
    )
    new.write_text(MIXED.splitlines()[0] + "\na9,,,,2000-01-01,,\n")
    result = command("impute", new, "-o", tmp_path / "b.csv", "--model", model)
    assert result.exit_code == 0, result.output
    row = as_text(tmp_path / "b.csv").loc[0]
    assert row["town"] in {"Rome", "Oslo"} and row["smokes"] in {"yes", "no"} and row["empty"] == ""
    assert 20 < float(row["age"]) < 50 and 1 < float(row["level"]) < 5


def test_parquet_by_row_groups(tmp_path):
    source, model = numbers_file(tmp_path / "in.parquet"), tmp_path / "m.model"
    fit = command("impute", source, "-o", tmp_path / "a.parquet", "--method", "autoencoder", "--save", model)
    used = command("impute", source, "-o", tmp_path / "b.parquet", "--model", model)
    assert fit.exit_code == used.exit_code == 0 and "3 row groups" in used.output, used.output
    whole, groups = (pq.read_table(tmp_path / f"{n}.parquet") for n in "ab")
    numbers = (t.to_pandas().select_dtypes("number") for t in (whole, groups))
    assert np.allclose(*numbers, rtol=0, atol=1e-5) and whole["word"].equals(groups["word"])
    assert pq.ParquetFile(tmp_path / "b.parquet").num_row_groups == 3
    assert same_where_seen(pq.read_table(source), groups)
    bad = pq.read_table(source).rename_columns(["a", "b", "c", "code", "term"])
    pq.write_table(bad, tmp_path / "bad.parquet")
    assert refused(
        command("impute", tmp_path / "bad.parquet", "-o", tmp_path / "c.parquet", "--model", model), "another table"
    )
    coded = pq.read_table(source)
    word = coded["word"].dictionary_encode()
    pq.write_table(coded.set_column(4, "word", word), tmp_path / "coded.parquet", row_group_size=4)  # levels differ
    done = command("impute", tmp_path / "coded.parquet", "-o", tmp_path / "e.parquet", "--model", model)
    assert done.exit_code == 0, done.output
    assert pq.read_table(tmp_path / "e.parquet")["word"].to_pylist() == whole["word"].to_pylist()
    pq.write_table(coded[:0], tmp_path / "none.parquet")
    (tmp_path / "c.parquet").write_text("old")
    none = command("impute", tmp_path / "none.parquet", "-o", tmp_path / "c.parquet", "--model", model, "--force")
    assert refused(none, "no rows") and (tmp_path / "c.parquet").read_text() == "old"
    (tmp_path / "c.parquet").unlink()
    late = pq.read_table(source).to_pandas()
    late.loc[50, "word"] = "new"  # in the last group: the first two are written by then
    late.to_parquet(tmp_path / "late.parquet", index=False, row_group_size=25)
    (tmp_path / "c.parquet").write_text("old")
    assert refused(
        command("impute", tmp_path / "late.parquet", "-o", tmp_path / "c.parquet", "--model", model, "--force"), "'new'"
    )
    assert (tmp_path / "c.parquet").read_text() == "old" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["mean", "knn"])
def test_report_stands_alone(tmp_path, method):
    source = numbers_file(tmp_path / "in.csv")
    source.write_text(source.read_text().replace("word", "<b>$w_", 1))
    assert (
        command(
            "impute", source, "-o", tmp_path / "o.csv", "--method", method, "--report", tmp_path / "r.html"
        ).exit_code
        == 0
    )
    page = (tmp_path / "r.html").read_text()
    assert "http" not in page and "<script" not in page and "<b>$w" not in page and "&lt;b&gt;$w" in page
    assert page.count("data:image/png;base64,") == 6 and ("gives no draws" in page) == (method == "mean")


def test_report_of_a_column_that_is_all_but_constant(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("a,b\n9007199254740993,2\n,3\n9007199254740995,\n")
    words = ["--method", "mean", "--report", tmp_path / "r.html"]
    assert command("impute", source, "-o", tmp_path / "o.csv", *words).exit_code == 0


# --- interrupted writing: the old output stays whole ------------------------------------------------------------------

KILLED = """
import os, signal, sys
import pandas as pd
from missingbook.practice import cli

def half(self, path, *a, **k):
    with open(path, "w") as file:
        file.write("half a")
        file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

pd.DataFrame.to_csv = half
sys.argv = ["missingbook", "impute", sys.argv[1], "-o", sys.argv[2], "--method", "mean", "--force"]
cli.main()
"""

FULL = """
import resource, signal, sys
from missingbook.practice import cli
import missingbook.foundations.classics

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
sys.argv = ["missingbook", "impute", sys.argv[1], "-o", sys.argv[2], "--method", "mean", "--force"]
cli.main()
"""


@pytest.mark.parametrize(("script", "code"), [(KILLED, -9), (FULL, 1)])
def test_interrupted_writing_keeps_the_old_output(tmp_path, root, script, code):
    source, target = numbers_file(tmp_path / "in.csv", 600), tmp_path / "out.csv"
    target.write_text("the old output")
    done = subprocess.run(
        [sys.executable, "-c", script, source, target], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert target.read_text() == "the old output"
    assert code == -9 or (done.stderr.startswith("Error:") and not list(tmp_path.glob(".*")))
    assert command("impute", source, "-o", target, "--method", "mean", "--force").exit_code == 0
    assert compare(as_text(source), as_text(target))[1:] == (0, 0) and not list(tmp_path.glob(".*"))


def test_writing_in_place_would_be_seen(tmp_path, root):
    "The mutation: no temporary name. The killed run must then leave half a file, and the test above notice."
    naive = "import contextlib" + KILLED.replace("= half", "= half\ncli._whole = contextlib.nullcontext")
    with pytest.raises(AssertionError):
        test_interrupted_writing_keeps_the_old_output(tmp_path, root, naive, -9)
    assert (tmp_path / "out.csv").read_text() == "half a"


def test_help_is_quick(root):
    "The heavy modules are imported by those who need them."
    code = (
        "import sys, missingbook.practice.cli; print([m for m in ('torch', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_methods_lists_every_imputer(tmp_path):
    "Mutation: a class without an entry. What a file cannot hold, `impute` refuses by name."
    listed = command("methods").output
    names = {name for name in missingbook.__all__ if name.endswith("Imputer")} - {"DeepImputer"}  # of all, the base
    assert len(names) > 15 and {name for name in names if name not in listed} == set()
    (tmp_path / "in.csv").write_text(MIXED)
    result = command("impute", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--method", "misgan")
    assert result.exit_code != 0 and "takes pictures" in result.output and "MisGANImputer" in result.output
