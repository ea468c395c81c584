"""MeCeFO's identities against float64, and that nothing is changed outside of a neighbour's passes."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from examples.gpt.model import GPT, GPTConfig
from lightning_eff.functional.mecefo import (
    Divisors,
    MeCeFO,
    divisors,
    leading_right_singular_vectors,
    low_rank_linear,
)
from lightning_eff.structure.parts import find_block_parts

CONFIG = GPTConfig(block_size=16, n_layer=3, n_head=2, n_embd=8)


def gpt(dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(1)
    model = GPT(CONFIG).to(dtype)
    for parameter in model.parameters():  # as after some training: no gradient is tiny
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(seed))


def reference_loss(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The cheap forward pass written out: the attention branch detached, the rest plain autograd."""
    from examples.gpt.model import rotary_angles

    angles = rotary_angles(tokens.shape[1] - 1, CONFIG.n_embd // CONFIG.n_head, tokens.device)
    x = model.embed(tokens[:, :-1])
    for block in model.blocks:
        x = x + block.attn(block.norm_attn(x), angles.cos(), angles.sin()).detach()
        x = x + block.mlp(block.norm_mlp(x))
    return F.cross_entropy(model.head(model.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def exact_grads(model: GPT, tokens: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.loss(tokens).backward()
    return grads(model)


def cheap_grads(model: GPT, mecefo: MeCeFO, tokens: torch.Tensor) -> dict[str, torch.Tensor | None]:
    with mecefo.neighbour(0):
        model.loss(tokens).backward()
    return grads(model)


def is_attention(name: str) -> bool:
    return ".attn." in name or "norm_attn" in name


# --- the low-rank weight gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "inner"), [(12, 5), (5, 12), (7, 7)])
@pytest.mark.parametrize("singular", [False, True])
def test_leading_vectors_are_those_of_the_svd(out, inner, singular):
    torch.manual_seed(0)
    weight = torch.randn(out, inner, dtype=torch.float64)
    if singular:
        weight[1:3] = weight[0]
    for rank in range(1, min(out, inner) + 1 - 2 * singular):
        expected = torch.linalg.svd(weight, full_matrices=False).Vh[:rank].T
        vectors = leading_right_singular_vectors(weight, rank)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(vectors @ vectors.T, expected @ expected.T, rtol=0, atol=1e-7)
    full = leading_right_singular_vectors(weight, min(out, inner))
    torch.testing.assert_close(full.T @ full, torch.eye(min(out, inner), dtype=torch.float64), rtol=0, atol=1e-12)


def test_vectors_of_a_weight_of_zeros_are_orthonormal():
    vectors = leading_right_singular_vectors(torch.zeros(3, 8), 3)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3))
    assert leading_right_singular_vectors(torch.randn(6, 4, dtype=torch.bfloat16), 2).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(9, 6), (2, 3, 6), (6,)])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_gradient_is_the_exact_one_on_the_leading_vectors(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(6, 10, bias=bias, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(*shape[:-1], 10, dtype=torch.float64)

    (layer(x) * probe).sum().backward()
    exact = layer.weight.grad.clone()
    rest = [x.grad.clone(), *([layer.bias.grad.clone()] if bias else [])]
    for rank in (1, 3, 6):
        x.grad = None
        layer.zero_grad()
        vectors = leading_right_singular_vectors(layer.weight, rank)
        y = low_rank_linear(x, layer.weight, layer.bias, vectors)
        assert torch.equal(y, layer(x))
        (y * probe).sum().backward()
        expected = exact if rank == 6 else exact @ (vectors @ vectors.T)  # all of them: exact, up to rounding
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=1e-12)
        assert all(
            torch.equal(a, b) for a, b in zip(rest, [x.grad, layer.bias.grad] if bias else [x.grad], strict=True)
        )


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1000, 2])
def test_a_neighbours_pass_is_the_reference(rank):
    """Attention: none. All else: the gradient behind detached attentions, low-rank in the feed-forward matrices."""
    model, tokens = gpt(), batch()
    mecefo = MeCeFO(model, rank=rank)
    vectors = {
        name: leading_right_singular_vectors(layer.weight, min(rank, *layer.weight.shape))
        for name, layer in mecefo.linears.items()
    }
    with mecefo.neighbour(0):
        loss = model.loss(tokens)
        loss.backward()
    got = grads(model)
    expected_loss = reference_loss(model, tokens)
    expected_loss.backward()
    expected = grads(model)
    assert torch.equal(loss, model.loss(tokens))  # the forward pass is the same
    # Not wider than the rank: exact, which for rank 1000 is `up`; `down` keeps the rows' space of its weight at most.
    assert len(vectors) == (3 if rank == 1000 else 6)
    for name, gradient in got.items():
        if is_attention(name):
            assert gradient is None
            continue
        layer = name.removesuffix(".weight")
        wanted = expected[name]
        if layer in vectors:
            basis = vectors[layer]
            wanted = wanted @ basis @ basis.T
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_skipped_are_the_attentions_and_their_norms():
    model = gpt()
    mecefo = MeCeFO(model)
    assert len(mecefo.skipped) == 3 * 4
    model.eval()
    with mecefo.watch(), torch.no_grad():
        model.loss(batch())  # a validation before the training tells nothing
    assert len(mecefo.skipped) == 3 * 4
    with mecefo.watch():
        model.loss(batch())
    assert mecefo.skipped == {p for name, p in model.named_parameters() if is_attention(name)}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_means_over_four_shards_with_one_dead_replica():
    """Replica 3 is dead and 2 its neighbour: attention is the mean over {0, 1}, all else over all four tasks."""
    model = gpt()
    mecefo = MeCeFO(model, rank=2)
    owners = [0, 1, 2, 2]
    shards = [batch(shard) for shard in range(4)]
    tasks = [
        exact_grads(model, tokens) if owner < 2 else cheap_grads(model, mecefo, tokens)
        for owner, tokens in zip(owners, shards, strict=True)
    ]
    by = divisors(owners)
    assert by == Divisors(skipped=2, others=4)
    for name, parameter in model.named_parameters():
        contributions = [task[name] for task in tasks if task[name] is not None]
        skipped = parameter in mecefo.skipped
        assert len(contributions) == (by.skipped if skipped else by.others)
        mean = sum(contributions) / (by.skipped if skipped else by.others)
        torch.testing.assert_close(mean, torch.stack(contributions).mean(0))
        if skipped:  # nothing is approximated in it
            exact = (tasks[0][name] + tasks[1][name]) / 2
            assert torch.equal(mean, exact)


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ([0, 1, 2, 3], (4, 4)),
        ([0, 0, 2, 3], (2, 4)),
        ([0, 0, 2, 2], (0, 4)),
        ([5, 5, 5, 1], (1, 4)),
        ([0], (1, 1)),
    ],
)
def test_divisors(owners, expected):
    assert divisors(owners) == expected


