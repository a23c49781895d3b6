"""Metrics: hidden cells alone count, known values, agreement with torchmetrics and SciPy, clear errors; mutations."""

import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import torchmetrics.functional.image
from sklearn.datasets import load_diabetes, load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from missingbook.foundations import metrics
from missingbook.foundations.data import load, results_folder
from missingbook.foundations.metrics import (
    LeNet,
    accuracy,
    congeniality,
    energy_distance,
    feature_moments,
    feature_network,
    fid,
    flip_and_shift,
    frechet_distance,
    interval_coverage,
    interval_width,
    nrmse,
    pfc,
    post_imputation_score,
    psnr,
    resnet18,
    rmse,
    scc,
    ssim,
    table_scores,
    train_classifier,
    unit_features,
)


def numbers(seed=0):
    """(truth, imputed, heldout): the diabetes table with noise in 30% of its cells."""
    rng = np.random.default_rng(seed)
    truth = load_diabetes(scaled=False).data
    held = rng.random(truth.shape) < 0.3
    return truth, np.where(held, truth + rng.normal(0, 1, truth.shape), truth), held


def mixed():
    """(truth, imputed, heldout) with every kind of column, nullable dtypes included."""
    bunch, rng = load_iris(as_frame=True), np.random.default_rng(1)
    frame = bunch.data.iloc[:, :2].copy()
    frame["count"] = np.round(bunch.data.iloc[:, 2] * 10).astype("Int64")
    frame["species"] = pd.Categorical(np.array(["setosa", "versicolor", "virginica"])[bunch.target])
    frame["size"] = pd.Categorical(np.array(["s", "m"])[bunch.target // 2], ["s", "m"], ordered=True)
    frame["wide"] = (bunch.data.iloc[:, 1] > 3).astype("boolean")
    frame["seen_on"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(150), "D")
    frame.index = [f"row {i}" for i in range(150)]
    held = pd.DataFrame(rng.random(frame.shape) < 0.3, frame.index, frame.columns)
    other = frame.iloc[rng.permutation(150)].set_axis(frame.index)
    imputed = frame.copy()
    for column in frame.columns[:-1]:
        imputed[column] = frame[column].where(~held[column], other[column])
    imputed["seen_on"] = frame["seen_on"].where(~held["seen_on"])  # an imputer leaves dates alone
    return frame, imputed, held


@pytest.fixture(scope="module")
def digits():
    sample = load("mnist-sample", split="test")
    return sample.x, sample.y


@pytest.fixture(scope="module")
def lenet():
    return feature_network()


# --- hidden cells, and they alone ------------------------------------------------------------------------------------


def check_only_hidden_cells_count():
    truth, imputed, held = numbers()
    junk = np.where(held, imputed, 1e6)
    for score in (rmse, nrmse, pfc):
        assert score(truth, junk, held) == score(truth, imputed, held)
    assert np.isclose(rmse(truth, imputed, held), np.sqrt(((imputed - truth)[held] ** 2).mean()), rtol=1e-12)


def test_only_hidden_cells_count(monkeypatch):
    check_only_hidden_cells_count()
    monkeypatch.setattr(metrics, "_flags", lambda heldout, shape: np.ones(shape, dtype=bool))  # seen cells counted too
    with pytest.raises(AssertionError):
        check_only_hidden_cells_count()


def check_only_hidden_pixels_count(digits):
    truth = digits[0][:6].float() / 255
    held = torch.zeros(6, 28, 28, dtype=torch.bool)
    held[:, 5:20, 3:] = True
    imputed = torch.where(held[:, None], 0.9 * truth, truth)
    for score in (psnr, ssim):
        assert score(truth, torch.where(held[:, None], imputed, 1 - truth), held) == score(truth, imputed, held)
    worst = psnr(truth, imputed, held, reduction="none")
    by_hand = [-20 * math.log10(rmse(truth[i : i + 1], imputed[i : i + 1], held[i : i + 1])) for i in range(6)]
    assert np.allclose(worst, by_hand, atol=1e-3)


def test_only_hidden_pixels_count(monkeypatch, digits):
    check_only_hidden_pixels_count(digits)
    real = metrics._hidden_pair
    monkeypatch.setattr(metrics, "_hidden_pair", lambda t, z, h: (*real(t, z, None)[:2], real(t, z, h)[2]))
    with pytest.raises(AssertionError):  # seen pixels left as they came
        check_only_hidden_pixels_count(digits)
    monkeypatch.setattr(metrics, "_hidden_pair", lambda t, z, h: (*real(t, z, h)[:2], None))
    with pytest.raises(AssertionError):  # the divisor is that of the whole picture
        check_only_hidden_pixels_count(digits)


def test_pictures_as_bytes_floats_and_channels(digits):
    x = digits[0][:4].expand(4, 3, 28, 28).contiguous()
    z, held = (x // 2), torch.zeros(4, 28, 28, dtype=torch.bool)
    held[:, :14] = True
    wide = held[:, None].expand(4, 3, 28, 28)
    for score in (psnr, ssim, rmse):
        assert score(x, z, held) == score(x, z, wide)
    assert np.isclose(psnr(x, z), psnr(x.float() / 255, z.double() / 255), atol=1e-4)
    assert math.isinf(psnr(x, x)) and np.isclose(ssim(x, x), 1)
    direct = structural_similarity_index_measure(z.float() / 255, x.float() / 255, data_range=1.0)
    assert np.isclose(ssim(x, z), float(direct), atol=1e-6)
    assert ssim(x, z, reduction="none").shape == (4,)


# --- normalizations --------------------------------------------------------------------------------------------------


def check_normalization():
    truth, imputed, held = numbers()
    by_hand = [np.sqrt(((imputed - truth)[h, j] ** 2).mean()) / truth[:, j].std() for j, h in enumerate(held.T)]
    assert np.isclose(nrmse(truth, imputed, held), np.mean(by_hand), rtol=1e-12)
    none = held.copy()
    none[:, 3:] = False  # columns without a hidden cell do not count
    assert np.isclose(nrmse(truth, imputed, none), np.mean(by_hand[:3]), rtol=1e-12)


def test_normalization_is_that_of_all_true_rows(monkeypatch):
    check_normalization()
    hidden_only = lambda t, held, frame: np.array([t[h, j].std() if h.any() else 1 for j, h in enumerate(held.T)])  # noqa: E731
    sample_sd = lambda t, held, frame: t.std(0, ddof=1)  # noqa: E731
    for mutant in (hidden_only, sample_sd):
        monkeypatch.setattr(metrics, "_spread", mutant)
        with pytest.raises(AssertionError):
            check_normalization()


def test_really_missing_cells_do_not_disturb_the_scale():
    truth, imputed, held = numbers()
    truth[np.argwhere(~held)[0][0], np.argwhere(~held)[0][1]] = np.nan  # nobody knows this one; it is not scored
    assert np.isfinite(nrmse(truth, imputed, held))


def test_table_scores_agree_with_the_others():
    truth, imputed, held = mixed()
    scores = table_scores(truth, imputed, held)
    assert list(scores.index) == list(truth.columns)
    assert list(scores.columns) == ["kind", "n", "rmse", "nrmse", "r2", "pfc"]
    assert list(scores["kind"]) == ["number"] * 3 + ["category", "ordered", "boolean", "date"]
    plain = truth.columns[:3], truth.columns[3:6]
    assert np.isclose(scores.loc[plain[0], "nrmse"].mean(), nrmse(truth[plain[0]], imputed[plain[0]], held[plain[0]]))
    assert np.isclose(scores.loc[plain[1], "pfc"].mean(), pfc(truth[plain[1]], imputed[plain[1]], held[plain[1]]))
    assert scores.loc["seen_on", "n"] == 0 and scores.loc["seen_on", ["rmse", "pfc"]].isna().all()
    errors = (imputed["count"].astype(float) - truth["count"].astype(float))[held["count"]]
    known = truth.loc[held["count"], "count"].astype(float)
    assert np.isclose(scores.loc["count", "r2"], 1 - (errors**2).sum() / ((known - known.mean()) ** 2).sum())
    assert table_scores(truth, imputed, held.astype("boolean")).equals(scores)
    assert table_scores(truth, imputed, held.to_numpy()).equals(scores)
    recast = table_scores(truth, imputed, held, kinds={"count": "category"})
    assert recast.loc["count", "kind"] == "category" and 0 < recast.loc["count", "pfc"] <= 1


def test_pfc_takes_strings_arrays_and_vectors():
    assert pfc(np.array(["a", "b", "a"]), np.array(["a", "a", "b"]), np.array([True, True, False])) == 0.5
    truth = pd.DataFrame({"a": ["x", None, "y"], "b": [1, 2, 3]})
    imputed = pd.DataFrame({"a": ["y", "x", "y"], "b": [1, 2, 4]})
    held = pd.DataFrame({"a": [True, False, True], "b": [False, False, True]})
    assert pfc(truth, imputed, held) == (0.5 + 1.0) / 2


# --- energy distance -------------------------------------------------------------------------------------------------


def check_energy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(70, 1)), rng.exponential(size=(50, 1))
    assert np.isclose(energy_distance(a, b), scipy.stats.energy_distance(a[:, 0], b[:, 0]) ** 2, rtol=1e-10)
    a, b = rng.normal(size=(200, 20, 3))[:, :10], rng.normal(size=(200, 20, 3))
    null = [energy_distance(x, y, unbiased=True) for x, y in zip(a, b)]
    assert abs(np.mean(null)) < 4 * np.std(null) / np.sqrt(200)
    assert energy_distance(np.zeros((3, 2)), np.ones((5, 2))) == pytest.approx(2 * math.sqrt(2))


def test_energy_distance(monkeypatch):
    check_energy()
    real = metrics._sum_of_distances
    squared = lambda x, y, cells: float(metrics.cdist(x, y, "sqeuclidean").sum())  # noqa: E731  a distance of means only
    first_chunk = lambda x, y, cells: real(x[: len(x) // 2], y, cells)  # noqa: E731
    for mutant in (squared, first_chunk):
        monkeypatch.setattr(metrics, "_sum_of_distances", mutant)
        with pytest.raises(AssertionError):
            check_energy()


def test_energy_distance_in_bounded_memory(monkeypatch):
    sizes, real = [], metrics.cdist
    monkeypatch.setattr(metrics, "cdist", lambda x, y: sizes.append(len(x) * len(y)) or real(x, y))
    a, b = np.random.default_rng(0).normal(size=(2, 300, 2))
    small = energy_distance(a, b, max_cells=1000)
    assert max(sizes) <= 1000
    assert np.isclose(small, energy_distance(a, b), rtol=1e-12)
    assert energy_distance(pd.DataFrame(a), pd.DataFrame(b)) == energy_distance(a, b)
    assert energy_distance(a, a) == pytest.approx(0, abs=1e-12) and energy_distance(a, a, unbiased=True) < 0


# --- downstream ------------------------------------------------------------------------------------------------------


def test_congeniality_by_hand():
    truth, imputed, _ = numbers()
    y = load_diabetes().target
    scaled = [(t - truth.mean(0)) / truth.std(0) for t in (truth, imputed)]
    coefs = [LinearRegression().fit(t, y).coef_ for t in scaled]
    assert np.isclose(congeniality(truth, imputed, y), np.linalg.norm(coefs[1] - coefs[0]), rtol=1e-6)
    classes = np.digitize(y, [100, 200])
    coefs = [LogisticRegression(max_iter=5000).fit(t, classes).coef_ for t in scaled]
    assert np.isclose(congeniality(truth, imputed, classes), np.linalg.norm(coefs[1] - coefs[0]), rtol=1e-3)
    assert congeniality(truth, truth, pd.Series(classes.astype(str))) == 0
    raw = congeniality(truth, imputed, y, standardize=False)
    coefs = [LinearRegression().fit(t, y).coef_ for t in (truth, imputed)]
    assert np.isclose(raw, np.linalg.norm(coefs[1] - coefs[0]), rtol=1e-6)


def check_draws_are_combined():
    x, y = np.linspace(0, 1, 40)[:, None], np.linspace(0, 1, 40)
    shifts = np.stack([x + 0.5, x - 0.5])  # two draws of the test rows: their mean is right, each alone is not
    assert post_imputation_score(x, y, shifts, y) == pytest.approx(1)
    assert post_imputation_score(x, y, shifts[0], y) < 0
    vote = np.stack([1 - x, x, x])
    labels = np.where(y > 0.5, "yes", "no")
    assert post_imputation_score(x, labels, vote, labels) > 0.95
    noisy = np.stack([x, 1 - x])  # training on both draws: the slope cancels
    assert abs(post_imputation_score(noisy, y, x, y)) < 0.1


def test_draws_are_combined(monkeypatch):
    check_draws_are_combined()
    monkeypatch.setattr(metrics, "_combine", lambda predictions, classes: predictions[0])
    with pytest.raises(AssertionError):
        check_draws_are_combined()
    monkeypatch.undo()
    real = metrics._draw_list
    monkeypatch.setattr(metrics, "_draw_list", lambda X, rows, name: real(X, rows, name)[: 1 if "train" in name else 9])
    with pytest.raises(AssertionError):
        check_draws_are_combined()


def test_post_imputation_takes_frames_and_categories():
    truth, imputed, _ = mixed()
    X, y = truth[["sepal length (cm)", "size", "wide"]], truth["species"].astype(str)
    one = post_imputation_score(X[::2], y[::2], X[1::2], y[1::2])
    many = post_imputation_score([X[::2]] * 3, y[::2], [X[1::2]] * 3, y[1::2])
    assert 0.6 < one <= 1 and abs(one - many) < 0.1
    count = truth["count"].astype("int64")
    with pytest.raises(ValueError, match="more than 20 values"):
        post_imputation_score(X[::2], count[::2], X[1::2], count[1::2])
    assert post_imputation_score(X[::2], count[::2], X[1::2], count[1::2], task="regression") > 0.5


# --- intervals -------------------------------------------------------------------------------------------------------


def check_coverage_by_enumeration():
    orders = np.array(list(itertools.permutations(range(6))), dtype=float)
    draws, truth = orders.T[:5, :, None], orders.T[5][:, None]
    everywhere = np.ones(truth.shape, dtype=bool)
    for k in (1, 2):
        level = (6 - 2 * k) / 6
        assert interval_coverage(draws, truth, everywhere, level=level) == pytest.approx(level)


def test_coverage_by_enumeration(monkeypatch):
    check_coverage_by_enumeration()
    linear = lambda d, level: np.quantile(d, [(1 - level) / 2, (1 + level) / 2], axis=0)  # noqa: E731
    one_sided = lambda d, level: np.quantile(d, [0, level], axis=0, method="weibull")  # noqa: E731
    for mutant in (linear, one_sided):
        monkeypatch.setattr(metrics, "_interval", mutant)
        with pytest.raises(AssertionError):
            check_coverage_by_enumeration()


@pytest.mark.parametrize("m", [39, 79, 199, 399])
def test_a_truth_that_equals_the_end_is_covered(m):
    """Rounded values tie: (1 − 0.95)/2 in floating point must not move the end by the last digit."""
    draws, k = np.arange(1.0, m + 1)[:, None, None], (m + 1) // 40
    for end, inside in ((k, 1), (m + 1 - k, 1), (k - 1, 0), (m + 2 - k, 0)):
        assert interval_coverage(draws, np.array([[float(end)]]), np.array([[True]])) == inside


def test_width_is_in_standard_deviations():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(2000, 2)) * [1, 100]
    draws = rng.normal(size=(399, 2000, 2)) * [1, 100]
    held = rng.random(truth.shape) < 0.5
    assert interval_width(draws, truth, held) == pytest.approx(3.92, abs=0.1)
    assert interval_coverage(draws, truth, held) == pytest.approx(0.95, abs=0.015)
    assert interval_width(draws, truth, held, level=0.5) == pytest.approx(1.349, abs=0.05)


def test_intervals_of_frames_use_the_numbers():
    truth, _, held = mixed()
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(39):
        drawn = truth.copy()
        drawn.iloc[:, :2] = truth.iloc[:, :2] + rng.normal(0, 1, (150, 2))
        drawn["count"] = truth["count"] + rng.integers(-5, 6, 150)
        draws.append(drawn)
    columns = list(truth.columns[:3])
    arrays = np.stack([d[columns].astype(float).to_numpy() for d in draws])
    plain = truth[columns].astype(float).to_numpy(), held[columns].to_numpy()
    assert interval_coverage(draws, truth, held) == interval_coverage(arrays, *plain)
    assert interval_width(draws, truth, held) == pytest.approx(interval_width(arrays, *plain))


def test_level_that_the_draws_cannot_reach():
    truth, held = np.zeros((3, 1)), np.ones((3, 1), dtype=bool)
    with pytest.raises(ValueError, match=r"38 draws .* ask sample for 39"):
        interval_coverage(np.zeros((38, 3, 1)), truth, held)
    assert interval_coverage(np.zeros((39, 3, 1)), truth, held) == 1
    with pytest.raises(ValueError, match=r"use one in \(0, 1\)"):
        interval_coverage(np.zeros((39, 3, 1)), truth, held, level=95.0)


# --- Fréchet distance and FID ----------------------------------------------------------------------------------------


def gaussians(d, rank, seed):
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(2, d, generator=g, dtype=torch.float64)
    factors = torch.randn(2, d, rank, generator=g, dtype=torch.float64)
    return means[0], factors[0] @ factors[0].mT / rank, means[1], factors[1] @ factors[1].mT / rank


def by_product(mean_a, cov_a, mean_b, cov_b):
    cross = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def check_frechet():
    for d, rank in ((2, 5), (50, 100), (50, 20)):
        moments = gaussians(d, rank, d + rank)
        assert frechet_distance(*moments) == pytest.approx(by_product(*moments), abs=1e-4)
        assert frechet_distance(*moments[:2], *moments[:2]) < 1e-9
        assert frechet_distance(*moments) == pytest.approx(frechet_distance(*moments[2:], *moments[:2]), rel=1e-9)
    s, t = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 0.0, 1e-12])
    closed = float((s.double().sqrt() - t.double().sqrt()).square().sum())
    zero = torch.zeros(3)
    assert frechet_distance(zero, torch.diag(s), zero, torch.diag(t)) == pytest.approx(closed, rel=1e-6)
    one = torch.ones(1)
    assert frechet_distance(3 * one, one[None] * 4, one, one[None] * 25) == pytest.approx(4 + 9)


def test_frechet(monkeypatch):
    check_frechet()
    cholesky = lambda cov, name: torch.linalg.cholesky(cov + 1e-9 * torch.eye(len(cov)))  # noqa: E731  not symmetric
    no_root = lambda cov, name: cov  # noqa: E731
    for mutant in (cholesky, no_root):
        monkeypatch.setattr(metrics, "_symmetric_root", mutant)
        with pytest.raises(AssertionError):
            check_frechet()


@pytest.mark.parametrize("change", [lambda c: -c, lambda c: c.triu(), lambda c: c * torch.nan])
def test_frechet_refuses_what_is_no_covariance(change):
    mean_a, cov_a, mean_b, cov_b = gaussians(4, 9, 0)
    with pytest.raises(ValueError, match="covariance"):
        frechet_distance(mean_a, cov_a, mean_b, change(cov_b))


def test_fid_against_torchmetrics(digits, lenet):
    class Wrapped(torch.nn.Module):
        num_features = 50

        def forward(self, x):
            return lenet.features(x / 255)

    x, z = digits[0], digits[0].roll(2, -1)
    theirs = FrechetInceptionDistance(feature=Wrapped(), input_img_size=(1, 28, 28)).set_dtype(torch.float64)
    theirs.update(x, real=True)
    theirs.update(z, real=False)
    assert fid(x, z) == pytest.approx(float(theirs.compute()), rel=1e-4)
    assert fid(x, z, batch_size=17) == pytest.approx(fid(x, z), rel=1e-6)
    assert fid(x[:5], z[:5]) > 0  # four dimensions out of fifty: singular, and survives
    assert fid(x.float() / 255, z) == pytest.approx(fid(x, z), rel=1e-5)


def check_scc(digits, lenet):
    x, y = digits
    worse = x.roll(6, -1)
    ratio = accuracy(lenet, worse, y) / accuracy(lenet, x, y)
    assert 0.2 < ratio < 0.98
    assert scc(x, worse, y) == pytest.approx(ratio) and scc(worse, x, y) == 1 == scc(x, x, y)


def test_scc(monkeypatch, digits, lenet):
    check_scc(digits, lenet)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "accuracy", lambda network, x, y, batch: accuracy(network, x, y) ** 0.5)
        with pytest.raises(AssertionError):
            check_scc(digits, lenet)
    with pytest.raises(ValueError, match="no true picture right"):
        scc(digits[0][:9], digits[0][:9], torch.full((9,), 77))


