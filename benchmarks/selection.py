"""k-center against every loop and package, over the whole grid: ``python -m benchmarks.selection --threads 2``.

Saves every cell as it ends and goes on from there when it is started again.
"""

import argparse
from pathlib import Path

from protofast._files import replacing
from protofast.bench import environment, selection_grid, selection_report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the .jsonl and .md")
    parser.add_argument("--name", help="file name without suffix; the machine's and -selection by default")
    parser.add_argument("--threads", type=int, help="of torch and numpy's BLAS; as they are by default")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of timing a cell")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds of a call that is not waited for")
    parser.add_argument("--cells", default="", help="only cells whose names have this in them, such as 'd=64 k=100'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the cells and measure nothing")
    parser.add_argument("--tables", action="store_true", help="write the tables anew from what is there")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}; give 1 or more")
    chosen = [cell for cell in selection_grid.cells() if options.cells in cell.name]
    if not chosen:
        parser.error(f"--cells is {options.cells!r}, which no cell has in its name; see --list")
    if options.list:
        print("\n".join(cell.name for cell in chosen))
        return
    path = options.out / f"{options.name or environment.name('cpu') + '-selection'}.jsonl"
    lines = selection_grid.read(path)
    if not options.tables:
        settings = {key: getattr(options, key) for key in ("threads", "budget", "patience", "seed")}
        lines = selection_grid.run(path, chosen, **settings, progress=lambda text: print(text, flush=True))
    elif not lines:
        parser.error(f"--tables was given, and {path} holds no cell yet")
    text = selection_report.to_markdown(lines)
    with replacing(path.with_suffix(".md")) as file:
        file.write(text.encode())
    print(text)


if __name__ == "__main__":
    main()
