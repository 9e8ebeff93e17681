"""The hash of the code, by which ranks compare what they run."""

import shutil

import pytest

from runtime.paths import NOT_THE_PROGRAM, ROOT, code_sha256, git_commit, source_files, version


@pytest.fixture
def copied_tree(tmp_path):
    """A copy of the program's source files, and one test and one benchmark."""
    for file in [*source_files(), ROOT / "tests/conftest.py", ROOT / "bench/__init__.py"]:
        target = tmp_path / "copy" / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return tmp_path / "copy"


def test_every_package_and_command_is_hashed():
    names = {str(file.relative_to(ROOT)) for file in source_files()}
    assert {"train.py", "model.py", "runtime/paths.py", "training/settings.py",
            "languages/kinyarwanda/__init__.py"} <= names
    assert not [x for x in names if x.split("/")[0] in NOT_THE_PROGRAM]


@pytest.mark.parametrize("name", ["train.py", "layers/attention.py",
                                  "languages/kinyarwanda/__init__.py"])
def test_a_change_in_any_file_of_the_program_changes_the_hash(copied_tree, name):
    assert code_sha256(copied_tree) == code_sha256(ROOT)
    file = copied_tree / name
    file.write_bytes(file.read_bytes().replace(b"the", b"teh", 1))
    assert code_sha256(copied_tree) != code_sha256(ROOT)


def test_a_new_file_in_a_package_changes_the_hash_and_one_in_tests_or_bench_does_not(copied_tree):
    for folder in ("tests", "bench", "out/run", "docs"):
        (copied_tree / folder).mkdir(parents=True, exist_ok=True)
        (copied_tree / folder / "new.py").write_text("x = 1\n")
    assert code_sha256(copied_tree) == code_sha256(ROOT)
    (copied_tree / "runtime/new.py").write_text("x = 1\n")
    assert code_sha256(copied_tree) != code_sha256(ROOT)


def test_the_version_names_the_commit_only_in_a_repository(tmp_path):
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    assert git_commit(tmp_path) is None and version(tmp_path) == "kinyarwanda_ft_llm 0.1.0"
