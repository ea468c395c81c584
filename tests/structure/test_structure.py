"""Models as people write them, reduced to their modules: nothing here is ever run forward."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_eff.structure import blocks as blocks_module
from lightning_eff.structure import clean_named_parameters, describe_selection, find_blocks, select_matrices


def _tree(**children):
    """A module whose class stands for nothing: structure has to do without names of classes."""
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def _linear(*sizes, bias=False):
    return nn.Linear(*sizes, bias=bias)


class _Block(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class _Transposed(nn.Module):
    """A layer that stores its weight as (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))


def _stack(make, count=3):
    return nn.ModuleList(make() for _ in range(count))


def _nano_gpt(layer=_linear):
    block = lambda: _Block(  # noqa: E731
        ln_1=nn.LayerNorm(8),
        attn=_tree(c_attn=layer(8, 24), c_proj=layer(8, 8)),
        ln_2=nn.LayerNorm(8),
        mlp=_tree(c_fc=layer(8, 32), c_proj=layer(32, 8)),
    )
    transformer = _tree(wte=nn.Embedding(50, 8), wpe=nn.Embedding(16, 8), h=_stack(block), ln_f=nn.LayerNorm(8))
    model = _tree(transformer=transformer, lm_head=_linear(8, 50))
    model.lm_head.weight = transformer.wte.weight
    return model


def _llama(width=8, inner=8, keys=4, hidden=20):
    block = lambda: _Block(  # noqa: E731
        self_attn=_tree(
            q_proj=_linear(width, inner),
            k_proj=_linear(width, keys),
            v_proj=_linear(width, keys),
            o_proj=_linear(inner, width),
        ),
        mlp=_tree(gate_proj=_linear(width, hidden), up_proj=_linear(width, hidden), down_proj=_linear(hidden, width)),
    )
    model = _tree(embed_tokens=nn.Embedding(50, width), layers=_stack(block), norm=nn.LayerNorm(width))
    return _tree(model=model, lm_head=_linear(width, 50))


def _bert():
    block = lambda: _Block(  # noqa: E731
        attention=_tree(
            self=_tree(query=nn.Linear(8, 8), key=nn.Linear(8, 8), value=nn.Linear(8, 8)),
            output=_tree(dense=nn.Linear(8, 8), LayerNorm=nn.LayerNorm(8)),
        ),
        intermediate=_tree(dense=nn.Linear(8, 32)),
        output=_tree(dense=nn.Linear(32, 8), LayerNorm=nn.LayerNorm(8)),
    )
    encoder = _tree(layer=_stack(block))
    return _tree(embeddings=_tree(word=nn.Embedding(50, 8)), encoder=encoder, pooler=_tree(dense=_linear(8, 8)))


def _vit():
    block = lambda: _Block(  # noqa: E731
        ln_1=nn.LayerNorm(8),
        self_attention=nn.MultiheadAttention(8, 2, batch_first=True),
        mlp=nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(), nn.Linear(32, 8)),
    )
    return _tree(
        conv_proj=nn.Conv2d(3, 8, 4), encoder=_tree(layers=nn.Sequential(block(), block())), heads=_linear(8, 10)
    )


def _flat():
    """All six matrices directly in the block."""
    block = lambda: _Block(  # noqa: E731
        wq=_linear(8, 8), wk=_linear(8, 8), wv=_linear(8, 8), wo=_linear(8, 8), w1=_linear(8, 32), w2=_linear(32, 8)
    )
    return _tree(blocks=_stack(block), head=_linear(8, 4))


def _mixture():
    expert = lambda: _Block(w1=_linear(8, 6), w2=_linear(6, 8), w3=_linear(8, 6))  # noqa: E731
    block = lambda: _Block(  # noqa: E731
        attn=_tree(q=_linear(8, 16), kv=_linear(8, 8), o=_linear(16, 8)),
        moe=_tree(gate=_linear(8, 4), experts=_stack(expert, 4)),
    )
    return _tree(layers=_stack(block, 2))


