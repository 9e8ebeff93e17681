"""Files of a model's folder are opened by runtime/model_files.py, and by nothing else."""

from __future__ import annotations

import ast
import re

import pytest

from runtime.paths import ROOT, source_files

OPENERS = {"open", "read_text", "read_bytes", "read_json", "safe_open", "load_file", "copyfile",
           "copy2", "copytree", "from_file", "from_pretrained", "memmap", "fromfile"}
STRICT = {"checkpoints", "tokenization", "layers", "inference"}  # packages that read such folders
ALLOWED = {  # functions of these packages that open other files, or whose file is checked already
    "checkpoints/atomic_write.py",  # the folder that is written
    "checkpoints/resume_point.py",  # the run's own checkpoints
    "checkpoints/safetensors_header.py:open_safetensors",  # maps the file that it has checked
    "reports/model_card.py:model_card",  # run.json of a run
    "tokenization/tokenizer.py:_guarded",  # the null device
    "training/result.py:add_prompt",  # a temporary folder that it has written
}
MODEL_FILES = re.compile(
    r"(CONFIG_FILE|ADAPTER_CONFIG|ADAPTER_WEIGHTS|INDEX_FILE|WEIGHTS_FILE|MERGE_RECORD|PROMPT_FILE"
    r"|TEMPLATE_FILE|GENERATION_CONFIG|LICENSE|\"(config|prompt|merge|tokenizer\w*|adapter_config)"
    r"\.(json|model)|chat_template\.jinja|README\.md)")


def opened_directly(source: str, strict: bool) -> list[str]:
    """Functions that open a file themselves; unless `strict`, those only that also name a file of
    a model's folder."""
    functions = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        opens = any(isinstance(node, ast.Call) and _name(node) in OPENERS
                    for node in ast.walk(function))
        text = ast.get_source_segment(source, function) or ""
        if opens and (strict or MODEL_FILES.search(text)):
            functions.append(function.name)
    return functions


def _name(call: ast.Call) -> str:
    """The name of what is called; "" for Tokenizer.open, which opens nothing itself."""
    if isinstance(call.func, ast.Attribute):
        if call.func.attr == "open" and ast.unparse(call.func.value) in ("Tokenizer", "cls"):
            return ""
        return call.func.attr
    return getattr(call.func, "id", "")


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_of_a_model_folder_is_opened_past_the_checks(path):
    file = str(path.relative_to(ROOT))
    if file == "runtime/model_files.py" or file in ALLOWED:
        return
    functions = opened_directly(path.read_text(encoding="utf-8"), file.split("/")[0] in STRICT)
    assert [name for name in functions if f"{file}:{name}" not in ALLOWED] == [], \
        "use runtime/model_files.py"


@pytest.mark.parametrize("line, strict", [
    ("json.loads((folder / 'x.json').read_text())", True), ("open(folder / CONFIG_FILE)", False),
    ("safe_open(file, 'pt')", True), ("shutil.copyfile(a / 'LICENSE', b)", False),
    ("read_json(folder / ADAPTER_CONFIG)", False)])
def test_a_file_that_is_opened_directly_is_found(line, strict):
    assert opened_directly(f"def f(folder):\n    return {line}\n", strict) == ["f"]
