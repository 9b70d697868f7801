"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def description() -> dict[str, str]:
    """Return what a reader has to know of the machine: nothing that names it."""
    return {
        "processor": _first(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.*)$") or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": _first(Path("/proc/meminfo"), r"^MemTotal:\s*(.*)$") or "?",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _first(path: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None
