"""Context Encoding for Semantic Segmentation (EncNet, CVPR 2018)."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In sources without symbolic links (an sdist, some file systems) kernels and train lie beside this
# folder only, and are found there.
_folder = _Path(__file__).parent
if not (_folder / "kernels" / "__init__.py").is_file():
    __path__.append(str(_folder.parent))
