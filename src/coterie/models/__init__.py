"""Model files: GGUF, architectures, tokenizers and chat templates. One file an architecture."""