def test_nothing_is_approximated_outside():
    """After a failure, and beside it, gradients are bit-equal to those of a model that never had one."""
    untouched, model, tokens = gpt(torch.float32), gpt(torch.float32), batch()
    mecefo = MeCeFO(model, rank=1)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = exact_grads(untouched, tokens)
    for _ in range(2):
        cheap = cheap_grads(model, mecefo, tokens)
        got = exact_grads(model, tokens)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert not torch.allclose(cheap["blocks.0.mlp.up.weight"], expected["blocks.0.mlp.up.weight"])
    with pytest.raises(ZeroDivisionError), mecefo.neighbour(0):
        model.loss(tokens) / (1 // 0)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_micro_batches_accumulate():
    model = gpt()
    mecefo = MeCeFO(model, rank=2)
    single = [cheap_grads(model, mecefo, batch(n)) for n in (0, 1)]
    with mecefo.neighbour(0):
        for n in (0, 1):
            model.loss(batch(n)).backward()
    for name, gradient in grads(model).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, single[0][name] + single[1][name])


def test_autocast():
    model, tokens = gpt(torch.float32), batch()
    mecefo = MeCeFO(model, rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        expected_loss = model.loss(tokens)
    linears = mecefo.linears
    with torch.autocast("cpu", torch.bfloat16):
        reference = reference_loss(model, tokens)
    reference.backward()
    wanted = grads(model)
    with mecefo.neighbour(0):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(tokens)
        loss.backward()
    assert torch.equal(loss, expected_loss)
    for name, gradient in grads(model).items():
        if is_attention(name):
            assert gradient is None
            continue
        expected = wanted[name]
        if (layer := name.removesuffix(".weight")) in linears:
            basis = leading_right_singular_vectors(linears[layer].weight, 2)
            expected = expected @ basis @ basis.T
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.01 * expected.norm()


class DropoutBlock(nn.Module):
    """Pre-norm with dropout in the network, on a width that says which part is which."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.5), nn.Linear(4 * width, width))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Parallel(DropoutBlock):
    """One norm for both branches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln1(x)
        return self.ln2(x + self.attend(y) + self.mlp(y))


class PostNorm(DropoutBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ln1(x + self.attend(x))
        return self.ln2(x + self.mlp(x))


class Stack(nn.Module):
    def __init__(self, block: type[nn.Module] = DropoutBlock, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x.square().sum()


def test_recomputation_draws_the_same_dropout():
    model, x = Stack().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    mecefo = MeCeFO(model, rank=2)
    with contextlib.ExitStack() as stack:
        for block in model.blocks:
            attn = block.attn
            stack.callback(setattr, attn, "forward", attn.forward)
            attn.forward = lambda *a, f=attn.forward, **k: tuple(o if o is None else o.detach() for o in f(*a, **k))
        torch.manual_seed(3)
        model(x).backward()
    for block in model.blocks:
        vars(block.attn).pop("forward")
    expected = grads(model)
    torch.manual_seed(3)
    with mecefo.neighbour(0):
        model(x).backward()
    for name, gradient in grads(model).items():
        if gradient is None:
            assert ".attn." in name or ".ln1." in name
        elif ".mlp." in name and name.endswith("weight"):
            assert torch.linalg.matrix_rank(gradient) <= 2
        else:
            torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize(("block", "norms"), [(DropoutBlock, ["ln1"]), (Parallel, []), (PostNorm, [])])
@pytest.mark.parametrize("cheap", [False, True])
def test_a_norm_is_skipped_where_it_works_for_the_attention_alone(block, norms, cheap):
    model = Stack(block)
    mecefo = MeCeFO(model)
    with mecefo.neighbour(0) if cheap else mecefo.watch():
        model(torch.randn(2, 5, 3)).backward()
    names = {p: name for name, p in model.named_parameters()}
    skipped = {names[p] for p in mecefo.skipped}
    assert skipped == {name for name in names.values() if ".attn." in name or any(f".{n}." in name for n in norms)}
    if cheap:
        assert {name for name, p in model.named_parameters() if p.grad is None} == skipped


def test_with_a_users_activation_checkpointing():
    torch.manual_seed(0)
    model, x = Stack(checkpointed=True).eval(), torch.randn(2, 5, 3)
    mecefo = MeCeFO(model, rank=2)
    with mecefo.neighbour(0):
        model(x).backward()
    first = grads(model)
    model.checkpointed = False
    with mecefo.neighbour(0):
        model(x).backward()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first.values(), grads(model).values(), strict=True))


def test_a_compiled_model():
    plain, model, tokens = gpt(), gpt(), batch()[:, :-1]
    compiled = torch.compile(model, backend="aot_eager")
    mecefo = MeCeFO(compiled, rank=2)
    reference = MeCeFO(plain, rank=2)
    for model_, watcher in ((compiled, mecefo), (plain, reference)):
        with watcher.watch():
            model_(tokens)
    compiled(tokens).sum().backward()
    plain(tokens).sum().backward()
    first, expected = grads(model), grads(plain)
    for name in first:
        torch.testing.assert_close(first[name], expected[name])
    assert len(mecefo.skipped) == len(reference.skipped) == 3 * 6
    with mecefo.neighbour(0):
        compiled(tokens).sum().backward()
    with reference.neighbour(0):
        plain(tokens).sum().backward()
    cheap, expected = grads(model), grads(plain)
    assert cheap["blocks.1.attn.out.weight"] is None
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(cheap.values(), expected.values(), strict=True))
    compiled(tokens).sum().backward()  # and exact again
    assert all(torch.allclose(grad, first[name]) for name, grad in grads(model).items())


