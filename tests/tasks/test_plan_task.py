"""`task=plan`: an answer at once from the shape alone, with the way down where a training does not fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qlora.config.compose import compose
from qlora.config.options import model_presets
from qlora.data import token_count
from qlora.errors import UserError
from qlora.models.embedded import embedded_warning
from qlora.planning import gpus
from qlora.planning.memory_plan import CONTEXT
from qlora.planning.time_plan import operations_per_token
from qlora.planning.training_plan import Plan, build_plan, find_shape, read_setup
from qlora.tasks.plan import count_tokens, planned_time, print_plan
from qlora.text import format_duration

MEASURED = Path(__file__).parents[2] / "benchmarks" / "memory.json"


def build(*overrides: str, device: str = "a6000") -> Plan:
    return build_plan(compose(["task=plan", f"plan.device={device}", *overrides]))


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        build_plan(compose(["task=plan", *overrides]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_answers_at_once_and_without_torch(tmp_path: Path) -> None:
    overrides = ["task=plan", "model=llama-65b", "plan.device=a6000", f"hydra.run.dir={tmp_path}"]
    code = "import sys; from qlora.cli import main\nmain()\nassert 'torch' not in sys.modules"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *overrides], capture_output=True, text=True, cwd=tmp_path)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert "needed                         43.7" in done.stdout
    assert "adapters and their gradients in 32 bits" in done.stdout
    assert "fits, 4." in done.stdout
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["metrics"]["plan_fits"] == 1
    assert sum(saved["parts_gb"].values()) == pytest.approx(saved["metrics"]["plan_peak_gb"])
    assert seconds < 10, "about 1.3 seconds on a free core"


@pytest.mark.parametrize(("size", "paper"), [("7b", 6.9), ("13b", 11.3), ("33b", 24.7), ("65b", 45.0)])
def test_the_paper_s_memory_is_near(size: str, paper: float) -> None:
    fp32, same = build(f"model=llama-{size}").paper, build(f"model=llama-{size}", "lora.dtype=bf16").paper
    assert fp32 is not None
    assert same is not None
    assert fp32["paper_gb"] == same["paper_gb"] == paper
    assert 0.98 * paper < fp32["planned_gb"] < 1.12 * paper
    assert 0.89 * paper < same["planned_gb"] < 1.02 * paper


RESULTS = json.loads(MEASURED.read_text(encoding="utf-8"))["results"]


@pytest.mark.matrix(8)
@pytest.mark.parametrize(
    "result", RESULTS, ids=[f"{result['model']} {result['length']} {result['checkpointing']}" for result in RESULTS]
)
def test_what_was_measured_on_a_gpu_is_planned_within_5_percent(result: dict[str, Any]) -> None:
    planned = build(*result["overrides"], "data.path=rows.jsonl", device="h200").memory.peak / 1e9
    assert planned == pytest.approx(result["measured_gb"], rel=0.05)


def test_a_budget_is_planned_with_paged_states_in_it() -> None:
    chosen = ["model=llama-7b", "trainer.memory_budget=12GB", "data.source_max_len=1792", "recipe=none"]
    paged, fixed = (build(*chosen, f"trainer.optim={name}") for name in ("paged_adamw_32bit", "sgd"))
    assert paged.memory.paged > 1e9
    assert paged.setup.checkpointed > fixed.setup.checkpointed
    assert paged.memory.peak + paged.memory.paged <= 12e9


@pytest.mark.full
def test_what_a_plan_says_fits_does_and_one_row_more_does_not() -> None:
    for chosen in (["plan=plain"], ["plan=fast"], ["quantization=none", "trainer.optim=adamw_torch"]):
        plan = build("model=llama-7b", *chosen, device="rtx-4090")
        name = "all 32 layers checkpointed"
        rows = plan.most_rows[name]
        assert rows > 0
        for count, fits in ((rows, True), (rows + 1, False)):
            again = build("model=llama-7b", *chosen, f"trainer.per_device_train_batch_size={count}", device="rtx-4090")
            assert again.fits is fits


@pytest.mark.full
def test_the_changes_make_it_fit_when_they_are_made() -> None:
    chosen = ["model=llama-33b", "quantization=none", "trainer.per_device_train_batch_size=4", "recipe=none"]
    chosen += ["trainer.gradient_checkpointing=false", "trainer.optim=adamw_torch", "data.source_max_len=1792"]
    chosen += ["plan=plain", "watchdog.nonfinite=warn"]  # 16-bit weights have no other step
    previous = build(*chosen)
    assert not previous.fits
    keys = [change.overrides.partition("=")[0] for change in previous.changes]
    assert keys == ["trainer.gradient_checkpointing", "trainer.per_device_train_batch_size", "data.max_length",
                    "trainer.optim", "quantization"]  # fmt: skip
    assert [change.fits for change in previous.changes] == [False] * 4 + [True]
    assert previous.changes[1].overrides.endswith("=1 trainer.gradient_accumulation_steps=64")
    done: list[str] = []
    needed = previous.memory.needed
    for change in previous.changes:
        done += change.overrides.split()
        after = build(*chosen, *done)
        assert after.memory.needed == pytest.approx(change.needed)
        assert change.saves == pytest.approx(needed - change.needed)
        needed = change.needed
    assert after.fits
    assert not after.changes


def test_the_last_change_is_a_smaller_model_of_the_same_kind(tmp_path: Path) -> None:
    plan = build("model=llama-65b", device="rtx-4090")
    assert [change.overrides for change in plan.changes][-2:] == ["lora.r=8", "model=llama-33b"]
    (tmp_path / "config.json").write_text(json.dumps(asdict(plan.config.model.architecture)))
    alone = build("model=llama-65b", f"model.name={tmp_path}", "plan.length=1024", device="t4")
    assert [change.overrides for change in alone.changes] == ["plan.length=256", "lora.r=8"]
    assert not any(change.fits for change in alone.changes)


def test_the_largest_of_few_checkpointed_layers_is_found_for_fast_steps() -> None:
    from qlora.planning.advice import fewest_checkpointed

    plan = build("model=llama-7b", "plan=fast", "trainer.per_device_train_batch_size=4", "plan.length=2048",
                  device="rtx-4090")  # fmt: skip
    fewest = fewest_checkpointed(plan.training, plan.gpu)
    assert fewest is not None
    assert 0 < fewest < 32


def test_a_budget_checkpoints_as_few_layers_as_it_holds() -> None:
    chosen = ["model=llama-7b", "plan=fast", "trainer.per_device_train_batch_size=4", "plan.length=2048"]
    counts = []
    for budget in ("auto", "16GB", "6GB"):
        plan = build(*chosen, f"trainer.memory_budget={budget}", device="rtx-4090")
        counts.append(plan.setup.checkpointed)
        assert plan.fits is (budget != "6GB")
    assert 0 < counts[0] < counts[1] < counts[2] == 32
    assert build(*chosen, "trainer.memory_budget=auto", device="h200").setup.checkpointed == 0


@pytest.mark.full
def test_a_budget_below_all_layers_checkpointed_has_inputs_wait_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["model=llama-65b", "trainer.per_device_train_batch_size=16", "lora.dtype=bf16"]
    whole = build(*chosen, device="h200").memory
    budget = round((whole.peak + whole.paged + whole.context - CONTEXT) / 1e6) - 2000
    plan = build(*chosen, f"trainer.memory_budget={budget}MB", device="h200")
    assert (plan.setup.checkpointed, plan.fits) == (80, True)
    assert 0 < plan.setup.offloaded < 80
    less = replace(plan.training, setup=replace(plan.setup, offloaded=plan.setup.offloaded - 1))
    assert plan.memory.comfortable <= plan.gpu.memory < less.memory.comfortable
    print_plan(plan)
    said = " ".join(capsys.readouterr().out.split())
    assert f"80 of 80 layers checkpointed (inputs of {plan.setup.offloaded} on the host)" in said
    assert f"with all layers checkpointed and the inputs of {plan.setup.offloaded} on the host" in said
    assert build(*chosen, "trainer.memory_budget=30GB", device="h200").setup.offloaded == 80


def test_full_finetuning_holds_gradients_and_states_of_all_weights() -> None:
    plan = build("model=llama-3.2-1b", "lora=none", "quantization=none", "trainer.optim=adamw_torch")
    parts, parameters = plan.memory.parts, plan.training.shape.parameters
    assert parts["weights"] + parts["embeddings and norms"] == 2 * parameters
    assert parts["optimizer"] == pytest.approx(4 * parameters, rel=1e-4)
    assert "adapters" not in {name for name, value in parts.items() if value}


def test_the_shape_of_a_local_model_is_read_from_its_config(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    AutoConfig.for_model("qwen2", vocab_size=1000, **sizes).save_pretrained(tmp_path)
    for name in (["model=llama-7b"], []):
        shape = build(*name, f"model.name={tmp_path}").training.shape
        assert (shape.model_type, shape.hidden, shape.layers, shape.vocabulary) == ("qwen2", 128, 3, 1000)
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": "qwen2"}))
    assert "vocab_size is missing, so the model's size is unknown" in refusal(
        "plan.device=h100", f"model.name={tmp_path}"
    )
    (tmp_path / "config.json").write_text("{")
    assert f"model.name={tmp_path}: config.json is damaged (not JSON: " in refusal(
        "plan.device=h100", f"model.name={tmp_path}"
    )
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": "lama"}))
    text = refusal("plan.device=h100", f"model.name={tmp_path}")
    assert "transformers does not know the model type 'lama' (did you mean llama?), so its size is unknown" in text


def test_a_model_whose_config_is_not_available_is_one_sentence() -> None:
    text = refusal("plan.device=h100", "model.name=nobody/nothing")
    assert text.startswith("model.name=nobody/nothing: its config.json is not available (")
    assert text.endswith("choose a preset with model=NAME, or give the shape with model.weights=random and "
                         "model.architecture.* fields")  # fmt: skip


def test_an_unknown_card_names_those_that_are_known() -> None:
    assert "plan.device='a600' is unknown (did you mean a6000?); choose one of this, t4" in refusal("plan.device=a600")


def test_this_machine_s_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpus.subprocess, "run", missing)
    text = refusal()
    assert text == (
        "plan.device=this: this machine has no NVIDIA GPU (there is no nvidia-smi); name one to plan for, e.g. "
        "plan.device=a6000"
    )
    for said, memory, tflops in (
        ("NVIDIA H100 80GB HBM3, 81559\n", 81559, 989.4),
        ("NVIDIA RTX A6000, 49140\nNVIDIA RTX A6000, 49140\n", 49140, 154.8),
        ("NVIDIA Unheard Of, 1000\n", 1000, None),
    ):
        monkeypatch.setattr(gpus.subprocess, "run", lambda *args, said=said, **kwargs: Said(said))
        card = gpus.find_gpu("this")
        assert (card.memory, card.tflops) == (memory * 2**20, tflops)
    assert build(device="this").hours is None


def missing(*args: Any, **kwargs: Any) -> None:
    raise FileNotFoundError


class Said:
    returncode = 0

    def __init__(self, stdout: str) -> None:
        self.stdout = stdout


def test_a_run_takes_as_long_as_its_products() -> None:
    """7 billion weights, 6 operations a token for frozen and checkpointed ones, and those of adapters and attention."""
    chosen = ["model=llama-7b", "trainer.per_device_train_batch_size=4", "plan.length=2048", "trainer.max_steps=10"]
    chosen += ["trainer.gradient_accumulation_steps=2", "plan=plain"]
    plan = build(*chosen, device="h200")
    speed = plan.speed
    assert speed is not None
    assert speed.operations == pytest.approx(4 * 2048 * 44e9, rel=0.05)
    assert speed.tokens_per_second == pytest.approx(6467, rel=0.1), "as measured"
    assert plan.hours == pytest.approx(10 * 2 * speed.seconds / 3600)
    assert build(*chosen, "trainer.max_steps=null", "trainer.num_train_epochs=1").hours is None
    one = build("model=llama-7b", "plan.length=300", "plan=plain", device="h200").speed
    assert one is not None
    assert one.bound == "starting kernels"


@pytest.mark.parametrize(
    ("chosen", "step"),
    [
        ([], "fast"),
        (["trainer.fused_linear=false"], "plain"),
        (["trainer.compile=false"], "plain"),
        (["quantization=none"], "plain"),
        (["lora=dora"], "plain"),
        (["plan=plain"], "plain"),
    ],
)
def test_the_step_is_the_one_that_the_trainer_would_take(chosen: list[str], step: str) -> None:
    assert build("model=llama-7b", *chosen).training.setup.step.value == step


def rows_of(path: Path, count: int, length: int) -> str:
    path.write_text(
        "".join(json.dumps({"prompt": f"q{i} ", "completion": "red " * length}) + "\n" for i in range(count))
    )
    return f"data.path={path}"


def screen(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    config = compose(["task=plan", "plan.device=h200", *overrides])
    tokens, why_not = count_tokens(config)
    print_plan(build_plan(config, tokens=tokens), why_not)
    return capsys.readouterr().out


def test_the_time_is_that_of_the_rows_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = f"data.cache_dir={tmp_path}"
    here = ["data=local", rows_of(tmp_path / "rows.jsonl", 100, 9), cache, "model=llama-7b", "model.tokenizer=tiny"]
    config = compose(["task=plan", "plan.device=h200", *here])
    tokens, _ = count_tokens(config)
    assert tokens is not None
    assert (tokens.units, tokens.estimate) == (80, "")
    counted, full = build_plan(config, tokens=tokens), build_plan(config, rows=80)
    assert counted.hours is not None
    assert full.hours is not None
    assert counted.hours < full.hours
    assert counted.memory == full.memory, "a long row may come"
    said = screen(capsys, *here)
    assert f"tokens           {tokens.tokens / 80:.0f} a row, {tokens.tokens / 5:,.0f} a step" in said
    assert "if every row is full" not in said


@pytest.mark.parametrize("packing", [[], ["data.packing=true", "data.pack_length=512"]], ids=["rows", "packs"])
def test_the_output_layer_is_planned_for_the_tokens_that_are_trained(tmp_path: Path, packing: list[str]) -> None:
    sizes = [("long question " * 12, 3), ("q ", 5)]
    lines = [json.dumps({"prompt": prompt, "completion": "red " * count}) for prompt, count in sizes * 40]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = ["data=local", f"data.path={tmp_path / 'rows.jsonl'}", f"data.cache_dir={tmp_path}", *packing]
    config = compose(["task=plan", "plan.device=h200", "model=qwen2.5-0.5b", "model.tokenizer=tiny", *rows])
    tokens, _ = count_tokens(config)
    assert tokens is not None
    assert tokens.targets is not None
    assert tokens.most_targets is not None
    assert 0 < tokens.targets < tokens.tokens
    assert tokens.most_targets >= tokens.targets / tokens.units
    everything = replace(tokens, targets=None, most_targets=None)
    some, whole = build_plan(config, tokens=tokens), build_plan(config, tokens=everything)
    assert some.setup.loss_tokens == config.trainer.per_device_train_batch_size * tokens.most_targets
    assert some.memory.peak <= whole.memory.peak
    assert some.speed is not None
    assert whole.speed is not None
    assert some.speed.operations < whole.speed.operations


def test_of_many_rows_a_sample_is_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_count, "SAMPLE", 30)
    said = screen(capsys, "data=local", rows_of(tmp_path / "rows.jsonl", 200, 9), f"data.cache_dir={tmp_path}")
    assert "tokens           about " in said
    assert "in all (by 30 rows that were counted)" in said
    assert "180 rows, 12 steps an epoch, 3 epochs = 36 steps" in said


def test_of_a_stream_a_plan_says_what_its_first_rows_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", 300, 9)
    stream = ["data=local", rows, f"data.cache_dir={tmp_path}", "data.streaming=true", "trainer.max_steps=20"]
    said = screen(capsys, *stream)
    assert "320 rows of a stream = 20 steps" in said
    assert "in all (by the first 100 rows of the stream)" in said
    said = screen(capsys, *stream, "data.packing=true", "data.pack_length=512")
    assert "320 packs of a stream = 20 steps" in said
    elsewhere = [stream[0], "data.path=s3://bucket/rows.jsonl", *stream[2:], "data.packing=true"]
    said = screen(capsys, *elsewhere)
    assert "320 packs of a stream = 20 steps" in said
    assert "not counted: the rows of data=local are not on this machine" in said


@pytest.mark.full
def test_without_the_tokenizer_tokens_are_guessed_and_without_rows_every_row_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", 100, 100)
    said = screen(capsys, "model=llama-7b", "data=local", rows, f"data.cache_dir={tmp_path}")
    assert "guessed at 4 bytes a token, for the tokenizer of huggyllama/llama-7b is not on this machine)" in said
    assert re.search(r"about (9\d|10\d) a row", said)
    said = screen(capsys, "model=llama-7b", "data=oasst1")
    assert "not counted: the tokenizer of huggyllama/llama-7b is not on this machine" in said
    assert "if every row is full (528 tokens), less otherwise" in said
    said = screen(capsys, "data=local", "data.path=nothing.jsonl", f"data.cache_dir={tmp_path}")
    assert "not counted: data.path=nothing.jsonl: no such file" in said


def test_embedded_rows_and_packs_are_counted_and_a_small_model_is_shown_in_megabytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = screen(capsys, f"data.cache_dir={tmp_path}")
    assert "2,464 rows, 154 steps an epoch, 1.3 epochs = 200 steps" in said
    assert "3.0 million parameters" in said
    assert "Memory, MB" in said
    assert "packs" in screen(capsys, "data.packing=true", f"data.cache_dir={tmp_path}")


def test_what_becomes_of_paged_states_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(build("model=llama-7b", device="h200"))
    assert "These states lie on the GPU; if it fills up, the driver moves some to the host's memory." in (
        capsys.readouterr().out
    )
    print_plan(build("model=llama-65b", device="a6000"))
    assert "The GPU has no room for all of these states: some lie in the host's memory, which costs time." in (
        capsys.readouterr().out
    )


def test_counting_imports_no_torch(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", 50, 9)
    code = "import sys; from qlora.cli import main\nmain()\nassert 'torch' not in sys.modules"
    overrides = ["task=plan", "plan.device=h200", "data=local", rows, f"data.cache_dir={tmp_path}",
             f"hydra.run.dir={tmp_path / 'look'}"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *overrides], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokens           " in done.stdout


def test_rows_of_one_s_own_on_the_embedded_model_are_told_of_small_real_models(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", 50, 9)
    said = embedded_warning(compose(["data=local", rows]))
    assert said is not None
    assert said.startswith("model=tiny is the embedded demo model: it knows only the words of the demo's world")
    names = re.findall(r"model=([\w.-]+)", said)[1:]
    assert names
    assert {*names} <= {*model_presets()}
    for chosen in ([], ["data=local", rows, "model=llama-7b"], ["data=local", rows, "model.weights=random"]):
        assert embedded_warning(compose(chosen)) is None
    print_plan(build("data=local", rows))
    assert said in caplog.text


def test_a_training_run_on_a_known_gpu_says_the_time_of_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(["data=local", rows_of(tmp_path / "rows.jsonl", 100, 9), f"data.cache_dir={tmp_path}"])
    tokens, _ = count_tokens(config)
    assert tokens is not None
    monkeypatch.setattr(gpus.subprocess, "run", lambda *args, **kwargs: Said("NVIDIA H200, 143771\n"))
    monkeypatch.setattr(gpus.shutil, "which", lambda name: name)
    plan = build_plan(config, tokens=tokens)
    assert plan.hours is not None
    time = format_duration(3600 * plan.hours)
    assert planned_time(config, tokens) == f"about {time}, as task=plan estimates it"
    monkeypatch.setattr(gpus.subprocess, "run", lambda *args, **kwargs: Said("NVIDIA Unheard Of, 1000\n"))
    assert planned_time(config, tokens) is None


def test_an_estimate_of_what_layers_keep_is_said_to_be_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for option, is_estimate in (("qwen3.5-4b", True), ("llama-3.2-1b", False)):
        print_plan(build(f"model={option}", f"data.cache_dir={tmp_path}"))
        said = " ".join(capsys.readouterr().out.split())
        text = "what layers of qwen3_5_text keep, from their modules; parameters and bytes of weights are exact"
        assert (text in said) is is_estimate


def test_a_reference_takes_a_pass_more_of_time_in_each_step_or_once_for_all_epochs() -> None:
    model = [
        "task=plan",
        "plan.device=h200",
        "model=qwen2.5-0.5b",
        "data=demo-preferences",
        "trainer.per_device_train_batch_size=4",
    ]

    def passes(*overrides: str) -> float:
        config = compose([*model, *overrides])
        return read_setup(config, find_shape(config)).reference_passes

    epochs = ["trainer.num_train_epochs=4", "trainer.max_steps=null"]
    assert passes("loss=sft") == passes("loss=orpo") == passes("loss=dpo", "loss.reference=none") == 0
    assert passes("loss=kto", *epochs) == passes("loss=dpo", *epochs, "loss.cache_reference=false") == 1
    assert passes("loss=dpo", *epochs) == 1 / 4
    config = compose([*model, "loss=dpo"])
    shape = find_shape(config)
    setup = read_setup(config, shape)
    once, never = (operations_per_token(shape, replace(setup, reference_passes=count)) for count in (1, 0))
    assert 1.2 < once / never < 1.5


def test_a_prompt_that_both_answers_share_takes_room_and_time_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": "long question " * 12, "chosen": "red " * (i % 5 + 1), "rejected": "blue"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows = ["data=local", f"data.path={tmp_path / 'pairs.jsonl'}", f"data.cache_dir={tmp_path}", "loss=dpo"]
    model = ["model=qwen2.5-0.5b", "model.tokenizer=tiny"]
    counts = {}
    for fused in ("auto", "false"):
        for packing in ("false", "true"):
            more = [f"trainer.fused_attention={fused}", f"data.packing={packing}"]
            config = compose(["task=plan", "plan.device=h200", *model, *rows, *more])
            counts[fused, packing] = (tokens, _) = count_tokens(config)
            assert tokens is not None
    (shared, _), (packed, _), (twice, _), (packed_twice, _) = counts.values()
    assert shared is not None
    assert twice is not None
    assert packed is not None
    assert packed_twice is not None
    assert shared.tokens == twice.tokens
    assert twice.attended == 1 < shared.attended
    assert shared.padded < twice.padded
    assert packed.units <= packed_twice.units
    plans = [build_plan(config, tokens=tokens) for tokens in (shared, twice)]
    times = [plan.hours for plan in plans]
    assert times[0] is not None
    assert times[1] is not None
    assert times[0] <= times[1]
    assert plans[0].memory.peak >= plans[1].memory.peak, "of rows as long, attention keeps more"
    said = screen(capsys, *model, *rows)
    assert f"prompts          once for both answers of a pair: {1 - 1 / shared.attended:.0%} of the tokens" in said
    assert "once for both answers" not in screen(capsys, *model, *rows, "trainer.fused_attention=false")


@pytest.mark.parametrize(("length", "budget"), [(32_768, 16), (131_072, 80)])
def test_a_long_row_of_an_8b_model_fits(length: int, budget: int, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["model=llama-3.1-8b", "model.weights=random", "lora.r=64", "lora.dropout=0", f"plan.length={length}",
              "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=1",
              f"trainer.memory_budget={budget}GB"]  # fmt: skip
    plan = build(*chosen, device="h200")
    assert plan.fits
    assert plan.setup.checkpointed == 32
    assert plan.memory.peak + plan.memory.paged <= budget * 1e9
    kept = length * (2 * 4096 + 4096 * 2 + 4 * 32)  # of a layer: its input, the output of attention and the sums
    assert plan.memory.offloaded == plan.setup.offloaded * kept
    print_plan(plan)
    said = " ".join(capsys.readouterr().out.split())
    assert "inputs and outputs of attention, in its pinned memory" in said


def test_a_row_that_processes_share_needs_less_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["model=llama-3.1-8b", "model.weights=random", "lora.r=64", "plan.length=131072",
              "trainer.per_device_train_batch_size=1", "trainer.gradient_checkpointing=true"]  # fmt: skip
    alone, four = build(*chosen, device="h200"), build(*chosen, "trainer.context_parallel=4", device="h200")
    assert (alone.setup.tokens, four.setup.tokens) == (131_072, 32_768)
    fixed = sum(alone.memory.parts[name] for name in ("weights", "embeddings and norms", "adapters"))
    gathered = 4 * 2 * 1024 * 2 * 32_768  # keys and values of all, and their gradients thrice
    assert four.memory.peak - fixed > (alone.memory.peak - fixed) / 4
    assert four.memory.peak - fixed < (alone.memory.peak - fixed) / 4 + 4 * gathered + 3e9
    assert four.hours < alone.hours / 3
    print_plan(four)
    assert "each shared by 4 GPUs like this" in " ".join(capsys.readouterr().out.split())