def _roles(model):
    return [Counter(matrix.role for matrix in block.matrices) for block in find_blocks(model)]


@pytest.mark.parametrize(
    ("model", "family", "blocks", "roles"),
    [
        (_nano_gpt(), "transformer.h", 3, {"attention": 2, "ffn": 2}),
        (_nano_gpt(_Transposed), "transformer.h", 3, {"attention": 2, "ffn": 2}),
        (_llama(), "model.layers", 3, {"attention": 4, "ffn": 3}),
        (_llama(width=8, inner=16, keys=16, hidden=16), "model.layers", 3, {"attention": 4, "ffn": 3}),
        (_llama(hidden=6), "model.layers", 3, {"attention": 4, "ffn": 3}),
        (_bert(), "encoder.layer", 3, {"attention": 4, "ffn": 2}),
        (_vit(), "encoder.layers", 2, {"attention": 2, "ffn": 2}),
        (_flat(), "blocks", 3, {"attention": 4, "ffn": 2}),
        (_mixture(), "layers", 2, {"attention": 3, "ffn": 12, "other": 1}),
        (
            nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 32), 2),
            "layers",
            2,
            {"attention": 4, "ffn": 2},
        ),
    ],
    ids=["gpt", "gpt-transposed", "llama", "llama-wide", "llama-narrow", "bert", "vit", "flat", "mixture", "torch"],
)
def test_blocks_and_roles(model, family, blocks, roles):
    found = find_blocks(model)

    assert {block.family for block in found} == {family}
    assert _roles(model) == [roles] * blocks
    names = [matrix.name for block in found for matrix in block.matrices]
    parameters = clean_named_parameters(model)
    assert names == [name for name in parameters if name in set(names)]
    assert all(parameters[name].ndim == 2 for name in names)


def test_a_weight_of_each_role_by_name():
    matrices = {matrix.name: matrix.role for block in find_blocks(_mixture()) for matrix in block.matrices}

    assert matrices["layers.0.attn.kv.weight"] == "attention"
    assert matrices["layers.0.moe.gate.weight"] == "other"
    assert matrices["layers.1.moe.experts.3.w2.weight"] == "ffn"


def test_encoder_and_decoder_are_two_families():
    attention = lambda: _tree(q=_linear(8, 12), k=_linear(8, 12), v=_linear(8, 12), o=_linear(12, 8))  # noqa: E731
    hidden = lambda: _tree(wi=_linear(8, 16), wo=_linear(16, 8))  # noqa: E731
    encoder = lambda: _Block(layer=nn.ModuleList([attention(), hidden()]))  # noqa: E731
    decoder = lambda: _Block(layer=nn.ModuleList([attention(), attention(), hidden()]))  # noqa: E731
    # Both stacks are of one class, and so are the sublayers: neither is a block.
    model = _tree(
        shared=nn.Embedding(50, 8), encoder=_Block(block=_stack(encoder, 2)), decoder=_Block(block=_stack(decoder, 2))
    )

    assert [block.family for block in find_blocks(model)] == ["encoder.block"] * 2 + ["decoder.block"] * 2
    assert _roles(model) == [{"attention": 4, "ffn": 2}] * 2 + [{"attention": 8, "ffn": 2}] * 2


def test_lists_of_sublayers_of_one_class_are_blocks():
    class PreNorm(nn.Module):
        def __init__(self, fn):
            super().__init__()
            self.norm, self.fn = nn.LayerNorm(8), fn

    attention = lambda: _tree(to_qkv=_linear(8, 48), to_out=nn.Sequential(_linear(16, 8), nn.Dropout()))  # noqa: E731
    hidden = lambda: _tree(net=nn.Sequential(_linear(8, 16), nn.GELU(), _linear(16, 8)))  # noqa: E731
    model = _tree(layers=_stack(lambda: nn.ModuleList([PreNorm(attention()), PreNorm(hidden())])))

    assert [block.name for block in find_blocks(model)] == ["layers.0", "layers.1", "layers.2"]
    assert _roles(model) == [{"attention": 2, "ffn": 2}] * 3


