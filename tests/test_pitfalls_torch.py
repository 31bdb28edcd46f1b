"""Show that the ops do not have other implementations' bugs with torch: numbers 12 to 16 and 22."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_inductor_cache as fresh_cache
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from expo_fast.op_backends import custom_ops
from expo_fast.ops import (
    Clipped,
    SequenceClipped,
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    linear_preference_loss,
)
from judges import error_norm, relative_error

N, D, V = 12, 16, 301
known_bug = partial(pytest.mark.xfail, strict=True)
Loss = Callable[..., Tensor]


@pytest.fixture(params=["torch", "native", "triton"])
def backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter is off where there is a GPU")
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


def make_inputs(dtype=torch.float32, n=N, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(s, D, generator=g).to(dtype).requires_grad_() for s in (n, V))
    return hidden, weight, torch.randint(V, (n,), generator=g)


def ramp(like: Tensor) -> Tensor:
    return torch.arange(like.numel()).view(like.shape) / like.numel() - 0.4  # linspace fixes N


def logprob(hidden, weight, targets, **given: Any) -> Tensor:
    got = linear_logprob(hidden, weight, targets, **given)
    g = ramp(targets)
    return (g * got.logp + 0.1 * got.entropy - got.lse).sum()


def policy(hidden, weight, targets, **given: Any) -> Tensor:
    a = ramp(targets)
    given.setdefault("entropy_coef", 0.1)
    return linear_policy_loss(hidden, weight, targets, a, a.abs() + 0.1, **given).loss


def preference(hidden, weight, targets, **given: Any) -> Tensor:
    ids = torch.arange(targets.numel()).view(targets.shape) * 4 // targets.numel()
    return linear_preference_loss(hidden, weight, targets, ids, **given).loss


LOSSES: dict[str, Loss] = {"logprob": logprob, "policy": policy, "preference": preference}


@pytest.fixture(params=LOSSES)
def loss_of(request) -> Loss:
    return LOSSES[request.param]


def gradients(loss_of: Loss, *inputs: Tensor, **given: Any) -> tuple[Tensor, ...]:
    loss = loss_of(*inputs, **given)
    return loss.detach(), *torch.autograd.grad(loss, inputs[:2])


def same(got, truth, tolerance=0.0) -> None:
    """Assert equality, or a relative error within the tolerance. A truth may be all zeros."""
    for a, t in zip(got, truth, strict=True):
        assert a.dtype == t.dtype
        assert error_norm(a, t) <= tolerance * t.double().norm().item()


# 12. A weight that is sharded, flattened or a module: DTensor, FSDP, ZeRO-3, PEFT


@pytest.mark.parametrize("shape", [(0,), (V * D,), (0, D), (V, 0), (D, V)], ids=str)
def test_a_weight_that_is_not_gathered_is_refused(loss_of, backend, shape):
    """Liger #332 and CCE #31 read beyond its end."""
    hidden, _, targets = make_inputs()
    with pytest.raises(ValueError, match=r"weight|must lie in"):
        loss_of(hidden, torch.zeros(shape), targets, backend=backend)


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_a_module_is_refused_by_its_argument_name(name):
    """PEFT wraps lm_head in a module, whose adapter a bare .weight would leave out."""
    given: dict[str, Any] = dict(zip(("hidden", "weight", "targets"), make_inputs(), strict=True))
    given[name] = torch.nn.Linear(D, V)
    with pytest.raises((TypeError, ValueError), match=name):
        linear_logprob(**given)


SHARDED = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Shard, distribute_tensor
from expo_fast.ops import linear_logprob

def rank_of_two(rank, path):
    torch.set_num_threads(1)
    if sys.platform == "linux":  # a machine may have no name that resolves
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, generator=g), torch.randn(10, 8, generator=g)
    targets, exact = torch.tensor([1, 9, 4, 0]), weight.clone().requires_grad_()
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    mine = slice(2 * rank, 2 * rank + 2)  # each rank has rows of its own
    try:
        linear_logprob(hidden[mine], sharded, targets[mine])
    except ValueError as error:
        refused = str(error)
    gathered = sharded.full_tensor(grad_placements=[Partial()])
    linear_logprob(hidden[mine], gathered, targets[mine]).logp.sum().backward()
    (hidden @ exact.T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(sharded.grad.full_tensor(), exact.grad)
    assert len(sharded.grad.to_local()) == 5
    if rank == 0:
        print(refused)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank_of_two, (sys.argv[1],), 2, start_method="fork")
