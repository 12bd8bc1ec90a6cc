"""Whether a unit is there, before anything is planned for it."""

from coterie.errors import UnitError


def lacking(unit: str) -> str:
    """Why a unit is not there, with what to install; "": it is."""
    try:
        if unit == "gpu":
            from coterie.actors.gpus import open_device
            from coterie.storage.arena import Arena

            arena = Arena({"nothing": 1 << 21})
            try:
                open_device(arena).close()
            finally:
                arena.close()
        if unit == "npu":
            from coterie.actors.npu_graphs import open_runtime

            open_runtime()
    except UnitError as error:
        return str(error)
    return ""
