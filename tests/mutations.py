"""Break the code one line at a time, and see whether the tests notice.

    python tests/mutations.py            apply each mutation to a copy, and run its tests
    python tests/mutations.py NAME ...   some of them

Prints "caught" or "SURVIVED" for each, and exits with 1 if one survived. It is not part of
`make test`. A mutation names the test files that should fail; -x stops at the first failure.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """One line that is replaced by another."""

    name: str
    file: str
    old: str  # occurs exactly once in the file
    new: str
    tests: str  # arguments of pytest


OPTIONS = "tests/test_every_option.py"
POISON = "tests/test_poison.py -k "
GRPO = "expo_fast/algorithms/grpo.py"
ROLLOUT = "expo_fast/algorithms/rollout.py"
TRAINER = "expo_fast/algorithms/trainer.py"
EXPLANATIONS = "expo_fast/algorithms/explanations.py"
SAVING = "expo_fast/algorithms/saving.py"
SAVES = "tests/test_saving.py"
RESUME = "expo_fast/algorithms/resume.py"
INTERRUPTIONS = "expo_fast/runtime/interruptions.py"
FILES = "expo_fast/storage/files.py"
SHARDING = "expo_fast/modeling/sharding.py"
RANKS = "tests/test_distributed.py"
NATIVE_OPTIMIZER = "csrc/optimizer.cpp"

MUTATIONS = [
    # The loss
    Mutation(
        "old log-probs are the generator's",
        GRPO,
        "[replace(sample, old_logp=logp) for sample, logp in zip(samples, old, strict=True)]",
        "[replace(sample, old_logp=logp + 0.1) for sample, logp in zip(samples, old, strict=True)]",
        "tests/test_grpo.py",
    ),
    Mutation(
        "no old log-probs",
        GRPO,
        "[replace(sample, old_logp=logp) for sample, logp in zip(samples, old, strict=True)]",
        "[replace(sample, old_logp=None) for sample, logp in zip(samples, old, strict=True)]",
        "tests/test_grpo.py",
    ),
    Mutation(
        "samples with an error are not masked",
        ROLLOUT,
        'if completion.finish_reason == "error":',
        'if completion.finish_reason == "no error":',
        "tests/test_grpo.py tests/test_methods.py",
    ),
    Mutation(
        "the lift takes a mean of log-probs",
        "expo_fast/algorithms/diagnostics.py",
        "log_mean = largest + math.log(mean_ratio or 0.0)",
        "log_mean = sum(attempts) / len(attempts)",
        "tests/test_diagnostics.py",
    ),
    # Options that are not read
    Mutation(
        "entropy_coef",
        GRPO,
        "entropy_coef=config.entropy_coef,\n            forward=",
        "forward=",
        OPTIONS,
    ),
    Mutation(
        "overlong_buffer",
        ROLLOUT,
        "if not config.overlong_buffer:",
        "if True:",
        OPTIONS,
    ),
    Mutation("advantage_scale", GRPO, "scale=config.advantage_scale", 'scale="group"', OPTIONS),
    Mutation(
        "mask_truncated",
        ROLLOUT,
        'return config.mask_truncated and completion.finish_reason == "length"',
        "return False",
        OPTIONS,
    ),
    Mutation("top_p", ROLLOUT, "top_p=config.top_p", "top_p=1.0", OPTIONS),
    Mutation("top_k", ROLLOUT, "top_k=config.top_k", "top_k=0", OPTIONS),
    Mutation("min_p", ROLLOUT, "min_p=config.min_p", "min_p=0.0", OPTIONS),
    Mutation(
        "warmup_steps", TRAINER, "warmup_steps=config.warmup_steps", "warmup_steps=1", OPTIONS
    ),
    Mutation("betas", TRAINER, "betas=config.betas", "betas=(0.9, 0.999)", OPTIONS),
    Mutation("eps", TRAINER, "eps=config.eps", "eps=1e-8", OPTIONS),
    Mutation(
        "weight_decay", TRAINER, "weight_decay=config.weight_decay", "weight_decay=0.0", OPTIONS
    ),
    Mutation(
        "max_grad_norm",
        TRAINER,
        "trainer.optimizer.step(rate, config.max_grad_norm)",
        "trainer.optimizer.step(rate, 1.0)",
        OPTIONS,
    ),
    Mutation(
        "eval_temperature",
        "expo_fast/train.py",
        "temperature=config.eval_temperature",
        "temperature=0.7",
        OPTIONS,
    ),
    Mutation(
        "explain_temperature",
        EXPLANATIONS,
        "temperature=config.explain_temperature",
        "temperature=0.8",
        OPTIONS,
    ),
    Mutation(
        "explain_every is off by one",
        EXPLANATIONS,
        "every = config.explain_every",
        "every = config.explain_every + 1",
        "tests/test_explanations.py tests/test_grpo.py tests/test_train.py " + OPTIONS,
    ),
    # The optimizer
    Mutation(
        "clipping of the sum of two terms",
        NATIVE_OPTIMIZER,
        "(first[i] + second[i]) * o.clip",
        "first[i] + second[i]",
        "tests/test_optim.py",
    ),
    Mutation(
        "the last elements of a tensor",
        NATIVE_OPTIMIZER,
        "const int64_t full = std::min(n, rest - at);",
        "const int64_t full = n;",
        "tests/test_optim.py",
    ),
    Mutation(
        "norms after a later gradient",
        "expo_fast/modeling/grad_sums.py",
        "        if self._pending:\n            self._squares = None\n",
        "",
        "tests/test_optim.py",
    ),
    Mutation(
        "the log-probs of ranking are of another text",
        "expo_fast/algorithms/logprobs.py",
        "self.values[sample.prompt_ids, sample.completion_ids] = values.clone()",
        "self.values[sample.prompt_ids, sample.completion_ids] = values - 1",
        "tests/test_diagnostics.py",
    ),
    # Memory that no kernel has written
    Mutation(
        "values of unwritten tokens",
        "csrc/decoder.cpp",
        "if (!token) std::fill_n(to, kPage * s.value_width, T{});",
        "",
        POISON + "engines",
    ),
    Mutation(
        "running sums of attention",
        "csrc/decoder.cpp",
        "    std::fill_n(buffers.sum, queries * s.value_width, 0.0f);\n",
        "",
        POISON + "engines",
    ),
    Mutation(
        "a product's sums in registers",
        "csrc/gemm.h",
        "for (int j = 0; j < J; ++j) sum[r][j] = Lanes{};",
        "for (int j = 0; j < J; ++j) {}",
        POISON + "native",
    ),
    Mutation(
        "columns that pad a block of tokens",
        "csrc/linear_logprob.cpp",
        "        const bool real = token < n && k < d;\n",
        "        const bool real = token < n && k < d;\n        if (!real) continue;\n",
        POISON + "native",
    ),
    Mutation(
        "the bias gradient's sums",
        "csrc/linear_logprob.cpp",
        "if (g.d_bias) std::fill_n(bias_sum, rows, Lanes{});",
        "",
        POISON + "native",
    ),
    Mutation(
        "gradients of a batch without rows",
        "expo_fast/op_backends/cpu.py",
        "sums.zero_()",
        "pass",
        POISON + "native",
    ),
    Mutation(
        "hidden gradients of inactive rows",
        "expo_fast/op_backends/triton_fused.py",
        "out.zero_().index_copy_",
        "out.index_copy_",
        POISON + "triton",
    ),
    Mutation(
        "padding of the exponentials that are kept",
        "kernels/logprob.py",
        "    e[:, len(head.weight) :] = 0\n",
        "",
        POISON + "triton",
    ),
    Mutation(
        "log_total of rows that are not kept",
        "expo_fast/op_backends/triton_fused.py",
        "log_total = results.logp.new_zeros(n)",
        "log_total = results.logp.new_empty(n)",
        POISON + "triton",
    ),
    Mutation(
        "results of rows without a target",
        "expo_fast/op_backends/row_selection.py",
        "return x.new_zeros(n, *x.shape[1:]).index",
        "return x.new_empty(n, *x.shape[1:]).index",
        POISON + "torch",
    ),
    Mutation(
        "keys and values beyond the newest token",
        "kernels/decode.py",
        "values = tl.load(at + PAGE * HKV * DH, inside, 0.0)",
        "values = tl.load(at + PAGE * HKV * DH, deep[None, :], 0.0)",
        POISON + "gpu",
    ),
    Mutation(
        "slots of a step that has no rows yet",
        "kernels/decode.py",
        "used=torch.zeros(sizes.rows",
        "used=torch.ones(sizes.rows",
        POISON + "captured",
    ),
    Mutation(
        "gradients of the last copies of a key",
        "kernels/training_layer.py",
        "store_rounded(v_out + at, v_sum, inside)",
        "store_rounded(v_out + at, v_sum, inside & (n_copies > 1)[:, None])",
        POISON + "training_with",
    ),
    Mutation(
        "a second buffer of gradient sums",
        "expo_fast/modeling/grad_sums.py",
        "torch._foreach_copy_(*_columns(copied))",
        "torch._foreach_add_(*_columns(copied))",
        POISON + "training",
    ),
    # Signals, full disks and collapses
    Mutation(
        "a signal is swallowed",
        INTERRUPTIONS,
        "raise Stopped(self.stop_signal)",
        "return",
        "tests/test_interruptions.py",
    ),
    Mutation(
        "a signal does not reach a reward function",
        INTERRUPTIONS,
        "self._n_immediate += 1",
        "self._n_immediate += 0",
        "tests/test_interruptions.py",
    ),
    Mutation(
        "half a step is saved",
        TRAINER,
        "interruptions.defer()",
        "pass",
        "tests/test_interruptions.py",
    ),
    Mutation(
        "tokens of an abandoned step count",
        TRAINER,
        "self.sampled_tokens = boundary.sampled_tokens",
        "pass",
        "tests/test_interruptions.py",
    ),
    Mutation(
        "gradients of an abandoned step remain",
        TRAINER,
        "self.optimizer.grad_sums.clear()",
        "pass",
        "tests/test_interruptions.py",
    ),
    Mutation(
        "an interrupted evaluation is forgotten",
        "expo_fast/train.py",
        "return is_due(start, trainer.eval_every, trainer.config.steps)",
        "return False",
        "tests/test_interruptions.py",
    ),
    Mutation(
        "a retry never comes",
        SAVING,
        "self._retry_at = step + wait",
        "self._retry_at = None",
        SAVES,
    ),
    Mutation(
        "pairs are not written before a checkpoint",
        SAVING,
        "trainer.pair_store.files.flush()",
        "pass",
        SAVES,
    ),
    Mutation(
        "the best checkpoint is removed",
        "expo_fast/storage/checkpoint.py",
        "if path in kept:",
        "if path == max(kept):",
        SAVES,
    ),
    Mutation(
        "weights that are not finite are saved",
        SAVING,
        "name = first_non_finite(trainer.model.named_parameters())",
        "name = None",
        SAVES,
    ),
    Mutation(
        "a checkpoint that is not finite is resumed",
        "expo_fast/storage/checkpoint.py",
        "        reason = _non_finite(path)\n        if reason is None:\n",
        "        reason = None\n        if reason is None:\n",
        SAVES,
    ),
    Mutation(
        "a checkpoint is not synced",
        "expo_fast/storage/checkpoint.py",
        "        _sync_tree(temporary)\n",
        "",
        "tests/test_checkpoint.py",
    ),
    Mutation(
        "a row is not synced",
        FILES,
        "                os.fsync(file.fileno())\n            except OSError as error:\n",
        "            except OSError as error:\n",
        "tests/test_log.py",
    ),
    Mutation(
        "a full disk leaves a part of a row",
        FILES,
        "file.truncate(end)",
        "pass",
        "tests/test_log.py",
    ),
    Mutation(
        "rows of a full disk are lost",
        FILES,
        '        data = b"".join(self._waiting)\n',
        '        data = b"".join(self._waiting)\n        self._waiting = []\n',
        "tests/test_log.py " + SAVES,
    ),
    Mutation(
        "an alarm comes a step late",
        "expo_fast/algorithms/alarms.py",
        "n_steps >= self._config.alarm_steps",
        "n_steps > self._config.alarm_steps",
        "tests/test_alarms.py",
    ),
    Mutation(
        "a changed reward function is resumed",
        RESUME,
        '        values["reward functions"] = trainer.reward_source\n',
        "        pass\n",
        "tests/test_resume.py",
    ),
    Mutation(
        "a log that lacks rows is resumed",
        RESUME,
        "            damages[name] = damage\n",
        "            pass\n",
        "tests/test_resume.py",
    ),
    Mutation(
        "rows behind a checkpoint's cursor are kept",
        "expo_fast/reporting/run_log.py",
        "counter.cursor().rows < cursor.rows or is_evaluation",
        "row",
        "tests/test_resume.py",
    ),
    Mutation(
        "a record that differs from its copy is believed",
        "expo_fast/algorithms/run_record.py",
        "if copy is not None and _fixed_options(config) != _fixed_options(copy):",
        "if copy is not None and _fixed_options(config) is None:",
        "tests/test_resume.py",
    ),
    Mutation(
        "a signal to all processes ends the grader",
        "expo_fast/answers/nursery.py",
        "    ignore_signals()\n    die_with(parent)",
        "    die_with(parent)",
        "tests/test_reward.py",
    ),
    # Other lines
    Mutation(
        "resume forgets the tokens counted",
        TRAINER,
        'self.sampled_tokens = values["n_tokens"]',
        "self.sampled_tokens = 0",
        "tests/test_train.py",
    ),
    Mutation(
        "resume forgets skipped steps",
        "expo_fast/modeling/optimizer.py",
        'self.skipped = values["skipped"]',
        "self.skipped = 0",
        "tests/test_optim.py",
    ),
    Mutation(
        "a pack takes one token too many",
        "expo_fast/modeling/packing.py",
        "if members and size + n_added > max_tokens:",
        "if members and size + n_added > max_tokens + 1:",
        "tests/test_pack.py",
    ),
    Mutation(
        "the common prefix takes a prompt's last token",
        "expo_fast/modeling/packing.py",
        "limit = min(map(len, prompts)) - 1",
        "limit = min(map(len, prompts))",
        "tests/test_pack.py tests/test_generate.py",
    ),
    Mutation(
        "a window sees one token more",
        "expo_fast/modeling/attention.py",
        "return causal.triu(offset - window + 1)",
        "return causal.triu(offset - window)",
        "tests/test_model.py",
    ),
    Mutation(
        "the advantage's deviation is of the population",
        "kernels/advantage.py",
        "(count - 1).clamp(min=1)",
        "count.clamp(min=1)",
        "tests/test_ops.py",
    ),
    Mutation(
        "an answer is read from the thoughts",
        "expo_fast/data/answer_grading.py",
        'max(0, text.rfind("</think>"))',
        "0",
        "tests/test_reward.py tests/test_answer.py",
    ),
    Mutation(
        "any unit is as good as another",
        "expo_fast/answers/notations.py",
        "if not same_dimension(x.unit, y.unit):",
        "if False:",
        "tests/test_answer_families.py",
    ),
    Mutation(
        "a closed interval is an open one",
        "expo_fast/answers/aggregates.py",
        "if (a.low_closed, a.high_closed) != (b.low_closed, b.high_closed):",
        "if False:",
        "tests/test_answer_families.py",
    ),
    Mutation(
        "an equation is a multiple of any other",
        "expo_fast/answers/quotients.py",
        "return ratios.pop() if len(ratios) == 1 else None",
        "return ratios.pop()",
        "tests/test_answer_families.py",
    ),
    Mutation(
        "a stop string ends nothing",
        "expo_fast/inference/stop_rules.py",
        "return any(string in tail for string in strings)",
        "return False",
        "tests/test_generate.py",
    ),
    Mutation(
        "released pages are free while others hold them",
        "expo_fast/inference/kv_pages.py",
        "            if not self._holders[page]:\n",
        "            if True:\n",
        "tests/test_cache.py",
    ),
    Mutation(
        "a draw takes the next seed",
        "expo_fast/inference/sampling.py",
        "mixed = _mix(_mix(seeds) ^ (positions * _GOLDEN))",
        "mixed = _mix(_mix(seeds + 1) ^ (positions * _GOLDEN))",
        "tests/test_sampling.py tests/test_generate.py",
    ),
    Mutation(
        "weight decay reaches vectors",
        "expo_fast/modeling/optimizer.py",
        '{"params": vectors, "weight_decay": 0.0}',
        '{"params": vectors, "weight_decay": self._weight_decay}',
        "tests/test_optim.py",
    ),
    Mutation(
        "old checkpoints are never removed",
        "expo_fast/storage/checkpoint.py",
        "shutil.rmtree(doomed)",
        "str(doomed)",
        "tests/test_checkpoint.py tests/test_train.py",
    ),
    # Several ranks
    Mutation(
        "FSDP averages the gradients of the ranks",
        SHARDING,
        "            sharded.set_gradient_divide_factor(1.0)\n",
        "",
        RANKS,
    ),
    Mutation(
        "the weights are not those of the optimizer after an update",
        SHARDING,
        "complete.copy_(parts.flatten()[: complete.numel()].view_as(complete))",
        "complete.copy_(complete)",
        RANKS,
    ),
    Mutation(
        "the norm of the gradient is that of a rank's part",
        "expo_fast/modeling/l2_norms.py",
        "return math.sqrt(world.sums(own)[0])",
        "return math.sqrt(own)",
        RANKS,
    ),
    Mutation(
        "a rank normalises by its own samples",
        "expo_fast/algorithms/sft.py",
        "(n_samples,) = world.sums(len(samples))",
        "n_samples = len(samples)",
        RANKS,
    ),
    # Hostile answers, mistakes of users, files
    Mutation(
        "no answer is too large",
        "expo_fast/data/grader_pool.py",
        "if is_too_large(job.reference) or is_too_large(job.answer):",
        "if False:",
        "tests/test_bombs.py",
    ),
    Mutation(
        "many answers at a limit do not shorten it",
        "expo_fast/data/grader_pool.py",
        "if sum(self._limited) >= MANY",
        "if False",
        "tests/test_bombs.py",
    ),
    Mutation(
        "an answer at a limit is wrong",
        "expo_fast/data/grader_pool.py",
        'reasons[job] = "timeout" if late else ending',
        'reasons[job] = "wrong"',
        "tests/test_reward.py tests/test_bombs.py",
    ),
    Mutation(
        "the process that forks workers has our environment",
        "expo_fast/data/programs.py",
        "env=bare_environment(),",
        "env={**os.environ, **bare_environment()},",
        "tests/test_bombs.py",
    ),
    Mutation(
        "a reward function has no limit of time",
        "expo_fast/reward_functions.py",
        "with time_limit(timeout_s):",
        "with time_limit(8.0):",
        "tests/test_reward_mistakes.py",
    ),
    Mutation(
        "control tokens are never escaped",
        "expo_fast/data/prompts.py",
        "if self.escape:",
        "if False:",
        "tests/test_hostile_folders.py",
    ),
    Mutation(
        "a manifest may list too little",
        "expo_fast/storage/checkpoint.py",
        "        if unlisted is not None:\n",
        "        if False:\n",
        "tests/test_checkpoint.py",
    ),
    Mutation(
        "weights are private",
        "expo_fast/storage/files.py",
        "path.chmod(0o666 & ~mask)",
        "path.chmod(0o600)",
        "tests/test_checkpoint.py",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    unknown = set(names) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"no mutation is called {sorted(unknown)[0]!r}")
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy_tree(copy)
        for mutation in chosen:
            caught = try_out(mutation, copy)
            survived += not caught
            print(f"{'caught' if caught else 'SURVIVED':10s}{mutation.name}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    sys.exit(survived > 0)


def copy_tree(target: Path) -> None:
    """Copy the files that git tracks."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and ((ROOT / name).is_file() or (ROOT / name).is_symlink()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name, follow_symlinks=False)


def try_out(mutation: Mutation, copy: Path) -> bool:
    """Return whether tests fail with the mutation.

    Raise SystemExit if the line does not occur exactly once, or if no test ran.
    """
    file = copy / mutation.file
    text = file.read_text()
    if text.count(mutation.old) != 1:
        n = text.count(mutation.old)
        sys.exit(f"{mutation.name}: {mutation.old!r} occurs {n} times in {mutation.file}")
    file.write_text(text.replace(mutation.old, mutation.new))
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(
            [*command, *mutation.tests.split()],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
    finally:
        file.write_text(text)
    if done.returncode not in (0, 1):  # 1: tests failed
        sys.exit(f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 1


if __name__ == "__main__":
    main()
