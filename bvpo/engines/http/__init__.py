"""The HTTP engine: sampling from OpenAI-compatible servers."""
