"""Write what `missingbook impute` prints on a file of forty mixed columns into README.md: python tests/write_readme.py

The file is made from UCI's Online News Popularity, whose dummies of weekday and channel are
folded back into words, the shares cut into three ordered levels, and a tenth of the cells emptied."""

import re
import tempfile
from pathlib import Path

import pandas as pd
from typer.testing import CliRunner

from missingbook.foundations.data import load
from missingbook.foundations.mechanisms import hide, mcar
from missingbook.practice.cli import app

README = Path(__file__).resolve().parents[1] / "README.md"
COMMAND = 'missingbook impute news.csv -o news_filled.csv --ordered "shares=few<some<many"'
MARKS = ("<!-- transcript: python tests/write_readme.py -->\n", "<!-- end of the transcript -->")


def unfold(frame: pd.DataFrame, prefix: str, none: str) -> pd.Series:
    "One column of words from the dummies that begin with `prefix`."
    dummies = frame.loc[:, [c for c in frame if c.startswith(prefix)]].astype(float)
    return dummies.idxmax(axis=1).str.removeprefix(prefix).where(dummies.any(axis=1), none)


def news() -> pd.DataFrame:
    "A thousand articles, forty columns of five kinds, a tenth of the cells empty (never an article's number)."
    frame = load("news_popularity_subset").frame[:1000].reset_index(drop=True)
    numbers = frame[[c for c in frame if "_is_" not in c and c not in ("is_weekend", "shares", "timedelta")]]
    words = pd.DataFrame({
        "weekday": unfold(frame, "weekday_is_", "none"), "channel": unfold(frame, "data_channel_is_", "none"),
        "weekend": frame["is_weekend"].astype(float).map({0.0: "no", 1.0: "yes"}),
        "shares": pd.qcut(frame["shares"], 3, labels=["few", "some", "many"]).astype(str)})
    table = pd.concat([words, numbers.iloc[:, :35]], axis=1)
    holes = hide(table, mcar(table, rate=0.1, random_state=0))
    holes.insert(0, "article", [f"A{i:05d}" for i in range(len(holes))])
    return holes


def transcript() -> str:
    "What the command prints."
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "news.csv", Path(folder) / "news_filled.csv"
        news().to_csv(source, index=False)
        words = ["impute", str(source), "-o", str(target), "--ordered", "shares=few<some<many"]
        result = CliRunner().invoke(app, words)
        filled = pd.read_csv(target)
    if result.exit_code or filled.isna().to_numpy().any():
        raise RuntimeError(result.output)
    return "\n".join(line.rstrip() for line in result.output.splitlines())


def block(text: str) -> str:
    "The transcript as it stands in README.md."
    return f"{MARKS[0]}```text\n$ {COMMAND}\n{text}\n```\n{MARKS[1]}"


if __name__ == "__main__":
    readme = README.read_text(encoding="utf-8")
    start, stop = map(re.escape, MARKS)
    README.write_text(re.sub(f"{start}.*{stop}", lambda _: block(transcript()), readme, flags=re.S), encoding="utf-8")
