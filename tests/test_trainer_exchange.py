"""A run's weights in transformers and back, in any layout of ranks.

Logits and greedy tokens are the same there; the weights come back bit-equal.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed import run_distributed
from kube_cluster import Run
from rich.console import Console
from saved_runs import SWITCH, begun, job_of, model_of, save_run, started_state, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.commands.export import export
from models.transformer.generate import generate
from trainer.config import RunConfig
from trainer.objectives import build_objective
from trainer.parsing import parse, plain
from trainer.settle import resolve_run

pytestmark = pytest.mark.usefixtures("in_tmp_path")

TOP_2 = {"experts": 4, "ffn": 48, "router": {"name": "top_k", "k": 2}}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": True, "tie_embeddings": True, "head_dim": 24},
    "qwen3_moe": {"qk_norm": True, "moe": SWITCH, "moe_layers": [0, 2], "rope_theta": 5000.0},
    "qwen3_moe noisy": {
        "qk_norm": True,
        "moe": TOP_2 | {"router": {"name": "noisy_top_k", "k": 2}},
        "tie_embeddings": True,
    },
    "llama": {"kv_heads": 1, "norm_eps": 1e-5},
    "mixtral": {"moe": TOP_2, "head_dim": 24},
    "qwen2_moe": {"moe": SWITCH, "moe_layers": "alternate"},
    "qwen2_moe shared": {"moe": TOP_2 | {"shared_expert": 40}, "kv_heads": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_the_same_logits_and_tokens_and_the_way_back_the_same_bits(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    run = save_run(job_of(corpus, tmp_path, "first", MODELS[name]))
    out = tmp_path / "out"
    export(Console(), str(run), str(out))
    ours = model_of(run)
    theirs, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(found.values()), found
    assert theirs.config.model_type == name.split()[0]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, ours(tokens())[0], rtol=0, atol=1e-5)

    prompt = AutoTokenizer.from_pretrained(out)("def ", return_tensors="pt")
    written = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert torch.equal(written, generate(ours, prompt.input_ids, 20, temperature=0)[:, : written.shape[1]])
    assert written.shape[1] > 10

    again = begun(job_of(corpus, tmp_path, "second", MODELS[name], init_from=str(out))).state_dict()
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in ours.state_dict().items())


def test_the_byte_tokenizer_in_transformers_gives_our_ids(corpus: Path, tmp_path: Path) -> None:
    export(Console(), str(save_run(job_of(corpus, tmp_path, "run", MODELS["qwen3"]))), str(tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    everything = bytes(range(128)).decode() + "".join(
        map(chr, (*range(128, 0xD800, 7), *range(0xE000, 0x110000, 4001)))
    )
    for text in (
        everything,
        "",
        "  two  spaces\r\n\ttab ",
        "<eod> <mask> <0x41> Ġ",
        "def f(x):\n    return 'né' # 𝄞",
        "<|endoftext|>",
    ):
        assert theirs(text, add_special_tokens=False).input_ids == list(text.encode())
        assert theirs(text).input_ids == [256, *text.encode()]
        assert theirs.decode(list(text.encode())) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.mask_token_id, len(theirs)) == (256, 256, 257, 258)
    job = job_of(corpus, tmp_path, "again", MODELS["qwen3"])
    job["objective"]["data"]["tokenizer"] = str(tmp_path / "out")  # our own reader of such files agrees
    assert build_objective(parse(RunConfig, job, "run").objective, 0).tokenizer.encode([everything])[
        0
    ].tolist() == list(everything.encode())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "mixtral", "qwen2_moe shared"])
def test_what_transformers_saved_in_several_bf16_files_is_read(name: str, corpus: Path, tmp_path: Path) -> None:
    run = save_run(job_of(corpus, tmp_path, "run", MODELS[name]))
    export(Console(), str(run), str(tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 2
    again = begun(job_of(corpus, tmp_path, "again", MODELS[name], init_from=str(tmp_path / "theirs"))).state_dict()
    assert all(torch.equal(again[key], value.bfloat16().float()) for key, value in model_of(run).state_dict().items())


def test_a_run_of_ours_is_a_start_too(corpus: Path, tmp_path: Path) -> None:
    moe = {"experts": 4, "ffn": 32, "router": {"name": "bias_balanced", "k": 2}, "balance": "global"}
    run = save_run(job_of(corpus, tmp_path, "first", {"moe": moe}))
    again = begun(job_of(corpus, tmp_path, "second", {"moe": moe}, init_from=str(run))).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model_of(run).state_dict().items())


ROUTERS: list[dict[str, Any]] = [
    {"name": "switch"},
    {"name": "top_k", "k": 2},
    {"name": "top_k", "k": 3, "normalise": False},
    {"name": "noisy_top_k", "k": 2},
    {"name": "bias_balanced", "k": 2, "scale": 2.5},
    {"name": "bias_balanced", "k": 2, "normalise": False},
]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", ["folder", "run"])
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: " ".join(map(str, router.values())))
def test_an_upcycled_mixture_begins_equal_to_the_dense_model(
    router: dict[str, Any], kind: str, training: bool, corpus: Path, tmp_path: Path
) -> None:
    run = save_run(job_of(corpus, tmp_path, "dense", {"qk_norm": True}))
    export(Console(), str(run), str(tmp_path / "out"))
    start = str(tmp_path / "out" if kind == "folder" else run)
    moe = {"experts": 8, "ffn": 48, "router": router, "shared_expert": 16}
    job = job_of(
        corpus,
        tmp_path,
        "sparse",
        {"qk_norm": True, "moe": moe, "moe_layers": "alternate"},
        init_from=start,
        upcycle={"experts": 8},
    )
    dense = model_of(run)
    sparse = begun(job).train(training)
    logits, stats = sparse(tokens(16))
    with torch.no_grad():
        torch.testing.assert_close(logits, dense(tokens(16))[0], rtol=0, atol=1e-5)
    (load_E,) = (layer.load_E for layer in stats)
    assert (load_E > 0).sum() >= 6, "nearly all experts take part"
    logits.square().mean().backward()
    experts = sparse.moe_layers[0].experts
    assert experts.down.grad is not None
    assert len({tuple(grad.flatten()[:5].tolist()) for grad in experts.down.grad}) >= 6, (
        "they begin equal, and part at the first step"
    )


def test_upcycle_alone_makes_a_normalised_top_2_in_every_layer(corpus: Path, tmp_path: Path) -> None:
    run = save_run(job_of(corpus, tmp_path, "dense", {}))
    sparse = begun(job_of(corpus, tmp_path, "sparse", {}, init_from=str(run), upcycle={"experts": 4}))
    assert len(sparse.moe_layers) == 3
    assert sparse.config.moe is not None
    assert plain(sparse.config.moe)["router"] == {"name": "top_k", "k": 2, "normalise": True}
    with torch.no_grad():
        torch.testing.assert_close(sparse(tokens())[0], model_of(run)(tokens())[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("upcycle", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["same", "upcycled"])
def test_every_engine_and_layout_starts_from_the_same_bits(upcycle: bool, corpus: Path, tmp_path: Path) -> None:
    model = {"moe": SWITCH, "qk_norm": True, "moe_layers": "alternate"}
    run = save_run(job_of(corpus, tmp_path, "first", {"qk_norm": True} if upcycle else model))
    export(Console(), str(run), str(tmp_path / "out"))
    more = {"init_from": str(tmp_path / "out")} | ({"upcycle": {"experts": 4}} if upcycle else {})
    job = job_of(corpus, tmp_path, "second", model, **more)
    expected = {f"weight/model/{name}": value.detach().flatten() for name, value in begun(job).named_parameters()}
    engines: list[dict[str, Any]] = [
        {"name": "deepspeed", "zero": zero, "ep": ep} for zero, ep in ((0, 2), (1, 1), (1, 2), (2, 2), (3, 1))
    ]
    for state in run_distributed(
        started_state, 2, [job | {"engine": engine} for engine in [*engines, {"name": "accelerate"}]]
    )[0]:
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())


def trained(world: Any, job: dict[str, Any], resume: bool) -> dict[str, Any]:
    from trainer.settle import prepare
    from trainer.worker.main import _train

    run = resolve_run(parse(RunConfig, job, "run"), "job", world.size, resume)
    prepare(run, resume)
    return _train(run, world, say=lambda line: None, started=0.0)


def test_training_goes_on_from_there_and_a_checkpoint_of_the_run_wins(corpus: Path, tmp_path: Path) -> None:
    trained_job = job_of(corpus, tmp_path, "first", MODELS["qwen3_moe"]) | {"stop": {"steps": 30}, "log_every": 1}
    first = run_distributed(trained, 1, trained_job, False)[0]
    export(Console(), str(tmp_path / "first"), str(tmp_path / "out"))
    job = job_of(corpus, tmp_path, "second", MODELS["qwen3_moe"], init_from=str(tmp_path / "out")) | {
        "stop": {"steps": 2},
        "log_every": 1,
    }
    run_distributed(trained, 1, job, False)

    def losses(name: str) -> list[float]:
        return [
            row["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if "loss" in (row := json.loads(line))
        ]

    assert losses("second")[0] < losses("first")[0] - 0.5
    assert losses("second")[0] == pytest.approx(first["training"]["loss"], abs=0.3)
    assert "started from" in (tmp_path / "second" / "events.jsonl").read_text()

    shutil.rmtree(tmp_path / "out")
    run_distributed(trained, 1, job | {"stop": {"steps": 4}}, True)
    events = (tmp_path / "second" / "events.jsonl").read_text()
    assert (events.count("started from"), events.count("resumed from")) == (1, 1)
    assert len(losses("second")) == 4


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dense` and `moe`, exported, and `damaged` copies."""
    root = tmp_path_factory.mktemp("folders")
    for name, model in (("dense", {"qk_norm": True}), ("moe", {"qk_norm": True, "moe": SWITCH})):
        export(Console(), str(save_run(job_of(corpus, root / "runs", name, model))), str(root / name))
    config = json.loads((root / "dense" / "config.json").read_text())
    changes: dict[str, dict[str, Any]] = {
        "biased": {"attention_bias": True},
        "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "gpt2": {"model_type": "gpt2"},
        "wider": {"intermediate_size": 96},
        "deeper": {"num_hidden_layers": 4},
        "words": {"vocab_size": 300},
    }
    for name, change in changes.items():
        shutil.copytree(root / "dense", root / name)
        (root / name / "config.json").write_text(json.dumps(config | change))
    shutil.copytree(root / "dense", root / "pickled")
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    shutil.copytree(root / "dense", root / "cut")
    (root / "cut" / "model.safetensors").write_bytes((root / "dense" / "model.safetensors").read_bytes()[:1000])
    (root / "empty").mkdir()
    return root


