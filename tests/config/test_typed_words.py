"""What people type: it is read as what it stands for and said so, or answered with the words that work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qlora import cli
from qlora.config.arguments import read_arguments
from qlora.config.combinations import Combinations
from qlora.config.command_words import SUBJECTS, read_words
from qlora.config.compose import compose, read_typed
from qlora.config.fields import known_keys
from qlora.config.foreign_names import FOREIGN_NAMES, FOREIGN_OPTIONS, FOREIGN_VALUES
from qlora.config.options import group_names, model_presets, option_names
from qlora.config.registries.chat_templates import TEMPLATE_NAMES
from qlora.config.registries.data_formats import FORMAT_NAMES
from qlora.errors import UserError
from qlora.tasks import start


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[start.Command]:
    """The commands that would have started, none of which does; they are typed in an empty folder."""
    started: list[start.Command] = []
    monkeypatch.setattr(start, "start", started.append)
    monkeypatch.chdir(tmp_path)
    return started


def refusal(command: str) -> str:
    with pytest.raises(UserError) as caught:
        cli.run(shlex.split(command))
    return str(caught.value)


# --- accepted -------------------------------------------------------------------------------------------------------

ACCEPTED = {
    "model=meta-llama/Llama-3.1-8B": "model=llama-3.1-8b",
    "model=META-LLAMA/llama-3.1-8b": "model=llama-3.1-8b",
    "model=https://huggingface.co/meta-llama/Llama-3.1-8B": "model=llama-3.1-8b",
    "model=someone/other-model": "model.name=someone/other-model",
    "model=../my-model": "model.name=../my-model",
    "model=/models/mine": "model.name=/models/mine",
    "data=my.jsonl": "data=local data.path=my.jsonl",
    "data=~/my.jsonl": 'data=local data.path="~/my.jsonl"',
    "data=tatsu-lab/alpaca": "data=local data.path=tatsu-lab/alpaca",
    "data=rows/*.parquet": 'data=local data.path="rows/*.parquet"',
    "data.path=my.jsonl": "data=local data.path=my.jsonl",
    "train": "task=train",
    "chat RUN": "task=chat adapter=RUN",
    "chat 'my run'": 'task=chat adapter="my run"',
    "task=chat RUN": "adapter=RUN",
    "predict": "task=predict",
    "evaluate none": "task=evaluate adapter=none",
    "merge RUN": "task=merge adapter=RUN",
    "export RUN": "task=export adapter=RUN",
    "verify RUN": "task=verify adapter=RUN",
    "push RUN me/mine": "task=push adapter=RUN repo=me/mine",
    "replay RUN": "task=replay run=RUN",
    "migrate finetune.sh": "task=migrate from=finetune.sh",
    "report outputs/runs/mine": "task=report runs=outputs/runs/mine",
    "plan llama-7b": "task=plan model=llama-7b",
    "plan meta-llama/Llama-3.1-8B": "task=plan model=llama-3.1-8b",
    "preview my.jsonl": "task=preview data=local data.path=my.jsonl",
    "doctor": "task=doctor",
    "tracking=[wandb,tensorboard]": "tracking=wandb tracking.also=[tensorboard]",
    "train model=someone/x data=my.jsonl": "task=train; model.name=someone/x; data=local data.path=my.jsonl",
}


@pytest.mark.matrix(6)
@pytest.mark.parametrize("command", ACCEPTED)
def test_what_is_typed_is_read_as_what_it_stands_for_and_said(
    command: str, nothing_starts: list[start.Command], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run(shlex.split(command))
    assert capsys.readouterr().out == f"read as {ACCEPTED[command]}\n"
    spelled = [word for part in ACCEPTED[command].split("; ") for word in re.findall(r'[^ "]+(?:"[^"]*")?', part)]
    given = [text for text in shlex.split(command) if text.startswith("task=")]
    assert nothing_starts[0].arguments.overrides == [*given, *spelled]


@pytest.mark.parametrize("command", ["trainer.max_steps=1e3", "tracking.mode=disabled", "model=llama-7b"])
def test_what_needs_no_reading_is_taken_without_a_word(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run([command])
    assert capsys.readouterr().out == ""


def test_several_words_behind_report_are_a_list() -> None:
    assert read_words(["report", "a", "b c", "name=x"]).overrides == ["task=report", 'runs=[a,"b c"]', "name=x"]


def test_a_folder_with_a_sign_of_equality_in_its_name_is_a_word(tmp_path: Path) -> None:
    folder = "outputs/sweeps/rank/lora.r=8-0123abcd"
    (tmp_path / folder).mkdir(parents=True)
    assert read_words(["chat", folder, "lora.r=8"]).overrides == ["task=chat", f'adapter="{folder}"', "lora.r=8"]


def test_a_second_reading_changes_nothing() -> None:
    typed = ["model=someone/x,c/d", "data=a.jsonl", "lora.r=8"]
    once = read_typed(typed)
    assert read_typed(once.overrides).overrides == once.overrides
    assert read_typed(once.overrides).read_as == {}


def test_the_name_of_an_option_s_file_is_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "conf" / "data" / "team").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "team" / "rows.yaml").write_text("name: rows\npath: rows.jsonl\n")
    with pytest.raises(UserError, match=r"^data=team/rows: data has no such option"):
        compose(["data=team/rows"], tmp_path / "conf")
    assert compose(["data=team/rows"]).data.path == "team/rows"


def test_a_folder_here_is_a_model_where_no_preset_has_its_name(tmp_path: Path) -> None:
    for name in ("my-model", "llama-7b"):
        (tmp_path / name).mkdir()
    assert compose(["model=my-model"]).model.name == "my-model"
    assert compose(["model=llama-7b"]).model.name == "huggyllama/llama-7b"


def test_every_preset_is_found_by_its_hub_id() -> None:
    for option, preset in model_presets().items():
        name = str(preset["name"])
        assert read_typed([f"model={name}"]).overrides == [f"model={option}"]


def test_a_model_beside_an_experiment_has_nothing_of_the_experiment_s_model() -> None:
    config = compose(["experiment=guanaco-7b", "model=someone/x"])
    assert config.model.name == "someone/x"
    assert config.model.architecture == compose(["model.name=someone/x"]).model.architecture


def test_own_rows_beside_a_file_that_might_choose_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    with pytest.raises(UserError, match=r"^data.path=my.jsonl: no file chooses a data set.*; add data=local$"):
        compose(["experiment=mine", "data.path=my.jsonl"], tmp_path / "conf")
    assert compose(["experiment=guanaco-7b", "data.path=my.jsonl"]).data.format == "text"


# --- sweeps, flags, options that are given twice --------------------------------------------------------------------


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("model=a/b,c/d", ["model.name=a/b,c/d"]),
        ("model=tiny,meta-llama/Llama-3.1-8B", ["model=tiny,llama-3.1-8b"]),
        ("data=a.jsonl,b.jsonl", ["data=local", "data.path=a.jsonl,b.jsonl"]),
        ("data.path=a.jsonl,b.jsonl", ["data=local", "data.path=a.jsonl,b.jsonl"]),
        ("model=choice(a/b,./c)", ["model.name=a/b,./c"]),
    ],
)
def test_a_sweep_over_typed_forms_varies_the_key_that_they_stand_for(typed: str, read: list[str]) -> None:
    assert read_typed([typed]).overrides == read
    grid = Combinations(read)
    assert len(grid) == 2
    names = {(grid.config(index).model.name, grid.config(index).data.path) for index in grid}
    assert len(names) == 2


def test_presets_and_other_models_are_swept_apart() -> None:
    text = refusal("-m model=tiny,a/b")
    assert text.startswith(
        "model=tiny is an option of model, and a/b is none: one sweep takes one kind; start one with"
    )
    assert text.endswith("-m model=tiny, one with model=a/b")


def test_the_last_of_two_options_of_a_group_counts_and_the_other_is_named(
    nothing_starts: list[start.Command], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run(["model=tiny", "model=llama-7b", "lora.r=8", "lora.r=16"])
    assert nothing_starts[0].config.model.name == "huggyllama/llama-7b"
    assert capsys.readouterr().out.splitlines() == [
        "model=llama-7b counts, model=tiny before it does not",
        "lora.r=16 counts, lora.r=8 before it does not",
    ]
    cli.run(["model=llama-7b", "model=someone/x"])
    assert nothing_starts[1].arguments.overrides == ["model.name=someone/x"]


@pytest.mark.parametrize(
    "command",
    ["chat RUN --cfg job -p adapter", "--cfg job chat RUN -p adapter", "--cfg job -p adapter model=tiny chat RUN"],
)
def test_words_stand_beside_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(command.split())
    assert capsys.readouterr().out == "RUN\n"


def test_words_stand_beside_a_sweep_and_a_folder_of_options(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    arguments = read_arguments(["plan", "-m", "--config-dir", "conf", "lora.r=8,16"])
    assert (arguments.overrides, arguments.multirun, arguments.config_dir) == (
        ["task=plan", "lora.r=8,16"], True, "conf"
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("command", ["-m lora.r=8,16 --info config", "sweep=lora-rank --info config"])
def test_info_of_a_sweep_is_that_of_its_first_job(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(command.split())
    assert "lora:" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["help", "help lora", "chat --help", "merge --help", "help report"])
def test_help_is_a_word_too(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(command.split())
    page = capsys.readouterr().out
    name = command.replace("help", "").replace("--", "").strip()
    assert page.startswith(f"{name}: " if name else "qlora fine-tunes")
    assert max(map(len, page.splitlines())) <= 100


@pytest.mark.parametrize("task", option_names("task"))
def test_a_task_s_page_says_what_its_words_are(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run([task, "--help"])
    page = capsys.readouterr().out
    assert all(f"{key}={key.upper()}" in page for key in SUBJECTS.get(task, ()))
    assert f"task={task}" in page


# --- refused, with the words that work ------------------------------------------------------------------------------

REFUSED = {
    # how values are written
    "lora.r=[8,16]": "-m lora.r=8,16",
    "-m lora.r=[8,16]": "-m lora.r=8,16",
    "-m lora.r=8, 16": "write -m lora.r=8,16",
    "-m lora.r=8 ,16 seed=1": "write -m lora.r=8,16",
    "-m lora.r=8 16": "-m lora.r=8,16",
    "-m 'lora.r={8,16}'": "write -m lora.r=8,16",
    "lora.r=8,16": "add -m",
    "lora.r=8,": "write lora.r=8",
    "lora.r = 8": "write lora.r=8",
    "lora.r= 8": "write lora.r=8",
    "lora.r =8": "write lora.r=8",
    "lora.r==8": "write lora.r=8",
    "lora.r:8": "write lora.r=8",
    "lora.r 8": "write lora.r=8",
    "lora.target_modules=[q_proj, v_proj]": "write 'lora.target_modules=[q_proj,v_proj]'",
    "lora.target_modules=[all-linear,lm_head]": "write lora.target_modules=all-linear",
    "device=[cpu,cuda]": "-m device=cpu,cuda",
    "lora.r=8;lora.alpha=16": "write lora.r=8 lora.alpha=16",
    "'lora.r=8 lora.alpha=16'": "write lora.r=8 lora.alpha=16",
    "lora.r=8,lora.alpha=16": "write lora.r=8 lora.alpha=16",
    "-m 'lora.r=8;16'": "write -m lora.r=8,16",
    "-m seed=1-3": "write -m seed=1,3",
    "-m lora.r=8..64": "write -m lora.r=8,64",
    "lora:r=8": "write lora.r=8",
    "lora/r=8": "write lora.r=8",
    "LORA.R=8": "write lora.r=8",
    "lora.dropout=5%": "write lora.dropout=0.05",
    "data.eval_dataset_size=10%": "write data.eval_dataset_size=0.1",
    "trainer.max_steps=1k": "write trainer.max_steps=1000",
    "data.max_length=2k": "write data.max_length=2048",
    "data.max_length=2048tokens": "write data.max_length=2048",
    "trainer.learning_rate=2*1e-4": "write trainer.learning_rate=0.0002",
    "trainer.learning_rate=1/1000": "write trainer.learning_rate=0.001",
    "trainer.max_steps=1,000": "write trainer.max_steps=1000",
    "trainer.learning_rate=0,0002": "write trainer.learning_rate=0.0002",
    "lora.target_modules=(q_proj,v_proj)": "write lora.target_modules=[q_proj,v_proj]",
    "'lora.target_modules=[q_proj,v_proj'": "write lora.target_modules=[q_proj,v_proj]",
    "evaluation.metrics=rouge": "write evaluation.metrics=[rouge]",
    "merge.dtype=bfloat16": "write merge.dtype=bf16",
    "data.path=": "has no value (is a variable of the shell not set?)",
    "model=": "has no value",
    "hydra.run.dir=": "has no value",
    # names of other tools
    "gpu=0": "put CUDA_VISIBLE_DEVICES=0 before the command",
    "--num_gpus=2": "start it with torchrun",
    "deepspeed=ds.json": "trainer.parallel=fsdp",
    "--dry-run": "add --cfg job",
    "--verbose": "add hydra.verbose=true",
    "--resume": "did you mean resume?",
    "eval=mmlu": "write evaluation=mmlu",
    "resume=outputs/runs/mine": "write hydra.run.dir=outputs/runs/mine",
    "resume_from_checkpoint=outputs/runs/mine": "write hydra.run.dir=outputs/runs/mine",
    "objective=loss": "did you mean eval_loss",
    "trainer.keep_metric=loss": "did you mean eval_loss?",
    "plan plan.device=4090": "did you mean rtx-4090?",
    "batch_size=8": "write trainer.per_device_train_batch_size=8",
    "epochs=3": "write trainer.num_train_epochs=3",
    "lr=1e-4": "write trainer.learning_rate=1e-4",
    "learning_rate=1e-4": "write trainer.learning_rate=1e-4",
    "--learning_rate 1e-4": "here trainer.learning_rate=1e-4",
    "--lora.r=8": "here lora.r=8",
    "load_in_4bit=true": "write quantization=nf4",
    "load_in_8bit=true": "write quantization=int8",
    "max_seq_length=512": "write data.max_length=512",
    "push_to_hub=true": "write task=push",
    "quantization=4bit": "write quantization=nf4",
    "quantization=int4": "write quantization=nf4",
    "quantization=8bit": "write quantization=int8",
    "quantization=bf16": "write quantization=none",
    "quantization.bits=3": "quantization.bits must be 4, 8, 16 or 32, got 3",
    "tracking=disabled": "write tracking=none",
    "tracking.mode=off": "write tracking=none",
    "lora=full": "write lora=none",
    "evaluation=none": "write evaluation=loss",
    "device=gpu": "write device=cuda",
    "resume=true": "write resume=auto",
    "trainer.optim=adamw": "write trainer.optim=adamw_torch",
    "trainer.optim=adamw_torhc": "did you mean adamw_torch?",
    "trainer.lr_scheduler_type=cosin": "did you mean cosine?",
    "data.format=sharegpt": "write data.format=conversations",
    "data.format=chatml": "write data.format=messages",
    "data.format=openai": "write data.format=messages",
    "data.template=llama3": "write data.template=llama-3",
    "data=mix data.mix.a.path=a.jsonl data.mix.a.format=sharegpt": "write data.mix.a.format=conversations",
    # tasks and words
    "task=dashboard": "write task=board",
    "ui": "write qlora board",
    "tune": "-m lora.r=8,16",
    "qlora train": "leave it out",
    "evaluate outputs/runs/mine mmlu": "for mmlu write evaluation=mmlu",
    "predict RUN questions.jsonl": "for questions.jsonl write data.eval_path=questions.jsonl",
    "predict questions.jsonl": "write qlora predict RUN data.eval_path=questions.jsonl",
    "preview llama-7b": "write model=llama-7b",
    "board outputs": "as `qlora board`",
    "task=inference": "write task=predict or task=chat",
    "task=gguf": "write task=export",
    "task=vllm": "qlora serve RUN answers here; qlora merge RUN makes a folder for vLLM or SGLang",
    "task=server": "write task=serve",
    "task=finetune": "write task=train",
    "deploy": "qlora serve RUN answers here; qlora merge RUN makes a folder for vLLM or SGLang",
    "serve RUN OTHER": "serve does not take 'OTHER' as well: write `qlora serve ADAPTER`",
    "eval RUN": "write qlora evaluate",
    "finetune": "write qlora train",
    "run": "write qlora train",
    "tain": "did you mean train?); write qlora train",
    "predct RUN": "there is no task 'predct' (did you mean predict?); write qlora predict",
    "chat RUN OTHER": "chat does not take 'OTHER' as well: write `qlora chat ADAPTER`",
    "train rows.jsonl": "there is no file rows.jsonl here; give your rows as data=FILE",
    "rows.jsonl": "there is no file rows.jsonl here; give your rows as data=FILE",
    "train nowhere/rows.jsonl": "there is no file nowhere/rows.jsonl: no folder nowhere; give your rows as data=FILE",
    "nf4": "write quantization=nf4",
    "doctor now": "see `qlora doctor --help`",
    "from=axolotl.yaml": "add task=migrate",
    # options, files, flags
    "model=llama3": "did you mean llama-3.1-",
    "model=model.gguf": "give a folder or hub id with the original weights",
    "model=rows.jsonl": "write data=rows.jsonl",
    "data=sharegpt": "write data=local data.path=FILE data.format=conversations",
    "data=chats.pdf": "rows are read from JSON",
    "data=[a.jsonl,b.jsonl]": "data=mix data.mix.a.path=A",
    "model=llama-8b": "did you mean llama-7b?",
    "model=gpt2": "for the model of that name on the hub write model.name=gpt2",
    "plan gpt2": "write model.name=gpt2",
    "--explain": "--explain takes a value: write --explain KEY, e.g. --explain lora.r",
    "train --explain": "--explain takes a value: write --explain KEY",
    "--cfg": "--cfg takes a value: write --cfg job",
    "--cfg jbo": "choose from",
    "-cd": "--config-dir takes a value: write --config-dir FOLDER",
    "--package": "--package takes a value: write --package GROUP",
    "--config": "--config takes a value: write --config FILE",
    "data=alpca": "did you mean alpaca?",
    "data=ftp://host/rows.jsonl": "rows are not read by ftp://",
    "--config config.yaml": "my_conf/experiment/config.yaml, then --config-dir my_conf experiment=config",
    "--config=config.yaml": "--config-dir my_conf experiment=config",
    "train config.yaml": "--config-dir my_conf experiment=config",
    "-m": "-m lora.r=8,16, or leave -m out",
    "-m name=x": "-m lora.r=8,16, or leave -m out",
    "name='my run/1'": "use hydra.run.dir=FOLDER",
    "name=a/b": "use hydra.run.dir=FOLDER",
    "--help lroa": "did you mean lora?",
}


@pytest.mark.matrix(20)
@pytest.mark.parametrize("command", REFUSED)
def test_a_slip_is_answered_in_200_characters_with_the_words_that_work(
    command: str, nothing_starts: list[start.Command]
) -> None:
    text = refusal(command)
    assert REFUSED[command] in text
    assert len(text) < 193  # with `error: ` before it
    assert not nothing_starts


def test_a_file_that_does_not_exist_is_answered_with_the_nearest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "chats.jsonl").touch()
    for command in ("train my/chat.jsonl", "my/chat.jsonl"):
        assert refusal(command) == (
            "there is no file my/chat.jsonl here (did you mean my/chats.jsonl?); write data=my/chats.jsonl"
        )
    assert refusal("train my/chats.jsonl").endswith("; write data=my/chats.jsonl")


RUNS = re.compile(r"(?:write|here|after the other:) (.*?)(?:, or |; | \(|$)")
ANSWERED = ("lora.r=[8,16]", "-m lora.r=8, 16", "lora.r==8", "lora.target_modules=[q_proj, v_proj]", "--lora.r=8",
            "load_in_4bit=true", "quantization=int4", "tracking.mode=off", "resume=true", "trainer.optim=adamw",
            "data.format=sharegpt", "task=finetune", "finetune", "nf4")  # fmt: skip


@pytest.mark.matrix(7)
@pytest.mark.parametrize("command", ANSWERED)
def test_what_an_answer_says_to_write_is_accepted(command: str, nothing_starts: list[start.Command]) -> None:
    written = RUNS.findall(refusal(command))[-1].removeprefix("qlora ")
    cli.run(["data=local", "data.path=x.jsonl", *shlex.split(written)])
    assert nothing_starts


@pytest.mark.full
def test_what_stands_in_the_tables_of_other_names_is_ours() -> None:
    for group, options in FOREIGN_OPTIONS.items():
        for typed, written in options.items():
            assert typed not in option_names(group)
            for word in re.split(r" or | ", written):
                name, _, option = word.partition("=")
                assert name != group or option in option_names(group), word
    for key, values in FOREIGN_VALUES.items():
        assert {value.partition("=")[0] for value in values.values()} <= {key, key.partition(".")[0]}
        for value in {*values.values()} if key.startswith("trainer.") else ():
            compose(["model=llama-7b", value])
    for format_name in FOREIGN_VALUES["data.format"].values():
        assert format_name.partition("=")[2] in FORMAT_NAMES
    for template in FOREIGN_VALUES["data.template"].values():
        assert template.partition("=")[2] in TEMPLATE_NAMES
    known = {*known_keys(), *group_names(), "hydra.run.dir"}
    for ours in FOREIGN_NAMES.values():
        name, _, option = ours.partition("=")
        assert name in known, ours
        assert not option or name not in group_names() or option in option_names(name), ours


def test_a_file_here_is_near_to_its_name_without_an_ending(nothing_starts: list[start.Command], tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").touch()
    assert "did you mean chats.jsonl?" in refusal("data=chats")
