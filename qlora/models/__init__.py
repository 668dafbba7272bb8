"""Devices, base models, quantization and adapters."""
