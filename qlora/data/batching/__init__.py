"""From rows to token ids, packs and padded batches."""
