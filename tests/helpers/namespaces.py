"""Hosts as network namespaces of this machine, on a switch: each with an address, a name of its own
and a link that can be cut. Needs root and `ip` (iproute2)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from .hosts import REPOSITORY, Host

_STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore(sys.argv[1], int(sys.argv[2]), is_master=True, wait_for_workers=False,
                 multi_tenant=True)
print("listens", flush=True)
time.sleep(1e6)
"""
PORT = 29400


def missing() -> str | None:
    """What is missing for namespaces, in one line."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "hosts are network namespaces: install iproute2 and util-linux"
    if os.geteuid() != 0:
        return "hosts are network namespaces, which only root can make: run it as root"
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Network:
    """Hosts a, b, ... on a switch, and a machine beside them where they meet (`endpoint`), as the
    login node of a cluster is."""

    def __init__(self, count: int, folder: Path) -> None:
        self.prefix, self.folder, self.endpoint = f"odelt{os.getpid()}", folder, f"10.77.0.1:{PORT}"
        self.names = [f"host-{chr(ord('a') + number)}" for number in range(count)]
        self.hosts = [
            Host(folder / name, "eth0", self._inside(f"{self.prefix}{number}", name))
            for number, name in enumerate(self.names)
        ]

    @staticmethod
    def _inside(namespace: str, name: str) -> list[str]:
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name]
        return ["ip", "netns", "exec", namespace, *named]

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """With all links up; nothing is left of it."""
        switch = f"{self.prefix}s"
        known = [f"10.77.0.{10 + number} {name}" for number, name in enumerate(self.names)]
        text = "\n".join(["127.0.0.1 localhost", "10.77.0.1 login", *known, ""])
        with ExitStack() as stack:
            for name in (switch, *(f"{self.prefix}{n}" for n in range(len(self.hosts)))):
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "delete", name)
                files = Path("/etc/netns", name)  # what `ip netns exec` puts over /etc
                files.mkdir(parents=True)
                stack.callback(shutil.rmtree, files)
                (files / "hosts").write_text(text)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", switch, "address", "add", "10.77.0.1/24", "dev", "switch")
            _ip("-n", switch, "link", "set", "switch", "up")
            for number, host in enumerate(self.hosts):
                space, port = f"{self.prefix}{number}", f"port{number}"
                peer = ["type", "veth", "peer", "name", "eth0", "netns", space]
                _ip("-n", switch, "link", "add", port, *peer)
                _ip("-n", switch, "link", "set", port, "master", "switch", "up")
                _ip("-n", space, "address", "add", f"10.77.0.{10 + number}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
                stack.callback(host.kill)
            command = [*self._inside(switch, "login"), sys.executable, "-c", _STORE]
            command += self.endpoint.split(":")
            store = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
            stack.callback(store.wait)
            stack.callback(store.kill)
            assert store.stdout is not None
            assert store.stdout.readline() == b"listens\n"
            yield

    def link(self, number: int, state: str) -> None:
        """Cuts the link of a host (`down`), or mends it (`up`)."""
        _ip("-n", f"{self.prefix}s", "link", "set", f"port{number}", state)
