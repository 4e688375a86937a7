"""Images: records, decoding, batches, held-out images."""
