"""Config files that tests write."""

from pathlib import Path

REQUIRED = {"text_name": ["text"], "label_name": "label", "model_path": "runs/x"}


def write(folder: Path, content: str | bytes, name: str = "run.yaml") -> str:
    """The path of a new config file."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return str(path)
