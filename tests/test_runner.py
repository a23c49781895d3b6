"`missingbook run`: exit codes, messages without a traceback, copies, and outputs that must not be stored."

import json
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from missingbook.practice.cli import app
from missingbook.practice.runner import code_hash, run_chapter

PARAMETER = nbformat.v4.new_code_cell('scale = "book"', metadata={"tags": ["parameters"]}, id="p")
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


def project(folder: Path, **chapters: str) -> Path:
    "A project with one code cell a chapter."
    (folder / "nbs").mkdir()
    (folder / "settings.ini").write_text("[DEFAULT]\n")
    (folder / "_quarto.yml").write_text(f"book: {{chapters: [{', '.join(f'{c}.ipynb' for c in chapters)}]}}\n")
    for name, source in chapters.items():
        cell = nbformat.v4.new_code_cell(source, id="c")
        nbformat.write(
            nbformat.v4.new_notebook(cells=[PARAMETER, cell], metadata=KERNEL), folder / "nbs" / f"{name}.ipynb"
        )
    return folder


def command(*words):
    return CliRunner().invoke(app, ["run", *words])


def test_failure_names_the_cell_and_exits_with_one(tmp_path, monkeypatch):
    monkeypatch.chdir(project(tmp_path, good="1 + 1", bad="# why\n1 / 0"))
    result = command("--out", "copies")
    assert result.exit_code == 1
    assert "bad, cell 2: 1 / 0\n    ZeroDivisionError: division by zero" in result.output
    assert "Traceback" not in result.output and "1 of 2 chapters ran" in result.output
    assert (tmp_path / "copies" / "good.ipynb").exists()
    assert command("good").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "huge"], "fast, book, paper"),
        (["--scale", "fast", "--in-place"], "leave --scale out"),
        (["magic"], "No chapter called 'magic'. There are: good"),
    ],
)
def test_wrong_words(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(project(tmp_path, good="1"))
    result = command(*words)
    assert result.exit_code == 1 and message in result.output


def test_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command()
    assert result.exit_code == 1 and "clone of the repository" in result.output


def test_stored_outputs_are_portable(tmp_path):
    "Warnings, several prints in a row, execution counts and papermill's marks leave no trace."
    root = project(
        tmp_path, a="import sys, warnings\nprint(1)\nprint('!', file=sys.stderr)\nwarnings.warn('w')\nprint(2)\n3"
    )
    path = root / "nbs" / "a.ipynb"
    assert run_chapter(path, root, in_place=True).error is None
    first = path.read_bytes()
    nb = json.loads(first)
    outputs = nb["cells"][1]["outputs"]
    assert [o["output_type"] for o in outputs] == ["stream", "execute_result"] and "".join(
        outputs[0]["text"]
    ) == "1\n2\n"
    assert all("papermill" not in c["metadata"] and c["execution_count"] is None for c in nb["cells"])
    assert nb["metadata"]["missingbook"] == {"code_sha256": code_hash(nb)}
    assert run_chapter(path, root, in_place=True).error is None and path.read_bytes() == first


def test_a_machines_path_is_not_stored(tmp_path):
    root = project(tmp_path, a="print('/ho' + 'me/ada/data.csv')")
    path = root / "nbs" / "a.ipynb"
    before = path.read_bytes()
    result = run_chapter(path, root, in_place=True)
    assert "cell 2" in result.error and "/ho" + "me/ada" in result.error and path.read_bytes() == before


def test_a_kernel_that_dies_is_reported(tmp_path):
    root = project(tmp_path, a="import os\nos._exit(3)")
    result = run_chapter(root / "nbs" / "a.ipynb", root, timeout=30)
    assert result.error is not None and "cell 2" in result.error and "Traceback" not in result.error
