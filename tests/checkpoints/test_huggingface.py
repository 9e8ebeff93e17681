"""Folders in and out against safetensors, transformers and peft, and every way one can be wrong."""

import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import safetensors
import safetensors.torch as st
import torch
import transformers

import lora
from checkpoints import model_writer, safetensors_header
from checkpoints.huggingface import load_model, model_folder, save_model
from checkpoints.model_folder import ADAPTER_WEIGHTS, base_model_dir, resolve_model_dir, stop_ids
from checkpoints.peft_adapter import save_adapter
from checkpoints.safetensors_header import INDEX_FILE, read_header
from helpers import tiny
from runtime.console import STORAGE, UserError
from runtime.paths import ROOT

SHAPES = list(tiny.SHAPES)
IDS = tiny.tokens(2, 40)
CONFIG = "adapter_config.json"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a shape, made once; tests that change it work on a copy."""
    root, done = tmp_path_factory.mktemp("models"), {}

    def get(shape="llama3", sharded=False, **more) -> Path:
        key = f"{shape}-{sharded}-{sorted(more.items())}"
        if key not in done:
            done[key] = tiny.folder(root / str(len(done)) / "model", shape, sharded=sharded, **more)
        return done[key]

    return get


@pytest.fixture
def copy(made, tmp_path):
    """A copy to damage."""
    def get(*args, name="copy", **more) -> Path:
        return Path(shutil.copytree(made(*args, **more), tmp_path / name))

    return get


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every file's tensors, by safetensors' own reader."""
    return {f.name: st.load_file(f) for f in sorted(folder.glob("*.safetensors"))}


def edit(folder: Path, change, file: str | None = None) -> Path:
    """Write a folder's (first) weights file again after `change(tensors)`."""
    path = folder / file if file else min(folder.glob("*.safetensors"))
    found = st.load_file(path)
    change(found)
    st.save_file({k: x.clone() for k, x in found.items()}, path, metadata={"format": "pt"})
    return folder


def words(folder: Path, file: str = "config.json", **changes) -> Path:
    """Change words of a JSON file; None takes one out."""
    path = folder / file
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    return folder


def refusal(call, *args, **more) -> str:
    """The one line with which something is refused."""
    with pytest.raises(UserError) as e:
        call(*args, **more)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


def logits(model) -> torch.Tensor:
    """Our logits for IDS."""
    with torch.no_grad():
        return tiny.logits(model, IDS)


def peers_logits(folder: Path) -> torch.Tensor:
    """transformers' logits for IDS, of the folder as it opens it."""
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(IDS).logits


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal to 1e-5."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def exact(peer: torch.nn.Module) -> torch.Tensor:
    """A peer's logits for IDS computed in float64: in float32 its own rounding is as far from them
    as ours, and the two may add up."""
    with torch.no_grad():
        return deepcopy(peer).double()(IDS).logits.float()


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit and in dtype, in the same files."""
    before, after = tensors(a), tensors(b)
    return {f: x.keys() for f, x in before.items()} == {f: x.keys() for f, x in after.items()} \
        and all(torch.equal(x, after[f][k]) and x.dtype == after[f][k].dtype
                for f, here in before.items() for k, x in here.items())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_loading_computes_what_transformers_does_and_saving_gives_it_back(made, tmp_path, shape,
                                                                          sharded):
    folder = made(shape, sharded)
    model, tokenizer = load_model(folder)
    close(logits(model), peers_logits(folder))
    assert tokenizer.encode("Muraho neza") and all(p.requires_grad for p in model.parameters())
    save_model(model, tmp_path / "out", source=folder)
    assert (len(tensors(folder)) > 1) == sharded and same(folder, tmp_path / "out")
    assert {f.name for f in folder.iterdir()} == {f.name for f in (tmp_path / "out").iterdir()}
    for file in folder.iterdir():
        if file.name == INDEX_FILE:
            a, b = (json.loads((x / file.name).read_text()) for x in (folder, tmp_path / "out"))
            assert a == b
        elif file.suffix != ".safetensors":
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    torch.testing.assert_close(peers_logits(tmp_path / "out"), peers_logits(folder), rtol=0, atol=0)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_files_dtype_comes_back_whatever_it_was_computed_in(made, tmp_path, sharded):
    folder = made("llama31", sharded, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, None):
        model, _ = load_model(folder, dtype=dtype, tokenizer=False)
        assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
        save_model(model, tmp_path / "out", source=folder)
        assert same(folder, tmp_path / "out")
        a, b = (x / "config.json" for x in (folder, tmp_path / "out"))
        assert a.read_bytes() == b.read_bytes()


def test_another_dtype_is_written_and_said_in_the_config_if_asked_for(made, tmp_path):
    folder = made("llama32", True, dtype=torch.bfloat16)
    save_model(load_model(folder)[0], tmp_path / "out", source=folder, dtype=torch.float16)
    written = [x for here in tensors(tmp_path / "out").values() for x in here.values()]
    assert {x.dtype for x in written} == {torch.float16}
    a, b = (json.loads((x / "config.json").read_text()) for x in (folder, tmp_path / "out"))
    assert a.pop("dtype") == "bfloat16" and b.pop("dtype") == "float16" and a == b
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in written)
    close(logits(load_model(tmp_path / "out")[0]), peers_logits(tmp_path / "out"))


def see_and_write(folder: Path, style: str) -> transformers.PreTrainedModel:
    """Write a tiny Gemma 3 that also sees pictures; `style`: its tensors' names on the hub."""
    text = tiny.config("gemma3")
    words = {k: v for k, v in text.items() if k not in ("architectures", "model_type")}
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**words),
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        image_token_index=7, mm_tokens_per_image=4)).eval()
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    state = st.load_file(folder / "model.safetensors")
    if style == "hub":  # as published: language_model.model.layers..., vision_tower...
        state = {k.replace("model.language_model.", "language_model.model.")
                 if "language_model" in k else k.removeprefix("model."): x.contiguous()
                 for k, x in state.items()}
        st.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("named, wanted", [
    (None, {2}), (2, {2}), ([2, 7], {2, 7}), (9, {2, 9}), ("2", "eos_token_id '2'"),
    ([1, tiny.V], f"is not an id of the tokenizer, which has {tiny.V}")])
