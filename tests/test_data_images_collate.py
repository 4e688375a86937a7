import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from data.batches import merge_states
from data.config import ImageConfig
from data.images.held_out import held_out_images, image_set
from data.images.records import image_shape
from data.manifest import manifest
from data.prepare import prepare
from data.share import RunState, Share
from data.sources.kinds import Digits, Files, Hub
from data.training_stream import ImageStream, preview_images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 6, 6, 3), np.uint8)


def png(pixels: npt.NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def config(*paths: Path, **options: Any) -> ImageConfig:
    return ImageConfig(
        source=Files(paths=tuple(map(str, paths))),
        **{"lanes": 4, "held_out": 0.0, "channels": 3, "window": 8, **options},
    )


def run(
    config: ImageConfig,
    world: int,
    steps: int,
    state: RunState | None = None,
    global_batch: int = 16,
    micro_batch: int = 2,
    seed: int = 3,
) -> tuple[dict[int, tuple[bytes, int]], RunState]:
    """({sample number: (image, label)}, merged state) of some steps at `world`."""
    samples = {}
    states = []
    for rank in range(world):
        with ImageStream(
            config,
            Share(rank=rank, world=world, global_batch=global_batch, micro_batch=micro_batch),
            seed=seed,
            state=state,
        ) as stream:
            for _ in range(steps):
                step = next(stream)
                for batch in step.micro_batches:
                    assert batch["image"].dtype == torch.uint8
                    for number, image, label in zip(
                        batch["sample"].tolist(), batch["image"].numpy(), batch["label"].tolist(), strict=True
                    ):
                        assert number not in samples
                        samples[number] = image.tobytes(), label
            states.append(step.state)
    return samples, json.loads(json.dumps(merge_states(states)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 40 images, row n labelled n % 4, in every form in which images come."""
    folder = tmp_path_factory.mktemp("images")
    labels = [n % 4 for n in range(40)]
    encoded = [png(pixels) for pixels in PIXELS]
    pq.write_table(pa.table({"image": encoded, "label": labels}), folder / "binary.parquet")
    pq.write_table(
        pa.table(
            {"image": PIXELS.tolist(), "label": labels}, pa.schema({"image": uint8_lists(3), "label": pa.int64()})
        ),
        folder / "lists.parquet",
    )
    first = PIXELS.transpose(0, 3, 1, 2).tolist()
    pq.write_table(
        pa.table({"image": first, "label": labels}, pa.schema({"image": uint8_lists(3), "label": pa.int64()})),
        folder / "channels_first.parquet",
    )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
    rows = {"image": [{"bytes": data, "path": None} for data in encoded], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "feature.parquet")
    features = datasets.Features({"image": datasets.Array3D((6, 6, 3), "uint8"), "label": datasets.Value("int32")})
    datasets.Dataset.from_dict({"image": list(PIXELS), "label": labels}, features=features).to_parquet(
        folder / "array3d.parquet"
    )
    for n, data in enumerate(encoded):
        (folder / "files" / "abcd"[n % 4]).mkdir(parents=True, exist_ok=True)
        (folder / "files" / "abcd"[n % 4] / f"{n:02d}.png").write_bytes(data)
    rows = {
        "image": [{"bytes": None, "path": str(folder / "files" / "abcd"[n % 4] / f"{n:02d}.png")} for n in range(40)],
        "label": labels,
    }
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(rows["image"], kind), "label": labels}), folder / "paths.parquet")
    return folder


def uint8_lists(depth: int) -> pa.DataType:
    kind = pa.uint8()
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind


EXPECTED = {(pixels.transpose(2, 0, 1).tobytes(), n % 4) for n, pixels in enumerate(PIXELS)}


@pytest.mark.parametrize("form", ["binary", "lists", "channels_first", "feature", "array3d", "paths"])
def test_every_form_gives_the_same_images_in_the_same_order(folder: Path, form: str) -> None:
    seen, _ = run(config(folder / f"{form}.parquet"), 1, 5, global_batch=8)
    assert set(seen.values()) == EXPECTED
    assert seen == run(config(folder / "binary.parquet"), 1, 5, global_batch=8)[0]


def test_image_files_are_labelled_by_their_folders(folder: Path) -> None:
    seen, _ = run(config(folder / "files" / "*" / "*.png"), 1, 5, global_batch=8)
    assert set(seen.values()) == EXPECTED


def test_a_hub_dataset_gives_its_images(folder: Path, tmp_path: Path) -> None:
    """A local folder is read by the code that reads the Hub.

    Image folders on the Hub come as paths without bytes.
    """
    images, labels = image_set(ImageConfig(source=Hub(dataset=str(folder / "files")), channels=3, held_out=0.0))
    assert {(image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True)} == EXPECTED


@pytest.mark.parametrize("form", ["array3d.parquet", "feature.parquet", "files/*/*.png"])
def test_the_same_global_batches_for_every_world_and_over_resumes(folder: Path, form: str) -> None:
    """4 -> 2 -> 1 over several epochs, mirrored at random."""
    images = config(folder / form, flip=True, prefetch=2)
    alone, last = run(images, 1, 12)
    resumed = {}
    state = None
    for world, steps in ((4, 3), (2, 4), (1, 5)):
        samples, state = run(images, world, steps, state)
        resumed |= samples
    assert resumed == alone
    assert state == last
    assert last["lanes"]["0"]["epoch"] >= 3
    assert run(images, 1, 2, seed=4)[0] != run(images, 1, 2)[0]


def test_each_image_is_mirrored_half_of_the_time(folder: Path) -> None:
    plain, _ = run(config(folder / "array3d.parquet"), 1, 100, global_batch=16)
    mirrored, _ = run(config(folder / "array3d.parquet", flip=True), 1, 100, global_batch=16)
    same = 0
    for number, (pixels, label) in plain.items():
        image, other = (np.frombuffer(data, np.uint8).reshape(3, 6, 6) for data in (pixels, mirrored[number][0]))
        assert label == mirrored[number][1]
        assert (other == image).all() or (other == image[:, :, ::-1]).all()
        same += (other == image).all()
    assert abs(same - 800) < 4 * 20  # four standard deviations of 1,600 coins


def test_size_and_channels_are_what_pillow_makes_of_them(tmp_path: Path) -> None:
    """Cutting out the middle of the scaled image equals scaling the middle, on whole pixels."""
    wide = RNG.integers(0, 256, (9, 12, 3), np.uint8)
    tall = Image.fromarray(RNG.integers(0, 256, (8, 4, 3), np.uint8))
    (tmp_path / "a.png").write_bytes(png(wide))
    (tmp_path / "b.png").write_bytes(png(np.asarray(tall)))
    grey = preview_images(config(tmp_path / "a.png", lanes=1, channels=1), 0, 1)
    assert (grey[0, 0].numpy() == np.asarray(Image.fromarray(wide).convert("L"))).all()
    cut = preview_images(config(tmp_path / "b.png", lanes=1, size=2), 0, 1)
    expected = tall.resize((2, 4), Image.Resampling.BICUBIC).crop((0, 1, 2, 3))
    assert (
        np.abs(cut[0].numpy().transpose(1, 2, 0).astype(int) - np.asarray(expected)).max() <= 1
    )  # Pillow rounds between its two passes
    assert image_shape(config(tmp_path / "a.png")) == (3, 9, 12)
    assert image_shape(config(tmp_path / "b.png", size=5)) == (3, 5, 5)


def test_the_digits_are_those_of_scikit_learn() -> None:
    images, labels = image_set(ImageConfig(held_out=0.0))
    digits = load_digits()
    assert sorted(
        (image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True)
    ) == sorted(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    assert image_shape(ImageConfig()) == (1, 8, 8)


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 8), (2, 16), (3, 7)])
def test_held_out_images_are_the_same_set_for_every_world(world: int, micro_batch: int) -> None:
    images = ImageConfig(held_out=0.1)
    ranks = [held_out_images(images, rank=rank, world=world, micro_batch=micro_batch) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    seen = sorted(
        (n, image.numpy().tobytes(), label)
        for rank in ranks
        for batch in rank
        for n, image, label, there in zip(
            batch["sample"].tolist(), batch["image"], batch["label"].tolist(), batch["mask"].tolist(), strict=True
        )
        if there
    )
    expected, labels = image_set(images, "held_out")
    assert seen == [
        (n, image.numpy().tobytes(), label)
        for n, (image, label) in enumerate(zip(expected, labels.tolist(), strict=True))
    ]
    assert abs(len(seen) - 179.7) < 4 * 12.8


def test_training_and_held_out_images_are_all_images_and_none_twice() -> None:
    images = ImageConfig(held_out=0.2, lanes=1)
    train, _ = image_set(images)
    kept, _ = image_set(images, "held_out")
    everything, _ = image_set(dataclasses.replace(images, held_out=0.0))
    assert len(train) + len(kept) == len(everything)
    seen, _ = run(images, 1, 1, global_batch=len(train), micro_batch=len(train))
    assert sorted(pixels for pixels, _ in seen.values()) == sorted(image.numpy().tobytes() for image in train)
    first, labels = image_set(images, "held_out", limit=70)
    assert len(first) == len(labels) == 70
    assert (first == kept[:70]).all()


def test_an_eval_source_is_evaluated_whole_and_trained_on_whole(folder: Path) -> None:
    images = config(
        folder / "binary.parquet",
        eval_source=Files(paths=(str(folder / "lists.parquet"),)),
        held_out=0.5,
        max_eval_samples=30,
    )
    assert len(image_set(images)[0]) == len(image_set(images, "held_out")[0]) == 40
    assert sum(int(batch["mask"].sum()) for batch in held_out_images(images, rank=0, world=1, micro_batch=8)) == 30


def test_labels_may_be_left_out(folder: Path) -> None:
    images = config(folder / "binary.parquet", label_column=None)
    assert {label for _, label in run(images, 1, 3)[0].values()} == {0}


def test_prepare_and_manifest_know_images(folder: Path) -> None:
    for images in (ImageConfig(), config(folder / "feature.parquet"), config(folder / "files/*/*.png")):
        prepare(images)
        assert (
            manifest(images, seed=0)["digest"]
            == manifest(images, seed=0)["digest"]
            != manifest(dataclasses.replace(images, flip=True), seed=0)["digest"]
        )
    assert len(manifest(ImageConfig())["source"]) == 16


ONE_LINERS = {
    "unreadable": (
        {},
        r"source: .*bad.parquet, row 2: not a readable image \(in no known format\); repair it, remove it from ",
    ),
    "no bytes": (
        {"image_column": "none"},
        r"source: .*bad.parquet, row 0: not a readable image \(no such file, or an empty one\); ",
    ),
    "cut": ({"image_column": "cut"}, r"source: .*bad.parquet, row 1: not a readable image \(.*\); "),
    "size": (
        {"image_column": "sizes"},
        "source: .*bad.parquet, row 2: images of 7 x 6 and 6 x 6 cannot go into one batch; set run.objective.data.size",
    ),
    "label": (
        {"image_column": "good", "classes": 2},
        "source: .*bad.parquet, row 2: label 2 in 'label', but labels go from 0 to 1; repair it, or set ",
    ),
    "negative": (
        {"image_column": "good", "label_column": "minus"},
        "source: .*bad.parquet, row 1: label -1 in 'minus', but labels begin at 0; ",
    ),
    "no labels": (
        {"image_column": "good", "label_column": "word"},
        "label_column: 'word' holds string, not class numbers; use a column of integers",
    ),
    "no images": ({"image_column": "word"}, "image_column: 'word' holds string, not images; use a column"),
    "no column": (
        {"image_column": "img"},
        "source.paths: .*: no column 'img' .*; set run.objective.data.text_column, run.objective.data.image_column",
    ),
}


@pytest.mark.parametrize("case", ONE_LINERS)
def test_wrong_images_are_one_line(tmp_path: Path, case: str) -> None:
    good = [png(pixels) for pixels in PIXELS[:3]]
    columns = {
        "image": [*good[:2], b"this is no image"],
        "none": pa.array([None, *good[1:]], pa.binary()),
        "cut": [good[0], good[1][:60], good[2]],
        "sizes": [*good[:2], png(np.zeros((7, 6, 3), np.uint8))],
        "good": good,
        "label": [0, 1, 2],
        "minus": [0, -1, 0],
        "word": ["a", "b", "c"],
    }
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    options, message = ONE_LINERS[case]
    images = config(tmp_path / "bad.parquet", lanes=1, **options)
    with pytest.raises(ValueError, match=rf"^run\.objective\.data\.{message}") as raised:
        prepare(images)
    assert "\n" not in str(raised.value)
    if "source: " in message:
        with (
            pytest.raises(ValueError, match=rf"^run\.objective\.data\.{message}"),
            ImageStream(images, Share(rank=0, world=1, global_batch=3, micro_batch=3), seed=0) as stream,
        ):
            next(stream)


def test_a_file_that_is_no_image_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"this is no image")
    with pytest.raises(ValueError, match=rf"^run.objective.data.source: {tmp_path}/a/x.png: not a readable image"):
        prepare(config(tmp_path / "a" / "*.png"))


@pytest.mark.parametrize(
    ("field", "value"), [("size", 0), ("window", 0), ("held_out", 1.0), ("lanes", 0), ("prefetch", -1), ("classes", 0)]
)
def test_numbers_out_of_range_are_one_line(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^run.objective.data.{field}: {value} "):
        ImageConfig(**{field: value})


def test_the_config_alone_imports_nothing_heavy() -> None:
    heavy = {"torch", "datasets", "numpy", "pyarrow", "PIL", "sklearn"}
    code = f"import data.images, sys; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert ImageConfig().source == Digits()
