"""Run all benchmarks, except those of a GPU, and write them into docs/benchmarks.md.

    python -m bench [--quick]

--quick takes ten minutes on two cores: small models, few sides.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from bench import ROOT

JOBS = ["limits", "train_step", "memory", "sft", "load", "generate", "evaluate", "scale", "prepare",
        "templates", "growth"]


def main() -> int:
    """Run the jobs; return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--quick", action="store_true", help="takes ten minutes on two cores")
    one.add_argument("--tiny", action="store_true", help="test that all jobs run; write nothing")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=JOBS)
    s = parser.parse_args()
    flags = ["--tiny"] if s.tiny else ["--write"]
    if s.quick and not s.tiny:
        flags.append("--quick")
    failed = []
    for job in s.only:
        start = time.monotonic()
        if subprocess.run([sys.executable, "-m", f"bench.{job}", *flags], cwd=ROOT).returncode:
            failed.append(job)
        print(f"bench.{job}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}; their sections are not changed", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
