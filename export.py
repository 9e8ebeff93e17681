"""Merge, check, describe and upload a trained model.

    python export.py merge --model out/kin/model --out out/kin-merged
    python export.py check --model out/kin-merged
    python export.py card --model out/kin-merged --run out/kin --results out/kin-eval/results.json
    python export.py push --model out/kin-merged --repo org/name

`merge` adds the adapter tensor by tensor, in the base's own precision, so it needs the memory of
one shard, not of two models. `check` opens the files that other programs will open. `card` repeats
what the files say, and calls the rest unknown.
"""

from __future__ import annotations

if __name__ == "__main__":  # before any import that needs this Python
    import os
    import sys

    if getattr(sys.flags, "safe_path", False):  # python -P does not search this folder
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from runtime.python_version import require_python

    require_python()

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime import console, flags
from runtime.console import BAD_INPUT, FLAGS, STORAGE, UserError


@dataclass
class Merge:
    """Add an adapter to its base, in the base's own precision, a shard in memory at a time."""

    model: str
    """The adapter's folder, or its run's."""
    out: str
    """The merged model's folder; an older model there is replaced."""
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Of what is written; keep: each tensor's own in the base."""
    compare: bool = True
    """Load the adapter on its base, then the result, both in float32, and compare their logits."""


@dataclass
class Check:
    """Check a model's folder and print a line for each check; exit code 3 if one fails."""

    model: str
    """A Hugging Face folder, an adapter's folder, a run's folder, or a hub id."""


@dataclass
class Card:
    """Write the folder's README.md, a model card, from what its files and its run's say."""

    model: str
    """The model's folder, or its run's."""
    run: str = ""
    """The run's folder: data, settings, bits per byte before and after."""
    results: list[str] = field(default_factory=list)
    """results.json files of eval.py."""
    language: list[str] = field(default_factory=lambda: ["rw", "en"])
    licence: str = ""
    """The licence's name on the hub; without it, the base's, if its folder says."""
    force: bool = False
    """Replace a README.md that this command did not write."""


@dataclass
class Push:
    """Send a model's folder to the hub, after showing what goes where."""

    model: str
    repo: str
    """org/name on the hub; made, as a private one, if it is not there."""
    public: bool = False
    """For everybody to see."""
    yes: bool = False
    """Do not ask."""


COMMANDS = {"merge": Merge, "check": Check, "card": Card, "push": Push}

if __name__ == "__main__":  # before torch is loaded, so that --help and a wrong flag answer at once
    NAME, SETTINGS = console.run(lambda: flags.read_subcommand(
        dict(COMMANDS), sys.argv[1:], "export.py", (__doc__ or "").strip()))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import lora  # noqa: E402
from checkpoints.atomic_write import replace_folder  # noqa: E402
from checkpoints.huggingface import (  # noqa: E402
    check_tensors,
    config_content,
    index_content,
    load_model,
)
from checkpoints.model_folder import (  # noqa: E402
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    MERGE_RECORD,
    MODEL_FILES,
    base_model_dir,
    configured_stop_ids,
    read_accompanying_files,
    read_config,
    resolve_model_dir,
    tensor_infos,
)
from checkpoints.model_writer import (  # noqa: E402
    REPLACEABLE,
    ModelFolder,
    check_finite,
    rehearse_model_folder,
    write_files,
)
from checkpoints.peft_adapter import (  # noqa: E402
    adapter_state,
    check_adapter_base,
    load_adapter,
    load_adapter_state,
    read_adapter_weights,
)
from checkpoints.safetensors_header import (  # noqa: E402
    INDEX_FILE,
    TensorInfo,
    first_five,
    open_safetensors,
    read_header,
    read_index,
)
from data import sha256  # noqa: E402
from inference.generate import completions  # noqa: E402
from inference.sampling import SamplingParams, StoppingCriteria  # noqa: E402
from layers.cross_entropy import softcap  # noqa: E402
from model import Llama  # noqa: E402
from reports.model_card import (  # noqa: E402
    WRITTEN_BY_US,
    model_card,
    public_name,
    read_card,
    read_merge_record,
)
from runtime.dtypes import FLAG_DTYPES, SAFETENSORS_FLOATS  # noqa: E402
from runtime.model_files import (  # noqa: E402
    check_model_file,
    has_model_file,
    read_model_json,
)
from runtime.output_paths import try_output_folder  # noqa: E402
from runtime.temporary import write_text  # noqa: E402
from tokenization.chat_template import GREETING, ChatTemplate  # noqa: E402
from tokenization.tokenizer import FILES as TOKENIZER_FILES  # noqa: E402
from tokenization.tokenizer import Tokenizer  # noqa: E402

