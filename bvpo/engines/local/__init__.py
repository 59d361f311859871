"""The embedded engine: sampling with a transformers model in this process."""
