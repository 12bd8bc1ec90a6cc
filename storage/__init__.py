"""Where the bytes are: the arena, its buffers, packed weights and the KV cache."""

if __name__ != "coterie.storage":  # a second copy of every class would exist under the bare name
    raise ImportError("import this room as coterie.storage, not as storage")
