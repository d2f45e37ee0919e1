"""CaBRNet's similarity layers and its ProtoPNet decision over `protofast`'s prototype functions.

A CaBRNet configuration names them by module and name:

```yaml
similarity:
  module: protofast.cabrnet
  name: ProtoPNetSimilarity
classifier:
  module: protofast.cabrnet
  name: ProtoPNetClassifier
```

The similarity layer alone does with every architecture of CaBRNet: it returns the dense maps (N, P, H, W) that CaBRNet
asks for, each distance in the direct form. `ProtoPNetClassifier` asks for the nearest patches alone, so that training
and inference make no map.

Importing this module imports cabrnet (1.2; Python 3.10 to 3.12).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._optional import need
from .prototype import prototype_distance, prototype_map

similarities: Any = need("cabrnet.core.utils.similarities", "cabrnet")
decision: Any = need("cabrnet.archs.protopnet.decision", "cabrnet")


class _Direct(similarities.SimilarityLayer):
    """Distances by protofast; the way from them to similarities is CaBRNet's own."""

    metric = "sqeuclidean"

    def distances(self, features: Tensor, prototypes: Tensor, **kwargs: Any) -> Tensor:
        """Distances at every patch.

        Parameters
        ----------
        features : Tensor of shape (N, D, H, W)
        prototypes : Tensor of shape (P, D, K, L)

        Returns
        -------
        Tensor of shape (N, P, H − K + 1, W − L + 1)
            float32 (float64 for float64 input).
        """
        return prototype_map(features, prototypes, metric=self.metric)

    def min_distances(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """The least of `distances` over the patches, of shape (N, P), without the map."""
        return prototype_distance(features, prototypes, metric=self.metric).distance

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # CaBRNet's Legacy layers keep a kernel of ones.
        state_dict.pop(f"{prefix}_summation_kernel", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ProtoPNetSimilarity(_Direct, similarities.LogDistance):
    """In place of CaBRNet's ``ProtoPNetSimilarity`` and ``LegacyProtoPNetSimilarity``: log((d + 1) / (d + eps)).

    d = Σ(x − p)² (Chen et al. 2019, eq. 1), in the direct form: CaBRNet's own lose a distance of 1e-4 among the
    roundings of |x|² and |p|².

    Parameters
    ----------
    stability_factor : float, default 1e-4
        eps.
    num_prototypes, num_features : int
        Given by CaBRNet; not needed.

    Examples
    --------
    >>> import torch
    >>> from protofast.cabrnet import ProtoPNetSimilarity
    >>> layer = ProtoPNetSimilarity()
    >>> layer.similarities(torch.ones(1, 2, 1, 2), torch.ones(1, 2, 1, 1))
    tensor([[[[9.2103, 9.2103]]]])
    """


class ProtoTreeSimilarity(_Direct, similarities.ExpDistance):
    """In place of CaBRNet's ``ProtoTreeSimilarity`` and ``LegacyProtoTreeSimilarity``: exp(−√d), d = Σ(x − p)².

    Nauta et al. 2021, "Neural Prototype Trees", eq. 2. CaBRNet's tree wants dense maps.

    Parameters
    ----------
    log_probabilities : bool, default False
        −√d instead.
    stability_factor : float, default 1e-14
        Added to d below the root.
    num_prototypes, num_features : int
        Given by CaBRNet; not needed.

    Examples
    --------
    >>> import torch
    >>> from protofast.cabrnet import ProtoTreeSimilarity
    >>> ProtoTreeSimilarity(log_probabilities=True).similarities(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    tensor([[[[-1.]]]])
    """


class CosineSimilarity(_Direct, similarities.CosineSimilarity):
    """In place of CaBRNet's ``CosineSimilarity``: x·p / (|x||p|), 0 where a vector is 0.

    Parameters
    ----------
    stability_factor : float
        Of CaBRNet's formula; not needed.
    num_prototypes, num_features : int
        Given by CaBRNet; not needed.

    Examples
    --------
    >>> import torch
    >>> from protofast.cabrnet import CosineSimilarity
    >>> CosineSimilarity().similarities(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))
    tensor([[[[1.]]]])
    """

    metric = "cosine"


class ProtoPNetClassifier(decision.ProtoPNetClassifier):
    """CaBRNet's ``ProtoPNetClassifier`` without the dense map: forward asks for the nearest patches alone.

    The parameters, the state dict and the outputs are CaBRNet's, in its compatibility mode too. What else reads
    ``distances`` or ``similarities`` (projection, pruning, explanation) gets the dense maps.

    Parameters
    ----------
    similarity_config, num_classes, num_features, num_proto_per_class, ...
        As for CaBRNet's.

    Raises
    ------
    ValueError
        Where the configuration names a similarity layer that is not one of this module.

    Examples
    --------
    >>> import torch
    >>> from protofast.cabrnet import ProtoPNetClassifier
    >>> layer = {"module": "protofast.cabrnet", "name": "ProtoPNetSimilarity"}
    >>> classifier = ProtoPNetClassifier(layer, num_classes=2, num_features=3, num_proto_per_class=1)
    >>> logits, distances = classifier(torch.rand(4, 3, 5, 5))
    >>> logits.shape, distances.shape
    (torch.Size([4, 2]), torch.Size([4, 2]))
    """

    def build_similarity(self, config: dict[str, Any]) -> None:
        super().build_similarity(config)
        if not isinstance(self.similarity_layer, _Direct):
            raise ValueError(
                f"similarity is {config['name']!r} of {config.get('module', similarities.__name__)}; "
                "ProtoPNetClassifier of protofast.cabrnet needs 'ProtoPNetSimilarity', 'ProtoTreeSimilarity' or "
                "'CosineSimilarity' with module: protofast.cabrnet"
            )

    def forward(self, features: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and least distances (N, P) of features (N, D, H, W)."""
        distances = self.similarity_layer.min_distances(features, self.prototypes)
        return self.last_layer(self.similarity_layer.distances_to_similarities(distances)), distances
