"""``torchrun --nproc-per-node 4 -m protofast.selection.distributed 'points-*.npy' -k 1000 -o chosen.npz``."""

from ..._optional import need

need("typer", "cli")

from .command import main  # noqa: E402

main()
