import contextlib
import dataclasses
import gzip
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter
from sklearn.datasets import load_digits

from data.config import ImageConfig, TextConfig
from data.manifest import check_manifest, manifest
from data.prepare import prepare
from data.share import Share
from data.sources.files import file_tag, list_files
from data.sources.kinds import Files, Hub, Mixture, Part, PythonStdlib, absolute
from data.sources.retry import OUTAGE
from data.training_stream import ImageStream, TextStream

TEXTS = [f"document {i} of the corpus: {'x' * (i % 7)}" for i in range(40)]


def files(*paths: Path | str, **options: Any) -> TextConfig:
    return TextConfig(
        source=Files(paths=tuple(map(str, paths)), **options.pop("source", {})),
        lanes=2,
        held_out=0.0,
        seq_len=16,
        **options,
    )


def epoch(config: TextConfig, samples: int = 100) -> str:
    """The documents among the first samples."""
    with TextStream(config, Share(rank=0, world=1, global_batch=samples, micro_batch=samples), seed=0) as stream:
        rows = next(stream).micro_batches[0]["tokens"].tolist()
    return " ".join("".join(chr(token) if token < 256 else "|" for token in row) for row in rows)


Fault = Callable[[str, int], int | str | None]
"""(path, number of the request) -> a status to answer with, or "cut"."""


@contextlib.contextmanager
def server(folder: Path, fault: Fault | None = None) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Serve `folder` with Range requests at a local address; `fault` may spoil the n-th request."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append((self.command, self.path))
            status = fault(self.path, len(requests)) if fault else None
            file = Path(folder, self.path.lstrip("/"))
            if isinstance(status, int) or not file.is_file():
                self.send_response(status or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = file.read_bytes()
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, end = (
                (int(span[1]), min(int(span[2] or len(body) - 1), len(body) - 1)) if span else (0, len(body) - 1)
            )
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {start}-{end}/{len(body)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"v1"')
            self.send_header("Content-Length", str(end - start + 1))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[start : end + 1] if status != "cut" else body[start : start + (end - start) // 2])
                if status == "cut":
                    self.connection.close()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}", requests
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"text": TEXTS[:25], "id": list(range(25))}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": TEXTS[25:], "id": list(range(15))}), tmp_path / "b.parquet")
    return tmp_path


def test_formats_give_the_same_text(corpus: Path) -> None:
    (corpus / "a.jsonl").write_text(
        "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS[:25]))
    )
    with gzip.open(corpus / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS[25:])))
    (corpus / "a.txt").write_text("\n".join(TEXTS[:25]) + "\n")
    (corpus / "b.txt").write_text("\n".join(TEXTS[25:]))
    (corpus / "c.txt").write_text("\n\n".join(TEXTS[:25]))
    (corpus / "d.txt").write_text("\n\n".join(TEXTS[25:]))
    expected = epoch(files(corpus / "*.parquet"))
    assert epoch(files(corpus / "a.jsonl", corpus / "b.jsonl.gz")) == expected
    assert epoch(files(corpus / "[ab].txt", source={"sample_by": "line"})) == expected
    assert epoch(files(corpus / "[cd].txt")) == expected


def test_a_whole_file_can_be_one_document(corpus: Path) -> None:
    for name in "ab":
        (corpus / f"{name}.md").write_text("first line\n\nthird line")
    assert "first line\n\nthi" in epoch(files(corpus / "*.md", source={"sample_by": "document"}), samples=2)


def test_globs_are_sorted_and_files_named_twice_count_once(corpus: Path) -> None:
    seen = list_files(Files(paths=(str(corpus / "b.parquet"), str(corpus / "*.parquet"))))
    assert [Path(file).name for file in seen] == ["b.parquet", "a.parquet"]


def test_relative_paths_are_taken_from_the_users_folder(tmp_path: Path) -> None:
    source = Files(paths=("x/*.txt", "/y.txt", "s3://bucket/z.txt"))
    assert absolute(source, tmp_path).paths == (f"{tmp_path}/x/*.txt", "/y.txt", "s3://bucket/z.txt")
    assert absolute(PythonStdlib(), tmp_path) == PythonStdlib()


def test_the_config_is_parsed_from_plain_values_and_made_by_default() -> None:
    values = {
        "source": {"name": "files", "paths": ["a.parquet"]},
        "eval_source": {"name": "hub", "dataset": "a/b"},
        "lanes": 4,
    }
    parsed = TypeAdapter(TextConfig).validate_python(values)
    assert parsed == TextConfig(source=Files(paths=("a.parquet",)), eval_source=Hub(dataset="a/b"), lanes=4)
    assert TypeAdapter(TextConfig).validate_python({}) == TextConfig()