TEXT = "Umwana ajya ku ishuri. The child goes to school."


# -- merge -----------------------------------------------------------------------------------------


def merge(s: Merge) -> None:
    """Write base + adapter as a folder that is laid out like the base.

    Everything but the merging itself is checked first, so that nothing fails at the end.
    """
    folder = resolve_model_dir(s.model)
    if not has_model_file(folder, ADAPTER_CONFIG):
        raise UserError(f"{folder}: no {ADAPTER_CONFIG}, so this is not an adapter; give the "
                        "folder of an adapter, as --tune lora writes it")
    base, out = base_model_dir(folder), try_output_folder(Path(s.out).expanduser())
    if out in (folder.resolve(), base.resolve()):
        role = "base" if out == base.resolve() else "adapter"
        raise UserError(f"--out {s.out}: is the {role} itself; give another folder", FLAGS)
    model = load_adapter_on_meta(base, folder)
    tensors = stored_tensors(base, model)
    check_tensors(base, model.config, base_names(model), tensors)
    contents = merged_folder(model, base, folder, tensors, s.dtype)
    card = read_card(out)
    if card and WRITTEN_BY_US not in card:
        contents.files["README.md"] = card.encode()  # a card that a person wrote is kept
    rehearse_model_folder(contents, out)
    check_space(out, contents, model)
    before = logits(folder) if s.compare else None
    with replace_folder(out, REPLACEABLE) as temporary:
        write_files(temporary, contents.files)
        write_merged(model, tensors, contents, temporary)
    print(f"{out}: an adapter of {len(lora.adapters(model))} layers merged into {base}, "
          f"dtype {s.dtype}")
    if before is not None:
        after = logits(out)
        print(f"largest logit difference to the adapter on its base: "
              f"{(after - before).abs().max():.2e}, of logits up to {before.abs().max():.3g}")


def load_adapter_on_meta(base: Path, folder: Path) -> Llama:
    """A model with the base's shapes, without the base's weights, and with the adapter's tensors
    loaded and checked."""
    check_adapter_base(folder, base)
    with torch.device("meta"):
        model = Llama(read_config(base))
    load_adapter(model, folder)  # checks names and shapes, as when a model is loaded
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name in trained:
        module_name, _, leaf = name.rpartition(".")
        p = torch.empty(model.get_parameter(name).shape, dtype=torch.float32)
        setattr(model.get_submodule(module_name), leaf, nn.Parameter(p))
    load_adapter_state(model, read_adapter_weights(folder), str(folder))
    for name, x in adapter_state(model).items():
        check_finite(x, f"{folder / ADAPTER_WEIGHTS}: {name}")
    return model