def test_an_answer_ends_where_the_tokenizer_or_the_generation_config_says(copy, named, wanted):
    """And config.json, as in transformers, where generation_config.json names none."""
    folder = copy()
    tokenizer = load_model(folder)[1]
    words = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink(missing_ok=True)
    for file, there in (("config.json", None), ("generation_config.json", 11 if named else None)):
        (folder / "config.json").write_text(json.dumps({**words, "eos_token_id": there}))
        (folder / file).write_text(json.dumps({**words, "eos_token_id": named}))
        if isinstance(wanted, str):
            said = refusal(stop_ids, folder, tokenizer)
            assert wanted in said and f"{folder / file}" in said
        else:
            assert stop_ids(folder, tokenizer) == wanted


@pytest.mark.parametrize("style", ["hub", "new"])
def test_the_text_part_of_a_model_that_sees_pictures_is_read_alone(tmp_path, style):
    peer = see_and_write(tmp_path / "both", style)
    names = st.load_file(tmp_path / "both" / "model.safetensors")
    assert any("vision_tower" in k for k in names)
    model, _ = load_model(tmp_path / "both")
    ids = tiny.tokens(2, 40).clamp(min=8)
    with torch.no_grad():
        wanted = peer(ids).logits
        torch.testing.assert_close(tiny.logits(model, ids), wanted, rtol=1e-5, atol=1e-5)
    save_model(model, tmp_path / "text", source=tmp_path / "both")
    written = st.load_file(tmp_path / "text" / "model.safetensors").values()
    contents = model_folder(model, tmp_path / "both")
    assert contents.tensor_bytes(dict(model.named_parameters())) == sum(x.nbytes for x in written)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert type(again).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert load_model(tmp_path / "text")[0].config == model.config


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_in_the_words_of_the_published_models_loads_the_same(copy, shape):
    folder = copy(shape)
    (folder / "config.json").write_text(json.dumps(tiny.config(shape)))
    close(logits(load_model(folder)[0]), peers_logits(folder))


