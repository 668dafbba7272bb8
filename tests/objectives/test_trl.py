"""Losses, rewards and adapter gradients of preference losses equal TRL's, on real pairs with real small Llamas.

Five steps of plain gradient descent in float32 without dropout, each from the weights that TRL has come to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from qlora import adapters
from qlora.adapters.head import attach_head
from qlora.config.compose import compose
from qlora.config.schema import Config
from qlora.data.batching.collate import SidesCollator
from qlora.data.pipeline import build_data
from qlora.objectives import build_objective
from qlora.runtime.device import Placement
from qlora.step.fast_step import FastStep

pytest.importorskip("trl")
DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the checkout")
MODELS = ["stories260K", "TinyStories-656K"]
STEPS, ROWS, RATE = 5, 4, 0.02
LENGTH = 40
"""Tokens of a row: of longer ones the sum of log-probabilities is itself no longer known to 1e-5 in float32."""
CPU = Placement(torch.device("cpu"), torch.float32, torch.float32)

Batch = dict[str, torch.Tensor]
Oracle = Callable[[Any, Batch], tuple[torch.Tensor, dict[str, float]]]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest) -> str:
    return f"{DATA}/models/{request.param}"


def tokenizer_of(folder: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adapted(folder: str, *, trained: bool = False) -> PeftModel:
    """Returns a small Llama with an adapter; a `trained` one does not begin as the base."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(
        base, PeftLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters() if trained else ():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batches(folder: str, config: Config) -> Iterator[Batch]:
    """Yields the first batches of a set, as training collates them."""
    tokenizer = tokenizer_of(folder)
    objective = build_objective(config.loss)
    rows = build_data(config.data, tokenizer, need_eval=False, kind=objective.rows).train
    assert rows is not None
    collate = SidesCollator(tokenizer.pad_token_id, config.data.longest_row)
    for start in range(0, STEPS * ROWS, ROWS):
        yield collate([rows[index] for index in range(start, start + ROWS)])


def configured(tmp_path: Path, loss: list[str], file: str = "dpo_en_demo.json") -> Config:
    return compose(
        [*loss, "data=local", f"data.path={DATA}/{file}", f"data.max_length={LENGTH}", "data.eval_dataset_size=0",
         f"data.max_train_samples={STEPS * ROWS}",
         f"data.cache_dir={tmp_path}", "trainer.fused_loss=true", "trainer.keep=last", "device=cpu",
         f"trainer.per_device_train_batch_size={ROWS}"]
    )  # fmt: skip


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Returns how far two gradients lie apart, as a share of the second where that is longer than 1."""
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours) ** 0.5
    return apart / max(sum(float(gradient.double().square().sum()) for gradient in theirs.values()) ** 0.5, 1)


def descend(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter -= RATE * parameter.grad


def compare(
    folder: str,
    config: Config,
    oracle: Oracle,
    other: PeftModel,
    names: dict[str, str],
    model: PeftModel | None = None,
) -> None:
    """Takes the same steps with this project and with TRL; `names` maps our metrics to TRL's."""
    model = model or adapted(folder)
    model.load_state_dict(other.state_dict(), strict=False)  # TRL adds a frozen copy of a trained adapter
    objective: Any = build_objective(config.loss)
    reference = adapters.reference_at_start(model, is_base=False) if objective.compares else None
    step = FastStep(model, config.trainer, config.quantization, CPU, None, objective, reference)
    assert step.parts["fused_loss"] == "on"
    for batch in batches(folder, config):
        with step:
            loss = model(**copy.deepcopy(batch)).loss
            model.zero_grad()
            loss.backward()
        expected, rewards = oracle(other, copy.deepcopy(batch))
        other.zero_grad()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        metrics = objective.metrics()
        for name, theirs in names.items():
            assert metrics[name] == pytest.approx(rewards[theirs], rel=1e-4, abs=1e-5)
        ours, theirs_all = gradients(model), gradients(other)
        assert ours.keys() <= theirs_all.keys()
        assert distance(ours, {name: theirs_all[name] for name in ours}) < 1e-5
        descend(other)
        model.load_state_dict(other.state_dict(), strict=False)  # rounding errors do not add up


def text_rows(count: int = 2) -> Dataset:
    """Returns rows for TRL's constructors; what is compared are batches of this project's tokens."""
    return Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * count)


def arguments(kind: Any, tmp_path: Path, **changes: Any) -> Any:
    return kind(output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, report_to=[],
                per_device_train_batch_size=ROWS, disable_dropout=False, max_length=LENGTH, **changes)  # fmt: skip


