"""Settings of NCCL and gloo that differ from theirs, each with its reason; whatever the user has set stays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class NetworkDefault:
    """An environment variable of a communication library, as it is set where the user has not."""

    name: str
    value: str
    reason: str


def network_defaults(*, interface: str | None, trace_folder: Path | None) -> list[NetworkDefault]:
    """What to set before the first process group.

    `interface`: the one that leads to the other nodes; None on a single machine. `trace_folder`: where flight records
    may be written.
    """
    defaults = [
        NetworkDefault(
            name="TORCH_FR_BUFFER_SIZE",
            value="20000",
            reason="NCCL's flight recorder is on: which collective hangs, and which rank has not joined it",
        ),
        NetworkDefault(
            name="TORCH_NCCL_DUMP_ON_TIMEOUT",
            value="1",
            reason="the record is written when a collective times out, before the process is aborted",
        ),
        NetworkDefault(
            name="TORCH_NCCL_ASYNC_ERROR_HANDLING",
            value="1",
            reason="a collective that failed or timed out ends the process instead of leaving it waiting for ever",
        ),
    ]
    if trace_folder is not None:
        record = str(trace_folder / "nccl-flight-record-rank-")
        reason = "records go to the run folder: /tmp of a lost node is lost with it"
        defaults.append(NetworkDefault(name="TORCH_FR_DUMP_TEMP_FILE", value=record, reason=reason))
        defaults.append(NetworkDefault(name="TORCH_NCCL_DEBUG_INFO_TEMP_FILE", value=record, reason=reason))
    if interface is not None:
        defaults.append(
            NetworkDefault(
                name="GLOO_SOCKET_IFNAME",
                value=interface,
                reason="left alone, gloo listens where the host's own name resolves to, which is often loopback",
            )
        )
        defaults.append(
            NetworkDefault(
                name="NCCL_SOCKET_IFNAME",
                value=f"={interface}",
                reason="NCCL's bootstrap may pick a bridge of containers; data goes over InfiniBand all the same",
            )
        )
    return defaults