def test_tied_weights_are_stored_once_and_a_copy_in_the_file_must_be_the_same(copy, tmp_path):
    folder = edit(copy("llama32"), lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model, _ = load_model(folder, dtype=torch.bfloat16)
    save_model(model, tmp_path / "out", source=folder)
    assert "lm_head.weight" not in tensors(tmp_path / "out")["model.safetensors"]
    edit(folder, lambda t: t["lm_head.weight"][3, 3].add_(1))
    said = refusal(load_model, folder)
    assert "tie_word_embeddings" in said and "lm_head.weight" in said


def test_old_rotary_buffers_are_left_aside(copy):
    folder = edit(copy(), lambda t: t.update(
        {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    close(logits(load_model(folder)[0]), peers_logits(folder))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux for its memory maps")
def test_a_model_is_mapped_from_its_file_and_training_it_never_writes_there(made):
    folder = made("llama2")
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load_model(folder)
    assert str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()
    first = logits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    doc, pos = torch.zeros_like(IDS), torch.arange(40).expand_as(IDS)
    model(IDS, doc, pos, IDS).sum().backward()
    optimizer.step()
    assert (logits(model) - first).abs().max() > 0.1
    assert (folder / "model.safetensors").read_bytes() == before
    assert torch.equal(logits(load_model(folder)[0]), first)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_the_memory_of_the_result(tmp_path, dtype):
    tiny.folder(tmp_path / "m", dtype=torch.bfloat16, vocab_size=2000, hidden_size=1024,
                intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8)
    code = f"""if True:
        import resource, torch, weights, model, tokenizer
        from safetensors import safe_open
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        torch.randn(512, 512) @ torch.randn(512, 512)
        before = peak()
        m, _ = load_model({str(tmp_path / "m")!r}, dtype=torch.{dtype})
        size = sum(p.nbytes for p in m.parameters()) / 2**20
        print(size, peak() - before)
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=ROOT).stdout
    size, grown = map(float, out.split())
    assert size > 100 and grown < 1.15 * size + 30  # MiB


def test_reading_a_folder_never_touches_the_network(made, monkeypatch):
    def no(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", no)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    assert load_model(made("llama3", True))[1] is not None


def test_only_the_words_that_changed_change_in_the_config(made, tmp_path):
    folder = made("llama31")
    bigger = tiny.peer("llama31", vocab_size=tiny.V + 16)
    grown = tiny.ours(bigger, "llama31", vocab_size=tiny.V + 16)
    save_model(grown, tmp_path / "out", source=folder)
    a, b = (json.loads((x / "config.json").read_text()) for x in (folder, tmp_path / "out"))
    assert b.pop("vocab_size") == tiny.V + 16 and a.pop("vocab_size") == tiny.V and a == b
    with torch.no_grad():
        torch.testing.assert_close(peers_logits(tmp_path / "out"), bigger(IDS).logits)


def test_a_shape_without_weights_gives_one_file_in_the_models_dtype(made, tmp_path):
    like = tmp_path / "shape"
    like.mkdir()
    (like / "config.json").write_text(json.dumps(tiny.config("llama32", torch_dtype="float16")))
    tiny.write_tokenizer(like)
    model = tiny.ours(tiny.peer("llama32"), "llama32")
    save_model(model, tmp_path / "out", source=like)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    again, tokenizer = load_model(tmp_path / "out")
    assert torch.equal(logits(again), logits(model)) and tokenizer.bos == 1


def test_a_model_may_be_saved_over_the_folder_it_is_mapped_from(copy):
    folder = copy("llama31", True)
    model, _ = load_model(folder)
    first = logits(model)
    with torch.no_grad():
        model.head.mul_(2)
    for _ in range(2):
        save_model(model, folder, source=folder)
    torch.testing.assert_close(logits(load_model(folder)[0]), 2 * first)
    assert [x.name for x in folder.parent.iterdir()] == [folder.name]  # nothing is left beside it


def test_a_folder_that_holds_anything_else_is_not_replaced(made, tmp_path):
    model, _ = load_model(made())
    for name in ("thesis.txt", "pytorch_model.bin", ".git"):
        out = tmp_path / name[-3:] / "out"
        out.mkdir(parents=True)
        (out / name).write_text("years of work")
        (out / "config.json").write_text("{}")
        with pytest.raises(UserError) as e:
            save_model(model, out, source=made())
        assert name in str(e.value) and e.value.code == STORAGE
        assert sorted(f.name for f in out.iterdir()) == sorted([name, "config.json"])


@pytest.mark.parametrize("why", [
    OSError(28, "No space left on device"),
    safetensors.SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_leaves_the_older_model_whole_and_nothing_beside_it(copy, monkeypatch, why):
    folder = copy("llama3", True)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    model, _ = load_model(folder)
    calls = []

    def fails(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise why
        return st.save_file(*args, **more)

    monkeypatch.setattr(model_writer, "save_file", fails)
    with pytest.raises(UserError) as e:
        save_model(model, folder, source=folder)
    assert "No space left" in str(e.value) and e.value.code == STORAGE
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert [x.name for x in folder.parent.iterdir()] == [folder.name]


def test_a_rename_that_fails_gives_the_older_model_its_name_back(copy, monkeypatch):
    folder = copy()
    model, _ = load_model(folder)
    rename = Path.rename

    def fails(self, target):
        if self.name.startswith(".tmp-"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    assert "Input/output error" in refusal(save_model, model, folder, folder)
    assert [x.name for x in folder.parent.iterdir()] == [folder.name]
    assert load_model(folder)


def test_a_place_that_cannot_be_written_is_said_in_one_line(made, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(UserError) as e:
            save_model(load_model(made())[0], out, source=made())
        assert str(out) in str(e.value) and e.value.code == STORAGE
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(("umask", "file", "folder"), [
    (0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0, 0o666, 0o777)])
def test_modes_are_what_the_umask_leaves(made, tmp_path, umask, file, folder):
    model, _ = load_model(made("llama3", True))
    old = os.umask(umask)
    try:
        save_model(model, tmp_path / "out", source=made("llama3", True))
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "out").iterdir()} == {file}


def test_a_link_is_followed_once_and_stays_a_link(made, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    save_model(load_model(made())[0], tmp_path / "out", source=made())
    assert (tmp_path / "out").is_symlink() and load_model(tmp_path / "out")
    assert (tmp_path / "disk" / "model" / "config.json").exists()


def test_a_dtype_too_narrow_for_a_weight_is_refused_both_ways(copy, tmp_path):
    folder = edit(copy(), lambda t: t[Q][0, 0].fill_(1e6))
    model, _ = load_model(folder)
    assert Q in refusal(save_model, model, tmp_path / "out", folder, torch.float16)
    assert not (tmp_path / "out").exists()
    said = refusal(load_model, folder, dtype=torch.float16)
    assert Q in said and "float16" in said


@pytest.mark.parametrize("name", [
    "", "no-such-folder", "/no/such/folder", "a b/c", "../x/y", "org/name/more", "org/",
    "~nobody/x", "https://huggingface.co/org/name", "org/name@"])
def test_what_is_no_folder_and_no_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal(resolve_model_dir, name)
    assert repr(name) in said and "org/name@revision" in said


def test_a_folder_of_other_things_is_refused(made, tmp_path, monkeypatch):
    assert "no config.json" in refusal(load_model, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    said = refusal(load_model, "out/kin")  # a slip of the pen, not a model of the user `out`
    assert "not in out" in said and "out/kin@main" in said
    assert "no such folder" in refusal(load_model, made() / "config.json")


def test_a_runs_folder_stands_for_its_model(copy, tmp_path):
    shutil.copytree(copy(), tmp_path / "run" / "model")
    assert resolve_model_dir(tmp_path / "run") == tmp_path / "run" / "model"


class _Trap:
    """Would leave a file behind if anything unpacked it."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def test_weights_that_can_run_code_are_refused_unopened(copy, tmp_path):
    import pickle

    trap = pickle.dumps(_Trap(tmp_path / "canary"))
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "w.pkl"):
        folder = copy(name=name.replace(".", "-"))
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(trap)
        said = refusal(load_model, folder)
        assert name in said and "convert" in said
    for payload in (trap, trap * 100, b"PK\x03\x04" + trap):
        folder = copy(name=f"as-safetensors-{len(payload)}")
        (folder / "model.safetensors").write_bytes(payload)
        assert "model.safetensors" in refusal(load_model, folder)
        shutil.move(folder / "model.safetensors", folder / "other.bin")
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {Q: "other.bin"}}))
        assert "other.bin" in refusal(load_model, folder)
    assert not (tmp_path / "canary").exists()
    pickle.loads(trap)
    assert (tmp_path / "canary").exists()  # the trap does work


