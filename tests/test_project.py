"""What holds across the whole project: export, outputs, imports, names, labels, paths.

Each rule is a function that lists its violations; it is run on the project, and on a mutant that breaks it.
"""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
import yaml
from conftest import ROOT

import missingbook
from missingbook.practice.runner import chapters, code_hash, machine_path

NOTEBOOKS = chapters(ROOT)
NAMES = [p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in NOTEBOOKS]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tracked() -> list[Path]:
    "Files under version control, without symbolic links."
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("no git checkout: the list of tracked files is not known")
    return [ROOT / f for f in run.stdout.split("\0") if f and (ROOT / f).is_file() and not (ROOT / f).is_symlink()]


def copy_project(to: Path) -> Path:
    "settings.ini and nbs, as far as nbdev needs them."
    shutil.copy(ROOT / "settings.ini", to)
    shutil.copy(ROOT / "_quarto.yml", to)
    shutil.copytree(ROOT / "nbs", to / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return to


def nbdev(command: str, cwd: Path) -> None:
    "Run one of nbdev's functions in a process of its own: it reads its settings from the working directory."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    code = f"from nbdev.{'clean' if 'clean' in command else 'doclinks'} import {command}; {command}()"
    subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, check=True, capture_output=True, timeout=120)


# --- the package is what the notebooks export -------------------------------------------------------------


def out_of_sync(exported: Path, package: Path) -> list[str]:
    "Files that differ between two packages, or that only one has; what is written by hand is left out."
    by_hand = {"__init__.py"}

    def files(folder: Path) -> set[str]:
        every = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return {p.as_posix() for p in every if p.as_posix() not in by_hand and p.parts[0] != "_data"}

    both = files(exported) | files(package)
    text = lambda folder, name: (folder / name).read_text() if (folder / name).exists() else None  # noqa: E731
    return sorted(name for name in both if text(exported, name) != text(package, name))


def test_package_is_in_sync(tmp_path):
    copy_project(tmp_path)
    (tmp_path / "missingbook").mkdir()
    nbdev("nbdev_export", tmp_path)
    assert out_of_sync(tmp_path / "missingbook", ROOT / "missingbook") == []


def test_sync_finds_edited_and_stale_modules(tmp_path):
    for side in ("exported", "package"):
        shutil.copytree(ROOT / "missingbook", tmp_path / side)
    module = tmp_path / "package" / "practice" / "runner.py"
    module.write_text(module.read_text() + "\nx = 1\n")
    (tmp_path / "package" / "foundations" / "stale.py").write_text("y = 2\n")
    assert out_of_sync(tmp_path / "exported", tmp_path / "package") == ["foundations/stale.py", "practice/runner.py"]


# --- notebooks in git --------------------------------------------------------------------------------------


def notebook_faults(path: Path) -> list[str]:
    "What a committed notebook must not be or hold."
    nb, faults = read(path), []
    if nb["metadata"].get("missingbook", {}).get("code_sha256") != code_hash(nb):
        faults.append("outputs are older than the code: run `missingbook run --in-place`")
    if path.stat().st_size > 1_500_000:
        faults.append(f"{path.stat().st_size / 1e6:.1f} MB, more than 1.5 MB")
    if "widgets" in nb["metadata"]:
        faults.append("widget state")
    for number, cell in enumerate(nb["cells"], 1):
        if not isinstance(cell["source"], list):
            faults.append(f"cell {number}: source is not a list of lines")
        for output in cell.get("outputs", []):
            if output["output_type"] == "error" or output.get("name") == "stderr":
                faults.append(f"cell {number}: an error or a warning is stored")
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                faults.append(f"cell {number}: a widget that needs a server")
    return faults


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook(path):
    assert notebook_faults(path) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda nb: nb["cells"][-2]["source"].append("\nx = 0"), "older"),
        (
            lambda nb: nb["cells"][-2]["outputs"].append({"output_type": "stream", "name": "stderr", "text": "!"}),
            "stored",
        ),
        (lambda nb: nb["metadata"].update(widgets={}), "widget state"),
        (lambda nb: nb["cells"][0].update(source="# One string"), "list of lines"),
    ],
)
def test_notebook_faults_are_found(tmp_path, change, fault):
    nb = read(ROOT / "nbs" / "06_practice" / "01_runner.ipynb")
    nb["cells"] = [c for c in nb["cells"] if c["cell_type"] == "code"][:2]
    nb["cells"].append({"cell_type": "markdown", "source": [], "metadata": {}, "id": "z"})
    nb["metadata"]["missingbook"] = {"code_sha256": code_hash(nb)}
    path = tmp_path / "mutant.ipynb"
    path.write_text(json.dumps(nb))
    assert notebook_faults(path) == []
    change(nb)
    path.write_text(json.dumps(nb))
    assert any(fault in f for f in notebook_faults(path))


