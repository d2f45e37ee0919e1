"""Every spec, by op."""

from ..spec import Spec
from . import channels, ddim, ddim_loop, importing, prototype, pxgen, rotation, selection

SPECS: dict[str, Spec] = {
    spec.op: spec
    for spec in (
        ddim.SPEC,
        ddim_loop.SPEC,
        prototype.SPEC,
        selection.K_CENTER,
        selection.FARTHEST_PAIR,
        selection.K_DISPERSION,
        selection.K_MEDOIDS,
        pxgen.SPEC,
        channels.PURITY,
        channels.POOL,
        channels.HEAT,
        rotation.SPEC,
        importing.SPEC,
    )
}