def test_ten_traps_are_refused_under_python_o_as_well(copy, tmp_path):
    """Pickles under every name, in a model, an adapter and a checkpoint; nothing unpacks them."""
    import pickle

    canary = tmp_path / "canary"
    trap = pickle.dumps(_Trap(canary))
    names = ("pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "w.pkl",
             "model.safetensors", "tokenizer.model", "tokenizer.json", "config.json",
             "adapter_model.bin")
    folders = []
    for i, name in enumerate(names):
        folder = copy(name=f"trap{i}")
        if i < 5:
            (folder / "model.safetensors").unlink()
        if name == "adapter_model.bin":
            (folder / CONFIG).write_text(json.dumps(
                {"peft_type": "LORA", "base_model_name_or_path": str(copy(name="clean")), "r": 2,
                 "lora_alpha": 2, "target_modules": ["q_proj"]}))
        (folder / name).write_bytes(trap)
        folders.append(str(folder))
    code = f"""if True:
        from checkpoints.huggingface import load_model
        from runtime.console import UserError
        for folder in {folders!r}:
            try:
                load_model(folder)
            except UserError as e:
                print(e.code, str(e).count(chr(10)), folder, e)
    """
    env = {k: x for k, x in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True,
                          cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10 and all(x.startswith("3 0 ") for x in lines), done.stdout
    assert not canary.exists()


def test_a_folder_without_weights_says_so(copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    said = refusal(load_model, folder)
    assert "no model.safetensors" in said and "no other weights" in said


HOSTILE = ["../canary.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", None, 7, ["a"],
           "x\0.safetensors", "link.safetensors", "%2e%2e%2fcanary.safetensors",
           "..\\canary.safetensors", "canary.safetensors\n"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shard_outside_the_folder_is_refused_and_never_opened(copy, tmp_path, monkeypatch, name):
    folder = copy(sharded=True)
    canary = tmp_path / "canary.safetensors"
    shutil.copy(min(folder.glob("*.safetensors")), canary)
    (folder / "link.safetensors").symlink_to(canary)
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    opened = []
    monkeypatch.setattr(safetensors_header, "read_header",
                        lambda x: opened.append(x.resolve()) or read_header(x))
    words(folder, INDEX_FILE, weight_map={**index, min(index): name})
    said = refusal(load_model, folder)
    assert "outside" in said or "expected .safetensors" in said
    assert canary.resolve() not in opened


def test_a_config_or_a_weights_file_that_is_a_link_out_is_refused(copy, tmp_path):
    for name in ("config.json", "model.safetensors", CONFIG):
        folder = copy(name=f"of-{name}")
        if (folder / name).exists():
            shutil.move(folder / name, tmp_path / name)
        else:
            (tmp_path / name).write_text(json.dumps({"base_model_name_or_path": "x/y"}))
        (folder / name).symlink_to(tmp_path / name)
        assert "outside the model folder" in refusal(load_model, folder)


def test_the_hubs_cache_with_its_links_loads(made, tmp_path):
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, file in enumerate(made("llama3", True).iterdir()):
        shutil.copy(file, repo / "blobs" / f"b{i}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"b{i}")
    model, _ = load_model(snapshot)
    close(logits(model), peers_logits(made("llama3", True)))
    save_model(model, tmp_path / "out", source=snapshot)
    assert not any(f.is_symlink() for f in (tmp_path / "out").iterdir())
    lora.add_lora(model, 2, 4.0, 0.0, ["q_proj"])
    save_adapter(model, tmp_path / "adapter", base=snapshot, source=snapshot)
    said = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == ("org/name", "0123abc")


@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_is_needed(copy, sharded):
    folder = copy("llama2", sharded, num_hidden_layers=1)
    for file, here in tensors(folder).items():
        whole = (folder / file).read_bytes()
        for name in here:
            edit(folder, lambda t, name=name: t.pop(name), file)
            said = refusal(load_model, folder)
            assert name in said or "0 layers" in said
            (folder / file).write_bytes(whole)
    assert load_model(folder)


@pytest.mark.parametrize(("name", "value", "says"), [
    ("model.layers.0.self_attn.q_proj.bias", torch.zeros(32), "not in the model"),
    ("model.layers.2.mlp.up_proj.weight", torch.zeros(48, 32), "3 layers"),
    ("transformer.wte.weight", torch.zeros(2), "not in the model"),
    (Q, torch.zeros(32, 31), "(32, 31), config.json expects (32, 32)"),
    (Q, torch.zeros(32, 32, 1), "(32, 32, 1)"),
    (Q, torch.zeros(32, 32, dtype=torch.int64), "is I64, expected"),
    (Q, torch.zeros(32, 32).to(torch.float8_e4m3fn), "is F8_E4M3, expected"),
    (Q, torch.full((32, 32), float("nan")), "NaN"),
    ("model.embed_tokens.weight", torch.zeros(tiny.V + 1, 32), "expects (320, 32) by vocab_size")])
def test_a_tensor_that_does_not_fit_is_named(copy, name, value, says):
    said = refusal(load_model, edit(copy(), lambda t: t.update({name: value})))
    assert says in said and (name in said or "layers" in says)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_none_is_found(copy, bad, dtype):
    folder = edit(copy(dtype=dtype), lambda t: t[Q][17, 5].fill_(bad))
    for taken in (None, torch.float32):
        said = refusal(load_model, folder, dtype=taken)
        assert Q in said and "model.safetensors" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers_are_taken_though_their_sum_is_infinite(copy, dtype):
    folder = edit(copy(dtype=dtype), lambda t: t[Q].fill_(torch.finfo(dtype).max))
    model, _ = load_model(folder, dtype=dtype)
    q = model.get_parameter(Q)
    assert not q.sum().isfinite() and q.isfinite().all()


def test_many_wrong_tensors_are_five_names_and_a_count(copy):
    folder = edit(copy(), lambda t: [t.pop(k) for k in list(t) if "proj" in k and k != Q])
    said = refusal(load_model, folder)
    assert said.count("model.layers.") == 5 and "and 8 more" in said


def test_a_head_that_is_neither_there_nor_tied_is_missed(copy):
    said = refusal(load_model, edit(copy(), lambda t: t.pop("lm_head.weight")))
    assert "lm_head.weight" in said and "tie_word_embeddings" in said


def test_shards_and_their_index_must_agree(copy):
    folder = copy("llama3", True)
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    first, *_, last = sorted(set(index.values()))
    here = next(k for k, f in index.items() if f == first)

    def with_map(told):
        return refusal(load_model, words(folder, INDEX_FILE, weight_map=told))

    assert here in with_map({k: f for k, f in index.items() if k != here})
    assert here in with_map({**index, here: last})
    assert "ghost" in with_map({**index, "ghost": last})
    assert "model-9.safetensors" in with_map({**index, here: "model-9.safetensors"})
    for empty in ({}, [], "x", None):
        assert "weight_map" in with_map(empty)
    words(folder, INDEX_FILE, weight_map=index)
    edit(folder, lambda t: t.update({here: torch.zeros(2)}), last)
    said = refusal(load_model, folder)
    assert here in said and first in said and last in said
    (folder / last).unlink()
    assert f"{last}: no such file" in refusal(load_model, folder)


def test_two_sets_of_weights_in_one_folder_are_refused(copy, made):
    folder = copy("llama3", True)
    shutil.copy(made("llama3") / "model.safetensors", folder)
    assert "remove the one that you do not want" in refusal(load_model, folder)
    names = tensors(made("llama3"))["model.safetensors"]
    words(folder, INDEX_FILE, weight_map=dict.fromkeys(names, "model.safetensors"))
    assert load_model(folder)


def test_a_file_cut_short_anywhere_is_refused_with_both_sizes(tmp_path, copy):
    file = tmp_path / "whole.safetensors"
    st.save_file({f"t{i}": torch.randn(4, 40) for i in range(4)}, file)
    whole, cut = file.read_bytes(), tmp_path / "cut.safetensors"
    assert len(whole) > 2000
    cut.write_bytes(whole)
    for n in reversed(range(len(whole))):
        os.truncate(cut, n)
        assert f"{n} bytes" in refusal(read_header, cut)
    cut.write_bytes(whole + b"\0")
    assert "longer than its header" in refusal(read_header, cut)
    cut.write_bytes(whole)
    assert len(read_header(cut)) == 4
    folder = copy()
    size = (folder / "model.safetensors").stat().st_size
    os.truncate(folder / "model.safetensors", size - 1)
    said = refusal(load_model, folder)
    assert f"{size - 1} bytes, expected {size}" in said and "model.safetensors" in said


def with_header(text: bytes, data: bytes = b"\0" * 16) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


ONE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'


@pytest.mark.parametrize("content", [
    b"", b"\0" * 7, b"\xff" * 8, struct.pack("<Q", 1 << 63) + b"{}",
    struct.pack("<Q", (100 << 20) + 1) + b"{}", with_header(b"not json"), with_header(b"[]"),
    with_header(b"\xff\xfe{}"), with_header(b"[" * 100000),
    with_header(b'{"a":1}'), with_header(b'{"a":{"dtype":"F32"}}'), with_header(b'{"a":null}'),
    with_header(ONE + b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'),  # twice
    with_header(ONE + b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', b"\0" * 12),
    with_header(ONE + b'"b":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}'),  # hole
    with_header(ONE + b'"b":{"dtype":"F32","shape":[3],"data_offsets":[8,16]}}'),  # shape
    with_header(ONE + b'"b":{"dtype":"F31","shape":[2],"data_offsets":[8,16]}}'),  # dtype
    with_header(ONE + b'"b":{"dtype":"F32","shape":[-2],"data_offsets":[8,16]}}'),
    with_header(ONE + b'"b":{"dtype":"F32","shape":[2],"data_offsets":[16,8]}}'),
    with_header(ONE + b'"b":{"dtype":"F32","shape":[2],"data_offsets":[-8,16]}}'),
    with_header(ONE + b'"b":{"dtype":"F32","shape":[1e999],"data_offsets":[8,16]}}'),
    with_header(ONE + b'"b":{"dtype":"F32","shape":[NaN],"data_offsets":[8,16]}}'),
    with_header(ONE + b'"b":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[8,16]}}'),
    with_header(ONE + b'"b":{"dtype":"F32","shape":[4294967296,429496729],"data_offsets":[8,16]}}'),
])
def test_a_header_that_lies_is_refused(copy, content):
    folder = copy()
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refusal(load_model, folder)


def test_random_damage_to_a_header_is_refused_or_changes_nothing_that_is_read(copy):
    folder = copy("llama2", num_hidden_layers=1, tokenizer=False)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    chance, refused = random.Random(0), 0
    for _ in range(400):
        b = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.choice([chance.randrange(8), chance.randrange(8, 8 + n)])
            b[at] = chance.choice(b'0123456789{}[]":,aF\0\xff ')
        file.write_bytes(bytes(b))
        try:
            model, _ = load_model(folder, tokenizer=False)
        except UserError as e:
            assert "\n" not in str(e)
            refused += 1
        else:  # then it is what safetensors itself reads
            truth = st.load_file(file)
            assert all(torch.equal(p, truth[k]) for k, p in model.named_parameters())
    assert refused > 300


@pytest.mark.parametrize(("text", "says"), [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"[]", "expected an object"),
    (b"\xff\xfe", "not valid JSON"), (b'{"rms_norm_eps": NaN}', "NaN"),
    (b'{"vocab_size": 320, "vocab_size": 320}', "duplicate key 'vocab_size'"),
    (b'{"a": -Infinity}', "-Infinity"), (b'{"a":' * 100000, "JSON|nested"),
    (b'{"vocab_size": ' + b"9" * 5000 + b"}", "JSON")])
def test_a_config_that_is_no_strict_json_is_refused(copy, text, says):
    folder = copy()
    (folder / "config.json").write_bytes(text)
    said = refusal(load_model, folder)
    assert str(folder / "config.json") in said and any(x in said for x in says.split("|"))


@pytest.mark.parametrize(("change", "says"), [
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ({"vocab_size": 321}, "vocab_size"), ({"hidden_size": 64}, "hidden_size"),
    ({"intermediate_size": 47}, "intermediate_size"),
    ({"num_hidden_layers": 3}, "num_hidden_layers"),
    ({"num_hidden_layers": 1}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"), ({"num_key_value_heads": 4}, "k_proj"),
    ({"head_dim": 16}, "q_proj"), ({"attention_bias": True}, "bias"),
    ({"num_attention_heads": 2**30, "num_key_value_heads": 1, "head_dim": 2**30}, "config.json"),
    ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True}, None)])
def test_a_config_of_another_model_is_refused_by_word_or_tensor(copy, change, says):
    folder = words(copy(), **change)
    if says is None:  # words that ask for foreign code are not even looked at
        assert load_model(folder)
    else:
        said = refusal(load_model, folder)
        assert says in said and folder.name in said


def test_any_word_of_the_config_is_refused_or_harmless(copy):
    folder = copy("llama3")
    text = json.loads((folder / "config.json").read_text())
    for key in text:
        for value in (0, -1, 10**12, 1e12, "x", None, [], {}):
            (folder / "config.json").write_text(json.dumps({**text, key: value}))
            try:
                load_model(folder, tokenizer=False)
            except UserError as e:
                assert "\n" not in str(e)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused_and_an_unused_control_token_is_not(tmp_path):
    folder = tiny.folder(tmp_path / "m", vocab_size=300)
    said = refusal(load_model, folder)
    assert str(tiny.V - 1) in said and "299" in said
    assert load_model(folder, tokenizer=False)[1] is None


@pytest.fixture
def adapter(made, tmp_path):
    """A PEFT adapter made by peft on a base of ours, its peer, and where it lies."""
    base = Path(shutil.copytree(made("llama31"), tmp_path / "base"))
    torch.manual_seed(3)
    peer = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"],
                        init_lora_weights=False, task_type="CAUSAL_LM"))
    peer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", base, peer.eval()


def test_an_adapter_by_peft_computes_the_same_here(adapter, monkeypatch, tmp_path):
    folder, base, peer = adapter
    wanted = exact(peer)
    model, tokenizer = load_model(folder)
    close(logits(model), wanted)
    assert not torch.allclose(logits(model), logits(load_model(base)[0]), atol=1e-2)
    assert tokenizer.vocab_size == tiny.V  # the base's, the adapter has none
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in k for k in trained)
    words(folder, CONFIG, base_model_name_or_path="../base")
    monkeypatch.chdir("/")
    close(logits(load_model(folder)[0]), wanted)
    assert base_model_dir(folder).resolve() == base.resolve()


def test_an_adapter_saved_here_computes_the_same_in_peft(adapter, tmp_path):
    folder, base, peer = adapter
    model, _ = load_model(folder)
    save_adapter(model, tmp_path / "again", base=base, source=base)
    assert (tmp_path / "again" / "tokenizer.model").exists()
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval()(IDS).logits
        torch.testing.assert_close(theirs, peer(IDS).logits, rtol=0, atol=0)
    assert torch.equal(logits(load_model(tmp_path / "again")[0]), logits(model))
    assert (tmp_path / "again" / ADAPTER_WEIGHTS).stat().st_mode & 0o777 == \
        (tmp_path / "again" / CONFIG).stat().st_mode & 0o777


def test_a_model_with_an_adapter_is_saved_only_once_merged(adapter, tmp_path):
    folder, _, peer = adapter
    model, _ = load_model(folder)
    assert "merge" in refusal(save_model, model, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()
    lora.merge(model)
    save_model(model, tmp_path / "out", source=folder)  # laid out as the adapter's base
    with torch.no_grad():
        merged = peer.merge_and_unload()(IDS).logits
    close(peers_logits(tmp_path / "out"), merged)


@pytest.mark.parametrize(("damage", "says"), [
    (lambda a, b: shutil.rmtree(b), "base_model_name_or_path"),
    (lambda a, b: words(a, CONFIG, base_model_name_or_path=None), "base_model_name_or_path"),
    (lambda a, b: words(a, CONFIG, base_model_name_or_path=str(a)), "is an adapter itself"),
    (lambda a, b: (a / CONFIG).write_text("{"), f"{CONFIG}: not valid JSON"),
    (lambda a, b: (a / ADAPTER_WEIGHTS).unlink(), f"{ADAPTER_WEIGHTS}: no such file"),
    (lambda a, b: (a / ADAPTER_WEIGHTS).rename(a / "adapter_model.bin"), ADAPTER_WEIGHTS),
    (lambda a, b: os.truncate(a / ADAPTER_WEIGHTS, 2000), "2000 bytes, expected"),
    (lambda a, b: edit(a, lambda t: t[min(t)].fill_(float("nan"))), "NaN"),
    (lambda a, b: edit(a, lambda t: t.pop(min(t))), "missing"),
    (lambda a, b: edit(a, lambda t: t.update({min(t): t[min(t)][:, :-1].clone()})), "expected"),
    (lambda a, b: words(a, CONFIG, use_dora=True), "lora_magnitude_vector"),
    (lambda a, b: words(a, CONFIG, r=8), "expected")])
def test_an_adapter_that_does_not_fit_is_refused(adapter, damage, says):
    folder, base, _ = adapter
    damage(folder, base)
    assert says in refusal(load_model, folder)


def test_an_adapter_knows_its_base_by_its_numbers(adapter, tmp_path):
    folder, base, _ = adapter
    model, _ = load_model(folder)
    save_adapter(model, tmp_path / "own", base=base, source=base)
    wanted = logits(model)
    assert torch.equal(logits(load_model(tmp_path / "own")[0]), wanted)

    narrow = tmp_path / "narrow"  # the same numbers as bf16, in shards
    transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(
        narrow, max_shard_size="20KB")
    assert len(list(narrow.glob("*.safetensors"))) > 2
    words(tmp_path / "own", CONFIG, base_model_name_or_path=str(narrow))
    load_model(tmp_path / "own", tokenizer=False)

    other = Path(shutil.copytree(base, tmp_path / "other"))
    edit(other, lambda t: t[Q].add_(0.1))
    words(tmp_path / "own", CONFIG, base_model_name_or_path=str(other))
    said = refusal(load_model, tmp_path / "own")
    assert "was trained on other weights" in said and str(other) in said

    words(tmp_path / "own", CONFIG, base_model_name_or_path=str(base))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)
        peer = peft.PeftModel.from_pretrained(plain, tmp_path / "own").eval()
    close(wanted, exact(peer))
