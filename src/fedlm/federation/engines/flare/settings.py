"""NVFlare's local settings of a kit: our relay, and no way to run anything else.

They are written when a kit is made and again at every start, so that the rules are those of the fedlm installed here,
whatever happened to the folder. Imports neither torch nor NVFlare.

What is refused, and where (each party alone would be enough):
- no role may submit, clone, manage or download jobs, bring code of its own, run shell commands, or stop a party;
- neither party has the components that schedule, store or start jobs;
- a job could name no class but the two relays, which do nothing in a job's process.
"""

from __future__ import annotations

import json
from typing import Any

from fedlm.federation.engines.flare.kit import Kit, private_folder, write_private

RELAYS = {
    "coordinator": "fedlm.federation.engines.flare.site.CoordinatorRelay",
    "silo": "fedlm.federation.engines.flare.site.SiloRelay",
}

HEARTBEAT_SECONDS = 5
"""How often a silo's NVFlare process tells the coordinator that it is there."""

_GONE_SECONDS = 30
_MAX_SILOS = 10_000
_MAX_MESSAGE = 80 * 2**20
_LOG_BYTES, _LOG_FILES = 10 * 2**20, 5

_RIGHTS = (
    "submit_job",
    "clone_job",
    "manage_job",
    "download_job",
    "operate",
    "shell_commands",
    "byoc",
    "server-predeployed-flwr",
)
_ROLES = ("project_admin", "org_admin", "lead", "member")


def write_settings(kit: Kit, json_logs: bool = False) -> None:
    """Write `local/` of the kit's NVFlare workspace.

    Args:
        kit: the kit.
        json_logs: NVFlare's log file as JSON lines instead of plain text.
    """
    private_folder(kit.workspace)
    for folder in (kit.local, kit.startup, kit.run, kit.logs):
        private_folder(folder)
    settings = {
        "resources.json": resources(kit),
        "authorization.json": authorization(),
        "comm_config.json": communication(),
        "log_config.json": logging_config(json_logs),
    }
    for name, value in settings.items():
        write_private(kit.local / name, (json.dumps(value, indent=1) + "\n").encode())


def resources(kit: Kit) -> dict[str, Any]:
    """resources.json: our relay is the only component."""
    relay = RELAYS[kit.kind]
    found: dict[str, Any] = {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [relay],
        "components": [{"id": "fedlm", "path": relay, "args": {}}],
    }
    if kit.kind == "coordinator":
        found["servers"] = [
            {
                "admin_storage": "transfer",
                "max_num_clients": _MAX_SILOS,
                "heart_beat_timeout": _GONE_SECONDS,
                "admin_timeout": 10.0,
            }
        ]
    else:
        found["allow_log_streaming"] = False  # logs stay in the silo
        found["client"] = {"retry_timeout": 30, "communication_timeout": 30.0}
    return found


def authorization() -> dict[str, Any]:
    """authorization.json: every role may look, and do nothing else."""
    rules: dict[str, str] = dict.fromkeys(_RIGHTS, "none") | {"view": "any"}
    return {"format_version": "1.0", "permissions": {role: dict(rules) for role in _ROLES}}


def communication() -> dict[str, Any]:
    """comm_config.json: silos talk to the coordinator alone, and a peer that vanishes is noticed."""
    return {
        "allow_adhoc_conns": False,
        # NVFlare opens a port on loopback for jobs' processes, which never come: let no other local user use it
        "internal": {"scheme": "tcp", "resources": {"host": "localhost", "connection_security": "mtls"}},
        "use_aio_grpc": False,
        "max_message_size": _MAX_MESSAGE,
        "heartbeat_interval": HEARTBEAT_SECONDS,
        "subnet_heartbeat_interval": HEARTBEAT_SECONDS,
        "grpc": {
            "max_workers": 1000,  # one per connected silo, for as long as it is connected
            "options": [
                ["grpc.max_send_message_length", _MAX_MESSAGE + 2**20],
                ["grpc.max_receive_message_length", _MAX_MESSAGE + 2**20],
                ["grpc.so_reuseport", 0],  # two coordinators on one port would share its silos
                # a cut cable ends no TCP connection: ask every 10 s whether the peer is still there
                ["grpc.keepalive_time_ms", 10_000],
                ["grpc.keepalive_timeout_ms", 5_000],
                ["grpc.keepalive_permit_without_calls", 1],
                ["grpc.http2.max_pings_without_data", 0],
                ["grpc.http2.min_recv_ping_interval_without_data_ms", 5_000],
                ["grpc.http2.max_ping_strikes", 0],
                ["grpc.max_reconnect_backoff_ms", 10_000],
            ],
        },
    }


def logging_config(json_logs: bool) -> dict[str, Any]:
    """log_config.json: one file that rotates; nothing on the console."""
    formatter = {"()": "fedlm.logs.JsonLines" if json_logs else "fedlm.logs.PlainLines"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"fedlm": formatter},
        "handlers": {
            "file": {
                "class": "logging.handlers.RotatingFileHandler",
                "level": "INFO",
                "formatter": "fedlm",
                "filename": "../logs/nvflare.log",  # NVFlare reads it from its workspace, so kits can be moved
                "mode": "a",
                "maxBytes": _LOG_BYTES,
                "backupCount": _LOG_FILES,
            }
        },
        "loggers": {"root": {"level": "INFO", "handlers": ["file"]}},
    }
