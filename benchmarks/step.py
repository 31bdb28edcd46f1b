"""Time complete GRPO steps beside those of TRL, step by step in one process.

    python -m benchmarks.step                          8 questions x 4 attempts, no worked examples
    python -m benchmarks.step --shots 2 --group 16     longer prompts, which all samples share
    python -m benchmarks.step --check                  loss and gradients on equal samples, in fp32

Both train SmolLM2-135M on the same questions with the same sizes and the same reward, which is the
parity of the sum of a completion's token ids. Both ignore end tokens, so all completions have the
full length. TRL uses transformers' static cache. Our packs have at most the tokens of its batches.
After each step of TRL comes one of ours. In the second half of the steps, about half of the groups
get equal rewards, so that they have no gradient.

The floor is what the counted work takes at the highest rates that are measured on the machine: the
products at the rate of torch.mm, and each step of sampling at the rate of a copy, if that takes
longer. It counts our work, in which a shared prefix is computed once.

The last line is one JSON object with `ratio` and `ratio_half_zero`, the medians of TRL's time over
ours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Stopwatch, ceilings, peak_bytes
from benchmarks.summary import machine
from expo_fast import train
from expo_fast.algorithms import grpo
from expo_fast.algorithms.trainer import Trainer, questions_of_step
from expo_fast.algorithms.training_data import load_training_data
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.packing import Sample, forward, pack
from expo_fast.ops import linear_policy_loss
from expo_fast.reporting.timing import Phases
from expo_fast.weights import save_model

MODEL = "smollm2-135m"
LEARNING_RATE = 1e-6
PADDING = 2  # the padding token of SmolLM2


@dataclass
class Job:
    """The sizes of a step, and which groups get equal rewards."""

    prompts: int
    group: int
    new_tokens: int
    shots: int
    micro_batch: int
    dtype: str
    half_zero: bool = False

    def reward(self, problem_id: str, tokens: Sequence[int]) -> float:
        if self.half_zero and sum(problem_id.encode()) % 2:
            return 0.0
        return float(sum(tokens) % 2)


@dataclass
class Times:
    """Seconds of steps, and of their phases."""

    steps: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)

    def median(self) -> float:
        return statistics.median(self.steps)

    def median_phases(self) -> dict[str, float]:
        names = {name for phases in self.phases for name in phases}
        return {
            name: statistics.median(phases.get(name, 0.0) for phases in self.phases)
            for name in sorted(names)
        }


def our_trainer(job: Job) -> Trainer:
    """Return our trainer, with the reward of the job, and without end tokens."""
    dtype: Any = job.dtype
    config = Train(
        method="grpo",
        model=MODEL,
        shots=job.shots,
        prompts_per_step=job.prompts,
        num_generations=job.group,
        max_completion_length=job.new_tokens,
        dtype=dtype,
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.0,
        steps=1000,
        eval_every=0,
        diagnose=0,
        device="cpu",
    )
    trainer = train.build_trainer(config, load_training_data(config))
    trainer.model.generation_config = None
    trainer.model.config.eos_token_id = []

    def reward(problems: Sequence[Problem], texts: Sequence[str], completions: Sequence) -> list:
        pairs = zip(problems, completions, strict=True)
        return [job.reward(problem.id, completion.token_ids) for problem, completion in pairs]

    trainer.reward = reward
    return trainer


def questions(trainer: Trainer, step: int) -> list[Problem]:
    config = trainer.config
    return questions_of_step(trainer.problems, step, config.prompts_per_step, config.seed)


def take_our_step(trainer: Trainer, job: Job, step: int, times: Times) -> None:
    # TRL pads the prompts of a step to the longest one.
    lengths = [len(trainer.prompter.solve(problem)) for problem in questions(trainer, step)]
    batch_tokens = job.micro_batch * (max(lengths) + job.new_tokens)
    trainer.config = replace(trainer.config, pack_tokens=batch_tokens)
    phases = Phases()
    start = time.perf_counter()
    grpo.run_step(trainer, step, phases)
    times.steps.append(time.perf_counter() - start)
    seconds = {name.removeprefix("time/"): s for name, s in phases.seconds().items()}
    times.phases.append({name: s for name, s in seconds.items() if s > 1e-3})


class TrlSteps:
    """TRL's trainer on the questions of our trainer's steps."""

    def __init__(self, job: Job, trainer: Trainer, n_steps: int, folder: str):
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        self.times = Times()
        self._seconds: dict[str, float] = {}
        self.after_step: Callable[[int], None] = lambda step: None
        save_folder = model_folder(trainer, folder)
        model = AutoModelForCausalLM.from_pretrained(
            save_folder, dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(save_folder)
        rows = []
        for step in range(n_steps):
            for problem in questions(trainer, step):
                text = trainer.prompter.tokenizer.decode(trainer.prompter.solve(problem))
                rows.append({"prompt": text, "problem_id": problem.id})
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=job.micro_batch,
            gradient_accumulation_steps=job.prompts * job.group // job.micro_batch,
            num_generations=job.group,
            max_completion_length=job.new_tokens,
            max_steps=n_steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=0.0,
            loss_type="grpo",
            scale_rewards="group",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1000,
            shuffle_dataset=False,
            cache_implementation="static",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            weight_decay=0.0,
        )

        def reward(*, completion_ids, problem_id, **others) -> list[float]:
            pairs = zip(problem_id, completion_ids, strict=True)
            return [job.reward(name, tokens) for name, tokens in pairs]

        any_reward: Any = reward
        self.trainer: Any = GRPOTrainer(
            model=model,
            reward_funcs=any_reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[self._callback()],
        )
        for generation in (self.trainer.generation_config, self.trainer.model.generation_config):
            generation.eos_token_id = -1
        self.trainer.eos_token_ids = [-1]
        for name in ("_generate_single_turn", "compute_loss"):
            setattr(self.trainer, name, self._timed(name, getattr(self.trainer, name)))
        self.trainer.accelerator.backward = self._timed(
            "backward", self.trainer.accelerator.backward
        )

    def _timed(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                passed = time.perf_counter() - start
                self._seconds[name] = self._seconds.get(name, 0.0) + passed

        return timed

    def _callback(self) -> Any:
        from transformers import TrainerCallback

        steps = self

        class Clock(TrainerCallback):
            def on_step_begin(self, args, state, control, **others):
                steps._seconds.clear()
                self.start = time.perf_counter()

            def on_pre_optimizer_step(self, args, state, control, **others):
                self.optimizer_start = time.perf_counter()

            def on_optimizer_step(self, args, state, control, **others):
                steps._seconds["optimizer"] = time.perf_counter() - self.optimizer_start

            def on_step_end(self, args, state, control, **others):
                steps.times.steps.append(time.perf_counter() - self.start)
                names = {"_generate_single_turn": "generate", "compute_loss": "forward"}
                named = {names.get(name, name): s for name, s in steps._seconds.items()}
                steps.times.phases.append(named)
                steps.after_step(state.global_step)

        return Clock()


def model_folder(trainer: Trainer, folder: str) -> str:
    """Save the model of the trainer for transformers, and return the folder."""
    path = Path(folder) / "model"
    if not path.exists():
        save_model(trainer.model, trainer.prompter.tokenizer, path)
    return str(path)


def compare(job: Job, n_steps: int) -> dict[str, Any]:
    """Return the times of n_steps steps of each half, after a step that is not counted."""
    trainer = our_trainer(job)
    lengths = [len(trainer.prompter.solve(problem)) for problem in questions(trainer, 0)]
    print(f"{job}, prompts of {min(lengths)} to {max(lengths)} tokens", flush=True)
    ours = Times()
    total = 2 * n_steps + 1
    with tempfile.TemporaryDirectory() as folder:
        trl = TrlSteps(job, trainer, total, folder)

        def after_step(done: int) -> None:
            take_our_step(trainer, job, done - 1, ours)
            trl_seconds = trl.times.steps[-1]
            print(f"step {done}: TRL {trl_seconds:.2f} s, ours {ours.steps[-1]:.2f} s", flush=True)
            job.half_zero = done > n_steps  # the next step's rewards

        trl.after_step = after_step
        trl.trainer.train()
    ratios = [theirs / own for theirs, own in zip(trl.times.steps, ours.steps, strict=True)]
    result: dict[str, Any] = {}
    for name, first in (("", 1), ("_half_zero", n_steps + 1)):
        part = slice(first, first + n_steps)
        their_part = Times(trl.times.steps[part], trl.times.phases[part])
        our_part = Times(ours.steps[part], ours.phases[part])
        print_phases(f"steps {first + 1} to {first + n_steps}{name}", our_part, their_part)
        result[f"ratio{name}"] = statistics.median(ratios[part])
        result[f"range{name}"] = [min(ratios[part]), max(ratios[part])]
        result[f"ours{name}"] = our_part.median()
        result[f"trl{name}"] = their_part.median()
    result["floor"] = floor_seconds(trainer)
    return result


def print_phases(title: str, ours: Times, theirs: Times) -> None:
    print(f"{title}: TRL {theirs.median():.2f} s, ours {ours.median():.2f} s")
    for name, times in (("TRL", theirs), ("ours", ours)):
        parts = ", ".join(f"{phase} {s:.2f}" for phase, s in times.median_phases().items())
        print(f"  {name}: {parts}")


def floor_seconds(trainer: Trainer) -> float:
    """Return the seconds of the counted work of a step in which all groups have a gradient."""
    config = trainer.config
    rates = ceilings("cpu")
    flops = max(rates.flops, fp32_rate())
    groups = questions(trainer, 0)
    attempts = [(0,) * config.max_new_tokens] * config.num_generations
    samples = train_samples(trainer, groups, attempts)
    packs = list(pack(samples, config.pack_tokens))
    layers = sum(p.numel() for p in trainer.model.model.layers.parameters())
    head = trainer.model.head_weight.numel()
    n_tokens = sum(len(each.tokens) for each in packs)
    n_rows = sum(len(each.rows) for each in packs)
    training = 6 * (layers * n_tokens + head * n_rows) / flops
    prompt_tokens = sum(len(trainer.prompter.solve(problem)) for problem in groups)
    prefill = 2 * layers * prompt_tokens / flops
    sequences = len(samples)
    step_flops = 2 * (layers + head) * sequences / flops
    step_bytes = (layers + head) * trainer.model.dtype.itemsize / (rates.bytes / 2)
    sampling = config.max_new_tokens * max(step_flops, step_bytes)
    return training + prefill + sampling


def train_samples(trainer: Trainer, groups: Sequence[Problem], attempts: Sequence) -> list[Sample]:
    return [
        Sample(trainer.prompter.solve(problem), attempt)
        for problem in groups
        for attempt in attempts
    ]


def fp32_rate() -> float:
    """Return the FLOP/s of an fp32 product of a forward's shape."""
    m, k, n = 1024, 1024, 4096
    a = torch.randn(m, k)
    b = torch.randn(n, k)
    stopwatch = Stopwatch("cpu")
    seconds = []
    for _ in range(8):
        stopwatch.start()
        torch.mm(a, b.T)
        seconds.append(stopwatch.stop()[0])
    return 2 * m * k * n / min(seconds)


