"""A run's results, written into a folder: the page, its pictures, the results themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.pictures import draw
from bench.summary import Summary
from bench.tables import page


def write_pages(results: dict[str, Any], directory: Path) -> list[Path]:
    """Write them, and return what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = list(draw(Summary(results), directory))
    (directory / "results.md").write_text(page(results, pictures))
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return [directory / name for name in ("results.md", "results.json", *(name for name, _ in pictures))]
