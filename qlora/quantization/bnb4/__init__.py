"""bitsandbytes' 4-bit weights: plain tensors of them, and kernels that dequantize them."""