"""


@pytest.mark.slow
def test_a_sharded_weight_is_refused_and_the_advised_gather_sums_gradients_of_ranks(tmp_path):
    """full_tensor() without grad_placements drops the gradients of the other ranks' rows."""
    program = tmp_path / "program.py"
    program.write_text(SHARDED)
    done = subprocess.run(
        [sys.executable, program, tmp_path / "store"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "weight is a DTensor" in done.stdout
    assert "weight.full_tensor(grad_placements=[Partial()])" in done.stdout
    assert "leave the head in the root unit" in done.stdout
    assert "divide by the world size" in done.stdout


FULLY_SHARDED = """
import os
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial
from expo_fast.ops import linear_logprob

VOCABULARY = 10
WIDTH = 8

class Head(nn.Linear):
    def forward(self, hidden, targets):
        return linear_logprob(hidden, self.weight, targets).logp

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = Head(WIDTH, VOCABULARY, bias=False)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=random))

    def forward(self, ids):
        return torch.tanh(self.body(self.embedding(ids)))

def in_the_root_unit(model, hidden, targets):
    return linear_logprob(hidden, model.head.weight, targets).logp

def in_the_forward_of_its_own_unit(model, hidden, targets):
    return model.head(hidden, targets)

def gathered_and_divided(model, hidden, targets):
    weight = model.head.weight.full_tensor(grad_placements=[Partial("avg")])
    return linear_logprob(hidden, weight, targets).logp

def gathered_and_summed(model, hidden, targets):
    weight = model.head.weight.full_tensor(grad_placements=[Partial()])
    return linear_logprob(hidden, weight, targets).logp

def sharded(mesh, head_has_its_own_unit):
    model = Model()
    fully_shard(model.body, mesh=mesh)
    if head_has_its_own_unit:
        fully_shard(model.head, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def rank_of_two(rank, path):
    torch.set_num_threads(1)
    if sys.platform == "linux":  # a machine may have no name that resolves
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    ids = torch.arange(8)
    targets = (3 * ids + 1) % VOCABULARY
    mine = slice(4 * rank, 4 * rank + 4)  # each rank has rows of its own
    exact = Model()
    logits = exact(ids) @ exact.head.weight.T
    nn.functional.cross_entropy(logits, targets).backward()
    for logp_of, own_unit, factor in (
        (in_the_root_unit, False, 1),
        (in_the_forward_of_its_own_unit, True, 1),
        (gathered_and_divided, True, 1),
        (gathered_and_summed, True, 2),  # too large by the number of ranks
    ):
        model = sharded(mesh, own_unit)
        for _ in range(2):  # the second step gathers again
            model.zero_grad()
            (-logp_of(model, model(ids[mine]), targets[mine]).mean()).backward()
        for (name, got), truth in zip(model.named_parameters(), exact.parameters(), strict=True):
            scale = factor if name == "head.weight" else 1
            torch.testing.assert_close(got.grad.full_tensor(), scale * truth.grad)
        if rank == 0:
            print(logp_of.__name__)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank_of_two, (sys.argv[1],), 2, start_method="fork")
"""


@pytest.mark.slow
def test_gradients_of_a_head_under_fsdp_are_those_of_one_process(tmp_path):
    """FSDP averages the gradients of ranks, and Partial() sums them."""
    program = tmp_path / "program.py"
    program.write_text(FULLY_SHARDED)
    done = subprocess.run(
        [sys.executable, program, tmp_path / "store"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "in_the_root_unit",
        "in_the_forward_of_its_own_unit",
        "gathered_and_divided",
        "gathered_and_summed",
    ]


# 13. Tensors saved for backward that change before it


def test_backward_twice_and_an_upstream_gradient_other_than_one(loss_of, backend, dtype):
    """torch's chunked loss raises the second time; Liger #931 forgot the upstream gradient."""
    hidden, weight, targets = make_inputs(dtype)
    loss = loss_of(hidden, weight, targets, backend=backend)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    same(torch.autograd.grad(loss, (hidden, weight), retain_graph=True), once)
    tripled = torch.autograd.grad(loss, (hidden, weight), torch.tensor(-3.0))
    same(tripled, [-3 * g for g in once], 2e-6 if dtype == torch.float32 else 8e-3)


def test_second_derivatives_are_refused(loss_of, backend):
    hidden, weight, targets = make_inputs()
    scale = torch.ones((), requires_grad=True)
    loss = loss_of(hidden, weight, targets, backend=backend) * scale
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        grad.sum().backward()


def test_a_gradient_penalty_added_to_another_loss_is_refused(loss_of):
    hidden, weight, targets = make_inputs()
    (grad,) = torch.autograd.grad(loss_of(hidden, weight, targets), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        (grad.square().sum() + hidden.sum()).backward()


@pytest.mark.parametrize("which", ["hidden", "rows of hidden", "weight", "targets", "temperature"])
def test_an_input_changed_before_backward_is_noticed(backend, which):
    hidden, weight, targets = make_inputs()
    hidden, weight, t = hidden * 1, weight * 1, torch.full((N,), 0.7)
    loss = logprob(hidden, weight, targets, temperature=t, backend=backend)
    named = {"hidden": hidden, "rows of hidden": hidden[3:5], "weight": weight}
    (named | {"targets": targets, "temperature": t})[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["policy", "preference"])
def test_an_input_changed_before_backward_changes_no_gradient_of_a_loss(name, backend):
    """The first backward uses gradients computed with the loss. A second one is refused."""
    leaves = make_inputs()
    _, *truth = gradients(LOSSES[name], *leaves, backend=backend)
    changed = [x * 1 for x in leaves]
    loss = LOSSES[name](*changed, backend=backend)
    for x in changed:
        x.zero_()
    same(torch.autograd.grad(loss, leaves[:2], retain_graph=True), truth)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves[:2])


def test_a_returned_gradient_is_not_written_again(loss_of, backend):
    """Accumulation adds to the memory of the first gradient, so the second needs its own."""
    hidden, weight, targets = make_inputs()
    loss = loss_of(hidden, weight, targets, backend=backend)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in once]
    for g in torch.autograd.grad(loss, (hidden, weight), torch.tensor(5.0), retain_graph=True):
        g.zero_()
    same(once, kept)
    for steps in (1, 2, 3):
        loss.backward(retain_graph=True)
        same((hidden.grad, weight.grad), [steps * g for g in kept], 1e-6)


def test_gradients_are_right_for_views_and_results_written_in_place(loss_of, backend):
    """See Liger #48."""
    leaf, weight, targets = make_inputs()

    def by_view(x, w, y, backend):
        base = x.new_zeros(2 * N, D)
        view = base[::2]
        view.copy_(x)
        view.mul_(0.5)
        return loss_of(view, w, y, backend=backend)

    def plainly(x, w, y, backend):
        return loss_of(0.5 * x, w, y, backend=backend)

    truth = gradients(plainly, leaf, weight, targets, backend=backend)
    same(gradients(by_view, leaf, weight, targets, backend=backend), truth)
    got = linear_logprob(leaf, weight, targets, backend=backend)
    got.logp.mul_(2)[:4] = 0
    (grad,) = torch.autograd.grad(got.logp.sum(), leaf)
    logp = linear_logprob(leaf, weight, targets, backend=backend).logp
    same([grad], torch.autograd.grad(2 * logp[4:].sum(), leaf), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_only_inputs_that_require_a_gradient_get_one(loss_of, backend, dtype, frozen):
    """See Liger #1157."""
    inputs = make_inputs(dtype)
    _, *truth = gradients(loss_of, *inputs, backend=backend)
    one = [x.detach() if i == frozen else x for i, x in enumerate(inputs)]
    loss = loss_of(*one, backend=backend)
    loss.backward()
    alone = one[1 - frozen].grad
    assert alone is not None and one[frozen].grad is None
    same([alone], [truth[1 - frozen]], 2e-6 if dtype == torch.float32 else 8e-3)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            value = loss_of(*inputs, backend=backend)
        assert not value.requires_grad
        torch.testing.assert_close(value, loss.detach(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(loss_of, reentrant):
    inputs = make_inputs()
    truth = gradients(loss_of, *inputs)
    loss = checkpoint(loss_of, *inputs, use_reentrant=reentrant)
    assert isinstance(loss, Tensor)
    loss.backward()
    same([loss.detach(), *(x.grad for x in inputs[:2])], truth)


# 14. Autocast, in which addmm(out_dtype=) and custom functions take no part (Liger #1283)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_casts_both_inputs_and_gives_fp32_gradients(loss_of, backend, low):
    masters = make_inputs()
    with torch.autocast("cpu", low):
        loss = loss_of(*masters, backend=backend)
    got = loss.detach(), *torch.autograd.grad(loss, masters[:2])  # backward runs outside autocast
    cast = [x.detach().to(low).requires_grad_() for x in masters[:2]]
    loss, *grads = gradients(loss_of, *cast, masters[2], backend=backend)
    same(got, (loss, *(g.float() for g in grads)))
    with torch.autocast("cpu", low):
        again = gradients(loss_of, *masters, backend=backend)
    same(again, got)


def test_autocast_changes_neither_fp64_inputs_nor_disabled_regions(loss_of):
    exact = [x.detach().double().requires_grad_() for x in make_inputs()[:2]]
    truth = gradients(loss_of, *exact, make_inputs()[2])
    with torch.autocast("cpu", torch.bfloat16):
        same(gradients(loss_of, *exact, make_inputs()[2]), truth)
        with torch.autocast("cpu", enabled=False):
            inside = gradients(loss_of, *make_inputs())
    same(inside, gradients(loss_of, *make_inputs()))


def test_fp32_weights_with_bf16_hidden_states_have_gradients_in_their_dtypes(loss_of, backend):
    hidden, weight, targets = make_inputs()
    narrow = hidden.detach().bfloat16().requires_grad_()
    got = gradients(loss_of, narrow, weight, targets, backend=backend)
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.float32]
    wide = narrow.detach().float().requires_grad_()
    truth = gradients(loss_of, wide, weight, targets, backend=backend)
    for a, t in zip(got, truth, strict=True):
        assert relative_error(a, t) <= 4e-3


# 15. Memory layouts that a kernel does not expect

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "columns of a wider tensor": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "off the 16-byte grid": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_results_of_a_contiguous_one(loss_of, backend, dtype, layout):
    hidden, weight, targets = make_inputs(dtype)
    odd = [LAYOUTS[layout](x.detach()).requires_grad_() for x in (hidden, weight)]
    got = gradients(loss_of, *odd, targets, backend=backend)
    truth = gradients(loss_of, hidden, weight, targets, backend=backend)
    same(got, truth, 2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_targets_may_be_a_column_of_another_tensor(loss_of, backend, dtype, kind):
    """CCE pads targets to 16 bytes."""
    hidden, weight, targets = make_inputs(dtype)
    column = torch.stack([targets.flip(0), targets, targets.flip(0)], 1).to(kind)[:, 1]
    got = gradients(loss_of, hidden, weight, column, backend=backend)
    same(got, gradients(loss_of, hidden, weight, targets, backend=backend))


def test_shifted_hidden_states_and_labels_may_be_views(loss_of, backend, dtype):
    hidden, weight, _ = make_inputs(dtype, 2 * 7)
    labels = torch.randint(V, (2, 7))
    sequences = hidden.detach().view(2, 7, D).requires_grad_()
    loss = loss_of(sequences[:, :-1], weight, labels[:, 1:], backend=backend)
    got = torch.autograd.grad(loss, (sequences, weight))
    rows = sequences.detach()[:, :-1].reshape(N, D).requires_grad_()
    _, *truth = gradients(loss_of, rows, weight, labels[:, 1:].reshape(N), backend=backend)
    assert not got[0][:, -1].count_nonzero()
    same([got[0][:, :-1].reshape(N, D), got[1]], truth, 2e-6)


def test_expanded_vectors_may_have_stride_0(backend):
    hidden, weight, targets = make_inputs()
    one, ids = torch.ones(1), torch.arange(2).repeat_interleave(6)
    odd, even = (one.expand(N), ids.repeat_interleave(2)[::2]), (torch.ones(N), ids)

    def loss(one, ids):
        known = {"old_logp": -5 * one, "ref_logp": -5.1 * one, "temperature": 0.7 * one}
        return linear_policy_loss(
            hidden, weight, targets, one, one, objective=SequenceClipped(), kl_coef=0.1,
            sequence_ids=ids, backend=backend, **known,
        ).loss  # fmt: skip

    got, truth = (torch.autograd.grad(loss(*x), (hidden, weight)) for x in (odd, even))
    same(got, truth)


def test_a_slice_removes_the_padding_of_a_vocabulary(loss_of, backend, dtype):
    """Megatron and Qwen pad it. Rows beyond V may hold NaN, and have a gradient of 0."""
    hidden, weight, targets = make_inputs(dtype)
    padded = torch.cat([weight.detach(), torch.full((83, D), float("nan"), dtype=dtype)])
    padded.requires_grad_()
    loss = loss_of(hidden, padded[:V], targets, backend=backend)
    d_hidden, d_padded = torch.autograd.grad(loss, (hidden, padded))
    assert not d_padded[V:].count_nonzero()
    truth = gradients(loss_of, hidden, weight, targets, backend=backend)
    same([loss.detach(), d_hidden, d_padded[:V]], truth)


# 16. torch.compile: graph breaks, wrong results, a new graph for each batch


def counted(f) -> tuple[Callable, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(f, fullgraph=True, backend=counter), counter


@pytest.mark.slow
def test_strides_are_those_that_the_fake_implementation_declares_to_inductor():
    hidden, weight, targets = make_inputs()
    torch._dynamo.reset()

    def logp(hidden, weight, targets) -> Tensor:
        return linear_logprob(hidden, weight, targets).logp

    compiled = torch.compile(logp, fullgraph=True)
    with fresh_cache():  # the cache of graphs does not see changes of a fake implementation
        got = gradients(lambda *x: compiled(*x).sum(), hidden, weight, targets)
    same(got, gradients(lambda *x: logp(*x).sum(), hidden, weight, targets), 1e-6)


@pytest.mark.slow
def test_no_op_breaks_the_graph_on_any_backend(loss_of, backend):
    inputs = make_inputs(torch.bfloat16)
    compiled, counter = counted(partial(loss_of, backend=backend))
    same(gradients(compiled, *inputs), gradients(loss_of, *inputs, backend=backend), 1e-6)
    assert counter.frame_count == 1


NUMBERS = ["temperature", "kl_coef", "entropy_coef"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_compiled_loss_sees_a_number_that_changes(name):
    """Coefficients may be annealed, see Liger #1350."""
    compiled, _ = counted(policy)
    inputs, ref = make_inputs(), torch.full((N,), -6.0)
    for x in (0.5, 1, 0.25):
        given = {"ref_logp": ref, name: x}
        same(gradients(compiled, *inputs, **given), gradients(policy, *inputs, **given), 1e-6)


@pytest.mark.slow
@known_bug(reason="an op's float argument is a constant of its graph")
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_needs_no_new_graph(name):
    compiled, counter = counted(policy)
    for x in (0.5, 0.75, 0.25, 2.0, 0.4):
        compiled(*make_inputs(), ref_logp=torch.full((N,), -6.0), **{name: x})
    assert counter.frame_count <= 3


def test_a_compiled_loss_sees_another_objective():
    compiled, _ = counted(lambda *x, objective: policy(*x, objective=objective, old_logp=old))
    inputs, old = make_inputs(), torch.full((N,), -6.0)
    for objective in (Clipped(0.2, 0.2), Clipped(0.01, 0.01), Clipped(0.2, 0.2, cap=3.0)):
        truth = policy(*inputs, objective=objective, old_logp=old)
        same([compiled(*inputs, objective=objective)], [truth], 1e-6)


def test_a_compiled_loss_sees_an_objective_made_from_a_number_that_changes():
    def loss(*x, low):
        return policy(*x, objective=Clipped(low, 0.2), old_logp=old)

    inputs, old = make_inputs(), torch.full((N,), -6.0)
    compiled, _ = counted(loss)
    for low in (0.2, 0.01, 0.1):
        same([compiled(*inputs, low=low)], [loss(*inputs, low=low)], 1e-6)


def advantage(hidden, weight, targets) -> Tensor:
    return group_advantage(hidden.detach()[:, 0], targets // 100).sum()


def referenced(hidden, weight, targets) -> Tensor:
    ids = torch.arange(len(targets)) // 4
    return linear_preference_loss(hidden, weight, targets, ids, ref_logp=-ids[::4] * 1.0).loss


VARYING = LOSSES | {"advantage": advantage, "referenced": referenced}


@pytest.mark.parametrize("name", VARYING)
def test_batches_of_any_size_share_a_graph(name):
    compiled, counter = counted(VARYING[name])
    for n in (24, 16, 48, 8, 96):
        inputs = make_inputs(n=n)
        same([compiled(*inputs)], [VARYING[name](*inputs)], 1e-6)
    assert counter.frame_count <= 3


def opcheck(monkeypatch, name: str, which: Sequence[str], call: Callable[[], Any]) -> None:
    """Run torch.library's checks of an op with the arguments that a call passes to it."""
    op, seen = getattr(custom_ops, name), []
    with monkeypatch.context() as patch:

        def recording(*args, **kwargs):
            seen.append((args, kwargs))
            return op(*args, **kwargs)

        patch.setattr(custom_ops, name, recording)
        call()
    torch.library.opcheck(op, *seen[0], test_utils=which)


OPS: dict[str, Callable] = {
    "logprob": logprob,
    "logprob_backward": partial(gradients, logprob),
    "policy_loss": policy,
    "preference_loss": preference,
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "masked", "transposed", "fp64"])
@pytest.mark.parametrize("name", OPS)
def test_fake_implementations_have_the_shapes_strides_and_dtypes_of_results(
    name, backend, layout, monkeypatch
):
    hidden, weight, targets = make_inputs(torch.bfloat16)
    if layout == "masked":
        targets[::3] = -100
    if layout == "transposed":
        hidden, weight = (LAYOUTS[layout](x.detach()).requires_grad_() for x in (hidden, weight))
    if layout == "fp64":
        hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
        backend = "torch"
    which = "test_schema", "test_autograd_registration", "test_faketensor"
    opcheck(monkeypatch, name, which, lambda: OPS[name](hidden, weight, targets, backend=backend))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPS if name != "logprob_backward"])
def test_forward_and_backward_can_be_traced_with_any_size(name, backend, monkeypatch, request):
    if name == "policy_loss":  # as its docstring says; ops.py does not return that output
        reason = "backward scales in place the gradients that the op has returned"
        request.applymarker(known_bug(reason=reason))
    inputs, f = make_inputs(torch.bfloat16), OPS[name]
    which = ["test_aot_dispatch_dynamic"]
    opcheck(monkeypatch, name, which, lambda: f(*inputs, backend=backend))


def test_group_advantage_passes_every_check(monkeypatch):
    every = "test_schema", "test_autograd_registration", "test_faketensor"
    call = partial(advantage, *make_inputs())
    opcheck(monkeypatch, "group_advantage", [*every, "test_aot_dispatch_dynamic"], call)


def test_a_compiled_op_still_names_a_bad_target():
    hidden, weight, targets = make_inputs()
    targets[3] = V
    with pytest.raises(ValueError, match=rf"targets\[3\] is {V}"):
        counted(logprob)[0](hidden, weight, targets)


# 23. Transforms: forward mode, torch.func, vmap, derivatives of derivatives


def forward_ad_tangent(f: Loss, x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def tangent_of_a_gradient(f: Loss, x: Tensor) -> Tensor | None:
    x = x.clone().requires_grad_()
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.tensor(2.0), torch.tensor(1.0))
        (grad,) = torch.autograd.grad(f(x), x, grad_outputs=upstream)
        return forward_ad.unpack_dual(grad).tangent


def gradient_through_vmap(f: Loss, x: Tensor) -> Tensor:
    many = torch.stack([x, x]).requires_grad_()
    return torch.autograd.grad((torch.func.vmap(f)(many) + many.sum()).sum(), many)[0]


FORWARD_MODE: dict[str, Callable[[Loss, Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.func.vmap(f), (x[None],), (x[None],)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x),
    "forward_ad": forward_ad_tangent,
    "a forward-mode Jacobian": lambda f, x: torch.autograd.functional.jacobian(
        f, x, strategy="forward-mode", vectorize=True
    ),
    "compiled jvp": lambda f, x: torch.compile(
        lambda x: torch.func.jvp(f, (x,), (x,)), backend="eager"
    )(x),
    "jvp of a compiled function": lambda f, x: torch.func.jvp(
        torch.compile(f, backend="eager"), (x,), (x,)
    ),
}
TORCH_FUNC: dict[str, Callable[[Loss, Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(())),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x[None]),
    "the gradient of vmap": gradient_through_vmap,
}
TWICE: dict[str, Callable[[Loss, Tensor], Any]] = {
    "hvp": lambda f, x: torch.autograd.functional.hvp(f, x, x),
    "vhp": lambda f, x: torch.autograd.functional.vhp(f, x, x),
    "hessian": lambda f, x: torch.autograd.functional.hessian(f, x),
    "jvp by two backwards": lambda f, x: torch.autograd.functional.jvp(f, x, x),
}
REFUSED = [("no forward-mode derivative", call) for call in FORWARD_MODE.values()]
REFUSED += [("no derivative under torch.func", call) for call in TORCH_FUNC.values()]
REFUSED += [("differentiable once", call) for call in TWICE.values()]
NAMES = [*FORWARD_MODE, *TORCH_FUNC, *(f"autograd's {name}" for name in TWICE)]


@pytest.mark.slow
@pytest.mark.parametrize(("says", "call"), REFUSED, ids=NAMES)
def test_a_derivative_that_would_be_0_is_refused(loss_of, backend, says, call):
    """torch gives a custom operator no tangent, and its vmap cuts the graph of gradients."""
    torch._dynamo.reset()
    hidden, weight, targets = (x.detach() for x in make_inputs())
    f = partial(loss_of, weight=weight, targets=targets, backend=backend)
    with pytest.raises(RuntimeError, match=says):
        call(f, hidden)


@pytest.mark.parametrize("name", ["jvp", "grad", "autograd's hvp"])
def test_a_derivative_in_the_weight_is_refused_too(loss_of, name):
    hidden, weight, targets = (x.detach() for x in make_inputs())
    says, call = REFUSED[NAMES.index(name)]
    with pytest.raises(RuntimeError, match=says):
        call(lambda weight: loss_of(hidden, weight, targets), weight)


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_advantages_have_no_forward_derivative(name):
    def sum_of_squares(rewards: Tensor) -> Tensor:
        return group_advantage(rewards.flatten(), torch.arange(rewards.numel()) // 4).square().sum()

    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        FORWARD_MODE[name](sum_of_squares, torch.rand(8))


def test_the_tangent_of_an_upstream_gradient_is_refused(loss_of, backend):
    hidden, weight, targets = (x.detach() for x in make_inputs())
    f = partial(loss_of, weight=weight, targets=targets, backend=backend)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        tangent_of_a_gradient(f, hidden)


def test_the_gradient_of_a_gradient_by_its_upstream_is_refused(loss_of, backend):
    hidden, weight, targets = make_inputs()
    scale = torch.tensor(2.0, requires_grad=True)
    loss = scale * loss_of(hidden, weight.detach(), targets, backend=backend)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), scale)


def test_vmap_without_gradients_is_a_loop(loss_of, backend):
    weight, targets = (x.detach() for x in make_inputs()[1:])
    many = torch.stack([make_inputs(seed=seed)[0].detach() for seed in range(3)])
    f = partial(loss_of, weight=weight, targets=targets, backend=backend)
    with torch.no_grad():
        got = torch.func.vmap(f)(many)
    assert torch.equal(got, torch.stack([f(hidden) for hidden in many]))


CONSTANTS: dict[str, tuple[Loss, tuple[int, ...]]] = {
    "advantage": (policy, (N,)),
    "row_weight": (policy, (N,)),
    "old_logp": (policy, (N,)),
    "temperature": (logprob, (N,)),
    "ref_logp": (preference, (4,)),
    "pair_weight": (preference, (2,)),
}


@pytest.mark.parametrize("name", ["jvp", "grad"])
@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_derivative_in_a_constant_is_refused(constant, name):
    """It would be 0, because the ops detach all but hidden states, weights and biases."""
    hidden, weight, targets = (x.detach() for x in make_inputs())
    loss_of, shape = CONSTANTS[constant]
    known = {"advantage": ramp(targets), "row_weight": ramp(targets).abs() + 0.1}
    says, call = REFUSED[NAMES.index(name)]

    def f(x: Tensor) -> Tensor:
        if constant in known:
            given: Any = known | {constant: x}
            return linear_policy_loss(hidden, weight, targets, **given).loss
        return loss_of(hidden, weight, targets, **{constant: x})

    with pytest.raises(NotImplementedError, match=says):
        call(f, torch.rand(shape) + 0.5)


def test_several_gradients_at_once_are_those_of_a_loop(loss_of, backend):
    """is_grads_batched, and the reverse mode of a vectorized Jacobian."""
    hidden, weight, targets = make_inputs()
    loss = loss_of(hidden, weight, targets, backend=backend)
    scales = torch.tensor([1.0, -2.0, 0.5])
    inputs = hidden, weight
    got = torch.autograd.grad(loss, inputs, scales, is_grads_batched=True, retain_graph=True)
    for i, scale in enumerate(scales):
        truth = torch.autograd.grad(loss, inputs, scale, retain_graph=True)
        same([grad[i] for grad in got], truth, 1e-6)


@pytest.mark.parametrize("name", ["hvp", "vhp"])
def test_a_second_derivative_of_a_compiled_loss_is_refused(loss_of, name):
    """Compiled, the gradient is an output of the forward, on which no input seems to depend."""
    torch._dynamo.reset()
    hidden, weight, targets = (x.detach() for x in make_inputs())
    f = torch.compile(partial(loss_of, weight=weight, targets=targets), backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"differentiable once|double backward"):
        TWICE[name](f, hidden)


def test_functional_call_and_an_unrelated_tangent_change_nothing(loss_of, backend):
    hidden, weight, targets = make_inputs()
    module = torch.nn.Linear(D, D, bias=False)
    inside = {"weight": module.weight.detach().clone().requires_grad_()}

    def loss() -> Tensor:
        called = torch.func.functional_call(module, inside, (hidden,))
        return loss_of(called, weight, targets, backend=backend)

    (truth,) = torch.autograd.grad(loss(), inside["weight"])
    with forward_ad.dual_level():
        (got,) = torch.autograd.grad(loss(), inside["weight"])
    assert torch.equal(got, truth) and truth.any()


# 22. Tensors on several devices, and a device that is not the current one


@pytest.mark.parametrize("which", [1, 2], ids=["weight", "targets"])
def test_tensors_on_several_devices_are_refused(loss_of, which):
    """For example, accelerate or FSDP may have left a weight on meta."""
    given = [x.detach() for x in make_inputs()]
    given[which] = given[which].to("meta")
    with pytest.raises(ValueError, match="meta"):
        loss_of(*given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_weight_on_another_device_than_hidden_is_refused():
    hidden, weight, targets = make_inputs()
    with pytest.raises(ValueError, match="weight is on cuda"):
        linear_logprob(hidden, weight.cuda(), targets)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_run_on_the_device_of_their_tensors_not_on_the_current_one(dtype):
    assert torch.cuda.current_device() == 0
    found = []
    for device in ("cuda:0", "cuda:1"):
        hidden, weight, targets = (x.detach().to(device) for x in make_inputs(dtype))
        inputs = hidden.requires_grad_(), weight.requires_grad_()
        got = linear_logprob(hidden, weight, targets)
        grads = torch.autograd.grad((got.logp + got.entropy).sum(), inputs)
        found.append([x.detach().cpu() for x in (*got, *grads)])
    same(found[1], found[0])
