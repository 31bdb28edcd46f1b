"""The check of a machine: its description, the test of the ops, and the estimate of memory."""

import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expo_fast import check, train
from expo_fast.cli import exit_status
from expo_fast.cli.flags import parse
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.inspection import machine, memory, op_checks, pack_size
from expo_fast.inspection.machine import memory_limits, version_of_compiler
from expo_fast.inspection.memory import MemoryEstimate, estimate_memory, memory_lines
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.packing import Sample, forward, pack
from expo_fast.op_backends import cpu, native_library
from expo_fast.weights import load_model, load_structure, save_model
from tiny import tiny_model, tiny_tokenizer

PROBLEMS = [
    Problem(str(i), f"What is {i} plus 1?", str(i + 1), f"\\boxed{{{i + 1}}}") for i in range(8)
]
SMALL = {"dtype": "float32", "prompts_per_step": 4, "max_completion_length": 16, "shots": 0}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make the checks small, because Triton's interpreter is slow."""
    monkeypatch.setattr(op_checks, "N_ROWS", 24)
    monkeypatch.setattr(op_checks, "DEPTH", 16)
    monkeypatch.setattr(op_checks, "VOCABULARY", 131)


def prompter_of(model: Decoder) -> Prompter:
    return Prompter(tiny_tokenizer(), (), None, "", ends=model.eos_ids)


def estimate(model: Decoder, **options) -> MemoryEstimate:
    config = Train(**(SMALL | options))
    return estimate_memory(config, model.config, prompter_of(model), PROBLEMS)


def test_every_op_is_right_on_this_machine():
    results = list(op_checks.check_ops())
    assert all(result.ok for result in results)
    names = {result.op for result in results}
    with_head = {"linear_logprob", "linear_policy_loss", "linear_preference_loss"}
    assert names == {*with_head, "group_advantage"}
    assert {result.backend for result in results} >= {"native", "torch"}


def test_a_wrong_op_is_found(monkeypatch, capsys):
    right = cpu.gradients

    def wrong(*args, **kwargs):
        grads = right(*args, **kwargs)
        assert grads.hidden is not None
        return grads._replace(hidden=grads.hidden * 1.001)

    monkeypatch.setattr(cpu, "gradients", wrong)
    with pytest.raises(ValueError, match="wrong results: linear_logprob on native"):
        check.main([])
    assert "WRONG" in capsys.readouterr().out


def test_the_table_names_what_runs(capsys):
    check.main([])
    out = capsys.readouterr().out
    assert f"torch          {torch.__version__}" in out
    assert native_library.isa() in out
    assert "wrong" not in out.lower()