def latest(trainer: Any) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def in_order(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns ids, attention mask and answer mask with all chosen rows before the rejected ones, as TRL has them."""

    def flat(value: torch.Tensor) -> torch.Tensor:
        return value.transpose(0, 1).flatten(0, 1)

    return flat(batch["input_ids"]), flat(batch["attention_mask"]), (flat(batch["labels"]) != -100).long()


@pytest.mark.matrix(4)
@pytest.mark.parametrize("is_trained", [False, True], ids=["base", "start"])
@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        (["loss=dpo", "loss.beta=0.2"], {"loss_type": ["sigmoid"], "beta": 0.2}),
        (["loss=dpo", "loss.length_normalize=true", "loss.beta=2"], {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
        (["loss=dpo", "loss.sft_weight=0.5"], {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        (["loss=ipo", "loss.beta=0.3"], {"loss_type": ["ipo"], "beta": 0.3}),
    ],
    ids=["dpo", "normalized", "with-sft", "ipo"],
)
def test_dpo_and_ipo(loss: list[str], changes: dict[str, Any], is_trained: bool, folder: str, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    model = adapted(folder, trained=is_trained)
    trainer = DPOTrainer(model, args=arguments(DPOConfig, tmp_path, **changes), train_dataset=text_rows(),
                         processing_class=tokenizer_of(folder))  # fmt: skip

    def oracle(other: PeftModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        ids, attention, answers = in_order(batch)
        inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": answers}
        return trainer.compute_loss(other, inputs), latest(trainer)

    is_plain = loss[0] == "loss=dpo" and "loss.length_normalize=true" not in loss  # TRL logs others as DPO's
    compare(folder, configured(tmp_path, loss), oracle, model, {"reward_margin": "rewards/margins"} if is_plain else {})


def sides(batch: Batch, name: str) -> dict[str, torch.Tensor]:
    return {f"{side}_{name}": batch[name][:, index] for index, side in enumerate(("chosen", "rejected"))}


@pytest.mark.matrix(1)
def test_orpo(folder: str, tmp_path: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model = adapted(folder)
    trainer = ORPOTrainer(model, args=arguments(ORPOConfig, tmp_path, beta=0.4), train_dataset=text_rows(),
                          processing_class=tokenizer_of(folder))  # fmt: skip

    def oracle(other: PeftModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = sides(batch, "input_ids") | sides(batch, "attention_mask") | sides(batch, "labels")
        loss, metrics = trainer.get_batch_loss_metrics(other, inputs)
        return loss, metrics

    names = {"reward_accuracy": "rewards/accuracies", "reward_margin": "rewards/margins"}
    compare(folder, configured(tmp_path, ["loss=orpo", "loss.beta=0.4"]), oracle, model, names)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(smoothing: float, folder: str, tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model = adapted(folder)
    settings = arguments(CPOConfig, tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=0.8, cpo_alpha=0.5,
                         label_smoothing=smoothing)  # fmt: skip
    trainer = CPOTrainer(model, args=settings, train_dataset=text_rows(), processing_class=tokenizer_of(folder))

    def oracle(other: PeftModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = sides(batch, "input_ids") | sides(batch, "attention_mask") | sides(batch, "labels")
        loss, metrics = trainer.get_batch_loss_metrics(other, inputs)
        return loss, metrics

    config = configured(
        tmp_path, ["loss=simpo", "loss.gamma=0.8", "loss.sft_weight=0.5", f"loss.label_smoothing={smoothing}"]
    )
    names = {"reward_accuracy": "rewards/accuracies", "reward_margin": "rewards/margins"}
    compare(folder, config, oracle, model, names)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("is_trained", [False, True], ids=["base", "start"])
def test_kto(is_trained: bool, folder: str, tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    model = adapted(folder, trained=is_trained)
    rows = Dataset.from_list([{"prompt": "a", "completion": " b", "label": index < 2} for index in range(ROWS)])
    settings = arguments(KTOConfig, tmp_path, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    trainer = KTOTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer_of(folder))

    def oracle(other: PeftModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = {"label": batch["desirable"]}
        for prefix, side in (("", 0), ("KL_", 1)):  # TRL has rotated the answers of a batch in the same way
            inputs[f"{prefix}input_ids"] = batch["input_ids"][:, side]
            inputs[f"{prefix}attention_mask"] = batch["attention_mask"][:, side]
            inputs[f"{prefix}completion_mask"] = (batch["labels"][:, side] != -100).long()
        return trainer.compute_loss(other, inputs), latest(trainer)

    config = configured(tmp_path, ["loss=kto", "loss.beta=0.3", "loss.desirable_weight=1.2",
                                   "loss.undesirable_weight=0.7"], "kto_en_demo.json")  # fmt: skip
    compare(folder, config, oracle, model, {})


@pytest.mark.matrix(1)
@pytest.mark.parametrize("centered", [0.0, 0.05])
def test_reward(centered: float, folder: str, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    tokenizer = tokenizer_of(folder)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    settings = PeftLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="SEQ_CLS")
    rows = Dataset.from_list([{"chosen": "a b", "rejected": "a c"}] * 2)
    trainer = RewardTrainer(get_peft_model(classifier, settings), train_dataset=rows, processing_class=tokenizer,
                            args=arguments(RewardConfig, tmp_path, center_rewards_coefficient=centered))  # fmt: skip
    pad = classifier.config.vocab_size - 1
    classifier.config.pad_token_id = pad  # by which transformers finds the last token; no row has it

    def oracle(other: PeftModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        ids, attention, _ = in_order(batch)
        ids = ids.masked_fill(attention == 0, pad)
        return trainer.compute_loss(other, {"input_ids": ids, "attention_mask": attention}), latest(trainer)

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attach_head(base)
    config = configured(tmp_path, ["loss=reward", f"loss.center_rewards={centered}"])
    names = {"reward_accuracy": "accuracy", "reward_margin": "margin"}
    compare(folder, config, oracle, trainer.model.train(), names, get_peft_model(base, copy.deepcopy(settings)).train())
