"""Run tasks of EleutherAI's evaluation harness (https://github.com/EleutherAI/lm-evaluation-harness).

    pip install -e ".[eval]"
    python -m lit_llama.harness --tasks arc_easy,hellaswag
    python -m lit_llama.harness --tasks gsm8k --trained_dir out/lora/my --chat --limit 100

A module and not a script: Python looks for imports beside a script first, and the harness imports Hugging Face's
``evaluate``, which scripts/evaluate.py would stand in for.
"""

from __future__ import annotations

from pathlib import Path

from lit_llama.cli import UserError, run


def main(
    tasks: str,
    trained_dir: str | None = None,
    checkpoint_dir: str | None = None,
    chat: bool = False,
    prompt_style: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    include_path: str | None = None,
    precision: str = "auto",
    results: str | None = None,
) -> None:
    """Evaluate a base or a trained folder on tasks of the harness.

    Args:
        tasks: Names of tasks or groups with commas between; lm_eval's own "lm_eval ls tasks" lists them.
        trained_dir: Folder that a finetune script wrote; without it the base alone is evaluated.
        checkpoint_dir: Folder of the base; by default the one trained on, or the default base.
        chat: Ask in the prompt style, examples as earlier turns; else a text is continued as it is.
        prompt_style: alpaca, chatml, llama2, llama3 or plain; by default as trained, or what the tokenizer tells.
        num_fewshot: Examples in front of each question; by default what the task says.
        limit: Only the first questions of each task.
        batch_size: Texts evaluated together; fewer take less memory.
        include_path: A folder with .yaml files of your own tasks.
        precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
        results: A .json file to write the figures to.
    """
    for name, value in (("num_fewshot", num_fewshot), ("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < (0 if name == "num_fewshot" else 1):
            raise UserError(f"--{name} {value} is too small")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from lit_llama.harness_model import load_harness_model
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError('the evaluation harness is not installed; pip install -e ".[eval]" brings it') from None
    from lit_llama.files import write_json

    manager = TaskManager(include_path=include_path)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise UserError(
            f"no task is named {', '.join(unknown)!r}: `lm_eval ls tasks` lists them, --include_path adds yours"
        )
    model = load_harness_model(trained_dir, checkpoint_dir, prompt_style, batch_size, precision)
    found = simple_evaluate(
        model,
        tasks=manager.match_tasks(names),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        log_samples=False,
    )
    print(make_table(found))
    if "groups" in found:
        print(make_table(found, "groups"))
    if results is not None:
        kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
        write_json(Path(results), {key: found[key] for key in kept if key in found})


if __name__ == "__main__":
    run(main)
