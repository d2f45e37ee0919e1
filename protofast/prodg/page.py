"""All that was found of a classifier as one HTML page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .._report.page import render, results, settings
from .runs import Run

ORDER = ("explain", "evaluate", "ablate")
_LEAD = (
    "A classifier adds up channels: what each of them gives to a class, at which places of the image. Turned the right "
    "way, and with the weights turned back, no answer changes, and a channel comes closer to one thing that can be "
    "shown: by images that a generator draws for it (ProDG, which sees no data), or by real ones (EPIC, InfoDisent)."
)


def to_html(run: str | os.PathLike[str], *, missing: Mapping[str, str] | None = None) -> str:
    """A page of all results in the folder of a run.

    Parameters
    ----------
    run : path
        Folder that ``protofast prodg prepare`` wrote.
    missing : mapping of str to str, optional
        What is not there, and why: said at the end.

    Raises
    ------
    FileNotFoundError
        When the folder holds no run, or lacks a picture of a result.
    ValueError
        When a file is damaged.
    """
    folder = Path(run)
    opened = Run.open(folder)
    contents = results(folder, "prodg", ORDER)
    findings = [line for content in contents.values() for line in content["findings"]]
    evaluated = [content["findings"] for content in contents.values() if "-evaluate-" in content["format"]]
    return render(
        folder,
        contents,
        extra="prodg",
        headline=(evaluated[0] if evaluated else findings or ["A classifier, and what is known of its channels"])[0],
        kicker=" · ".join(
            ["ProDG report", str(opened.about["data"]), str(opened.about["network"]), folder.resolve().name]
        ),
        lead=_LEAD,
        method="ProDG (arXiv 2605.08858), EPIC (arXiv 2505.12897), InfoDisent (arXiv 2409.10329; our reading)",
        model=list(settings(opened.about)),
        missing=missing,
    )
