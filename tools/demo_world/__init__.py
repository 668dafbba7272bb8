"""An invented small world: the generator of the embedded model's corpus, instruction rows and tokenizer."""