def test_a_chain_of_square_layers_is_no_attention():
    chain = lambda: _Block(net=nn.Sequential(*[_linear(8, 8) for _ in range(4)]))  # noqa: E731

    assert _roles(_stack(chain)) == [{"other": 4}] * 3


def test_two_layers_and_a_gated_one_behind_them_are_no_attention():
    # A gated residual network; its shapes are those of a query, a fused key and value, and an output.
    block = lambda: _Block(fc1=_linear(16, 16), fc2=_linear(16, 16), gate=_linear(16, 32))  # noqa: E731
    found = find_blocks(_tree(first=block(), second=block()))
    assert [matrix.role for each in found for matrix in each.matrices] == ["other"] * 6


def test_a_list_of_bare_layers_is_no_block():
    heads = lambda: nn.ModuleList(_linear(16, 4) for _ in range(4))  # noqa: E731
    assert find_blocks(_tree(attention=_Block(queries=heads(), keys=heads(), value=_linear(16, 4)))) == []


def test_cross_attention_on_another_width():
    block = lambda: _Block(x=_tree(q=_linear(8, 8), k=_linear(6, 8), v=_linear(6, 8), o=_linear(8, 8)))  # noqa: E731

    assert _roles(_tree(layers=_stack(block, 2))) == [{"attention": 4}] * 2


def test_twice_as_many_blocks_are_twice_the_work(monkeypatch):
    seen = []
    kind = blocks_module._kind
    monkeypatch.setattr(blocks_module, "_kind", lambda module: (seen.append(module), kind(module))[1])
    asked = []
    for count in (40, 80):
        seen.clear()
        found = find_blocks(_tree(layers=_stack(lambda: nn.Sequential(_linear(4, 4), _linear(4, 4)), count)))
        assert len(found) == count
        asked.append(len(seen))
    assert asked[1] < 2.1 * asked[0]