ONE_LINERS = {
    "no such file": (["{tmp}/none.parquet"], {}, "source.paths: no such file: .*none.parquet"),
    "nothing matches": (["{tmp}/*.pq"], {}, r"source.paths: nothing matches .*\*.pq; check the glob"),
    "folder": (["{tmp}"], {}, r"source.paths: .* is a folder; name its files by a glob such as .*/\*.parquet"),
    "zero bytes": (["{tmp}/empty.jsonl"], {}, "source.paths: .*empty.jsonl is empty"),
    "no rows": (["{tmp}/none.pq.parquet"], {}, "source: no rows in .*none.pq.parquet; use files with data"),
    "no format": (["{tmp}/data.bin"], {}, "source.format: auto cannot tell the format of .*data.bin"),
    "mixed": (["{tmp}/a.parquet", "{tmp}/good.txt"], {}, r"source.paths: mixes formats \(parquet, text\)"),
    "column": (
        ["{tmp}/a.parquet"],
        {"text_column": "body"},
        "source.paths: .*: no column 'body' \\(it has 'text', 'id'\\); set run.objective.data.text_column",
    ),
    "key": (["{tmp}/a.parquet"], {"key_column": "url", "held_out": 0.1}, "source.paths: .*: no column 'url'"),
    "type": (
        ["{tmp}/a.parquet"],
        {"text_column": "id"},
        "text_column: 'id' holds int64, not text; use a column of strings",
    ),
    "damaged": (["{tmp}/bad.parquet"], {}, "source.paths: .*bad.parquet: .*"),
    "no paths": ([], {}, "source.paths: empty"),
}


@pytest.mark.parametrize("case", ONE_LINERS)
def test_wrong_files_are_one_line(corpus: Path, case: str) -> None:
    (corpus / "empty.jsonl").write_text("")
    (corpus / "data.bin").write_text("x")
    (corpus / "good.txt").write_text("x")
    (corpus / "bad.parquet").write_text("this is no parquet file")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), corpus / "none.pq.parquet")
    paths, options, message = ONE_LINERS[case]
    config = TextConfig(
        source=Files(paths=tuple(path.format(tmp=corpus) for path in paths)), **{"held_out": 0.0, **options}
    )
    with pytest.raises(ValueError, match=rf"^run\.objective\.data\.{message}") as raised:
        prepare(config)
    assert "\n" not in str(raised.value)
    assert ";" in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("seq_len", 0), ("window", 0), ("held_out", 1.0), ("lanes", 0), ("prefetch", -1), ("max_eval_samples", 0)],
)
def test_numbers_out_of_range_are_one_line(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^run.objective.data.{field}: {value} "):
        TextConfig(**{field: value})


def test_a_good_source_is_prepared_and_its_manifest_follows_it(corpus: Path) -> None:
    config = files(corpus / "*.parquet")
    prepare(config)
    first = manifest(config, seed=0, lanes=2)
    assert [(Path(file["name"]).name, file["size"]) for file in first["source"]] == [
        (f"{n}.parquet", (corpus / f"{n}.parquet").stat().st_size) for n in "ab"
    ]
    assert manifest(config, seed=0, lanes=2) == json.loads(json.dumps(first))
    check_manifest(first, manifest(config, seed=0, lanes=2))
    pq.write_table(pa.table({"text": TEXTS[:24]}), corpus / "a.parquet")
    assert manifest(config, seed=0, lanes=2)["digest"] != first["digest"]


def changed(corpus: Path, name: str) -> str:
    """Change the source; returns the message that names the change."""
    match name:
        case "size":
            pq.write_table(pa.table({"text": TEXTS[:24]}), corpus / "a.parquet")
            return r"a.parquet has changed: \d+ bytes when the run began, \d+ now"
        case "tag":
            os.utime(corpus / "a.parquet", ns=(1, 1))
            return "a.parquet has changed: its tag was '.*' when the run began, and is '1'"
        case "missing":
            (corpus / "b.parquet").unlink()
            return "b.parquet is missing; the run began with it"
        case "new":
            (corpus / "c.parquet").write_bytes((corpus / "b.parquet").read_bytes())
            return "c.parquet is new; the run began without it"


@pytest.mark.parametrize("name", ["size", "tag", "missing", "new"])
def test_a_changed_source_is_told_by_name(corpus: Path, name: str) -> None:
    config = files(corpus / "*.parquet")
    saved = json.loads(json.dumps(manifest(config, seed=0)))
    message = changed(corpus, name)
    with pytest.raises(
        ValueError, match=rf"^run.objective.data.source: {corpus}/{message}; a resumed run would see other samples"
    ) as raised:
        check_manifest(saved, manifest(config, seed=0))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("field", "value"), [("seq_len", 8), ("window", 5), ("held_out", 0.5)])
