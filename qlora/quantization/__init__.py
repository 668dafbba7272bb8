"""How base weights are quantized, one module a method."""
