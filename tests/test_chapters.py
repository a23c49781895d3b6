"Every chapter runs at the scale `fast`, in a fresh kernel, with a limit on every cell."

import pytest
from conftest import ROOT

from missingbook.practice.runner import chapters, run_chapter

CHAPTERS = [p for p in chapters(ROOT) if "solutions" not in p.parts]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix())
def test_chapter(path):
    result = run_chapter(path, ROOT, scale="fast", timeout=120)
    assert result.error is None, result.error
