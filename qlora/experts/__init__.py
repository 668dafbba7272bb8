"""Mixtures of experts: the layout of a layer's experts, where their weights are, and the plain forward pass."""
