"""Hugging Face streams to tensors, resumable to the byte: sources, lanes, packing, tokenizers."""
