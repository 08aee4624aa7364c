"""The machine that figures were measured on, the versions, and the commit."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("mlx", "mlx-lm", "mlx-promptcache", "numpy")


def description() -> dict[str, Any]:
    """The machine: system, processor, cores, memory, libraries that are put before others; and how
    busy it is.
    """
    preloaded = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    return {
        "system": system(),
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": memory_bytes(),
        "preloaded": [Path(name).name for name in preloaded],
        "load": load(),
    }


def load() -> float | None:
    """How many processes have been running or waiting on average, in the last minute."""
    with contextlib.suppress(OSError, AttributeError):
        return round(os.getloadavg()[0], 2)
    return None


def system() -> str:
    """The system, its version or that of its C library, and the architecture."""
    name = platform.system()
    if name == "Darwin":
        return f"macOS {platform.mac_ver()[0]}, {platform.machine()}"
    library = " ".join(platform.libc_ver()).strip()
    return ", ".join(filter(None, [name, library, platform.machine()]))


def processor() -> str:
    """The processor's own name, or at least its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return _said("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def memory_bytes() -> int | None:
    """How much memory there is; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = _said("sysctl", "-n", "hw.memsize")
    return int(said) if said and said.isdigit() else None


def versions() -> dict[str, str]:
    """The releases of Python and of the packages that do the work."""
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}}


def commit() -> str | None:
    """The commit of the checkout that this package runs from, `+` if files differ from it; None
    where it is an installed copy.
    """
    here = str(Path(__file__).parent)
    if _said("git", "-C", here, "ls-files", "--error-unmatch", __file__) is None:
        return None
    head = _said("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    changed = _said("git", "-C", here, "status", "--porcelain", "--untracked-files=no", ":/src")
    return f"{head}+" if head and changed else head


def _said(*command: str) -> str | None:
    """What a program says; None if it is not there, or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