def test_a_missing_compiler_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert machine.describe_cpu_kernels().startswith("off, PyTorch is used: no C++ compiler")


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "smollm3-windows"])
def test_activations_are_those_that_autograd_keeps(kind, checkpointing, lora_rank):
    """The judge is a real forward pass with all layers."""
    plain = tiny_model(kind)
    config = Train(**SMALL, method="sft", lora_rank=lora_rank, gradient_checkpointing=checkpointing)
    (pack,) = memory.largest_packs(config, prompter_of(plain), PROBLEMS[:4])
    found = memory.activation_bytes(config, plain.config, torch.float32, pack) / memory.ALLOCATOR

    model = Decoder(plain.config, checkpointing=checkpointing)
    if lora_rank:
        memory.attach(model, rank=lora_rank, alpha=32.0, seed=0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(pack.tokens, pack.positions, pack.cu_seqlens, pack.parents)
    expected = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    if checkpointing:  # and one layer that the backward pass recomputes
        assert found > expected
        layer = memory.traced_bytes(
            config, plain.config, torch.float32, pack, [0], checkpointing=False
        )
        expected += layer
    assert found == pytest.approx(expected, rel=0.02)


def test_the_largest_pack_is_that_of_the_run():
    model = tiny_model()
    config = Train(**SMALL, method="sft", pack_tokens=64)
    prompter = prompter_of(model)
    (largest,) = memory.largest_packs(config, prompter, PROBLEMS[:4])
    samples = memory.texts(config, prompter, PROBLEMS[:4])
    sizes = [len(pack.tokens) for pack, _ in forward(model, samples, 64)]
    assert len(largest.tokens) == max(sizes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packs_fill_the_memory_that_they_may_use(checkpointing):
    """The judge is the count of activations of a pack of that size."""
    model = tiny_model()
    few = Train(**SMALL, pack_tokens=0, pack_memory=1e-3, gradient_checkpointing=checkpointing)
    n = pack_size.tokens_within(few, model.config)

    def kept(n_tokens: int) -> int:
        (given,) = pack([Sample((0,), (0,) * n_tokens)], n_tokens)
        return memory.activation_bytes(few, model.config, torch.float32, given)

    assert kept(n - 5) <= 1e6 <= kept(n + 5)
    more = pack_size.tokens_within(replace(few, pack_memory=2e-3), model.config)
    assert more in (2 * n, 2 * n + 1)
    halves = pack_size.tokens_within(replace(few, dtype="bfloat16"), model.config)
    assert 1.5 * n < halves <= 2.01 * n
    if checkpointing:
        assert n > pack_size.tokens_within(replace(few, gradient_checkpointing=False), model.config)


def test_a_run_records_the_tokens_that_the_memory_allows(tmp_path: Path, capsys):
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--shots", "0", "--device", "cpu", "--dry-run"]
    flags += ["--output-dir", str(tmp_path / "run"), "--max-completion-length", "16"]
    flags += ["--pack-tokens", "0", "--pack-memory", "0.001"]
    assert exit_status.run(train.main, flags) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    config = parse(Train, flags)
    n = pack_size.with_pack_tokens(config).pack_tokens
    assert printed["pack_tokens"] == n > 0
    assert (
        pack_size.with_pack_tokens(replace(config, pack_tokens=n, pack_memory=9.0)).pack_tokens == n
    )


def test_parts_follow_from_the_options():
    model = tiny_model()
    n = sum(p.numel() for p in model.parameters())
    plain = estimate(model)
    assert plain.weights == 4 * n
    assert plain.optimizer == 8 * n  # fp32 weights are their own masters
    assert plain.gradients == 2 * 4 * n  # the policy and the SFT term
    assert estimate(model, method="grpo").gradients == 4 * n
    assert estimate(model, dtype="bfloat16").weights == 2 * n
    assert estimate(model, dtype="bfloat16").optimizer == 12 * n
    assert estimate(model, kl_coef=0.1).weights == 8 * n
    assert estimate(model, method="sft").kv_cache == 0
    assert plain.kv_cache > 0
    adapters = estimate(model, lora_rank=2)
    assert adapters.optimizer < plain.optimizer / 5
    assert plain.weights < adapters.weights < 2 * plain.weights


def test_advice_names_the_largest_part(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 100)
    parts = MemoryEstimate(
        weights=1, optimizer=1, gradients=1, activations=200, head=1, kv_cache=1, runtime=1
    )
    config = Train(**SMALL)
    assert "--pack-tokens 2048" in list(memory_lines(config, parts))[-1]
    parts = replace(parts, activations=1, optimizer=200)
    assert "--lora-rank" in list(memory_lines(config, parts))[-1]
    parts = replace(parts, kv_cache=500)
    assert "--max-completion-length" in list(memory_lines(config, parts))[-1]
    parts = replace(parts, kv_cache=1, optimizer=1)
    assert "may not fit" not in "".join(memory_lines(config, parts))


def test_the_structure_is_that_of_the_model(tmp_path: Path):
    save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    model, tokenizer = load_model(tmp_path, device="cpu")
    structure, same_tokenizer = load_structure(tmp_path)
    assert structure.shape == model.shape
    assert structure.eos_ids == model.eos_ids
    assert all(p.is_meta for p in structure.parameters())
    assert same_tokenizer.get_vocab() == tokenizer.get_vocab()


def test_the_command_prints_the_memory_of_a_run(tmp_path: Path, capsys):
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--method", "sft", "--shots", "0"]
    assert exit_status.run(check.main, flags) == 0
    printed = capsys.readouterr().out
    assert "linear_policy_loss" in printed
    assert "activations" in printed
    assert "peak" in printed


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--device", "bogus"], "device 'bogus' cannot be used: RuntimeError: "),
        (["--step", "3"], "unknown --step: perhaps you meant --steps"),
    ],
)
def test_wrong_flags_are_refused_before_the_ops_are_checked(flags, sentence, capsys):
    """An unusable device was a traceback, and a wrong flag was refused after all ops."""
    assert exit_status.run(check.main, flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {sentence}")
    assert printed.out == ""


def test_memory_is_limited_by_any_control_group_around_the_process(tmp_path):
    """A process of a batch job is in a nested group, which may have no limit of its own."""
    job = tmp_path / "slurm/job_7"
    (job / "step_0").mkdir(parents=True)
    (job / "step_0/memory.max").write_text("max\n")
    (job / "memory.max").write_text("4000\n")
    (tmp_path / "slurm/memory.max").write_text("9000\n")
    first = tmp_path / "memory/job"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("5000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/job\n3:cpu,cpuacct:/job\n0::/slurm/job_7/step_0\n")
    assert list(memory_limits(membership, tmp_path)) == [5000, 4000, 9000]
    assert list(memory_limits(tmp_path / "none", tmp_path)) == []


def test_a_compiler_that_does_not_answer_is_named(monkeypatch):
    def hangs(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert version_of_compiler(["c++"]) == "c++ (no answer to --version within 10 s)"
