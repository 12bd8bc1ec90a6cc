"""Default settings, one TOML file a device class."""

if __name__ != "coterie.configs":  # a second copy of every class would exist under the bare name
    raise ImportError("import this room as coterie.configs, not as configs")