# --- the networks ----------------------------------------------------------------------------------------------------


def test_shipped_weights_are_those_of_the_record(lenet, digits):
    path = Path(metrics.__file__).parents[1] / "_data" / "lenet_mnist.safetensors"
    record = json.loads((results_folder() / "lenet.json").read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"] == metrics._WEIGHTS["lenet"][1]
    assert path.stat().st_size == record["bytes"] < 400_000 and record["test_accuracy"] >= 0.99
    assert accuracy(lenet, *digits) > 0.985
    assert sum(p.numel() for p in lenet.parameters()) == 21_840


def test_shipped_network_on_all_test_digits(lenet):
    if not (Path(os.environ.get("MISSINGBOOK_DATA", "/nowhere")) / "mnist").is_dir():
        pytest.skip("complete MNIST is not here (MISSINGBOOK_DATA)")
    test, record = load("mnist", split="test"), json.loads((results_folder() / "lenet.json").read_text())
    assert accuracy(lenet, test.x, test.y) == pytest.approx(record["test_accuracy"], abs=3e-4)


def test_weights_that_were_changed_are_refused(monkeypatch, tmp_path):
    real = Path(metrics.__file__).parents[1] / "_data" / "lenet_mnist.safetensors"
    (tmp_path / "_data").mkdir()
    monkeypatch.setattr(metrics, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="install the package again"):
        feature_network()
    content = bytearray(real.read_bytes())
    content[-1] ^= 1
    (tmp_path / "_data" / real.name).write_bytes(content)
    with pytest.raises(ValueError, match="has SHA-256 .* not"):
        feature_network()
    with pytest.raises(ValueError, match="no feature network 'resnet18'.*lenet"):
        feature_network("resnet18")


def test_training_follows_its_generator_and_no_other(digits):
    x, y = digits[0][::5], digits[1][::5]

    def trained(seed):
        generator = torch.Generator().manual_seed(seed)
        network = LeNet(generator=generator)
        train_classifier(network, x, y, epochs=1, batch_size=50, generator=generator)
        return torch.cat([p.flatten() for p in network.parameters()])

    state = torch.random.get_rng_state()
    first = trained(0)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random numbers are left alone
    torch.rand(3)
    assert torch.equal(first, trained(0)) and not torch.equal(first, trained(1))


def test_training_learns_and_finds_a_bad_loss(digits):
    x, y = digits[0], digits[1]
    network = LeNet(generator=torch.Generator().manual_seed(0))
    losses = train_classifier(network, x, y, epochs=5, batch_size=50, generator=torch.Generator().manual_seed(0))
    assert losses[-1] < 0.5 * losses[0] and accuracy(network, x, y) > 0.85 and not network.training
    with pytest.raises(FloatingPointError, match="not finite"):
        train_classifier(network, x, y, epochs=1, batch_size=50, lr=1e30)
    with pytest.raises(ValueError, match="at least one batch"):
        train_classifier(network, x[:9], y[:9], epochs=1)


def check_evaluation(network, x):
    network.train()
    first, second = feature_moments(x, network), feature_moments(x, network)
    assert torch.equal(first[1], second[1]) and network.training  # no dropout while looking; the mode is put back


def test_evaluation_mode(monkeypatch, digits):
    class Noisy(LeNet):
        def features(self, x):
            return torch.dropout(super().features(x), 0.5, self.training)

    check_evaluation(Noisy(), digits[0][:40])
    monkeypatch.setattr(Noisy, "eval", lambda self: self)
    with pytest.raises(AssertionError):
        check_evaluation(Noisy(), digits[0][:40])


def test_unit_features(digits):
    network = LeNet(generator=torch.Generator().manual_seed(0)).eval()
    before = network(digits[0][:20].float() / 255)
    unit_features(network, digits[0])
    assert float(feature_moments(digits[0], network)[1].trace()) == pytest.approx(50, rel=1e-4)
    assert torch.allclose(network(digits[0][:20].float() / 255), before, atol=1e-5)
    for p in network.hidden.parameters():
        torch.nn.init.zeros_(p)
    with pytest.raises(ValueError, match="variance 0"):
        unit_features(network, digits[0][:20])


def test_resnet_for_small_colour_pictures():
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = resnet18(10, torch.Generator().manual_seed(0))
    assert network(x).shape == (6, 10) and network.features(x).shape == (6, 512)
    with torch.no_grad():
        maps = network.body.relu(network.body.bn1(network.body.conv1(x)))
    assert maps.shape[-2:] == (32, 32) and isinstance(network.body.maxpool, torch.nn.Identity)
    network(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert fid(x, x, network) < 1e-6
    same = resnet18(10, torch.Generator().manual_seed(0))
    assert torch.equal(same.head.weight, network.head.weight)


def test_augmentation_only_moves_pixels():
    x = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).float()
    torch.manual_seed(0)
    seen = [flip_and_shift(x, 2) for _ in range(30)]
    assert all(s.shape == x.shape and set(s.flatten().tolist()) <= set(x.flatten().tolist()) for s in seen)
    still = {tuple(flip_and_shift(x[:1], 0).flatten().tolist()) for _ in range(30)}
    assert still == {tuple(v.flatten().tolist()) for v in (x[:1], x[:1].flip(-1))}
    assert len({tuple(s.flatten().tolist()) for s in seen}) > 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees(digits, lenet):
    x, z = digits[0], digits[0].roll(2, -1)
    there = feature_network(device="cuda")
    assert fid(x, z, there) == pytest.approx(fid(x, z, lenet), rel=1e-3)
    assert psnr(x.cuda(), z.cuda()) == pytest.approx(psnr(x, z), rel=1e-5)


# --- errors at the door ----------------------------------------------------------------------------------------------

T, Z, H = (v[:20] for v in numbers())
FRAME = pd.DataFrame(T, columns=list("abcdefghij"))


def hole(x, where=H):
    out = x.copy()
    out[tuple(np.argwhere(where)[3])] = np.nan
    return out


@pytest.mark.parametrize("score", [rmse, nrmse, pfc])
@pytest.mark.parametrize(
    ("truth", "imputed", "held", "message"),
    [
        (T, Z, np.zeros_like(H), "marks no cell"),
        (T, Z[:, 1:], H, r"shape \(20, 10\), imputed \(20, 9\)"),
        (T, Z, H[:5], r"heldout has shape \(5, 10\)"),
        (T, Z, H.astype(int), "heldout is int64: it must be boolean"),
        (T, hole(Z), H, r"imputed is missing or infinite at position \("),
        (hole(T), Z, H, "truth is missing .* only cells with a known truth"),
        (FRAME, FRAME[list("bacdefghij")], H, "differ in their columns"),
        (FRAME, FRAME.iloc[::-1], H, "differ in their index"),
        (FRAME, hole(FRAME.to_numpy()), H, "row 0, column '[a-j]'|row [0-9], column"),
    ],
)
def test_clear_errors(score, truth, imputed, held, message):
    with pytest.raises(ValueError, match=message):
        score(truth, imputed, held)


def test_clear_errors_name_column_and_remedy():
    truth, imputed, held = mixed()
    with pytest.raises(ValueError, match="column 'species' of truth is category, no number: score it with pfc"):
        rmse(truth, imputed, held)
    with pytest.raises(ValueError, match="holds something that is no number"):
        rmse(np.array([["a"]]), np.array([["a"]]), np.array([[True]]))
    spoilt = imputed.copy()
    row = np.flatnonzero(held["count"])[0]
    spoilt.iloc[row, 2] = pd.NA
    with pytest.raises(ValueError, match=f"row 'row {row}', column 'count'"):
        table_scores(truth, spoilt, held)
    with pytest.raises(ValueError, match="differ in their columns"):
        table_scores(truth, imputed.iloc[:, ::-1], held)
    with pytest.raises(ValueError, match="column 1 is constant"):
        nrmse(T * (np.arange(10) != 1), Z, H)
    with pytest.raises(ValueError, match="takes a table"):
        nrmse(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool))


