"""The hub: models and data by name, fetched once, pinned to a commit.

Everything goes through huggingface_hub, so its cache and its settings hold (HF_HOME, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE). Only files of the wanted names are asked for. What can go wrong out there
becomes one line that says which of the many things it was, and what to do.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from runtime.console import FLAGS, STORAGE, UserError, info

TIMEOUT = 20  # seconds to wait for the first answer


def snapshot(repo: str, revision: str | None, patterns: Sequence[str],
             kind: str = "model") -> Path:
    """The cached folder of `repo` at a revision (a branch, tag or commit; None: main), fetched.

    The folder's name is the commit. Where the hub cannot be reached, what is cached is used and
    that is said. UserError when there is nothing to be had.
    """
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    fetch = partial(snapshot_download, repo, repo_type=kind, allow_patterns=list(patterns))
    try:
        try:
            HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=TIMEOUT)
        except Exception as e:
            if not _unreachable(e):
                raise
            try:
                folder = Path(fetch(revision=revision, local_files_only=True))
            except errors.LocalEntryNotFoundError:
                raise e from None
            info(f"{repo}: the hub cannot be reached; using the cached commit {folder.name}")
            return folder
        return Path(fetch(revision=revision))
    except Exception as e:  # a network has more ways to fail than one can name
        why, code = _reason(e, repo, revision)
        raise UserError(f"{kind} {repo!r} {why}", code) from None


def data(spec: str) -> list[Path]:
    """The files of `hf:org/name[@revision]/glob`, a repository of data, fetched, in order."""
    m = re.fullmatch(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+)", spec)
    if m is None or ".." in Path(m[3]).parts:
        raise UserError(f"{spec}: expected hf:org/name/glob or hf:org/name@revision/glob", FLAGS)
    folder = snapshot(m[1], m[2], [m[3]], "dataset")
    found = sorted(p for p in folder.glob(m[3]) if p.is_file())
    if not found:
        raise UserError(f"{spec}: no file of the repository matches {m[3]!r}")
    return found


def source(folder: Path) -> tuple[str | None, str | None]:
    """Repository and commit of a folder in the hub's cache; None, None of any other folder."""
    kind, _, repo = folder.parent.parent.name.partition("--")
    if folder.parent.name != "snapshots" or not kind.endswith("s") or not repo:
        return None, None
    return repo.replace("--", "/"), folder.name


def _unreachable(e: Exception) -> bool:
    """Whether nobody answered, or a server that could not: not an answer about the repository."""
    status = getattr(getattr(e, "response", None), "status_code", 0)
    return status >= 500 or isinstance(e, ConnectionError | TimeoutError) or \
        (not status and type(e).__module__.startswith("httpx"))


def _reason(e: Exception, repo: str, revision: str | None) -> tuple[str, int]:
    """What went wrong, after the repository's name, and the exit code."""
    from huggingface_hub import constants, errors, get_token

    status = getattr(getattr(e, "response", None), "status_code", 0)
    if isinstance(e, errors.GatedRepoError):
        return (f"is gated; accept its licence on {constants.ENDPOINT}/{repo}, then run: "
                "hf auth login"), 3
    if isinstance(e, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; its page on the hub lists them", 3
    if isinstance(e, errors.RepositoryNotFoundError) or status in (401, 403):
        if get_token():
            return "is no folder, and no repository that your token may see; check the name", 3
        return ("is no folder, and no public repository; check the name, or, if it is private, "
                "run: hf auth login"), 3
    if isinstance(e, errors.HFValidationError):
        return "is no name that the hub could have", 3
    if isinstance(e, errors.OfflineModeIsEnabled):
        return ("is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset that, or run "
                f"where there is a network: hf download {repo}"), 3
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
        return "does not fit on the disk; make room, or put the cache elsewhere (HF_HOME)", STORAGE
    if status >= 500:
        return f"cannot be had now: the hub answers {status}; try again later", 3
    if _unreachable(e) and not isinstance(e, errors.LocalEntryNotFoundError):
        return ("is no folder, and cannot be fetched: the hub does not answer or broke off; check "
                "the network and run again, it goes on where it stopped"), 3
    return f"could not be fetched: {' '.join(str(e).split())[:200] or type(e).__name__}", 3
