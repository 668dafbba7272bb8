"""Losses over answers of other tools: each setting becomes ours, or is listed with what is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.config.schema import Config
from qlora.errors import UserError
from qlora.migrate import read

TRL = "trl {} --model_name_or_path my/base --dataset_name my/pairs --use_peft --load_in_4bit {}"
AXOLOTL = (
    "base_model: my/base\nadapter: qlora\nload_in_4bit: true\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true\n"
    "max_steps: 100\nlearning_rate: 5e-6\nsave_strategy: steps\nsave_steps: 50\nmicro_batch_size: 2\nval_set_size: 5\n"
    "datasets:\n  - path: rows.jsonl\n    ds_type: json\n    type: {}\nrl: {}\n"
)
FACTORY = (
    "model_name_or_path: my/base\nstage: {}\ndataset: rows\ndataset_dir: sets\ntemplate: chatml\nval_size: 5\n"
    "learning_rate: 5e-6\n"
)
SWIFT = "swift rlhf --model my/base --use_hf true --dataset rows.jsonl --max_length 1024 --template chatml {}"


def migrated(folder: Path, name: str, text: str) -> tuple[Config, dict[str, str]]:
    """Returns the config that a file becomes, and what of it was lost and why."""
    (folder / name).write_text(text, encoding="utf-8")
    _, reading = read(folder / name)
    assert reading.config is not None
    return reading.config, {key: why for key, _, why in reading.lost}


def loss_of(config: Config) -> dict[str, Any]:
    """Returns the settings of a loss that are set."""
    names = ("beta", "label_smoothing", "length_normalize", "gamma", "sft_weight", "desirable_weight",
             "undesirable_weight", "center_rewards")  # fmt: skip
    values = {name: getattr(config.loss, name) for name in names}
    reference = {} if config.loss.reference is None else {"reference": config.loss.reference.value}
    return {"name": config.loss.name} | {name: value for name, value in values.items() if value is not None} | reference


DPO = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "length_normalize": False, "sft_weight": 0.0,
       "reference": "auto"}  # fmt: skip
IPO = {"name": "ipo", "beta": 0.1, "length_normalize": True, "sft_weight": 0.0, "reference": "auto"}
KTO = {"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "reference": "auto"}
SIMPO = {"name": "simpo", "beta": 0.1, "gamma": 0.5, "label_smoothing": 0.0, "sft_weight": 1.0}


@pytest.mark.parametrize(
    ("method", "args", "loss", "lost"),
    [
        ("dpo", "", DPO, {}),
        ("dpo", "--beta 0.05 --loss_type sigmoid sft --loss_weights 1.0 0.2", DPO | {"beta": 0.05, "sft_weight": 0.2},
         {}),
        ("dpo", "--loss_type sigmoid_norm", DPO | {"length_normalize": True}, {}),
        ("dpo", "--loss_type ipo --beta 0.3", IPO | {"beta": 0.3}, {}),
        ("dpo", "--rpo_alpha 0.5", DPO | {"sft_weight": 0.5}, {}),
        ("dpo", "--loss_type hinge", DPO, {"loss_type": "hinge is not here: loss=dpo is trained in its place"}),
        ("dpo", "--label_smoothing 0.1", DPO, {"label_smoothing": "it has no effect there with sigmoid; loss.label_"}),
        ("dpo", "--f_divergence_type js_divergence", DPO, {"f_divergence_type": "the divergence is the reverse KL"}),
        ("dpo", "--ld_alpha 0.5 --use_weighting --sync_ref_model", DPO, {"ld_alpha": "all tokens", "use_weighting":
         "all pairs", "sync_ref_model": "the reference stays"}),
        ("dpo", "--reference_free", DPO | {"reference": "none"}, {}),
        ("kto", "--desirable_weight 1.33", KTO | {"desirable_weight": 1.33},
         {"train_sampling_strategy": "the order of rows is drawn from seed"}),
        ("orpo", "--beta 0.2", {"name": "orpo", "beta": 0.2}, {}),
        ("cpo", "--loss_type simpo --simpo_gamma 0.8 --cpo_alpha 0 --beta 2", SIMPO | {"gamma": 0.8, "sft_weight": 0.0,
         "beta": 2.0}, {}),
        ("cpo", "", DPO | {"reference": "none", "sft_weight": 1.0}, {}),
        ("reward", "--center_rewards_coefficient 0.01", {"name": "reward", "center_rewards": 0.01}, {}),
    ],
)  # fmt: skip
def test_arguments_of_trl_become_the_loss(
    method: str, args: str, loss: dict[str, Any], lost: dict[str, str], tmp_path: Path
) -> None:
    config, said = migrated(tmp_path, "run.sh", TRL.format(method, args))
    assert loss_of(config) == loss
    assert said.keys() == lost.keys()
    assert all(said[key].startswith(why) for key, why in lost.items())
    assert (config.trainer.learning_rate, config.lora.dropout) == (1e-4 if method == "reward" else 1e-6, 0)
    assert (config.data.train_on.value, config.data.packing, config.data.max_length) == ("assistant", False, 1024)


def test_the_lengths_of_older_versions_and_a_yaml_of_trl_are_read(tmp_path: Path) -> None:
    text = (
        "model_name_or_path: my/base\ndataset_name: my/pairs\nuse_peft: true\nloss_type: [sigmoid, sft]\nloss_weights: "
        "[0.5, 1.0]\nmax_prompt_length: 512\nmax_completion_length: 256\nprecompute_ref_log_probs: true\n"
        "lora_dropout: 0.1\n"
    )
    config, lost = migrated(tmp_path, "dpo.yaml", text)
    assert loss_of(config) == DPO | {"sft_weight": 2.0}
    assert config.loss.cache_reference is True
    assert (config.data.source_max_len, config.data.target_max_len) == (512, 256)
    assert set(lost) == {"loss_weights", "lora_dropout"}


@pytest.mark.parametrize(
    ("form", "rl", "more", "loss", "lost"),
    [
        ("chatml.intel", "dpo", "rl_beta: 0.2\n", DPO | {"beta": 0.2}, set()),
        ("llama3.prompt_pairs", "dpo", "dpo_label_smoothing: 0.1\n", DPO | {"label_smoothing": 0.1}, set()),
        ("chat_template.default", "ipo", "", IPO, set()),
        ("chat_template.argilla", "orpo", "orpo_alpha: 0.3\n", {"name": "orpo", "beta": 0.3}, set()),
        ("chatml.ultra", "simpo", "rl_beta: 2.0\nsimpo_gamma: 1.0\ncpo_alpha: 0.0\n",
         SIMPO | {"beta": 2.0, "gamma": 1.0, "sft_weight": 0.0}, set()),
        ("chatml.argilla", "kto", "kto_desirable_weight: 0.2\nkto_undesirable_weight: 1.5\n",
         KTO | {"desirable_weight": 0.2, "undesirable_weight": 1.5}, set()),
        ("chatml.intel", "dpo", "dpo_use_weighting: true\ndpo_norm_loss: true\n", DPO,
         {"dpo_use_weighting", "dpo_norm_loss"}),
        ("zephyr.nectar", "dpo", "", DPO, {"datasets[0].type"}),
        ("chatml.intel", "dpo", "precompute_ref_log_probs: true\n", DPO, set()),
        ("chatml.argilla", "kto", "precompute_ref_log_probs: true\n", KTO, set()),
        ("chatml.intel", "dpo", "trl: {beta: 0.4}\n", DPO | {"beta": 0.4}, set()),
        ("chatml.intel", "dpo", "lora_dropout: 0.05\n", DPO, {"lora_dropout"}),
    ],
)  # fmt: skip
def test_rl_of_axolotl_becomes_the_loss(
    form: str, rl: str, more: str, loss: dict[str, Any], lost: set[str], tmp_path: Path
) -> None:
    config, said = migrated(tmp_path, "a.yaml", AXOLOTL.format(form, rl) + more)
    assert loss_of(config) == loss
    assert set(said) == lost
    assert config.lora.dropout == 0
    assert config.loss.cache_reference == (True if "precompute" in more and rl == "dpo" else "auto")


@pytest.mark.parametrize(
    ("form", "rl", "format_name", "template"),
    [
        ("chatml.intel", "dpo", "qlora.data.formats.as_chat:from_pair", "chatml"),
        ("llama3.icr", "orpo", "qlora.data.formats.as_chat:from_pair", "llama-3"),
        ("chatml.argilla_chat", "dpo", "chosen", "chatml"),
        ("chat_template.default", "dpo", "chosen", "auto"),
        ("passthrough.default", "dpo", "auto", "auto"),
        ("chatml.prompt_pairs", "kto", "qlora.data.formats.as_chat:from_any", "chatml"),
    ],
)
def test_forms_of_axolotl_s_pairs_are_read_in_their_frame(
    form: str, rl: str, format_name: str, template: str, tmp_path: Path
) -> None:
    config, lost = migrated(tmp_path, "a.yaml", AXOLOTL.format(form, rl))
    assert (config.data.format, config.data.template, lost) == (format_name, template, {})


def test_a_reward_model_of_axolotl_becomes_one(tmp_path: Path) -> None:
    text = AXOLOTL.format("chat_template.default", "null") + "reward_model: true\ncenter_rewards_coefficient: 0.01\n"
    config, lost = migrated(tmp_path, "a.yaml", text)
    assert (loss_of(config), lost) == ({"name": "reward", "center_rewards": 0.01}, {})


@pytest.mark.parametrize(
    ("stage", "more", "loss", "lost"),
    [
        ("dpo", "pref_beta: 0.2\npref_ftx: 0.1\n", DPO | {"beta": 0.2, "sft_weight": 0.1}, set()),
        ("dpo", "pref_loss: ipo\n", IPO, set()),
        ("dpo", "pref_loss: simpo\nsimpo_gamma: 0.8\npref_beta: 2.0\n",
         SIMPO | {"gamma": 0.8, "beta": 2.0, "sft_weight": 0.0}, set()),
        ("dpo", "pref_loss: orpo\n", {"name": "orpo", "beta": 0.1}, {"pref_loss"}),
        ("dpo", "pref_loss: hinge\n", DPO, {"pref_loss"}),
        ("dpo", "dpo_label_smoothing: 0.1\n", DPO | {"label_smoothing": 0.1}, set()),
        ("dpo", "ref_model: other/base\npref_bco_weight: 0.5\nld_alpha: 0.5\n", DPO,
         {"ref_model", "pref_bco_weight", "ld_alpha"}),
        ("dpo", "adapter_name_or_path: saves/sft\n", DPO | {"reference": "base"}, set()),
        ("kto", "kto_chosen_weight: 0.5\nkto_rejected_weight: 1.5\n",
         KTO | {"desirable_weight": 0.5, "undesirable_weight": 1.5}, set()),
        ("rm", "", {"name": "reward", "center_rewards": 0.0}, set()),
    ],
)  # fmt: skip
def test_stages_of_llama_factory_become_the_loss(
    stage: str, more: str, loss: dict[str, Any], lost: set[str], tmp_path: Path
) -> None:
    (tmp_path / "sets").mkdir()
    entry = {"file_name": "rows.json"} | ({"ranking": True} if stage in ("dpo", "rm") else {})
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    config, said = migrated(tmp_path, "f.yaml", FACTORY.format(stage) + more)
    assert loss_of(config) == loss
    assert set(said) == lost
    assert config.lora.start == ("saves/sft" if "saves/sft" in more else None)
    pair = "qlora.data.formats.as_chat:from_pair"
    assert config.data.format == (pair if stage != "kto" else "qlora.data.formats.as_chat:from_alpaca")


def test_ranked_sets_of_llama_factory_keep_their_columns_and_are_refused_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    sharegpt = {"file_name": "rows.json", "ranking": True, "formatting": "sharegpt",
                "columns": {"messages": "turns", "chosen": "good", "rejected": "bad"}}  # fmt: skip
    for entry, stage, format_name, columns, lost in (
        (sharegpt, "dpo", "chosen", {"conversations": "turns", "chosen": "good", "rejected": "bad"}, set()),
        (sharegpt, "sft", "chosen", {"conversations": "turns", "chosen": "good", "rejected": "bad"}, {"rows.ranking"}),
        ({"file_name": "rows.json", "ranking": True, "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}}, "rm",
         "qlora.data.formats.as_chat:from_pair", {"instruction": "q", "chosen": "a", "rejected": "b"}, set()),
        ({"file_name": "rows.json"}, "dpo", "qlora.data.formats.as_chat:from_alpaca", {}, {"rows.ranking"}),
        ({"file_name": "rows.json", "columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"}},
         "kto", "qlora.data.formats.as_chat:from_alpaca", {"kto_tag": "good"}, set()),
    ):  # fmt: skip
        (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps({"rows": entry}))
        config, said = migrated(tmp_path, "f.yaml", FACTORY.format(stage))
        assert (config.data.format, config.data.columns, set(said)) == (format_name, columns, lost)


@pytest.mark.parametrize(
    ("args", "loss", "lost"),
    [
        ("", DPO, set()),
        ("--rlhf_type dpo --beta 0.3 --rpo_alpha 0.1", DPO | {"beta": 0.3, "sft_weight": 0.1}, set()),
        ("--rlhf_type simpo", SIMPO | {"beta": 2.0, "gamma": 1.0}, set()),
        ("--rlhf_type cpo", DPO | {"reference": "none", "sft_weight": 1.0}, set()),
        ("--rlhf_type orpo --beta 0.2", {"name": "orpo", "beta": 0.2}, set()),
        ("--rlhf_type kto --per_device_train_batch_size 2", KTO, set()),
        ("--rlhf_type kto", KTO, {"per_device_train_batch_size"}),
        ("--rlhf_type rm --center_rewards_coefficient 0.01", {"name": "reward", "center_rewards": 0.01}, set()),
        ("--rlhf_type dpo --adapters saves/sft --ref_adapters saves/sft", DPO | {"reference": "start"}, set()),
        ("--rlhf_type dpo --adapters saves/sft", DPO | {"reference": "base"}, set()),
        ("--rlhf_type dpo --ref_model other/base", DPO, {"ref_model"}),
    ],
)
def test_rlhf_of_ms_swift_becomes_the_loss(args: str, loss: dict[str, Any], lost: set[str], tmp_path: Path) -> None:
    config, said = migrated(tmp_path, "run.sh", SWIFT.format(args))
    assert loss_of(config) == loss
    assert set(said) == lost
    assert config.lora.start == ("saves/sft" if "saves/sft" in args else None)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("f.yaml", FACTORY.format("ppo"), "stage=ppo trains by answers that the model generates, judged by rewards"),
        ("a.yaml", AXOLOTL.format("x", "gdpo"), "rl=gdpo trains by answers that the model generates"),
        ("r.sh", SWIFT.format("--rlhf_type grpo"), "rlhf_type=grpo trains by answers that the model generates"),
    ],
)
def test_training_by_generated_answers_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        migrated(tmp_path, name, text)
