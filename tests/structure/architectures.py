"""What is in sixty and more architectures of other people's packages, written by hand from their sources.

Each is built from its config, on the meta device: nothing is downloaded. ``blocks`` is how many repeated blocks there
are, the next three how many matrices they have of each role in all, ``outside`` globs on the parameters of at least two
dimensions that no default selection should hold: embeddings, stems, heads, what lies between stages, tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One row of the table."""

    name: str
    package: str
    build: Callable[[], nn.Module]
    blocks: int
    attention: int
    ffn: int
    other: int = 0
    outside: tuple[str, ...] = ()


SMALL = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=160, vocab_size=100)
GPT = dict(n_embd=64, n_layer=3, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0)


def _hf(name: str, options: dict[str, Any] | None = None, **more: Any) -> nn.Module:
    transformers = import_module("transformers")
    config = getattr(transformers, f"{name}Config")(**(SMALL if options is None else options), **more)
    model: nn.Module = transformers.AutoModel.from_config(config)
    return model


def _of_hf(name: str, *counts: int, outside: tuple[str, ...] = (), label: str = "", **options: Any) -> Architecture:
    return Architecture(label or name, "transformers", partial(_hf, name, **options), *counts, outside=outside)


def _timm(name: str, **options: Any) -> nn.Module:
    model: nn.Module = import_module("timm").create_model(name, **options)
    return model


def _torchvision(name: str, **options: Any) -> nn.Module:
    model: nn.Module = getattr(import_module("torchvision.models"), name)(**options)
    return model


def _peft(config: str, **options: Any) -> nn.Module:
    peft = import_module("peft")
    model = import_module("transformers").AutoModelForCausalLM.from_config(
        import_module("transformers").LlamaConfig(**SMALL)
    )
    adapted: nn.Module = peft.get_peft_model(model, getattr(peft, config)(**options))
    return adapted


EMBED = ("*embed_tokens.weight",)
BERT = ("embeddings.*", "pooler.*")
VIT = ("*embeddings.*", "pooler.*")
TIMM_VIT = ("pos_embed", "cls_token", "dist_token", "patch_embed.*", "head*")
LORA = dict(r=4, target_modules=["q_proj", "v_proj"])
ADAPTED = ("*embed_tokens.weight", "*lm_head.weight", "*base_layer.weight")

