"""Rows in, examples out: reading files and data sets, tokenizing, streaming, order, collator."""
