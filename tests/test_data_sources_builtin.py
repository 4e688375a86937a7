import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.config import TextConfig
from data.manifest import manifest
from data.prepare import prepare
from data.sources.builtin import SHARDS, stdlib_shards


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWITCHWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_each_file_of_the_standard_library_is_in_exactly_one_shard(cache: Path) -> None:
    shards = stdlib_shards()
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    texts = {row["key"]: row["text"] for row in rows}
    root = Path(sysconfig.get_path("stdlib"))
    assert len(shards) == SHARDS
    assert len(texts) == len(rows) > 400
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(texts)
    assert texts["json/decoder.py"].encode() == (root / "json/decoder.py").read_bytes()
    parts = {part for key in texts for part in Path(key).parts[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def test_writing_again_leaves_what_is_there_and_no_scratch(cache: Path) -> None:
    first = {path: path.stat().st_mtime_ns for path in stdlib_shards()}
    assert {path: path.stat().st_mtime_ns for path in stdlib_shards()} == first
    assert [path.name for path in cache.iterdir()] == [next(iter(first)).parent.name]


def test_two_processes_may_write_at_once(cache: Path) -> None:
    code = "from data.sources.builtin import stdlib_shards; print(*stdlib_shards())"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {run.communicate()[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert len(outputs) == 1
    assert len(list(cache.iterdir())) == 1


def test_preparing_again_imports_nothing_heavy(cache: Path) -> None:
    prepare(TextConfig())
    imports = "import sys; from data.prepare import prepare; from data.config import TextConfig"
    code = f"{imports}; prepare(TextConfig()); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "data.prepare" in modules
    assert not {"datasets", "pyarrow", "torch", "huggingface_hub"} & set(modules)


def test_the_manifest_does_not_depend_on_where_the_cache_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = manifest(TextConfig(), seed=1, lanes=8)
    monkeypatch.setenv("SWITCHWORK_CACHE", str(tmp_path / "elsewhere"))
    assert manifest(TextConfig(), seed=1, lanes=8) == here
    assert manifest(TextConfig(), seed=2, lanes=8)["digest"] != here["digest"]
    assert sum(file["size"] for file in here["source"]) > 1_000_000


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWITCHWORK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        ValueError, match=r"^SWITCHWORK_CACHE: cannot write to the cache .*; set it to a folder"
    ) as raised:
        stdlib_shards()
    assert "\n" not in str(raised.value)
