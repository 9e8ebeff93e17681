"""Downloads from the Hugging Face hub: models and data by name, once, pinned to a commit.

Everything goes through huggingface_hub, so its cache and its settings apply (HF_HOME, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE). Only files that match the given patterns are downloaded. Every failure
becomes one line with its cause and one thing to do.
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
    """Download `repo` at a revision (a branch, tag or commit; None: main); return its folder.

    The folder's name is the commit. If the hub cannot be reached, the cached copy is used and a
    line says so. UserError if there is none.
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
    except Exception as e:  # a network can fail in more ways than can be listed
        reason, code = _reason(e, repo, revision)
        raise UserError(f"{kind} {repo!r} {reason}", code) from None


def data(spec: str) -> list[Path]:
    """Download the files of `hf:org/name[@revision]/glob`, a dataset repository; sorted."""
    m = re.fullmatch(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+)", spec)
    if m is None or ".." in Path(m[3]).parts:
        raise UserError(f"{spec}: expected hf:org/name/glob or hf:org/name@revision/glob", FLAGS)
    folder = snapshot(m[1], m[2], [m[3]], "dataset")
    files = sorted(p for p in folder.glob(m[3]) if p.is_file())
    if not files:
        raise UserError(f"{spec}: no file of the repository matches {m[3]!r}")
    return files


def source(folder: Path) -> tuple[str | None, str | None]:
    """Repository and commit of a folder in the hub's cache; None, None of any other folder."""
    kind, _, repo = folder.parent.parent.name.partition("--")
    if folder.parent.name != "snapshots" or not kind.endswith("s") or not repo:
        return None, None
    return repo.replace("--", "/"), folder.name


def _unreachable(e: Exception) -> bool:
    """Whether there was no answer, or one of a broken server (5xx)."""
    status = getattr(getattr(e, "response", None), "status_code", 0)
    return status >= 500 or isinstance(e, ConnectionError | TimeoutError) or \
        (not status and type(e).__module__.startswith("httpx"))


def _reason(e: Exception, repo: str, revision: str | None) -> tuple[str, int]:
    """The cause, as a text that follows the repository's name, and the exit code."""
    from huggingface_hub import constants, errors, get_token

    status = getattr(getattr(e, "response", None), "status_code", 0)
    if isinstance(e, errors.GatedRepoError):
        return (f"is gated; accept its licence on {constants.ENDPOINT}/{repo}, then run: "
                "hf auth login"), 3
    if isinstance(e, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; its page on the hub lists them", 3
    if isinstance(e, errors.RepositoryNotFoundError) or status in (401, 403):
        if get_token():
            return (
                "is not a folder, and not a repository that your token can read; check the name",
                3,
            )
        return ("is not a folder, and not a public repository; check the name, or, if it is "
                "private, run: hf auth login"), 3
    if isinstance(e, errors.HFValidationError):
        return "is not a valid repository name", 3
    if isinstance(e, errors.OfflineModeIsEnabled):
        return ("is not in the cache, and HF_HUB_OFFLINE forbids the download; unset it, or run "
                f"this with a network: hf download {repo}"), 3
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
        return "does not fit on the disk; make room, or move the cache with HF_HOME", STORAGE
    if status >= 500:
        return f"cannot be downloaded now: the hub answers {status}; try again later", 3
    if _unreachable(e) and not isinstance(e, errors.LocalEntryNotFoundError):
        return (
            "is not a folder, and cannot be downloaded: the hub does not answer or the connection "
            "broke; check the network and run again, the download continues"
        ), 3
    return f"could not be downloaded: {' '.join(str(e).split())[:200] or type(e).__name__}", 3