def merged_folder(model: Llama, base: Path, folder: Path, tensors: dict[str, TensorInfo],
                  dtype: str) -> ModelFolder:
    """The folder of a merged model: the shards of the base, and the files of both folders.
    UserError if the adapter was merged into this base before."""
    merged_dtype = FLAG_DTYPES.get(dtype)
    shards: dict[str, dict[str, torch.dtype]] = {}
    for name, info in tensors.items():
        tensor_dtype = merged_dtype or SAFETENSORS_FLOATS[info.dtype]
        shards.setdefault(info.file.name, {})[name] = tensor_dtype
    files = read_accompanying_files(base)
    own_files = read_accompanying_files(folder)
    if set(TOKENIZER_FILES[:2]) & set(own_files):  # the adapter's tokenizer replaces the base's
        for name in (*TOKENIZER_FILES[:4], "added_tokens.json"):
            files.pop(name, None)
    files |= own_files
    files[CONFIG_FILE] = config_content(base, model.config, merged_dtype)
    if has_model_file(base, INDEX_FILE):
        total = sum(math.prod(info.shape) * shards[info.file.name][name].itemsize
                    for name, info in tensors.items())
        files[INDEX_FILE] = index_content(
            read_index(base), {file: list(names) for file, names in shards.items()}, total)
    files[MERGE_RECORD] = merge_record(base, folder)
    return ModelFolder(files, shards)


def merge_record(base: Path, folder: Path) -> bytes:
    """merge.json: what was merged into the base earlier, and this adapter."""
    adapter = sha256(check_model_file(folder, ADAPTER_WEIGHTS))
    earlier = read_merge_record(base)
    if adapter in [x.get("merged_adapter") for x in earlier]:
        raise UserError(f"{folder}: this adapter is already merged into {base} ({MERGE_RECORD} "
                        "there says so); merge it into the model that it was trained on")
    name, revision = public_name(str(base))
    record = {"merged_adapter": adapter, "base": name, "revision": revision}
    return (json.dumps({"merges": [*earlier, record]}, indent=1) + "\n").encode()


def check_space(out: Path, contents: ModelFolder, model: Llama) -> None:
    """UserError (STORAGE) if the disk has no room for the merged weights."""
    needed = contents.tensor_bytes(base_names(model))
    existing_parent = next(x for x in out.parents if x.exists())
    free = shutil.disk_usage(existing_parent).free
    if free < needed:
        raise UserError(f"--out {out}: {free:,} bytes are free, the merged weights need "
                        f"{needed:,}; make room, or give a folder on another disk", STORAGE)


def base_names(model: Llama) -> dict[str, nn.Parameter]:
    """The parameters of a model with an adapter, by their names in the base, without those of the
    adapter."""
    return {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()
            if ".lora_" not in name}


def write_merged(model: Llama, tensors: dict[str, TensorInfo], contents: ModelFolder,
                 out: Path) -> None:
    """Merge and write one shard after the other. One shard is in memory; each sum is computed in
    float32 and rounded once."""
    adapters, parameters = lora.adapters(model), base_names(model)
    with console.progress("merging", len(tensors)) as advance:
        for file, dtypes in contents.shards.items():
            shard: dict[str, Tensor] = {}
            for name, dtype in dtypes.items():
                x = read_tensor(tensors[name])
                layer = adapters.get(name.removesuffix(".weight"))
                if layer is not None and name.endswith(".weight"):
                    layer.base_layer.weight = nn.Parameter(x.float(), requires_grad=False)
                    x = lora.merge_layer(layer).weight.detach()
                    layer.base_layer.weight = None  # free it
                elif parameters[name].requires_grad:  # trained in full, with the adapter
                    x = parameters[name].detach()
                shard[name] = x.to(dtype).contiguous()
                check_finite(shard[name], name)  # a narrower dtype overflows silently
                advance(1)
            save_file(shard, out / file, metadata=contents.metadata)


