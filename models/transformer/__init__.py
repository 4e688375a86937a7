"""The transformer, its cost, and its layouts in Hugging Face transformers."""
