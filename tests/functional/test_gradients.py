"""The global norm against float64, over plain tensors and over DTensors on two ranks."""

import math

import pytest
import torch
from torch import nn

from harness.operators import OperatorCounter
from lightning_eff.functional.gradients import Gradients, squared_grad_norms
from tests.gpu_rounding import GpuRounding


def global_grad_norm(parameters):
    return Gradients(parameters).norm()


def parameters_with_grads(*grads):
    parameters = [nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    return parameters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (1,), (63,), (1023, 7), (0, 3)], ids=str)
def test_norm_equals_float64(dtype, shape):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    grads = [torch.randn(shape, dtype=wide).to(dtype) for _ in range(3)]
    expected = math.sqrt(sum(grad.to(wide).abs().square().sum().item() for grad in grads))
    norm = global_grad_norm(parameters_with_grads(*grads))
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    assert norm.item() == pytest.approx(expected, rel=1e-6)


def test_sixteen_bit_norm_has_more_than_three_digits():
    # 4096 x 4096 of 1e-3: a norm taken in bfloat16 is 4.0625.
    grad = torch.full((4096, 4096), 1e-3, dtype=torch.bfloat16)
    assert global_grad_norm(parameters_with_grads(grad)).item() == pytest.approx(4096 * grad[0, 0].item(), rel=5e-5)


def test_mixed_dtypes_and_missing_gradients():
    parameters = parameters_with_grads(torch.ones(4, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float64))
    parameters.append(nn.Parameter(torch.ones(100)))
    assert global_grad_norm(parameters).item() == pytest.approx(math.sqrt(7))
    assert global_grad_norm(parameters[2:]) is None
    assert global_grad_norm([]) is None


def test_non_contiguous_gradients():
    grad = torch.randn(8, 6)
    parameter = parameters_with_grads(grad)[0]
    parameter.grad = grad.t().contiguous().t()
    assert global_grad_norm([parameter]).item() == pytest.approx(grad.norm().item(), rel=1e-6)
    Gradients([parameter]).scale_(torch.tensor(0.5))
    assert torch.equal(parameter.grad, grad * 0.5)


def test_a_nonfinite_element_gives_a_nonfinite_norm():
    for bad in (math.nan, math.inf, -math.inf):
        assert not global_grad_norm(parameters_with_grads(torch.ones(5), torch.tensor([1.0, bad]))).isfinite()


def test_scale_works_in_place_on_every_dtype():
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
    tensors = [torch.full((3,), 2.0, dtype=dtype) for dtype in dtypes]
    Gradients(parameters_with_grads(*tensors)).scale_(torch.tensor(0.25, dtype=torch.float64))
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        assert torch.equal(tensor, torch.full((3,), 0.5, dtype=dtype))


def test_scaling_bfloat16_does_not_round_the_coefficient():
    tensor = torch.full((1,), 384.0, dtype=torch.bfloat16)
    Gradients(parameters_with_grads(tensor)).scale_(torch.tensor(1 / 3))
    assert tensor.item() == 128.0  # with 1/3 rounded to bfloat16 it would be 128.5, rounded to 128 or 129


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [7, 2**13])
def test_a_gpu_does_not_round_the_coefficient_either(dtype, size):
    values = torch.randn(size).to(dtype)
    coefficient = torch.tensor(0.7012345, dtype=torch.float64)
    parameters = parameters_with_grads(values.clone())
    with GpuRounding():
        Gradients(parameters).scale_(coefficient)
    assert torch.equal(parameters[0].grad, (values.float() * coefficient.float()).to(dtype))
    with GpuRounding():
        rounded = values * coefficient.float()
    assert not torch.equal(rounded, parameters[0].grad)  # what is guarded against


def test_a_norm_takes_one_operator_beside_the_sum(monkeypatch):
    total = torch.tensor(25.0, dtype=torch.float64)
    parameters = parameters_with_grads(torch.tensor([3.0]), torch.tensor([4.0, 0.0]))
    monkeypatch.setattr("lightning_eff.kernels.grad_norm.sum_of_squares", lambda _: total)
    with OperatorCounter() as counter:
        assert Gradients(parameters).norm() is not None
    assert counter.operators == {"aten::sqrt": 1}


