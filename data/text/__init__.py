"""Text: documents, tokenizers, packing, held-out windows."""