def peak_memory(job: Job, which: str) -> float:
    """Take a step, and return by how many GB the peak memory of this process has grown."""
    before = peak_bytes()
    trainer = our_trainer(job)
    if which == "ours":
        take_our_step(trainer, job, 0, Times())
    else:
        with tempfile.TemporaryDirectory() as folder:
            trl = TrlSteps(job, trainer, 1, folder)
            del trainer
            trl.trainer.train()
    return (peak_bytes() - before) / 1e9


def memory_of(which: str, arguments: Sequence[str]) -> float:
    """Return `peak_memory` of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", "--memory", which, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["gb"]


def check(job: Job) -> dict[str, float]:
    """Compare loss and gradients with transformers' on equal samples, in fp32 and in fp64.

    transformers' embedding has a padding row, whose gradient it drops. It is left out. The errors
    are relative to the norm of all gradients. fp64 is the judge.
    """
    trainer = our_trainer(job)
    groups = grpo.sample_groups(trainer, 0, Phases())
    groups = grpo.with_advantages(groups, trainer.config)
    samples = grpo.policy_samples(groups, trainer.config)
    with tempfile.TemporaryDirectory() as folder:
        path = model_folder(trainer, folder)
        truth_loss, truth = their_gradients(path, torch.float64, samples)
        their_loss, theirs = their_gradients(path, torch.float32, samples)
    our_loss, ours = our_gradients(trainer, samples)
    return {
        "loss_difference": abs(our_loss - their_loss),
        "our_loss_error": abs(our_loss - truth_loss),
        "gradient_difference": difference(ours, theirs),
        "our_gradient_error": difference(ours, truth),
        "their_gradient_error": difference(theirs, truth),
    }


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference, relative to the norm of `expected`."""
    squares = sum(float(x.square().sum()) for x in expected.values())
    wrong = sum(float((found[name] - x).square().sum()) for name, x in expected.items())
    return (wrong / squares) ** 0.5