def test_another_order_of_samples_is_told_by_its_field(corpus: Path, field: str, value: float) -> None:
    config = files(corpus / "*.parquet")
    with pytest.raises(
        ValueError, match=rf"^run.objective.data.{field}: it was .* when the run began, and is {value}; "
    ):
        check_manifest(manifest(config, seed=0), manifest(dataclasses.replace(config, **{field: value}), seed=0))
    check_manifest(
        manifest(config, seed=0), manifest(dataclasses.replace(config, prefetch=3, processes=2, lanes=4), seed=0)
    )


def test_http_gives_what_the_local_files_give(corpus: Path) -> None:
    with server(corpus) as (url, _):
        config = files(f"{url}/a.parquet", f"{url}/b.parquet")
        prepare(config)
        assert epoch(config) == epoch(files(corpus / "*.parquet"))
        assert file_tag(f"{url}/a.parquet") == {
            "name": f"{url}/a.parquet",
            "size": (corpus / "a.parquet").stat().st_size,
            "tag": "v1",
        }


@pytest.mark.parametrize("fault", [503, "cut"])
def test_a_source_that_fails_for_a_while_changes_nothing(corpus: Path, fault: int | str) -> None:
    """Requests 1, 4, 9, 16... fail: while opening, and while reading."""
    with server(corpus, lambda _, n: fault if math.isqrt(n) ** 2 == n else None) as (url, requests):
        assert epoch(files(f"{url}/a.parquet", f"{url}/b.parquet")) == epoch(files(corpus / "*.parquet"))
        assert len(requests) >= 16


