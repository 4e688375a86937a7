"""Three hosts on one machine: network namespaces on a bridge, with Ray started on each.

A host has an address, processes, a link and a folder for Ray's files of its own. The rest of the
file system is shared, as a cluster's storage is. All is gone without trace afterwards. Needs root
and iproute2.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from commands import BIN
from ray_head import environment

PORT = 6379
DASHBOARD = 8265


def why_not() -> str:
    """Why there can be no hosts here; "": there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (iproute2)"
    probe = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


@dataclass(frozen=True)
class Host:
    """One network namespace; `link` is its end of the wire at the bridge."""

    name: str
    ip: str
    link: str

    def start(self, *command: str, own: str, log: Path, **env: str) -> "subprocess.Popen[bytes]":
        """Run `command` on the host, with an empty folder `own` that only its processes see."""
        private = ["ip", "netns", "exec", self.name, "sh", "-c", f'mount -t tmpfs tmpfs {own} && exec "$@"', "sh"]
        with log.open("ab") as output:
            return subprocess.Popen([*private, *command], env=environment(**env), stdout=output, stderr=output)

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """SIGKILL to all that runs on it, as if its plug were pulled."""
        for _ in range(50):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not self.pids():
                return
            time.sleep(0.1)
        raise AssertionError(f"processes of {self.name} do not end: {self.pids()}")

    def cut(self) -> None:
        """Take its link away: what runs on it goes on, alone."""
        _ip("link", "set", self.link, "down")


@dataclass(frozen=True)
class Cluster:
    """Ray on three hosts; the first has the head."""

    hosts: list[Host]
    log: Path

    @property
    def address(self) -> str:
        """Of the Jobs API, from outside the hosts."""
        return f"http://{self.hosts[0].ip}:{DASHBOARD}"


@contextlib.contextmanager
def ray_hosts(folder: Path, cpus: int, **env: str) -> Iterator[Cluster]:
    """Start three hosts with `cpus` CPUs each, ready for jobs.

    `env` is the environment of their Ray nodes.
    """
    started: list[subprocess.Popen[bytes]] = []
    temp = tempfile.mkdtemp(prefix="ray-")  # short: Ray makes sockets in it, whose names may have 107 characters
    with network(3) as hosts:
        cluster = Cluster(hosts, folder / "ray.log")
        common = ["--block", f"--num-cpus={cpus}", "--disable-usage-stats", "--object-store-memory=100000000"]
        try:
            for number, host in enumerate(hosts):
                head = ["--head", f"--port={PORT}", f"--dashboard-host={host.ip}", f"--dashboard-port={DASHBOARD}"]
                role = [*head, f"--temp-dir={temp}"] if number == 0 else [f"--address={hosts[0].ip}:{PORT}"]
                started.append(
                    host.start(
                        str(BIN / "ray"),
                        "start",
                        f"--node-ip-address={host.ip}",
                        *role,
                        *common,
                        own=temp,
                        log=cluster.log,
                        **env,
                    )
                )
                if number == 0:
                    _wait_for_head(cluster)
            _wait_for_nodes(cluster, len(hosts))
            yield cluster
        finally:
            for host in hosts:
                host.kill()
            for process in started:
                process.wait(30)
            shutil.rmtree(temp, ignore_errors=True)


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """`count` hosts that reach each other, and are reached from here, over a bridge."""
    mark = os.getpid() % 65536
    subnet = f"10.{64 + mark % 64}.{mark // 64 % 256}"
    bridge = f"swb{mark:x}"
    hosts = [Host(f"sw{mark:x}-{n}", f"{subnet}.{n}", f"swl{mark:x}-{n}") for n in range(1, count + 1)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{subnet}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in hosts:
            _ip("netns", "add", host.name)
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("link", "set", host.link, "master", bridge, "up")
            _ip("-n", host.name, "addr", "add", f"{host.ip}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", host.name, "link", "set", link, "up")
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(AssertionError):
                host.kill()
            _try_ip("netns", "del", host.name)
            _try_ip("link", "del", host.link)
        _try_ip("link", "del", bridge)


def _wait_for_head(cluster: Cluster) -> None:
    deadline = time.monotonic() + 150
    while subprocess.run(
        [str(BIN / "switchwork"), "jobs", "--to", cluster.address], env=environment(), capture_output=True, check=False
    ).returncode:
        assert time.monotonic() < deadline, cluster.log.read_text()
        time.sleep(1)


def _wait_for_nodes(cluster: Cluster, count: int) -> None:
    deadline = time.monotonic() + 150
    head = cluster.hosts[0]
    ask = [str(BIN / "python"), "-c", _COUNT, f"{head.ip}:{PORT}"]
    while True:
        said = subprocess.run(
            ["ip", "netns", "exec", head.name, *ask], env=environment(), capture_output=True, text=True, check=False
        )
        if said.stdout.strip() == str(count):
            return
        assert time.monotonic() < deadline, f"{said.stdout}{said.stderr}{cluster.log.read_text()}"
        time.sleep(1)


_COUNT = """
import sys
from ray._raylet import GcsClient
print(sum(info.state == 0 for info in GcsClient(address=sys.argv[1]).get_all_node_info().values()))
"""


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def _try_ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=False)
