"""An invented little world: pretraining corpus, instruction rows and tokenizer of the demo."""
