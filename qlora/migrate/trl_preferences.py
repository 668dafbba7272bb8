"""TRL's `trl dpo`, `kto`, `orpo`, `cpo` and `reward`: which of them a config is of, and what it becomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from qlora.config.overrides import write_override
from qlora.errors import ConfigError
from qlora.migrate import hf_arguments, preferences, shared_rules, trl
from qlora.migrate.translation import Dialect, Lost, OnlyIf, Part, Rule, Same, Settings, is_unset
from qlora.migrate.vocabulary import TRL_PREFERENCE_KEYS

OF_TEXTS = ("packing", "packing_strategy", "assistant_only_loss", "dataset_text_field")
"""What finetuning alone reads."""
DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in trl.DEFAULTS.items() if name not in OF_TEXTS},
    "learning_rate": 1e-6,
    "disable_dropout": True,
}
OF_METHOD: dict[str, dict[str, Any]] = {
    "dpo": {},
    "kto": {"train_sampling_strategy": "sequential"},
    "orpo": {},
    "cpo": {},
    "reward": {"learning_rate": 1e-4},
}
"""The methods, and what each does otherwise."""
SIGNS = {
    "kto": ("desirable_weight", "undesirable_weight"),
    "cpo": ("cpo_alpha", "simpo_gamma", "alpha"),
    "reward": ("center_rewards_coefficient",),
    "dpo": ("loss_weights", "f_divergence_type", "f_alpha_divergence_coef", "rpo_alpha", "ld_alpha", "use_weighting",
            "discopop_tau", "reference_free", "use_logits_to_keep"),
}  # fmt: skip
"""Keys that one method alone has."""
SHARED = ("beta", "precompute_ref_log_probs", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
"""Keys that several methods have, and finetuning has not."""
OF_SFT = ("nll", "chunked_nll", "dft")
LOSS_TYPES = {"kto": "kto", "apo_zero_unpaired": "kto", "simpo": "cpo"}
"""The methods of values of `loss_type` that one alone has; all others are of DPO."""
LOSS_KEYS = (
    *("beta", "loss_type", "loss_weights", "label_smoothing", "rpo_alpha", "cpo_alpha", "simpo_gamma", "alpha"),
    *("desirable_weight", "undesirable_weight", "center_rewards_coefficient", "precompute_ref_log_probs"),
)


def method_of(settings: Mapping[str, Any]) -> str | None:
    """Returns which method a config is of; None: finetuning. Raises `ConfigError` where several have all its keys."""
    for method, signs in SIGNS.items():
        if any(sign in settings for sign in signs):
            return method
    kinds = settings.get("loss_type")
    kind = str(kinds[0] if isinstance(kinds, list) and kinds else kinds)
    if not is_unset(kinds) and kind not in OF_SFT:
        return LOSS_TYPES.get(kind, "dpo")
    if str(settings.get("lora_task_type")).upper() == "SEQ_CLS":
        return "reward"
    if shared := next((name for name in SHARED if name in settings), None):
        raise ConfigError(
            f"from: {shared} is read by trl dpo, kto, orpo and cpo, and no other key says which of them is meant; add "
            "loss_type (sigmoid: DPO, kto, simpo), or write the settings as arguments behind `trl orpo`"
        )
    return None


def dialect_of(settings: Mapping[str, Any]) -> Dialect:
    """Returns TRL's dialect of finetuning, or of the method that a config is of."""
    method = method_of(settings)
    return trl.TRL if method is None else METHODS[method]


def _data(settings: Settings) -> Iterator[Part]:
    parts, notes = trl.read_sets(settings)
    yield from notes
    yield from shared_rules.mix([{**part, "format": "auto"} for part in parts])
    yield from trl.choose_length(settings)
    for theirs, ours in (("max_prompt_length", "source_max_len"), ("max_completion_length", "target_max_len")):
        if (length := settings.take(theirs)) is not None:
            yield write_override(f"data.{ours}", length)
    yield from trl.choose_template(settings)
    yield from trl.hold_out(settings, parts)


def _loss(settings: Settings, *, method: str) -> Iterator[Part]:
    values = {name: settings.take(name) for name in LOSS_KEYS}
    yield from preferences.choose_loss(preferences.Answers(method, values, smooths=False))
    if settings.take("reference_free"):
        yield "loss.reference=none"
    if settings.take("disable_dropout"):
        yield from preferences.NO_DROPOUT
        settings.read.add("lora_dropout")
        if settings.get("lora_dropout"):
            yield Lost("disable_dropout switches it off there, and so does the command", "lora_dropout")
    rows = settings.look("per_device_train_batch_size")
    if method == "kto" and rows == 1:
        yield "trainer.per_device_train_batch_size=2"
        settings.read.add("per_device_train_batch_size")
        yield Lost(preferences.LABEL_ROWS, "per_device_train_batch_size")


RULES: dict[str, Rule] = {name: rule for name, rule in trl.RULES.items() if name not in ("loss_type",)} | {
    "lora_task_type": OnlyIf(("CAUSAL_LM", "SEQ_CLS"), "language models are trained here, or a head that scores texts"),
    "f_divergence_type": OnlyIf(("reverse_kl",), "the divergence is the reverse KL"),
    "f_alpha_divergence_coef": Same("it is read beside f_divergence_type alone"),
    "ld_alpha": Lost("all tokens of an answer count alike"),
    "use_weighting": Lost("all pairs count alike (WPO)"),
    "discopop_tau": Same("it is read by the loss discopop alone"),
    "sync_ref_model": Lost(preferences.SYNCHRONISED),
    "ref_model_mixup_alpha": Same("it is read beside sync_ref_model alone"),
    "ref_model_sync_steps": Same("it is read beside sync_ref_model alone"),
    "model_adapter_name": Lost(preferences.REFERENCE_MODEL),
    "ref_adapter_name": Lost(preferences.REFERENCE_MODEL),
    "generate_during_eval": Same("answers are generated at the end of a run (task.predict=true)"),
    **dict.fromkeys(("precompute_ref_batch_size", "use_logits_to_keep", "padding_value", "label_pad_token_id",
                     "is_encoder_decoder", "max_target_length", "force_use_ref_model", "tools"), Same()),
}  # fmt: skip
METHODS = {
    method: replace(
        trl.TRL,
        name=f"TRL's {method}",
        version="1.16",
        keys=trl.TRL.keys | TRL_PREFERENCE_KEYS,
        defaults=DEFAULTS | more,
        rules=RULES,
        joints=(
            trl.choose_base,
            trl.choose_bits,
            trl.choose_lora,
            hf_arguments.schedule,
            _data,
            partial(_loss, method=method),
        ),
    )
    for method, more in OF_METHOD.items()
}
"""The dialects by method."""