MODEL = "run.objective.model"
WRONG: list[tuple[str, list[str], list[str]]] = [
    ("nowhere", [], ["no such folder"]),
    ("empty", [], ["neither config.json nor resolved.yaml"]),
    ("pickled", [], ["no model.safetensors", "pytorch_model.bin", "safe_serialization=True"]),
    ("cut", [], ["model.safetensors is not a safetensors file"]),
    ("biased", [], ["attention_bias is True", "only False is possible"]),
    ("yarn", [], ["rope_type is 'yarn'", "'default'"]),
    ("gpt2", [], ["model_type is 'gpt2'", "qwen3_moe"]),
    ("wider", [f"{MODEL}.ffn=96"], ["gate_proj.weight has shape (48, 64) in its file and (96, 64) by config.json"]),
    ("deeper", [f"{MODEL}.layers=4"], ["no model.layers.3.", "11 missing"]),
    (
        "dense",
        [f"{MODEL}.d_model=32", f"{MODEL}.layers=2"],
        [
            f"{MODEL}.layers is 3 in the folder and 2 in the job",
            f"{MODEL}.d_model is 64 in the folder and 32 in the job",
        ],
    ),
    ("dense", [f"{MODEL}.rope_theta=1e6"], ["rope_theta is 10000.0 in the folder and 1000000.0 in the job"]),
    (
        "dense",
        [f"{MODEL}.moe={{experts: 4, ffn: 48}}"],
        ["it is dense", "has 4 experts", "run.objective.upcycle.experts=4"],
    ),
    ("moe", [], ["moe.experts is 4 in the folder and none in the job"]),
    ("moe", ["run.objective.upcycle={experts: 4}"], ["already", "leave upcycle out"]),
    (
        "moe",
        [f"{MODEL}.moe={{experts: 4, ffn: 48, router: {{name: top_k}}}}"],
        ["moe.router is switch in the folder and top_k with k 2, normalise true in the job"],
    ),
    (
        "moe",
        [f"{MODEL}.moe={{experts: 8, ffn: 32}}"],
        ["moe.experts is 4 in the folder and 8 in the job", "moe.ffn is 48 in the folder and 32 in the job"],
    ),
    ("dense", ["run.objective.upcycle={experts: 1}"], ["upcycle.experts", "1", "at least 2"]),
    (
        "dense",
        ["run.objective.upcycle={experts: 4}", f"{MODEL}.moe={{experts: 4, ffn: 24}}"],
        ["ffn 24", "use experts 4 and ffn 48"],
    ),
    (
        "dense",
        ["run.objective.init_from=null", "run.objective.upcycle={experts: 4}"],
        ["upcycle.experts", "set init_from"],
    ),
    ("dense", ["run.objective.vocab_size=300"], ["(258, 64) in the folder and (300, 64) in the job"]),
    ("dense", ["run.objective.vocab_size=100"], ["vocab_size: 100 is less than the 258 ids"]),
]


