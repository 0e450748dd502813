"""Hugging Face models: their files, their weights."""
