"""Parallel training: what its wrappers lead to, and a product over data that are spread over processes."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import F64, randn_like, relative_error, seeded, world_of_one
from torch import multiprocessing, nn

import hessfunc as hf

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
TIMEOUT = timedelta(seconds=60)


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def data(size=11):
    return torch.randn(size, 3, generator=seeded(1), dtype=F64), torch.randint(2, (size,), generator=seeded(2))


@pytest.fixture
def mesh():
    with world_of_one() as mesh:
        yield mesh


@pytest.mark.usefixtures("mesh")
def test_data_parallel_wrapper():
    plain = model()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    with pytest.raises(TypeError, match=r"^model is wrapped in DistributedDataParallel; .* bare module, model\.module"):
        hf.functionalize(wrapped)
    inside = nn.Sequential(wrapped, nn.Flatten())
    with pytest.raises(TypeError, match=r"^model\.0 is wrapped in DistributedDataParallel; .*, model\.0\.module"):
        hf.module_loss(inside, F.cross_entropy)
    # Between a forward and a backward pass of training, as when curvature is tracked through it.
    x, y = data()
    F.cross_entropy(wrapped(x), y).backward()
    gradient = wrapped.module[0].weight.grad.clone()
    loss, params = hf.module_loss(wrapped.module, F.cross_entropy)
    v = randn_like(params, seeded(3))
    reference = hf.hvp_double_backward(*hf.module_loss(plain, F.cross_entropy), v, x, y)
    assert relative_error(hf.hessian(loss, params, (x, y))(v), reference) < 1e-12
    assert torch.equal(wrapped.module[0].weight.grad, gradient)


def whole_state(sharded):
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = state_dict.StateDictOptions(full_state_dict=True)
    return state_dict.get_model_state_dict(sharded, options=options)


def test_fully_sharded_parameters(mesh):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    plain, x_y = model(), data()
    sharded = copy.deepcopy(plain)
    fsdp.fully_shard(sharded[0], mesh=mesh)
    with pytest.raises(TypeError, match=r"^model\.0 is a FSDPLinear .*full_state_dict=True.* into a plain module"):
        hf.module_loss(sharded, F.cross_entropy)
    fsdp.fully_shard(sharded, mesh=mesh)
    loss, params = hf.module_loss(plain, F.cross_entropy)
    with pytest.raises(TypeError, match=r"^params\['0\.weight'\] is a DTensor, .*leaf\.full_tensor\(\)"):
        hf.hessian(loss, dict(sharded.named_parameters()), x_y)
    # The remedies of both messages.
    gathered = model()
    nn.init.zeros_(gathered[0].weight)
    gathered.load_state_dict(whole_state(sharded))
    v = randn_like(params, seeded(3))
    reference = hf.hvp(loss, params, v, *x_y)
    assert relative_error(hf.hvp(*hf.module_loss(gathered, F.cross_entropy), v, *x_y), reference) < 1e-12
    whole = {name: p.full_tensor().detach() for name, p in sharded.named_parameters()}
    assert relative_error(hf.hvp(loss, whole, v, *x_y), reference) < 1e-12


@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning", "ignore:.*deprecated:FutureWarning")
@pytest.mark.usefixtures("mesh")
def test_fully_sharded_wrapper_of_the_first_kind():
    """A product through it would end the process with a segmentation fault."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    plain = model()
    sharded = fsdp.FullyShardedDataParallel(copy.deepcopy(plain), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"^model is a FullyShardedDataParallel .*full_state_dict=True"):
        hf.functionalize(sharded)
    state = whole_state(sharded)
    assert relative_error(state, dict(plain.state_dict())) == 0


def over_all_processes(H, samples):
    """The operator of the data of all processes, from each one's own mean over ``samples``."""
    total = torch.tensor(float(samples))
    dist.all_reduce(total)

    def rows(rows):
        product = H.rows(rows) * (samples / float(total))
        dist.all_reduce(product)
        return product

    return hf.Operator(H.like, rows)


def run_of_one_process(rank, address):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=TIMEOUT)
    try:
        x, y = data()
        mine = slice(0, 4) if rank == 0 else slice(4, 11)
        loss, params = hf.module_loss(model(), F.cross_entropy)
        H = over_all_processes(hf.hessian(loss, params, (x[mine], y[mine])), len(x[mine]))
        return H(point(params)), *results(H)
    finally:
        dist.destroy_process_group()


def point(params):
    return randn_like(params, seeded(3))


def results(H):
    pairs = hf.eigsh(H, 2, tol=1e-8, generator=seeded(4))
    return pairs.eigenvalues, pairs.eigenvectors, hf.hutchinson(H, num_probes=8, generator=seeded(5)).samples


def run_of_the_other_process(_index, address, path):
    torch.set_num_threads(1)
    torch.save(run_of_one_process(1, address), path)


def test_product_over_data_of_two_processes(tmp_path):
    address = f"file://{tmp_path}/meeting"
    other = multiprocessing.spawn(run_of_the_other_process, (address, tmp_path / "other"), nprocs=1, join=False)
    product, *found = run_of_one_process(0, address)
    other.join()
    loss, params = hf.module_loss(model(), F.cross_entropy)
    H = hf.hessian(loss, params, data())
    assert relative_error(product, H(point(params))) < 1e-12
    for here, alone in zip(found, results(H), strict=True):
        assert relative_error(here, alone) < 1e-7
    # The sums are the same in every process to the last bit, and so are all decisions.
    for here, there in zip((product, *found), torch.load(tmp_path / "other"), strict=True):
        assert relative_error(here, there) == 0
