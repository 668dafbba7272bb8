"""Adapters on the experts of a mixture: PEFT's files and initial values, and what an expert computes with them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora import adapters
from qlora.adapters import count_parameters
from qlora.adapters.adapted import split_adapter
from qlora.adapters.experts import expert_wrappers
from qlora.adapters.per_expert import unit_names
from qlora.adapters.targets import find_targets
from qlora.errors import UserError
from qlora.experts.layout import ExpertsLayout, find_experts
from qlora.models.decoder import read_decoder
from qlora.models.tokenizer import load_tokenizer
from qlora.planning.read_shape import read_shape
from qlora.upstream.peft import base_of, names_kept
from tests.adapters.test_merge_experts import merge
from tests.models.bases import choose, load, write

IDS = torch.arange(100, 132).view(2, 16)
KINDS = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe"]
PLAIN = ("quantization=fp32", "lora.dropout=0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: write(kind, root / kind) for kind in [*KINDS, "llama", "llama4_text", "qwen3_next"]}


def attach(folder: Path, *overrides: str) -> PeftModel:
    config = choose(folder, *overrides)
    base = load(folder, *(text for text in overrides if text.startswith("quantization")))
    torch.manual_seed(3)
    return adapters.add_lora(config.lora, base, tensors=list, new_token_ids=[], batches=[])


def train(model: PeftModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def save(model: PeftModel, folder: Path) -> Path:
    adapters.save_adapter(model, folder, tokenizer=load_tokenizer(choose(folder).model))
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output: Tensor = model.eval()(input_ids=IDS).logits
    return output


@pytest.mark.matrix(1)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_loads_a_trained_adapter_to_equal_logits(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    model = attach(folders[kind], "quantization=fp32", "lora.dropout=0.1")
    untuned = logits(model)
    train(model)
    folder, expected = save(model, tmp_path / "adapter"), logits(model)
    assert (expected - untuned).abs().max() > 0.01
    plain = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, folder)), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == 0
    again = adapters.load_adapter(load(folders[kind], "quantization=fp32"), folder, "base")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), untuned, rtol=0, atol=0)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss"])
def test_an_adapter_on_4_bit_experts_trains_and_loads_again(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    overrides = ["quantization=nf4", "quantization.compute_dtype=fp32", "lora.dropout=0.1"]
    base = load(folders[kind], *overrides)
    model = adapters.add_lora(choose(folders[kind], *overrides).lora, base, tensors=list, new_token_ids=[], batches=[])
    untuned = logits(model)
    train(model)
    folder, expected = save(model, tmp_path / "adapter"), logits(model)
    assert (expected - untuned).abs().max() > 0.01
    again = adapters.load_adapter(load(folders[kind], *overrides), folder, "base")
    assert torch.equal(logits(again), expected)
    assert adapters.count_parameters(again).base == adapters.count_parameters(load(folders[kind], PLAIN[0])).base


@pytest.mark.matrix(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_the_initial_values_are_those_that_plain_peft_draws(folders: dict[str, Path], kind: str, init: str) -> None:
    model = attach(folders[kind], *PLAIN, f"lora.init={init}", "lora.target_modules=[o_proj]", "lora.experts=all")
    config = copy.deepcopy(model.peft_config["default"])
    linear = {name for name in adapted(model) if "shared_experts" in name}
    config.target_parameters = [name for name in config.target_parameters if "shared" not in name]
    config.target_modules = {*config.target_modules, *linear}
    plain = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32)
    torch.manual_seed(3)
    with names_kept():
        expected = get_peft_model_state_dict(get_peft_model(plain, config))
    actual = get_peft_model_state_dict(model)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def adapted(model: PeftModel) -> set[str]:
    return {name.replace(".base_layer", "") for name, module in model.get_base_model().named_modules()
            if hasattr(module, "lora_A")}  # fmt: skip


@pytest.mark.full
def test_the_ranks_of_a_token_add_up_and_all_layers_are_scaled_alike(folders: dict[str, Path]) -> None:
    for overrides, rank in (([], 3), (["lora.expert_r=5"], 5), (["lora.use_rslora=true"], 3)):
        model = attach(folders["qwen3_moe"], *PLAIN, "lora.r=6", "lora.alpha=8", *overrides)
        wrappers = expert_wrappers(model)
        assert len(wrappers) == 4
        assert {wrapper.r["default"] for wrapper in wrappers.values()} == {rank}
        expected = 8 / 6**0.5 if "lora.use_rslora=true" in overrides else 8 / 6
        scales = [module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")]
        assert scales == pytest.approx([expected] * len(scales))


def test_b_is_trained_contiguous_by_expert_and_a_is_a_view(folders: dict[str, Path]) -> None:
    model = attach(folders["gpt_oss"], *PLAIN)
    for name, experts in find_experts(model).items():
        for projection, (outputs, inputs) in ExpertsLayout.of(experts).projections.items():
            adapter = experts.__dict__["expert_adapters"][projection]
            wrapper = expert_wrappers(model)[f"{name}.{projection}"]
            assert adapter.b is wrapper.lora_B["default"].weight
            assert adapter.b.is_contiguous()
            assert adapter.b.shape == (4, outputs, 2)
            assert adapter.a.is_contiguous()
            assert adapter.a.shape == (4, 2, inputs)
            assert adapter.a.data_ptr() == wrapper.lora_A["default"].weight.data_ptr()


def test_switching_adapters_and_modes_takes_effect_on_experts(folders: dict[str, Path]) -> None:
    model = attach(folders["qwen3_moe"], "quantization=fp32", "lora.dropout=0.5", "lora.target_modules=[o_proj]",
                   "lora.experts=all")  # fmt: skip
    untuned = logits(model)
    train(model)
    for name, parameter in model.named_parameters():  # experts alone
        if "o_proj.lora_B" in name:
            parameter.data.zero_()
    trained = logits(model)
    assert not torch.equal(trained, untuned)
    with model.disable_adapter():
        assert torch.equal(logits(model), untuned)
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("other", config)
    assert torch.equal(logits(model), trained)
    model.set_adapter("other")
    assert torch.equal(logits(model), untuned)  # its B is zero
    train(model, steps=1)
    assert not torch.equal(logits(model), untuned)
    model.set_adapter("default")
    assert torch.equal(logits(model), trained)
    with torch.no_grad():
        masked = model.train()(input_ids=IDS).logits
    assert not torch.allclose(masked, trained, atol=1e-4)  # dropout


@pytest.mark.full
def test_peft_merges_an_adapter_on_experts_as_it_computes(folders: dict[str, Path]) -> None:
    for kind in ("qwen3_moe", "gpt_oss"):
        model = attach(folders[kind], *PLAIN)
        train(model)
        expected = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_none_shared_and_all_choose_among_the_experts(folders: dict[str, Path]) -> None:
    base, llama4 = (load(folders[kind], "quantization=fp32") for kind in ("deepseek_v3", "llama4_text"))

    def kinds(*overrides: str, model: Any = base) -> set[str]:
        targets = find_targets(choose(folders["deepseek_v3"], *PLAIN, *overrides).lora, model)
        return {re.sub(r".*\.\d+\.", "", name) for name in [*targets.modules, *targets.parameters]}

    attention = {f"self_attn.{name}" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    dense = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    shared = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    routed = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert kinds("lora.experts=none") == attention | dense
    assert kinds("lora.experts=shared") == attention | dense | shared
    assert kinds("lora.experts=all") == kinds() == attention | dense | shared | routed
    assert kinds("lora.target_modules=[q_proj]") == {"q_proj"}
    assert kinds("lora.target_modules=[q_proj]", "lora.experts=shared") == {"self_attn.q_proj"} | shared
    assert kinds("lora.use_dora=true") == attention | dense | shared
    assert kinds(model=llama4) == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
    }


@pytest.mark.full
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_router_is_adapted_if_asked_for_and_plain_peft_loads_it(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    model = attach(folders[kind], *PLAIN, "lora.router=true")
    train(model)
    assert "the router" not in (read_decoder(base_of(model)).describe_unadapted() or "")
    router = next(parameter for name, parameter in model.named_parameters()
                  if re.search(r"(gate|router)\.lora_B", name))  # fmt: skip
    assert router.any()
    folder, expected = save(model, tmp_path / "adapter"), logits(model)
    plain = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, folder)), expected, rtol=1e-5, atol=1e-5)
    again = adapters.load_adapter(load(folders[kind], "quantization=fp32"), folder, "base")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)


@pytest.mark.matrix(1)
@pytest.mark.parametrize(("kind", "overrides"), [("deepseek_v3", ["lora.router=true"]), ("gpt_oss", [])])
def test_a_merged_model_answers_as_the_adapter_on_4_bit_experts_does(
    folders: dict[str, Path], tmp_path: Path, kind: str, overrides: list[str]
) -> None:
    model = attach(folders[kind], "quantization=nf4", "quantization.compute_dtype=fp32", *overrides)
    train(model)
    expected = logits(model)
    merge(folders[kind], tmp_path / "merged", split_adapter(model))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


class Expert(nn.Module):
    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        for name, weight in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            self.add_module(name, linear)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class Apart(nn.ModuleList):
    """Experts as transformers 4 kept them, each a module of linear layers."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        outputs = torch.stack([expert(hidden) for expert in self], 1)
        fraction = torch.zeros(len(hidden), len(self)).scatter(1, chosen, weights)
        return (outputs * fraction[..., None]).sum(1)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_plain_peft_loads_the_names_of_each_expert_onto_linear_layers(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    model = attach(folders[kind], *PLAIN, "lora.per_expert=true")
    train(model)
    adapters.save_per_expert(model, save(model, tmp_path / "adapter"), tmp_path / "names")
    expected = logits(model)
    plain = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32)
    for name, experts in find_experts(plain).items():
        size = experts.gate_up_proj.shape[1] // 2
        parts = zip(experts.gate_up_proj.detach(), experts.down_proj.detach(), strict=True)
        apart = Apart([Expert(first[:size], first[size:], down) for first, down in parts])
        plain.set_submodule(name, apart)
    plain.config.model_type = "apart"  # PEFT takes the names for those of one tensor where it knows the architecture
    again = PeftModel.from_pretrained(plain, tmp_path / "names")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    gate, up = (f"base_model.model.model.layers.1.mlp.experts.3.{part}_proj" for part in ("gate", "up"))
    tensors = load_file(tmp_path / "names" / "adapter_model.safetensors")
    assert torch.equal(tensors[f"{gate}.lora_A.weight"], tensors[f"{up}.lora_A.weight"])
    assert not torch.equal(tensors[f"{gate}.lora_B.weight"], tensors[f"{up}.lora_B.weight"])