def stored_tensors(base: Path, model: Llama) -> dict[str, TensorInfo]:
    """The tensors in a base's files, without old rotary buffers and the copy of a tied head."""
    tied = model.config.tie_word_embeddings
    return {name: info for name, info in tensor_infos(base).items()
            if not (name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"))}


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor. The file is opened for it alone, so that its pages are freed with it."""
    if info.dtype not in SAFETENSORS_FLOATS:
        raise UserError(f"{info.file}: {info.name} is {info.dtype}, expected "
                        f"{' '.join(SAFETENSORS_FLOATS)}; use the model in its original precision")
    return open_safetensors(info.file).get_tensor(info.name)


@torch.inference_mode()
def logits(folder: Path) -> Tensor:
    """Logits of a short fixed text at each token, in float32: (T,V)."""
    model, tokenizer = load_model(folder)
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.document(TEXT)[: model.config.max_position_embeddings]])  # (1,T)
    h = model.eval().model(ids, torch.zeros_like(ids), torch.arange(ids.shape[1])[None])
    return softcap(h @ model.head.T, model.config.logit_cap)[0]


def check(s: Check) -> None:
    """Print a line with a tick or a cross for each check. A folder that cannot be read is an
    error."""
    wrong = 0
    for good, line in findings(resolve_model_dir(s.model)):
        print("✓" if good else "✗", console.printable(line), flush=True)
        wrong += not good
    if wrong:
        print(f"{wrong} wrong")
        raise SystemExit(BAD_INPUT)


Finding = tuple[bool, str]  # whether a check passed, and its line


def findings(folder: Path) -> Iterator[Finding]:
    """The checks of a model's folder, each with its result."""
    base = base_model_dir(folder)
    config = read_config(base)
    with torch.device("meta"):
        model = Llama(config)
    wanted, infos = dict(model.named_parameters()), stored_tensors(base, model)
    has_own = any(has_model_file(folder, x) for x in TOKENIZER_FILES[:2])
    tokenizer = Tokenizer.open(folder if has_own else base)
    stops, _ = configured_stop_ids(folder)
    required = [*_tensor_findings(wanted, infos), _number_finding(folder, base, infos)]
    yield from required
    yield _head_finding(base, config.tie_word_embeddings, infos)
    vocabulary = _vocabulary_finding(tokenizer, config.vocab_size, infos)
    yield vocabulary
    yield _bos_finding(tokenizer)
    template = (ChatTemplate.from_folder(folder, tokenizer)
                or ChatTemplate.from_folder(base, tokenizer))
    if template:
        yield chat_finding(template, stops, config.vocab_size)
    else:
        yield True, "chat template: none, so this model continues text and does not converse"
    stop_finding = _stop_finding(folder, tokenizer, config.vocab_size)
    yield stop_finding
    del model
    if all(right for right, _ in (*required, vocabulary, stop_finding)):
        yield _continuation_finding(folder, tokenizer, stops)
    else:
        yield False, "continuation: not tried"


def _tensor_findings(wanted: dict[str, nn.Parameter],
                     infos: dict[str, TensorInfo]) -> Iterator[Finding]:
    """Whether the files hold the model's tensors, and in its shapes."""
    wrong_names = [f"{k} missing" for k in wanted if k not in infos]
    wrong_names += [f"{k} not of this model" for k in infos if k not in wanted]
    yield not wrong_names, (f"tensors: {first_five(wrong_names)}" if wrong_names
                            else f"tensors: all {len(wanted)} are there")
    wrong_shapes = [f"{k} {infos[k].shape}, expected {tuple(p.shape)}" for k, p in wanted.items()
                    if k in infos and infos[k].shape != tuple(p.shape)]
    yield not wrong_shapes, f"shapes: {first_five(wrong_shapes) or 'as config.json says'}"


def _number_finding(folder: Path, base: Path, infos: dict[str, TensorInfo]) -> Finding:
    """Whether all numbers of the model, and of the adapter if there is one, are finite."""
    adapter = {}
    if folder != base:
        adapter = read_header(folder / ADAPTER_WEIGHTS)
    wrong = []
    for name, info in [*infos.items(), *adapter.items()]:
        try:
            check_finite(read_tensor(info), name)
        except UserError as e:
            wrong.append(str(e).split(";")[0])
    return not wrong, f"numbers: {first_five(wrong) or 'all finite'}"


def _head_finding(base: Path, tied: bool, infos: dict[str, TensorInfo]) -> Finding:
    """Whether there is a head, and whether the stored copy of a tied one is the embeddings."""
    head, embedding = tensor_infos(base).get("lm_head.weight"), infos.get(
        "model.embed_tokens.weight")
    if tied and head is not None and embedding is not None:
        if torch.equal(read_tensor(head), read_tensor(embedding)):
            return True, "head: tied, and its copy in the file is the same"
        return False, "head: tied, and its copy in the file is another"
    if tied:
        return True, "head: tied to the embeddings"
    if head is not None:
        return True, "head: its own"
    return False, "head: neither tied nor there"


def _vocabulary_finding(tokenizer: Tokenizer, vocab_size: int,
                        infos: dict[str, TensorInfo]) -> Finding:
    """Whether config, embeddings and tokenizer agree about the vocabulary."""
    used = (tokenizer.bos, tokenizer.eos, *tokenizer.byte_lengths.nonzero()[0][-1:].tolist())
    largest = max(x for x in used if x is not None)
    rows = 0
    if "model.embed_tokens.weight" in infos:
        rows = infos["model.embed_tokens.weight"].shape[0]
    return rows == vocab_size > largest, (
        f"vocabulary: {vocab_size} in config.json, {rows} embeddings, the tokenizer's "
        f"{tokenizer.vocab_size} ids are used up to {largest}")


def _bos_finding(tokenizer: Tokenizer) -> Finding:
    """Whether a document has one BOS, at its beginning."""
    if tokenizer.bos is None:
        return True, "BOS: the tokenizer has none"
    ids = tokenizer.document(TEXT)
    count = ids.count(tokenizer.bos)
    return count == 1 and ids[0] == tokenizer.bos, (
        f"BOS: {count} in a document, expected one, at its beginning")


def _stop_finding(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> Finding:
    """Whether the files name stop ids, EOS among them, inside the vocabulary."""
    stops, file = configured_stop_ids(folder)
    valid = all(type(x) is int and 0 <= x < vocab_size for x in stops)
    right = bool(stops) and valid and (tokenizer.eos is None or tokenizer.eos in stops)
    return right, (f"stop ids: {stops} in {file.name if file else 'no file'}, vocabulary "
                   f"{vocab_size}, EOS {tokenizer.eos}")


def _continuation_finding(folder: Path, tokenizer: Tokenizer, stops: list[Any]) -> Finding:
    """Whether the model loads and continues a text; the text is shown."""
    ids = tokenizer.document(TEXT)
    start = ids[: max(1, len(ids) // 4)]  # far from where a sentence ends
    try:
        model, _ = load_model(folder, dtype=None)
        new = min(16, model.config.max_position_embeddings - 1)
        [answer] = completions(model.eval(), [start], SamplingParams(new, temperature=0.0),
                               StoppingCriteria(set(stops)), tokenizer.bos)
    except UserError as e:
        return False, f"continuation: {e}"
    return True, f"continuation: {tokenizer.decode(start)!r} -> {tokenizer.decode(answer.ids)!r}"


def chat_finding(template: ChatTemplate, stops: list[Any], vocab: int) -> tuple[bool, str]:
    """Whether a conversation has one BOS, at its beginning, and its last turn ends with a stop id.
    """
    try:
        ids, end = template.encode(GREETING), template.end_of_turn
    except UserError as e:
        return False, f"chat template: {e}"
    tokenizer = template.tokenizer
    if above := [tokenizer.pieces[i] for i in ids if i >= vocab]:
        return False, f"chat template: {above[0]} is beyond the vocabulary"
    bos = tokenizer.bos
    if bos is not None and (ids.count(bos), ids[:1]) != (1, [bos]):
        return False, (f"chat template: writes BOS {ids.count(bos)} times around one question and "
                       "its answer, expected once, at the beginning")
    name = "no control token" if end is None else tokenizer.pieces[end]
    return end in stops, f"chat template: ends a turn with {name}" + (
        "" if end in stops else ", which is no stop id")


def card(s: Card) -> None:
    """Write README.md into the model's folder. A README.md that this command did not write is
    kept."""
    folder = resolve_model_dir(s.model)
    file = folder / "README.md"
    text = read_card(folder)
    if text and WRITTEN_BY_US not in text and not s.force:
        raise UserError(f"{file}: was not written by this command, so it is not replaced; move it, "
                        "or give --force", STORAGE)
    if s.licence and not re.fullmatch(r"[\w.-]+", s.licence):
        raise UserError(f"--licence {s.licence!r}: expected a licence's name on the hub, such as "
                        "mit", FLAGS)
    try:
        write_text(file, model_card(folder, s.run, s.results, s.language, s.licence))
    except OSError as e:
        raise UserError(f"{file}: cannot be written ({e.strerror})", STORAGE) from None
    print(f"wrote {file}; read it before it is published")


def push(s: Push) -> None:
    """Print which files would be uploaded and where, ask, and upload them."""
    folder = Path(s.model).expanduser()
    if not folder.is_dir():
        raise UserError(f"--model {s.model}: no such folder; give a folder of this machine", FLAGS)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", s.repo):
        raise UserError(f"--repo {s.repo!r}: expected org/name", FLAGS)
    folder = resolve_model_dir(folder)
    known = (*MODEL_FILES, MERGE_RECORD, "README.md")
    entries = sorted(folder.iterdir())
    files = [check_model_file(folder, f.name) for f in entries if any(f.match(p) for p in known)]
    for f in files:
        print(f"{f.stat().st_size:>16,}  {f.name}")
    others = [f.name for f in entries if f not in files]
    if others:
        print(f"not uploaded: {console.printable(first_five(others))}")
    visibility = "PUBLIC: everybody can see them" if s.public else "private"
    print(f"{sum(f.stat().st_size for f in files):>16,}  bytes to {s.repo}, {visibility}")
    if folder / "README.md" not in files:
        console.info("no README.md: python export.py card writes one")
    if folder / ADAPTER_CONFIG in files:
        name = str(read_model_json(folder, ADAPTER_CONFIG).get("base_model_name_or_path"))
        if Path(name).is_absolute():
            console.info(
                f"{ADAPTER_CONFIG} names the base {name}, a folder of this machine only; write "
                "the base's hub id there, or merge the adapter"
            )
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise UserError("found no token of the hub; run: hf auth login, or set HF_TOKEN", FLAGS)
    if not s.yes:
        if not sys.stdin.isatty():
            raise UserError("nothing was uploaded: there is no terminal for the question; give "
                            "--yes", FLAGS)
        try:
            answer = input("upload? [y/N] ")
        except EOFError:  # end of input
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was uploaded")
            return
    print(send(folder, [f.name for f in files], s, token))


def send(folder: Path, files: list[str], s: Push, token: str) -> str:
    """Upload files to the hub and return their address. UserError gives the reason of a failure in
    one line, without the token."""
    from huggingface_hub import HfApi, errors

    api = HfApi(token=token)
    try:
        api.create_repo(s.repo, private=not s.public, exist_ok=True)
        if not s.public and api.repo_info(s.repo).private is False:
            raise UserError(f"{s.repo}: exists and is public; give --public to upload there, or "
                            "name another repository", FLAGS)
        return str(api.upload_folder(
            repo_id=s.repo, folder_path=folder, allow_patterns=files,
            commit_message="Sent by kinyarwanda_ft_llm").commit_url)
    except errors.OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set; unset it to upload"
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        reasons = {401: "the token is not valid; run: hf auth login",
                   403: "the token may not write there; use a token with write access, or another "
                        "--repo",
                   404: "the token sees no such organisation; check --repo"}
        reason = reasons.get(status, f"the hub answered {status}: {one_line(e)}")
    except UserError:
        raise
    except Exception as e:  # any error of the network
        reason = f"the hub cannot be reached ({type(e).__name__}: {one_line(e)})"
    raise UserError(f"{s.repo}: not uploaded; {reason}".replace(token, "***"), STORAGE)


def one_line(error: Exception) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    console.run(
        lambda: {"merge": merge, "check": check, "card": card, "push": push}[NAME](SETTINGS)
    )
