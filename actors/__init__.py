"""The units: what computes and what reads, each an actor with lanes of its own."""

if __name__ != "coterie.actors":  # a second copy of every class would exist under the bare name
    raise ImportError("import this room as coterie.actors, not as actors")
