"""The machine and the software of a measurement; every file of results has these facts."""

import importlib.util
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def output(*command):
    """The output of a command, or "" where it does not run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit():
    """The git commit, with "+" where tracked files differ from it. Without a repository FASTADV_COMMIT names it."""
    head = output("git", "rev-parse", "HEAD")
    if not head or "FASTADV_COMMIT" in os.environ:
        return os.environ.get("FASTADV_COMMIT", "unknown")
    return head + ("+" if output("git", "status", "--porcelain", "--untracked-files=no") else "")


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts():
    gpu = torch.cuda.is_available()
    dry_run = os.environ.get("FASTADV_DRY_RUN") == "1"
    return {
        "device": "cpu" if dry_run else torch.cuda.get_device_name() if gpu else cpu_name(),
        "device_type": "cuda" if gpu and not dry_run else "cpu",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # By default glibc maps new memory for each large tensor. NOTES.md says what that costs the contenders.
        "recycled_memory": "MALLOC_MMAP_THRESHOLD_" in os.environ,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dry_run": dry_run,
    }
