"""What files hold, in short."""

import hashlib
from pathlib import Path


def digests(folder: Path, pattern: str = "*.safetensors") -> dict[str, str]:
    """SHA-256 of every file below `folder` whose name fits, by its path."""
    files = (path for path in folder.rglob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
