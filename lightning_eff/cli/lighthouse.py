"""`lightning-eff lighthouse`: the rendezvous of the replicas of a fault-tolerant run."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any

from lightning_eff.arguments import check_address
from lightning_eff.cli.parser import Parser

PORT = 29510

_DESCRIPTION = """\
The rendezvous of the replicas of a fault-tolerant run: it knows who is alive and tells each step who takes part.
`lightning-eff launch` has one of its own unless it is given another's address. It holds no state that a run needs:
it may be killed and started again on its port.
"""

_EPILOG = """\
There is no authentication: whoever reaches the port can join a run or disturb it. Bind it to the address of a private
network, never to one that strangers reach. The port also serves an HTTP page of who is there, with a button for each
replica that kills it: torchft offers no way to leave it out.
"""

_MISSING = (
    "torchft cannot be found. It comes with: pip install 'lightning-eff[ft]' (wheels for Linux on x86-64, Python 3.9 to"
    " 3.13; elsewhere it must be built from its sources)"
)


def add_timing_arguments(parser: argparse._ActionsContainer, heartbeat_timeout: float) -> None:
    """The arguments of a lighthouse that `launch` has as well, with another default for one of them."""
    parser.add_argument("--min-replicas", type=int, default=1, help="no step is made with fewer (default %(default)s)")
    parser.add_argument(
        "--heartbeat-timeout",
        type=float,
        default=heartbeat_timeout,
        metavar="SECONDS",
        help="silence after which a replica is taken for dead (default %(default)s)",
    )
    parser.add_argument(
        "--join-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long the others wait for a replica that is alive but busy, with a save, say (default %(default)s)",
    )
    parser.add_argument(
        "--quorum-tick",
        type=float,
        default=0.02,
        metavar="SECONDS",
        help="how often the lighthouse looks whether all are there; up to so much is added to a step"
        " (default %(default)s)",
    )


def timing_arguments(args: argparse.Namespace) -> list[str]:
    """Parsed ones as a command line again."""
    names = ("min_replicas", "heartbeat_timeout", "join_timeout", "quorum_tick")
    return [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


def check_timing(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message for values that make no sense."""
    if args.min_replicas < 1:
        parser.error(f"--min-replicas must be at least 1, got {args.min_replicas}")
    for name in ("heartbeat_timeout", "join_timeout", "quorum_tick"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser("lightning-eff lighthouse", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "--bind",
        default=f"127.0.0.1:{PORT}",
        metavar="HOST:PORT",
        help="address to listen on; port 0 takes a free one (default %(default)s)",
    )
    add_timing_arguments(parser, heartbeat_timeout=5.0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_timing(parser, args)
    try:
        host, port = check_address("--bind", args.bind)
    except ValueError as error:
        parser.error(str(error))
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # in the server's threads as well: `sigwait` is to get them
    try:
        server = load_torchft().LighthouseServer(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            args.min_replicas,
            round(args.join_timeout * 1000),
            max(1, round(args.quorum_tick * 1000)),
            round(args.heartbeat_timeout * 1000),
        )
    except ImportError as error:
        print(f"lightning-eff lighthouse: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"lightning-eff lighthouse: cannot listen on {args.bind}: {error}", file=sys.stderr)
        return 1
    port = int(server.address().rpartition(":")[2])
    print(f"lighthouse on {host}:{port}, at least {args.min_replicas} replicas", flush=True)
    if not is_loopback(host):
        print(_EPILOG.replace("\n", " ").strip(), file=sys.stderr, flush=True)
    received = signal.sigwait(ends)
    server.shutdown()
    return 128 + received


def load_torchft() -> Any:
    """torchft's compiled part by itself.

    Importing the package brings torch, which takes seconds: a lighthouse that has died is to be back at once.
    """
    os.environ.setdefault("RUST_LOG", "error")  # else a line for each step
    package = PathFinder.find_spec("torchft")
    spec = package and PathFinder.find_spec("torchft._torchft", package.submodule_search_locations)
    if spec is None or spec.loader is None:
        raise ImportError(_MISSING)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
