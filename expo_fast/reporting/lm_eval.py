"""Accuracies in the form of lm-evaluation-harness's results files.

A key of `results` is `METRIC,FILTER`, and its standard error is `METRIC_stderr,FILTER`. Our filter
is `none`. `exact_match` is pass@1: the fraction of samples that the grader accepts.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from expo_fast.config import Evaluate
from expo_fast.reporting.accuracy import Samples, majorities, pass_chances


def lm_eval_results(
    config: Evaluate,
    problems: Sequence[Samples],
    *,
    data: str,
    summary: dict[str, Any],
    date: float,
) -> dict[str, Any]:
    """Return the JSON values of a results file.

    data: the name of the problems.
    summary: `Evaluation.summary`.
    date: seconds since 1970.
    """
    task = task_name(data)
    scores = {"exact_match": pass_chances(problems, 1)}
    for k in sorted({*config.k, config.samples} - {1}):
        scores[f"pass@{k}"] = pass_chances(problems, k)
        scores[f"maj@{k}"] = majorities(problems, k)
    results: dict[str, Any] = {"alias": task, "sample_len": len(problems)}
    for name, values in scores.items():
        results[f"{name},none"] = fmean(values)
        results[f"{name}_stderr,none"] = standard_error(values)
    generation = {
        "do_sample": config.temperature > 0,
        "temperature": config.temperature,
        "max_gen_toks": config.max_new_tokens,
    }
    return {
        "results": {task: results},
        "group_subtasks": {task: []},
        "configs": {
            task: {
                "task": task,
                "dataset_path": data,
                "output_type": "generate_until",
                "num_fewshot": config.n_shots,
                "repeats": config.samples,
                "generation_kwargs": generation,
                "metadata": {"template": summary["template"], "grader": summary["grader"]},
            }
        },
        "versions": {task: summary["grader"]},
        "n-shot": {task: config.n_shots},
        "higher_is_better": {task: dict.fromkeys(scores, True)},
        "n-samples": {task: {"original": len(problems), "effective": len(problems)}},
        "config": {
            "model": "expo_fast",
            "model_args": {"pretrained": config.model, "dtype": config.dtype},
            "device": config.device,
            "limit": config.limit,
            "gen_kwargs": generation,
            "random_seed": config.seed,
            "fewshot_seed": config.seed,
        },
        "date": date,
        "model_source": "expo_fast",
        "model_name": config.model,
        "model_name_sanitized": sanitized(config.model),
        "system_instruction": config.system_prompt,
        "total_evaluation_time_seconds": str(summary["seconds"]),
    }


def task_name(data: str) -> str:
    """Return the name of a task: that of a benchmark or file, without folder and ending."""
    name = data if ":" in data else Path(data).name.partition(".")[0]
    return sanitized(name)


def sanitized(name: str) -> str:
    """Return a name without the characters that are not allowed in a file's name."""
    return re.sub(r"[\"<>:/\\|?*\s\[\]]+", "__", name)


def standard_error(values: Sequence[float]) -> float | str:
    """Return the standard error of the mean, "N/A" for one value, as the harness writes it."""
    if len(values) < 2:
        return "N/A"
    return stdev(values) / math.sqrt(len(values))
