"""How the frozen base is quantized: one module or package a method, behind the protocol in `method`."""
