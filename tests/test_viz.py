"""The doors of `foundations.viz`, and mutations that its main claims must not survive.

The suite's import hook checks shapes before any door of ours is reached, so a second, unhooked copy is tested here."""

import importlib.util
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

SOURCE = ROOT / "missingbook" / "foundations" / "viz.py"


def module(*replace: tuple[str, str]):
    "viz without the shape hook, with lines of its source replaced."
    spec = importlib.util.spec_from_file_location("viz_plain", SOURCE)
    made = importlib.util.module_from_spec(spec)
    text = SOURCE.read_text()
    for old, new in replace:
        assert text.count(old) == 1, f"{old!r} is not there once: the mutation is out of date"
        text = text.replace(old, new)
    sys.modules["viz_plain"] = made  # dataclasses look their module up
    exec(compile(text, str(SOURCE), "exec"), made.__dict__)
    return made


VIZ = module()
PAINTED = "torch.where(observed[:, None], rgb, paint)"


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def pictures(n=3, channels=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, 5, 4, generator=generator)
    return x, torch.rand(n, 5, 4, generator=generator) < 0.5


# --- pictures


def no_peek(viz):
    "What lies behind a hole has no influence on `paint_missing`, and what was seen is shown."
    x, observed = pictures()
    for junk in (torch.nan, 7.0, 0.0):
        other = torch.where(observed[:, None], x, torch.full_like(x, junk))
        assert torch.equal(viz.paint_missing(x, observed), viz.paint_missing(other, observed))
    shown = viz.paint_missing(x, observed).movedim(1, -1)
    assert torch.equal(shown[observed], x.expand(-1, 3, -1, -1).movedim(1, -1)[observed])
    paint = torch.tensor(matplotlib.colors.to_rgb(viz.COLOURS["missing"]))
    assert torch.allclose(shown[~observed], paint)


def test_no_peek():
    no_peek(VIZ)


@pytest.mark.parametrize(
    "paint",
    ["rgb, 0.7 * paint + 0.3 * rgb", "rgb, rgb", "paint, rgb"],
    ids=["shimmers through", "not painted", "flipped"],
)
def test_a_peeking_paint_is_caught(paint):
    with pytest.raises(AssertionError):
        no_peek(module((PAINTED, PAINTED.replace("rgb, paint", paint))))


@pytest.mark.parametrize("function", ["paint_missing", "signed_error"])
def test_doors_of_single_pictures(function):
    x, observed = pictures()
    second = observed if function == "paint_missing" else x
    call = getattr(VIZ, function)
    call(x, second)
    with pytest.raises(TypeError, match=r"floats in \[0, 1\]"):
        call(x.mul(255).byte(), second)
    for wrong in (second[:1], second[..., :1]):
        with pytest.raises(ValueError, match="must have shape"):
            call(x, wrong)


def test_signed_error_keeps_its_sign():
    x, _ = pictures()
    assert torch.allclose(VIZ.signed_error(x, x + 0.25), torch.tensor(0.25))
    assert torch.allclose(VIZ.signed_error(x, x - 0.25), torch.tensor(-0.25))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_takes_floats_and_bytes(channels):
    x, observed = pictures(channels=channels)
    fig = VIZ.image_grid(x, observed, x, draws=torch.stack([x, x]), n=2)
    assert len(fig.axes) == 7 * 2 + 2  # truth, seen, imputed, two draws, spread, error; two bars
    raw = x.mul(255).byte()
    VIZ.image_grid(raw, observed[:, None].expand(-1, channels, -1, -1), raw, n=1)
    VIZ.image_grid(None, observed, x, n=1)


