"""What `task=preview` shows is what would be trained."""

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora.config.compose import compose
from qlora.models.model_files import EMBEDDED
from qlora.planning.training_plan import build_plan
from qlora.run import Run
from qlora.session import Session
from qlora.tasks.build_preview import build_preview, token_texts
from qlora.tasks.plan import count_tokens


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED["tiny"])


@pytest.fixture
def preview_run(tmp_path: Path) -> Callable[..., Run]:
    def build(*overrides: str) -> Run:
        return Run(compose(["task=preview", *overrides]), tmp_path / "run")

    return build


def chats(path: Path) -> str:
    turns = ["Hello there", "Good day", "What is the job of Toki Holt?", "baker"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(12)))
    return f"data.path={path}"


def test_both_sides_of_a_pair_are_shown_with_what_the_loss_counts(
    preview_run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {number}? ", "chosen": "yes", "rejected": "no"} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "rejected": "yes"}]))
    preview_run("loss=dpo", "data=local", f"data.path={path}", "data.eval_dataset_size=1", "task.rows=1").execute()
    printed = capsys.readouterr().out
    chosen, rejected = printed.index("   chosen\n"), printed.index("   rejected\n")
    assert "⟦ yes</s>⟧" in printed[chosen:rejected]
    assert "⟦ no</s>⟧" in printed[rejected:]
    assert "data.packing=true would fill 1 pack" in printed
    assert "1 pair of equal sides" in printed


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


HH = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: two?\n\nAssistant:"
SCORED = [{"response": "worst", "score": 1}, {"response": "yes", "score": 9}, {"response": "no", "score": 0}]
AGAINST = "chosen against rejected"
SHAREGPT = {"chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}
ANSWERS = {"chosen": "yes", "rejected": "no"}
LAYOUTS = {
    "texts": ({"prompt": "two? ", **ANSWERS}, "chosen (columns prompt, chosen, rejected (chosen against"),
    "whole texts": ({side: f"{HH} {text}" for side, text in ANSWERS.items()}, AGAINST),
    "messages": ({side: [said("user", "two?"), said("assistant", text)] for side, text in ANSWERS.items()}, AGAINST),
    "messages behind a prompt": (
        {"prompt": [said("user", "two?")], **{side: [said("assistant", text)] for side, text in ANSWERS.items()}},
        AGAINST,
    ),
    "ShareGPT turns": ({"conversations": [{"from": "human", "value": "two?"}], **SHAREGPT}, AGAINST),
    "Alpaca": ({"instruction": "two?", "input": "", **ANSWERS}, AGAINST),
    "scored": ({"instruction": "two?", "completions": SCORED}, "the best answer of a row and the worst by their sco"),
    "scores beside": ({"prompt": "two? ", **ANSWERS, "score_chosen": 8.0, "score_rejected": 2.0}, AGAINST),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_pairs_is_named_and_shown_with_both_sides(
    layout: str, preview_run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, note = LAYOUTS[layout]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row | {"id": number}) + "\n" for number in range(6)))
    preview_run("loss=dpo", "data=local", f"data.path={path}", "data.eval_dataset_size=1", "task.rows=1").execute()
    printed = capsys.readouterr().out
    assert note in " ".join(printed.split()).replace(", id", "")
    chosen, rejected = printed.index("   chosen\n"), printed.index("   rejected\n")
    for side, answer in ((printed[chosen:rejected], "yes"), (printed[rejected:], "no")):
        trained = side[side.index("⟦") : side.index("⟧")]
        assert answer in trained
        assert "two?" in side[: side.index("⟦")]


def test_labels_and_ties_are_named_in_a_preview(
    preview_run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{number}? ", "completion": "yes", "label": label} for number, label in enumerate("👍👎👍👎")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["data=local", f"data.path={path}", "data.eval_dataset_size=0", "task.rows=2", "task.evaluate=false"]
    preview_run("loss=kto", *overrides, "trainer.eval_steps=null", "trainer.per_device_train_batch_size=2").execute()
    printed = capsys.readouterr().out
    assert "label says which answers are good" in " ".join(printed.split())
    assert printed.index("labelled good") < printed.index("labelled bad")
    tied = [{"response": answer, "score": 1} for answer in "ab"]
    path.write_text("".join(json.dumps({"prompt": "p", "completions": item}) + "\n" for item in (SCORED, tied)))
    preview_run("loss=dpo", *overrides, "trainer.eval_steps=null").execute()
    assert "1 pair whose scores do not put the chosen side first" in " ".join(capsys.readouterr().out.split())


def test_a_preview_writes_a_page_a_picture_and_a_result(
    preview_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = preview_run()
    result = run.execute()
    assert result == json.loads((run.session.folder.path / "preview.json").read_text())
    assert result["metrics"]["train_rows"] == 2464
    printed = capsys.readouterr().out
    page = Path(result["paths"]["page"]).read_text(encoding="utf-8")
    asked = "the prompt of alpaca, saved for chat and serving"
    for text in (asked, "2,464 to train, 300 held out", "trained in all of the rows", "154 an epoch"):
        assert text in printed
        assert text in page
    HTMLParser().feed(page)
    assert Image.open(result["paths"]["lengths"]).size > (400, 200)
    assert "⟦" in printed
    assert "\x1b[" not in printed


def test_a_preview_loads_no_weights(preview_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Run) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(Session, "load_base", refuse)
    preview_run("model=llama-7b", "model.tokenizer=tiny", "data=demo").execute()


def test_what_is_marked_is_what_the_loss_counts(preview_run: Callable[..., Run], tmp_path: Path) -> None:
    run = preview_run("data=local", chats(tmp_path / "chats.jsonl"), "data.eval_dataset_size=2", "task.rows=2")
    preview = build_preview(run.config, run.session.data, run.session.tokenizer)
    assert len(preview.rows) == 2
    for row in preview.rows:
        trained = "".join(token.text if token.trained else "|" for token in row.tokens)
        spans = [span.replace("</s>", "").strip() for span in trained.split("|") if span]
        assert spans == ["Good day", "baker"]
        assert trained.count("</s>") == 2
        assert [token.id for token in row.tokens] == run.session.data.train[row.number]["input_ids"]
    assert ("template", "guanaco") in preview.summary


def test_what_a_person_must_know_is_said(preview_run: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input": "q", "output": "red " * 9}) + "\n" for _ in range(10)))
    choices = [f"data.path={path}", "data.eval_dataset_size=2", "data.target_max_len=5", "data.train_on=all"]
    run = preview_run("data=local", *choices)
    said = "\n".join(build_preview(run.config, run.session.data, run.session.tokenizer).warnings)
    assert "2 of 2 held-out rows are also trained on, word for word" in said
    assert "all of the rows do not train an end token, so they do not teach to stop" in said
    assert "all of the answers are cut; raise data.target_max_len or data.max_length" in said
    assert "data.train_on=all: the prompts carry loss too" in said


def test_what_rows_lose_is_shown_of_held_out_rows_too(preview_run: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"id": i, "input": f"q{i} " * (1 + 40 * (i % 4 == 0)), "output": "red" * (i % 4 != 1)} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = preview_run("data=local", f"data.path={path}", "data.eval_dataset_size=8", "data.max_length=30",
                      "data.on_too_long=drop")  # fmt: skip
    preview = build_preview(run.config, run.session.data, run.session.tokenizer)
    report, summary = run.session.data.report, dict(preview.summary)
    assert report.train_rows + report.lost_rows == 12
    assert report.eval_rows + report.eval_lost_rows == 8
    assert summary["rows"] == (
        f"{report.train_rows} to train, {report.eval_rows} held out (8, but {report.eval_lost_rows} are dropped)"
    )
    assert f"{report.too_long_rows} rows too long, {report.empty_rows} rows with empty answers" in summary["dropped"]
    assert summary["not read"] == "id"
    assert "5 answers are empty and are not trained (data.on_empty=drop)" in preview.warnings


TEXTS = ("Sort: swan oak = oak swan", "naïve café ☕ 日本語 \n\n tabs\t and   blanks", "</s> ###", "")


@pytest.mark.parametrize("text", TEXTS)
def test_the_texts_of_the_tokens_join_to_the_decoded_row(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(text * 5)["input_ids"]
    joined = "".join(token_texts(ids, tokenizer))
    assert joined.replace(" ", "") == tokenizer.decode(ids).replace(" ", "")


def test_packs_are_what_steps_count(preview_run: Callable[..., Run]) -> None:
    run = preview_run("data.packing=true")
    summary = dict(build_preview(run.config, run.session.data, run.session.tokenizer).summary)
    packs = len(run.session.data.packed)
    assert summary["packing"].startswith(f"{packs} packs, 9")
    assert summary["steps"] == f"{-(-packs // 16)} an epoch, of 16 x 1 packs"


def test_preview_plan_and_training_have_one_limit_and_one_count_of_tokens(
    preview_run: Callable[..., Run], tmp_path: Path
) -> None:
    rows = chats(tmp_path / "chats.jsonl")
    chosen = ["data=local", rows, f"data.cache_dir={tmp_path}"]
    run = preview_run(*chosen)
    summary = dict(
        build_preview(run.config, run.session.data, run.session.tokenizer, context=run.session.context).summary
    )
    config = compose(["task=plan", "plan.device=a6000", *chosen])
    tokens, why_not = count_tokens(config)
    assert tokens is not None
    assert not why_not
    plan, training = build_plan(config, tokens=tokens), Run(compose(chosen), tmp_path / "train").session
    limit = "512 tokens a row (what tiny reads; data.max_length)"
    assert summary["limit"] == training.row_limit == limit
    assert plan.setup.length == 512
    assert tokens.tokens == run.session.data.report.train_tokens == training.data.report.train_tokens
    assert str(plan.length) == str(training.length) == summary["training"]


def test_rows_longer_than_the_model_reads_are_warned_of_with_what_to_type(
    preview_run: Callable[..., Run], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input": f"q{i}", "output": "red " * 600}) + "\n" for i in range(8)))
    run = preview_run("data=local", f"data.path={path}", "data.max_length=1024", "data.eval_dataset_size=0")
    preview = build_preview(run.config, run.session.data, run.session.tokenizer, context=run.session.context)
    [text] = [text for text in preview.warnings if "tiny reads" in text]
    assert text.endswith("tiny reads 512: it knows no positions behind those; data.max_length=512 cuts rows there")


def test_characters_that_the_tokenizer_loses_are_warned_of_once_with_count_and_examples(
    preview_run: Callable[..., Run], tmp_path: Path
) -> None:
    """The vocabulary of the tokenizer has no # and no accented letter: their tokens vanish when it reads them back."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(EMBEDDED["tiny"], folder)
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    gone = {token for token in state["model"]["vocab"] if "#" in token or "\u00c3" in token}
    state["model"]["vocab"] = {token: id for token, id in state["model"]["vocab"].items() if token not in gone}
    state["model"]["merges"] = [merge for merge in state["model"]["merges"] if not gone & {*merge, "".join(merge)}]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    texts = ("a plain row", "the caf\u00e9 is here", "### Help me")
    rows = [{"prompt": f"{texts[index % 3]} {index}", "completion": "yes"} for index in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = preview_run("data=local", f"data.path={path}", f"model.tokenizer={folder}")
    preview = build_preview(run.config, run.session.data, run.session.tokenizer)
    [text] = [text for text in preview.warnings if "tokenizer loses" in text]
    assert "loses 2 kinds of characters in 20 of 30 rows that were looked at: it reads 'caf\u00e9' as 'caf" in text
    assert "'###' as ''" in text
    assert """or give them embeddings of their own with 'model.new_tokens=["#", "\u00e9"]'""" in text


def test_the_embedded_tokenizer_keeps_every_character(preview_run: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ("naïve café ☕ 日本語", "### Help\n\n\tyes", "“x” … ½ ﬁ", "Don't  stop  </s>")
    path.write_text("".join(json.dumps({"prompt": text, "completion": "yes"}) + "\n" for text in texts * 5))
    run = preview_run("data=local", f"data.path={path}")
    assert run.session.data.lost is None
    run = preview_run("data=local", chats(tmp_path / "chats.jsonl"))
    assert run.session.data.lost is None


def test_a_warning_stands_once_on_the_screen_and_on_the_page(
    preview_run: Callable[..., Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input": "q", "output": "red"}) + "\n" for _ in range(10)))
    run = preview_run("data=local", f"data.path={path}", "data.eval_dataset_size=2")
    run.execute()
    said = "2 of 2 held-out rows are also trained on"
    assert said in caplog.text
    assert said not in " ".join(capsys.readouterr().out.split())
    assert said in (tmp_path / "run" / "preview.html").read_text()
