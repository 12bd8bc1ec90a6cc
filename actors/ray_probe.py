"""Asks a Ray that runs already which versions it has: python -m coterie.actors.ray_probe HOST:PORT

A process of its own (ray_session.probe says why). One line of JSON on stdout: {"ray", "python"}, or {"error"}.
"""

import json
import os
import socket
import sys
import tempfile

CONNECT_SECONDS = 5.0
QUICKLY = {"RAY_py_gcs_connect_timeout_s": "3", "RAY_gcs_rpc_server_connect_timeout_s": "3"}


def main(address: str) -> dict[str, str]:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        return {"error": f"does not answer ({error.strerror or error}): check the address, and that it runs"}
    os.environ.update(QUICKLY)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            return _versions(address)
        except Exception:
            noise.seek(0)
            said = noise.read()
    if b"Unauthenticated" in said:
        return {"error": "refuses the token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its file"}
    return {"error": "does not answer as Ray does: check the address"}


def _versions(address: str) -> dict[str, str]:
    import ray._common.usage.usage_lib as usage
    from ray._raylet import GcsClient

    found = usage.get_cluster_metadata(GcsClient(address=address))
    return {"ray": found["ray_version"], "python": found["python_version"]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
