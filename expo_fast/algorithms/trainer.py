"""The state of a training run, and the parts of a step that all algorithms share.

`Trainer` holds the parts of a run and has no loop: `grpo.run_step`, `dpo.run_step` and
`sft.run_step` take a trainer and the number of a step. An exact resume needs the weights and
`Trainer.state`.
"""

import hashlib
import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from expo_fast.algorithms.dealing import expected_lengths, units_by_prompt
from expo_fast.algorithms.explanations import ExplanationCache
from expo_fast.algorithms.metrics import Metrics, mean
from expo_fast.algorithms.pairs import PairStore
from expo_fast.algorithms.rollout import (
    Group,
    Verifier,
    attempt_requests,
    judge_attempts,
)
from expo_fast.algorithms.run_record import (
    ENDS_OF_TURNS,
    INITIAL_WEIGHTS,
    PROMPT_TEMPLATE,
    TRAINING_DATA,
)
from expo_fast.config import Train
from expo_fast.data.problems import Problem, fingerprint
from expo_fast.data.prompts import Prompter, request_seed
from expo_fast.distributed.world import Deal, World
from expo_fast.generate import Generator
from expo_fast.inference.exact_hidden import exact_hidden
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.layout import Layout
from expo_fast.modeling.lora import MergedCopy, is_attached, merged_copy
from expo_fast.modeling.optimizer import Optimizer
from expo_fast.modeling.packing import Sample
from expo_fast.modeling.schedule import learning_rate
from expo_fast.modeling.sharding import ONE_PROCESS, Place, Sharded
from expo_fast.reporting.timing import Phases
from expo_fast.reward_functions import Reward, RewardError, TrainerState
from expo_fast.runtime import interruptions
from expo_fast.storage import checkpoint

TextRows = list[dict[str, Any]]  # rows of completions/step-N.jsonl
StepResult = tuple[Metrics, TextRows]


@dataclass(frozen=True)
class Boundary:
    """What an unfinished step changes before its first update of the weights."""

    step: int
    """Number of complete steps."""
    sampled_tokens: int
    data_tokens: int
    explanations: ExplanationCache
    lengths: dict[str, float]


