"""Fetch a base into checkpoints/: the default one, SmolLM2-135M-Instruct, or a LLaMA of the Hugging Face hub.

    python scripts/download.py
    python scripts/download.py --repo_id HuggingFaceTB/SmolLM2-360M-Instruct

The second needs the extra ``hub``: pip install -e ".[hub]"
"""

from __future__ import annotations

from pathlib import Path

from lit_llama.cli import UserError, run


def main(repo_id: str | None = None, out_dir: Path | None = None, revision: str | None = None) -> None:
    """Fetch a base model and convert it.

    Args:
        repo_id: A repository of the Hugging Face hub with a LLaMA, as owner/name; without it the default base.
        out_dir: Folder to write, by default one below checkpoints/ with the model's name.
        revision: Branch, tag or commit of the repository, by default its main branch.
    """
    from lit_llama.formats.download import DEFAULT_BASE, download_default, download_hub

    if repo_id is None and revision is not None:
        raise UserError("--revision belongs to --repo_id; the default base is one pinned file")
    if repo_id is None:
        out_dir = out_dir or Path(DEFAULT_BASE)
        download_default(out_dir)
    else:
        out_dir = out_dir or Path("checkpoints") / repo_id.split("/")[-1]
        download_hub(repo_id, out_dir, revision)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    run(main)
