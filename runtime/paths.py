"""The project's own folder and files."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_THE_PROGRAM = {"tests", "bench", "experiments", "docs", "out"}


def source_files(root: Path = ROOT) -> list[Path]:
    """Every Python file that a command may run, sorted: those at the root and in the packages."""
    packages = (p for p in root.iterdir() if p.is_dir() and (p / "__init__.py").exists())
    packages = (p for p in packages if p.name not in NOT_THE_PROGRAM)
    return sorted([*root.glob("*.py"), *(file for p in packages for file in p.rglob("*.py"))])