@dataclass
class Trainer:
    """The model, data, generator, optimizer and counters of a training run."""

    config: Train
    model: Decoder
    reference: Decoder | None
    """Frozen copy of the initial model. None: the run needs none, or switches its adapter off."""
    prompter: Prompter
    problems: Sequence[Problem]
    reward: Reward
    verify: Verifier
    """Verifier of explanations. The reward may be based on another verifier."""
    generator: Generator
    make_optimizer: Callable[[], Optimizer]
    layout: Layout
    """Where the weights and the optimizer's state are: in this process, or sharded."""
    merged_copy: MergedCopy | None
    """With LoRA, the merged weights to sample from, refreshed after each update."""
    initial_weights_hash: str
    pair_store: PairStore | None = None
    """The pairs of a DPO run."""
    sources: Sequence[Sequence[Problem]] = ()
    """The problems of each source of the data, which `data_weights` are for."""
    held_out: Sequence[Problem] = ()
    """The problems of the evaluations; empty if the run has no evaluations."""
    reward_source: str | None = None
    """A hash of the source of the user's reward functions, None if there is none."""
    origin: checkpoint.Origin | None = None
    """The checkpoint of another run that this run began at, if --resume named one."""
    inexact: list[str] = field(default_factory=list)
    """What differed from the run before at its resumes, each with the step. Empty: the run equals
    an uninterrupted one."""
    notes: list[str] = field(default_factory=list)
    """Lines for the log about how the run is set up."""
    progress: TrainerState = field(default_factory=TrainerState)
    """What reward functions are told of the run. The loop over steps keeps it."""
    explanations: ExplanationCache = field(default_factory=ExplanationCache)
    sampled_tokens: int = 0
    """Prompt and completion tokens of all requests so far."""
    data_tokens: int = 0
    """Tokens of the data's own texts that were trained on so far."""
    lengths: dict[str, float] = field(default_factory=dict)
    """Of a distributed run: the mean length of the last attempts at a question, by problem id."""
    broken_steps: int = 0
    """Consecutive steps, up to the last one, without finite logits or without an update."""
    boundary: Boundary | None = None
    """The end of the last step. The loop over steps sets it."""

    def mark_boundary(self, step: int) -> None:
        """Record that `step` steps are complete. From here on, a signal may end the run again."""
        self.boundary = Boundary(
            step=step,
            sampled_tokens=self.sampled_tokens,
            data_tokens=self.data_tokens,
            explanations=self.explanations.copy(),
            lengths=dict(self.lengths),
        )
        interruptions.allow()

    def return_to_boundary(self) -> int:
        """Abandon a step that has not changed the weights. Return the number of complete steps.

        The state is then that of the end of the last complete step. A resumed run takes the
        abandoned step again, with the same result.
        """
        boundary = self.boundary
        assert boundary is not None
        self.sampled_tokens = boundary.sampled_tokens
        self.data_tokens = boundary.data_tokens
        self.explanations = boundary.explanations
        self.lengths = boundary.lengths
        self.optimizer.grad_sums.clear()
        self.gather_weights()
        return boundary.step

    @cached_property
    def optimizer(self) -> Optimizer:
        """The optimizer, which is made by the first access.

        A dry run does not need one, and its memory is several times that of the weights.
        """
        return self.make_optimizer()

    @property
    def world(self) -> World:
        """The ranks of the run."""
        return self.layout.world

    @property
    def eval_every(self) -> int:
        """Number of steps between evaluations; 0: there are none."""
        return self.config.eval_every if self.held_out else 0

    def count_attempts(self, groups: Iterable[Group]) -> None:
        """Add the tokens of attempts to `sampled_tokens`, and note their lengths."""
        for group in groups:
            lengths = [len(completion.token_ids) for completion in group.completions]
            self.sampled_tokens += len(group.prompt_ids) * len(lengths) + sum(lengths)
            if self.world.size > 1:
                self.lengths[group.problem.id] = mean(lengths) or 0.0

    def deal_questions(self, questions: Sequence[Problem]) -> Deal:
        """Return which rank samples which question, by the lengths to expect.

        A question that has not been attempted is expected to need the limit.
        """
        limit = self.config.max_new_tokens
        ids = [each.id for each in questions]
        return self.world.deal(expected_lengths(ids, self.lengths, limit))

    def own_samples(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples that this rank computes, in their order.

        Samples of one prompt have the same rank, so that their prompt is computed once.
        """
        if self.world.size == 1:
            return list(samples)
        units, costs = units_by_prompt(samples)
        own = self.world.deal(costs).own(units)
        return [sample for unit in own for sample in unit]

    def gather_weights(self) -> None:
        """Sample from now on from the weights that the optimizer has."""
        self.layout.gather()
        if self.layout.moves_weights:
            self.generator.forget_engine()
        if self.merged_copy is not None:
            self.merged_copy.refresh()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and JSON values that an exact resume needs, except the weights."""
        tensors, optimizer = self.optimizer.state_dict()
        values = {
            "optimizer": optimizer,
            "broken": self.broken_steps,
            "read": self.data_tokens,
            "n_tokens": self.sampled_tokens,
            **self.explanations.state(),
        }
        if self.lengths:
            values["lengths"] = self.lengths
        return tensors, values

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore the result of `state`. The model's weights must be restored before."""
        self.optimizer.load_state_dict(tensors, values["optimizer"])
        self.broken_steps = values["broken"]
        self.data_tokens = values["read"]
        self.sampled_tokens = values["n_tokens"]
        self.lengths = dict(values.get("lengths", {}))
        self.explanations.load_state(values)
        self.gather_weights()


def check_same_options(config: Train, world: World) -> None:
    """Raise ValueError if an option differs between ranks.

    Options decide which exchanges follow, so this is checked before them.
    """
    if world.size > 1:
        world.check_same({f"option {name}": value for name, value in asdict(config).items()})


def make_trainer(
    config: Train,
    model: Decoder,
    reference: Decoder | None,
    prompter: Prompter,
    problems: Sequence[Problem],
    reward: Reward,
    verify: Verifier,
    progress: TrainerState | None = None,
    sources: Sequence[Sequence[Problem]] = (),
    place: Place = ONE_PROCESS,
) -> Trainer:
    """Return a trainer with a generator and an optimizer made from the configuration."""
    world = place.world
    initial_weights_hash = weights_hash(model)
    merged = merged_copy(model) if is_attached(model) else None
    if world.size > 1:
        # The ranks compute normalisers and metrics from the same batches. A difference would be no
        # error of any operation, but a wrong result.
        values = {
            INITIAL_WEIGHTS: initial_weights_hash,
            TRAINING_DATA: fingerprint(problems),
            PROMPT_TEMPLATE: prompter.template_hash,
            ENDS_OF_TURNS: prompter.ends_hash,
            "version of torch": torch.__version__.split("+")[0],
        }
        world.check_same(values)
    layout = Layout(model)
    if world.size > 1:
        layout = Sharded(model, place, config.shard)
    if config.batch_invariant:
        model.exact = exact_hidden(layout.sampling_model)
    generator = Generator(
        layout.sampling_model if merged is None else merged.model,
        tokenizer=prompter.tokenizer,
        batch_invariant=config.batch_invariant,
    )
    make_optimizer = partial(
        Optimizer,
        list(layout.named_parameters()),
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        world=world,
        rounded_to=layout.rounded_to,
    )
    trainer = Trainer(
        config=config,
        model=model,
        reference=reference,
        prompter=prompter,
        problems=problems,
        reward=reward,
        verify=verify,
        generator=generator,
        make_optimizer=make_optimizer,
        layout=layout,
        merged_copy=merged,
        initial_weights_hash=initial_weights_hash,
        progress=progress or TrainerState(),
        sources=sources,
    )
    if not config.dry_run:
        _ = trainer.optimizer  # made before the first backward pass, whose gradients it takes
    return trainer


def weights_hash(model: Decoder) -> str:
    """Return a hash of the names, shapes and bits of all parameters.

    The bits of a parameter enter as their sum over all values, as integers. The hash therefore does
    not depend on the number of threads, and two values of a parameter that are exchanged keep it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        integer = torch.int16 if parameter.dtype.itemsize == 2 else torch.int32
        bits = parameter.detach().view(integer).flatten()
        if bits.device.type == "cpu":
            total = int(bits.numpy().sum(dtype="int64"))  # ten times as fast as torch's sum
        else:
            total = sum(int(piece.sum()) for piece in bits.split(1 << 24))
        digest.update(f"{name} {tuple(parameter.shape)} {total}\n".encode())
    return digest.hexdigest()[:16]


def batch_of_step(trainer: Trainer, step: int, seed: int) -> list[Problem]:
    """Return the questions of step `step` (from 0).

    With `data_weights`, each source has its share of them, in an order of its own. The questions of
    all sources are then shuffled, because parts of a batch may get updates of their own.
    """
    config = trainer.config
    if not config.data_weights:
        return questions_of_step(trainer.problems, step, config.prompts_per_step, seed)
    questions = []
    for problems, n in zip(trainer.sources, config.questions_of_sources, strict=True):
        questions += questions_of_step(problems, step, n, seed)
    random.Random(request_seed(seed, "mixture", step)).shuffle(questions)
    return questions


def questions_of_step(
    problems: Sequence[Problem], step: int, size: int, seed: int
) -> list[Problem]:
    """Return the `size` questions of step `step` (from 0).

    Each epoch is a permutation determined by (seed, epoch). The questions at its end that do not
    fill a batch are left out, so that no batch contains a question twice.
    """
    steps_per_epoch = len(problems) // size
    epoch, place = divmod(step, steps_per_epoch)
    order = order_of_epoch(len(problems), request_seed(seed, "order", epoch))
    return [problems[i] for i in order.part(place * size, (place + 1) * size)]


@lru_cache(maxsize=16)  # a source of the data needs one
def order_of_epoch(n: int, seed: int) -> "EpochOrder":
    """Return the order of an epoch, which keeps what was drawn of it."""
    return EpochOrder(n, seed)


class EpochOrder:
    """The permutation `random.Random(seed).sample(range(n), n)`, drawn as far as it is needed.

    The complete permutation of a million takes a second.
    """

    def __init__(self, n: int, seed: int):
        self._left = n
        self._random = random.Random(seed)
        self._moved: dict[int, int] = {}
        """Elements of the pool, range(n), that are not in their place."""
        self._drawn = array("Q")

    def part(self, start: int, end: int) -> Sequence[int]:
        """Return the elements of the permutation from `start` to `end`, without `end`."""
        while len(self._drawn) < end:
            self._draw()
        return self._drawn[start:end]

    def _draw(self) -> None:
        """Take a random element out of the pool, and put the last one into its place."""
        place = self._random.randrange(self._left)
        self._drawn.append(self._moved.get(place, place))
        self._left -= 1
        last = self._moved.pop(self._left, self._left)
        if place != self._left:
            self._moved[place] = last


def sample_and_judge(
    trainer: Trainer, questions: Sequence[Problem], step: int, phases: Phases
) -> list[Group]:
    """Sample G attempts at each question and judge them."""
    config = trainer.config
    deal = trainer.deal_questions(questions)
    own = deal.own(questions)
    with trainer.world.agreed(shared=RewardError):
        with phases.phase("generate"):
            requests = attempt_requests(own, trainer.prompter, config, step)
            completions = trainer.generator.sample(requests)
        with phases.phase("reward"), interruptions.immediate():
            groups = judge_attempts(own, completions, trainer.prompter, trainer.reward, config)
    groups = deal.collect(groups)
    trainer.count_attempts(groups)
    return groups


def optimizer_step(trainer: Trainer, update: int, phases: Phases) -> Metrics:
    """Update the weights with the gradients summed so far.

    update: number of the update in the run, from 0. It determines the learning rate.
    """
    config = trainer.config
    rate = learning_rate(
        update,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=config.steps * config.updates_per_batch,
        schedule=config.schedule,
    )
    interruptions.defer()  # until the step is complete: half a step cannot be saved
    with phases.phase("optimizer"):
        report = trainer.optimizer.step(rate, config.max_grad_norm)
        trainer.gather_weights()
    return {
        "grad_norm": report.grad_norm,
        "update_norm": report.update_norm,
        "learning_rate": rate,
    }
