"What the README promises works: its example runs, its commands parse, its links and its picture exist."

import base64
import json
import os
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from typer.testing import CliRunner
from write_readme import MARKS, news

import missingbook
from missingbook.practice.cli import app

DATA = Path(os.environ.get("MISSINGBOOK_DATA", "")) / "uci"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(compile(code, "README", "exec"), names)
    table, filled, draws = names["table"], names["filled"], names["draws"]
    assert table.isna().to_numpy().any() and not filled.isna().to_numpy().any() and len(draws) == 5
    seen = table.notna().to_numpy()
    for completed in (filled, *draws):
        assert isinstance(completed, pd.DataFrame) and (completed.to_numpy()[seen] == table.to_numpy()[seen]).all()


def test_commands_run(tmp_path, monkeypatch):
    "Each `missingbook impute` of the README, on a small table of that name."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("a,b\n1,x\n2,\n,y\n4,x\n5,y\n")
    lines = re.findall(r"^ {4}missingbook (impute .+)$", README, re.M)
    assert len(lines) >= 2
    for line in lines:
        result = CliRunner().invoke(app, [*shlex.split(line), "--force"])
        assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the development data: set MISSINGBOOK_DATA")
def test_transcript_is_what_the_command_prints(tmp_path):
    "The columns as understood, cell by cell; of what was filled, the counts (the forests take half a minute)."
    (shown,) = re.findall(f"{re.escape(MARKS[0])}(.*?){re.escape(MARKS[1])}", README, re.S)
    table = news()
    table.to_csv(tmp_path / "news.csv", index=False)
    words = ["impute", str(tmp_path / "news.csv"), "--ordered", "shares=few<some<many", "--dry-run"]
    result = CliRunner().invoke(app, words)
    understood = [line.rstrip() for line in result.output.split("\n\n")[0].splitlines()]
    lines = [line.rstrip() for line in shown.splitlines()]
    assert len(understood) == 41 and lines[2:43] == understood
    for column, count in table.isna().sum().items():
        found = [line for line in lines[43:] if line.split()[:1] == [column] and f" {count} " in line]
        assert count == 0 or len(found) == 1, column
    total = f"{table.isna().to_numpy().sum():,}"
    assert f"{total} of {total} missing cells filled by 'trees'." in lines


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ {4}make (\w+)", README, re.M):
        assert re.search(rf"^{target}:.*## ", makefile, re.M), target


def test_links_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_named_imputers_exist():
    names = set(re.findall(r"`(\w+Imputer)`", README))
    assert len(names) >= 8 and names <= set(missingbook.__all__)


@pytest.mark.parametrize("name", ["digits", "curve", "prflow", "misgan", "vaeac", "missing-glow"])
def test_pictures_are_the_tours_figures(name):
    """Those of README and of the front page: run the tour again, and they must be copied anew."""
    tour = json.loads((ROOT / "nbs" / "tour.ipynb").read_text())
    (figure,) = [c for c in tour["cells"] if f"#| label: fig-tour-{name}\n" in "".join(c["source"])]
    stored = [o["data"]["image/png"] for o in figure["outputs"] if "image/png" in o.get("data", {})]
    assert base64.b64decode("".join(stored[0])) == (ROOT / "nbs" / "images" / f"tour-{name}.png").read_bytes()
    front = README if name == "digits" else (ROOT / "nbs" / "index.ipynb").read_text()
    assert f"images/tour-{name}.png" in front
