"""mmbert_core: fine-tune a pretrained BERT together with tabular columns into a classifier, in plain PyTorch.

    from mmbert_core import Predictor, read_config, train

    results = train(read_config("run.yaml"))
    print(results.metrics["auroc"])
    Predictor.from_folder(results.folder).predict(frame)

    model = MultimodalClassifier(text=["message"]).fit(frame, label="is_abuse")  # scikit-learn's protocol

Names are imported when they are first used: `import mmbert_core` alone imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbert_core.comparison import compare_runs
    from mmbert_core.config import Config
    from mmbert_core.config_reader import read_config
    from mmbert_core.estimator.classifier import MultimodalClassifier
    from mmbert_core.predictor import Predictor
    from mmbert_core.runtime.errors import InputError, RunError
    from mmbert_core.training.results import Results
    from mmbert_core.training.train import train

__version__ = "0.2.0"
__all__ = [
    "Config",
    "InputError",
    "MultimodalClassifier",
    "Predictor",
    "Results",
    "RunError",
    "__version__",
    "compare_runs",
    "read_config",
    "train",
]

_MODULES = {
    "Config": "mmbert_core.config",
    "InputError": "mmbert_core.runtime.errors",
    "MultimodalClassifier": "mmbert_core.estimator.classifier",
    "Predictor": "mmbert_core.predictor",
    "Results": "mmbert_core.training.results",
    "RunError": "mmbert_core.runtime.errors",
    "compare_runs": "mmbert_core.comparison",
    "read_config": "mmbert_core.config_reader",
    "train": "mmbert_core.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
