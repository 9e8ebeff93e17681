"""Makes tests/goldens/lm_eval.json: what lm-evaluation-harness 0.4.13 computes on tiny models.

    python tests/goldens/lm_eval_goldens.py    needs lm_eval 0.4.13; takes about three minutes

The models are random (tests/helpers/tiny.py), with two kinds of tokenizer. The rows are sentences
that the demo's grammar makes, not those of a published test set. The tasks are the harness's own
with their data replaced by local JSON; answers have at most NEW tokens.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from helpers import tiny  # noqa: E402
from languages.kinyarwanda.world import World  # noqa: E402

FILE = HERE / "lm_eval.json"
VERSION = "0.4.13"
CONTEXT, NEW, ROWS, SHOTS = 512, 16, 4, 2
KINDS = ("pieces", "bytes")  # of tokenizer
LONG = 30  # sentences of a text longer than the context

# ours: suite, prompt, part -> the harness's task, under lm_eval/tasks
TASKS = {
    **{("belebele", str(n), ""): f"afrobench/belebele/prompt_{n}/belebele_kin.yaml"
       for n in range(1, 6)},
    **{("sib200", str(n), ""): f"afrobench/sib/prompt_{n}/sib_kin.yaml" for n in range(1, 6)},
    **{("afrixnli", str(n), ""): f"afrixnli/direct/prompt_{n}/afrixnli_kin.yaml"
       for n in range(1, 6)},
    ("afrixnli", "native", ""):
        "afrixnli/anli prompt/native-direct/afrixnli_native_direct_kin.yaml",
    **{("afrimmlu", str(n), ""): f"afrimmlu/direct/prompt_{n}/afrimmlu_direct_kin.yaml"
       for n in range(1, 6)},
    **{("afrisenti", str(n), ""): f"afrobench/afrisenti/prompt_{n}/afrisenti_kin.yaml"
       for n in (1, 4)},
    ("injongo", "4", ""): "afrobench/injongointent/prompt_4/injongointent_kin.yaml",
    ("piqa-nonparallel", "cloze", ""): "global_piqa/nonparallel_cloze/kin_latn.yaml",
    ("piqa-parallel", "cloze", ""): "global_piqa/parallel_cloze/kin_latn.yaml",
    **{("afrimgsm", str(n), ""): f"afrimgsm/direct/prompt_{n}/afrimgsm_kin.yaml"
       for n in range(1, 6)},
    **{("afriqa", str(n), ""): f"afrobench/afriqa/prompt_{n}/afriqa_kin.yaml" for n in range(1, 6)},
    **{(suite, str(n), f"{a}-{b}"): f"afrobench/{suite}/prompt_{n}/{folder}/"
       f"{suite}_{a}_Latn-{b}_Latn.yaml"
       for suite in ("flores", "ntrex") for n in (1, 2, 3)
       for a, b, folder in (("kin", "eng", "african-english"), ("eng", "kin", "english-african"))},
    ("mafand", "1", "kin-eng"): "afrobench/mafand/prompt_1/african-english/mafand_kin-en.yaml",
    ("mafand", "1", "eng-kin"): "afrobench/mafand/prompt_1/english-african/mafand_en-kin.yaml",
    ("mafand", "3", "eng-kin"): "afrobench/mafand/prompt_3/english-african/mafand_en-kin.yaml",
}
WITH_SHOTS = [key for key in TASKS if key[1] in ("1", "native") and key[0] in (
    "belebele", "sib200", "afrixnli", "afriqa", "flores", "ntrex", "mafand")]
IN_BF16 = [("sib200", "1", ""), ("piqa-parallel", "cloze", "")]
IN_CHAT = [("sib200", "1", ""), ("afrixnli", "native", ""), ("afrimgsm", "1", ""),
           ("flores", "1", "eng-kin")]  # with --apply_chat_template
SPLITS = {"belebele": ("test",), "ntrex": ("test",), "flores": ("devtest", "dev"),
          "afriqa": ("test", "train"), "afrisenti": ("test", "train")}  # else test, validation


def rows(suite: str, n: int = ROWS) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Artificial rows of a suite's test and of its few-shot examples, in the columns of the
    published data."""
    world, draw = World(random.Random(f"goldens/{suite}")), random.Random(suite)

    def kin() -> str:
        return world.sentence()[0]

    def row(i: int) -> dict[str, Any]:
        pair = world.sentence()
        if suite == "belebele":
            return {"flores_passage": world.document(4)[0], "question": f" {kin()[:-1]}? ",
                    **{f"mc_answer{k}": kin() for k in range(1, 5)},
                    "correct_answer_num": str(draw.randrange(1, 5))}
        if suite == "sib200":
            return {"index_id": i, "text": kin(), "category": draw.choice(
                ["science/technology", "travel", "health", "politics"])}
        if suite == "afrixnli":
            return {"premise": kin()[:-1], "hypothesis": kin(), "label": draw.randrange(3)}
        if suite == "afrimmlu":
            return {"subject": "geography", "question": kin() + "  ", "answer": draw.choice("ABCD"),
                    "choices": repr([kin()[: 4 + 7 * k] for k in range(4)])}
        if suite == "afrisenti":
            return {"tweet": "@user " + kin(), "label": draw.choice(
                ["negative", "positive", "neutral"])}
        if suite == "injongo":
            return {"text": kin(), "intent": draw.choice(["alarm", "weather", "text"])}
        if suite.startswith("piqa"):
            return {"prompt": kin()[:-1], "label": draw.randrange(2), **{
                f"solution{k}": kin() for k in range(2 if suite == "piqa-nonparallel" else 4)}}
        if suite == "afrimgsm":
            return {"question": kin(), "answer": None, "answer_number": draw.randrange(1, 2000)}
        if suite == "afriqa":
            return {"question_lang": kin()[:-1] + "?", "context": world.document(3)[1],
                    "answer_pivot": pair[1].split()[1]}
        if suite == "mafand":
            return {"translation": {"en": pair[1], "kin": pair[0]}}
        return {"sentence_kin_Latn": pair[0], "sentence_eng_Latn": pair[1]}

    return [row(i) for i in range(n)], [row(n + i) for i in range(n + 2)]


