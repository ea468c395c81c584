"""`lightning-eff verify`: is a checkpoint whole, byte for byte, with the files of its ranks?"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

import torch

from lightning_eff.arguments import readable_size
from lightning_eff.cli.parser import Parser
from lightning_eff.plugins.async_checkpoint.checkpoint_file import damage, describe
from lightning_eff.plugins.sharded_folder import REST, folder_damage, folder_size, is_sharded_folder
from lightning_eff.training.rank_state import rank_state_files

_DESCRIPTION = """\
Check checkpoints without loading them into a model: that they are not cut off, and that no byte has changed since they
were written. Every .ckpt and .pt of torch.save has a checksum for each tensor, which torch.load never looks at. The
files of the ranks beside a checkpoint (<checkpoint>.ranks/) are checked too, and that none is missing. So is a folder
into which each rank has written its shards (FSDP2), but for its .metadata, which has no checksum.
"""
_EPILOG = "The exit status is 0 when all of it is whole, and 1 otherwise."


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each file; return 0 where all are whole."""
    args = make_parser().parse_args(argv)
    status = 0
    for path in args.files:
        for file, fault, remark in _verified(path):
            print(f"{file}: {fault or remark}", file=sys.stderr if fault else sys.stdout)
            status = 1 if fault else status
    return status


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser("lightning-eff verify", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("files", nargs="+", metavar="PATH", help="checkpoints; local paths or those of fsspec")
    return parser


def _verified(path: str) -> Iterator[tuple[str, str, str]]:
    """Of a checkpoint and the files of its ranks: name, what is wrong, and what is to be said if nothing is."""
    fault, remark = _check(path)
    yield path, fault, remark
    whole = os.path.join(path, REST) if os.path.isdir(path) else path
    if fault or not os.path.isfile(whole):
        return
    try:
        # Mapped and not read: only its few plain values come into memory.
        checkpoint = torch.load(whole, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # it holds a user's objects, which nobody unpickles here, or is of an older format
        return
    for file in rank_state_files(path, checkpoint) if isinstance(checkpoint, dict) else ():
        if os.path.isfile(file):
            yield file, *_check(file)
        elif os.path.isdir(os.path.dirname(file)):
            yield file, "missing: a run that resumes is without this state, on all ranks", ""
        else:
            yield file, "missing, with the whole folder: it belongs to the checkpoint and has to be moved with it", ""


def _check(path: str) -> tuple[str, str]:
    if is_sharded_folder(path):
        found = folder_damage(path)
        return (f"damaged: {found}", "") if found else ("", f"whole ({readable_size(folder_size(path))} in shards)")
    if os.path.isdir(path):
        return "is a folder, and no checkpoint", ""
    try:
        found = damage(path)
        if found is not None:
            return f"damaged: {found}", ""
        about = describe(path)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}", ""
    size = f"{about['records']} records, {readable_size(about['bytes'])}"
    if not about["checksums"]:
        return "", f"can be read, but was written without checksums: a flipped byte would not be seen ({size})"
    return "", f"whole ({size})"
