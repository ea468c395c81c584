"""Models of packages that are built on Lightning: more rows of the table, each by hand from its model's source.

Most are no transformers. What repeats is what the finder's own page says: siblings of one class, in a container or as
attributes, whatever their sizes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from tests.structure.architectures import Architecture


def _scvi(layers: int) -> nn.Module:
    model: nn.Module = import_module("scvi.module").VAE(60, n_batch=2, n_hidden=32, n_layers=layers)
    return model


def _chemprop(passing: str, layers: int) -> nn.Module:
    modules: Any = import_module("chemprop.nn")
    with torch.device("cpu"):  # its metrics read what they hold when they are copied
        model: nn.Module = import_module("chemprop.models").MPNN(
            getattr(modules, passing)(), modules.MeanAggregation(), modules.RegressionFFN(n_layers=layers)
        )
    return model


def _tft() -> nn.Module:
    model: nn.Module = import_module("pytorch_forecasting").TemporalFusionTransformer(
        x_reals=["value"], time_varying_reals_encoder=["value"]
    )
    return model


def _nbeats() -> nn.Module:
    model: nn.Module = import_module("pytorch_forecasting").NBeats(context_length=8, prediction_length=4)
    return model


def _nhits() -> nn.Module:
    model: nn.Module = import_module("neuralforecast.models").NHITS(h=4, input_size=8, mlp_units=[[32, 32]] * 3)
    return model


def _itransformer() -> nn.Module:
    model: nn.Module = import_module("neuralforecast.models").iTransformer(
        h=4, input_size=8, n_series=2, hidden_size=32, n_heads=4, d_ff=64
    )
    return model


BUILT_ON_LIGHTNING = (
    # Two encoders, of z with its layers and of the library's size with one, each with a mean and a variance; the
    # decoder's layers repeat where there are two, and three heads read the last one.
    Architecture("scvi VAE", "scvi", lambda: _scvi(1), 2, 0, 0, 6, outside=("decoder.*",)),
    Architecture("scvi VAE, two layers", "scvi", lambda: _scvi(2), 4, 0, 0, 9, outside=("decoder.px_*_decoder.*",)),
    # Nothing repeats: W_i, W_h and W_o, which all messages pass, and a network of two layers, whose last is the head.
    Architecture(
        "chemprop MPNN", "chemprop", lambda: _chemprop("BondMessagePassing", 1), 0, 0, 0, outside=("predictor.ffn.1.*",)
    ),
    # The network's layers repeat, behind its first: they are less than half, so that all hidden matrices are taken. Its
    # name is the package's own, "ffn".
    Architecture(
        "chemprop MPNN over atoms, deeper network",
        "chemprop",
        lambda: _chemprop("AtomMessagePassing", 3),
        3,
        0,
        3,
        outside=("predictor.ffn.3.*",),
    ),
    # Six gated residual networks of three matrices, one with a context; gates that they are made of stand beside them,
    # too. One of three variable selections has weights; attention and recurrent networks occur once. The six are 49 %,
    # so that all hidden matrices are taken.
    Architecture("pytorch-forecasting TFT", "pytorch_forecasting", _tft, 6, 0, 0, 19, outside=("output_layer.*",)),
    # Three blocks for the trend and three for seasons, each three layers and the expansion's coefficients.
    Architecture("pytorch-forecasting N-BEATS", "pytorch_forecasting", _nbeats, 6, 0, 0, 24),
    # Three blocks of five layers: into the network, three within, and the coefficients.
    Architecture("neuralforecast NHITS", "neuralforecast", _nhits, 3, 0, 0, 15),
    # Two layers: query, key, value, output, and a network of two convolutions of width one.
    Architecture(
        "neuralforecast iTransformer",
        "neuralforecast",
        _itransformer,
        2,
        8,
        0,
        4,
        outside=("enc_embedding.*", "projector.*"),
    ),
)