def texts() -> list[str]:
    """Documents for rolling bits per byte: short, with unusual spaces, longer than the context."""
    world = World(random.Random("goldens/texts"))
    return ["a", "  " + world.sentence()[0], "\t" + world.sentence()[1],
            "\u2600\ufe0f\u200b " + world.sentence()[0],
            " ".join(world.sentence()[0] for _ in range(LONG))]


def model(folder: Path, kind: str) -> Path:
    """A random model whose answers vary, with a tokenizer of one kind."""
    import torch
    import transformers

    peer = tiny.peer("llama3", seed=7, max_position_embeddings=CONTEXT)
    with torch.no_grad():  # single bytes become unlikely: libraries differ in how they decode
        peer.lm_head.weight[[0, *range(3, 259)]] *= 0.2  # bytes that are no character
    peer.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2)
    peer.save_pretrained(folder)
    bos = ""  # the harness adds BOS itself for a SentencePiece tokenizer
    if kind == "bytes":
        write_byte_level_tokenizer(folder)
        bos = "{{ bos_token }}"
    else:
        write_sentencepiece_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(
        bos + "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")
    return folder


def write_sentencepiece_tokenizer(folder: Path) -> None:
    """A SentencePiece tokenizer with LLaMA's flags, as transformers turns it into a tokenizer.json.

    (From a tokenizer.model alone, transformers 5 encodes a text with a leading space differently
    from sentencepiece; our tokenizer agrees with sentencepiece.)
    """
    import sentencepiece
    import transformers

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.SENTENCES), model_writer=out, vocab_size=tiny.V,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
        hard_vocab_limit=False, minloglevel=2)
    tiny.write_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()