def test_stages_are_looked_through_and_a_table_is_no_matrix():
    def block(width):
        table = nn.Parameter(torch.zeros(25, 3))
        attn = _tree(relative_position_bias_table=table, qkv=_linear(width, 3 * width), proj=_linear(width, width))
        return _Block(attn=attn, mlp=_tree(fc1=_linear(width, 4 * width), fc2=_linear(4 * width, width)))

    class Stage(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.blocks = nn.ModuleList([block(width), block(width)])
            self.downsample = _tree(reduction=_linear(4 * width, 2 * width))

    model = _tree(layers=nn.ModuleList([Stage(8), Stage(16)]))

    assert [block.name for block in find_blocks(model)] == [f"layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]
    assert _roles(model) == [{"attention": 2, "ffn": 2}] * 4


def _conv_block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def test_convolutional_blocks_of_any_sizes():
    model = nn.Sequential(
        _conv_block(1, 4), _conv_block(4, 8), nn.MaxPool2d(2), _conv_block(8, 8), nn.Flatten(), _linear(8, 2)
    )

    assert [block.name for block in find_blocks(model)] == ["0", "1", "3"]
    assert [m.name for m in select_matrices(model)] == ["0.0.weight", "1.0.weight", "3.0.weight"]
    assert _roles(model) == [{"other": 1}] * 3


def test_blocks_as_plain_attributes():
    block = lambda: _Block(up=_linear(8, 32), norm=nn.LayerNorm(8), down=_linear(32, 8))  # noqa: E731
    model = _tree(stem=_linear(3, 8), first=block(), second=block(), head=_linear(8, 2))

    assert [block.name for block in find_blocks(model)] == ["first", "second"]
    assert _roles(model) == [{"ffn": 2}] * 2


def test_tied_weights_and_shared_blocks_count_once():
    block = _Block(up=_linear(8, 32), down=_linear(32, 8))
    shared = nn.ModuleList([block] * 4)
    assert [b.name for b in find_blocks(shared)] == ["0"]

    tied = _stack(lambda: _Block(up=_linear(8, 32), down=_linear(32, 8)), 2)
    tied[1].up.weight = tied[0].up.weight
    assert [m.name for m in select_matrices(tied)] == ["0.up.weight", "0.down.weight", "1.down.weight"]
    # The head is tied to the embedding: one matrix, under its first name.
    assert [m.name for m in select_matrices(_nano_gpt(), include="*w?e*")] == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
    ]


class _PairInModules(nn.Module):
    def __init__(self, inputs, outputs, adapters=1):
        super().__init__()
        self.base_layer = _linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({f"a{i}": _linear(inputs, 2 + i) for i in range(adapters)})
        self.lora_B = nn.ModuleDict({f"a{i}": _linear(2 + i, outputs) for i in range(adapters)})


class _PairOfParameters(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.weight.requires_grad_(False)
        self.down = nn.Parameter(torch.zeros(2, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, 2))


@pytest.mark.parametrize(
    ("layer", "base", "pair"),
    [
        (_PairInModules, "base_layer.weight", ["lora_A.a0.weight", "lora_B.a0.weight"]),
        (_PairOfParameters, "weight", ["down", "up"]),
    ],
)
def test_a_low_rank_pair_is_one_unit(layer, base, pair):
    model = _nano_gpt(layer)
    matrices = find_blocks(model)[1].matrices

    assert [matrix.role for matrix in matrices] == ["attention", "attention", "ffn", "ffn"]
    path = "transformer.h.1.attn.c_attn."
    assert matrices[0].name == path + base
    assert matrices[0].parameters == tuple(path + name for name in pair)
    assert select_matrices(model, include=path + pair[1]) == [matrices[0]]


def test_only_some_layers_have_a_low_rank_pair_of_several_adapters():
    attn = lambda: _tree(  # noqa: E731
        q=_PairInModules(8, 8, adapters=2), k=_linear(8, 8), v=_PairInModules(8, 8), o=_linear(8, 8)
    )
    model = _stack(lambda: _Block(attn=attn()), 2)

    assert _roles(model) == [{"attention": 4}] * 2
    assert [len(matrix.parameters) for matrix in find_blocks(model)[0].matrices] == [4, 1, 2, 1]


def test_a_bottleneck_behind_a_layer_is_no_low_rank_pair():
    block = lambda: _Block(net=nn.Sequential(_linear(8, 8), _linear(8, 2), nn.ReLU(), _linear(2, 8)))  # noqa: E731

    assert len(find_blocks(_stack(block))[0].matrices) == 3


def test_a_pair_at_the_root():
    pair = _PairOfParameters(8, 8)

    assert [matrix.parameters for matrix in select_matrices(pair, include="*")] == [("down", "up")]


def test_wrappers_do_not_show_in_names(pool):
    plain = [matrix.name for matrix in select_matrices(_vit())]
    compiled = _vit()
    compiled.encoder = torch.compile(compiled.encoder)
    compiled.encoder.layers[1] = torch.compile(compiled.encoder.layers[1])

    assert [matrix.name for matrix in select_matrices(torch.compile(compiled))] == plain
    assert list(clean_named_parameters(compiled)) == [name for name, _ in _vit().named_parameters()]
    assert pool.run(_names_under_ddp) == [plain, plain]
    # A module that is merely called `module` keeps its name.
    assert select_matrices(_tree(module=_vit()))[0].name == "module." + plain[0]


def _names_under_ddp():
    model = nn.parallel.DistributedDataParallel(_vit())
    return [matrix.name for matrix in select_matrices(model)]


def test_patterns():
    model = _nano_gpt()
    names = lambda **patterns: [matrix.name for matrix in select_matrices(model, **patterns)]  # noqa: E731

    assert len(names()) == 12
    assert names(include="*.h.0.attn.*") == ["transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"]
    assert names(include=["*.h.*", "*wte*"], exclude=["*.mlp.*", "*.h.[01].*"]) == [
        "transformer.wte.weight",
        "transformer.h.2.attn.c_attn.weight",
        "transformer.h.2.attn.c_proj.weight",
    ]
    assert {matrix.block for matrix in select_matrices(model, include="*wte*")} == {""}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (SimpleNamespace(include="*.q_proj.*", exclude=None), r"include='\*.q_proj.\*'.*transformer.wte.weight, "),
        (SimpleNamespace(include=None, exclude=["*.mlp.*", "nothing"]), "exclude='nothing'.*There are: transformer"),
        (SimpleNamespace(include="*.mlp.*", exclude="*"), "exclude leaves nothing.*Candidates: transformer.wte"),
    ],
)
def test_a_pattern_that_selects_nothing_lists_candidates(patterns, message):
    with pytest.raises(ValueError, match=message):
        select_matrices(_nano_gpt(), patterns.include, patterns.exclude)


