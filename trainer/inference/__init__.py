"""Use of trained weights: loading, few-shot evaluation, export to other libraries."""
