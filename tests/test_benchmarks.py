"""The benchmarks run: small, and without what only they need."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora.config.compose import compose
from qlora.config.schema import described_settings
from qlora.planning.read_shape import read_shape
from qlora.planning.training_plan import find_shape
from qlora.run import Run

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PRESETS = BENCHMARKS.parent / "conf" / "model"


def run(script: str, *arguments: str) -> str:
    """Returns what a benchmark prints."""
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_the_data_benchmark_prints_a_table_and_writes_its_numbers(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    sizes = ["--rows", "60", "--chats", "10", "--only", "qlora,collator", "--json", str(numbers)]
    rows = [
        line.split(" | ")
        for line in run("data_pipeline.py", *sizes).splitlines()
        if line.startswith(("| alpaca", "| chats"))
    ]
    systems = ["qlora, cold", "qlora, second start", "tokenizing collator"]
    assert [row[1] for row in rows] == systems * 2
    results = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    assert [result["rows"] for result in results] == [59, 59, 60, 9, 9, 10]  # qlora holds one row out
    assert all(result["first_batch"] <= result["whole_pass"] for result in results)
    assert all(500 < result["tokens"] / result["rows"] < 2000 for result in results if result["set"] == "chats")


@pytest.mark.full
def test_the_evaluation_benchmark_compares_equal_work_and_finds_equal_answers(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    printed = run("evaluation.py", "--items", "24", "--rows", "3", "--json", str(numbers))
    results = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    systems = ["qlora", "one question at a time", "qlora", "one row at a time"]
    assert [result["system"] for result in results] == systems
    assert [result["items"] for result in results] == [24, 24, 3, 3]
    assert results[0]["tokens"] == results[1]["tokens"] > 24 * 200
    assert results[2]["tokens"] == results[3]["tokens"]
    assert [result["same"] for result in results] == [1.0] * 4
    assert "times as fast as one at a time: MMLU, invented " in printed


@pytest.mark.full
def test_the_sweep_benchmark_compares_a_loop_with_a_sweep_of_the_same_jobs(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    printed = run("sweep_overhead.py", "--jobs", "2", "--repeats", "1", "--json", str(numbers))
    result = json.loads(numbers.read_text(encoding="utf-8"))
    assert result["overhead"] == (result["sweep"] - result["loop"]) / 2
    assert f"| seconds | {result['loop']:.1f} | {result['sweep']:.1f} | {result['overhead']:.2f} |" in printed
    assert 0 < result["loop_cpu"] < result["sweep_cpu"]


def test_simulated_sweeps_without_a_difference_rarely_end_in_a_wrong_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sweep_verdicts as simulation

    assert simulation.exact_interval(12, 1000) == pytest.approx((0.0062155, 0.0208677), abs=1e-6)
    assert simulation.t_quantile(9, 0.025) == pytest.approx(2.6850108)
    for candidates in (1, 3):
        result = simulation.measure_errors(candidates, "normal", 200)
        assert result["low"] < 0.05
        assert result["sequential"] < 0.05 < result["peeking"]
    power = simulation.measure_power(3, 50)
    assert (power["better"], power["worse"]) == (0, 1)
    assert power["seeds"] < 8
    numbers = tmp_path / "numbers.json"
    monkeypatch.setattr("sys.argv", ["sweep_verdicts", "--sweeps", "4", "--powers", "2", "--json", str(numbers)])
    simulation.main()
    assert {row["sweeps"] for row in json.loads(numbers.read_text())["errors"]} == {4}


@pytest.mark.full
def test_the_memory_benchmark_trains_and_sets_the_plan_beside_it(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    printed = run("memory.py", "--small", "--models", "llama-7b", "--lengths", "64", "--json", str(numbers))
    saved = json.loads(numbers.read_text(encoding="utf-8"))
    assert [result["checkpointing"] for result in saved["results"]] == [True, False]
    assert all(result["planned_gb"] > 0.05 and result["measured_gb"] > 0.2 for result in saved["results"])
    assert all("model.weights=random" in result["overrides"] for result in saved["results"])
    assert "| llama-7b | 64 | all layers |" in printed


@pytest.mark.full
@pytest.mark.slow
def test_the_step_benchmark_times_the_modes_side_by_side(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    printed = run(
        "step.py", "--small", "--steps", "1", "--end-to-end", "--workloads", "guanaco", "--contestants", "bf16",
        "plain", "--json", str(numbers),
    )  # fmt: skip
    results = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    assert [(result["workload"], result["contestant"]) for result in results] == [
        (workload, name) for name in ("bf16", "plain") for workload in ("guanaco", "guanaco, end to end")
    ]
    assert all(result["tokens_per_second"] > 0 for result in results), results
    assert "| guanaco | bf16 | " in printed


@pytest.mark.full
def test_the_benchmark_of_presets_sets_a_layer_beside_llama_s(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    presets = ["granite-4.0-micro", "qwen3-30b-a3b"]
    done = subprocess.run([sys.executable, str(BENCHMARKS / "presets.py"), "--presets", *presets], capture_output=True)
    assert b"qwen3-30b-a3b: a mixture of experts is not dense; step.py times it" in done.stderr
    printed = run("presets.py", "--small", "--steps", "1", "--bf16", "--presets", presets[0], "--json", str(numbers))
    llama, granite = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    assert [llama["preset"], granite["preset"]] == ["llama-7b", "granite-4.0-micro"]
    tokens, weights, adapters = 8 * 128, 4 * 256**2 + 3 * 256 * 512, 64 * (8 * 256 + 3 * (256 + 512))
    pairs = 7 * 2 * 256 * 128 / 2
    assert llama["tflop"] * 1e12 == pytest.approx(tokens * (4 * weights + 6 * adapters + pairs))
    assert llama["layers"] == 4
    assert f"| llama-7b | 4 | {llama['ms']:.2f} | " in printed
    ratio = granite["tflops"] / llama["tflops"]
    assert f" | {ratio:.0%} | " in printed


def test_the_layers_of_a_preset_that_are_timed_are_mixed_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import presets
    import step

    assert presets.count_layers([0] * 32) == 6
    assert presets.count_layers([0, 0, 0, 0, 0, 1] * 8) == 8
    assert presets.count_layers([0, 0, 0, 1] * 8) == 6
    lfm2 = [int(index in (2, 5, 8, 10, 12, 14)) for index in range(16)]
    assert presets.count_layers(lfm2) == 10  # 3 of 8
    assert presets.count_layers([0, 0, 1]) == 3
    shape = presets.shape_of("lfm2.5-1.2b-base", small=False)
    assert step.few_layers(shape, 10) == [
        "model.architecture.num_hidden_layers=10", "model.architecture.options.full_attn_idxs=[2,5,8]"
    ]  # fmt: skip
    hybrid = compose(["model=granite-4.0-h-micro", *step.few_layers(["model=granite-4.0-h-micro"], 6)])
    assert hybrid.model.architecture.options["layer_types"] == ["linear_attention"] * 5 + ["full_attention"]
    assert presets.shape_of("gemma-4-e4b", small=False)[1:] == ["model.architecture.options.num_kv_shared_layers=0"]
    known = {"layers": 4, "ms": 1.5, "tflop": 13.25, "tflops": 980.0, "parts": {"fp8": "on"}}
    rows = [
        {"preset": "llama-7b", **known},
        {"preset": "qwen3.5-9b", **known, "tflops": 490.0, "parts": {"fused_attention": "has its own", "fp8": "on"}},
        {"preset": "phi-4", "failure": "out of memory"},
    ]
    assert presets.to_table(rows).splitlines()[2:] == [
        "| llama-7b | 4 | 1.50 | 13.2 | 980 | 100% |  |",
        "| qwen3.5-9b | 4 | 1.50 | 13.2 | 490 | 50% | fused_attention |",
        "| phi-4 | out of memory |  |  |  |  |  |",
    ]


def test_each_dense_architecture_of_the_presets_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import presets

    shapes = {path.stem: yaml.safe_load(path.read_text())["architecture"] for path in PRESETS.glob("*.yaml")}
    timed = {shapes[name]["model_type"] for name in (presets.REFERENCE, *presets.PRESETS)}
    others = {shape["model_type"]: described_settings(shape) for shape in shapes.values()}
    dense = {kind for kind, shape in others.items() if kind not in timed and read_shape(shape, kind).experts is None}
    assert dense == {"mistral", "ernie4_5"}  # layers as LLaMA's, and a model of 0.3B


@pytest.mark.full
@pytest.mark.parametrize("model", ["llama-7b", "gemma-3-12b", "qwen3.5-9b", "gpt-oss-20b"])
def test_rivals_load_what_qlora_draws(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import rivals
    import step

    shape = [f"model={model}", *step.small_shape(model)]
    rivals.save_base(str(tmp_path / "base"), shape)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    whole = ["quantization=none"] if model == "gpt-oss-20b" else []
    run = Run(compose([*step.EVERY, *shape, *whole]), tmp_path / "run").session
    random_base = run.load_base()
    assert whole or loaded.model.layers[1].mlp.up_proj.weight.quant_state.nested
    saved, expected = loaded.state_dict(), random_base.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    ids = next(step.batches("guanaco", "trl", 2048, run.placement.device, 16))[0].inputs["input_ids"]
    # bitsandbytes rounds otherwise outside training
    logits = [base.train()(ids, use_cache=False).logits for base in (loaded, random_base)]
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab() == run.tokenizer.get_vocab()


def test_rivals_put_adapters_where_qlora_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import rivals
    import step

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    names = {
        "llama-7b": [*attention, "gate_proj", "up_proj", "down_proj"],
        "phi-4": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        "gpt-oss-20b": [*attention, "gate_up_proj", "down_proj"],
        "deepseek-v2-lite": [
            "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"
        ],
    }  # fmt: skip
    assert {model: rivals.target_names(compose([*step.EVERY, f"model={model}"])) for model in names} == names


def test_texts_of_the_whole_program_are_as_long_as_the_rows_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step

    step.write_texts(tmp_path / "rows.jsonl", 1)
    texts = [json.loads(line)["text"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()[:200]]
    run = Run(compose(step.EVERY), tmp_path / "run").session
    counts = [len(ids) + 2 for ids in run.tokenizer(texts, add_special_tokens=False).input_ids]
    assert counts == step.lengths(8192)[:200]


def test_rivals_that_are_not_installed_are_left_out_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step

    monkeypatch.setattr(step, "find_spec", lambda package: None if package == "unsloth" else package)
    assert step.choose(["fp8", "unsloth", "trl", "unsloth, keep"]) == ["fp8", "trl"]
    assert capsys.readouterr().err == (
        '"unsloth", "unsloth, keep" left out: unsloth is not installed (pip install unsloth)\n'
    )
    numbers = {"tokens_per_second": 7048.4, "peak_gb": 7.91, "first_step_seconds": 3.2}
    rows = [
        {"workload": "guanaco", "contestant": "unsloth", **numbers},
        {"workload": "guanaco", "contestant": "trl", **numbers, "is_trainer": True},
        {"workload": "long", "contestant": "trl", "failure": "out of memory"},
    ]
    assert step.to_table(rows).splitlines()[2:] == [
        "| guanaco | unsloth | 7,048 | 7.9 | 3 |",
        "| guanaco | trl, with its loader | 7,048 | 7.9 | 3 |",
        "| long | trl | out of memory |  |  |",
    ]


def test_pairs_of_the_preference_benchmark_have_the_tokens_that_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import preferences
    import step

    file = tmp_path / "pairs.jsonl"
    preferences.write_pairs(file, 4, 16)
    limits = ["data.source_max_len=null", "data.target_max_len=null", "data.max_length=32", "data.eval_dataset_size=1"]
    run = Run(compose([*step.EVERY, "loss=dpo", "data=local", f"data.path={file}", *limits]), tmp_path / "run").session
    rows = list(run.data.train)
    assert {(row["answer_start"], len(row["input_ids"]), len(row["rejected_ids"])) for row in rows} == {(8, 32, 32)}
    assert sum(row["length"] for row in rows) * preferences.PAIRS / len(rows) == preferences.tokens_a_step(16)


def test_equal_memory_is_that_of_the_fastest_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import preferences

    cached = {"contestant": "trl, cached reference", "tokens_per_second": 1300.0, "peak_gb": 12.5}
    results = [
        {"contestant": "trl", "micro": 8, "tokens_per_second": 900.0, "peak_gb": 11.0, "first_step_seconds": 3.0},
        {**cached, "micro": 8, "reference_seconds": 0.25},
        {"contestant": "unsloth", "micro": 8, "failure": "out of memory"},
        {"contestant": "bf16, memory free", "micro": 8, "tokens_per_second": 2000.0, "peak_gb": 70.0},
    ]
    assert preferences.equal_memory(results, None) == "12.50GB"
    assert preferences.equal_memory(results, "9GB") == "9GB"
    assert preferences.equal_memory(results[2:], None) is None
    assert preferences.to_table([*results[1:3], {**results[3], "budget": "12.50GB"}]).splitlines()[2:] == [
        "| trl, cached reference | 16 | 1,300 | 12.5 |  | 0.25 |",
        "| unsloth | 16 | out of memory |  |  |  |",
        "| bf16, memory free (12.50GB) | 16 | 2,000 | 70.0 |  |  |",
    ]


@pytest.mark.full
def test_the_preference_benchmark_trains_pairs_with_and_without_a_reference(tmp_path: Path) -> None:
    numbers, names = tmp_path / "numbers.json", ["bf16, memory free", "sft, bf16, memory free"]
    printed = run(
        "preferences.py",
        "--small",
        "--steps",
        "1",
        "--contestants",
        *names,
        "bf16, equal memory",
        "--json",
        str(numbers),
    )
    results = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    assert [result["contestant"] for result in results] == names
    assert all(result["tokens_per_second"] > 0 for result in results), results
    assert "| bf16, memory free | 16 | " in printed


@pytest.mark.full
def test_the_benchmark_of_8_bit_matmuls_compares_gradients_and_training_runs(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"the stone owl sings of river {n}"}) + "\n" for n in range(40)))
    printed = run(
        "fp8_quality.py", "--model", "tiny", "--data", str(data), "--steps", "2", "--seeds", "0", "--json",
        str(numbers), "data.eval_dataset_size=8",
    )  # fmt: skip
    results = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    assert results["fp32"]["gradient_error"] == 0
    assert results["bf16"]["gradient_error"] < results["fp8"]["gradient_error"] < 0.5
    assert "fp8 and float32 of one seed" in printed


@pytest.mark.full
def test_the_scaling_benchmark_sets_two_processes_beside_one(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    options = ["--small", "--parts", "weak", "strong", "--models", "llama-7b", "--modes", "bf16"]
    options += ["--json", str(numbers)]
    run("scaling.py", *options, "--steps", "1", "--warm-up", "1")
    one, weak, strong = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    assert [(result["gpus"], result["rows"]) for result in (one, weak, strong)] == [(1, 8), (2, 16), (2, 8)]
    assert [len(result["peak_gb"]) for result in (one, weak, strong)] == [1, 2, 2]
    assert strong["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert weak["losses"] != pytest.approx(one["losses"], rel=1e-5)
    printed = run("scaling.py", *options)  # measures nothing again
    assert f"| llama-7b | bf16 | 2 | 8 | 4 | {strong['tokens_per_second']:,.0f} | " in printed


def test_the_scaling_benchmark_compares_with_one_gpu_and_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling

    known = {"part": "weak", "model": "llama-7b", "mode": "fp8", "micro": 4}
    one = known | {"gpus": 1, "rows": 8, "tokens_per_second": 2e4, "peak_gb": [31.04], "first_step_seconds": 13.2}
    two = known | {
        "part": "strong",
        "gpus": 2,
        "rows": 8,
        "tokens_per_second": 3e4,
        "peak_gb": [31, 32],
        "first_step_seconds": 14.0,
    }
    lost = known | {"gpus": 2, "rows": 16, "failure": "longer than 400 s"}
    table = scaling.to_tables([one | {"losses": [2.0, 1.0]}, two | {"losses": [2.0, 1.01]}, lost])
    assert table.splitlines()[2:] == [
        "| llama-7b | fp8 | 1 | 8 | 4 | 20,000 | 1.000 | 31.0 | 13 |  |",
        "| llama-7b | fp8 | 2 | 8 | 4 | 30,000 | 0.750 | 32.0 | 14 | 1.0e-02 |",
        "| llama-7b | fp8 | 2 | 16 | 4 | longer than 400 s |  |  |  |  |",
    ]
    jobs = [{"visible": name, "began": began, "ended": began + 3} for name, began in [("0", 0), ("1", 1), ("0", 2)]]
    assert [scaling.overlap(jobs, name) for name in ("0", "1")] == [1, 0]


def test_a_mixture_of_experts_has_contestants_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step

    assert step.is_mixture(["model=qwen3-30b-a3b"])
    assert step.is_mixture(["model=gpt-oss-20b"])
    assert step.is_mixture(["model=gemma-4-26b-a4b"])  # which calls its numbers otherwise
    assert not step.is_mixture(["model=llama-7b"])
    lean = step.MIXTURES["fp8, 24 GB"].overrides
    assert {"lora.dtype=bf16", "trainer.memory_budget=24GB", "quantization.compute=fp8"} <= set(lean)
    assert not {"trl", "original"} & set(step.MIXTURES)
    arguments = argparse.Namespace(model="qwen3-30b-a3b", small=True, layers=1, overrides=["seed=3"])
    shape = step.shape_of(arguments, mixture=True)
    assert {"trainer.optim=adamw_8bit", "lora.r=16", "model.architecture.num_hidden_layers=1", "seed=3"} <= set(shape)
    assert shape.index("model.architecture.num_hidden_layers=1") > shape.index("model.architecture.num_hidden_layers=2")


@pytest.mark.parametrize("model", ["qwen3.5-35b-a3b", "granite-4.0-h-micro", "gemma-4-e4b", "pythia-6.9b"])
def test_a_preset_of_any_kind_is_made_small(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step

    shape = find_shape(compose([*step.EVERY, f"model={model}", *step.small_shape(model)]))
    assert (shape.layers, shape.hidden, shape.vocabulary) == (2, 256, 2048)


def test_the_optimizer_of_a_timed_step_is_the_config_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bitsandbytes
    import step

    model = torch.nn.Linear(4, 4)
    for optim, kind in {"paged_adamw_32bit": bitsandbytes.optim.AdamW, "adamw_8bit": bitsandbytes.optim.AdamW}.items():
        optimizer = step.build_optimizer(compose([f"trainer.optim={optim}"]), model)
        assert isinstance(optimizer, kind)
        assert optimizer.is_paged == optim.startswith("paged")
        assert optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.full
def test_the_families_benchmark_examines_types_and_says_why_not(tmp_path: Path) -> None:
    file = tmp_path / "families.json"
    kinds = ["llama", "bert", "falcon_h1", "gemma3n_text"]
    printed = run("families.py", "--json", str(file), "--types", *kinds)
    results = json.loads(file.read_text(encoding="utf-8"))
    assert set(results) == set(kinds)
    assert {results["llama"][name] for name in ("trains", "packs", "merges", "plain PEFT", "planned")} == {"yes"}
    assert "is an encoder" in results["bert"]["refused"]
    assert "lets packed rows see each other" in results["falcon_h1"]["packs"]
    assert "of its 4 causal types 3 train" in printed


def test_every_causal_type_stands_in_the_table_and_none_ended_with_a_traceback() -> None:
    results = json.loads((BENCHMARKS / "families.json").read_text(encoding="utf-8"))
    assert [kind for kind, row in results.items() if "error" in row] == []
    if {row["transformers"] for row in results.values()} == {transformers.__version__}:
        assert set(results) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    page = (BENCHMARKS.parent / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.partition("<!-- families: begin -->")[2].partition("<!-- families: end -->")[0]
    assert [kind for kind in results if f"`{kind}`" not in table] == []
