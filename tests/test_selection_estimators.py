"""Selections as scikit-learn's estimators: its own checks, and the functions they stand for."""

import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is absent: pip install 'protofast[data]'")

from sklearn.base import clone
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import protofast as pf
from protofast.selection import KCenter, KDispersion, KMedoids

METRICS = ("euclidean", "sqeuclidean", "cosine", "manhattan")
EXPECTED_FAILURES = {
    "KMedoids": {"check_transformer_n_iter": "max_iter bounds the iterations; how many it took is not told"}
}


@parametrize_with_checks(
    [KCenter(), KDispersion(), KMedoids(), KCenter(3, start="random", metric="manhattan"), KMedoids(4, start="random")],
    expected_failed_checks=lambda estimator: EXPECTED_FAILURES.get(type(estimator).__name__, {}),
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def points(n=60, d=4, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


CASES = [
    (KCenter(5), lambda x: pf.k_center(x, 5)),
    (KCenter(5, metric="cosine", start="center"), lambda x: pf.k_center(x, 5, metric="cosine", start="center")),
    (KCenter(5, start="farthest-pair", engine="plain"), lambda x: pf.k_center(x, 5, start="farthest-pair")),
    (KCenter(5, refine=True), lambda x: pf.k_center(x, 5, refine=True)),
    (KDispersion(4), lambda x: pf.k_dispersion(x, 4)),
    (
        KDispersion(4, objective="max-sum", metric="manhattan", refine=False),
        lambda x: pf.k_dispersion(x, 4, objective="max-sum", metric="manhattan", refine=False),
    ),
    (KMedoids(4), lambda x: pf.k_medoids(x, 4)),
    (KMedoids(4, refine=True), lambda x: pf.k_medoids(x, 4, refine=True)),
    (
        KMedoids(3, start=[7, 1, 30], metric="euclidean"),
        lambda x: pf.k_medoids(x, 3, metric="euclidean", start=[7, 1, 30]),
    ),
]


@pytest.mark.parametrize(("model", "function"), CASES, ids=[str(model) for model, _ in CASES])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fit_is_the_function(model, function, dtype):
    x = points(dtype=dtype)
    model, found = clone(model), function(x)
    assert model.fit(x) is model
    assert model.selected_idx_.tolist() == found.indices.tolist()
    assert model.labels_.tolist() == found.labels.tolist()
    assert model.radii_.tolist() == found.radii.tolist()
    assert (model.radius_, model.objective_) == (float(found.radii[-1]), float(found.objective))
    assert model.bound_ == float(found.bound) or np.isnan(model.bound_)
    assert model.n_features_in_ == 4
    assert np.array_equal(model.cluster_centers_, x[model.selected_idx_])
    assert model.cluster_centers_.dtype == dtype
    assert np.array_equal(model.fit_predict(x), model.labels_)
    assert np.array_equal(model.fit_transform(x), model.transform(x))
    if isinstance(model, KMedoids):
        assert model.inertia_ == model.objective_


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("model", [KCenter(6), KDispersion(6), KMedoids(6)])
def test_predict_and_transform_new_points(model, metric):
    x, new = points(), points(35, seed=1)
    x[7] = new[3] = 0  # cosine: at 1 from every direction
    model = clone(model).set_params(metric=metric).fit(x)
    assert np.array_equal(model.predict(x), model.labels_)
    away = model.transform(new)
    expected = pairwise_distances(new, x[model.selected_idx_], metric=metric)
    if metric == "cosine" and 7 in model.selected_idx_:
        expected[3, list(model.selected_idx_).index(7)] = 0  # scikit-learn says 1
    np.testing.assert_allclose(away, expected, rtol=1e-7, atol=1e-12)
    assert np.array_equal(model.predict(new), away.argmin(1))
    single = model.transform(new.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, away, rtol=1e-5, atol=1e-6)
    assert list(model.get_feature_names_out())[:2] == [f"{type(model).__name__.lower()}{i}" for i in range(2)]


def test_ties_go_to_the_first_selected():
    model = KCenter(2).fit([[0.0], [2.0], [0.5]])
    assert model.predict([[1.0]]).tolist() == [0]


@pytest.mark.parametrize("model", [KCenter(4), KDispersion(4), KMedoids(4)])
def test_precomputed_distances(model):
    x, new = points(), points(9, seed=1)
    plain = clone(model).set_params(metric="manhattan").fit(x)
    given = clone(model).set_params(metric="precomputed").fit(pairwise_distances(x, metric="manhattan"))
    assert given.selected_idx_.tolist() == plain.selected_idx_.tolist()
    assert not hasattr(given, "cluster_centers_")
    rows = pairwise_distances(new, x, metric="manhattan")
    np.testing.assert_allclose(given.transform(rows), plain.transform(new))
    assert np.array_equal(given.predict(rows), plain.predict(new))
    side = np.arange(6) < 3
    parts = np.where(side[:, None] == side, 1 - np.eye(6), np.inf)
    assert KCenter(2, metric="precomputed").fit(parts).radius_ == 1  # infinity between the two parts


def test_new_points_beyond_what_distances_hold():
    x = points()
    for metric in METRICS:
        model = KCenter(4, metric=metric).fit(x)
        for value in (1e155, -1e300):
            new = points(5, seed=1)
            new[3, 2] = value
            for use in (model.predict, model.transform):
                with pytest.raises(ValueError, match=r"X holds -?1e\+\d+ in row 3, column 2"):
                    use(new)
    model = KCenter(2, metric="precomputed").fit(pairwise_distances(x))
    rows = np.ones((2, 60))
    for value in (np.nan, -1):
        rows[1, model.selected_idx_[1]] = value
        with pytest.raises(ValueError, match=rf"in row 1, column {model.selected_idx_[1]}; give distances"):
            model.predict(rows)


def test_distances_far_from_the_origin():
    x = np.array([[1e10, 1.0], [1e10, 2.0], [1e10, 4.0]])
    model = KCenter(2).fit(x)
    assert model.transform(x).tolist() == [[0, 3], [1, 2], [3, 0]]  # by norms all would be 0


def test_transform_in_blocks(monkeypatch):
    from protofast.selection import estimators

    for metric in METRICS:
        model = KCenter(6, metric=metric).fit(points())
        whole = model.transform(points(35, seed=1))
        with monkeypatch.context() as patch:
            patch.setattr(estimators, "NUMBERS", 24)
            assert np.array_equal(model.transform(points(35, seed=1)), whole)


def test_random_starts():
    x = points(400)
    for model in (KCenter(3, start="random"), KMedoids(3, start="random")):
        runs = [clone(model).set_params(random_state=seed).fit(x).selected_idx_.tolist() for seed in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]
        state = np.random.RandomState(1)
        assert clone(model).set_params(random_state=state).fit(x).selected_idx_.tolist() == runs[0]


def test_in_a_pipeline_and_a_search():
    x = points(80)
    y = (x[:, 0] > 0).astype(int)
    pipeline = make_pipeline(StandardScaler(), KCenter(), KNeighborsClassifier())
    search = GridSearchCV(pipeline, {"kcenter__n_selected": [2, 20], "kcenter__metric": ["cosine", "euclidean"]}, cv=2)
    search.fit(x, y)
    assert search.best_score_ > 0.6
    assert search.best_estimator_[1].selected_idx_.shape == (search.best_params_["kcenter__n_selected"],)
    frame = KCenter(2).set_output(transform="pandas").fit_transform(x) if "pandas" in sys.modules else None
    assert frame is None or list(frame.columns) == ["kcenter0", "kcenter1"]


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (KCenter(0), ValueError, "n_selected is 0; X has n_samples=60, so give 1 to 60"),
        (KCenter(61), ValueError, "n_selected is 61"),
        (KCenter(2.5), TypeError, "n_selected is 2.5"),
        (KCenter(2, metric="l2"), ValueError, "metric is 'l2'"),
        (KCenter(2, start="middle"), ValueError, "start is 'middle'"),
        (KCenter(2, start=60), IndexError, "start is 60"),
        (KCenter(2, engine="magic"), ValueError, "engine is 'magic'"),
        (KCenter(2, backend="magic"), ValueError, "magic"),
        (KDispersion(2, objective="sum"), ValueError, "objective is 'sum'"),
        (KMedoids(2, start="center"), ValueError, "start is 'center'; give 'even', 'random'"),
        (KMedoids(2, start=[1]), ValueError, "give k = 2"),
        (KMedoids(2, max_iter=0), ValueError, "max_iter is 0"),
    ],
)
def test_errors_name_the_parameter(model, error, words):
    with pytest.raises(error, match=words):
        model.fit(points())


def test_tensors_and_mapped_files_are_not_copied(tmp_path):
    x = points()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = KCenter(4).fit(x).selected_idx_.tolist()
    assert KCenter(4).fit(mapped).selected_idx_.tolist() == expected
    assert KCenter(4).fit(torch.from_numpy(x)).selected_idx_.tolist() == expected


def test_scikit_learn_is_imported_on_first_use():
    code = (
        "import sys, protofast as pf; print('sklearn' in sys.modules); pf.selection.KCenter; "
        "print('sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="KCentre"):
        pf.selection.KCentre  # noqa: B018