@pytest.mark.full
def test_the_names_of_each_expert_are_those_of_the_base_s_files(folders: dict[str, Path]) -> None:
    base = load(folders["mixtral"], "quantization=fp32")
    assert unit_names(base, "model.layers.0.mlp.experts.gate_up_proj") == [
        "model.layers.0.block_sparse_moe.experts.*.w1.weight", "model.layers.0.block_sparse_moe.experts.*.w3.weight"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"lora.per_expert=true: the files of a gpt_oss have no names for each expert"):
        attach(folders["gpt_oss"], *PLAIN, "lora.per_expert=true")
    with pytest.raises(
        UserError, match=r"lora.per_expert=true names the adapters of routed experts, and this run puts"
    ):
        attach(folders["llama"], *PLAIN, "lora.per_expert=true")


REFUSED = [
    ("llama", ["lora.experts=all"], "lora.experts=all: this llama is dense: it has no experts; leave lora.experts out"),
    ("llama", ["lora.router=true"], "lora.router=true: this llama has no routers; leave lora.router out"),
    (
        "llama",
        ["lora.expert_r=2"],
        "lora.expert_r=2 is the rank of adapters on routed experts, and this run puts none on them; set "
        "lora.experts=all, or leave lora.expert_r out",
    ),
    (
        "qwen3_moe",
        ["lora.experts=shared"],
        "lora.experts=shared: this qwen3_moe has no shared experts; set lora.experts=all or none",
    ),
    (
        "llama4_text",
        ["lora.experts=all"],
        "lora.experts=all: this llama4_text computes its experts by code of its own, which no adapter reaches; set "
        "lora.experts=none or shared",
    ),
    (
        "qwen3_moe",
        ["lora.target_modules=[q_proj,gate_proj,up_proj]"],
        "lora.target_modules ['gate_proj', 'up_proj']: in this qwen3_moe only experts have these names; leave them "
        "out, and set lora.experts=all to adapt the experts",
    ),
]


