"""``python -m benchmarks`` is ``protofast bench``."""

import sys

try:
    import typer
except ImportError:
    sys.exit(
        "python -m benchmarks needs typer and rich: pip install 'protofast[bench]'; protofast.bench.run needs neither"
    )

from protofast.bench.command import bench

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
app.command("python -m benchmarks")(bench)
app()
