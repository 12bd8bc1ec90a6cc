"""Who does what, when: the plan and its compilation into programs."""

if __name__ != "coterie.scheduler":  # a second copy of every class would exist under the bare name
    raise ImportError("import this room as coterie.scheduler, not as scheduler")
