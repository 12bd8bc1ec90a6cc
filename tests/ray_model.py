"""A program with a model on the Ray host: python tests/ray_model.py PATH

Says on stdout, a line of JSON each: what processes there are and which memory they share; then "answered" after every
answer, until its stdin is closed.
"""

import json
import select
import sys

from ray_actors import actor_of, pid_of

from coterie import LLM
from coterie.actors import ray_folder
from coterie.actors.ray_host import RayHost


def main(path: str) -> None:
    with LLM(path, threads=2, context=256, host="ray") as llm:
        engine = llm._engine
        assert isinstance(engine.host, RayHost)
        folder = engine.host.session._folder
        assert folder is not None
        known = ray_folder.read_session(folder.name)
        assert known is not None
        pids = known["pids"] | {"keeper": known["keeper"]}
        pids |= {unit: pid_of(actor_of(engine, unit)) for unit in ("cpu", "flash")}
        print(json.dumps({"pids": pids, "inode": engine.arena.describe()["inode"]}), flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            list(llm.generate("once upon a time", max_tokens=20, temperature=0.0))
            print(json.dumps("answered"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
