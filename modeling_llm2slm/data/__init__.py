"""From rows to examples: reading files and data sets, streaming them, the order of training, the collator."""