def test_nbdev_clean_leaves_no_difference(tmp_path):
    copy_project(tmp_path)
    dirty = read(tmp_path / "nbs" / "tour.ipynb")
    dirty["cells"][-1]["metadata"]["collapsed"] = True  # the mutant: nbdev_clean must be seen to act at all
    (tmp_path / "nbs" / "dirty.ipynb").write_text(json.dumps(dirty))
    nbdev("nbdev_clean", tmp_path)
    changed = [
        n
        for p, n in zip(NOTEBOOKS, NAMES, strict=True)
        if (tmp_path / "nbs" / f"{n}.ipynb").read_text() != p.read_text()
    ]
    assert changed == []
    assert "collapsed" not in read(tmp_path / "nbs" / "dirty.ipynb")["cells"][-1]["metadata"]


# --- who may import whom -----------------------------------------------------------------------------------

WINGS = {
    "foundations": set(),
    "gaussian": {"foundations"},
    "flows": {"foundations", "gaussian"},
    "gans": {"foundations", "gaussian"},
    "vaes": {"foundations", "gaussian"},
    "practice": {"foundations", "gaussian", "flows", "gans", "vaes"},
}
DEVELOPMENT = {"nbdev", "execnb", "fastcore", "papermill", "nbformat", "nbconvert", "nbclient", "pypandoc", "pytest",
               "hypothesis", "beartype", "IPython", "yaml"}  # fmt: skip


def import_faults(wing: str, code: str) -> list[str]:
    "Imports in a module of `wing` that the design forbids: other wings, and development packages at the top."
    tree, faults = ast.parse(code), []
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module:
            modules = ["missingbook." + node.module]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
            if node.module == "missingbook":
                modules = [f"missingbook.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            first, _, rest = module.partition(".")
            other = rest.split(".")[0]
            if first == "missingbook" and other in WINGS and other != wing and other not in WINGS[wing]:
                faults.append(f"{wing} imports {other}")
            if first in DEVELOPMENT and (wing != "practice" or id(node) in top):
                faults.append(f"{wing} imports {first}")
    return faults


def test_import_rules():
    modules = [p for wing in WINGS for p in sorted((ROOT / "missingbook" / wing).glob("*.py"))]
    assert len(modules) > 8
    assert {p.name: f for p in modules if (f := import_faults(p.parent.name, p.read_text()))} == {}


@pytest.mark.parametrize(
    ("wing", "code"),
    [
        ("foundations", "from ..practice.runner import select"),
        ("foundations", "def f():\n    from missingbook.flows import realnvp"),
        ("flows", "from ..gans.gain import GAINImputer"),
        ("gaussian", "import missingbook.vaes.vae"),
        ("foundations", "def f():\n    import nbdev"),
        ("practice", "import papermill"),
        ("foundations", "from missingbook import practice"),
    ],
)
def test_import_rules_find(wing, code):
    assert import_faults(wing, code)


def test_import_rules_allow():
    assert import_faults("flows", "from ..gaussian.em import x\nfrom .coupling import y\nimport torch") == []
    assert import_faults("practice", "def f():\n    import papermill\nfrom ..foundations.data import Table") == []


# --- names ------------------------------------------------------------------------------------------------


def parameters_called_mask(code: str) -> list[str]:
    "Public functions and methods with a parameter called plain `mask`."
    functions = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    every = ((f.name, a.arg) for f in functions for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs])
    return [name for name, arg in every if arg == "mask" and (not name.startswith("_") or name.startswith("__"))]


def test_no_parameter_is_called_mask():
    modules = sorted((ROOT / "missingbook").rglob("*.py"))
    assert {p.name: f for p in modules if (f := parameters_called_mask(p.read_text()))} == {}
    mutant = "class A:\n    def fit(self, x, *, mask): ...\ndef _private(mask): ...\ndef fine(coupling_mask): ..."
    assert parameters_called_mask(mutant) == ["fit"]


def test_signatures_are_enforced():
    "The import hook of conftest.py is at work: a wrong shape does not get in."
    from missingbook.foundations.viz import signed_error

    with pytest.raises(jaxtyping.TypeCheckError):
        signed_error(torch.zeros(2, 1, 8), torch.zeros(2, 1, 8))


def test_version_stands_once():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    assert missingbook.__version__ == settings["DEFAULT"]["version"]


