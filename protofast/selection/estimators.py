"""Selections in the habit of scikit-learn. Importing this module imports scikit-learn."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from .._backend import overload
from .._optional import need
from .dispersion import k_dispersion
from .greedy import k_center
from .inputs import NUMBERS, check_values, metric_number, tensor
from .medoids import k_medoids
from .result import Selection

base: Any = need("sklearn.base", "data")
utils: Any = need("sklearn.utils", "data")
validation: Any = need("sklearn.utils.validation", "data")


class _Selector(base.ClassNamePrefixFeaturesOutMixin, base.TransformerMixin, base.ClusterMixin, base.BaseEstimator):
    """What the three share: everything but the choice itself, `_choose`."""

    n_selected: int
    metric: str
    random_state: Any
    backend: str | None

    def fit(self, X: Any, y: Any = None) -> Any:
        """Chooses `n_selected` rows of X.

        Parameters
        ----------
        X : array of shape (n_samples, n_features), or (n_samples, n_samples) distances with ``metric="precomputed"``
            float32 and float64 are taken as they are, a memory-mapped array without a copy; others become float64.
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            Naming the parameter, or the row of a number that is not finite.
        """
        metric_number(self.metric)
        X = self._checked(X)
        n = X.shape[0]
        try:
            k = operator.index(self.n_selected)
        except TypeError:
            raise TypeError(f"n_selected is {self.n_selected!r}; give an integer") from None
        if not 1 <= k <= n:
            raise ValueError(f"n_selected is {k}; X has n_samples={n}, so give 1 to {n}")
        found = self._choose(X, k)
        self.selected_idx_ = found.indices.numpy()
        self.labels_ = found.labels.numpy()
        self.radii_ = found.radii.numpy()
        self.radius_ = float(found.radii[-1])
        self.objective_ = float(found.objective)
        self.bound_ = float(found.bound)
        if self.metric != "precomputed":
            self.cluster_centers_ = X[self.selected_idx_]
        self._n_features_out = k
        return self

    def _choose(self, X: np.ndarray, k: int) -> Selection:
        raise NotImplementedError

    def _generator(self) -> torch.Generator:
        state = utils.check_random_state(self.random_state)
        return torch.Generator().manual_seed(int(state.randint(2**31 - 1)))

    def _checked(self, X: Any, **options: Any) -> np.ndarray:
        if self.metric == "precomputed":  # distances may be infinite, as between the parts of a graph
            options["ensure_all_finite"] = False
        return validation.validate_data(self, X, dtype=[np.float64, np.float32], **options)

    def _new(self, X: Any) -> np.ndarray:
        validation.check_is_fitted(self)
        X = self._checked(X, reset=False)
        if self.metric != "precomputed":
            check_values(tensor("X", X), metric_number(self.metric), name="X")
            return X
        X = X[:, self.selected_idx_]
        wrong = ~(X >= 0)  # NaN too
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            column, value = self.selected_idx_[column], X[row, column]
            raise ValueError(f"X holds {value} in row {row}, column {column}; give distances ≥ 0 (infinity allowed)")
        return X

    def predict(self, X: Any) -> np.ndarray:
        """Number of the nearest selected point, the lowest of equals.

        Parameters
        ----------
        X : array of shape (n, n_features), or (n, n_samples) distances to the points of `fit`

        Returns
        -------
        ndarray (n,) of int64
            Position in ``selected_idx_``. Of the points of `fit`: ``labels_``.
        """
        X = self._new(X)
        if self.metric == "precomputed":
            return X.argmin(1)
        wide = np.result_type(X, self.cluster_centers_)
        points, others = (tensor("X", array.astype(wide, copy=False)) for array in (X, self.cluster_centers_))
        relax = overload("relax", "cpu", self.backend)
        return relax(points, others, None, None, metric_number(self.metric))[1].numpy()

    def transform(self, X: Any) -> np.ndarray:
        """Distances to the selected points.

        Parameters
        ----------
        X : array of shape (n, n_features), or (n, n_samples) distances to the points of `fit`

        Returns
        -------
        ndarray (n, n_selected)
            In the type of X; under `metric`, by differences in float64, not by the norm identity. They may differ from
            those of `fit` in the last bits, so the nearest by them may be another of two at nearly equal distances:
            `predict` says which it is.
        """
        X = self._new(X)
        if self.metric == "precomputed":
            return X
        cdist = need("scipy.spatial.distance", "data").cdist  # scikit-learn brings it
        kind = {"manhattan": "cityblock", "cosine": "sqeuclidean"}.get(self.metric, self.metric)
        centers = self._coordinates(self.cluster_centers_)
        out = np.empty((X.shape[0], len(centers)), X.dtype)
        step = max(1, NUMBERS // max(centers.shape))
        for start in range(0, len(X), step):
            out[start : start + step] = cdist(self._coordinates(X[start : start + step]), centers, kind)
        return out / 2 if self.metric == "cosine" else out

    def _coordinates(self, X: np.ndarray) -> np.ndarray:
        """What is compared, in float64: for cosine the unit vectors, and a direction of its own for zero vectors."""
        X = X.astype(np.float64, copy=False)
        if self.metric != "cosine":
            return X
        norm = np.sqrt(np.square(X).sum(1, keepdims=True))
        return np.hstack([X / np.where(norm > 0, norm, 1), norm == 0])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.metric == "precomputed"
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class KCenter(_Selector):
    """`k_center` as an estimator: points such that every other is near one of them.

    Parameters
    ----------
    n_selected : int, default 8
    metric : {"euclidean", "sqeuclidean", "cosine", "manhattan", "precomputed"}
    start : int, "center", "farthest-pair" or "random", default 0
        The first choice; "random" draws it by `random_state`.
    refine : bool, default False
        Swap chosen points for better ones afterwards.
    engine : {"auto", "plain", "boxes", "pool"}
        How, never what.
    random_state : int, RandomState or None
        Of ``start="random"``.
    backend : str, optional

    Attributes
    ----------
    selected_idx_ : ndarray (n_selected,) of int64
        The chosen rows of X, in the order chosen.
    cluster_centers_ : ndarray (n_selected, n_features)
        Those rows; absent with ``metric="precomputed"``.
    labels_ : ndarray (n_samples,) of int64
        Position in `selected_idx_` of the nearest chosen row.
    radii_ : ndarray (n_selected,)
        Covering radius after each choice.
    radius_ : float
        The last of them: the largest distance from a row to the nearest chosen one.
    objective_ : float
        What was optimised; here `radius_`.
    bound_ : float
        A proven bound on the least possible `objective_`.
    n_features_in_ : int

    See Also
    --------
    protofast.k_center : The function, which takes tensors on any device, masks, initial points and clouds as well.

    Examples
    --------
    >>> import numpy as np, protofast as pf
    >>> X = np.array([[0.0], [1.0], [5.0], [6.0], [10.0]])
    >>> model = pf.selection.KCenter(n_selected=3).fit(X)
    >>> model.selected_idx_, model.labels_
    (array([0, 4, 2]), array([0, 0, 2, 2, 1]))
    >>> model.predict([[7.0]]), model.transform([[7.0]])
    (array([2]), array([[7., 3., 2.]]))
    """

    def __init__(
        self,
        n_selected: int = 8,
        *,
        metric: str = "euclidean",
        start: int | str = 0,
        refine: bool = False,
        engine: str = "auto",
        random_state: Any = None,
        backend: str | None = None,
    ) -> None:
        self.n_selected = n_selected
        self.metric = metric
        self.start = start
        self.refine = refine
        self.engine = engine
        self.random_state = random_state
        self.backend = backend

    def _choose(self, X: np.ndarray, k: int) -> Selection:
        random = isinstance(self.start, str) and self.start == "random"
        start = self._generator() if random else self.start
        options: Any = {"metric": self.metric, "engine": self.engine, "backend": self.backend}
        return k_center(X, k, start=start, refine=self.refine, **options)


class KDispersion(_Selector):
    """`k_dispersion` as an estimator: points far from each other.

    Parameters
    ----------
    n_selected : int, default 8
    objective : {"max-min", "max-sum"}
        Make the smallest pairwise distance large, or the sum of them.
    metric : {"euclidean", "sqeuclidean", "cosine", "manhattan", "precomputed"}
    refine : bool, default True
        Swap chosen points for better ones afterwards.
    backend : str, optional

    Attributes
    ----------
    selected_idx_, cluster_centers_, labels_, radii_, radius_, n_features_in_
        As of `KCenter`.
    objective_ : float
        The smallest pairwise distance, or their sum.
    bound_ : float
        A proven bound on the largest possible `objective_`.

    See Also
    --------
    protofast.k_dispersion : The function.

    Examples
    --------
    >>> import numpy as np, protofast as pf
    >>> X = np.array([[0.0], [1.0], [5.0], [6.0], [10.0]])
    >>> pf.selection.KDispersion(n_selected=3).fit(X).selected_idx_
    array([0, 4, 2])
    """

    def __init__(
        self,
        n_selected: int = 8,
        *,
        objective: str = "max-min",
        metric: str = "euclidean",
        refine: bool = True,
        backend: str | None = None,
    ) -> None:
        self.n_selected = n_selected
        self.objective = objective
        self.metric = metric
        self.refine = refine
        self.backend = backend

    def _choose(self, X: np.ndarray, k: int) -> Selection:
        options: Any = {"objective": self.objective, "metric": self.metric, "refine": self.refine}
        return k_dispersion(X, k, backend=self.backend, **options)


class KMedoids(_Selector):
    """`k_medoids` as an estimator: points with a small sum of distances from the others to the nearest of them.

    Parameters
    ----------
    n_selected : int, default 8
    metric : {"manhattan", "euclidean", "sqeuclidean", "cosine", "precomputed"}
    start : "even", "random" or array of int (n_selected,), default "even"
        The first medoids: evenly spaced rows, rows drawn by `random_state`, or given ones.
    max_iter : int, default 100
    refine : bool, default False
        Swap medoids for better points afterwards.
    random_state : int, RandomState or None
        Of ``start="random"``.
    backend : str, optional

    Attributes
    ----------
    selected_idx_, cluster_centers_, labels_, radii_, radius_, n_features_in_
        As of `KCenter`.
    objective_ : float
        The sum of the distances to the nearest medoid; also ``inertia_``.
    bound_ : float
        NaN, as the method proves none.

    See Also
    --------
    protofast.k_medoids : The function.

    Examples
    --------
    >>> import numpy as np, protofast as pf
    >>> X = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [15.0]])
    >>> pf.selection.KMedoids(n_selected=2).fit(X).selected_idx_
    array([1, 4])
    """

    def __init__(
        self,
        n_selected: int = 8,
        *,
        metric: str = "manhattan",
        start: Any = "even",
        max_iter: int = 100,
        refine: bool = False,
        random_state: Any = None,
        backend: str | None = None,
    ) -> None:
        self.n_selected = n_selected
        self.metric = metric
        self.start = start
        self.max_iter = max_iter
        self.refine = refine
        self.random_state = random_state
        self.backend = backend

    def _choose(self, X: np.ndarray, k: int) -> Selection:
        start = self.start
        if isinstance(start, str):
            if start not in ("even", "random"):
                raise ValueError(f"start is {start!r}; give 'even', 'random' or the indices of the first medoids")
            start = None if start == "even" else self._generator()
        options: Any = {"metric": self.metric, "start": start, "max_iter": self.max_iter, "refine": self.refine}
        found = k_medoids(X, k, backend=self.backend, **options)
        self.inertia_ = float(found.objective)
        return found
