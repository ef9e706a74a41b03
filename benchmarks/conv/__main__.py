"""`python -m benchmarks.conv`: convolutional inner loops beside their peers; JSON, and the tables of docs/conv.md."""

from __future__ import annotations

import json
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import roofline
from . import memory, report
from .rows import ROWS
from .run import run_row

NAMES = (*ROWS, "memory")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(
    rows: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(NAMES)}; all by default")] = None,
    seconds: Annotated[float, typer.Option(help="time per row; five rounds at least")] = 4.0,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(DTYPES)}; float32 by default")] = None,
    without: Annotated[list[str] | None, typer.Option(help="peers to leave out: a part of the name, as JAX")] = None,
    small: Annotated[bool, typer.Option(help="tiny sizes, to see that it runs: the figures mean nothing")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for conv.json and conv.md; rows there are kept")] = None,
    page: Annotated[bool, typer.Option(help="write the tables of docs/conv.md")] = False,
) -> None:
    """Time convolutional inner loops beside everything that people use in their place."""
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 for everybody, as it is in products of matrices
    for given, known, name in ((rows, NAMES, "--rows"), (dtype, DTYPES, "--dtype")):
        unknown = set(given or ()) - set(known)
        if unknown:
            raise typer.BadParameter(f"{name} must be of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    console, found = Console(), {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.conv",
        "machine": roofline.machine(),
        "rows": [],
    }  # fmt: skip

    def left_out(name: str) -> bool:
        return any(part in name for part in without or ())

    before = json.loads((out / "conv.json").read_text()) if out and (out / "conv.json").exists() else None

    def write() -> dict:  # after every row: a run that is stopped leaves what it has
        whole = report.merged(found, before)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "conv.json").write_text(json.dumps(whole, indent=1) + "\n")
            (out / "conv.md").write_text(report.markdown(whole))
        return whole

    for kind in dtype or ["float32"]:
        for key in rows or NAMES:
            if key == "memory":
                continue
            console.print(f"{key}, {kind}", highlight=False)
            options = dict(device=device, dtype=DTYPES[kind], seconds=seconds, small=small, without=left_out)
            row = run_row(key, **options)
            found["rows"].append(row)
            for line in report.everybody(row):
                console.print("   ", *line, highlight=False)
            write()
    if "memory" in (rows or NAMES) and device == "cpu":
        found["memory"] = memory.report(small)
        console.print(*report.memory(found["memory"]), sep="\n", highlight=False)
    table = Table(*report.HEADS)
    for row, (_, *line) in zip(found["rows"], report.summary(found["rows"]), strict=True):
        table.add_row(row["key"], *line)
    console.print(table)
    whole = write()
    if page:
        report.write_page(whole)


if __name__ == "__main__":
    typer.run(main)