def test_import_is_light():
    code = (
        "import sys, missingbook, missingbook.practice.cli\n"
        "heavy = {'torch', 'sklearn', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"


def test_every_lazy_name_exists():
    assert missingbook.__all__
    for name in missingbook.__all__:
        assert getattr(missingbook, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        missingbook.Nothing  # noqa: B018


# --- no machine's path --------------------------------------------------------------------------------------


def path_faults(text: str) -> list[str]:
    "Lines with a path of a machine."
    return [line.strip()[:120] for line in text.splitlines() if machine_path(line)]


def test_no_machine_path_in_tracked_files():
    allowed = {"nbs/06_practice/01_runner.ipynb", "missingbook/practice/runner.py"}  # the rule itself stands there
    faults = {}
    for file in tracked():
        name = file.relative_to(ROOT).as_posix()
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if name not in allowed and (found := path_faults(text)):
            faults[name] = found[:3]
    assert faults == {}


@pytest.mark.parametrize("parts", [("see ", "home", "ada"), ('"', "tmp", "x"), ("File ", "root", "a.py")])
def test_machine_paths_are_found(parts):
    assert path_faults("/".join(parts)) and path_faults("C:" + "\\" + "Users")


# --- the book ---------------------------------------------------------------------------------------------

_DEFINED = re.compile(r"\{[^}\n]*#((?:eq|fig|sec|tbl)-[\w-]+)[^}\n]*\}|^#\|\s*label:\s*((?:fig|tbl)-[\w-]+)", re.M)
_REFERRED = re.compile(r"(?<![\w@])@((?:eq|fig|sec|tbl)-[\w-]*\w)")


def prose(nb: dict) -> str:
    "Markdown without code, where labels are only spoken of."
    text = "\n\n".join(source(c) for c in nb["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)


def label_faults(notebooks: dict[str, dict]) -> list[str]:
    "Labels defined twice, and labels referred to that nobody defines."
    defined: list[str] = []
    referred: set[str] = set()
    for nb in notebooks.values():
        code = "\n".join(source(c).split("\n\n")[0] for c in nb["cells"] if c["cell_type"] == "code")
        heads = "\n".join(line for line in code.splitlines() if line.startswith("#|"))
        defined += [a or b for a, b in _DEFINED.findall(prose(nb)) + _DEFINED.findall(heads)]
        referred |= set(_REFERRED.findall(prose(nb) + "\n" + heads))
    twice = sorted({d for d in defined if defined.count(d) > 1})
    return [f"{d} is defined twice" for d in twice] + [
        f"{r} is defined nowhere" for r in sorted(referred - set(defined))
    ]


def markdown(text: str) -> dict:
    return {"cells": [{"cell_type": "markdown", "source": [text]}]}


def test_labels():
    assert label_faults({n: read(p) for n, p in zip(NAMES, NOTEBOOKS, strict=True)}) == []
    assert label_faults({"a": markdown("# A {#sec-a}\n@sec-b"), "b": markdown("## A {#sec-a}")}) == [
        "sec-a is defined twice",
        "sec-b is defined nowhere",
    ]


def test_book_lists_what_exists():
    book = yaml.safe_load((ROOT / "_quarto.yml").read_text())["book"]
    entries = book["chapters"] + book["appendices"]
    listed = [f for e in entries for f in ([e] if isinstance(e, str) else e["chapters"])]
    assert sorted(listed) == sorted(f"{n}.ipynb" for n in NAMES)
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink()
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_citations_exist():
    keys = set(re.findall(r"^@\w+\{([^,\s]+),", (ROOT / "nbs" / "references.bib").read_text(), re.M))
    cited = {}
    for name, path in zip(NAMES, NOTEBOOKS, strict=True):
        found = re.findall(r"(?<![\w@.])@([A-Za-z][\w]*\d{4}\w*)", prose(read(path)))
        cited |= {key: name for key in found}
    assert cited and {k: n for k, n in cited.items() if k not in keys} == {}


def test_every_exercise_has_a_solution():
    without = []
    for name, path in zip(NAMES, NOTEBOOKS, strict=True):
        text = prose(read(path))
        if "solutions/" in name or "## Exercises" not in text:
            continue
        linked = re.findall(r"@(sec-solutions-[\w-]+)", text)
        if not linked:
            without.append(name)
    assert without == []


def test_figures_say_what_they_show():
    "Every labelled figure has a caption and an alternative text, and shows something."
    faults = []
    for name, path in zip(NAMES, NOTEBOOKS, strict=True):
        for cell in read(path)["cells"]:
            head = [line for line in source(cell).splitlines() if line.startswith("#|")]
            if cell["cell_type"] != "code" or not any(line.startswith("#| label: fig-") for line in head):
                continue
            options = yaml.safe_load("\n".join(line[2:].strip() for line in head if ":" in line))
            shown = [o for o in cell["outputs"] if {"image/png", "text/html"} & set(o.get("data", {}))]
            if not (options.get("fig-cap") and options.get("fig-alt") and len(shown) == 1):
                faults.append(f"{name}: {options['label']}")
    assert faults == []