def their_gradients(
    folder: str, dtype: torch.dtype, samples: Sequence[Sample]
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of samples on the policy and its gradients (fp64), from transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    total = 0.0
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
        n = len(sample.completion_ids)
        logits = model(ids[:, :-1], logits_to_keep=n).logits[0]
        logp = logits.log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0]
        # On the policy, the ratio is 1, and its derivative is that of the log-prob.
        ratio = (logp - logp.detach()).exp()
        loss = -sample.advantage * sample.row_weight * ratio.sum()
        loss.backward()
        total += loss.item()
    return total, gradients_of(model)


def our_gradients(trainer: Trainer, samples: Sequence[Sample]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of samples on the policy and its gradients (fp64)."""
    model = Decoder(trainer.model.config)  # without the hooks that take the gradients
    model.load_state_dict(trainer.model.state_dict())
    total = 0.0
    for each, hidden in forward(model, samples, trainer.config.pack_tokens):
        result = linear_policy_loss(
            hidden,
            model.head_weight,
            each.targets,
            each.advantage,
            row_weight=each.row_weight,
        )
        result.loss.backward()
        total += result.loss.item()
    return total, gradients_of(model)


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradients in fp64, without that of the padding token's embedding."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.double()
    embedding = found["model.embed_tokens.weight"]
    embedding[PADDING] = 0
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences of TRL's batches")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of each half")
    parser.add_argument("--check", action="store_true", help="compare loss and gradients")
    parser.add_argument("--memory", choices=["ours", "trl"], help="print one's peak memory")
    arguments = list(sys.argv[1:] if argv is None else argv)
    given = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore")
    job = Job(
        prompts=given.prompts,
        group=given.group,
        new_tokens=given.new_tokens,
        shots=given.shots,
        micro_batch=given.micro_batch,
        dtype="float32" if given.check else given.dtype,
    )
    if given.memory:
        print(json.dumps({"gb": peak_memory(job, given.memory)}))
        return
    if given.check:
        print(json.dumps(check(job)))
        return
    result = compare(job, given.steps)
    for which in ("ours", "trl"):
        result[f"gb_{which}"] = memory_of(which, arguments)
    result["memory_ratio"] = result["gb_ours"] / result["gb_trl"]
    rounded = {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in result.items()
    }
    print(json.dumps(machine()))
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