def test_without_repetition_all_hidden_matrices_are_taken():
    model = nn.Sequential(nn.Embedding(9, 4), _linear(4, 8), nn.ReLU(), _linear(8, 8), nn.ReLU(), _linear(8, 2))

    assert find_blocks(model) == []
    selected = select_matrices(model)
    assert [matrix.name for matrix in selected] == ["1.weight", "3.weight"]
    assert {(matrix.role, matrix.block) for matrix in selected} == {("other", "")}
    assert describe_selection(model, selected) == "2 matrices, 65 % of the trained weights; outside: 0.weight, 5.weight"
    assert len(select_matrices(model, include="*")) == 4
    with pytest.raises(ValueError, match="no matrix is selected: the model has none"):
        select_matrices(nn.Sequential(nn.BatchNorm1d(3)))


def test_blocks_that_are_a_small_part_are_not_taken_for_the_model():
    tower = _tree(first=_linear(8, 64), second=_linear(64, 64), third=_linear(64, 8))
    small = _stack(lambda: _Block(up=_linear(8, 32), down=_linear(32, 8)), 2)
    model = _tree(tower=tower, small=small, head=_linear(8, 2))

    assert len(find_blocks(model)) == 2  # 1,024 of 6,144 hidden weights
    assert [m.name for m in select_matrices(model)] == [
        *("tower.first.weight", "tower.second.weight", "tower.third.weight"),
        *("small.0.up.weight", "small.0.down.weight", "small.1.up.weight", "small.1.down.weight"),
    ]
    for parameter in tower.parameters():  # what is not trained does not count
        parameter.requires_grad_(False)
    assert len(select_matrices(model)) == 4


def test_the_last_of_layers_that_are_alike_is_the_head():
    layers = [nn.Sequential(nn.ReLU(), _linear(16, size)) for size in (16, 16, 1)]
    model = _tree(body=_linear(16, 64), rest=_linear(64, 16), layers=nn.Sequential(*layers))
    assert len(find_blocks(model)) == 3  # of a quarter of the weights
    assert [each.name for each in select_matrices(model)] == [
        "body.weight",
        "rest.weight",
        "layers.0.1.weight",
        "layers.1.1.weight",
    ]


def test_a_stack_of_one_is_a_stack():
    model = _tree(embed=nn.Embedding(9, 8), layers=_stack(lambda: _Block(up=_linear(8, 32), down=_linear(32, 8)), 1))

    assert [block.name for block in find_blocks(model)] == ["layers.0"]


