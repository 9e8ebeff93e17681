"""The project's folder, its source files and its version."""

from __future__ import annotations

import hashlib
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_THE_PROGRAM = {"tests", "bench", "experiments", "docs", "out"}


def is_utf8(text: str) -> bool:
    """Whether a path or an argument is UTF-8; Python keeps other bytes as halves of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def source_files(root: Path = ROOT) -> list[Path]:
    """Every Python file that a command may run, sorted: those at the root and in the packages."""
    packages = [p for p in root.iterdir() if p.is_dir() and (p / "__init__.py").exists()
                and p.name not in NOT_THE_PROGRAM]
    return sorted([*root.glob("*.py"), *(file for p in packages for file in p.rglob("*.py"))])


def code_sha256(root: Path = ROOT) -> str:
    """The sha256 of every source file with its path, by which ranks compare their code."""
    digest = hashlib.sha256()
    for file in source_files(root):
        digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def git_commit(root: Path = ROOT) -> str | None:
    """The commit that is checked out; None outside a git repository, or without git."""
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def version(root: Path = ROOT) -> str:
    """Name, version and commit, as `--version` prints them."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    commit = git_commit(root)
    suffix = "" if commit is None else f" (commit {commit[:12]})"
    return f"{project['name']} {project['version']}{suffix}"