ARCHITECTURES = (
    # decoders with rotary positions: q, k, v, o and gate, up, down
    _of_hf("Llama", 3, 12, 9, outside=EMBED),
    _of_hf("Mistral", 3, 12, 9, outside=EMBED, num_key_value_heads=2),
    _of_hf("Qwen2", 3, 12, 9, outside=EMBED, num_key_value_heads=2),
    _of_hf("Qwen3", 3, 12, 9, outside=EMBED, num_key_value_heads=2, head_dim=32),
    _of_hf("Gemma2", 3, 12, 9, outside=EMBED, num_key_value_heads=2, head_dim=32),
    _of_hf("Olmo2", 3, 12, 9, outside=EMBED),
    _of_hf("Granite", 3, 12, 9, outside=EMBED),
    _of_hf("StableLm", 3, 12, 9, outside=EMBED),
    _of_hf("Cohere", 3, 12, 9, outside=EMBED),
    _of_hf("Helium", 3, 12, 9, outside=EMBED, num_key_value_heads=2, head_dim=16),
    _of_hf("Phi", 3, 12, 6, outside=EMBED),
    _of_hf("Starcoder2", 3, 12, 6, outside=EMBED, num_key_value_heads=2),
    _of_hf("Phi3", 3, 6, 6, outside=EMBED, pad_token_id=0),  # qkv, o; gate and up fused, down
    _of_hf(
        "Llama",
        3,
        12,
        9,
        outside=EMBED,
        label="Llama, FFN as wide as the model",
        options={**SMALL, "intermediate_size": 64},
    ),
    # mixtures of experts, whose experts are bare stacks: gate and up, down; the router
    _of_hf("Mixtral", 3, 12, 6, 3, outside=EMBED),
    _of_hf(
        "Qwen2Moe",
        3,
        12,
        15,
        6,
        outside=EMBED,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
    ),  # and a shared expert with a gate of its own
    _of_hf("Olmoe", 3, 12, 6, 3, outside=EMBED, num_experts=4),
    # state spaces: in, convolution, x, dt, out; the states' A_log is no matrix
    _of_hf("Mamba", 3, 0, 0, 15, outside=("embeddings.weight", "*A_log")),
    _of_hf("Mamba2", 3, 0, 0, 9, outside=("embeddings.weight",), head_dim=16, num_heads=8),
    _of_hf("Rwkv", 3, 12, 9, outside=("embeddings.weight", "*time_mix_*")),
    _of_hf(
        "Jamba",
        3,
        4,
        8,
        11,
        outside=(*EMBED, "*A_log"),
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        use_mamba_kernels=False,
    ),
    # decoders of the older kinds
    _of_hf("GPT2", 3, 6, 6, outside=("wte.*", "wpe.*"), options=GPT),
    _of_hf("GPTBigCode", 3, 6, 6, outside=("wte.*", "wpe.*"), options=GPT),
    _of_hf("GPTJ", 3, 12, 6, outside=("wte.*",), options=GPT, rotary_dim=8),
    _of_hf("CodeGen", 3, 6, 6, outside=("wte.*",), options=GPT, rotary_dim=8),
    _of_hf(
        "GPTNeo",
        2,
        8,
        4,
        outside=("wte.*", "wpe.*"),
        options=dict(hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    ),
    _of_hf("GPTNeoX", 3, 6, 6, outside=("embed_in.*",)),
    _of_hf(
        "OPT",
        3,
        12,
        6,
        outside=("*embed_tokens.*", "*embed_positions.*"),
        options=dict(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=160,
            vocab_size=100,
            word_embed_proj_dim=64,
        ),
    ),
    _of_hf("Bloom", 3, 6, 6, outside=("word_embeddings.*",), options=dict(hidden_size=64, n_layer=3, n_head=4)),
    _of_hf("Falcon", 3, 6, 6, outside=("word_embeddings.*",)),
    _of_hf("Mpt", 3, 6, 6, outside=("wte.*",), options=dict(d_model=64, n_layers=3, n_heads=4, vocab_size=100)),
    # encoders
    _of_hf("Bert", 3, 12, 6, outside=BERT),
    _of_hf(
        "Bert",
        3,
        12,
        6,
        outside=BERT,
        label="Bert, FFN as wide as the model",
        options={**SMALL, "intermediate_size": 64},
    ),
    _of_hf("Bert", 1, 4, 2, outside=BERT, label="Bert, one layer", options={**SMALL, "num_hidden_layers": 1}),
    _of_hf("Roberta", 3, 12, 6, outside=BERT),
    _of_hf("Electra", 3, 12, 6, outside=("embeddings*",)),
    _of_hf(
        "DistilBert",
        3,
        12,
        6,
        outside=("embeddings.*",),
        options=dict(dim=64, n_layers=3, n_heads=4, hidden_dim=160, vocab_size=100),
    ),
    _of_hf("Albert", 1, 4, 2, outside=("embeddings.*", "encoder.embedding_hidden_mapping_in.*", "pooler.*")),
    _of_hf(
        "Deberta",
        3,
        12,
        6,
        outside=("embeddings.*", "encoder.rel_embeddings.*"),
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),  # in_proj, pos_proj, pos_q_proj, dense
    _of_hf(
        "DebertaV2",
        3,
        18,
        6,
        outside=("embeddings.*", "encoder.rel_embeddings.*"),
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    _of_hf("Longformer", 3, 21, 6, outside=BERT, attention_window=8),  # query, key, value twice: local and global
    _of_hf("BigBird", 3, 12, 6, outside=BERT),
    _of_hf(
        "XLNet",
        3,
        15,
        6,
        outside=("word_embedding.*", "mask_emb", "*_bias", "*seg_embed"),
        options=dict(d_model=64, n_layer=3, n_head=4, d_inner=160, vocab_size=100),
    ),  # q, k, v, o, r
    _of_hf(
        "Wav2Vec2",  # seven convolutions, the first of a class of its own, and three layers
        10,
        12,
        6,
        7,
        outside=(
            "masked_spec_embed",
            "feature_projection.*",
            "encoder.pos_conv_embed.*",
        ),
    ),
    # encoders with decoders: the latter have a second attention
    _of_hf(
        "T5",
        6,
        36,
        12,
        outside=("shared.*", "*relative_attention_bias.*"),
        options=dict(d_model=64, d_kv=16, d_ff=160, num_layers=3, num_heads=4, vocab_size=100),
    ),
    _of_hf(
        "Bart",
        6,
        36,
        12,
        outside=("shared.*", "*embed_*"),
        options=dict(
            d_model=64,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=160,
            decoder_ffn_dim=160,
            vocab_size=100,
        ),
    ),
    _of_hf(
        "Whisper",
        6,
        36,
        12,
        outside=("encoder.conv*", "*embed_*"),
        options=dict(
            d_model=64,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=160,
            decoder_ffn_dim=160,
            vocab_size=100,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
        ),
    ),
    # images
    _of_hf("ViT", 3, 12, 6, outside=VIT),
    _of_hf("Beit", 3, 12, 6, outside=VIT),
    _of_hf("Dinov2", 3, 12, 6, outside=VIT, options={**SMALL, "mlp_ratio": 4}),
    _of_hf(
        "CLIP",
        6,
        24,
        12,
        outside=("*embeddings.*", "*_projection.*"),
        options=dict(text_config=SMALL, vision_config={**SMALL, "patch_size": 16}),
    ),
    _of_hf(
        "Swin",
        4,
        16,
        8,
        outside=("embeddings.*", "*reduction.*", "*relative_position_bias_table"),
        options=dict(embed_dim=32, depths=[2, 2], num_heads=[2, 4]),
    ),
    _of_hf(
        "Swinv2",
        4,
        16,
        8,
        8,
        outside=("embeddings.*", "*reduction.*", "*logit_scale"),
        options=dict(embed_dim=32, depths=[2, 2], num_heads=[2, 4]),
    ),  # and a network that computes its bias
    _of_hf(
        "ConvNext",
        4,
        0,
        8,
        4,
        outside=("embeddings.*", "*downsampling_layer.*"),
        options=dict(depths=[2, 2], hidden_sizes=[16, 32], num_stages=2),
    ),
    # timm
    *(
        Architecture(name, "timm", partial(_timm, name), *counts, outside=outside)
        for name, counts, outside in (
            ("vit_tiny_patch16_224", (12, 24, 24), TIMM_VIT),
            ("deit_tiny_patch16_224", (12, 24, 24), TIMM_VIT),
            ("deit_tiny_distilled_patch16_224", (12, 24, 24), TIMM_VIT),
            ("mixer_s16_224", (8, 0, 32), ("stem.*", "head.*")),
            (
                "swin_tiny_patch4_window7_224",
                (12, 24, 24),
                ("patch_embed.*", "*reduction.*", "*relative_position_bias_table", "head.*"),
            ),
            ("convnext_tiny", (18, 0, 36, 18), ("stem.*", "*downsample.*", "head.*")),
            ("resnet18", (8, 0, 0, 19), ("conv1.*", "fc.*")),
            ("resnet50", (16, 0, 0, 52), ("conv1.*", "fc.*")),
            ("efficientnet_b0", (16, 0, 0, 79), ("conv_stem.*", "conv_head.*", "classifier.*")),
            ("regnety_002", (13, 0, 0, 69), ("stem.*", "head.*")),
        )
    ),
    # torchvision
    *(
        Architecture(f"torchvision {name}", "torchvision", partial(_torchvision, name), *counts, outside=outside)
        for name, counts, outside in (
            ("resnet18", (8, 0, 0, 19), ("conv1.*", "fc.*")),
            ("vit_b_16", (12, 24, 24), ("conv_proj.*", "class_token", "*pos_embedding", "heads.*")),
            ("densenet121", (58, 0, 0, 116), ("features.conv0.*", "*transition*", "classifier.*")),
            ("mobilenet_v2", (17, 0, 0, 50), ("features.0.*", "features.18.*", "classifier.*")),
            ("vgg11", (0, 0, 0, 0), ("classifier.6.*",)),
        )
    ),
    Architecture(
        "torchvision googlenet",
        "torchvision",
        partial(_torchvision, "googlenet", aux_logits=False, init_weights=False),
        *(9, 0, 0, 54),
        outside=("conv1.*", "conv2.*", "conv3.*", "fc.*"),
    ),
    # torch.nn
    Architecture(
        "nn.TransformerEncoder",
        "torch",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 160), 3, enable_nested_tensor=False),
        3,
        6,
        6,
    ),
    Architecture(
        "nn.TransformerDecoder",
        "torch",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 160), 3),
        3,
        12,
        6,
    ),
    Architecture("nn.Transformer", "torch", lambda: nn.Transformer(64, 4, 2, 2, 160), 4, 12, 8),
    Architecture(
        "MLP",
        "torch",
        lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)),
        0,
        0,
        0,
        outside=("4.*",),
    ),
    Architecture(
        "LSTM",
        "torch",
        lambda: nn.ModuleDict({"lstm": nn.LSTM(8, 16, 2), "head": nn.Linear(16, 2)}),
        0,
        0,
        0,
        outside=("head.*",),
    ),
    # PEFT on a Llama: what is adapted is a unit under its base weight, which is not trained
    *(
        Architecture(f"PEFT {name}", "peft", partial(_peft, config, **options), 3, 12, 9, outside=ADAPTED)
        for name, config, options in (
            ("LoRA", "LoraConfig", LORA),
            ("DoRA", "LoraConfig", {**LORA, "use_dora": True}),
            (
                "AdaLoRA",
                "AdaLoraConfig",
                {**LORA, "init_r": 6, "target_r": 4, "total_step": 10},
            ),
            ("LoHa", "LoHaConfig", LORA),
            ("OFT", "OFTConfig", dict(r=0, oft_block_size=8, target_modules=["q_proj", "v_proj"])),
        )
    ),
)
