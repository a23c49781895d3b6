"The site: nbdev's preparation, Quarto's way with a stand-in for its program, the preview with the network off."

import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from missingbook.practice import site
from missingbook.practice.site import build_site, find_quarto, prepare, preview


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    "What the site is built from, in a folder of its own."
    to = tmp_path_factory.mktemp("clone")
    for name in ("settings.ini", "_quarto.yml"):
        shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "nbs", to / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return to


@pytest.fixture(scope="module")
def prepared(clone) -> Path:
    return prepare(clone)


@pytest.fixture(scope="module")
def pages(prepared, tmp_path_factory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("preview")
    return out, preview(prepared, out)


def test_prepared_chapters_show_their_code(prepared):
    "Exported code stays on the page, directives and hidden cells do not; the book's settings come along."
    text = (prepared / "01_foundations" / "01_masks.ipynb").read_text()
    assert "def masking_operator" in text and "#| export" not in text and "load_ext jaxtyping" not in text
    assert (prepared / "_quarto.yml").read_text() == (ROOT / "_quarto.yml").read_text()
    assert (prepared / "references.bib").exists() and (prepared / "styles.scss").exists()


def test_preview_defines_every_label(pages):
    out, missing = pages
    assert missing == []
    assert len(list(out.rglob("*.html"))) == len(list((ROOT / "nbs").rglob("*.ipynb")))


def test_preview_links_lead_somewhere(pages):
    "Every link inside the preview leads to a page that exists and to an id on it."
    out, _ = pages
    text = {p: p.read_text() for p in out.rglob("*.html")}
    broken = []
    for page, content in text.items():
        for href in re.findall(r'<a [^>]*href="([^"]+)"', content):
            if re.match(r"[a-z]+:", href):
                continue
            file, _, anchor = href.partition("#")
            target = (page.parent / file).resolve() if file else page
            if not target.exists() or (anchor and target in text and f'id="{anchor}"' not in text[target]):
                broken.append(f"{page.relative_to(out)}: {href}")
    assert broken == []


def test_preview_pictures_are_there(pages):
    "Every picture lies in the page or beside it. Mutation: the folder of pictures is not copied."
    out, _ = pages
    found = [(page, src) for page in out.rglob("*.html")
             for src in re.findall(r'<img[^>]*? src="([^"]+)"', page.read_text())]
    beside = [(page, src) for page, src in found if not src.startswith("data:")]
    assert beside and all((page.parent / src).exists() for page, src in beside), beside


def test_preview_needs_no_network(pages):
    "Nothing is loaded from elsewhere: no script, style, font or picture; mathematics is MathML."
    out, _ = pages
    loaded = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=["'](?:https?:)?//""")
    for page in out.rglob("*.html"):
        assert not loaded.search(page.read_text()), page.name
    assert "url(" not in (out / "style.css").read_text() and "@import" not in (out / "style.css").read_text()
    masks = (out / "01_foundations" / "01_masks.html").read_text()
    assert (
        "<math" in masks
        and 'id="eq-misgan-03"' in masks
        and "$$" not in re.sub(r"<pre.*?</pre>", "", masks, flags=re.S)
    )
    assert loaded.search('<script src="https://cdn.example.org/x.js">')  # the check can fail


def fake_quarto(folder: Path, body: str) -> str:
    "A stand-in for Quarto's program."
    program = folder / "quarto"
    program.write_text(f"#!{sys.executable}\n{body}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_quarto_is_used_where_it_is(clone, tmp_path, monkeypatch):
    body = (
        "import pathlib, sys\n"
        "assert sys.argv[1:] == ['render'] and pathlib.Path('_quarto.yml').exists()\n"
        "pathlib.Path('_site').mkdir()\n"
        "pathlib.Path('_site/index.html').write_text('from Quarto')\n"
    )
    monkeypatch.setattr(site, "find_quarto", lambda install=False: fake_quarto(tmp_path, body))
    page, how = build_site(clone)
    assert page.read_text() == "from Quarto" and "Quarto" in how and "preview" not in how


def test_failing_quarto_leaves_the_old_site(clone, tmp_path, monkeypatch):
    (clone / "_site").mkdir(exist_ok=True)
    (clone / "_site" / "index.html").write_text("old")
    body = "print('ERROR: no such filter'); raise SystemExit(1)"
    monkeypatch.setattr(site, "find_quarto", lambda install=False: fake_quarto(tmp_path, body))
    with pytest.raises(RuntimeError, match="no such filter"):
        build_site(clone)
    assert (clone / "_site" / "index.html").read_text() == "old"


def test_refused_quarto_is_asked_for_once(tmp_path, monkeypatch):
    calls = []

    def refuse(command, **options):
        calls.append(command)
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(site.shutil, "which", lambda *a, **k: None)
    monkeypatch.setattr(site.subprocess, "run", refuse)
    assert find_quarto() is None and calls == []
    assert find_quarto(install=True) is None and find_quarto(install=True) is None
    assert len(calls) == 1 and calls[0][-1] == "quarto-cli"


def test_undefined_label_stops_the_build(clone, monkeypatch):
    monkeypatch.setattr(site, "find_quarto", lambda install=False: None)
    monkeypatch.setattr(site, "preview", lambda folder, out: ["fig-nowhere"])
    with pytest.raises(RuntimeError, match="fig-nowhere"):
        build_site(clone)
