"""Compare preference losses and their gradients with TRL's trainers on the same pairs, in fp32.

TRL runs transformers' model over padded rows with repeated prompts. Ours runs the Decoder over a
pack that holds each prompt once. TRL 1.16 has no DPOP and no R-DPO.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from expo_fast.config import Train
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.packing import Sample, pack
from expo_fast.objectives import PREFERENCE_OBJECTIVES
from expo_fast.ops import Cpo, Dpo, Hinge, Orpo, SimPo, linear_logprob, linear_preference_loss
from judges import assert_gradients_near, completion_logps, gradients_of, relative_error
from tiny import tiny_model, tiny_tokenizer, transformers_copy

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's use of transformers

TOLERANCE = 1e-5  # relative to the norm of TRL's
KIND = "qwen2"  # tied embeddings, biases

Pair = tuple[str, str, str]  # prompt, chosen, rejected
RAGGED = [
    ("3 + 4?", "7", "it may be 8, or 9"),
    ("Name a prime below 9.", "5.", "9 = 3 * 3."),
    ("3 + 4?", "three and four: seven", "34"),
    ("So?", "yes", "no"),
]
EVEN = [  # one-token prompts, and chosen completions of one length
    ("?", "three", "it may be 8, or 9"),
    ("?", "seven", "34"),
    ("!", "a cat", "no"),
]


@dataclass(frozen=True)
class Result:
    loss: Tensor  # ()
    grads: dict[str, Tensor]  # by parameter


def differentiate(model: torch.nn.Module, loss: Tensor) -> Result:
    return Result(loss.detach(), gradients_of(model, loss))


def same(ours: Result, theirs: Result) -> None:
    assert relative_error(ours.loss, theirs.loss) <= TOLERANCE
    assert_gradients_near(ours.grads, theirs.grads, TOLERANCE)


def theirs(trainer: Any, *batches: slice) -> Result:
    """Return the mean of TRL's loss over batches of its training set, by default a single one."""
    total = torch.zeros(())
    for batch in batches or (slice(None),):
        rows = list(trainer.train_dataset)[batch]
        total = total + trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    return differentiate(trainer.model, total / max(1, len(batches)))


def make_trainer(kind: Any, config: Any, pairs: list[Pair], folder: Path, **settings: Any) -> Any:
    arguments = config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **settings,
    )
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    reference = {"ref_model": transformers_copy(reference_model())} if kind is DPOTrainer else {}
    return kind(
        model=transformers_copy(policy()),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        **reference,
    )


def policy() -> Decoder:
    return tiny_model(KIND)


def reference_model() -> Decoder:
    return tiny_model(KIND, seed=1)


def token_ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text, add_special_tokens=False).input_ids)


def samples(pairs: list[Pair]) -> list[Sample]:
    """Return pair p's chosen completion at 2p, its rejected one at 2p + 1, with end tokens."""
    end = (tiny_tokenizer().eos_token_id,)
    return [
        Sample(token_ids(prompt), token_ids(completion) + end)
        for prompt, *both in pairs
        for completion in both
    ]


def ours(model: Decoder, pairs: list[Pair], objective: Any, reference: bool = False) -> Tensor:
    given = samples(pairs)
    (p,) = pack(given, 10**6)
    assert len(p.tokens) < sum(len(s.prompt_ids + s.completion_ids) - 1 for s in given)
    ref = None
    if reference:
        hidden = reference_model().hidden(p.tokens, p.positions, p.cu_seqlens, p.parents)[p.rows]
        logp = linear_logprob(hidden, reference_model().head_weight, p.targets).logp.detach()
        summed = {i: x.sum() for i, x in p.split(logp)}
        ref = torch.stack([summed[i] for i in range(len(given))])
    return linear_preference_loss(
        model.hidden(p.tokens, p.positions, p.cu_seqlens, p.parents)[p.rows],
        model.head_weight,
        p.targets,
        torch.tensor(p.members)[p.sequence_ids],
        objective=objective,
        ref_logp=ref,
    ).loss


@pytest.mark.parametrize(
    ("preference", "beta", "loss_type"),
    [
        ("dpo", 0.1, "sigmoid"),
        ("hinge", 0.5, "hinge"),  # two pairs have a gradient and two have none
        ("ipo", 0.1, "ipo"),
    ],
)
def test_losses_with_a_reference_equal_trls(
    preference: Any, beta: float, loss_type: str, tmp_path: Path
):
    config = Train(method="dpo", preference=preference, dpo_beta=beta)
    objective = PREFERENCE_OBJECTIVES[preference].build(config)
    trainer = make_trainer(
        DPOTrainer, DPOConfig, RAGGED, tmp_path, loss_type=loss_type, beta=objective.beta
    )
    model = policy()
    same(differentiate(model, ours(model, RAGGED, objective, reference=True)), theirs(trainer))


