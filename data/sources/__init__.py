"""Where rows come from: files, Hugging Face datasets, built-in data."""