@pytest.mark.parametrize(
    ("folder", "overrides", "words"), WRONG, ids=[" ".join([folder, *overrides]) for folder, overrides, _ in WRONG]
)
def test_a_start_that_does_not_fit_is_refused_in_one_line(
    folder: str,
    overrides: list[str],
    words: list[str],
    folders: Path,
    corpus: Path,
    tmp_path: Path,
    switchwork: Run,
) -> None:
    job = job_of(corpus, tmp_path, "run", {"qk_norm": True}, init_from=str(folders / folder))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"run": job}))
    code, _, complaint = switchwork("train", str(tmp_path / "job.yaml"), *overrides, "--dry-run")
    assert (code, complaint.count("\n")) == (2, 1), complaint
    for word in ("error: ", *words):
        assert word in complaint


def test_a_vocabulary_padded_by_its_maker_is_named_with_the_fix(
    folders: Path, corpus: Path, tmp_path: Path, switchwork: Run
) -> None:
    job = job_of(corpus, tmp_path, "padded", {"qk_norm": True}, vocab_size=300)
    export(Console(), str(save_run(job)), str(tmp_path / "out"))
    job = job_of(corpus, tmp_path, "run", {"qk_norm": True}, init_from=str(tmp_path / "out"))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"run": job}))
    code, _, complaint = switchwork("train", str(tmp_path / "job.yaml"), "--dry-run")
    assert (code, "run.objective.vocab_size=300" in complaint) == (2, True)
    code, printed, _ = switchwork("train", str(tmp_path / "job.yaml"), "--dry-run", "run.objective.vocab_size=300")
    assert (code, yaml.safe_load(printed)["run"]["objective"]["init_from"]) == (0, str(tmp_path / "out"))


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"moe": TOP_2 | {"router": {"name": "bias_balanced", "k": 2}}},
        ["run.objective.model.moe.router: bias_balanced", "switch, top_k or noisy_top_k"],
    ),
    (
        {"moe": TOP_2 | {"shared_expert": 8}, "qk_norm": True},
        ["run.objective.model.moe.shared_expert: 8", "qk_norm: false"],
    ),
    ({"moe": TOP_2 | {"control": "permuted"}}, ["run.objective.model.moe.control: permuted", "frozen"]),
]