def test_label_smoothing_with_a_reference_equals_trls_aot_loss(tmp_path: Path):
    """TRL's aot loss is conservative DPO in batches of one pair, which need no sorting.

    Its sigmoid loss, which was conservative DPO before, does not read label_smoothing.
    """
    settings = {"beta": 0.1, "label_smoothing": 0.2}
    aot = make_trainer(DPOTrainer, DPOConfig, RAGGED, tmp_path, loss_type="aot", **settings)
    model, one_by_one = policy(), [slice(i, i + 1) for i in range(len(RAGGED))]
    loss = ours(model, RAGGED, Dpo(0.1, label_smoothing=0.2), reference=True)
    same(differentiate(model, loss), theirs(aot, *one_by_one))
    sigmoid = make_trainer(DPOTrainer, DPOConfig, RAGGED, tmp_path, **settings)
    same(differentiate(model, ours(model, RAGGED, Dpo(0.1), reference=True)), theirs(sigmoid))


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (Dpo(0.1, label_smoothing=0.2), {"loss_type": "sigmoid", "label_smoothing": 0.2}),
        (Hinge(0.1), {"loss_type": "hinge"}),
        (Cpo(0.1, nll_coef=0.0), {"loss_type": "sigmoid"}),
        (SimPo(2.0, gamma=0.4), {"loss_type": "simpo", "simpo_gamma": 0.4}),
    ],
)
def test_losses_without_a_reference_equal_trls(
    objective: Any, settings: dict[str, Any], tmp_path: Path
):
    settings = settings | {"beta": objective.beta, "cpo_alpha": 0.0}
    trainer = make_trainer(CPOTrainer, CPOConfig, RAGGED, tmp_path, **settings)
    model = policy()
    same(differentiate(model, ours(model, RAGGED, objective)), theirs(trainer))


def test_cpo_equals_trls_for_chosen_completions_of_one_length(tmp_path: Path):
    settings = {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.7}
    trainer = make_trainer(CPOTrainer, CPOConfig, EVEN, tmp_path, **settings)
    model = policy()
    same(differentiate(model, ours(model, EVEN, Cpo(0.1, nll_coef=0.7))), theirs(trainer))


def test_cpo_differs_from_trls_in_the_mean_of_the_nll(tmp_path: Path):
    """Ours is a mean over a sequence's targets, then over pairs; TRL's is over all targets."""
    settings = {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.7}
    trainer = make_trainer(CPOTrainer, CPOConfig, RAGGED, tmp_path, **settings)
    model = policy()
    logps = logps_of_samples(model, samples(RAGGED)[::2])
    moved = ours(model, RAGGED, Cpo(0.1, nll_coef=0.7))
    moved = moved + 0.7 * (mean_of_means(logps) - torch.cat(logps).mean())
    same(differentiate(model, moved), theirs(trainer))


def test_orpo_equals_trls_for_chosen_completions_of_one_length_and_prompts_of_one_token(
    tmp_path: Path,
):
    trainer = make_trainer(ORPOTrainer, ORPOConfig, EVEN, tmp_path, beta=0.3)
    model = policy()
    same(differentiate(model, ours(model, EVEN, Orpo(0.3))), theirs(trainer))


def test_orpo_differs_from_trls_in_the_mean_of_the_nll(tmp_path: Path):
    """Ours is as in CPO. TRL's is a mean over the batch's chosen targets and prompt tokens.

    The first token of a prompt, which has no log-prob, does not count.
    """
    trainer = make_trainer(ORPOTrainer, ORPOConfig, RAGGED, tmp_path, beta=0.3)
    model, chosen = policy(), samples(RAGGED)[::2]
    with_prompts = [Sample(s.prompt_ids[:1], s.prompt_ids[1:] + s.completion_ids) for s in chosen]
    moved = ours(model, RAGGED, Orpo(0.3)) + mean_of_means(logps_of_samples(model, chosen))
    moved = moved - torch.cat(logps_of_samples(model, with_prompts)).mean()
    same(differentiate(model, moved), theirs(trainer))


def logps_of_samples(model: Decoder, given: list[Sample]) -> list[Tensor]:
    """Return the log-probs (targets,) of each sample, in nats, with their graph."""
    return [completion_logps(model, s.prompt_ids, s.completion_ids) for s in given]


def mean_of_means(values: list[Tensor]) -> Tensor:
    return torch.stack([x.mean() for x in values]).mean()