def test_bare_experts_are_matrices_and_states_tables_and_biases_are_none():
    def block():
        experts = nn.Module()
        experts.gate_up_proj = nn.Parameter(torch.zeros(4, 32, 8))
        experts.down_proj = nn.Parameter(torch.zeros(4, 8, 16))
        experts.down_proj_bias = nn.Parameter(torch.zeros(4, 8))
        mixer = _tree(in_proj=_linear(8, 24), out_proj=_linear(12, 8))
        mixer.A_log = nn.Parameter(torch.zeros(12, 5))
        mixer.time_mix = nn.Parameter(torch.zeros(1, 1, 8))
        return _Block(mixer=mixer, experts=experts)

    names = [matrix.name for matrix in find_blocks(_stack(block, 2))[0].matrices]
    assert names == [
        "0.mixer.in_proj.weight",
        "0.mixer.out_proj.weight",
        "0.experts.gate_up_proj",
        "0.experts.down_proj",
    ]


def test_stages_of_one_block_and_of_many():
    class Stage(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            for index in range(blocks):
                setattr(self, f"b{index}", _Bottleneck())

    model = _tree(stem=_conv_block(3, 4), s1=Stage(1), s2=Stage(1), s3=Stage(3), head=_linear(4, 2))
    assert [block.name for block in find_blocks(model)] == ["s1.b0", "s2.b0", "s3.b0", "s3.b1", "s3.b2"]
    mixed = _tree(blocks=nn.Sequential(nn.Sequential(_Bottleneck()), nn.Sequential(_Bottleneck(), _Bottleneck())))
    assert [block.name for block in find_blocks(mixed)] == ["blocks.0.0", "blocks.1.0", "blocks.1.1"]


class _Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)


def test_a_stem_and_a_head_of_one_class_are_no_blocks():
    features = nn.Sequential(_conv_block(3, 4), _Bottleneck(), _Bottleneck(), _Bottleneck(), _conv_block(4, 8))

    assert [block.name for block in find_blocks(_tree(features=features))] == [f"features.{i}" for i in (1, 2, 3)]


def test_everything_beside_a_frozen_base_layer_is_its_adapter():
    class Adapted(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.base_layer = _linear(inputs, outputs).requires_grad_(False)
            self.lora_A = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, inputs))})
            self.lora_B = nn.ParameterDict({"a": nn.Parameter(torch.zeros(outputs, 2))})
            self.lora_E = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, 1))})

    matrices = find_blocks(_nano_gpt(Adapted))[0].matrices
    assert [matrix.role for matrix in matrices] == ["attention", "attention", "ffn", "ffn"]
    assert [len(matrix.parameters) for matrix in matrices] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("block", "roles"),
    [
        (lambda: _Block(attn=_square(4), up=_linear(8, 8), down=_linear(8, 8)), {"attention": 4, "ffn": 2}),
        (lambda: _Block(attention=_square(7), inner=_linear(8, 32), outer=_linear(32, 8)), {"attention": 7, "ffn": 2}),
        (
            lambda: _Block(
                attention=_square(4),
                feed_forward=_tree(key=_linear(8, 16), receptance=_linear(8, 8), value=_linear(16, 8)),
            ),
            {"attention": 4, "ffn": 3},
        ),
        (  # a state space model: its two projections have the shapes of a fused attention
            lambda: _Block(mixer=_tree(in_proj=_linear(8, 20), conv1d=nn.Conv1d(12, 12, 4), out_proj=_linear(16, 8))),
            {"other": 3},
        ),
        (  # a network that computes a bias of positions, below the attention
            lambda: _Block(
                attention=_tree(bias_mlp=nn.Sequential(_linear(2, 64), nn.ReLU(), _linear(64, 4)), qkv=_square(4)),
                up=_linear(8, 32),
                down=_linear(32, 8),
            ),
            {"attention": 4, "ffn": 2, "other": 2},
        ),
    ],
)
def test_roles(block, roles):
    assert _roles(_tree(layers=_stack(block, 2))) == [roles] * 2


def _square(count):
    return _tree(**{f"m{index}": _linear(8, 8) for index in range(count)})
