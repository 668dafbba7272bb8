"""8 bits a weight by bitsandbytes: LLM.int8(), arXiv 2208.07339."""