def write_byte_level_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer.json that begins a text with BOS."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(tiny.SENTENCES, trainers.BpeTrainer(
        vocab_size=tiny.V, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                      special_tokens=[("<s>", 1)])])
    tok.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
              "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def digest(ids: list[int]) -> str:
    """A hash of ids, which is short enough for the file of goldens."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def name(key: tuple[str, str, str], shots: int) -> str:
    """The name of a task in the file of goldens."""
    suite, prompt, part = key
    task = ".".join(filter(None, (suite, part, prompt)))
    return f"{task}+{shots}" if shots else task


def write_tasks(home: Path) -> dict[str, tuple[str, str, str]]:
    """Write the harness's tasks with our rows, and one of rolling likelihood, to HOME/tasks;
    returns our keys by the names of the tasks."""
    import lm_eval
    import yaml

    shipped = Path(lm_eval.__file__).parent / "tasks"
    configs = home / "tasks"
    configs.mkdir()
    keys = {}
    for key, path in TASKS.items():
        suite = key[0]
        files = {}
        splits = SPLITS.get(suite, ("test", "validation"))
        for split, data in zip(splits, rows(suite), strict=False):
            files[split] = str(home / f"{suite}.{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(r) + "\n" for r in data))
        task = "ours_" + name(key, 0).replace(".", "_").replace("-", "_")
        config = {"include": str(shipped / path), "task": task, "tag": None,
                  "dataset_path": "json", "dataset_name": None,
                  "dataset_kwargs": {"data_files": files}}
        if suite in ("afrimgsm", "afriqa", "flores", "ntrex", "mafand"):
            stop = {"afrimgsm": ["Question:", "</s>", "<|im_end|>"],
                    "flores": ["**", "</s>"]}.get(suite, ["\n"])
            config["generation_kwargs"] = {"until": stop, "do_sample": False, "max_gen_toks": NEW}
        (configs / f"{task}.yaml").write_text(yaml.dump(config))
        keys[task] = key
    rolling = home / "rolling.jsonl"
    rolling.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts()))
    (configs / "ours_rolling.yaml").write_text(yaml.dump({
        "task": "ours_rolling", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(rolling)}},
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}]}))
    return keys


def make() -> dict[str, Any]:
    """Compute all goldens; needs lm_eval."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    assert lm_eval.__version__ == VERSION, f"made with {VERSION}, this is {lm_eval.__version__}"
    goldens: dict[str, Any] = {"lm_eval": VERSION, "texts": {}, "tasks": {}, "chat": {}}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        keys = write_tasks(home)
        manager = TaskManager(include_path=str(home / "tasks"))

        def run(lm: Any, tasks: list[str], shots: int, chat: bool = False) -> dict[str, Any]:
            return lm_eval.simple_evaluate(
                model=lm, tasks=tasks, num_fewshot=shots or None, task_manager=manager,
                bootstrap_iters=0, batch_size=1, apply_chat_template=chat,
                fewshot_as_multiturn=chat)  # the command line's default with a chat template

        for kind in KINDS:
            settings = {"pretrained": str(model(home / kind, kind)), "dtype": "float32",
                        "batch_size": 1, "device": "cpu"}
            _add_tasks(goldens, kind, run, settings, keys)
            _add_texts(goldens, kind, run, settings)
            _add_bf16(goldens, kind, run, settings, keys)
    return goldens


