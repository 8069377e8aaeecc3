"""Download a base to checkpoints/: the default one, SmolLM2-135M-Instruct, or a LLaMA of the Hugging Face hub.

    python scripts/download.py
    python scripts/download.py --repo_id HuggingFaceTB/SmolLM2-360M-Instruct

The second needs the extra ``hub``: pip install -e ".[hub]"
"""

from pathlib import Path

from lit_llama.cli import run
from lit_llama.common.errors import UserError
from lit_llama.formats.download import download_default, download_hub
from lit_llama.settings import DEFAULT_BASE


def main(repo_id: str | None = None, out_dir: Path | None = None, revision: str | None = None) -> None:
    """Download a base model and convert it.

    Args:
        repo_id: A LLaMA on the Hugging Face hub, as owner/name. Default: the default base.
        out_dir: Folder to write. Default: one with the model's name in checkpoints/.
        revision: Branch, tag or commit of the repository. Default: its main branch.
    """
    if repo_id is None:
        if revision is not None:
            raise UserError("--revision belongs to --repo_id; the default base is one pinned file")
        out_dir = out_dir or Path(DEFAULT_BASE)
        download_default(out_dir)
    else:
        out_dir = out_dir or Path("checkpoints") / repo_id.split("/")[-1]
        download_hub(repo_id, out_dir, revision)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    run(main)