def test_clear_errors_of_whole_tables():
    y = load_diabetes().target[:20]
    with pytest.raises(ValueError, match=r"b is missing or infinite at position \("):
        energy_distance(T, hole(Z))
    with pytest.raises(ValueError, match="same features in one order"):
        energy_distance(FRAME, FRAME.iloc[:, ::-1])
    with pytest.raises(ValueError, match="needs two rows"):
        energy_distance(T[:1], T, unbiased=True)
    with pytest.raises(ValueError, match="X_imputed is missing in row number .* impute it first"):
        congeniality(FRAME, pd.DataFrame(hole(Z), columns=FRAME.columns), y)
    with pytest.raises(ValueError, match="task='guess'"):
        congeniality(T, Z, y, task="guess")
    with pytest.raises(ValueError, match="number of rows"):
        post_imputation_score(T, y[:-1], T, y)
    with pytest.raises(ValueError, match="y is empty or holds missing"):
        congeniality(T, Z, np.where(np.arange(20) == 3, np.nan, y))


def test_clear_errors_of_pictures(digits):
    x = digits[0][:4].float() / 255
    held = torch.ones(4, 28, 28, dtype=torch.bool)
    broken = x.clone()
    broken[2, 0, 3, 4] = torch.nan
    none = held.clone()
    none[1] = False
    cases = [
        (lambda: psnr(x, broken), r"imputed is missing or infinite at pixel \(2, 0, 3, 4\)"),
        (lambda: psnr(x, x * 255), "runs from 0 to 255"),
        (lambda: ssim(x, x * 2 - 1), "runs from -1 to 1"),
        (lambda: psnr(x, x, none), "picture 1 has no hidden pixel"),
        (lambda: psnr(x, x, ~held), "marks no cell"),
        (lambda: psnr(x, x, reduction="sum"), "reduction='sum'"),
        (lambda: ssim(x[..., :5, :5], x[..., :5, :5]), "at least 6×6"),
        (lambda: fid(x, broken), "missing or infinite at pixel"),
        (lambda: fid(x[:1], x), "1 picture has no covariance"),
        (lambda: fid(x.expand(4, 3, 28, 28), x.expand(4, 3, 28, 28)), "pass a trained network="),
        (lambda: fid(x, x, torch.nn.Flatten()), "has no method features"),
        (lambda: psnr(x[:0], x[:0]), "holds no picture"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        scc(x, x, digits[1][:3])
    for other in (x[0], x[:, :, 1:], x[:2]):
        with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
            psnr(x, other)
    assert fid(x[:3], x) > 0  # sets of different sizes are welcome


# --- wrong numbers in silence, and errors of other packages that name nothing -----------------------------------------


def refused(call, message):
    """True where the call raises a ValueError that says so."""
    try:
        call()
    except ValueError as error:
        return re.search(message, str(error)) is not None
    return False


def check_rows_in_another_order_are_refused():
    X, y = FRAME, pd.Series(load_diabetes().target[:20], name="progression")
    a, held = X["a"], pd.Series(H[:, 0])
    assert rmse(a, a + 2, held) == 2 and pfc(a, a, held.astype("boolean")) == 0
    assert refused(lambda: rmse(a, a[::-1], held), "truth and imputed differ in their index")
    assert refused(lambda: rmse(a, a, held[::-1]), "truth and heldout differ in their index")
    assert refused(lambda: congeniality(X, X, y[::-1]), r"X_truth and y differ in their index.*pass y.to_numpy\(\)")
    assert refused(lambda: post_imputation_score(X, y[::-1], X, y), "X_train and y_train differ in their index")
    assert refused(lambda: post_imputation_score(X, y, X, y[::-1]), "X_test and y_test differ in their index")
    draws = [X, X[::-1]]
    assert refused(lambda: post_imputation_score(draws, y.to_numpy(), X, y), r"X_train\[1\] differ in their index")


def test_rows_in_another_order_are_refused(monkeypatch):
    check_rows_in_another_order_are_refused()
    monkeypatch.setattr(metrics, "_same_labels", lambda **tables: None)  # pandas columns compared by position
    with pytest.raises(AssertionError):
        check_rows_in_another_order_are_refused()


def check_columns_without_a_spread():
    truth = pd.DataFrame({"a": [0.1 + 0.2, 0.3, 0.3, 0.3], "b": [1.0, 2.0, np.inf, 4.0]})
    imputed = pd.DataFrame({"a": [1.0, 2, 3, 4], "b": [1.0, 3, 3, 4]})
    held = np.array([[True, True, False, True]] * 2).T
    scores = table_scores(truth, imputed, held)
    assert scores.loc["a", ["nrmse", "r2"]].isna().all()  # 0.1 + 0.2 is not 0.3, but only by rounding
    assert scores.loc["b", "nrmse"] == pytest.approx(np.sqrt(1 / 3) / np.std([1, 2, 4]))


def test_columns_without_a_spread(monkeypatch):
    check_columns_without_a_spread()
    monkeypatch.setattr(metrics, "_sd", lambda column: float(column.std()))  # infinities and rounding errors counted
    with np.errstate(invalid="ignore"), pytest.raises(AssertionError):
        check_columns_without_a_spread()


def test_bad_tables_are_refused_by_name():
    one = pd.DataFrame({"a": [1.0, 2.0, 3.0]})
    dates = pd.DataFrame({"d": pd.to_datetime(["2020-01-01", "2021-01-01", "2022-01-01"])})
    everywhere, words = np.ones((3, 1), dtype=bool), pd.DataFrame({"a": ["x", "y", "z"]})
    X, y, draws = FRAME, load_diabetes().target[:20], np.zeros((39, 3, 1))
    cases = [
        (lambda: table_scores(one, words, everywhere), "column 'a' is scored as a number: .*'x'; kinds= overrules"),
        (lambda: table_scores(one, one.replace(2.0, np.inf), everywhere), "infinite at row 1, column 'a'"),
        (lambda: table_scores(dates, dates, everywhere), "dates and identifiers only"),
        (lambda: pfc(np.array(["1", "2"]), np.array([1, 2]), np.array([True, True])), "truth holds '1', imputed 1"),
        (lambda: nrmse(np.array(1.0), np.array(2.0), np.array(True)), r"not shape \(\)"),
        (lambda: post_imputation_score(X, y, X[:1], y[:1]), "y_test holds one value only, so R²"),
        (lambda: post_imputation_score(X, y, X, np.full(20, np.nan)), "y_test is empty or holds missing"),
        (lambda: post_imputation_score(X, y, X[:0], y[:0]), "y_test is empty"),
        (lambda: interval_coverage(draws[:1], np.zeros((3, 1)), everywhere), "ask sample for 39$"),
        (lambda: interval_coverage(draws[0], np.zeros((3, 1)), everywhere), "draws is empty, or one table"),
        (lambda: interval_coverage([words] * 39, words, everywhere), "no cell in a column of numbers"),
    ]
    for call, message in cases:
        assert refused(call, message), message


def check_bytes(digits):
    x = digits[0][:8]
    binary = (x > 127).to(torch.uint8)
    assert refused(lambda: psnr(binary, binary.float()), "truth is uint8 without a value above 1.* pass x.float()")
    assert refused(lambda: fid(binary, x), "uint8 without a value above 1")
    assert np.isclose(fid((x > 127).float(), (x > 127).to(torch.uint8) * 255), 0, atol=1e-6)
    broken = x.float() / 255
    broken[6, 0, 2, 3] = torch.nan
    assert refused(lambda: fid(x, broken, batch_size=4), r"pixel \(6, 0, 2, 3\)")  # not its place in the batch


def test_bytes_and_places(monkeypatch, digits):
    check_bytes(digits)
    real = metrics._unit
    ones_are_white = lambda x, name, first=0: x / 255 if x.dtype == torch.uint8 else real(x, name, first)  # noqa: E731
    in_the_batch = lambda x, name, first=0: real(x, name)  # noqa: E731
    for mutant in (ones_are_white, in_the_batch):
        monkeypatch.setattr(metrics, "_unit", mutant)
        with pytest.raises(AssertionError):
            check_bytes(digits)
    held = torch.ones(8, 28, 28, dtype=torch.bool)
    with pytest.raises(ValueError, match="bring pictures to one scale"):
        rmse(digits[0][:8], digits[0][:8].float() / 255, held)


def test_ssim_in_bounded_memory(monkeypatch):
    x, z = torch.rand(2, 5, 1, 400, 400, generator=torch.Generator().manual_seed(0))
    whole = float(structural_similarity_index_measure(z, x, data_range=1.0))
    sizes, real = [], structural_similarity_index_measure
    monkeypatch.setattr(
        torchmetrics.functional.image,
        "structural_similarity_index_measure",
        lambda a, b, **options: sizes.append(a.numel()) or real(a, b, **options),
    )
    assert ssim(x, z) == pytest.approx(whole, abs=1e-6) and ssim(x, z, reduction="none").shape == (5,)
    assert max(sizes) <= 2**19 and sum(sizes) == 2 * x.numel()


def test_networks_of_other_kinds(digits, lenet):
    class Pixels(torch.nn.Module):  # no weights, so no device and no dtype of its own
        def features(self, x):
            return x.flatten(1)[:, 300:320]

    class Broken(Pixels):
        def features(self, x):
            return x.flatten(1) * torch.nan

    x, z = digits[0][:60], digits[0][:60].roll(2, -1)
    assert fid(x, z, Pixels()) > 0
    assert fid(x, z, feature_network().double()) == pytest.approx(fid(x, z, lenet), rel=1e-4)
    wide = torch.rand(4, 1, 32, 32)
    for call, message in [
        (lambda: fid(x, z, Broken()), r"Broken.features gives shape \(60, 784\), or NaN"),
        (lambda: fid(wide, wide, lenet), r"grey 28×28 pictures, not \(1, 32, 32\)"),
        (lambda: scc(wide, wide, torch.zeros(4, dtype=torch.int64), lenet), "grey 28×28 pictures"),
        (lambda: fid(x, z, batch_size=0), "batch_size=0"),
        (lambda: train_classifier(LeNet(), x, digits[1][:60], epochs=0, batch_size=20), "epochs=0"),
        (lambda: train_classifier(LeNet(), x, digits[1][:60], epochs=1, batch_size=0), "batch_size=0"),
        (lambda: flip_and_shift(wide[..., :3, :3]), "below the pictures' 3×3"),
    ]:
        assert refused(call, message), message


def test_clear_errors_where_nobody_checks_annotations():
    """A user has no beartype: shapes that it would stop must be stopped by the functions themselves."""
    code = """
import torch
from missingbook.foundations.metrics import accuracy, feature_network, fid, frechet_distance, psnr
from missingbook.foundations.metrics import resnet18, unit_features

x, eye, three, one = torch.rand(4, 1, 28, 28), torch.eye(3), torch.zeros(3), torch.zeros(1)
cases = {
    "labels in shape (4, 1)": lambda: accuracy(feature_network(), x, torch.zeros(4, 1)),
    "labels in shape (4, 10)": lambda: accuracy(feature_network(), x, torch.zeros(4, 10)),
    "truth is a Tensor of shape (4, 28, 28)": lambda: psnr(x[:, 0], x[:, 0]),
    "truth is a ndarray of shape (4, 1, 28, 28)": lambda: psnr(x.numpy(), x.numpy()),
    "x is a Tensor of shape (4, 28, 28)": lambda: fid(x[:, 0], x[:, 0]),
    "mean_b is a Tensor of shape (1,): with 3 features": lambda: frechet_distance(three, eye, one, eye),
    "cov_b is a Tensor of shape (2, 2)": lambda: frechet_distance(three, eye, three, eye[:2, :2]),
    "mean_a is a ndarray": lambda: frechet_distance(three.numpy(), eye.numpy(), three, eye),
    "rescales a LeNet, not a _ColourNet": lambda: unit_features(resnet18(2), torch.rand(4, 3, 16, 16)),
}
for message, call in cases.items():
    try:
        call()
    except ValueError as error:
        assert message in str(error), (message, str(error))
    else:
        raise AssertionError(message)
"""
    root = Path(metrics.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_kinds_say_what_training_rows_do_not_show():
    "A count of which the training rows hold 0 and 1 only looks like a boolean; a 2 in a test row would be refused."
    train = pd.DataFrame({"count": [0.0, 1.0, 0.0, 1.0], "x": [0.1, 1.2, 2.1, 3.3]})
    test = pd.DataFrame({"count": [2.0, 0.0, 1.0], "x": [0.5, 1.5, 2.5]})
    y, z = np.arange(4.0), np.arange(3.0)
    with pytest.raises(ValueError, match="'count'"):
        post_imputation_score(train, y, test, z)
    assert post_imputation_score(train, y, test, z, kinds={"count": "number"}) <= 1