def test_so_it_is_with_images_and_mixtures(corpus: Path) -> None:
    """Parquet with images, and single PNG files, from a server that fails often.

    They are read alone and mixed.
    """
    rows = load_digits().images[:12].astype(np.uint8)
    encoded = []
    for n, pixels in enumerate(rows):
        (corpus / "pngs" / str(n % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(corpus / "pngs" / str(n % 2) / f"{n:02d}.png")
        encoded.append((corpus / "pngs" / str(n % 2) / f"{n:02d}.png").read_bytes())
    pq.write_table(pa.table({"image": encoded, "label": [n % 2 for n in range(12)]}), corpus / "images.parquet")

    def config(base: Path | str) -> ImageConfig:
        pngs = Files(paths=tuple(f"{base}/pngs/{n % 2}/{n:02d}.png" for n in range(12)))
        parts = (Part(weight=1, source=pngs), Part(weight=1, source=Files(paths=(f"{base}/images.parquet",))))
        return ImageConfig(source=Mixture(parts=parts), lanes=2, held_out=0.0)

    def first(config: ImageConfig) -> list[object]:
        with ImageStream(config, Share(rank=0, world=1, global_batch=40, micro_batch=40), seed=0) as stream:
            return next(stream).micro_batches[0]["image"].tolist()

    with server(corpus, lambda _, n: 503 if math.isqrt(n) ** 2 == n else None) as (url, requests):
        assert first(config(url)) == first(config(corpus))
        assert len(requests) > 24


@pytest.mark.parametrize("skip", [False, True])
def test_a_source_that_stays_away_ends_the_run_or_is_skipped(corpus: Path, skip: bool) -> None:
    """The second file answers until the stream is open."""
    broken = threading.Event()
    with server(corpus, lambda path, _: 503 if broken.is_set() and path.startswith("/b") else None) as (url, _):
        options = {"retry_seconds": 0.5, "prefetch": 0, "on_unreadable": "skip" if skip else "fail"}
        config = dataclasses.replace(files(f"{url}/a.parquet", f"{url}/b.parquet", **options), lanes=1)
        with TextStream(config, Share(rank=0, world=1, global_batch=60, micro_batch=60), seed=0) as stream:
            broken.set()
            if skip:
                step = next(stream)
                assert step.state["lanes"]["0"]["skipped"][0][2] == 0
                texts = "".join(
                    chr(token) if token < 256 else "|" for token in step.micro_batches[0]["tokens"].flatten().tolist()
                )
                assert "document 24 of" in texts
                assert "document 25 of" not in texts
            else:
                with pytest.raises(OSError, match=r"b.parquet has not answered for 0.5 s"):
                    next(stream)


def test_a_source_that_goes_away_ends_with_its_name(corpus: Path) -> None:
    broken = threading.Event()
    with server(corpus, lambda path, _: 503 if broken.is_set() and path.startswith("/b") else None) as (url, _):
        config = files(f"{url}/a.parquet", f"{url}/b.parquet", retry_seconds=0.6, prefetch=0)
        with TextStream(config, Share(rank=0, world=1, global_batch=2, micro_batch=1), seed=0) as stream:
            broken.set()
            began = time.monotonic()
            with pytest.raises(
                OSError,
                match=r"source: http://.*/b.parquet has not answered for 0.6 s \(.*503.*\); resume ",
            ):
                next(stream)
            assert 0.5 < time.monotonic() - began < 10


def test_an_outage_on_purpose_changes_nothing(corpus: Path) -> None:
    """Every lane's reads fail for a while, as under `switchwork chaos`, and are retried."""
    config = files(corpus / "*.parquet", prefetch=0, retry_seconds=10)
    expected = epoch(config)
    OUTAGE.start(seconds=0.4)
    began = time.monotonic()
    assert epoch(config) == expected
    assert time.monotonic() - began > 0.3


def test_closing_does_not_wait_for_a_source_that_does_not_answer(corpus: Path) -> None:
    broken = threading.Event()
    with server(corpus, lambda *_: 503 if broken.is_set() else None) as (url, _):
        stream = TextStream(files(f"{url}/a.parquet"), Share(rank=0, world=1, global_batch=2, micro_batch=1), seed=0)
        broken.set()
        time.sleep(0.3)
        began = time.monotonic()
        stream.close()
        assert time.monotonic() - began < 3


def test_missing_and_unreachable_urls_are_one_line(corpus: Path) -> None:
    with server(corpus, lambda path, _: 403 if "forbidden" in path else None) as (url, _):
        for name, message in (("none.parquet", "404"), ("forbidden.parquet", "403")):
            with pytest.raises(
                ValueError, match=rf"^run.objective.data.source.paths: {url}/{name}: .*{message}.*; check the files"
            ) as raised:
                prepare(files(f"{url}/{name}"))
            assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=rf"^run.objective.data.source.paths: {url}/a.parquet: .*; check the files"):
        prepare(files(f"{url}/a.parquet", retry_seconds=0.3))


def test_a_hub_dataset_streams_and_what_it_lacks_is_one_line(corpus: Path) -> None:
    """A local folder is read by the code for the Hub's datasets, splits and columns included."""
    (corpus / "hub" / "data").mkdir(parents=True)
    (corpus / "a.parquet").rename(corpus / "hub" / "data" / "train-00000.parquet")
    (corpus / "b.parquet").rename(corpus / "hub" / "data" / "test-00000.parquet")
    config = TextConfig(source=Hub(dataset=str(corpus / "hub")), lanes=2, held_out=0.0, seq_len=16)
    prepare(config)
    assert epoch(config) == epoch(files(corpus / "hub" / "data" / "train-00000.parquet"))
    for options, text_column, message in (
        ({"split": "valid"}, "text", "Unknown split|Bad split"),
        ({"config": "french"}, "text", "french"),
        ({}, "body", "no column 'body'"),
    ):
        with pytest.raises(ValueError, match=rf"^run.objective.data.source.dataset: .*({message})") as raised:
            prepare(
                TextConfig(source=Hub(dataset=str(corpus / "hub"), **options), text_column=text_column, held_out=0.0)
            )
        assert "\n" not in str(raised.value)


HUB = """
from data.prepare import prepare
from data.sources.kinds import Hub
from data.config import TextConfig
hub = [TextConfig(source=Hub(dataset=f"someone/{name}")) for name in ("missing", "gated", "private")]
for config in (*hub, TextConfig(tokenizer="someone/missing")):
    try:
        prepare(config)
    except ValueError as error:
        print(error)
"""


def test_what_the_hub_refuses_is_one_line(tmp_path: Path) -> None:
    codes = {"missing": 404, "gated": 403, "private": 401}
    with server(tmp_path, lambda path, _: next((code for name, code in codes.items() if name in path), 404)) as (
        url,
        requests,
    ):
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "x"}
        ran = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=environment, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert requests
    lines = ran.stdout.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, codes, strict=False):
        assert line.startswith(f"run.objective.data.source.dataset: 'someone/{name}' (split 'train'): ")
        assert line.endswith(
            "; check the name, config, split and revision, HF_TOKEN (private and gated data) and the network"
        )
    assert lines[3].startswith("run.objective.data.tokenizer: 'someone/missing': ")