def test_vectors_are_computed_every_so_many_steps(monkeypatch):
    from lightning_eff.functional import mecefo as module

    calls: list[int] = []
    compute = module.leading_right_singular_vectors
    monkeypatch.setattr(
        module, "leading_right_singular_vectors", lambda weight, rank: calls.append(rank) or compute(weight, rank)
    )
    mecefo = MeCeFO(gpt(), rank=0.5, every_n_steps=10)
    for step in (3, 3, 4, 9, 10, 19, 40):
        with mecefo.neighbour(step):
            pass
    assert calls == [4] * 6 * 3


def test_activations_that_are_kept():
    """Bytes held for the backward pass: less than half of the exact pass's."""
    model, tokens = gpt(torch.float32), batch()
    mecefo = MeCeFO(model, rank=2)

    def kept() -> int:
        # The graph holds what the hook returns. A tensor saved by an operation that ends within the forward (the
        # neighbour's detached branches) is gone by its end, and its memory may be another's: what lives is counted.
        packed: weakref.WeakSet[Packed] = weakref.WeakSet()

        class Packed:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor
                packed.add(self)

        with torch.autograd.graph.saved_tensors_hooks(Packed, lambda held: held.tensor):
            loss = model.loss(tokens)
        storages = {
            held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage()
            for held in packed
            if not isinstance(held.tensor, nn.Parameter)
        }
        loss.backward()
        return sum(storage.nbytes() for storage in storages.values())

    exact = kept()
    with mecefo.neighbour(0):
        cheap = kept()
    assert cheap < 0.5 * exact


