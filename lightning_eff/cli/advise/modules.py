"""The model that is advised on: a class with its arguments, a config, or the tensors of a checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_eff.cli import need_jsonargparse
from lightning_eff.cli.complaints import complaint
from lightning_eff.cli.parser import Parser, UsageError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Shapes = Mapping[str, tuple[int, ...]]


def add_model_arguments(parser: Parser, title: str) -> argparse._ArgumentGroup:
    """The arguments that say which module it is, but for those of its class."""
    group = parser.add_argument_group(title)
    group.add_argument("--model", metavar="CLASS", help="a LightningModule; its arguments follow as --model.NAME=VALUE")
    group.add_argument("--config", type=Path, metavar="YAML", help="LightningCLI's, e.g. a run's config.yaml")
    return group


def parse(parser: Parser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those of the model's class."""
    args, rest = parser.parse_known_args(argv)
    options = [word for word in rest if word.startswith("-")]
    if rest and (args.model is None or rest[0] not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if unknown := [word for word in options if not word.startswith("--model.")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args, rest


def model_shapes(args: argparse.Namespace, model_arguments: Sequence[str]) -> tuple[str, Shapes]:
    """What the model is called, and the shapes of what is trained, by name."""
    if args.checkpoint is not None:
        from lightning_eff.merging import open_source

        source = open_source(args.checkpoint)
        again = {name for names in source.tied for name in names[1:]}
        shapes = {name: spec.shape for name, spec in source.specs.items() if spec.averaged and name not in again}
        # A checkpoint does not say which of its tensors are buffers, or frozen.
        return f"{args.checkpoint}, all of its floating tensors", _not_empty(shapes)
    if args.model is None and args.config is None:
        return "GPT-2, no model was given", _gpt2()
    module = build(args.model, model_arguments, args.config)
    return type(module).__name__, trained_shapes(module)


def trained_shapes(module: torch.nn.Module) -> Shapes:
    """Shapes of what is trained, by name."""
    return _not_empty({name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad})


def _not_empty(shapes: Shapes) -> Shapes:
    if not shapes:
        raise ValueError("the model has no trainable parameters")
    return shapes


def build(model: str | None, arguments: Sequence[str], config: Path | None) -> LightningModule:
    """Build a LightningModule without its memory, where it allows that."""
    need_jsonargparse("advise --model")
    import lightning as L
    import yaml  # type: ignore[import-untyped]
    from jsonargparse import ArgumentParser

    if os.getcwd() not in sys.path:  # as with `python -m`: a model in the current directory can be named
        sys.path.insert(0, os.getcwd())
    parser = ArgumentParser("lightning-eff advise", exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model", required=True)
    settings: dict[str, object] | str | None = None
    if config is not None:
        found = yaml.safe_load(config.read_text())
        settings = found.get("model") if isinstance(found, dict) else None
        if settings is None:
            raise UsageError(f"{config} is no config of LightningCLI: it holds no `model:`")
        if model is not None:
            given = settings if isinstance(settings, dict) else {}
            settings = {"class_path": model, "init_args": given.get("init_args", given)}
        elif isinstance(settings, dict) and "class_path" not in settings:
            raise UsageError(f"{config} does not say the class of the model: name it with --model")
    try:
        chosen = model if settings is None else settings
        text = chosen if isinstance(chosen, str) else json.dumps(chosen)
        parsed = parser.parse_args([f"--model={text}", *arguments])
        try:
            with torch.device("meta"):
                module = parser.instantiate_classes(parsed).model
                module.configure_model()
        except Exception:  # it reads its weights while it is built, or it cannot be built at all: then it says so below
            module = parser.instantiate_classes(parsed).model
            module.configure_model()
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        # jsonargparse lists what it has tried, one below the other; the class's own complaint is the innermost.
        raise UsageError(f"the model cannot be built: {complaint(_innermost(error), arguments)}") from error
    assert isinstance(module, L.LightningModule)
    return module


def _innermost(error: BaseException) -> str:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error)


def _gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocabulary, width), "wpe": (context, width)}
    for layer in range(layers):
        for name, rows, columns in (
            ("attn.c_attn", 3 * width, width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            shapes |= {f"h.{layer}.{name}.weight": (rows, columns), f"h.{layer}.{name}.bias": (rows,)}
        shapes |= {f"h.{layer}.{name}": (width,) for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}
