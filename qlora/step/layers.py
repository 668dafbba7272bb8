"""Finds a model's decoder layers."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.upstream.transformers_model import decoder_of


def find_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Returns the decoder layers, in order; those of a tower for pictures are not among them."""
    for module in decoder_of(model).modules():
        if isinstance(module, torch.nn.ModuleList) and len(module):
            layers = [layer for layer in module if isinstance(layer, GradientCheckpointingLayer)]
            if len(layers) == len(module):
                return layers
    return []