def test_what_experts_cannot_have_is_refused_in_one_sentence(folders: dict[str, Path]) -> None:
    bases = {kind: load(folders[kind], "quantization=fp32") for kind in {kind for kind, _, _ in REFUSED}}
    for kind, overrides, sentence in REFUSED:
        with pytest.raises(UserError) as error:
            find_targets(choose(folders[kind], *PLAIN, *overrides).lora, bases[kind])
        assert str(error.value) == sentence


@pytest.mark.full
def test_an_adapter_of_other_experts_is_refused_in_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    model = attach(folders["qwen3_moe"], *PLAIN)
    train(model, steps=2)
    folder = save(model, tmp_path / "adapter")
    for name, changes in (("more", {"num_experts": 8}), ("wider", {"moe_intermediate_size": 32})):
        other = load(write("qwen3_moe", tmp_path / name, **changes), "quantization=fp32")
        with pytest.raises(UserError) as error:
            adapters.load_adapter(other, folder, "other")
        assert re.fullmatch(
            rf"adapter={folder} does not fit model.name=other: it was trained on .*; give that base as model.name "
            r"\(its base_model.*.layers.0.mlp.experts.*lora_[AB].weight is \d+ x \d+, and this base needs .*\)",
            str(error.value),
        )
    with pytest.raises(UserError, match=r"does not fit .* belongs to a layer that this base does not have"):
        adapters.load_adapter(load(folders["llama"], "quantization=fp32"), folder, "other")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "experts.lora_B" in name))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is incomplete: 1 of the \d+ tensors .* are missing, first .*experts.lora_B"):
        adapters.load_adapter(load(folders["qwen3_moe"], "quantization=fp32"), folder, "base")


