"""The losses over answers of other tools, in the settings of TRL, which most of them hand on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora.config.overrides import write_override
from qlora.migrate.translation import Lost, Part

ORDERED = {
    "sigmoid": ("dpo", "loss.length_normalize=false"),
    "sigmoid_norm": ("dpo", "loss.length_normalize=true"),
    "ipo": ("ipo", "loss.length_normalize=true"),
}
"""The losses of `DPOConfig.loss_type` that are the same here."""
NO_DROPOUT = ("lora.dropout=0",)
"""TRL switches dropout off where it compares answers."""
FIXED = ("data.train_on=assistant", "data.packing=false", "trainer.group_by_length=false")
NOT_READ = "not read here; the loss is that without it"
GENERATES = (
    "trains by answers that the model generates, judged by rewards; here are losses over rows of answers (loss=)"
)
REFERENCE_MODEL = "the reference is the base of the adapter, or the adapter of lora.start: no other model is loaded"
SYNCHRONISED = "the reference stays that of the start"
LABEL_ROWS = "two rows or more a micro-batch are needed, whose answers estimate the divergence"


@dataclass(frozen=True)
class Answers:
    """What a config says of its loss over answers."""

    method: str
    """`dpo`, `ipo`, `kto`, `orpo`, `cpo`, `simpo` or `reward`."""
    values: Mapping[str, Any]
    """Values by the names of TRL's configs, with the defaults of the tool."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """What the tool calls those that it names otherwise."""
    smooths: bool = True
    """Whether the tool reads `label_smoothing` with `sigmoid`, as cDPO."""

    def value(self, name: str, default: Any = None) -> Any:
        """Returns a value, or what stands for one that is not set."""
        value = self.values.get(name)
        return default if value is None else value

    def lost(self, name: str, why: str) -> Lost:
        """Returns that a setting is lost, under its own name."""
        return Lost(why, self.keys.get(name, name))


def choose_loss(answers: Answers) -> Iterator[Part]:
    """Yields the loss of a config with its settings."""
    yield from FIXED
    method = "reward" if answers.method in ("rm", "reward") else answers.method
    beta = answers.value("beta", 2.0 if method == "simpo" else 0.1)
    if method == "reward":
        yield "loss=reward"
        yield write_override("loss.center_rewards", answers.value("center_rewards_coefficient", 0.0))
        return
    if method in ("dpo", "ipo"):
        yield from _ordered(answers)
    elif method in ("cpo", "simpo"):
        yield from _without_reference(answers)
    else:
        yield f"loss={method}"
    if method == "kto":
        yield "loss.reference=auto"
        for name in ("desirable_weight", "undesirable_weight"):
            yield write_override(f"loss.{name}", answers.value(name, 1.0))
        if answers.value("loss_type", "kto") != "kto":
            yield answers.lost("loss_type", "KTO's own loss is taken in its place")
    yield write_override("loss.beta", beta)


def _ordered(answers: Answers) -> Iterator[Part]:
    """DPO and IPO: one loss over the order of a pair, maybe with the cross entropy of the chosen answers."""
    named = answers.value("loss_type", "ipo" if answers.method == "ipo" else "sigmoid")
    types = [str(name) for name in (named if isinstance(named, list) else str(named).replace(",", " ").split())]
    weights = dict(zip(types, [float(weight) for weight in answers.value("loss_weights", [])], strict=False))
    known = next((name for name in types if name in ORDERED), None)
    loss, normalize = ORDERED[known or "sigmoid"]
    yield f"loss={loss}"
    yield normalize
    yield "loss.reference=auto"
    if answers.value("precompute_ref_log_probs", False):
        yield "loss.cache_reference=true"
    others = [name for name in types if name not in (known, "sft")]
    if others:
        yield answers.lost("loss_type", f"{', '.join(others)} is not here: loss={loss} is trained in its place")
    weight = weights.get(known or "", 1.0)
    sft = weights.get("sft", 1.0) if "sft" in types else answers.value("rpo_alpha", 0.0)
    if weight != 1.0 and weights:
        yield answers.lost("loss_weights", f"the loss over pairs has the weight 1 here, and the others are divided by "
                                           f"{weight:g}; multiply trainer.learning_rate by it")  # fmt: skip
    yield write_override("loss.sft_weight", float(sft) / (weight or 1.0))
    yield from _smoothing(answers, loss, types)


def _smoothing(answers: Answers, loss: str, types: list[str]) -> Iterator[Part]:
    smoothing = float(answers.value("label_smoothing", 0.0))
    if not smoothing:
        return
    if loss != "dpo":
        yield answers.lost("label_smoothing", f"loss={loss} has none, there as here")
    elif answers.smooths or "robust" in types:
        yield write_override("loss.label_smoothing", smoothing)
        if "robust" in types:
            yield answers.lost("label_smoothing", "the loss is smoothed as in cDPO, and not made unbiased")
    else:
        why = f"it has no effect there with sigmoid; loss.label_smoothing={smoothing:g} trains cDPO"
        yield answers.lost("label_smoothing", why)


def _without_reference(answers: Answers) -> Iterator[Part]:
    """CPO and SimPO: the losses of `CPOConfig`, with the cross entropy of the chosen answers."""
    kind = str(answers.value("loss_type", "simpo" if answers.method == "simpo" else "sigmoid"))
    if answers.value("alpha", 0.0):
        yield answers.lost("alpha", "AlphaPO's rewards are not here: those of SimPO are taken")
    if kind == "simpo":
        yield "loss=simpo"
        yield write_override("loss.gamma", answers.value("simpo_gamma", 0.5))
    else:
        loss, normalize = ORDERED.get(kind, ORDERED["sigmoid"])
        yield f"loss={loss}"
        yield normalize
        yield "loss.reference=none"
        if kind not in ORDERED or kind == "sigmoid_norm":
            yield answers.lost("loss_type", f"{kind} is not here: CPO's own loss is trained in its place")
    yield write_override("loss.sft_weight", answers.value("cpo_alpha", 1.0))
    if smoothing := answers.value("label_smoothing", 0.0):
        if kind == "ipo":
            yield answers.lost("label_smoothing", "loss=ipo has none, there as here")
        else:
            yield write_override("loss.label_smoothing", smoothing)