# --- finding the parts -----------------------------------------------------------------------------------------------


def test_parts_of_a_decoder_with_cross_attention():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 32, batch_first=True), 2)
    parts = find_block_parts(decoder)
    assert list(parts[0].attention) == ["layers.0.self_attn", "layers.0.multihead_attn"]
    mecefo = MeCeFO(decoder, rank=2)
    with mecefo.neighbour(0):
        decoder(torch.randn(2, 3, 8), torch.randn(2, 3, 8)).pow(3).sum().backward()
    assert all(p.grad is None for name, p in decoder.named_parameters() if "attn" in name)
    assert torch.linalg.matrix_rank(decoder.layers[1].linear1.weight.grad) == 2


def test_parts_by_pattern():
    parts = find_block_parts(gpt(), attention="*.attn.*", ffn=["*.mlp", "*.mlp.up"])
    assert list(parts[0].attention) == [f"blocks.0.attn.{name}" for name in ("query", "key", "value", "out")]
    assert list(parts[0].ffn) == ["blocks.0.mlp"]
    assert [part.name for part in parts] == ["blocks.0", "blocks.1", "blocks.2"]


class AttentionWithResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.inner(x, x, x, need_weights=False)[0])


class BertLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = AttentionWithResidual()
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x)
        return x + self.mlp(x)


def test_a_residual_inside_the_attention_is_an_error_and_a_pattern_mends_it():
    mecefo = MeCeFO(Stack(BertLike))
    with pytest.raises(ValueError, match=r"blocks.0.attention holds the residual connection of blocks.0"):  # noqa: SIM117
        with mecefo.neighbour(0):
            mecefo.parts[0].block(nn.Linear(3, 8)(torch.randn(1, 2, 3)))
    model = Stack(BertLike)
    mecefo = MeCeFO(model, attention="*.inner")
    with mecefo.neighbour(0):
        model(torch.randn(2, 5, 3)).backward()
    assert model.embed.weight.grad.abs().sum() > 0
    assert model.blocks[0].attention.inner.in_proj_weight.grad is None
    assert model.blocks[0].attention.norm.weight.grad is not None


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {}, "no attention .* there are no repeated blocks"),
        (
            lambda: nn.Sequential(*(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4)) for _ in range(2))),
            {},
            "no attention",
        ),
        (gpt, dict(attention="*.nothing"), r"attention='\*.nothing' matches no module. There are: embed"),
        (gpt, dict(ffn="*.nothing"), r"ffn='.*matches no module"),
        (gpt, dict(rank=0), "rank=0 is not allowed"),
        (gpt, dict(rank=1.5), "rank=1.5 is not allowed"),
        (gpt, dict(rank=True), "rank=True is not allowed"),
        (gpt, dict(every_n_steps=0), "every_n_steps=0 is not allowed"),
    ],
)
def test_bad_input(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        MeCeFO(model(), **arguments)