@pytest.mark.full
def test_the_average_of_states_computes_the_mean_of_expert_adapters(folders: dict[str, Path], tmp_path: Path) -> None:
    model = attach(folders["gpt_oss"], *PLAIN, "lora.experts=all")
    states, deltas = [], []
    for _ in range(3):
        train(model, steps=2)
        states.append(
            {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        )
        deltas.append([wrapper.get_delta_weight("default") for wrapper in expert_wrappers(model).values()])
    adapters.average_trained(model, iter(states), len(states))
    for index, wrapper in enumerate(expert_wrappers(model).values()):
        mean = torch.stack([delta[index] for delta in deltas]).mean(0)
        torch.testing.assert_close(wrapper.get_delta_weight("default"), mean)
    folder, expected = save(model, tmp_path / "adapter"), logits(model)
    plain = AutoModelForCausalLM.from_pretrained(folders["gpt_oss"], dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, folder)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_the_loss_is_the_same_where_the_base_reports_router_logits(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write("mixtral", tmp_path / "base", output_router_logits=True)
    quiet, loud = (
        attach(path, *PLAIN).train()(input_ids=IDS, labels=IDS).loss for path in (folders["mixtral"], folder)
    )
    assert torch.equal(quiet, loud)


def test_the_size_of_a_mixture_says_what_computes_a_token(folders: dict[str, Path]) -> None:
    for kind in ("qwen3_moe", "deepseek_v3", "gpt_oss"):
        model = attach(folders[kind], *PLAIN)
        count = count_parameters(model)
        shape = read_shape(json.loads((folders[kind] / "config.json").read_text()), "test")
        assert shape.experts is not None
        assert count.routing == f"{shape.experts.per_token} of {shape.experts.count} experts"
        assert (count.base, count.base - count.idle) == (shape.parameters, shape.active_parameters)
        assert count.describe_base().endswith(
            f"M parameters, {shape.active_parameters / 1e6:,.1f} M of them active ({count.routing} a token)"
        )
