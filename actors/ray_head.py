"""Starts Ray's head for a keeper, with no more of it than actors need, and then gets out of the way.

    python -m coterie.actors.ray_head FOLDER PORT

`ray start --head` brings a dashboard, a log monitor, an autoscaler, two agents and itself: seven processes, of which
two do the work. Here those two are started by Ray's own code (`Node`), the rest is left out: docs/ray.md has what each
costs. Prints one line of JSON: address and processes, or {"error": ...}. It ends up as `sleep`, which keeps the process
id on whose end the kernel kills GCS and raylet, and gives back what importing Ray took.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from coterie.configs import placement

OFFERED = 64  # of each resource that units ask for: so many can run side by side
OBJECT_STORE = 75 << 20  # bytes: Ray's least; nothing of ours is larger than a message
SESSION = "s"  # Ray's own name is 44 letters long, and socket paths are limited
LOG_BYTES = 1 << 20
SAY_AND_STAY = 'printf "%s\\n" "$0"; exec sleep infinity >/dev/null'
# Ports of agents that are not there. Nobody listens at 1 (tcpmux), and nobody is asked to connect.
NO_PORT = "1"
NO_AGENT = 'sh -c "exec cat"'  # whatever options the raylet adds
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def environment(folder: Path) -> dict[str, str]:
    """What Ray's processes have in their environment, and workers from them."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # else it kills units when memory, which we fill, runs low
        "RAY_worker_oom_score_adjustment": "0",  # 1000 by default: units would be the kernel's first choice
        "RAY_worker_niceness": "0",  # 15 by default: units would run behind everything
        "RAY_enable_worker_prestart": "0",  # 80 MB each
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",  # a history of all calls
        "RAY_maximum_gcs_destroyed_actor_cached_count": "16",  # 100,000 by default
        "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",  # the keeper ends a session without GCS; nobody else aborts
        "RAY_ROTATION_MAX_BYTES": str(LOG_BYTES),
        "RAY_ROTATION_BACKUP_COUNT": "1",
        "RAY_log_rotation_max_bytes": str(LOG_BYTES),
        "RAY_log_rotation_backup_count": "1",
    }


def main(folder: Path, port: int) -> None:
    token = os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(token, os.urandom(32).hex().encode())
    os.close(token)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update(environment(folder))
    try:
        session = start(folder, port)
    except Exception as error:  # whatever it is, it is for who asked
        session = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    if "error" in session:
        print(json.dumps(session))
    else:
        os.execvp("sh", ["sh", "-c", SAY_AND_STAY, json.dumps(session)])


def start(folder: Path, port: int) -> dict[str, Any]:
    """Start GCS and raylet, which die with this process."""
    from ray._private import node, parameter, services

    class Head(node.Node):  # type: ignore[misc]
        def start_api_server(self, **options: Any) -> None:
            """No dashboard."""

    services.start_ray_process = _without_agents(services.start_ray_process)
    parameters = parameter.RayParams(
        node_ip_address="127.0.0.1",
        gcs_server_port=port,
        temp_dir=str(folder / "r"),
        session_name=SESSION,
        object_store_memory=OBJECT_STORE,
        resources={name: OFFERED for wanted in placement().values() for name in wanted},
        num_cpus=len(os.sched_getaffinity(0)),
        num_gpus=0,
        include_log_monitor=False,
        include_dashboard=False,
        no_monitor=True,
        setup_worker_path=str(Path(__file__).with_name("ray_worker.py")),
    )
    head = Head(parameters, head=True, shutdown_at_exit=False)
    processes = {name: info[0].process.pid for name, info in head.all_processes.items()}
    pids = {"gcs": processes["gcs_server"], "raylet": processes["raylet"], "head": os.getpid()}
    return {"address": head.address, "pids": pids, "token": str(folder / "token")}


def _without_agents(start_process: Any) -> Any:
    """Ray's way to start a process, changed for the raylet: it waits for two agents' ports, and watches the agents. It
    finds the ports written, and `cat`, which ends with the pipe that the raylet holds."""

    def start(command: list[str], *arguments: Any, **options: Any) -> Any:
        flags = dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)
        agents = [f"--{name}=" for name in ("dashboard_agent_command", "runtime_env_agent_command")]
        if "dashboard_agent_command" in flags:
            for name in AGENT_PORTS:
                Path(flags["session_dir"], f"{name}_{flags['node_id']}").write_text(NO_PORT)
            command = [next((agent + NO_AGENT for agent in agents if word.startswith(agent)), word) for word in command]
        return start_process(command, *arguments, **options)

    return start


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
