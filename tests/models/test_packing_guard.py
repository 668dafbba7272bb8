"""The guard lets models pass that keep packed rows apart, and stops those that do not."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from qlora.errors import UserError
from qlora.models.packing_guard import check_packing
from qlora.quantization.bnb4.method import Bnb4
from qlora.quantization.method import set_method
from qlora.runtime.device import Placement

CPU = torch.device("cpu")
FP32 = Placement(CPU, torch.float32, torch.float32)
BF16 = Placement(CPU, torch.bfloat16, torch.bfloat16)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120}
GROUPED = SHAPE | {"intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}


def build(model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, use_cache=False, **changes))


@pytest.mark.parametrize("placement", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3"])
def test_models_that_find_the_borders_pass(model_type: str, batch_size: int, placement: Placement):
    check_packing(build(model_type, **GROUPED, head_dim=8), placement, batch_size=batch_size)


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2"])
def test_older_models_that_find_the_borders_pass(model_type: str):
    check_packing(build(model_type, **SHAPE), FP32, batch_size=2)


@pytest.mark.parametrize("placement", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["opt", "falcon", "bloom"])
def test_models_that_do_not_find_the_borders_are_refused(model_type: str, placement: Placement):
    settings = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "falcon": {"alibi": False}}
    model = build(model_type, **SHAPE, **settings.get(model_type, {}))
    message = rf"data\.packing=true: {model_type} \(.*\) lets packed rows see each other; set data\.packing=false"
    with pytest.raises(UserError, match=message):
        check_packing(model, placement, batch_size=2)


def test_a_model_in_which_only_some_layers_find_the_borders_is_refused():
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_expand": 1}
    with pytest.raises(UserError, match=r"falcon_h1 \(.*\) lets packed rows see each other"):
        check_packing(build("falcon_h1", **GROUPED, **mamba, head_dim=8), FP32, batch_size=2)


def test_attention_without_masks_is_refused_for_more_than_one_row_with_the_way_out():
    """Stands for flash attention, which has no CPU kernel: nothing of the borders reaches it but the positions."""
    AttentionInterface.register("flash_like", sdpa_attention_forward)
    AttentionMaskInterface.register("flash_like", flash_attention_mask)
    model = build("llama", **GROUPED)
    model.config._attn_implementation = "flash_like"
    with pytest.raises(UserError, match=r"flash attention keeps them apart only with .*batch_size=1 \(got 4\)"):
        check_packing(model, FP32, batch_size=4)


def test_positions_that_do_not_restart_are_refused():
    model = build("gpt2", **SHAPE)

    def run_on(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return torch.arange(inputs[0].shape[-1]).expand_as(inputs[0])

    model.transformer.wpe.register_forward_pre_hook(run_on)
    with pytest.raises(UserError, match=r"its positions do not restart; set data\.packing=false"):
        check_packing(model, FP32, batch_size=2)


def test_a_model_with_its_cache_on_is_a_mistake_of_the_caller():
    model = build("llama", **GROUPED)
    model.config.use_cache = True
    with pytest.raises(AssertionError, match="cache"):
        check_packing(model, FP32, batch_size=1)


def test_the_guard_leaves_modes_gradients_and_random_state_as_they_were():
    model = get_peft_model(build("llama", **GROUPED), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    model.train()
    model.base_model.model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check_packing(model, FP32, batch_size=2)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


def test_4_bit_weights_and_their_gradients_outlive_the_guard(base_folder):
    """On a CPU with AVX512-BF16, an evaluation before training would repack the weights."""
    model = LlamaForCausalLM.from_pretrained(
        base_folder, dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )  # fmt: skip
    set_method(model, Bnb4())
    model.config.use_cache = False
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    weights = [layer.weight.data.clone() for layer in layers]
    check_packing(model.train(), FP32, batch_size=2)
    assert all(torch.equal(layer.weight.data, data) for layer, data in zip(layers, weights, strict=True))
    model.get_input_embeddings().weight.requires_grad_(True)
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_the_guard_needs_no_more_than_a_few_short_forwards():
    model, widths = build("llama", **GROUPED), []
    model.model.register_forward_hook(lambda _, __, output: widths.append(tuple(output.last_hidden_state.shape[:2])))
    check_packing(model, FP32, batch_size=16)
    assert widths == [(2, 14)] * 4 + [(1, 8)]