def test_squared_norms_are_each_groups_own_whatever_its_members():
    sizes = [[(3, 4), (5,)], [(3, 4)], [], [(2**13,), (), (3, 4)]]
    groups = [parameters_with_grads(*(torch.randn(shape) for shape in shapes)) for shapes in sizes]
    groups[3].append(nn.Parameter(torch.zeros(2)))  # without a gradient
    expected = [sum(p.grad.double().square().sum().item() for p in group if p.grad is not None) for group in groups]
    assert squared_grad_norms(groups).tolist() == pytest.approx(expected, rel=1e-6)
    assert squared_grad_norms([[nn.Parameter(torch.zeros(2))]]) is None


def test_zero_nonfinite():
    large = torch.ones(2**13)
    large[5] = math.nan
    tensors = [torch.tensor([1.0, math.nan, math.inf, -math.inf]), torch.ones(2), large]
    Gradients(parameters_with_grads(*tensors)).scale_(torch.tensor(0.0), zero_nonfinite=True)
    assert [t.tolist() for t in tensors] == [[0.0] * 4, [0.0] * 2, [0.0] * 2**13]


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"shape \(5, 3\) is sparse .*sparse=False"):
        global_grad_norm(list(embedding.parameters()))


def _fsdp2_norms(dtype_name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from harness.operators import OperatorCounter

    results = {}
    for kind in ("fsdp", "hsdp"):
        mesh = (
            init_device_mesh("cpu", (2,))
            if kind == "fsdp"
            else init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        )
        torch.manual_seed(0)
        # 5 rows over two ranks are uneven, 1 row leaves rank one without an element.
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1, bias=False)).to(getattr(torch, dtype_name))
        fully_shard(model, mesh=mesh)
        plain = nn.Parameter(torch.zeros(2))
        plain.grad = torch.tensor([3.0, 4.0])
        model(torch.ones(2, 7, dtype=getattr(torch, dtype_name))).sum().backward()
        parameters = [*model.parameters(), plain]
        with OperatorCounter() as counter:
            norm = global_grad_norm(parameters)
        full = [parameter.grad.full_tensor().double() for parameter in model.parameters()]
        expected = math.sqrt(sum(grad.square().sum().item() for grad in full) + 25)
        Gradients(parameters).scale_(torch.tensor(0.5))
        after = [parameter.grad.full_tensor().double() for parameter in model.parameters()]
        halved = all(torch.equal(a, f * 0.5) for a, f in zip(after, full, strict=True))
        results[kind] = (norm.item(), expected, counter.collectives, halved)
        for parameter in model.parameters():
            parameter.grad = None
        results[kind] += (global_grad_norm(list(model.parameters())).item(),)
    return results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharded_gradients_have_the_norm_of_the_whole(pool, dtype):
    first, second = pool.run(_fsdp2_norms, dtype)
    assert first == second
    for kind in ("fsdp", "hsdp"):
        norm, expected, collectives, halved, without_gradients = first[kind]
        assert norm == pytest.approx(expected, rel=1e-6), kind
        assert collectives == 1, kind
        assert halved, kind
        assert without_gradients == 0.0, kind


def _one_rank_without_gradient():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    if mesh.get_local_rank() == 0:
        parameter.grad = distribute_tensor(torch.full((4,), 2.0), mesh, [Shard(0)], src_data_rank=None)
    return global_grad_norm([parameter]).item()


def test_a_rank_without_a_gradient_takes_part(pool):
    assert pool.run(_one_rank_without_gradient) == [pytest.approx(math.sqrt(8))] * 2


def _partial_gradient():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(TypeError, match="not reduced yet"):
        global_grad_norm([parameter])


def test_a_gradient_that_awaits_its_reduction_is_refused(pool):
    pool.run(_partial_gradient)