X, SEEN = pictures()
HOLED = torch.where(SEEN[:, None], X, torch.full_like(X, torch.nan))
WRONG = {
    "imputed in bytes' range": (dict(imputed=X * 255), "imputed runs from"),
    "truth in bytes' range": (dict(truth=X * 255), "truth runs from"),
    "draws in bytes' range": (dict(draws=X[None] * 255), "draws runs from"),
    "NaN behind the holes of truth": (dict(truth=HOLED), "truth=None"),
    "NaN in imputed": (dict(imputed=HOLED), "completed pictures"),
    "one mask for three pictures": (dict(observed=SEEN[:1]), "observed must have shape"),
    "channels disagree": (dict(imputed=X.expand(-1, 3, -1, -1)), "truth must have shape"),
    "two channels": (dict(imputed=X.expand(-1, 2, -1, -1)), "1 or 3"),
    "other draws": (dict(draws=X[None, :1]), "draws must have shape"),
    "no draws": (dict(draws=X[None][:0]), "draws must have shape"),
    "no pictures": (dict(truth=X[:0], observed=SEEN[:0], imputed=X[:0]), "must have shape"),
    "n of 0": (dict(n=0), "n=0"),
    "n of -1": (dict(n=-1), "n=-1"),
    "a raw reconstruction": (dict(imputed=1 - X), "put the seen values back"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_doors_of_the_grid(change, message):
    with pytest.raises(ValueError, match=message):
        VIZ.image_grid(**(dict(truth=X, observed=SEEN, imputed=X) | change))


# --- tables


def labels(fig):
    fig.canvas.draw()
    top = fig.axes[0].child_axes[0]
    return [t.get_text() for t in fig.axes[0].get_xticklabels()], [t.get_text() for t in top.get_xticklabels()]


def test_one_hole_in_many_rows_shows():
    table = pd.DataFrame({"a": np.ones(20_000), "b": np.full(20_000, np.nan), "c": np.ones(20_000)})
    table.loc[7, "a"], table.loc[7, "b"] = np.nan, 1.0
    fig = VIZ.missing_map(table)
    assert labels(fig)[1] == ["<1", ">99", "0"]
    shown = fig.axes[0].images[0].get_array()
    assert shown[0, 0] >= 0.2 and shown[1:, 0].max() == 0 and shown[:, 2].max() == 0


def test_booleans_are_data_unless_said_otherwise():
    answers = pd.DataFrame({"smokes": [True, False, False]})
    assert VIZ.missing_map(answers).axes[0].images[0].get_array().max() == 0
    assert VIZ.missing_map(answers, observed=True).axes[0].images[0].get_array().ravel().tolist() == [0, 1, 1]
    assert VIZ.missing_map(answers.to_numpy(), observed=True).axes[0].images[0].get_array().max() == 1
    with pytest.raises(ValueError, match="observed=True"):
        VIZ.missing_map(answers.astype(float), observed=True)


def test_names_are_letters():
    names = ["price in $", "$x$", "$$", "a_{", "x" * 200]
    shown, _ = labels(VIZ.missing_map(pd.DataFrame(np.ones((1, 5)), columns=names)))
    assert shown == [*names[:4], "x" * 23 + "…"]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_table_is_refused(shape):
    with pytest.raises(ValueError, match="nothing to draw"):
        VIZ.missing_map(pd.DataFrame(np.ones(shape)))


# --- ours beside published


def compares(viz):
    "The difference is ours − published; verdicts follow the bound and need both spreads."
    ours = {"up": [0.52, 0.54], "near": [0.50, 0.52], "fixed": [0.41236] * 2, "far": [0.414] * 2, "few": [0.3, 0.4]}
    published = {"up": (0.40, 0.01), "near": (0.54, 0.01), "fixed": (0.412, 0.0), "far": (0.412, 0.0), "few": 0.1}
    table = viz.comparison_table(ours, published)
    expected = [0.13, -0.03, 0.00036, 0.002, 0.25]
    np.testing.assert_allclose(table["difference"], expected, atol=1e-9)
    assert table["within_2sd"].tolist()[:4] == [False, True, True, False] and pd.isna(table.loc["few", "within_2sd"])
    assert viz.comparison_table(ours, published, text=True)["difference"].tolist()[:2] == ["+0.130", "−0.030"]


def test_comparison():
    compares(VIZ)


@pytest.mark.parametrize(
    "old, new",
    [
        ('left["value"] - right["value"]', 'right["value"] - left["value"]'),
        ("difference.abs() <= bound", "difference.abs() > bound"),
        ("+ rounding + 1e-12", "+ 1e-12"),
        ("difference.isna() | bound.isna()", "difference.isna()"),
        ("bound = 2 * np.hypot", "bound = np.hypot"),
        ('shown.replace("-", "−") if float(shown)', 'shown.replace("-", "+") if float(shown)'),
    ],
    ids=["sign", "verdict", "rounding", "unknown spread", "one sd", "sign in text"],
)
def test_a_wrong_comparison_is_caught(old, new):
    with pytest.raises(AssertionError):
        compares(module((old, new)))


@pytest.mark.parametrize("difference", [0.1 + 0.2 - 0.3, 0.3 - (0.1 + 0.2), 0.0, 2e-4, -2e-4])
def test_zero_has_no_sign(difference):
    shown = VIZ.comparison_table({"a": [0.3 + difference, 0.3 + difference]}, {"a": (0.3, 0.0)}, text=True)
    assert shown.loc["a", ["difference", "within 2 sd"]].tolist() == ["0.000", "yes"]


@pytest.mark.parametrize(
    "ours, message",
    [
        ({"a": (0.111, 0.001)}, "runs as a list"),
        (pd.DataFrame({"value": [0.1], "std": [-0.1]}), "negative sd"),
        (pd.DataFrame({"value": [0.1], "std": [np.inf]}), "infinite"),
        (pd.DataFrame({"value": [0.1], "sd": [0.1]}), "'sd'"),
        (pd.DataFrame({"std": [0.1]}), "needs a column 'value'"),
        (pd.DataFrame({"value": [0.1, 0.2]}, index=["a", "a"]), "twice"),
        ({"a": []}, "one run or more"),
    ],
)
def test_doors_of_the_comparison(ours, message):
    with pytest.raises(ValueError, match=message):
        VIZ.comparison_table(ours, {"a": 0.1})
    if isinstance(ours, pd.DataFrame):
        with pytest.raises(ValueError, match=message):
            VIZ.comparison_table({"a": 0.1}, ours)


def test_an_empty_slider_is_refused():
    with pytest.raises(ValueError, match="give one each"):
        VIZ.frame_slider([], [], "title", "alt")