@pytest.mark.parametrize(("model", "words"), REFUSED, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_what_no_layout_holds_is_refused_in_one_line(
    model: dict[str, Any],
    words: list[str],
    corpus: Path,
    tmp_path: Path,
    switchwork: Run,
) -> None:
    run = save_run(job_of(corpus, tmp_path, "run", model))
    code, _, complaint = switchwork("export", str(run), "--to", str(tmp_path / "out"))
    assert (code, complaint.count("\n"), (tmp_path / "out").exists()) == (2, 1, False)
    for word in words:
        assert word in complaint


def test_the_command_writes_to_new_folders_and_urls_only(corpus: Path, tmp_path: Path, switchwork: Run) -> None:
    run = str(
        save_run(job_of(corpus, tmp_path, "run", {"moe": SWITCH | {"eval_capacity_factor": 2.0}, "qk_norm": True}))
    )
    code, printed, _ = switchwork("export", run, "--to", str(tmp_path / "out"))
    assert code == 0
    assert "AutoModelForCausalLM" in printed
    assert "eval_capacity_factor is 2" in printed
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    code, _, complaint = switchwork("export", run, "--to", str(tmp_path / "out"))
    assert (code, "is not empty" in complaint) == (2, True)
    assert switchwork("export", run, "--to", "memory://exports/one")[0] == 0
    state = begun(
        job_of(corpus, tmp_path, "again", {"moe": SWITCH, "qk_norm": True}, init_from="memory://exports/one")
    ).state_dict()
    assert all(torch.equal(state[key], value) for key, value in model_of(Path(run)).state_dict().items())