def _add_tasks(goldens: dict[str, Any], kind: str, run: Any, settings: dict[str, Any],
               keys: dict[str, tuple[str, str, str]]) -> None:
    """Add the requests, answers and metrics of all tasks, without and with a chat template."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(**settings)
    for section, shots, section_keys in (("tasks", 0, list(TASKS)), ("tasks", SHOTS, WITH_SHOTS),
                                         ("chat", 0, IN_CHAT), ("chat", SHOTS, IN_CHAT)):
        shown = [key for key in section_keys if not shots or key in WITH_SHOTS]
        tasks = [task for task, key in keys.items() if key in shown]
        results = run(lm, tasks, shots, section == "chat")
        for task in tasks:
            entries = goldens[section]
            if section == "chat":  # the texts differ between the kinds, as the templates do
                entries = entries.setdefault(kind, {})
            _add_task(entries.setdefault(name(keys[task], shots), {}), kind, lm,
                      results["samples"][task], results["results"][task])


def _add_texts(goldens: dict[str, Any], kind: str, run: Any, settings: dict[str, Any]) -> None:
    """Add rolling likelihoods: without BOS, with the harness's defaults, and those in bf16."""
    from lm_eval.models.huggingface import HFLM

    for section, changes in (("texts", {"add_bos_token": False}), ("texts_as_it_comes", {}),
                             ("texts_bf16", {"dtype": "bfloat16"})):
        results = run(HFLM(**(settings | changes)), ["ours_rolling"], 0)
        samples = sorted(results["samples"]["ours_rolling"], key=lambda s: s["doc_id"])
        goldens.setdefault(section, {})[kind] = {
            "nats": [-s["filtered_resps"][0] for s in samples],
            "bits_per_byte": results["results"]["ours_rolling"]["bits_per_byte,none"]}


def _add_bf16(goldens: dict[str, Any], kind: str, run: Any, settings: dict[str, Any],
              keys: dict[str, tuple[str, str, str]]) -> None:
    """Add log-likelihoods of choices in bf16."""
    from lm_eval.models.huggingface import HFLM

    tasks = [task for task, key in keys.items() if key in IN_BF16]
    results = run(HFLM(**(settings | {"dtype": "bfloat16"})), tasks, 0)
    likelihoods = {}
    for task in tasks:
        samples = sorted(results["samples"][task], key=lambda s: s["doc_id"])
        likelihoods[name(keys[task], 0)] = [[float(r[0][0]) for r in s["resps"]] for s in samples]
    goldens.setdefault("bf16", {})[kind] = likelihoods


def _arguments(sample: dict[str, Any]) -> list[list[Any]]:
    """The arguments of each request of a sample, in order."""
    arguments = sample["arguments"]
    if not isinstance(arguments, dict):
        return [list(x) for x in arguments]
    names = sorted(arguments, key=lambda k: int(k.rsplit("_", 1)[1]))
    return [list(arguments[k].values()) for k in names]


def _encode_pair(lm: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of context and continuation, as the harness's `loglikelihood` encodes them."""
    if context:
        return lm._encode_pair(context, continuation)
    return [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)


def _add_task(entry: dict[str, Any], kind: str, lm: Any, samples: list[dict[str, Any]],
              results: dict[str, Any]) -> None:
    """Add a task's requests (their texts once for both tokenizers), ids, answers and metrics."""
    first = {s["doc_id"]: s for s in reversed(samples)}  # there is a sample for each filter
    texts, ids, resps = [], [], []
    for sample in (first[i] for i in sorted(first)):
        requests = _arguments(sample)
        if isinstance(requests[0][1], str):  # a continuation to score
            texts.append({"context": requests[0][0], "continuations": [x[1] for x in requests]})
            pairs = [_encode_pair(lm, *x) for x in requests]
            ids.append([digest([list(map(int, a)), list(map(int, b))]) for a, b in pairs])
            resps.append([float(r[0][0]) for r in sample["resps"]])
        else:
            texts.append({"context": requests[0][0]})
            ids.append(digest(list(map(int, lm.tok_encode(requests[0][0])))))
            resps.append(sample["resps"][0][0])
    assert entry.setdefault("texts", texts) == texts
    values = {k: v for k, v in results.items() if isinstance(v, float) and "stderr" not in k}
    entry[kind] = {"ids": ids, "resps": resps, "metrics": values}


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(make(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
