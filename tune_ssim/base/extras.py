"""Optional dependencies: the display name of each and the pyproject.toml extra that installs it."""

from __future__ import annotations

from importlib.util import find_spec

EXTRA_OF = {
    "torch": ("PyTorch", "losses"),
    "numpy": ("NumPy", "losses"),
    "safetensors": ("safetensors", "losses"),
    "PIL": ("Pillow", "losses"),
    "ray": ("Ray", "ray"),
    "optuna": ("Optuna", "ray"),
    "scipy": ("SciPy", "ray"),
    "pyarrow": ("PyArrow", "ray"),
    "mlflow": ("MLflow", "mlflow"),
    "matplotlib": ("Matplotlib", "pictures"),
    "jinja2": ("Jinja2", "pictures"),
    "skimage": ("scikit-image", "fundus"),
    "diffusers": ("diffusers", "diffusers"),
    "lightning": ("Lightning", "lightning"),
    "transformers": ("transformers", "transformers"),
    "accelerate": ("accelerate", "transformers"),
}


def install_hint(missing: str | None) -> str | None:
    """The install command for a missing module, e.g. `Ray: pip install 'tune-ssim[ray]'`; None if no extra provides it."""
    library = (missing or "").split(".")[0]
    if library not in EXTRA_OF:
        return None
    name, extra = EXTRA_OF[library]
    return f"{name}: pip install 'tune-ssim[{extra}]'"


def is_installed(library: str) -> bool:
    return find_spec(library) is not None


def require(library: str) -> None:
    """Raises ModuleNotFoundError if the library is not installed, without importing it.

    For CLI commands that use the library only in a subprocess."""
    if not is_installed(library):
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)
